"""Our run-length code beside what Kaggle notebooks use, timed in one run and in turns."""

import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as coco

from pipeline.competition import rle, submission
from pipeline.competition.layout import HEIGHT, WIDTH

Mask = NDArray[np.uint8]

_REAL_CSV = Path(__file__).parents[2] / "shared" / "carvana" / "train_masks.csv.zip"


def load_masks(count: int = 20) -> list[Mask]:
    """Return real masks where the competition's zips lie beside the checkout, else drawn ones of as many runs."""
    if not _REAL_CSV.exists():
        return [_drawn(seed) for seed in range(count)]
    codes = [text for _, _, text in submission.rows(_REAL_CSV)]
    return [rle.decode(text, HEIGHT, WIDTH) for text in codes[:: max(1, len(codes) // count)][:count]]


def run(masks: list[Mask], rounds: int = 10) -> list[dict[str, str | float]]:
    """Return one row per comparison: median milliseconds a mask, median ratio, and the peak memory of either side.

    Ours and theirs take turns mask by mask, so that whatever else the machine does slows both.
    """
    fortran_masks = [np.asfortranarray(mask) for mask in masks]  # as pycocotools wants them, converted off the clock
    codes = [rle.encode(mask) for mask in masks]
    coco_codes = [coco.encode(mask) for mask in fortran_masks]
    if codes != [snippet_encode(mask) for mask in masks]:
        raise AssertionError("ours and the snippet encode differently: nothing to compare")

    def decode(code: str) -> Mask:
        return rle.decode(code, HEIGHT, WIDTH)

    return [
        _compare("encode / snippet", rle.encode, masks, snippet_encode, masks, rounds),
        _compare(
            "encode / pycocotools (other output: column-major)", rle.encode, masks, coco.encode, fortran_masks, rounds
        ),
        _compare("decode / snippet", decode, codes, snippet_decode, codes, rounds),
        _compare("decode / pycocotools (other input: column-major)", decode, codes, coco.decode, coco_codes, rounds),
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


def _compare(
    name: str,
    ours: Callable[[Any], object],
    our_inputs: list[Any],
    theirs: Callable[[Any], object],
    their_inputs: list[Any],
    rounds: int,
) -> dict[str, str | float]:
    pairs = [
        (_seconds(ours, our_input), _seconds(theirs, their_input))
        for _ in range(rounds)
        for our_input, their_input in zip(our_inputs, their_inputs, strict=True)
    ]
    our_seconds, their_seconds = np.array(pairs).T
    return {
        "name": name,
        "ours_ms": float(np.median(our_seconds)) * 1e3,
        "theirs_ms": float(np.median(their_seconds)) * 1e3,
        "ratio": float(np.median(their_seconds / our_seconds)),
        "peak_mb": _peak_mb(ours, our_inputs[0]),
        "theirs_peak_mb": _peak_mb(theirs, their_inputs[0]),
    }


def _seconds(function: Callable[[Any], object], value: object) -> float:
    begin = time.perf_counter()
    function(value)
    return time.perf_counter() - begin


def _peak_mb(function: Callable[[Any], object], value: object) -> float:
    """Return the peak of what Python and NumPy allocate in a call; C code of others goes unseen."""
    tracemalloc.start()
    function(value)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak_bytes / 1e6


def _drawn(seed: int) -> Mask:
    """Draw an ellipse with a ragged outline: hundreds of runs, as a car has."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[:HEIGHT, :WIDTH]
    radius_H1 = 1 + rng.normal(0, 0.01, size=(HEIGHT, 1))
    return (((y - 700) / 330) ** 2 + ((x - 960) / 700) ** 2 < radius_H1**2).astype(np.uint8)
