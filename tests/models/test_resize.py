"""Resizing between a photograph and a net's input."""

import numpy as np
import torch

from pipeline.config import InputSettings
from pipeline.models.resize import soft_target, to_network_input
from pipeline.models.tensors import quantize_logits_tensor, upsample_logits_tensor


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
        logits = torch.randn(2, 1, 20, 30)
        torchs = torch.nn.functional.interpolate(logits, (64, 95), mode="bicubic", align_corners=False)[:, 0]
        assert (upsample_logits_tensor(logits, 64, 95) - torchs).abs().max() < 1e-3

    def test_native_is_not_touched(self) -> None:
        image = np.random.default_rng(0).integers(0, 255, (1280, 1918, 3), np.uint8)
        assert to_network_input(image, InputSettings(size="native")) is image

    def test_grey_has_one_channel(self) -> None:
        image = np.zeros((1280, 1918, 3), np.uint8)
        assert to_network_input(image, InputSettings(size=(64, 96), channels="gray")).shape == (64, 96, 1)
