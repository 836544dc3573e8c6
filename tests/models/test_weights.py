"""Weights of other programs: prefixes and wrappers."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline.config import InputSettings, UNetConfig
from pipeline.errors import CarvanaError
from pipeline.models.networks import build_model
from pipeline.models.weights import load_weights, match_names

SPEC = UNetConfig(architecture="unet", widths=(4, 8))
INPUT = InputSettings(size=(32, 48))


@pytest.mark.parametrize(
    "wrap",
    [
        lambda state: state,
        lambda state: {"state_dict": state, "epoch": 3},
        lambda state: {"model_state_dict": state, "optimizer": {"lr": 0.1}},
        lambda state: {"model": {"state_dict": state}},
        lambda state: {f"module.{name}": value for name, value in state.items()},
        lambda state: {"ema": {f"_orig_mod.module.{name}": value for name, value in state.items()}},
        lambda state: {name.removeprefix("network."): value for name, value in state.items()},
        lambda state: {"state_dict": {f"model.net.{name}": value for name, value in state.items()}, "epoch": 3},
        lambda state: {"n_averaged": torch.tensor(4), **{f"module.{name}": value for name, value in state.items()}},
        lambda state: {"model": {}, "ema": dict(state), "epoch": 3},
        lambda state: {"model": {"version": 2, **state}},
        lambda state: {"epoch": 3, **state},
        lambda state: {name.replace("network.", "network.module."): value for name, value in state.items()},
        lambda state: {name.replace("network.", "network._orig_mod."): value for name, value in state.items()},
        lambda state: {"model_state_dict": {f"module.{n}": v.half() for n, v in state.items()}},
    ],
)
def test_weights_under_a_prefix_or_in_a_checkpoint_are_found(tmp_path: Path, wrap: Any) -> None:
    source, target = build_model(SPEC, INPUT, seed=1), build_model(SPEC, INPUT, seed=2)
    torch.save(wrap(source.state_dict()), tmp_path / "w.pth")
    load_weights(target, tmp_path / "w.pth")
    for name, value in source.state_dict().items():
        torch.testing.assert_close(target.state_dict()[name], value, rtol=1e-3, atol=1e-3)  # one file is in 16 bits


def test_a_checkpoint_without_weights_is_refused(tmp_path: Path) -> None:
    for content in ({"epoch": 3}, {"generator": {"a": torch.zeros(1)}}, {}, [torch.zeros(1)], torch.zeros(1)):
        torch.save(content, tmp_path / "w.pth")
        found = next(iter(content)) if isinstance(content, dict) and content else "no named weights"
        with pytest.raises(CarvanaError, match=rf"w\.pth.*{found}"):
            load_weights(build_model(SPEC, INPUT), tmp_path / "w.pth")


def test_the_name_that_differs_is_named(tmp_path: Path) -> None:
    state = build_model(SPEC, INPUT).state_dict()
    torch.save(
        {"module." + name: value for name, value in state.items()} | {"module.extra": torch.zeros(1)},
        tmp_path / "w.pth",
    )
    with pytest.raises(CarvanaError, match=r"w\.pth.*'extra'"):
        load_weights(build_model(SPEC, INPUT), tmp_path / "w.pth")


def test_an_encoder_is_found_within_a_whole_net() -> None:
    state = {"network.encoder.a.w": torch.zeros(1), "network.decoder.a.w": torch.ones(1)}
    assert match_names({"a.w"}, {"network.encoder.a.w": torch.zeros(1)}).keys() == {"a.w"}
    assert match_names({"a.w", "b.w"}, state | {"network.encoder.b.w": torch.zeros(1)}).keys() == {"a.w", "b.w"}
