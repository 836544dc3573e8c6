"""Resizing between a photograph and a net's input."""

from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pipeline.config import InputSettings
from pipeline.data.competition_data import CompetitionData
from pipeline.models import resize
from pipeline.models.resize import (
    clamped_sigmoid,
    quantize_logits,
    quantize_probabilities,
    soft_target,
    to_network_input,
    upsample_and_quantize,
    upsample_logits,
)
from pipeline.models.tensors import quantize_logits_tensor, upsample_logits_tensor
from pipeline.utils.arrays import Float32Array, UInt8Array

REAL_DATA = Path(__file__).parents[3] / "shared" / "carvana"

Quantize = Callable[[Float32Array], UInt8Array]


def torch_quantize(logits: Float32Array) -> UInt8Array:
    return quantize_logits_tensor(torch.from_numpy(logits)).numpy()


def numpy_quantize(logits: Float32Array) -> UInt8Array:
    return quantize_probabilities(clamped_sigmoid(logits))


def everywhere(logits_hw: Float32Array, height: int, width: int, quantize: Quantize) -> UInt8Array:
    """Upsample and quantize every pixel."""
    logits_HW = upsample_logits(logits_hw, height, width)
    probs_HW = (logits_HW > 0) * np.uint8(255)
    uncertain_HW = np.abs(logits_HW) < 3.9
    probs_HW[uncertain_HW] = quantize(logits_HW[uncertain_HW])
    return probs_HW


def random_logits(rng: np.random.Generator, h: int, w: int) -> Float32Array:
    """Return noise, one value, two halves, or an object of noise or of one value at any place in a background."""
    noise_hw = rng.normal(0, rng.choice([0.5, 4, 40]), (h, w)).astype(np.float32)
    logits_hw = np.full((h, w), rng.choice([-9, 9, -4, 4, -3.9, 0]), np.float32)
    (top, bottom), (left, right) = np.sort(rng.integers(0, h + 1, 2)), np.sort(rng.integers(0, w + 1, 2))
    match rng.integers(5):
        case 0:
            return noise_hw
        case 1:
            logits_hw[top:] *= -1
        case 2:
            logits_hw[:, left:] *= -1
        case 3:
            logits_hw[top:bottom, left:right] *= -1
        case 4:
            logits_hw[top:bottom, left:right] = noise_hw[top:bottom, left:right]
    return logits_hw


class TestUpsampleAndQuantize:
    @pytest.mark.parametrize("own_interpolation", [False, True])
    def test_small_maps_are_the_same_as_when_every_pixel_is_computed(self, own_interpolation: bool) -> None:
        # OpenCV interpolates with Intel's library, where it has it, or by itself. Only the former gives the same bits
        # for some rows as for all, unless the scale is a power of two.
        resize._crops_exactly.cache_clear()
        cv2.ipp.setUseIPP(not own_interpolation)
        try:
            rng = np.random.default_rng(0)
            for _ in range(300):
                h, w, scale = (int(n) for n in rng.integers(1, [60, 60, 11]))
                free = tuple(int(n) for n in rng.integers(1, 250, 2))
                logits_hw = random_logits(rng, h, w)
                for size in [(h, w), (h * scale, w * scale), (h * scale, free[1]), free]:
                    for quantize in (torch_quantize, numpy_quantize):
                        probs_HW = upsample_and_quantize(logits_hw, *size, quantize)
                        np.testing.assert_array_equal(probs_HW, everywhere(logits_hw, *size, quantize))
        finally:
            cv2.ipp.setUseIPP(True)
            resize._crops_exactly.cache_clear()

    @pytest.mark.parametrize("size", [(128, 192), (160, 240), (256, 384), (320, 480), (500, 700), (1280, 1918)])
    def test_maps_at_full_size_are_the_same_as_when_every_pixel_is_computed(self, size: tuple[int, int]) -> None:
        rng = np.random.default_rng(1)
        for _ in range(2):
            logits_hw = cv2.resize(random_logits(rng, 20, 30), size[::-1], interpolation=cv2.INTER_LINEAR)
            probs_HW = upsample_and_quantize(logits_hw, 1280, 1918)
            assert probs_HW.dtype == np.uint8
            np.testing.assert_array_equal(probs_HW, everywhere(logits_hw, 1280, 1918, numpy_quantize))

    def test_rows_without_object_are_not_computed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        heights = list[int]()

        def spy(logits_hw: Float32Array, height: int, width: int) -> Float32Array:
            heights.append(height)
            return upsample_logits(logits_hw, height, width)

        logits_hw = np.full((160, 240), -9, np.float32)
        logits_hw[60:70, 100:120] = 9
        upsample_and_quantize(logits_hw, 1280, 1918)  # tries once whether rows can be upsampled alone
        monkeypatch.setattr(resize, "upsample_logits", spy)
        upsample_and_quantize(logits_hw, 1280, 1918)
        assert heights == [18 * 8]
        upsample_and_quantize(np.full((160, 240), -9, np.float32), 1280, 1918)
        assert len(heights) == 1

    @pytest.mark.parametrize("shape", [(0,), (7,), (8,), (3, 5), (2, 3, 4), (64, 33)])
    def test_quantization_of_any_shape(self, shape: tuple[int, ...]) -> None:
        logits = np.random.default_rng(0).normal(0, 4, shape).astype(np.float32)
        probs_u8 = quantize_logits(logits)
        assert probs_u8.shape == shape
        np.testing.assert_array_equal(probs_u8, numpy_quantize(logits))


