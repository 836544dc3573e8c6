"""What is written down of each epoch: the panel of pictures, TensorBoard's log, and that neither decides a weight."""

import contextlib
import json
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import cv2
import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipeline.app import launch
from pipeline.competition.image_ids import ANGLES, format_image_id, parse_image_id
from pipeline.config import InputSettings, read_params
from pipeline.errors import CarvanaError
from pipeline.models.networks import SegmentationModel, build_model, load_model
from pipeline.report import overlays
from pipeline.stages import train as stage
from pipeline.training import callbacks, module, prediction_grid, trainer
from pipeline.training.callbacks import GradientNormMonitor, run_dir
from pipeline.training.prediction_grid import PredictionGrid, pick_images
from pipeline.training.trainer import train
from pipeline.workspace import runs_dir
from tests import ROOT
from tests.fakes.fake_images import FakeImages
from tests.fakes.train_jobs import READER, Killed, job

CPU = torch.device("cpu")
INPUT = InputSettings(size=(32, 48))


class TestWhichImages:
    @pytest.mark.parametrize("cars", [1, 2, 3, 6, 7, 64])
    def test_cars_and_angles_differ(self, cars: int) -> None:
        ids = [format_image_id(f"{car:012x}", angle) for car in range(cars) for angle in range(1, ANGLES + 1)]
        chosen = [parse_image_id(image_id) for image_id in pick_images(ids)]
        assert len(chosen) == 6
        assert len({car for car, _ in chosen}) == min(6, cars)
        assert len({angle for _, angle in chosen}) >= 5

    @pytest.mark.parametrize("count", range(8))
    def test_pick_images_returns_all_of_few(self, count: int) -> None:
        ids = [f"{number}" for number in range(count)]
        chosen = pick_images(ids)
        assert len(set(chosen)) == len(chosen) == min(6, count)
        assert pick_images(ids[::-1]) == chosen


class Says(SegmentationModel):
    """A net that says the same of every pixel."""

    def __init__(self, logit: float) -> None:
        super().__init__(torch.nn.Identity(), INPUT, 1)
        self.logit = logit

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return torch.full((len(pixels), 1, *pixels.shape[-2:]), self.logit)


