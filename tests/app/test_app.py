"""The page of ``carvana app``: how it is served, what each page says, and all of it in a real browser."""

import csv
import io
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import requests
from PIL import Image
from streamlit.testing.v1 import AppTest

from pipeline import workspace
from pipeline.ablation.runner import scoring_groups
from pipeline.app import cached_predictions, launch, page_parts
from pipeline.app.cached_predictions import CachedImage
from pipeline.app.launch import LOOPBACK, PAGE
from pipeline.app.page_parts import error_markdown, escape_markdown
from pipeline.app.worst_images import score_images, setting_of
from pipeline.competition import rle
from pipeline.config import EnsembleSettings, InputSettings, UNetConfig, read_params
from pipeline.errors import CarvanaError
from pipeline.export.onnx_ensemble import write_ensemble
from pipeline.export.writers import write_onnx
from pipeline.inference.base_predictor import BasePredictor
from pipeline.inference.onnx_predictor import OnnxMetadata
from pipeline.kaggle.ledger import LEDGER_COLUMNS, Ledger
from pipeline.models import networks
from pipeline.report.charts import accuracy_by_cost
from pipeline.report.tables import read_table, rows_of_split
from pipeline.segment import segmenter
from pipeline.segment.image_loader import load_image
from pipeline.segment.segmenter import Segmenter
from tests import ROOT
from tests.end_to_end.dvc_project import TINY, Project
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

    def test_this_machine_alone_and_no_word_to_anybody(
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

    def test_another_address_of_this_machine_is_a_name_of_it(self, started: list[list[str]]) -> None:
        launch.serve_app("127.0.0.2", free_port())
        assert "--server.allowedHosts=127.0.0.2" in started[0]

    def test_a_word_of_warning_where_others_can_reach_it(
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
            with pytest.raises(CarvanaError, match=rf"Port {port} .* is taken.*--port"):
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
    def test_what_cannot_be_had(self, started: list[list[str]], address: str, port: int, told: str) -> None:
        with pytest.raises(CarvanaError, match=re.escape(told)):
            launch.serve_app(address, port)
        assert not started

    def test_streamlit_is_not_installed(self, started: list[list[str]], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(launch, "find_spec", lambda name: None)
        with pytest.raises(CarvanaError, match=re.escape("pip install '.[app]'")):
            launch.serve_app(LOOPBACK, free_port())

    def test_outside_of_a_project(
        self, started: list[list[str]], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path_factory.mktemp("elsewhere"))
        with pytest.raises(CarvanaError, match="run this in the project's folder"):
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

    def test_a_name_is_no_markup(self) -> None:
        assert escape_markdown("![](http://x/y.png)*a*") == r"!\[\](http\://x/y.png)\*a\*"


class TestTry:
    @pytest.fixture
    def net(self, here: Path) -> Path:
        """A net that learned nothing, and no data."""
        for fold in (0, 1):
            folder = here / f"folds/small/{fold}"
            folder.mkdir(parents=True)
            networks.save_config(folder, NET, SIZE, {})
            state = networks.build_model(NET, SIZE, seed=fold).state_dict()
            networks.save_weights(folder / workspace.WEIGHTS["last"], state)
        return here

    def test_without_a_net_it_says_what_to_run(self, here: Path) -> None:
        assert "`carvana repro`" in words(page("try_page"))

    def test_without_data_there_is_the_upload_alone(self, net: Path) -> None:
        drawn = page("try_page")
        said = words(drawn)
        assert "There are no test images" in said
        assert "`dvc repro --force download`" in said
        assert str(net) not in said
        assert not drawn.slider

    def test_a_picture_and_what_changes_its_mask(self, net: Path) -> None:
        drawn = page("try_page")
        drawn.file_uploader[0].set_value(("car.png", png(noise(60, 90)), "image/png")).run()
        assert "of the picture is car" in words(drawn)
        before = share(drawn)
        drawn.slider[0].set_value(0.01).run()
        assert share(drawn) == 100.0 > before
        drawn.slider[0].set_value(0.99).run()
        assert share(drawn) == 0.0
        assert [button.label for button in drawn.get("download_button")] == ["Mask", "Cut-out", "Run lengths"]

    def test_several_nets_are_merged(self, net: Path) -> None:
        drawn = page("try_page")
        drawn.file_uploader[0].set_value(("car.png", png(noise(60, 90)), "image/png")).run()
        assert not drawn.radio
        pills(drawn, "Folds").set_value(["0", "1"]).run()
        assert drawn.radio[0].label == "Merge"
        assert "small/1" in words(drawn)
        pills(drawn, "Views").set_value([]).run()
        assert "Choose a net and a view" in words(drawn)

    @pytest.mark.parametrize(
        ("data", "told"),
        [
            (b"no picture at all", "is no JPEG, PNG or WebP"),
            (b"\xff\xd8\xff\xe0 truncated", "car"),
        ],
    )
    def test_what_is_no_picture(self, net: Path, data: bytes, told: str) -> None:
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

    def test_nets_are_asked_but_once_a_view(self, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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

    def test_a_net_that_was_trained_anew_is_asked_anew(self, net: Path) -> None:
        sight, params = CachedImage("car.png", noise(50, 70)), read_params()
        before = sight.predict(["small/0"], ["identity"], params).maps["small/0"]["identity"].to_full_size(50, 70)
        state = networks.build_model(NET, SIZE, seed=7).state_dict()
        networks.save_weights(net / "folds/small/0" / workspace.WEIGHTS["last"], state)
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

    def test_what_nets_said_is_kept_within_bounds(self, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sight, params, asked = CachedImage("car.png", noise(50, 70)), read_params(), []
        look = Segmenter.predict
        monkeypatch.setattr(Segmenter, "predict", lambda self, image: (asked.extend(self.nets), look(self, image))[1])
        sight.predict(["small/0"], ["identity"], params)
        sight.predict(["small/1"], ["identity"], params)
        sight.predict(["small/0"], ["identity"], params)
        assert asked == ["small/0", "small/1"]
        monkeypatch.setattr(cached_predictions, "_KEPT", 1)
        looked = sight.predict(
            ["small/0"], ["identity", "hflip"], params
        )  # the other net's are let go, not those shown
        assert set(looked.maps["small/0"]) == {"identity", "hflip"}
        sight.predict(["small/1"], ["identity"], params)
        assert asked == ["small/0", "small/1", "small/0", "small/1"]

    def test_more_than_memory_holds_is_refused(self, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(cached_predictions, "_MOST", 3 * 50 * 70)
        sight, params = CachedImage("car.png", noise(50, 70)), read_params()
        with pytest.raises(CarvanaError, match="choose 3 nets times views at most"):
            sight.predict(["small/0", "small/1"], ["identity", "hflip"], params)

    def test_a_net_is_not_loaded_for_what_it_has_said(self, net: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        sight, params = CachedImage("car.png", noise(50, 70)), read_params()
        before = sight.predict(["small/0"], ["identity"], params)
        monkeypatch.delattr(cached_predictions, "cached_predictor")
        assert sight.predict(["small/0"], ["identity"], params).maps == before.maps

    def test_other_weights_are_asked_anew(self, net: Path) -> None:
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
        with pytest.raises(CarvanaError, match="There is no net 'small/0'"):
            CachedImage("car.png", noise(50, 70)).predict(["small/0"], ["identity"], read_params())

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
        assert "of the picture is car" in words(drawn)


def noise(height: int, width: int) -> Any:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def png(image_HWC: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(image_HWC).save(file, "PNG")
    return file.getvalue()


def share(drawn: AppTest) -> float:
    (found,) = re.findall(r"([\d.]+)% of the picture is car", words(drawn))
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
        assert table["now"].tolist().count("◆") == 1
        pills(drawn, "Models").set_value(["small"]).run()
        pills(drawn, "Views").set_value(["hflip"]).run()
        left = rows[(rows["models"] == "small") & (rows["views"] == "hflip")]
        assert len(drawn.dataframe[0].value) == len(left)
        assert f"{len(left)} settings" in words(drawn)
        pills(drawn, "Merge").set_value(["majority_vote"]).run()
        assert "take a filter away" in words(drawn)

    def test_held_out_cars_have_folds(self, here: Path) -> None:
        put_reports(here, FULL)
        drawn = page("ablation_page")
        assert "folds" not in drawn.dataframe[0].value
        pills(drawn, "Cars").set_value("holdout").run()
        assert {"0", "0 1 2"} <= set(drawn.dataframe[0].value["folds"])

    def test_what_was_refused_says_why(self, here: Path) -> None:
        put_reports(here, ONE_CAR)
        drawn = page("ablation_page")
        pills(drawn, "Cars").set_value("holdout").run()
        assert "set folds.holdout_cars to 2 or more, and run `dvc repro`" in words(drawn).replace("\\_", "_")

    def test_without_the_photographs_all_but_them(self, here: Path) -> None:
        put_reports(here, FULL)
        drawn = page("ablation_page")
        assert len(drawn.error) == 1
        assert "bring the data in again" in drawn.error[0].value
        assert str(here) not in drawn.error[0].value
        assert drawn.get("vega_lite_chart")

    def test_a_report_of_another_version(self, here: Path) -> None:
        put_reports(here, FULL)
        (here / "reports/ablation.json").write_text("{}", encoding="utf-8")
        assert "`dvc repro ablate`" in page("ablation_page").error[0].value

    @pytest.mark.parametrize("name", ["ablation.csv", "ablation.json"])
    def test_a_torn_report(self, here: Path, name: str) -> None:
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
        assert json.dumps(picked).count('"chosen"') == 2
        assert '"chosen"' not in json.dumps(plain)

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
        assert "held-out cars: 1.000 (4 submissions) with the public score" in said
        assert "error" not in table  # nothing stands in it

    def test_what_waits_for_its_score(self, here: Path) -> None:
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


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, tiny_sample: Path) -> Project:
    """A project that trained tiny nets and compared settings on all cars there are."""
    changes = TINY | {"folds.holdout_cars": 2, "data.directory": str(tiny_sample)}
    project = Project(tmp_path_factory.mktemp("app") / "project", changes)
    project.repro("ablate")
    return project


@pytest.mark.slow
@pytest.mark.parametrize("split", ["oof", "holdout"])
def test_images_score_under_any_setting_what_the_ablation_says(
    trained: Project, split: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(trained.folder)
    params, done = read_params(), []
    images = workspace.training_images(params)
    stored = scoring_groups(params, images.ids(), workspace.read_fold_by_car(), split)
    rows = rows_of_split(page_parts.read_report_table("ablation.csv"), split)
    for _, row in rows.iloc[:: max(1, len(rows) // 4)].iterrows():
        scored = score_images(stored, setting_of(row.to_dict()), images, done.append)
        assert scored["dice"].mean() == pytest.approx(row["dice"], abs=1e-8)
        assert len(scored) == row["images"]
    assert max(done) == 1.0
    now = rows[rows["current"]].iloc[0].to_dict()
    scored = score_images(stored, setting_of(now), images, done.append).set_index("image_id")
    known = rows_of_split(page_parts.read_report_table("image_disagreement.csv"), split).set_index("image_id")
    pd.testing.assert_series_equal(scored["dice"].sort_index(), known["dice"].sort_index(), atol=1e-8)


@pytest.fixture(scope="module")
def served(trained: Project) -> Iterator[str]:
    """The address of the page, served as users serve it."""
    port = free_port()
    process = trained.start("carvana", "app", "--port", str(port))
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(lambda: is_up(address))
        yield address
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 0
        assert "Traceback" not in trained.log.read_text()
    finally:
        process.kill()


def is_up(address: str) -> bool:
    try:
        return bool(requests.get(f"{address}/_stcore/health", timeout=5).ok)
    except requests.ConnectionError:
        return False


def wait_for(ready: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < deadline, "It never came so far."
        time.sleep(0.2)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium; a test that asks for it is skipped without one."""
    sync_api = pytest.importorskip("playwright.sync_api")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("needs chromium")
    with sync_api.sync_playwright() as playwright:
        # Without its own sandbox it runs as root, in a container, too.
        yield playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])


class Visit:
    """Somebody at the page, on a screen so wide."""

    def __init__(self, browser: Any, address: str, width: int = 1280) -> None:
        self.context = browser.new_context(viewport={"width": width, "height": 900}, has_touch=width < 600)
        self.page = self.context.new_page()
        self.page.set_default_timeout(60_000)
        self.asked: set[str] = set()
        self.faults: list[str] = []
        self.page.on("request", lambda request: self.asked.add(request.url))
        self.page.on("websocket", lambda socket: self.asked.add(socket.url))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.address = address

    def __enter__(self) -> "Visit":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def go(self, name: str) -> None:
        """Open a page and wait until it is drawn."""
        self.page.goto(f"{self.address}/{name}")
        self.page.get_by_role("heading", level=1).wait_for()
        self.settle()

    def settle(self) -> None:
        """Wait until the page is drawn whole."""
        launch = "document.querySelector('[data-testid=stApp]')"
        self.page.wait_for_timeout(300)  # until the server has heard
        self.page.wait_for_function(f"() => {launch}?.getAttribute('data-test-script-state') === 'notRunning'")
        self.page.wait_for_timeout(300)

    @property
    def text(self) -> str:
        return str(self.page.locator("[data-testid=stMain]").inner_text())

    def source(self, picture: str) -> str:
        return str(self.page.locator(f"img.{picture}").get_attribute("src"))

    def wait_for_another(self, picture: str, than: str) -> None:
        self.page.wait_for_function(
            """([name, old]) => {
                const within = (root) => root.querySelector(`img.${name}`)
                    ?? [...root.querySelectorAll("*")].map((e) => e.shadowRoot && within(e.shadowRoot)).find(Boolean);
                const picture = within(document);
                return picture && picture.getAttribute("src") !== old;
            }""",
            arg=[picture, than],
        )

    def upload(self, name: str, data: bytes) -> None:
        file = {"name": name, "mimeType": "image/jpeg", "buffer": data}
        self.page.locator("input[type=file]").set_input_files(file)

    def download(self, label: str) -> bytes:
        with self.page.expect_download() as caught:
            self.page.get_by_role("button", name=label, exact=True).click()
        return Path(caught.value.path()).read_bytes()


@pytest.fixture
def visit(browser: Any, served: str) -> Iterator[Visit]:
    with Visit(browser, served) as visit:
        yield visit
        assert not visit.faults


@pytest.fixture
def photograph(tiny_sample: Path) -> bytes:
    with zipfile.ZipFile(tiny_sample / "test.zip") as pictures:
        return pictures.read(next(name for name in pictures.namelist() if name.endswith("_05.jpg")))


@pytest.mark.slow
class TestInABrowser:
    def test_a_picture_its_threshold_and_its_mask(
        self, visit: Visit, trained: Project, photograph: bytes, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        visit.go("")
        before = visit.source("photo")
        visit.upload("my car.jpg", photograph)
        visit.wait_for_another("photo", before)
        visit.settle()
        old = visit.source("layer")
        visit.page.get_by_role("slider", name="Threshold").press("ArrowLeft")
        visit.wait_for_another("layer", old)
        visit.settle()
        files = {label: visit.download(label) for label in ("Mask", "Cut-out", "Run lengths")}

        monkeypatch.chdir(trained.folder)
        image_HWC = load_image(photograph, "my car.jpg")
        masker = Segmenter({"small/0": segmenter.load_predictor("small/0", ["identity", "hflip"], device="cpu")})
        mask_HW = masker.segment(masker.predict(image_HWC), EnsembleSettings(threshold=0.49))
        assert 0 < mask_HW.mean() < 1
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(files["Mask"]))), mask_HW * np.uint8(255))
        cutout = np.asarray(Image.open(io.BytesIO(files["Cut-out"])))
        assert np.array_equal(cutout[..., 3] == 255, mask_HW)
        assert np.array_equal(cutout[mask_HW][:, :3], image_HWC[mask_HW])
        ((name, runs),) = [tuple(row) for row in list(csv.reader(io.StringIO(files["Run lengths"].decode())))[1:]]
        assert name == "my car.jpg"
        assert np.array_equal(rle.decode(runs, *mask_HW.shape), mask_HW)

    @pytest.mark.parametrize("width", [1280, 390])
    def test_the_slider_follows_keys_and_pointer_and_stays_for_another_mask(
        self, browser: Any, served: str, width: int
    ) -> None:
        with Visit(browser, served, width) as visit:
            visit.go("")
            slider, frame = visit.page.locator(".frame input"), visit.page.locator(".frame")
            at = "frame => frame.style.getPropertyValue('--at')"
            slider.press("End")
            assert frame.evaluate(at) == "100%"
            box = frame.bounding_box()
            visit.page.mouse.move(box["x"] + box["width"] * 0.9, box["y"] + 40)
            visit.page.mouse.down()
            visit.page.mouse.move(box["x"] + box["width"] * 0.25, box["y"] + 60, steps=4)
            visit.page.mouse.up()
            assert float(frame.evaluate(at).rstrip("%")) == pytest.approx(25, abs=3)
            if width < 600:
                visit.page.touchscreen.tap(box["x"] + box["width"] * 0.75, box["y"] + 40)
                assert float(frame.evaluate(at).rstrip("%")) == pytest.approx(75, abs=5)
            stood, old = frame.evaluate(at), visit.source("layer")
            visit.page.get_by_text("Probability", exact=True).click()
            visit.wait_for_another("layer", old)
            assert frame.evaluate(at) == stood

    def test_nets_and_folds_change_it_live(self, visit: Visit) -> None:
        visit.go("")
        assert visit.page.get_by_text("Merge", exact=True).count() == 0
        visit.page.get_by_role("button", name="1", exact=True).click()
        visit.page.get_by_text("Merge", exact=True).wait_for()
        visit.settle()
        assert "small/0" in visit.text
        assert "small/1" in visit.text
        old = visit.source("layer")
        visit.page.get_by_text("Doubt", exact=True).click()
        visit.wait_for_another("layer", old)
        visit.settle()
        assert "where the nets part" in visit.text

    def test_a_file_that_is_no_picture(self, visit: Visit, trained: Project, photograph: bytes) -> None:
        visit.go("")
        visit.upload("truncated.jpg", photograph[: len(photograph) // 2])
        alert = visit.page.get_by_role("alert")
        alert.wait_for()
        assert "truncated.jpg is not a valid JPEG" in alert.inner_text()
        assert str(trained.folder) not in visit.page.content()

    def test_chart_and_table_filter_each_other(self, visit: Visit, trained: Project) -> None:
        rows = rows_of_split(read_table(trained.folder / "reports/ablation.csv"), "oof")
        alike = rows[rows["views"] == rows.loc[rows["current"], "views"].item()]
        another = 1 if alike.nlargest(1, "dice")["current"].item() else 0
        visit.go("ablation")
        images = visit.page.locator("[data-testid=stImage] img")
        wait_for(lambda: images.count() == 8)  # two figures of two pictures for each of two cars
        first = images.first.get_attribute("src")
        chart = visit.page.locator("[data-testid=stVegaLiteChart]")
        points = chart.locator("path[aria-roledescription=point][aria-label*='kind']")
        points.first.click()  # the current setting: its ring is in nobody's way
        visit.page.get_by_text("at the points picked").wait_for()
        visit.settle()
        table = visit.page.locator("[data-testid=stDataFrame]")
        table.scroll_into_view_if_needed()
        table.click(position={"x": 17, "y": 35 * (1 + another) + 17})
        visit.page.get_by_text("The chosen setting").wait_for()
        chart.get_by_text("chosen").first.wait_for()
        wait_for(lambda: images.count() == 8 and images.first.get_attribute("src") != first)
        visit.settle()
        visit.page.get_by_role("button", name="Show all").click()
        visit.page.get_by_text("at the points picked").wait_for(state="detached")
        visit.page.get_by_text("Held-out cars", exact=True).click()
        visit.page.get_by_text("Cars that no net trained on").wait_for()

    @pytest.mark.parametrize("width", [1280, 390])
    def test_every_page_fits_and_asks_nobody_else(
        self, browser: Any, served: str, trained: Project, width: int
    ) -> None:
        with Visit(browser, served, width) as visit:
            for name in ("", "ablation", "submissions"):
                visit.go(name)
                wide = visit.page.locator("[data-testid=stMain]").evaluate("e => [e.scrollWidth, e.clientWidth]")
                assert wide[0] <= wide[1]
                assert str(trained.folder) not in visit.page.content()
            own = (served, served.replace("http", "ws", 1), f"blob:{served}", "data:")
            assert [url for url in visit.asked if not url.startswith(own)] == []
            assert not visit.faults

    def test_other_sites_get_nothing(self, served: str) -> None:
        upgrade = {
            "Connection": "Upgrade",
            "Upgrade": "websocket",
            "Sec-WebSocket-Version": "13",
            "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        }
        asked = f"{served}/_stcore/stream"
        evil = {"Origin": "http://evil.example:1", "Host": "evil.example:1"}
        assert requests.get(asked, headers=upgrade | {"Origin": served}, timeout=10, stream=True).status_code == 101
        assert requests.get(asked, headers=upgrade | evil, timeout=10).status_code == 403
        upload = f"{served}/_stcore/upload_file/session/file"
        assert requests.put(upload, files={"file": b"x"}, timeout=10).status_code in (400, 403)
