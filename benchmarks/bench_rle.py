"""Our run-length code beside what Kaggle notebooks use."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from benchmarks.timing import Row, compare
from pipeline.competition import rle
from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.data.competition_data import CompetitionData

Mask = NDArray[np.uint8]


@dataclass(frozen=True, eq=False)
class Each:
    """A function called on each value."""

    function: Callable[[Any], object]
    values: list[Any]

    def __call__(self) -> None:
        for value in self.values:
            self.function(value)


def run(folder: Path, tiny: bool = False) -> list[Row]:
    """Return encoding and decoding of masks, a mask being an item."""
    count, rounds = (2, 1) if tiny else (20, 15)
    source = CompetitionData(folder)
    ids = source.masks.ids()
    masks = [source.masks.mask(image_id) for image_id in ids[:: max(1, len(ids) // count)][:count]]
    fortran_masks = [np.asfortranarray(mask) for mask in masks]  # as pycocotools wants them, converted off the clock
    codes = [rle.encode(mask) for mask in masks]
    coco_codes = [coco.encode(mask) for mask in fortran_masks]
    if codes != [snippet_encode(mask) for mask in masks]:
        raise AssertionError("ours and the snippet encode differently: nothing to compare")

    encode, decode = Each(rle.encode, masks), Each(_decode, codes)
    return [
        compare("RLE encode / NumPy snippet", encode, Each(snippet_encode, masks), len(masks), rounds),
        compare(
            "RLE encode / pycocotools (column-major)", encode, Each(coco.encode, fortran_masks), len(masks), rounds
        ),
        compare("RLE decode / NumPy snippet", decode, Each(snippet_decode, codes), len(masks), rounds),
        compare("RLE decode / pycocotools (column-major)", decode, Each(coco.decode, coco_codes), len(masks), rounds),
    ]


def snippet_encode(mask: Mask) -> str:
    """The snippet of most Carvana kernels, in the version that is right at the corners."""
    pixels = np.concatenate([[0], mask.flatten(), [0]])
    runs = np.where(pixels[1:] != pixels[:-1])[0] + 1
    runs[1::2] -= runs[::2]
    return " ".join(str(x) for x in runs)


def snippet_decode(code: str) -> Mask:
    """The snippet's counterpart."""
    s = code.split()
    starts, lengths = (np.asarray(x, dtype=int) for x in (s[0:][::2], s[1:][::2]))
    starts -= 1
    img = np.zeros(HEIGHT * WIDTH, dtype=np.uint8)
    for lo, hi in zip(starts, starts + lengths, strict=True):
        img[lo:hi] = 1
    return img.reshape(HEIGHT, WIDTH)


def _decode(code: str) -> Mask:
    return rle.decode(code, HEIGHT, WIDTH)