class Knows(SegmentationModel):
    """A net that takes the bright for car, as it is in drawn images."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Identity(), INPUT, 1)

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        return pixels[:, :1].float() - 119.5


class TestPanel:
    drawn = PredictionGrid.load(["1", "2"], READER, INPUT)

    def rows(self, net: SegmentationModel) -> list[Any]:
        """The four rows of a panel, int (160, width, 3)."""
        image = cv2.imdecode(np.frombuffer(self.drawn.draw(net, CPU), np.uint8), cv2.IMREAD_COLOR)
        assert image is not None and image.shape == (20 + 4 * 164, 2 * 244, 3)
        return [image[20 + 164 * row : 180 + 164 * row, :, ::-1].astype(int) for row in range(4)]

    def share(self, row: Any, color: tuple[int, int, int]) -> float:
        return float((np.abs(row - color).max(axis=2) < 30).mean())

    def test_truth_and_prediction_are_white_where_car_is(self) -> None:
        _, truth, prediction, _ = self.rows(Knows())
        car = np.mean([READER.mask(image_id).mean() for image_id in ("1", "2")])
        assert self.share(truth, (255, 255, 255)) == pytest.approx(car, abs=0.02)
        assert self.share(prediction, (255, 255, 255)) == pytest.approx(car, abs=0.02)

    def test_errors_have_a_colour_each(self) -> None:
        truth, nothing, everything = self.rows(Knows())[1], self.rows(Says(-9.0))[3], self.rows(Says(9.0))[3]
        car = self.share(truth, (255, 255, 255))
        assert self.share(nothing, prediction_grid.FALSE_NEGATIVE) == pytest.approx(car, abs=0.02)
        assert self.share(nothing, prediction_grid.FALSE_POSITIVE) == 0
        assert self.share(everything, prediction_grid.FALSE_POSITIVE) > 0.9 * (1 - car)
        assert self.share(everything, prediction_grid.FALSE_NEGATIVE) < 0.001
        right = self.rows(Knows())[3]
        assert np.ptp(right, axis=2).max() < 12  # grey, as far as a JPEG is

    def test_an_error_one_pixel_wide_is_seen_in_a_native_image(self) -> None:
        target = np.zeros((1280, 1918), np.uint8)
        target[:, 1000] = 255
        drawn = prediction_grid._error_image(np.full((160, 240, 3), 128, np.uint8), target, np.zeros_like(target))
        assert np.ptp(drawn.astype(int), axis=2).max() > 60

    def test_colours_are_those_of_the_report(self) -> None:
        assert (prediction_grid.FALSE_NEGATIVE, prediction_grid.FALSE_POSITIVE) == (
            overlays.FALSE_NEGATIVE,
            overlays.FALSE_POSITIVE,
        )

    def test_a_grey_net_has_photographs_in_colour(self) -> None:
        class Red(FakeImages):
            def image(self, image_id: str) -> Any:
                return super().image(image_id) * np.array([1, 0, 0], np.uint8)

        grey = PredictionGrid.load(["1"], Red(), InputSettings(size=(32, 48), channels="gray"))
        assert grey.inputs[0].shape == (32, 48, 1)
        assert np.ptp(grey.photographs[0].astype(int), axis=2).min() > 50


def states(patch: pytest.MonkeyPatch) -> list[dict[str, torch.Tensor]]:
    """The weights of the nets that are drawn from now on."""
    seen: list[dict[str, torch.Tensor]] = []
    draw = PredictionGrid.draw

    def noting(self: PredictionGrid, net: SegmentationModel, device: torch.device) -> bytes:
        assert not net.training
        seen.append({name: value.clone() for name, value in net.state_dict().items()})
        return draw(self, net, device)

    patch.setattr(PredictionGrid, "draw", noting)
    return seen


class TestDrawnNet:
    @pytest.mark.parametrize("ema", [0.9, None])
    def test_the_last_panel_is_of_the_weights_beside_it(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float | None
    ) -> None:
        seen = states(monkeypatch)
        folder = train(job(ema_decay=ema, epochs=2, validate_every=2), tmp_path)
        monkeypatch.undo()
        assert len(seen) == 1
        state = load_file(folder / "model.safetensors")
        assert all(torch.equal(seen[-1][name], value) for name, value in state.items())
        net, seen_by_net = load_model(folder)
        again = PredictionGrid.load(["6", "7"], READER, seen_by_net).draw(net, CPU)
        assert (folder / "panel.jpg").read_bytes() == again

    def test_the_checkpoint_has_averaged_and_trained_weights(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        seen = states(monkeypatch)

        def kill(self: Any, trainer: Any, *_: Any) -> None:
            if trainer.current_epoch == 1:
                raise Killed

        monkeypatch.setattr(trainer.MetricsHistory, "on_train_epoch_start", kill)
        with pytest.raises(Killed):
            train(job(validate_every=1), tmp_path)
        checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=False)
        average, trained = checkpoint["state_dict"], checkpoint["trained_state_dict"]
        assert len(seen) == 1
        assert all(torch.equal(value, average[f"net.{name}"]) for name, value in seen[0].items())
        assert any(not torch.equal(value, trained[f"net.{name}"]) for name, value in seen[0].items())

    def test_running_statistics_are_measured_before_every_panel(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those of averaged weights are of no weights: a net that has learned much may be drawn as blank."""
        done: list[str] = []

        def noting(name: str, call: Any) -> Any:
            def noted(*arguments: Any) -> Any:
                done.append(name)
                return call(*arguments)

            return noted

        monkeypatch.setattr(module, "update_bn_stats", noting("calibrate", module.update_bn_stats))
        monkeypatch.setattr(PredictionGrid, "draw", noting("draw", PredictionGrid.draw))
        train(job(epochs=3, validate_every=3), tmp_path)
        assert done == ["calibrate", "draw"]


