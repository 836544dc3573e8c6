"""The prediction grid: a few validation images after each epoch, with truth, prediction and errors."""

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
"""Colors of errors, RGB; the same as in ``report/overlays.py``, which may not be imported here (a test compares)."""

_IMAGES = 6
_HEIGHT, _WIDTH, _GAP, _CAPTION = 160, 240, 4, 20
_BACKGROUND = (24, 24, 24)
_ROWS = ("photograph", "truth", "prediction", "error")
_JPEG = (
    *(cv2.IMWRITE_JPEG_QUALITY, 85),
    # No chroma subsampling, which would wash out thin errors.
    *(cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444),
)


def pick_images(image_ids: Sequence[str]) -> list[str]:
    """Return up to 6 of the ids, spread over cars and angles; the same ones each time."""
    ids, count = sorted(image_ids), min(_IMAGES, len(image_ids))
    # Steps a little longer than a sixth: otherwise all cars of some folds would have the same angle.
    return [ids[number * len(ids) * (count + 1) // count**2] for number in range(count)]


@dataclass(frozen=True)
class PredictionGrid:
    """A few images, decoded and shrunk once, to be drawn with a net's predictions."""

    image_ids: Sequence[str]
    inputs: Sequence[UInt8Array]
    """Inputs of the net, uint8 (h, w, C)."""
    targets: Sequence[UInt8Array]
    """Share of foreground in each input pixel, uint8 (h, w), 0 to 255."""
    photographs: Sequence[UInt8Array]
    """Photographs at the size of a cell, uint8 RGB."""

    @classmethod
    def load(cls, image_ids: Sequence[str], reader: ImageReader, input: InputSettings) -> Self:
        """Return the grid of the images that ``pick_images`` chooses."""
        ids = pick_images(image_ids)
        images = [reader.image(image_id) for image_id in ids]
        targets = [soft_target(reader.mask(image_id), input) for image_id in ids]
        return cls(
            ids, [to_network_input(image, input) for image in images], targets, [_grid_cell(image) for image in images]
        )

    @torch.inference_mode()
    def draw(self, net: SegmentationModel, device: torch.device) -> bytes:
        """Return the grid as a JPEG, one column per image. ``net`` is on ``device`` in evaluation mode."""
        columns = []
        # One by one: six native images would not fit beside the training state.
        for image_id, pixels, target, photograph in zip(
            self.image_ids, self.inputs, self.targets, self.photographs, strict=True
        ):
            probs_hw = quantize_logits_tensor(net(to_batch([pixels], device))[0, 0].float().cpu()).numpy()
            columns.append(_column(image_id, photograph, target, probs_hw))
        for number, caption in enumerate(_ROWS):
            _write(columns[0], caption, 6, _CAPTION + number * (_HEIGHT + _GAP) + 16)
        data = cv2.imencode(".jpg", cv2.cvtColor(np.hstack(columns), cv2.COLOR_RGB2BGR), _JPEG)[1]
        return data.tobytes()


def _column(image_id: str, photograph_HWC: UInt8Array, target_hw: UInt8Array, probs_hw: UInt8Array) -> UInt8Array:
    cells = (photograph_HWC, _gray(target_hw), _gray(probs_hw), _error_image(photograph_HWC, target_hw, probs_hw))
    column_HWC = np.full((_CAPTION + len(cells) * (_HEIGHT + _GAP), _WIDTH + _GAP, 3), _BACKGROUND[0], np.uint8)
    _write(column_HWC, image_id, 6, 14)
    for number, cell_HWC in enumerate(cells):
        top = _CAPTION + number * (_HEIGHT + _GAP)
        column_HWC[top : top + _HEIGHT, :_WIDTH] = cell_HWC
    return column_HWC


def _error_image(photograph_HWC: UInt8Array, target_hw: UInt8Array, probs_hw: UInt8Array) -> UInt8Array:
    """Return the photograph, dark and gray, with the net's errors over it."""
    gray_HW = cv2.cvtColor(photograph_HWC, cv2.COLOR_RGB2GRAY)
    drawn_HWC = np.repeat(0.55 * gray_HW[..., None].astype(np.float32), 3, axis=2)
    true_hw, predicted_hw = target_hw >= 128, probs_hw >= 128
    for wrong_hw, color in ((true_hw & ~predicted_hw, FALSE_NEGATIVE), (predicted_hw & ~true_hw, FALSE_POSITIVE)):
        # Square root: an error one native pixel wide fills an eighth of a cell's pixel, and must stay visible.
        share_HW1 = np.sqrt(_grid_cell(wrong_hw * np.uint8(255))[..., None] / np.float32(255))
        drawn_HWC = drawn_HWC * (1 - share_HW1) + np.asarray(color, np.float32) * share_HW1
    return np.rint(drawn_HWC).astype(np.uint8)


def _gray(gray_hw: UInt8Array) -> UInt8Array:
    return np.repeat(_grid_cell(gray_hw)[..., None], 3, axis=2)


def _grid_cell(image: UInt8Array) -> UInt8Array:
    return np.asarray(cv2.resize(image, (_WIDTH, _HEIGHT), interpolation=cv2.INTER_AREA), np.uint8)


def _write(image_HWC: UInt8Array, text: str, left: int, base: int) -> None:
    (width, height), below = cv2.getTextSize(text, cv2.FONT_HERSHEY_SIMPLEX, 0.42, 1)
    cv2.rectangle(image_HWC, (left - 4, base - height - 4), (left + width + 4, base + below), _BACKGROUND, cv2.FILLED)
    cv2.putText(image_HWC, text, (left, base), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (235, 235, 235), 1, cv2.LINE_AA)
