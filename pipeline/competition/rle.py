"""Kaggle's run-length encoding (RLE) of a mask: one-based ``start length`` pairs of foreground pixels, row-major.

A mask has three forms::

    mask_HW  --mask_to_runs-->  runs_N2  --format_runs-->  text      (both steps: encode)
    mask_HW  <--runs_to_mask--  runs_N2  <--parse_runs---  text      (both steps, with validate_runs between: decode)

``runs_N2`` is int64, one row per run: the zero-based index of its first pixel in the flattened mask, and its length.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CarvanaError

MaskLike = NDArray[np.bool_ | np.integer[Any]]
"""Any bool or integer array: 0 is background, every other value is foreground."""


def encode(mask_HW: MaskLike) -> str:
    """Return the run-length code of a mask (H, W), or the empty string if the mask is empty.

    Runs continue from the end of one row into the next, as Kaggle's do. Raises ValueError if the array does not have
    two dimensions, and TypeError if it is floating (apply a threshold first).
    """
    return format_runs(mask_to_runs(mask_HW))


def decode(text: str, height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask of a run-length code: uint8 (height, width), 1 for foreground, else 0.

    Raises CarvanaError, which names the run at fault, if the text is not the code of a mask of that size.
    """
    runs = parse_runs(text)
    validate_runs(runs, height * width)
    return runs_to_mask(runs, height, width)


def mask_to_runs(mask_HW: MaskLike) -> NDArray[np.int64]:
    """Return the runs of a mask (H, W), sorted, with a gap between neighbors; raises the errors of ``encode``."""
    if mask_HW.ndim != 2:
        raise ValueError(f"A mask has two dimensions, height and width; this array has shape {mask_HW.shape}.")
    # A mask has a few thousand edges in 2.4 million pixels. With one bit per pixel, 64 pixels are compared at once and
    # no other array is as large as the mask. The word of zeros at either end makes runs at the first or last pixel
    # ordinary runs.
    packed = np.packbits(mask_HW, bitorder="little")
    words = np.zeros(1 + packed.size // 8 + 1, dtype="<u8")
    words.view(np.uint8)[8 : 8 + packed.size] = packed
    previous, current = words[:-1], words[1:]
    edges = current ^ (current << 1 | previous >> 63)  # a set bit: this pixel differs from the one before it

    edge_words = np.flatnonzero(edges != 0)
    bits = np.unpackbits(edges[edge_words].view(np.uint8), bitorder="little")
    edge_bits = np.flatnonzero(bits.view(np.bool_))
    runs = (edge_words[edge_bits // 64] * 64 + edge_bits % 64).reshape(-1, 2)  # starts and stops alternate
    runs[:, 1] -= runs[:, 0]
    return runs


def runs_to_mask(runs_N2: NDArray[np.int64], height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask of valid runs: uint8 (height, width), 1 for foreground, else 0."""
    starts, lengths = runs_N2.T
    edges = np.column_stack([starts, starts + lengths]).ravel()
    segments = np.diff(edges, prepend=0, append=height * width)  # alternate, background first and last
    values = (np.arange(segments.size) % 2).astype(np.uint8)
    return np.repeat(values, segments).reshape(height, width)


def format_runs(runs_N2: NDArray[np.int64]) -> str:
    """Return runs as text, such as ``879386 40 881253 141``; empty if there are none."""
    one_based = runs_N2 + np.array([1, 0])
    # One long format string is twice as fast as str() per number.
    return ("%d %d " * len(runs_N2) % tuple(one_based.ravel().tolist())).rstrip()


def parse_runs(text: str) -> NDArray[np.int64]:
    """Return the runs in a run-length code, not yet validated (see ``validate_runs``).

    Raises CarvanaError if a token is not a whole number, or if the number of tokens is odd.
    """
    text = text.strip(" ")
    if not text:
        return np.empty((0, 2), dtype=np.int64)
    # Checked first: before NumPy 2.3, fromstring silently stops at the first token that is not a number.
    if text.encode(errors="replace").translate(None, delete=b"0123456789 "):
        raise CarvanaError(_token_error(text))
    numbers = np.fromstring(text, dtype=np.int64, sep=" ")
    if numbers.size % 2:
        raise CarvanaError(f"The mask has {numbers.size} tokens, an odd number. Expected pairs of start and length.")
    runs = numbers.reshape(-1, 2)
    runs[:, 0] -= 1
    return runs


def validate_runs(runs_N2: NDArray[np.int64], pixels: int) -> None:
    """Check that runs are sorted, do not overlap, are not empty and lie within an image of ``pixels`` pixels.

    A run may start where the previous one ends; Kaggle accepts that too. Raises CarvanaError, which names the first
    invalid run and the reason.
    """
    starts, lengths = runs_N2.T
    # Not `starts + lengths > pixels`, which would overflow for the largest int64 numbers.
    outside = (starts < 0) | (lengths < 1) | (lengths > pixels - starts)
    if outside.any():
        raise CarvanaError(_range_error(runs_N2, int(outside.argmax()), pixels))
    early = starts[1:] < starts[:-1] + lengths[:-1]
    if early.any():
        raise CarvanaError(_order_error(runs_N2, int(early.argmax()) + 1))


def _token_error(text: str) -> str:
    tokens = text.split(" ")
    number, token = next(
        (number, token)
        for number, token in enumerate(tokens, start=1)
        if token and not (token.isascii() and token.isdigit())
    )
    shown = token if len(token) <= 20 else token[:20] + "..."
    return f"Token {number} is {shown!r}. Expected whole numbers from 1, separated by blanks."


def _range_error(runs_N2: NDArray[np.int64], index: int, pixels: int) -> str:
    start, length = int(runs_N2[index, 0]) + 1, int(runs_N2[index, 1])
    run = _format_run(runs_N2, index)
    if start < 1:
        return f"{run} starts at 0. Pixels are numbered from 1."
    if length < 1:
        return f"{run} has length 0. Leave out empty runs."
    return (
        f"{run} ends at pixel {start + length - 1}, but the image has {pixels}. Was the mask encoded at another size?"
    )


def _order_error(runs_N2: NDArray[np.int64], index: int) -> str:
    run, previous = _format_run(runs_N2, index), _format_run(runs_N2, index - 1)
    if runs_N2[index, 0] < runs_N2[index - 1, 0]:
        return f"{run} starts before {previous}. Sort the runs by start."
    return f"{run} overlaps {previous}. List each pixel once."


def _format_run(runs_N2: NDArray[np.int64], index: int) -> str:
    return f"Run {index + 1} ('{format_runs(runs_N2[index : index + 1])}')"
