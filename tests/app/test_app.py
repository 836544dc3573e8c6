"""The page of ``carvana app``: how it is served, what each page says, and all of it in a real browser."""

import io
import json
import os
import re
import shutil
import socket
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from streamlit.testing.v1 import AppTest

from pipeline import workspace
from pipeline.app import cached_predictions, launch
from pipeline.app.cached_predictions import CachedImage
from pipeline.app.launch import LOOPBACK, PAGE
from pipeline.app.page_parts import error_markdown, escape_markdown
from pipeline.app.worst_images import setting_of
from pipeline.config import EnsembleSettings, InputSettings, UNetConfig, read_params
from pipeline.errors import CarvanaError
from pipeline.export.onnx_ensemble import write_ensemble
from pipeline.export.writers import write_onnx
from pipeline.inference.base_predictor import BasePredictor
from pipeline.inference.onnx_predictor import OnnxMetadata
from pipeline.kaggle.ledger import LEDGER_COLUMNS, Ledger
from pipeline.models import networks, weights
from pipeline.report.charts import accuracy_by_cost
from pipeline.report.tables import rows_of_split
from pipeline.segment import segmenter
from pipeline.segment.segmenter import Segmenter
from tests import ROOT
from tests.fakes.fake_reports import FakeReports
from tests.import_probe import HEAVY_MODULES, loaded_modules

