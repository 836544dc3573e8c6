"""Run-length encoding and decoding, against the snippet in Kaggle's notebooks and pycocotools."""

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
class ForEach:
    """Call a function on each value."""

    function: Callable[[Any], object]
    values: list[Any]

    def __call__(self) -> None:
        for value in self.values:
            self.function(value)


def run(folder: Path, tiny: bool = False) -> list[Row]:
    """Return encoding and decoding, one item being a mask."""
    count, rounds = (2, 1) if tiny else (20, 15)
    source = CompetitionData(folder)
    ids = source.masks.ids()
    masks = [source.masks.mask(image_id) for image_id in ids[:: max(1, len(ids) // count)][:count]]
    fortran_masks = [np.asfortranarray(mask) for mask in masks]  # pycocotools needs them; the conversion is not timed
    codes = [rle.encode(mask) for mask in masks]
    coco_codes = [coco.encode(mask) for mask in fortran_masks]
    if codes != [snippet_encode(mask) for mask in masks]:
        raise AssertionError("Our encoding differs from the snippet's.")

    encode, decode = ForEach(rle.encode, masks), ForEach(_decode, codes)
    return [
        compare("RLE encode / NumPy snippet", encode, ForEach(snippet_encode, masks), len(masks), rounds),
        compare(
            "RLE encode / pycocotools (column-major)", encode, ForEach(coco.encode, fortran_masks), len(masks), rounds
        ),
        compare("RLE decode / NumPy snippet", decode, ForEach(snippet_decode, codes), len(masks), rounds),
        compare(
            "RLE decode / pycocotools (column-major)", decode, ForEach(coco.decode, coco_codes), len(masks), rounds
        ),
    ]


def snippet_encode(mask: Mask) -> str:
    """Encode a mask with the snippet of most Carvana notebooks, in the version that is correct at the corners."""
    pixels = np.concatenate([[0], mask.flatten(), [0]])
    runs = np.where(pixels[1:] != pixels[:-1])[0] + 1
    runs[1::2] -= runs[::2]
    return " ".join(str(x) for x in runs)


def snippet_decode(code: str) -> Mask:
    """Decode a mask with the counterpart of the snippet."""
    s = code.split()
    starts, lengths = (np.asarray(x, dtype=int) for x in (s[0:][::2], s[1:][::2]))
    starts -= 1
    img = np.zeros(HEIGHT * WIDTH, dtype=np.uint8)
    for lo, hi in zip(starts, starts + lengths, strict=True):
        img[lo:hi] = 1
    return img.reshape(HEIGHT, WIDTH)


def _decode(code: str) -> Mask:
    return rle.decode(code, HEIGHT, WIDTH)
