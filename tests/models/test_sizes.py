"""The dry pass over every size that a net will process, and what encoders need."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from pipeline.config import InputSettings, SmpUNetConfig, SplitTTA, UNetConfig, read_params
from pipeline.errors import CarvanaError
from pipeline.inference.torch_predictor import TorchPredictor
from pipeline.models.networks import build_model, check_sizes, double_conv, dry_run_error, forward_error
from pipeline.models.weights import save_config, save_weights
from pipeline.stages import train as stage
from pipeline.workspace import WEIGHTS
from tests import ROOT
from tests.fakes.train_jobs import job

INPUT = InputSettings(size=(64, 96))


def encoder(name: str, levels: int = 4) -> SmpUNetConfig:
    channels = (32, 16, 16, 8, 8)[:levels]
    return SmpUNetConfig(architecture="smp_unet", encoder=name, encoder_weights=None, decoder_channels=channels)


def test_an_encoder_that_halves_more_often_than_its_levels_say_is_padded_enough() -> None:
    net = build_model(encoder("tu-hrnet_w18_small"), INPUT, pretrained=False).eval()
    assert net.stride == 32
    with torch.no_grad():
        assert net(torch.zeros(1, 3, 48, 72)).shape == (1, 1, 48, 72)


def test_a_usual_encoder_keeps_its_stride() -> None:
    assert build_model(encoder("resnet18"), INPUT, pretrained=False).stride == 16


def test_an_encoder_of_one_size_is_refused_with_the_size_it_accepts() -> None:
    spec = encoder("tu-swin_tiny_patch4_window7_224")
    with pytest.raises(CarvanaError, match=r"tu-swin_tiny_patch4_window7_224.*64 x 96.*validation.*\[224, 224\]"):
        check_sizes(spec, INPUT, {}, {"validation": (64, 96)})


def test_an_encoder_with_windows_is_refused_with_the_multiples_it_accepts() -> None:
    spec = encoder("tu-maxvit_rmlp_pico_rw_256")
    check_sizes(spec, INPUT, {"training": (2, 128, 256)}, {"validation": (256, 128)})
    with pytest.raises(CarvanaError, match=r"tu-maxvit_rmlp_pico_rw_256.*96 x 144.*view scale:0\.75.*\[128, 128\]"):
        check_sizes(spec, INPUT, {}, {"validation": (128, 128), "view scale:0.75": (96, 144)})


def test_an_encoder_with_too_few_levels_is_named() -> None:
    with pytest.raises(CarvanaError, match=r"tu-nest_tiny.*5 decoder_channels"):
        build_model(encoder("tu-nest_tiny", 5), INPUT, pretrained=False)


class NeedsNumbers(nn.Module):
    """Reads a value of its input, which has none on the meta device, and accepts widths up to 64."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, pixels: torch.Tensor) -> torch.Tensor:
        assert float(pixels[0, 0, 0, 0]) == 0
        if pixels.shape[-1] > 64:
            raise ValueError("width above 64")
        return pixels[:, :1] * self.scale


def test_a_network_that_needs_real_numbers_gets_them() -> None:
    net, shapes = NeedsNumbers(), NeedsNumbers().to("meta")
    assert dry_run_error(net, shapes, (1, 3, 32, 64)) is None
    assert dry_run_error(net, shapes, (1, 3, 32, 96)) == "width above 64"


def test_a_lack_of_memory_is_not_blamed_on_the_size() -> None:
    class Hungry(NeedsNumbers):
        def forward(self, pixels: torch.Tensor) -> torch.Tensor:
            raise RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 9 bytes")

    with pytest.raises(RuntimeError, match="not enough memory"):
        forward_error(Hungry(), (1, 3, 32, 64))


def test_a_view_that_the_net_cannot_process_is_named_before_prediction(tmp_path: Path) -> None:
    spec, input = encoder("tu-maxvit_rmlp_pico_rw_256"), InputSettings(size=(128, 128))
    save_config(tmp_path, spec, input, {})
    save_weights(tmp_path / WEIGHTS["last"], build_model(spec, input, pretrained=False).state_dict())
    predictor = TorchPredictor(tmp_path, views=["identity", "hflip"], device="cpu")
    with pytest.raises(CarvanaError, match=rf"{tmp_path}.*scale:0\.75.*predict\.tta"):
        predictor.with_tta(["identity", "scale:0.75"])


def test_training_tries_every_batch_and_the_views_of_all_splits(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    monkeypatch.setattr(stage, "check_sizes", lambda spec, input, batches, sizes: tried.extend([batches, sizes]))
    params = read_params(ROOT / "params.yaml")
    tta = SplitTTA(oof=("identity", "scale:0.5"), holdout=("identity", "hflip+scale:0.75"), test=("identity",))
    params = params.model_copy(update={"predict": params.predict.model_copy(update={"tta": tta})})
    stage._check_sizes(params, job(batch_size=4, devices=2, crop=(16, 16)))
    batches, sizes = tried
    assert list(batches.values()) == [(3, 16, 16)]  # six images shared by two processes
    assert set(sizes.values()) == {(32, 48), (16, 24), (24, 36)}


@pytest.mark.parametrize("name", ["tu-skresnet18", "tu-resnest14d"])
def test_a_batch_of_one_is_refused_where_it_has_no_statistics(name: str) -> None:
    spec = encoder(name)
    check_sizes(spec, INPUT, {"training": (2, 64, 96)}, {})
    with pytest.raises(CarvanaError, match=rf"{name}.*one image.*train\.batch_size"):
        check_sizes(spec, INPUT, {"training": (1, 64, 96)}, {})


@pytest.mark.parametrize("spec", [UNetConfig(architecture="unet"), encoder("resnet34", 5)], ids=["unet", "resnet34"])
def test_native_sizes_are_checked_in_seconds(spec: UNetConfig | SmpUNetConfig) -> None:
    start = time.process_time()
    check_sizes(spec, InputSettings(size="native"), {"training": (16, 1280, 1918)}, {"view": (960, 1439)})
    assert time.process_time() - start < 30


@pytest.mark.parametrize("channels", [4, 8, 12, 20, 24, 33])
def test_group_norm_takes_any_width(channels: int) -> None:
    assert double_conv(3, channels, "group")(torch.zeros(1, 3, 8, 8)).shape == (1, channels, 8, 8)
