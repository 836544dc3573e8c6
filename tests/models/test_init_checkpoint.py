"""Training that starts from given weights: where they are looked for, what they must fit, and that they are taken."""

import json
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.config import InputSettings, ResolvedModel, SmpUNetConfig, UNetConfig, read_params
from pipeline.errors import CarvanaError
from pipeline.models.networks import build_model
from pipeline.models.weights import initial_weights, save_weights
from pipeline.stages import train as stage
from pipeline.training.module import TrainJob
from pipeline.training.trainer import train
from pipeline.workspace import init_checkpoint_path
from tests import ROOT
from tests.fakes.train_jobs import job

# Not batch norm, whose running statistics would follow the images even where no step changes a weight.
SPEC = UNetConfig(architecture="unet", widths=(4, 8), norm="group")
INPUT = InputSettings(size=(32, 48))


def plain(init: Path | None = None, **changes: Any) -> TrainJob:
    made = job(warmup_fraction=0.0, ema_decay=None, **changes)
    return replace(made, model=ResolvedModel(spec=SPEC, input=INPUT, train=made.model.train), init_checkpoint=init)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(plain(epochs=3, lr=0.02), tmp_path_factory.mktemp("trained"))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    path = tmp_path / "start.safetensors"
    save_weights(path, build_model(SPEC, INPUT, seed=1).state_dict())
    return path


def dice(folder: Path) -> float:
    return float(json.loads((folder / "metrics.json").read_text())["dice"])


@pytest.mark.parametrize("kind", ["folder", "safetensors", "pt"])
def test_training_with_tiny_steps_keeps_initial_weights(trained: Path, tmp_path: Path, kind: str) -> None:
    state = load_file(trained / "model.safetensors")
    init = {"folder": trained, "safetensors": trained / "model.safetensors", "pt": tmp_path / "start.pt"}[kind]
    if kind == "pt":
        torch.save(state, init)
    still = {"epochs": 1, "lr": 1e-12, "weight_decay": 0.0}
    kept = train(plain(init, **still), tmp_path / "work")
    assert dice(kept) == dice(trained)
    after = load_file(kept / "model.safetensors")
    assert max(float((after[name] - value).abs().max()) for name, value in state.items()) < 1e-6
    if kind == "folder":
        assert dice(train(plain(None, **still), tmp_path / "again")) < dice(trained) - 0.01


def test_the_fold_stands_in_the_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert init_checkpoint_path("nets/{fold}/a.safetensors", 2) == tmp_path / "nets/2/a.safetensors"
    assert init_checkpoint_path(None, 2) is None


def test_a_folder_stands_for_its_last_weights(trained: Path) -> None:
    assert init_checkpoint_path(str(trained), 0) == trained / "model.safetensors"


def test_a_relative_path_is_of_the_projects_own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = tmp_path / ".dvc/tmp/exps/tmp1234"
    experiment.mkdir(parents=True)
    monkeypatch.chdir(experiment)
    assert init_checkpoint_path("start.safetensors", 0) == tmp_path / "start.safetensors"
    assert init_checkpoint_path("/elsewhere/start.safetensors", 0) == Path("/elsewhere/start.safetensors")


def test_missing_init_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(CarvanaError, match=r"none\.safetensors.*train\.init"):
        initial_weights(SPEC, tmp_path / "none.safetensors")


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"widths": (8, 16)}, r"'network\.down\.0\.0\.weight'.*\[4, 3, 3, 3\].*\[8, 3, 3, 3\]"),
        ({"widths": (4, 8, 16)}, r"'network\.down\.2\.0\.weight'"),
        ({"norm": "none"}, r"'network\.down\.0\.1\.bias'"),
    ],
)
def test_weights_of_another_net(weights: Path, changes: Mapping[str, Any], name: str) -> None:
    other = SPEC.model_copy(update=changes)
    with pytest.raises(CarvanaError, match=rf"start\.safetensors.*{name}.*train\.init_checkpoint"):
        build_model(other, INPUT, init_checkpoint=weights)


