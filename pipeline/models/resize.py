"""From images to a net's input, and from its logits to uint8 probabilities, without torch."""

from collections.abc import Callable
from functools import lru_cache

import cv2
import numpy as np

from pipeline.config import InputSettings
from pipeline.utils.arrays import Float32Array, UInt8Array

LOGIT_CLAMP = 4.0
"""Logits beyond this count as certain. Measured on real nets and masks: see docs/design.md."""


def to_network_input(image_HWC: UInt8Array, input: InputSettings) -> UInt8Array:
    """Return a net's input, uint8 (h, w, C), for an RGB image, uint8 (H, W, 3) of any size.

    Shrunk by area average; where the image is smaller, enlarged by bicubic interpolation.
    """
    if input.channels == "gray":
        image_HWC = np.asarray(cv2.cvtColor(image_HWC, cv2.COLOR_RGB2GRAY), np.uint8)
    return np.atleast_3d(_downsample(image_HWC, input))


def soft_target(mask_HW: UInt8Array, input: InputSettings) -> UInt8Array:
    """Return the share of foreground in each pixel of a net's input: uint8 (h, w), 0 to 255."""
    return _downsample(mask_HW * np.uint8(255), input)


def upsample_logits(logits_hw: Float32Array, height: int, width: int) -> Float32Array:
    """Return logits (height, width), clamped and then enlarged by bicubic interpolation.

    Clamped first: otherwise the value of a certain pixel would shift the outline beside it.
    """
    clamped_hw = np.clip(logits_hw, -LOGIT_CLAMP, LOGIT_CLAMP)
    if clamped_hw.shape == (height, width):
        return clamped_hw
    return np.asarray(cv2.resize(clamped_hw, (width, height), interpolation=cv2.INTER_CUBIC), np.float32)


def clamped_sigmoid(logits: Float32Array) -> Float32Array:
    """Return probabilities: 0 at the lower clamp, 1 at the upper, exactly 0.5 between them."""
    # sigmoid(x) - 0.5 is tanh(x / 2) / 2.
    stretched = np.tanh(logits * np.float32(0.5)) * np.float32(0.5 / np.tanh(LOGIT_CLAMP / 2)) + np.float32(0.5)
    return np.asarray(np.clip(stretched, 0, 1), np.float32)


def quantize_probabilities(probability: Float32Array) -> UInt8Array:
    """Return probabilities as uint8, 0 to 255, rounded: 0.5 is 127.5, which rounds (to even) to 128."""
    probs_u8: UInt8Array = np.rint(probability * np.float32(255)).astype(np.uint8)
    return probs_u8


def _quantize_unclamped(logits: Float32Array) -> UInt8Array:
    return quantize_probabilities(clamped_sigmoid(logits))


def quantize_logits(
    logits: Float32Array, quantize_unclamped: Callable[[Float32Array], UInt8Array] = _quantize_unclamped
) -> UInt8Array:
    """Return probabilities as uint8, rounded: 0 and 255 at the clamps and beyond, 128 from probability 0.5 on.

    The range between the clamps is stretched over all values, so that certain pixels are 0 or 255 exactly and maps
    stay sparse. ``quantize_unclamped`` quantizes any logits, of any shape; it is called for few of them.
    """
    values = np.ascontiguousarray(logits).ravel()
    probs_u8 = (values > 0).view(np.uint8)
    np.negative(probs_u8, out=probs_u8)  # 1 becomes 255
    # Nearly all pixels are certain: these need a comparison, only the others a sigmoid. Uncertain pixels lie side by
    # side; eight of them are found and copied as fast as one.
    end = values.size // 8 * 8
    uncertain = np.abs(values) < LOGIT_CLAMP - 0.1  # logits nearer to a clamp round to 0 or 255 as well
    blocks = np.flatnonzero(uncertain[:end].view(np.uint64) != 0)
    quantized = quantize_unclamped(np.take(values[:end].reshape(-1, 8), blocks, axis=0))
    probs_u8[:end].view(np.uint64)[blocks] = quantized.view(np.uint64).ravel()
    if end < values.size:
        probs_u8[end:] = quantize_unclamped(values[end:])
    return probs_u8.reshape(logits.shape)


