"""Synthetic probability maps that resemble those of trained nets: certain nearly everywhere, soft along the outline."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.models.tensors import quantize_logits_tensor
from pipeline.utils.arrays import UInt8Array


def synthetic_map(mask_HW: UInt8Array, seed: Sequence[int]) -> UInt8Array:
    """Return probabilities, uint8 (H, W), that a net could have predicted for a mask; seeds stand for nets and views.

    The outline is about 6 pixels soft and shifts by a pixel or two, a few blobs are uncertain, and there is a little
    noise. That takes 26 KB as PNG, and 27 KB (one view) or 39 KB (sum of two) with zstd, close to real maps.
    """
    rng = np.random.default_rng(seed)
    logits_HW = 20 * (cv2.GaussianBlur(mask_HW.astype(np.float32), (0, 0), 6.0) - np.float32(0.5))
    shift = rng.normal(0, 1.0, (40, 60)).astype(np.float32)
    logits_HW += cv2.resize(shift, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    logits_HW += rng.normal(0, 0.1, (HEIGHT, WIDTH)).astype(np.float32)
    for _ in range(4):
        y, x = rng.integers(300, 1000), rng.integers(300, 1600)
        blob = np.zeros((121, 121), np.float32)
        cv2.circle(blob, (60, 60), int(rng.integers(5, 25)), float(rng.uniform(-10, 10)), -1)
        logits_HW[y - 60 : y + 61, x - 60 : x + 61] += cv2.GaussianBlur(blob, (0, 0), 6.0)
    probs_HW: UInt8Array = quantize_logits_tensor(torch.from_numpy(logits_HW)).numpy()
    return probs_HW


def write_png(path: Path, probs_HW: UInt8Array) -> None:
    """Write a map as an 8-bit gray PNG, as the winning solution did."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), probs_HW):
        raise OSError(f"{path} can't be written")