def test_weights_of_another_number_of_channels(weights: Path) -> None:
    with pytest.raises(CarvanaError, match=r"\[4, 3, 3, 3\].*\[4, 1, 3, 3\].*train\.init"):
        build_model(SPEC, InputSettings(size=(32, 48), channels="gray"), init_checkpoint=weights)


def test_more_weights_than_the_net_has(weights: Path) -> None:
    save_file({**load_file(weights), "teacher.weight": torch.zeros(3)}, weights)
    with pytest.raises(CarvanaError, match=r"'teacher\.weight'.*train\.init_checkpoint"):
        build_model(SPEC, INPUT, init_checkpoint=weights)


@pytest.mark.parametrize("content", [b"", b"no weights", [torch.zeros(1)], {"state_dict": 3}])
def test_init_checkpoint_without_weights(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "start.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CarvanaError, match=r"start\.pt.*train\.init_checkpoint"):
        build_model(SPEC, INPUT, init_checkpoint=path)


def test_no_other_weights_are_fetched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = SmpUNetConfig(
        architecture="smp_unet", encoder="resnet18", decoder_channels=(16, 8), encoder_weights="imagenet"
    )
    init = tmp_path / "start.safetensors"
    save_weights(init, build_model(spec, INPUT, seed=5, pretrained=False).state_dict())

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("asked the network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", refuse)
    state = build_model(spec, INPUT, init_checkpoint=init).state_dict()
    assert all(torch.equal(state[name], value) for name, value in load_file(init).items())


class Held(Exception):
    """Carries the facts by which a training is known."""


@pytest.fixture
def facts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A call that returns the facts of training a model's fold 0, from weights at a path, without training it."""
    shutil.copyfile(ROOT / "params.yaml", tmp_path / "params.yaml")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(stage, "training_images", lambda _: SimpleNamespace(ids=lambda: []))
    monkeypatch.setattr(stage, "read_fold_by_car", dict)
    monkeypatch.setattr(stage, "read_manifest", lambda: {part: {"digest": "0"} for part in ("train", "masks")})

    @contextmanager
    def hold(root: Path, slot: str, facts: Mapping[str, Any]) -> Iterator[None]:
        raise Held(facts)
        yield

    monkeypatch.setattr(stage, "acquire_run_state", hold)

    def call(init: str | None) -> Any:
        params = read_params()
        learning = params.train.model_copy(update={"init_checkpoint": init})
        with pytest.raises(Held) as caught:
            stage.run(params.model_copy(update={"train": learning}), "small", 0)
        return caught.value.args[0]

    yield call


def test_other_bytes_are_another_training(facts: Any, weights: Path) -> None:
    without, first = facts(None), facts("start.safetensors")
    assert without["starts_from"] is None
    save_weights(weights, build_model(SPEC, INPUT, seed=2).state_dict())
    second = facts("start.safetensors")
    assert len({without["starts_from"], first["starts_from"], second["starts_from"]}) == 3
    assert facts(str(weights))["starts_from"] == second["starts_from"]


def test_the_nets_own_folder_which_is_removed_before_training(facts: Any, tmp_path: Path) -> None:
    with pytest.raises(CarvanaError, match=r"train\.init_checkpoint.*folds/small/0/model\.safetensors"):
        facts("folds/small/{fold}/model.safetensors")


@pytest.mark.parametrize(("config", "warned"), [({"fold": 1}, True), ({"fold": 0}, False), ({}, False), (None, False)])
def test_a_net_of_another_fold_may_have_learned_the_validation_cars(
    facts: Any, weights: Path, config: Any, warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    if config is not None:
        (weights.parent / "config.json").write_text(json.dumps(config))
    facts("start.safetensors")
    told = capsys.readouterr().err
    assert ("fold 1" in told) == warned
