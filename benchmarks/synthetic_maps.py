"""Maps of probability as trained nets make them: certain nearly everywhere, soft along the outline."""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.models.tensors import quantize_logits_tensor

Raster = NDArray[np.uint8]


def draw_levels(mask_HW: Raster, seed: Sequence[int]) -> Raster:
    """Return levels (H, W) that a net could have given for this mask; another seed is another net or view.

    The outline is some 6 pixels soft and wanders by a pixel or two, a few blobs are undecided, and there is a little
    noise: 26 KB as PNG, and as zstd 27 KB (one view) or 39 KB (the sum of two), near what real nets' maps weigh.
    """
    rng = np.random.default_rng(seed)
    logits_HW = 20 * (cv2.GaussianBlur(mask_HW.astype(np.float32), (0, 0), 6.0) - np.float32(0.5))
    wander = rng.normal(0, 1.0, (40, 60)).astype(np.float32)
    logits_HW += cv2.resize(wander, (WIDTH, HEIGHT), interpolation=cv2.INTER_CUBIC)
    logits_HW += rng.normal(0, 0.1, (HEIGHT, WIDTH)).astype(np.float32)
    for _ in range(4):
        y, x = rng.integers(300, 1000), rng.integers(300, 1600)
        blob = np.zeros((121, 121), np.float32)
        cv2.circle(blob, (60, 60), int(rng.integers(5, 25)), float(rng.uniform(-10, 10)), -1)
        logits_HW[y - 60 : y + 61, x - 60 : x + 61] += cv2.GaussianBlur(blob, (0, 0), 6.0)
    levels: Raster = quantize_logits_tensor(torch.from_numpy(logits_HW)).numpy()
    return levels


def write_png(path: Path, levels_HW: Raster) -> None:
    """Write a map as the winning solution kept its own: an 8-bit grey PNG."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if not cv2.imwrite(str(path), levels_HW):
        raise OSError(f"{path} can't be written")
