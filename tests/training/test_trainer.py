"""Training a net of seconds: what it writes, resuming to the last bit, errors."""

import errno
import functools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from torch.overrides import TorchFunctionMode

from pipeline.competition.dice import confusion_counts
from pipeline.config import HardwareSettings, Precision, SmpUNetConfig
from pipeline.errors import CarvanaError, CorruptFileError, is_out_of_memory
from pipeline.inference.torch_predictor import TorchPredictor
from pipeline.models.networks import build_model, load_model
from pipeline.training import module, trainer
from pipeline.training.dataset import batch_bytes
from pipeline.training.module import TrainJob, lr_lambda
from pipeline.training.trainer import train
from tests.fakes.fake_images import FakeImages
from tests.fakes.train_jobs import READER, Killed, job


def test_a_trained_folder(tmp_path: Path) -> None:
    folder = train(job(epochs=6, validate_every=4), tmp_path)
    curves = pd.read_csv(folder / "curves.csv")
    assert curves["epoch"].tolist() == [1, 2, 3, 4, 5, 6]
    assert curves["loss"].iloc[-1] < curves["loss"].iloc[0]
    assert curves["dice"].notna().tolist() == [False, False, False, True, False, True]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["dice"] == curves["dice"].iloc[-1]
    assert metrics["best_dice"] == pytest.approx(curves["dice"].max(), abs=1e-6)
    assert metrics["parameters"] == sum(parameter.numel() for parameter in load_model(folder)[0].parameters())
    config = json.loads((folder / "config.json").read_text())
    assert config["architecture"]["widths"] == [4, 8]
    assert config["fold"] == 0
    timing = json.loads((folder / "timing.json").read_text())
    assert timing["images"] == 36
    assert 0 < timing["training_seconds"] < timing["seconds"]
    assert timing["images_per_second"] == pytest.approx(36 / timing["training_seconds"])
    assert timing["peak_memory_bytes"] > 1e6


DICE_TOLERANCE: dict[Precision, float] = {"32": 1e-4, "bf16": 1e-3}
"""How far two computations of the same Dice may differ; batches of other sizes are rounded otherwise."""