FULL = FakeReports()
ONE_CAR = FakeReports(held_out=())
NET, SIZE = UNetConfig(architecture="unet", widths=(4, 8)), InputSettings(size=(32, 48))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project right after a clone, in which tests run."""
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def page(name: str) -> AppTest:
    """A page, drawn once, without a browser."""
    return AppTest.from_string(f"from pipeline.app import {name}\n{name}.show()", default_timeout=60).run()


def words(drawn: AppTest) -> str:
    """All that a page says; nothing may have failed in a way that it has no words for."""
    assert not drawn.exception
    kinds = (drawn.title, drawn.subheader, drawn.markdown, drawn.caption, drawn.info, drawn.error, drawn.warning)
    return "\n".join(element.value for kind in kinds for element in kind)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class TestServe:
    @pytest.fixture
    def started(self, here: Path, monkeypatch: pytest.MonkeyPatch) -> list[list[str]]:
        """The command lines that the process became."""
        commands: list[list[str]] = []
        monkeypatch.setattr(os, "execv", lambda path, arguments: commands.append(arguments))
        return commands

    def test_app_listens_on_loopback_without_telemetry(
        self, started: list[list[str]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        port = free_port()
        launch.serve_app(LOOPBACK, port)
        (command,) = started
        assert command[:3] == [sys.executable, "-m", "pipeline.app.launch"]
        assert PAGE.is_file()
        expected = {
            "server.address=127.0.0.1",
            f"server.port={port}",
            "server.headless=true",
            "server.enableXsrfProtection=true",
            "server.maxUploadSize=32",
            "server.allowedHosts=localhost",
            "browser.gatherUsageStats=false",
            "client.showErrorDetails=none",
        }
        assert {f"--{option}" for option in expected} <= set(command)
        printed = capsys.readouterr()
        assert f"http://127.0.0.1:{port}" in printed.out
        assert "warning" not in printed.err

    def test_app_allows_the_host_it_is_bound_to(self, started: list[list[str]]) -> None:
        launch.serve_app("127.0.0.2", free_port())
        assert "--server.allowedHosts=127.0.0.2" in started[0]

    def test_app_warns_when_bound_to_all_addresses(
        self, started: list[list[str]], capsys: pytest.CaptureFixture[str]
    ) -> None:
        launch.serve_app("0.0.0.0", free_port())
        assert "no password" in capsys.readouterr().err
        assert not any("allowedHosts" in option for option in started[0])

    def test_a_port_that_is_taken(self, started: list[list[str]]) -> None:
        with socket.socket() as other:
            other.bind(("127.0.0.1", 0))
            other.listen()
            port = other.getsockname()[1]
            with pytest.raises(CarvanaError, match=f"{port}"):
                launch.serve_app(LOOPBACK, port)
        assert not started

    @pytest.mark.parametrize(
        ("address", "port", "told"),
        [
            ("127.0.0.1", 0, "--port 0"),
            ("127.0.0.1", 70_000, "--port 70000"),
            ("here", 8501, "--address here"),
            ("203.0.113.7", 8501, "--address"),
        ],
    )
    def test_unavailable_port_or_address(self, started: list[list[str]], address: str, port: int, told: str) -> None:
        with pytest.raises(CarvanaError, match=re.escape(told)):
            launch.serve_app(address, port)
        assert not started

    def test_streamlit_is_not_installed(self, started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "find_spec", lambda name: None)
        with pytest.raises(CarvanaError, match=re.escape("pip install '.[app]'")):
            launch.serve_app(LOOPBACK, free_port())

    def test_app_outside_a_project(
        self, started: list[list[str]], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
        with pytest.raises(CarvanaError, match=r"params\.yaml"):
            launch.serve_app(LOOPBACK, free_port())

    def test_pages_without_nets_load_neither_torch_nor_kaggles_client(self) -> None:
        modules = loaded_modules(
            "import pipeline.app.ablation_page, pipeline.app.submissions_page, pipeline.app.try_page"
        )
        assert modules.isdisjoint(HEAVY_MODULES | {"kaggle", "kagglesdk"})


class TestWords:
    @pytest.mark.parametrize(
        ("told", "shown"),
        [
            ("/srv/ab/data is gone", "data is gone"),
            ("File:/srv/ab/data is gone", r"File\:data is gone"),
            ("/home/me/secret/train.zip can't be read", "train.zip can't be read"),
            ("in '/var/lib/x/y.csv'", "in `y.csv`"),
            ("folds/small/0 holds no net", "folds/small/0 holds no net"),
            (r"C:\Users\me\y.csv", "y.csv"),
            ("run 'dvc repro', which makes a fold's net", "run `dvc repro`, which makes a fold's net"),
            ("see https://example.com/a/b", r"see https\://example.com/a/b"),
        ],
    )
    def test_no_folder_of_the_server(self, told: str, shown: str) -> None:
        assert error_markdown(CarvanaError(told)) == shown

    def test_the_projects_own_files_as_it_knows_them(self, here: Path) -> None:
        assert error_markdown(CarvanaError(f"{here}/folds/folds.csv is truncated")) == "folds/folds.csv is truncated"

    def test_a_folder_of_data_with_a_name_of_several_words(self, here: Path) -> None:
        text = (here / "params.yaml").read_text(encoding="utf-8")
        text = text.replace("directory: null", "directory: /srv/our own/cars of all", 1)
        (here / "params.yaml").write_text(text, encoding="utf-8")
        assert error_markdown(CarvanaError("/srv/our own/cars of all is gone")) == "cars of all is gone"

    def test_file_names_are_escaped_in_markdown(self) -> None:
        assert escape_markdown("![](http://x/y.png)*a*") == r"!\[\](http\://x/y.png)\*a\*"


class TestTry:
    @pytest.fixture
    def net(self, here: Path) -> Path:
        """A net that learned nothing, and no data."""
        for fold in (0, 1):
            folder = here / f"folds/small/{fold}"
            folder.mkdir(parents=True)
            weights.save_config(folder, NET, SIZE, {})
            state = networks.build_model(NET, SIZE, seed=fold).state_dict()
            weights.save_weights(folder / workspace.WEIGHTS["last"], state)
        return here

    def test_without_a_net_it_says_what_to_run(self, here: Path) -> None:
        assert "`carvana repro`" in words(page("try_page"))

    def test_without_data_there_is_the_upload_alone(self, net: Path) -> None:
        drawn = page("try_page")
        said = words(drawn)
        assert "No test images available" in said
        assert "`dvc repro --force download`" in said
        assert str(net) not in said
        assert not drawn.slider

    def test_a_picture_and_what_changes_its_mask(self, net: Path) -> None:
        drawn = page("try_page")
        drawn.file_uploader[0].set_value(("car.png", png(noise(60, 90)), "image/png")).run()
        assert "Mask coverage" in words(drawn)
        before = share(drawn)
        drawn.slider[0].set_value(0.01).run()
        assert share(drawn) == 100.0 > before
        drawn.slider[0].set_value(0.99).run()
        assert share(drawn) == 0.0
        assert [button.label for button in drawn.get("download_button")] == ["Mask", "Cutout", "RLE"]

    def test_several_nets_are_merged(self, net: Path) -> None:
        drawn = page("try_page")
        drawn.file_uploader[0].set_value(("car.png", png(noise(60, 90)), "image/png")).run()
        assert not drawn.radio
        pills(drawn, "Folds").set_value(["0", "1"]).run()
        assert drawn.radio[0].label == "Merge"
        assert "small/1" in words(drawn)
        pills(drawn, "Views").set_value([]).run()
        assert "one net" in words(drawn)

    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (b"no picture at all", "not a JPEG, PNG or WebP"),
            (b"\xff\xd8\xff\xe0 truncated", "car"),
        ],
    )
    def test_upload_that_is_not_an_image(self, net: Path, data: bytes, told: str) -> None:
        drawn = page("try_page")
        drawn.file_uploader[0].set_value(("[car](x).png", data, "image/png")).run()
        assert told in drawn.error[0].value
        assert r"\[car\]" in drawn.error[0].value

    def test_a_decompression_bomb(self, net: Path) -> None:
        drawn = page("try_page")
        bomb = io.BytesIO()
        Image.new("1", (8000, 8000)).save(bomb, "PNG")
        assert len(bomb.getvalue()) < 1 << 16
        drawn.file_uploader[0].set_value(("bomb.png", bomb.getvalue(), "image/png")).run()
        assert re.search("8000 x 8000 pixels.* 25 million", drawn.error[0].value)

    def test_each_view_is_predicted_once(self, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        asked: list[list[str]] = []
        look = Segmenter.predict

        def counted(self: Segmenter, image_HWC: Any) -> Any:
            asked.extend(net.views for net in self.nets.values())
            return look(self, image_HWC)

        monkeypatch.setattr(Segmenter, "predict", counted)
        image_HWC, params = noise(50, 70), read_params()
        sight = CachedImage("car.png", image_HWC)
        sight.predict(["small/0"], ["identity"], params)
        sight.predict(["small/0"], ["identity", "hflip"], params)
        looked = sight.predict(["small/0"], ["identity", "hflip"], params)
        assert asked == [["identity"], ["hflip"]]
        at_once = Segmenter(
            {"small/0": segmenter.load_predictor("small/0", ["identity", "hflip"], device="cpu")}
        ).predict(image_HWC)
        for view, level_map in at_once.maps["small/0"].items():
            assert np.array_equal(looked.maps["small/0"][view].to_full_size(50, 70), level_map.to_full_size(50, 70))

    def test_retrained_net_is_predicted_again(self, net: Path) -> None:
        sight, params = CachedImage("car.png", noise(50, 70)), read_params()
        before = sight.predict(["small/0"], ["identity"], params).maps["small/0"]["identity"].to_full_size(50, 70)
        state = networks.build_model(NET, SIZE, seed=7).state_dict()
        weights.save_weights(net / "folds/small/0" / workspace.WEIGHTS["last"], state)
        after = sight.predict(["small/0"], ["identity"], params).maps["small/0"]["identity"].to_full_size(50, 70)
        assert not np.array_equal(before, after)

    def test_an_export_of_an_ensemble_has_views_of_its_own(self, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        class Export(BasePredictor):
            views, input = ["ensemble"], SIZE

            def with_tta(self, views: Any) -> Any:
                return self

            def preprocess(self, image_HWC: Any) -> Any:
                return image_HWC

            def predict_u8_at_sizes(self, inputs: Any, sizes: Any) -> Any:
                return [np.full((1, *size), 200, np.uint8) for size in sizes]

            def predict_u8(self, inputs: Any, height: int, width: int) -> Any:
                return np.stack(self.levels_at(workspace, [(height, width)] * len(workspace)))

        speak = cached_predictions.cached_predictor
        made = "exports/small/ensemble.onnx"
        monkeypatch.setattr(
            cached_predictions, "cached_predictor", lambda name, p: Export() if name == made else speak(name, p)
        )
        sight = CachedImage("car.png", noise(50, 70))
        looked = sight.predict([made, "small/0"], ["identity", "hflip"], read_params())
        assert [list(maps) for maps in looked.maps.values()] == [["ensemble"], ["identity", "hflip"]]
        masked = Segmenter({}).combine(looked, EnsembleSettings(threshold=0.3))
        assert set(masked.seconds) == {"prepare", made, "small/0", "merge"}

    def test_prediction_cache_is_bounded(self, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sight, params, asked = CachedImage("car.png", noise(50, 70)), read_params(), []
        look = Segmenter.predict
        monkeypatch.setattr(Segmenter, "predict", lambda self, image: (asked.extend(self.nets), look(self, image))[1])
        sight.predict(["small/0"], ["identity"], params)
        sight.predict(["small/1"], ["identity"], params)
        sight.predict(["small/0"], ["identity"], params)
        assert asked == ["small/0", "small/1"]
        monkeypatch.setattr(cached_predictions, "_CACHE_BYTES", 1)
        looked = sight.predict(
            ["small/0"], ["identity", "hflip"], params
        )  # the other net's are let go, not those shown
        assert set(looked.maps["small/0"]) == {"identity", "hflip"}
        sight.predict(["small/1"], ["identity"], params)
        assert asked == ["small/0", "small/1", "small/0", "small/1"]

    def test_more_than_memory_holds_is_refused(self, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cached_predictions, "_MAX_BYTES", 3 * 50 * 70)
        sight, params = CachedImage("car.png", noise(50, 70)), read_params()
        with pytest.raises(CarvanaError, match=r"\b3\b"):
            sight.predict(["small/0", "small/1"], ["identity", "hflip"], params)

    def test_cached_predictions_do_not_load_the_net(self, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sight, params = CachedImage("car.png", noise(50, 70)), read_params()
        before = sight.predict(["small/0"], ["identity"], params)
        monkeypatch.delattr(cached_predictions, "cached_predictor")
        assert sight.predict(["small/0"], ["identity"], params).maps == before.maps

    def test_other_weights_are_predicted_again(self, net: Path) -> None:
        sight, params = CachedImage("car.png", noise(50, 70)), read_params()
        before = sight.predict(["small/0"], ["identity"], params).maps["small/0"]["identity"].to_full_size(50, 70)
        folder = net / "folds/small/0"
        shutil.copyfile(net / "folds/small/1" / workspace.WEIGHTS["last"], folder / workspace.WEIGHTS["best"])
        sight.predict(["small/0"], ["identity"], params)
        best = params.model_copy(update={"predict": params.predict.model_copy(update={"checkpoint": "best"})})
        after = sight.predict(["small/0"], ["identity"], best).maps["small/0"]["identity"].to_full_size(50, 70)
        assert not np.array_equal(before, after)

    def test_a_net_that_is_removed_meanwhile(self, net: Path) -> None:
        shutil.rmtree(net / "folds/small/0")
        with pytest.raises(CarvanaError, match="small/0"):
            CachedImage("car.png", noise(50, 70)).predict(["small/0"], ["identity"], read_params())

    @pytest.mark.slow
    def test_an_exported_ensemble_begins_at_its_own_threshold(self, net: Path) -> None:
        exports = net / "exports/small"
        exports.mkdir(parents=True)
        facts = OnnxMetadata(kind="net", model="small", folds=(0,), input=SIZE)
        write_onnx(networks.load_model(net / "folds/small/0")[0], facts, net / "0.onnx")
        facts = OnnxMetadata(kind="ensemble", model="small", folds=(0,), input=SIZE, threshold=0.3)
        write_ensemble([net / "0.onnx"], facts, exports / "ensemble.onnx")
        drawn = page("try_page")
        drawn.file_uploader[0].set_value(("car.png", png(noise(60, 90)), "image/png")).run()
        assert drawn.slider[0].value == 0.5
        pills(drawn, "Nets").set_value(["exports/small/ensemble.onnx"]).run()
        assert drawn.slider[0].value == 0.3
        pills(drawn, "Nets").set_value(["exports/small/ensemble.onnx", "small"]).run()
        assert drawn.slider[0].value == 0.5

    def test_shown_no_larger_than_a_screen(self) -> None:
        assert CachedImage("tall.png", np.zeros((4000, 1000, 3), np.uint8)).shape == (240, 960)
        assert CachedImage("small.png", np.zeros((10, 20, 3), np.uint8)).shape == (20, 10)

    @pytest.mark.parametrize("size", [(1027, 481), (2444, 414), (961, 1279), (5000, 3), (3, 5000), (1, 1)], ids=str)
    def test_a_picture_of_any_shape_is_shown_as_large_as_what_lies_over_it(self, size: tuple[int, int]) -> None:
        sight = CachedImage("car.png", np.zeros((*size, 3), np.uint8))
        assert sight.display_HWC.shape == (sight.shape[1], sight.shape[0], 3)

    def test_a_tall_picture(self, net: Path) -> None:
        drawn = page("try_page")
        drawn.file_uploader[0].set_value(("tall.png", png(noise(1027, 481)), "image/png")).run()
        assert "Mask coverage" in words(drawn)


def noise(height: int, width: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(image_HWC: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "PNG")
    return file.getvalue()


def share(drawn: AppTest) -> float:
    (found,) = re.findall(r"Mask coverage: ([\d.]+)%", words(drawn))
    return float(found)


def pills(drawn: AppTest, label: str) -> Any:
    (found,) = [group for group in drawn.button_group if group.label == label]
    return found


def put_reports(folder: Path, drawn: FakeReports) -> None:
    (folder / "reports").mkdir()
    drawn.settings().to_csv(folder / "reports/ablation.csv", index=False)
    drawn.disagreement().to_csv(folder / "reports/image_disagreement.csv", index=False)
    facts = drawn.summary() | {"nets": {}}
    (folder / "reports/ablation.json").write_text(json.dumps(facts), encoding="utf-8")


class TestCompare:
    def test_without_reports_it_says_what_to_run(self, here: Path) -> None:
        said = words(page("ablation_page"))
        assert "`carvana repro`" in said
        assert "`dvc repro ablate`" in said

    def test_all_settings_and_those_of_a_filter(self, here: Path) -> None:
        put_reports(here, FULL)
        drawn = page("ablation_page")
        rows = rows_of_split(FULL.settings(), "oof")
        table = drawn.dataframe[0].value
        assert len(table) == len(rows)
        assert table["Dice"].iloc[0] == pytest.approx(rows["dice"].max())
        assert table["current"].tolist().count("◆") == 1
        pills(drawn, "Models").set_value(["small"]).run()
        pills(drawn, "Views").set_value(["hflip"]).run()
        left = rows[(rows["models"] == "small") & (rows["views"] == "hflip")]
        assert len(drawn.dataframe[0].value) == len(left)
        assert f"{len(left)} settings" in words(drawn)
        pills(drawn, "Merge").set_value(["majority_vote"]).run()
        assert "Remove one" in words(drawn)

    def test_held_out_cars_have_folds(self, here: Path) -> None:
        put_reports(here, FULL)
        drawn = page("ablation_page")
        assert "folds" not in drawn.dataframe[0].value
        pills(drawn, "Cars").set_value("holdout").run()
        assert {"0", "0 1 2"} <= set(drawn.dataframe[0].value["folds"])

    def test_refused_split_shows_the_reason(self, here: Path) -> None:
        put_reports(here, ONE_CAR)
        drawn = page("ablation_page")
        pills(drawn, "Cars").set_value("holdout").run()
        assert "set folds.holdout_cars to 2 or more, and run `dvc repro`" in words(drawn).replace("\\_", "_")

    def test_ablation_page_without_photographs(self, here: Path) -> None:
        put_reports(here, FULL)
        drawn = page("ablation_page")
        assert len(drawn.error) == 1
        assert "dvc repro --force download" in drawn.error[0].value
        assert str(here) not in drawn.error[0].value
        assert drawn.get("vega_lite_chart")

    def test_a_report_of_another_version(self, here: Path) -> None:
        put_reports(here, FULL)
        (here / "reports/ablation.json").write_text("{}", encoding="utf-8")
        assert "`dvc repro ablate`" in page("ablation_page").error[0].value

    @pytest.mark.parametrize("name", ["ablation.csv", "ablation.json"])
    def test_truncated_report(self, here: Path, name: str) -> None:
        put_reports(here, FULL)
        path = here / "reports" / name
        path.write_bytes(path.read_bytes()[:-7] + b"\xff")
        drawn = page("ablation_page")
        assert name in drawn.error[0].value
        assert "`dvc repro`" in drawn.error[0].value

    def test_clicks_select_points_by_their_setting_and_a_chosen_one_is_marked(self) -> None:
        rows = rows_of_split(FULL.settings(), "oof")
        plain, picked = accuracy_by_cost(rows), accuracy_by_cost(rows, "picked", rows.iloc[3].to_dict())
        assert "params" not in plain
        (selection,) = picked["params"]
        assert (selection["name"], selection["select"]["fields"]) == ("picked", ["setting"])
        assert json.dumps(picked).count('"selected"') == 2
        assert '"selected"' not in json.dumps(plain)

    def test_a_rows_setting(self) -> None:
        row = FULL.settings().iloc[-1].to_dict() | {"weights": "small=2 resnet18=1"}
        setting = setting_of(row)
        assert setting.row() == {name: row[name] for name in setting.row()}


def ledger_row(number: int, **cells: str) -> dict[str, str]:
    own = 0.99 + number / 1000
    scores = {"public_score": f"{own - 0.0004:.6f}", "private_score": f"{own - 0.0007:.6f}"}
    known = {"oof_dice": f"{own - 0.005:.6f}", "holdout_dice": f"{own:.6f}", "content_sha256": str(number)}
    told = {"time_utc": f"2026-11-{number + 1:02d}T10:00:00Z", "tag": f"t{number}", "description": f"try {number}"}
    return dict.fromkeys(LEDGER_COLUMNS, "") | scores | known | told | {"status": "complete"} | cells


class TestSubmissions:
    @pytest.mark.parametrize("header", [False, True])
    def test_without_a_ledger_it_says_what_to_run(self, here: Path, header: bool) -> None:
        if header:
            shutil.copytree(ROOT / "submissions", here / "submissions")
        assert "`carvana submit" in words(page("submissions_page"))

    def test_own_dice_beside_the_scores(self, here: Path) -> None:
        ledger = Ledger(here / "submissions/ledger.csv")
        for number in range(4):
            ledger.add(ledger_row(number))
        drawn = page("submissions_page")
        table = drawn.dataframe[0].value
        assert table["description"].tolist() == ["try 3", "try 2", "try 1", "try 0"]
        assert table.loc[table["description"] == "try 1", "public"].item() == pytest.approx(0.9906)
        assert "nets" not in table, "of a CSV of unknown nets there is nothing to count"
        assert len(drawn.get("vega_lite_chart")) == 2
        said = words(drawn)
        assert "holdout Dice: 1.000 (4 submissions) with the public score" in said
        assert "error" not in table  # nothing stands in it

    def test_submission_without_a_score_yet(self, here: Path) -> None:
        waiting = ledger_row(0, status="pending", public_score="", private_score="")
        Ledger(here / "submissions/ledger.csv").add(waiting)
        drawn = page("submissions_page")
        assert "`carvana submissions` fetches the scores" in words(drawn)
        assert not drawn.get("vega_lite_chart")

    def test_rows_added_by_hand(self, here: Path) -> None:
        Ledger(here / "submissions/ledger.csv").add(ledger_row(0, description="", time_utc=""))
        drawn = page("submissions_page")
        assert len(drawn.get("vega_lite_chart")) == 2 and words(drawn)

    def test_errors_name_no_folder_of_the_server(self, here: Path) -> None:
        refused = "Kaggle refused the credentials from /home/alice/.kaggle/kaggle.json (401)"
        Ledger(here / "submissions/ledger.csv").add(ledger_row(0, status="error", error=refused))
        assert page("submissions_page").dataframe[0].value["error"].tolist() == [
            "Kaggle refused the credentials from kaggle.json (401)"
        ]

    def test_a_damaged_ledger(self, here: Path) -> None:
        ledger = Ledger(here / "submissions/ledger.csv")
        ledger.add(ledger_row(0))
        with ledger.file.open("a", encoding="utf-8") as lines:
            lines.write("1,2,3\n")
        drawn = page("submissions_page")
        assert "line 3" in drawn.error[0].value