class TestGradients:
    def test_the_norm_is_that_of_the_step_before_clipping(self, tmp_path: Path) -> None:
        one_step = {"epochs": 1, "batch_size": 6, "warmup_fraction": 0.0, "ema_decay": None, "schedule": "constant"}
        free = job(optimizer="sgd", lr=0.01, gradient_clip_norm=None, **one_step)
        folder = train(free, tmp_path / "free")
        before = build_model(free.model.spec, free.model.input, free.seed)
        after = load_file(folder / "model.safetensors")
        moved = [(after[name] - value.detach()).square().sum() for name, value in before.named_parameters()]
        row = pd.read_csv(folder / "curves.csv").iloc[0]
        # A first step with Nesterov's momentum of 0.9 goes 1.9 times the gradient.
        assert row["gradient_norm"] == pytest.approx(float(torch.stack(moved).sum().sqrt()) / 0.019, rel=1e-3)
        assert row["gradient_norm_max"] == row["gradient_norm"]
        clipped = train(job(optimizer="sgd", lr=0.01, gradient_clip_norm=1e-3, **one_step), tmp_path / "clipped")
        assert pd.read_csv(clipped / "curves.csv")["gradient_norm"].iloc[0] == pytest.approx(row["gradient_norm"])

    @pytest.mark.parametrize(
        ("norms", "told"),
        [([3.0, float("inf"), 5.0, float("nan")], (4.0, 5.0)), ([float("inf")], (float("nan"), float("nan")))],
    )
    def test_steps_that_fp16_skips_do_not_count(self, norms: list[float], told: tuple[float, float]) -> None:
        logged: dict[str, torch.Tensor] = {}
        module: Any = SimpleNamespace(
            gradient_norms=[torch.tensor(norm) for norm in norms], log_dict=lambda values, **_: logged.update(values)
        )
        nobody: Any = None
        GradientNormMonitor().on_train_epoch_end(nobody, module)
        assert module.gradient_norms == []
        found = [float(logged[name]) for name in ("gradient_norm", "gradient_norm_max")]
        assert found == pytest.approx(told, nan_ok=True)


def events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0}).Reload()


def scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    log = events(folder)
    return {tag: [(event.step, event.value) for event in log.Scalars(tag)] for tag in log.Tags()["scalars"]}


MACHINE = {"machine/images_per_second", "machine/memory_gb"}


def without_clocks(found: dict[str, list[tuple[int, float]]]) -> dict[str, list[tuple[int, float]]]:
    return {tag: points for tag, points in found.items() if tag not in MACHINE}


LOGGED = job(accumulate_grad_batches=3, batch_size=1, validate_every=2)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("whole")
    train(LOGGED, folder / "work", folder / "log")
    return folder


