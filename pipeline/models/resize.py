"""Between rasters and what a net sees, in NumPy and OpenCV alone: also where no torch is installed."""

from collections.abc import Callable

import cv2
import numpy as np

from pipeline.config import InputSettings
from pipeline.utils.arrays import Float32Array, UInt8Array

LOGIT_CLAMP = 4.0
"""Logits beyond this count as certain, either way. Measured on real nets and masks: see docs/design.md."""


def to_network_input(image_HWC: UInt8Array, input: InputSettings) -> UInt8Array:
    """Return a picture, uint8 RGB of any size, as a net sees it: uint8 (h, w, C), in color or grey.

    Shrunk by area average; where it is smaller, grown by bicubic interpolation.
    """
    if input.channels == "gray":
        image_HWC = np.asarray(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), np.uint8)
    return np.atleast_3d(_downsample(image_HWC, input))


def soft_target(mask_HW: UInt8Array, input: InputSettings) -> UInt8Array:
    """Return the part of each of a net's pixels that is car: uint8 (h, w), 0 to 255."""
    return _downsample(mask_HW * np.uint8(255), input)


def upsample_logits(logits_hw: Float32Array, height: int, width: int) -> Float32Array:
    """Return logits (height, width), clamped and then grown by bicubic interpolation.

    Clamped first, because between a pixel that is certain and one that is not, the outline would else be drawn by
    how certain the certain one is.
    """
    clamped_hw = np.clip(logits_hw, -LOGIT_CLAMP, LOGIT_CLAMP)
    if clamped_hw.shape == (height, width):
        return clamped_hw
    return np.asarray(cv2.resize(clamped_hw, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


def clamped_sigmoid(logits: Float32Array) -> Float32Array:
    """Return probabilities, 0 at the clamp to 1 at the other one and exactly 0.5 between: levels, unrounded."""
    # sigmoid(x) - 0.5 is tanh(x / 2) / 2.
    stretched = np.tanh(logits * np.float32(0.5)) * np.float32(0.5 / np.tanh(LOGIT_CLAMP / 2)) + np.float32(0.5)
    return np.asarray(np.clip(stretched, 0, 1), np.float32)


def quantize_probabilities(probability: Float32Array) -> UInt8Array:
    """Return the nearest levels, 0 to 255, of probabilities: 0.5 is 127.5, which rounds (to even) to 128."""
    levels: UInt8Array = np.rint(probability * np.float32(255)).astype(np.uint8)
    return levels


def _quantize_unclamped(logits: Float32Array) -> UInt8Array:
    return quantize_probabilities(clamped_sigmoid(logits))


def quantize_logits(
    logits_HW: Float32Array, quantize_unclamped: Callable[[Float32Array], UInt8Array] = _quantize_unclamped
) -> UInt8Array:
    """Return probabilities as uint8 levels, rounded: 0 and 255 at the clamp and beyond, 128 from probability 0.5 on.

    The range between the clamps is stretched over all levels, so that what is certain is 0 or 255 exactly and maps
    stay sparse. ``undecided`` says the levels of what lies between the clamps.
    """
    # Nearly all pixels of a picture are certain: these need a comparison, and only the others a sigmoid.
    values = np.ascontiguousarray(logits_HW)
    levels = (values > 0).view(np.uint8) * np.uint8(255)
    # What is as near to the clamp as this rounds to 0 or 255 as well.
    between = np.flatnonzero(cv2.inRange(values, 0.1 - LOGIT_CLAMP, LOGIT_CLAMP - 0.1).view(np.bool_))
    levels.ravel()[between] = quantize_unclamped(values.ravel()[between])
    return levels


def _downsample(raster: UInt8Array, input: InputSettings) -> UInt8Array:
    if input.size == "native":
        return raster
    height, width = input.size
    least = min(width, raster.shape[1]), min(height, raster.shape[0])
    # Soft targets and area averages take most of the loss out of a smaller net: 0.9987 against 0.9945 at best.
    raster = np.asarray(cv2.resize(raster, least, interpolation=cv2.INTER_AREA), np.uint8)
    if least == (width, height):
        return raster
    # Only people's own pictures are smaller than what a net sees; area averages would grow as squares.
    return np.asarray(cv2.resize(raster, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)
