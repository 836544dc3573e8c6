"""Between rasters and what a net sees: shrinking on the way in, growing on the way out."""

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from pipeline.learning.settings import InputSettings

CLAMP = 4.0
"""Logits beyond this count as certain, either way. Measured on real nets and masks: see docs/design.md."""

Pixels = NDArray[np.uint8]


def to_input(image_HWC: Pixels, input: InputSettings) -> Pixels:
    """Return a photograph as a net sees it: uint8 (h, w, C), shrunk by area average, in colour or grey."""
    if input.channels == "grey":
        image_HWC = np.asarray(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), np.uint8)
    return np.atleast_3d(_shrink(image_HWC, input))


def soft_target(mask_HW: Pixels, input: InputSettings) -> Pixels:
    """Return the part of each of a net's pixels that is car: uint8 (h, w), 0 to 255."""
    return _shrink(mask_HW * np.uint8(255), input)


def to_batch(inputs: list[Pixels], device: torch.device) -> Tensor:
    """Return inputs (h, w, C) as one uint8 tensor (B, C, h, w), laid out as convolutions run fastest."""
    batch_BCHW = torch.from_numpy(np.stack(inputs)).to(device).permute(0, 3, 1, 2)
    return batch_BCHW.contiguous(memory_format=memory_format(device))


def memory_format(device: torch.device) -> torch.memory_format:
    """Return channels_last for GPUs; on CPUs without wide vector units it is up to seven times slower."""
    return torch.channels_last if device.type == "cuda" else torch.contiguous_format


def grow(logits_B1HW: Tensor, height: int, width: int) -> Tensor:
    """Return logits (B, height, width) in float32, clamped and then grown by bicubic interpolation.

    Clamped first, because between a pixel that is certain and one that is not, the outline would else be drawn by
    how certain the certain one is.
    """
    logits_B1HW = logits_B1HW.float().clamp(-CLAMP, CLAMP)
    if logits_B1HW.shape[-2:] == (height, width):
        return logits_B1HW[:, 0]
    if logits_B1HW.device.type != "cpu":
        return functional.interpolate(logits_B1HW, (height, width), mode="bicubic", align_corners=False)[:, 0]
    # The same cubic as torch's, nine times faster.
    rasters = [
        cv2.resize(raster.numpy(), (width, height), interpolation=cv2.INTER_CUBIC) for raster in logits_B1HW[:, 0]
    ]
    return torch.from_numpy(np.stack(rasters)) if len(rasters) > 1 else torch.from_numpy(rasters[0])[None]


def to_levels(logits: Tensor) -> Tensor:
    """Return probabilities as uint8 levels, rounded: 0 and 255 at the clamp and beyond, 128 from probability 0.5 on.

    The range between the clamps is stretched over all levels, so that what is certain is 0 or 255 exactly and maps
    stay sparse.
    """
    if logits.device.type != "cpu":
        return _levels(logits)
    # Nearly all pixels of a picture are certain: these need a comparison, and only the others a sigmoid.
    values = logits.contiguous().numpy().reshape(-1, logits.shape[-1])
    levels = (values > 0).view(np.uint8) * np.uint8(255)
    # What is as near to the clamp as this rounds to 0 or 255 as well.
    uncertain = np.flatnonzero(cv2.inRange(values, 0.1 - CLAMP, CLAMP - 0.1).view(np.bool_))
    levels.ravel()[uncertain] = _levels(torch.from_numpy(values.ravel()[uncertain])).numpy()
    return torch.from_numpy(levels).view(logits.shape)


def _levels(logits: Tensor) -> Tensor:
    highest = torch.tensor(CLAMP).sigmoid().item()
    # From the middle outwards: a probability of 0.5 is 127.5 exactly, which rounds (to even) to 128.
    stretched = (logits.sigmoid() - 0.5).mul_(127.5 / (highest - 0.5)).add_(127.5)
    return stretched.clamp_(0, 255).round_().to(torch.uint8)


def _shrink(raster: Pixels, input: InputSettings) -> Pixels:
    if input.size == "native":
        return raster
    height, width = input.size
    # Soft targets and area averages take most of the loss out of a smaller net: 0.9987 against 0.9945 at best.
    return np.asarray(cv2.resize(raster, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