def upsample_and_quantize(
    logits_hw: Float32Array,
    height: int,
    width: int,
    quantize_unclamped: Callable[[Float32Array], UInt8Array] = _quantize_unclamped,
) -> UInt8Array:
    """Return ``quantize_logits`` of ``upsample_logits``, the same bits, as uint8 (height, width).

    Computed only for the rows of the object: rows above and below it are certain and are filled with one value.
    """
    if logits_hw.shape == (height, width):
        return quantize_logits(logits_hw, quantize_unclamped)
    clamped_hw = np.clip(logits_hw, -LOGIT_CLAMP, LOGIT_CLAMP)
    first, last = _uncertain_rows(clamped_hw)
    start, stop = first * height // len(clamped_hw), -(-last * height // len(clamped_hw))
    probs_u8 = np.empty((height, width), np.uint8)
    probs_u8[:start] = 255 * (clamped_hw[0, 0] > 0)
    probs_u8[stop:] = 255 * (clamped_hw[-1, 0] > 0)
    if start < stop:
        upsampled = _upsample_rows(clamped_hw, (first, last), (start, stop), (height, width))
        probs_u8[start:stop] = quantize_logits(upsampled, quantize_unclamped)
    return probs_u8


_REACH = 2
"""Rows to either side that a row of a bicubic interpolation depends on."""


def _uncertain_rows(clamped_hw: Float32Array) -> tuple[int, int]:
    """Return the first row to upsample and the end of these rows.

    The rows before have the same clamped logit throughout, and so have the rows from the end on.
    """
    height, edge_h = len(clamped_hw), clamped_hw[:, 0]
    certain = (clamped_hw == edge_h[:, None]).all(axis=1) & (np.abs(edge_h) == LOGIT_CLAMP)
    like_top, like_bottom = certain & (edge_h == edge_h[0]), certain & (edge_h == edge_h[-1])
    if like_top.all():
        return height, height
    top, bottom = int(np.argmin(like_top)), height - int(np.argmin(like_bottom[::-1]))
    return max(0, top - _REACH), min(height, bottom + _REACH)


def _upsample_rows(
    clamped_hw: Float32Array, rows: tuple[int, int], target_rows: tuple[int, int], size: tuple[int, int]
) -> Float32Array:
    """Return the ``target_rows`` of the logits upsampled to ``size``; ``rows`` of the logits cover them."""
    if not _crops_exactly(*clamped_hw.shape, *size):
        return upsample_logits(clamped_hw, *size)[slice(*target_rows)]
    scale = size[0] // len(clamped_hw)
    first, last = max(0, rows[0] - _REACH), min(len(clamped_hw), rows[1] + _REACH)
    upsampled = upsample_logits(clamped_hw[first:last], (last - first) * scale, size[1])
    return upsampled[target_rows[0] - first * scale : target_rows[1] - first * scale]


@lru_cache
def _crops_exactly(h: int, w: int, height: int, width: int) -> bool:
    """Return whether some rows, upsampled alone, are the same bits as in the whole; that depends on OpenCV's build."""
    first, last, scale = h // 3, h - h // 3, height // h
    if height % h or last - first <= 2 * _REACH:
        return False
    logits_hw = np.random.default_rng(0).uniform(-LOGIT_CLAMP, LOGIT_CLAMP, (h, w)).astype(np.float32)
    whole = upsample_logits(logits_hw, height, width)[(first + _REACH) * scale : (last - _REACH) * scale]
    alone = upsample_logits(logits_hw[first:last], (last - first) * scale, width)
    return np.array_equal(whole, alone[_REACH * scale : -_REACH * scale])


def _downsample(image: UInt8Array, input: InputSettings) -> UInt8Array:
    if input.size == "native":
        return image
    height, width = input.size
    least = min(width, image.shape[1]), min(height, image.shape[0])
    # Soft targets and area averages take most of the loss out of a small input: best Dice 0.9987, not 0.9945.
    image = _area_average(image, *least)
    if least == (width, height):
        return image
    # Only users' own images are smaller than a net's input; area averages would enlarge pixels to squares.
    return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_CUBIC), np.uint8)


def _area_average(image: UInt8Array, width: int, height: int) -> UInt8Array:
    """Return an image, uint8 (H, W) or (H, W, C), shrunk by area average; within 1 of cv2.INTER_AREA."""
    rows = image.shape[0] // height
    if image.shape[0] % height or not 1 < rows <= 257:  # 257 times 255 is the most that uint16 holds
        return np.asarray(cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), np.uint8)
    # Four times faster: whole rows are summed as integers, and only the sums are averaged along rows.
    sums = np.add.reduce(image.reshape(height, rows, -1), axis=1, dtype=np.uint16).astype(np.float32)
    means = cv2.resize(sums.reshape(height, *image.shape[1:]), (width, height), interpolation=cv2.INTER_AREA)
    return np.asarray(cv2.convertScaleAbs(means, alpha=1 / rows), np.uint8)