class TestLog:
    def test_curves_are_those_of_the_table(self, whole: Path) -> None:
        curves = pd.read_csv(whole / "work/net/curves.csv")
        found = scalars(whole / "log")
        columns = {
            "loss/sum": "loss",
            "loss/bce": "loss_bce",
            "loss/dice": "loss_dice",
            "score/dice": "dice",
            "steps/lr": "lr",
            "steps/gradient_norm": "gradient_norm",
            "steps/gradient_norm_max": "gradient_norm_max",
        }
        assert set(found) == set(columns) | MACHINE
        for tag, column in columns.items():
            known = curves[curves[column].notna()]
            assert [step for step, _ in found[tag]] == known["epoch"].tolist()
            assert [value for _, value in found[tag]] == pytest.approx(known[column].tolist(), rel=1e-5)
        assert all(value > 0 for tag in MACHINE for _, value in found[tag])

    def test_batches_make_up_the_epochs(self, whole: Path) -> None:
        found = scalars(whole / "log" / "batches")
        assert [step for step, _ in found["batch/loss"]] == list(range(1, 19))
        losses = np.array([value for _, value in found["batch/loss"]]).reshape(3, 6).mean(axis=1)
        assert losses == pytest.approx(pd.read_csv(whole / "work/net/curves.csv")["loss"].to_numpy(), rel=1e-4)
        assert len({value for _, value in found["batch/lr"]}) > 3

    def test_at_most_a_hundred_batches_an_epoch(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(callbacks, "_LOGGED_BATCHES", 2)
        train(replace(LOGGED, train_ids=["0", "1", "2", "3", "4"]), tmp_path / "work", tmp_path / "log")
        steps = [step for step, _ in scalars(tmp_path / "log" / "batches")["batch/loss"]]
        assert steps == [3, 8, 13]

    def test_a_grid_per_validation_and_the_last_is_the_folders(self, whole: Path) -> None:
        shown = events(whole / "log").Images("panel")
        assert [image.step for image in shown] == [2, 3]
        assert shown[-1].encoded_image_string == (whole / "work/net/panel.jpg").read_bytes()
        assert len({image.encoded_image_string for image in shown}) == 2

    def test_settings_as_text(self, whole: Path) -> None:
        (text,) = events(whole / "log").Tensors("settings/text_summary")
        words = text.tensor_proto.string_val[0].decode()
        assert '"fold": 0' in words and '"accumulate_grad_batches": 3' in words and '"size": [\n' in words

    def test_logging_does_not_change_the_result(self, whole: Path, tmp_path: Path) -> None:
        unlogged = train(LOGGED, tmp_path)
        names = {file.name for file in unlogged.iterdir()}
        assert names == {file.name for file in (whole / "work/net").iterdir()}
        for name in names - {"timing.json"}:
            assert (unlogged / name).read_bytes() == (whole / "work/net" / name).read_bytes(), name

    @pytest.mark.parametrize("moment", ["in_an_epoch", "before_its_checkpoint"])
    def test_a_resumed_run_goes_on_without_doubles(
        self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
    ) -> None:
        hook = (
            (trainer.MetricsHistory, "on_train_batch_end")
            if moment == "in_an_epoch"
            else (trainer.LastCheckpoint, "on_train_epoch_end")
        )
        original = getattr(*hook)

        def kill(self: Any, trainer: Any, *rest: Any) -> None:
            if trainer.current_epoch == 1 and (moment != "in_an_epoch" or rest[-1] == 4):
                raise Killed
            original(self, trainer, *rest)

        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(callbacks, "_LOGGED_AT_ONCE", 1)
            patch.setattr(*hook, kill)
            train(LOGGED, tmp_path / "work", tmp_path / "log")
        assert len(scalars(tmp_path / "log" / "batches")["batch/loss"]) > 6
        time.sleep(1)  # logs are read in the order of their names, which tell the second and then not in order
        train(LOGGED, tmp_path / "work", tmp_path / "log")
        assert without_clocks(scalars(tmp_path / "log")) == without_clocks(scalars(whole / "log"))
        assert scalars(tmp_path / "log" / "batches") == scalars(whole / "log" / "batches")
        assert [image.step for image in events(tmp_path / "log").Images("panel")] == [2, 3]

    def test_finished_training_starts_no_log(self, whole: Path, tmp_path: Path) -> None:
        train(LOGGED, whole / "work", tmp_path / "log")
        assert not (tmp_path / "log").exists()

    def test_a_folder_that_can_not_be_made_stops_no_training(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        (tmp_path / "runs").write_text("a file")
        folder = train(job(epochs=1), tmp_path / "work", tmp_path / "runs" / "small")
        assert (folder / "panel.jpg").is_file()
        told = capsys.readouterr().err
        assert told.count("warning: ") == 1
        assert f"{tmp_path / 'runs' / 'small'} can't be written" in told

    def test_a_disk_that_fills_up_stops_no_training(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        add_scalar = callbacks.SummaryWriter.add_scalar

        def full(self: Any, tag: str, value: Any, step: int) -> None:
            if step > 7:
                raise OSError(28, "No space left on device")
            add_scalar(self, tag, value, step)

        monkeypatch.setattr(callbacks.SummaryWriter, "add_scalar", full)
        train(LOGGED, tmp_path / "work", tmp_path / "log")
        told = capsys.readouterr().err
        assert told.count("warning: ") == told.count("No space left on device") == 1
        assert len(scalars(tmp_path / "log")["loss/sum"]) == 1


@pytest.mark.slow
def test_one_of_two_processes_writes_the_log(tmp_path: Path) -> None:
    folder = train(job(devices=2, batch_size=1, epochs=2), tmp_path / "work", tmp_path / "log")
    assert len(list((tmp_path / "log").rglob("events.out.*"))) == 2  # by epoch, by batch
    found = scalars(tmp_path / "log")
    assert [step for step, _ in found["steps/gradient_norm"]] == [1, 2]
    assert len(scalars(tmp_path / "log" / "batches")["batch/loss"]) == 2 * 3
    curves = pd.read_csv(folder / "curves.csv")
    assert [value for _, value in found["loss/sum"]] == pytest.approx(curves["loss"].tolist(), rel=1e-5)
    net, seen_by_net = load_model(folder)
    assert (folder / "panel.jpg").read_bytes() == PredictionGrid.load(["6", "7"], READER, seen_by_net).draw(net, CPU)


class TestWhereLogsLie:
    def test_a_resumed_run_is_found_by_its_digest(self, tmp_path: Path) -> None:
        first = run_dir(tmp_path, "0123456789abcdef")
        assert first.name.endswith("_01234567")
        first.mkdir()
        assert run_dir(tmp_path, "0123456789abcdef") == first
        second = run_dir(tmp_path, "fedcba9876543210")
        assert second != first and second.parent == first.parent

    def test_the_stage_logs_to_the_projects_own_root(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        experiment = tmp_path / ".dvc/tmp/exps/tmp1234"
        experiment.mkdir(parents=True)
        shutil.copyfile(ROOT / "params.yaml", experiment / "params.yaml")
        monkeypatch.chdir(experiment)
        state = SimpleNamespace(folder=Path("0123456789abcdef"), work_dir=Path("w"), finished=False)
        state.finish = state.publish = lambda _: None
        logs: list[Path] = []
        parts: dict[str, Any] = {
            "training_images": lambda _: SimpleNamespace(ids=lambda: []),
            "read_fold_by_car": dict,
            "read_manifest": lambda: {part: {"digest": "0"} for part in ("train", "masks")},
            "acquire_run_state": lambda *_: contextlib.nullcontext(state),
            "train": lambda job, work, log: logs.append(log),
        }
        for name, part in parts.items():
            monkeypatch.setattr(stage, name, part)
        stage.run(read_params(), "small", 1)
        assert logs[0].parent == tmp_path / "runs/small/1"


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


RUN = "small/0/2026-01-01_12-00_01234567"


class TestCommand:
    def test_tensorboard_without_logs(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, port: int) -> None:
        monkeypatch.chdir(tmp_path)
        (tmp_path / "runs/small").mkdir(parents=True)
        with pytest.raises(CarvanaError, match=r"/runs\b"):
            launch.serve_tensorboard("127.0.0.1", port)

    @pytest.fixture
    def project(self, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
        shutil.copytree(whole / "log", tmp_path / "runs" / RUN)
        callbacks.SummaryWriter(tmp_path / "runs" / RUN, purge_step=3).close()  # as if epoch 3 began again
        monkeypatch.chdir(tmp_path)
        assert runs_dir() == tmp_path / "runs"
        return tmp_path

    @pytest.mark.usefixtures("project")
    @pytest.mark.parametrize("wrong", [0, -1, 65536])
    def test_invalid_port(self, wrong: int) -> None:
        with pytest.raises(CarvanaError, match=f"{wrong}"):
            launch.serve_tensorboard("127.0.0.1", wrong)

    @pytest.mark.usefixtures("project")
    def test_a_port_that_is_taken(self) -> None:
        with socket.create_server(("127.0.0.1", 0)) as other:
            taken = other.getsockname()[1]
            with pytest.raises(CarvanaError, match=rf"{taken}.*127\.0\.0\.1"):
                launch.serve_tensorboard("127.0.0.1", taken)

    @pytest.mark.usefixtures("project")
    @pytest.mark.parametrize(
        ("address", "reason"),
        [("192.0.2.1", r"192\.0\.2\.1.*--address"), ("no.such", r"no\.such")],
    )
    def test_an_address_of_another_machine(self, address: str, reason: str, port: int) -> None:
        with pytest.raises(CarvanaError, match=reason):
            launch.serve_tensorboard(address, port)

    def test_tensorboard_serves_logged_scalars(self, project: Path, port: int) -> None:
        url = f"http://127.0.0.1:{port}"
        with serving(project, port) as first_line:
            assert url in first_line and str(project / "runs") in first_line
            ask = urllib.request.build_opener(urllib.request.ProxyHandler({})).open
            assert b"TensorBoard" in ask(url, timeout=30).read()
            deadline, found = time.monotonic() + 60, []
            address = f"{url}/data/plugin/scalars/scalars?run={RUN}&tag=loss/sum"
            while len(found) < 2 and time.monotonic() < deadline:
                time.sleep(0.1)
                with contextlib.suppress(urllib.error.HTTPError):  # until it has read them
                    found = json.load(ask(address, timeout=30))
            assert [step for _, step, _ in found] == [1, 2]


@contextlib.contextmanager
def serving(project: Path, port: int) -> Iterator[str]:
    """``carvana tensorboard`` in a process of its own, until the block ends; yields the first line it prints."""
    code = "from pipeline.cli import main; main()"
    with subprocess.Popen(
        [sys.executable, "-c", code, "tensorboard", "--port", str(port)],
        cwd=project,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None and process.stderr is not None
        try:
            yield process.stdout.readline().rstrip("\n")
            process.terminate()
            assert process.stderr.read() == ""
        finally:
            process.kill()
