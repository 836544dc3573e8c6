"""The same few validation images after each epoch: photograph, truth, what the net says, and where it errs."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import cv2
import numpy as np
import torch

from pipeline.config import InputSettings
from pipeline.models.networks import SegmentationModel
from pipeline.models.resize import soft_target, to_network_input
from pipeline.models.tensors import quantize_logits_tensor, to_batch
from pipeline.training.dataset import ImageReader
from pipeline.utils.arrays import UInt8Array

FALSE_NEGATIVE, FALSE_POSITIVE = (255, 140, 0), (235, 30, 60)
"""Colors, RGB, of errors: those of ``reporting/pictures.py``, which this room does not know; a test compares them."""

_IMAGES = 6
_HEIGHT, _WIDTH, _GAP, _CAPTION = 160, 240, 4, 20
_BACK = (24, 24, 24)
_ROWS = ("photograph", "truth", "prediction", "error")
_JPEG = (
    *(cv2.IMWRITE_JPEG_QUALITY, 85),
    # Color at full resolution: halved, as is usual, it would wash out thin errors.
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
)


def pick_images(image_ids: Sequence[str]) -> list[str]:
    """Return 6 of the ids, or all where there are fewer, spread over cars and angles; the same ones each time."""
    ids, count = sorted(image_ids), min(_IMAGES, len(image_ids))
    # Steps a little longer than a sixth of all, or the cars of some folds would all be seen from one angle.
    return [ids[number * len(ids) * (count + 1) // count**2] for number in range(count)]


@dataclass(frozen=True)
class PredictionGrid:
    """A few images, decoded and shrunk once, to be drawn with what a net says of them."""

    image_ids: Sequence[str]
    inputs: Sequence[UInt8Array]
    """What the net sees, uint8 (h, w, C)."""
    targets: Sequence[UInt8Array]
    """The part of each of the net's pixels that is car, uint8 (h, w), 0 to 255."""
    photographs: Sequence[UInt8Array]
    """In color, as large as they are drawn, uint8."""

    @classmethod
    def load(cls, image_ids: Sequence[str], reader: ImageReader, input: InputSettings) -> Self:
        """Return the panel of the images that ``choose`` takes from the ids."""
        ids = pick_images(image_ids)
        images = [reader.image(image_id) for image_id in ids]
        targets = [soft_target(reader.mask(image_id), input) for image_id in ids]
        return cls(
            ids, [to_network_input(image, input) for image in images], targets, [_grid_cell(image) for image in images]
        )

    @torch.inference_mode()
    def draw(self, net: SegmentationModel, device: torch.device) -> bytes:
        """Return the panel as a JPEG: a column an image. ``net`` is on ``device``, in the mode for evaluation."""
        columns = []
        # One by one: six native images at once would not fit beside the state of training.
        for image_id, pixels, target, photograph in zip(
            self.image_ids, self.inputs, self.targets, self.photographs, strict=True
        ):
            levels_hw = quantize_logits_tensor(net(to_batch([pixels], device))[0, 0].float().cpu()).numpy()
            columns.append(_column(image_id, photograph, target, levels_hw))
        for number, words in enumerate(_ROWS):
            _write(columns[0], words, 6, _CAPTION + number * (_HEIGHT + _GAP) + 16)
        data = cv2.imencode(".jpg", cv2.cvtColor(np.hstack(columns), cv2.COLOR_RGB2BGR), _JPEG)[1]
        return data.tobytes()


def _column(image_id: str, photograph_HWC: UInt8Array, target_hw: UInt8Array, levels_hw: UInt8Array) -> UInt8Array:
    tiles = (photograph_HWC, _gray(target_hw), _gray(levels_hw), _error_image(photograph_HWC, target_hw, levels_hw))
    column_HWC = np.full((_CAPTION + len(tiles) * (_HEIGHT + _GAP), _WIDTH + _GAP, 3), _BACK[0], np.uint8)
    _write(column_HWC, image_id, 6, 14)
    for number, tile_HWC in enumerate(tiles):
        top = _CAPTION + number * (_HEIGHT + _GAP)
        column_HWC[top : top + _HEIGHT, :_WIDTH] = tile_HWC
    return column_HWC


def _error_image(photograph_HWC: UInt8Array, target_hw: UInt8Array, levels_hw: UInt8Array) -> UInt8Array:
    """Return the photograph, dark and grey, with the net's errors over it."""
    grey_HW = cv2.cvtColor(photograph_HWC, cv2.COLOR_RGB2GRAY)
    drawn_HWC = np.repeat(0.55 * grey_HW[..., None].astype(np.float32), 3, axis=2)
    true_hw, said_hw = target_hw >= 128, levels_hw >= 128
    for wrong_hw, color in ((true_hw & ~said_hw, FALSE_NEGATIVE), (said_hw & ~true_hw, FALSE_POSITIVE)):
        # By the root: of a native image, an error one pixel wide fills an eighth of a tile's pixel, and must be seen.
        share_HW1 = np.sqrt(_grid_cell(wrong_hw * np.uint8(255))[..., None] / np.float32(255))
        drawn_HWC = drawn_HWC * (1 - share_HW1) + np.asarray(color, np.float32) * share_HW1
    return np.rint(drawn_HWC).astype(np.uint8)


def _gray(raster_hw: UInt8Array) -> UInt8Array:
    return np.repeat(_grid_cell(raster_hw)[..., None], 3, axis=2)


def _grid_cell(raster: UInt8Array) -> UInt8Array:
    return np.asarray(cv2.resize(raster, (_WIDTH, _HEIGHT), interpolation=cv2.INTER_AREA), np.uint8)


def _write(picture_HWC: UInt8Array, text: str, left: int, base: int) -> None:
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.42, 1)
    cv2.rectangle(picture_HWC, (left - 4, base - height - 4), (left + width + 4, base + below), _BACK, cv2.FILLED)
    cv2.putText(picture_HWC, text, (left, base), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (235, 235, 235), 1, cv2.LINE_AA)