@pytest.mark.parametrize("precision", DICE_TOLERANCE)
def test_the_validation_scores_are_those_of_the_saved_weights(tmp_path: Path, precision: Precision) -> None:
    # Large steps, so that it gets better and worse, and the best is not the last.
    steps = {"lr": 0.4, "optimizer": "sgd", "schedule": "constant"}
    folder = train(job(batch_size=1, epochs=2, precision=precision, **steps), tmp_path)
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0.5 < metrics["dice"] < metrics["best_dice"] - 0.005
    assert metrics["best_epoch"] == 1
    for weights, key in (("last", "dice"), ("best", "best_dice")):
        predictor = TorchPredictor(folder, weights=weights, device="cpu", precision=precision)
        scores = [confusion_counts(predictor(READER.image(i)) >= 0.5, READER.mask(i)).dice for i in ("6", "7")]
        assert np.mean(scores) == pytest.approx(metrics[key], abs=DICE_TOLERANCE[precision])


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Runs that were not killed, by schedule, each trained once."""

    @functools.cache
    def run(schedule: str) -> Path:
        return train(job(schedule=schedule, accumulate_grad_batches=2), tmp_path_factory.mktemp(schedule))

    return run


@pytest.mark.parametrize(
    ("schedule", "moment"),
    [
        ("cosine", "in_epoch_2"),
        pytest.param("cosine", "after_epoch_1", marks=pytest.mark.slow),
        pytest.param("cosine", "before_collecting", marks=pytest.mark.slow),
        pytest.param("onecycle", "in_epoch_2", marks=pytest.mark.slow),
        pytest.param("onecycle", "after_epoch_1", marks=pytest.mark.long),
        pytest.param("onecycle", "before_collecting", marks=pytest.mark.long),
    ],
)
def test_a_killed_run_ends_with_the_same_bytes(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    uninterrupted: Callable[[str], Path],
    schedule: str,
    moment: str,
) -> None:
    whole = uninterrupted(schedule)

    def kill(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        if moment == "before_collecting":
            patch.setattr(trainer, "_write_model_dir", kill)
        elif moment == "after_epoch_1":
            patch.setattr(trainer.MetricsHistory, "on_train_epoch_start", _at_epoch(1, kill))
        else:
            patch.setattr(trainer.MetricsHistory, "on_train_batch_end", _at_epoch(1, kill))
        with pytest.raises(Killed):
            train(job(schedule=schedule, accumulate_grad_batches=2), tmp_path / "killed")
    killed = train(job(schedule=schedule, accumulate_grad_batches=2), tmp_path / "killed")
    _same_but_for_time(whole, killed)


@pytest.mark.slow
def test_a_killed_run_in_bf16_ends_with_weights_within_rounding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def kill() -> None:
        raise Killed

    whole = train(job(precision="bf16"), tmp_path / "whole")
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(trainer.MetricsHistory, "on_train_epoch_start", _at_epoch(1, kill))
        train(job(precision="bf16"), tmp_path / "killed")
    killed = train(job(precision="bf16"), tmp_path / "killed")
    expected, state = (load_model(folder)[0].state_dict() for folder in (whole, killed))
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, rtol=0.01, atol=0.01)


@pytest.mark.slow
def test_plateau_goes_on_where_it_was_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Steps so small that the score stands still.
    still = job(schedule="plateau", epochs=8, lr=1e-6, ema_decay=None)
    whole = train(still, tmp_path / "whole")
    rates = pd.read_csv(whole / "curves.csv")["lr"]
    assert rates.iloc[-1] < rates.iloc[0]

    def kill() -> None:
        raise Killed

    for epoch in (2, 3, 5):
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(trainer.MetricsHistory, "on_train_epoch_start", _at_epoch(epoch, kill))
            train(still, tmp_path / "killed")
    killed = train(still, tmp_path / "killed")
    _same_but_for_time(whole, killed)


def _same_but_for_time(whole: Path, killed: Path) -> None:
    for file in whole.iterdir():
        if file.name == "timing.json":
            assert json.loads(file.read_text())["images"] == json.loads((killed / file.name).read_text())["images"]
        else:
            assert file.read_bytes() == (killed / file.name).read_bytes(), file.name


def _at_epoch(epoch: int, call: Any) -> Any:
    def hook(self: Any, trainer: Any, *_: Any) -> None:
        if trainer.current_epoch >= epoch:
            call()

    return hook


def test_nan_loss_names_epoch_and_images(tmp_path: Path) -> None:
    with pytest.raises(CarvanaError, match=r"loss_bce.*train\.lr"):
        train(job(lr=1e30, gradient_clip_norm=None, warmup_fraction=0.0), tmp_path)


@pytest.mark.parametrize("precision", ["32", "bf16"])
def test_non_finite_weights_after_the_last_step(tmp_path: Path, precision: str) -> None:
    broken = job(
        lr=1e30,
        gradient_clip_norm=None,
        warmup_fraction=0.0,
        batch_size=6,
        epochs=1,
        ema_decay=None,
        precision=precision,
    )
    with pytest.raises(CarvanaError, match=r"epoch 1.*train\.lr"):
        train(broken, tmp_path)


def test_ctrl_c_is_passed_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(trainer.MetricsHistory, "on_train_batch_end", interrupt)
    with pytest.raises(KeyboardInterrupt):
        train(job(), tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "adamw", "sgd", "rmsprop"])
def test_optimizers_learn(tmp_path: Path, optimizer: str) -> None:
    folder = train(job(optimizer=optimizer, epochs=2, ema_decay=None, lr=0.003), tmp_path)
    loss = pd.read_csv(folder / "curves.csv")["loss"]
    assert loss.iloc[-1] < loss.iloc[0]


@pytest.mark.slow
def test_crops_and_uncached_images_in_worker_processes(tmp_path: Path) -> None:
    made = job(crop=(16, 16), epochs=1)
    machine = HardwareSettings(device="cpu", workers=2, cache_gb=0)
    in_workers = train(TrainJob(**{**made.__dict__, "hardware": machine}), tmp_path / "a")
    in_memory = train(made, tmp_path / "b")
    # Where images are decoded decides no result.
    assert (in_workers / "model.safetensors").read_bytes() == (in_memory / "model.safetensors").read_bytes()


def test_bf16_trains(tmp_path: Path) -> None:
    folder = train(job(precision="bf16", epochs=2), tmp_path)
    assert torch.isfinite(torch.tensor(pd.read_csv(folder / "curves.csv")["loss"].tolist())).all()


@pytest.mark.parametrize("schedule", ["constant", "cosine", "onecycle", "poly"])
def test_schedules(schedule: str) -> None:
    factor = lr_lambda(job(schedule=schedule, warmup_fraction=0.2).model.train, 100)
    rates = [factor(step) for step in range(101)]
    assert rates[0] == pytest.approx(1 / 20)
    assert max(rates) == 1.0
    assert rates[19] == 1.0
    assert rates[100] == (1.0 if schedule == "constant" else pytest.approx(0, abs=1e-6))


@pytest.mark.slow
@pytest.mark.parametrize("precision", DICE_TOLERANCE)
def test_two_processes_share_the_images_and_score_each_once(tmp_path: Path, precision: Precision) -> None:
    # Three validation images: shares that differ in length must not wait for each other.
    made = job(devices=2, batch_size=1, epochs=2, precision=precision)
    folder = train(TrainJob(**{**made.__dict__, "validation_ids": ["6", "7", "8"]}), tmp_path)
    predictor = TorchPredictor(folder, device="cpu", precision=precision)
    scores = [confusion_counts(predictor(READER.image(i)) >= 0.5, READER.mask(i)).dice for i in ("6", "7", "8")]
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["dice"] == pytest.approx(np.mean(scores), abs=DICE_TOLERANCE[precision])


@pytest.mark.slow
@pytest.mark.parametrize("changes", [{"devices": 2}, {}])
def test_an_error_in_a_worker_process_is_raised_as_it_was(tmp_path: Path, changes: dict[str, Any]) -> None:
    made = job(TruncatedImages(), **changes)
    machine = HardwareSettings(device="cpu", workers=0 if changes else 1, cache_gb=0)
    with pytest.raises(CarvanaError, match=r"^3\b"):
        train(TrainJob(**{**made.__dict__, "hardware": machine}), tmp_path)


@pytest.mark.slow
def test_out_of_memory_in_another_process(tmp_path: Path) -> None:
    machine = HardwareSettings(device="cpu", workers=0, cache_gb=0)
    with pytest.raises(RuntimeError, match="CUDA out of memory") as caught:
        train(TrainJob(**{**job(Hungry(), devices=2).__dict__, "hardware": machine}), tmp_path)
    assert is_out_of_memory(caught.value)


@pytest.mark.slow
def test_an_error_of_the_system_in_a_worker_process_keeps_its_number_and_file(tmp_path: Path) -> None:
    machine = HardwareSettings(device="cpu", workers=1, cache_gb=0)
    with pytest.raises(PermissionError) as caught:
        train(TrainJob(**{**job(Locked()).__dict__, "hardware": machine}), tmp_path)
    assert (caught.value.errno, caught.value.filename) == (errno.EACCES, "3.jpg")


@pytest.mark.parametrize(("workers", "devices", "batches"), [(0, 1, 0), (1, 1, 3), (1, 2, 6)])
def test_shared_memory_for_batches_and_several_processes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int, devices: int, batches: int
) -> None:
    needed: list[int] = []

    def stop(size: int) -> None:
        needed.append(size)
        raise Killed

    monkeypatch.setattr(trainer, "check_shared_memory", stop)
    machine = HardwareSettings(device="cpu", workers=workers, cache_gb=0)
    made = TrainJob(**{**job(devices=devices).__dict__, "hardware": machine})
    with pytest.raises(Killed):
        train(made, tmp_path)
    largest = batch_bytes(made.model.input, made.model.train, machine.predict_batch)
    net = build_model(made.model.spec, made.model.input).state_dict()
    weights = sum(value.nbytes for value in net.values()) if devices > 1 else 0
    assert needed == [batches * largest + weights]


class Hungry(FakeImages):
    def image(self, image_id: str) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


class Locked(FakeImages):
    def image(self, image_id: str) -> Any:
        raise PermissionError(errno.EACCES, "Permission denied", "3.jpg")


class TruncatedImages(FakeImages):
    def image(self, image_id: str) -> Any:
        if image_id == "3":
            raise CorruptFileError("3 is truncated")
        return super().image(image_id)


def test_the_encoder_has_a_learning_rate_of_its_own(tmp_path: Path) -> None:
    spec = SmpUNetConfig(architecture="smp_unet", encoder="resnet18", encoder_weights=None)
    plain = job()
    settings = plain.model.train.model_copy(update={"encoder_lr_scale": 1e-9})
    frozen = plain.model.model_copy(update={"spec": spec, "train": settings})
    folder = train(replace(plain, model=frozen), tmp_path)
    before = dict(build_model(spec, plain.model.input, plain.seed).named_parameters())
    after = dict(load_model(folder)[0].named_parameters())
    for part, moves in ((".encoder.", False), (".decoder.", True)):
        moved = [(after[name] - before[name]).abs().max() for name in before if part in name]
        assert (float(torch.stack(moved).max()) > 1e-4) == moves


def test_a_learning_rate_for_an_encoder_that_is_not_there() -> None:
    with pytest.raises(ValidationError, match="encoder_lr_scale"):
        job(encoder_lr_scale=0.1)


class Waits(TorchFunctionMode):
    """Notes what would wait for a GPU: values read by Python."""

    READS = ("item", "tolist", "numpy", "cpu", "__bool__", "__float__", "__int__", "is_nonzero", "nonzero")

    def __init__(self) -> None:
        self.batch = -1
        self.seen: list[tuple[int, str]] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(function, "__name__", "")
        if name in self.READS and self.batch >= 0:
            self.seen.append((self.batch, name))
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("ema", [0.9, pytest.param(None, marks=pytest.mark.slow)])
def test_a_step_waits_for_nothing_on_the_device(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ema: float | None
) -> None:
    """As on a GPU, except that nothing is there to wait for."""
    waits = Waits()
    start = module.SegmentationModule.on_train_batch_start

    def note(self: Any, batch: Any, batch_idx: int) -> None:
        waits.batch = -1
        start(self, batch, batch_idx)
        waits.batch = batch_idx

    monkeypatch.setattr(module, "_losses_at_once", lambda _: 32)
    monkeypatch.setattr(module.SegmentationModule, "on_train_batch_start", note)
    many = [str(number) for number in range(40)]
    with waits:
        train(replace(job(batch_size=1, epochs=1, ema_decay=ema), train_ids=many), tmp_path)
    # The losses of 32 batches, and what follows the last.
    assert {batch for batch, _ in waits.seen} <= {31, 39}
    assert sum(batch == 31 for batch, _ in waits.seen) == 1


def test_averaged_weights_follow_the_net_to_its_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Strategies move a net after the callbacks' setup, so that averages made there would stay on the CPU."""
    average, net = trainer.WeightAverage(0.9), torch.nn.BatchNorm2d(3)
    pl_module: Any = net.to("meta")  # what a strategy does between setup and on_fit_start
    nobody: Any = None
    average.on_fit_start(nobody, pl_module)
    assert {value.device.type for value in average._averages.values()} == {"meta"}


def test_a_net_that_can_not_be_compiled_is_trained_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: Any, **__: Any) -> Any:
        def run(*_: Any) -> Any:
            raise RuntimeError("no compiler found")

        return run

    monkeypatch.setattr(torch, "compile", fail)
    plain = train(job(), tmp_path / "plain")
    compiled = replace(job(), hardware=HardwareSettings(device="cpu", compile=True))
    folder = train(compiled, tmp_path / "compiled")
    assert capsys.readouterr().err.count("hardware.compile") == 1
    assert (folder / "model.safetensors").read_bytes() == (plain / "model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_compiled_net_learns_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    compiled = replace(job(), hardware=HardwareSettings(device="cpu", compile=True))
    scores = [
        pd.read_csv(train(task, tmp_path / name) / "curves.csv")["loss"]
        for name, task in (("plain", job()), ("compiled", compiled))
    ]
    if "hardware.compile" in capsys.readouterr().err:
        pytest.skip("needs a C++ compiler")
    assert scores[1].tolist() == pytest.approx(scores[0].tolist(), rel=1e-2)
