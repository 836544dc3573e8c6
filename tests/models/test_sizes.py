"""The dry pass over every size that a net will process, and what encoders need."""

import time

import pytest
import torch

from pipeline.config import InputSettings, SmpUNetConfig, UNetConfig
from pipeline.errors import CarvanaError
from pipeline.models.networks import build_model, check_sizes, double_conv

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
    with pytest.raises(CarvanaError, match=r"tu-swin_tiny_patch4_window7_224.*64 x 96.*validation.*224"):
        check_sizes(spec, INPUT, {}, {"validation": (64, 96)})


def test_a_batch_of_one_is_refused_where_it_has_no_statistics() -> None:
    spec = encoder("tu-skresnet18")
    check_sizes(spec, INPUT, {"training": (2, 64, 96)}, {})
    with pytest.raises(CarvanaError, match=r"tu-skresnet18.*one image.*train\.batch_size"):
        check_sizes(spec, INPUT, {"training": (1, 64, 96)}, {})


@pytest.mark.parametrize("spec", [UNetConfig(architecture="unet"), encoder("resnet34", 5)], ids=["unet", "resnet34"])
def test_native_sizes_are_checked_in_seconds(spec: UNetConfig | SmpUNetConfig) -> None:
    start = time.process_time()
    check_sizes(spec, InputSettings(size="native"), {"training": (16, 1280, 1918)}, {"view": (960, 1439)})
    assert time.process_time() - start < 30


@pytest.mark.parametrize("channels", [4, 8, 12, 20, 24, 33])
def test_group_norm_takes_any_width(channels: int) -> None:
    assert double_conv(3, channels, "group")(torch.zeros(1, 3, 8, 8)).shape == (1, channels, 8, 8)