class TestAreaAverage:
    @pytest.mark.parametrize("size", [(128, 192), (160, 240), (256, 384), (320, 480), (500, 700), (5, 1918)])
    @pytest.mark.parametrize("channels", ["rgb", "gray"])
    def test_within_1_of_opencv(self, size: tuple[int, int], channels: str) -> None:
        image_HWC = np.random.default_rng(0).integers(0, 256, (1280, 1918, 3), np.uint8)
        _assert_close_to_opencv(image_HWC, InputSettings(size=size, channels=channels))  # type: ignore[arg-type]

    @pytest.mark.parametrize("value", [0, 1, 127, 255])
    def test_one_value_stays_the_same(self, value: int) -> None:
        for size in [(128, 192), (160, 240), (5, 7), (320, 480)]:
            image_HWC = np.full((1280, 1918, 3), value, np.uint8)
            assert (to_network_input(image_HWC, InputSettings(size=size)) == value).all()

    def test_any_strides(self) -> None:
        image_HWC = np.random.default_rng(0).integers(0, 256, (1280, 1920, 3), np.uint8)[:, 1:-1]
        _assert_close_to_opencv(image_HWC, InputSettings(size=(160, 240)))
        _assert_close_to_opencv(image_HWC[::-1, ::-1], InputSettings(size=(160, 240)))

    @pytest.mark.skipif(not REAL_DATA.is_dir(), reason="needs Kaggle's images in ../shared/carvana")
    @pytest.mark.parametrize("size", [(128, 192), (160, 240), (256, 384), (320, 480)])
    def test_within_1_of_opencv_on_real_images(self, size: tuple[int, int]) -> None:
        source, input = CompetitionData(REAL_DATA), InputSettings(size=size)
        for image_id in source.train.ids()[::16]:
            _assert_close_to_opencv(source.train.image(image_id), input)
            mask_HW = source.masks.mask(image_id)
            expected = cv2.resize(mask_HW * np.uint8(255), size[::-1], interpolation=cv2.INTER_AREA)
            assert np.abs(soft_target(mask_HW, input) - expected.astype(int)).max() <= 1


def _assert_close_to_opencv(image_HWC: UInt8Array, input: InputSettings) -> None:
    pixels = cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY) if input.channels == "gray" else image_HWC
    expected = np.atleast_3d(cv2.resize(pixels, (input.width, input.height), interpolation=cv2.INTER_AREA))
    differences = np.abs(to_network_input(image_HWC, input) - expected.astype(int))
    assert differences.max() <= 1
    assert (differences > 0).mean() < 0.01


class TestPixels:
    def test_quantization_rounds_and_half_is_foreground(self) -> None:
        logits = torch.tensor([-9.0, -1e-3, 0.0, 1e-3, 9.0])
        assert quantize_logits_tensor(logits).tolist() == [0, 127, 128, 128, 255]

    def test_growing_a_soft_mask_keeps_the_outline(self) -> None:
        # Soft targets and clamped logits take most of the loss out of a small net (competition's own masks: 0.998).
        rows, columns = np.mgrid[:1280, :1918]
        mask = ((((rows - 700) / 310) ** 2 + ((columns - 960) / 620) ** 2) < 1).astype(np.uint8)
        soft = soft_target(mask, InputSettings(size=(160, 240))) / np.float32(255)
        grown = (
            upsample_logits_tensor(torch.logit(torch.from_numpy(soft), 1e-6)[None, None], 1280, 1918)[0].numpy() >= 0
        )
        assert 2 * (grown & (mask > 0)).sum() / (grown.sum() + mask.sum()) > 0.998

    def test_growing_is_the_same_cubic_on_every_device(self) -> None:
        logits = torch.randn(2, 1, 20, 30).clamp(-4, 4)
        torchs = torch.nn.functional.interpolate(logits, (64, 95), mode="bicubic", align_corners=False)[:, 0]
        assert (upsample_logits_tensor(logits, 64, 95) - torchs).abs().max() < 1e-3

    def test_native_is_not_touched(self) -> None:
        image = np.random.default_rng(0).integers(0, 255, (1280, 1918, 3), np.uint8)
        assert to_network_input(image, InputSettings(size="native")) is image

    def test_grey_has_one_channel(self) -> None:
        image = np.zeros((1280, 1918, 3), np.uint8)
        assert to_network_input(image, InputSettings(size=(64, 96), channels="gray")).shape == (64, 96, 1)
