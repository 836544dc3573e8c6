"""Kaggle's run-length code of a mask: ``start length`` pairs, one-based, row-major, of the pixels that are car.

Three forms of one mask, and the ways between them::

    mask_HW  --find_runs-->  runs_N2  --format_runs-->  text      (both steps: encode)
    mask_HW  <--paint------  runs_N2  <--parse--------  text      (both steps, and validate between: decode)

``runs_N2`` is int64, one row per run: the zero-based index of its first pixel in the flattened mask, and its length.
"""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from pipeline.errors import CarvanaError

MaskLike = NDArray[np.bool_ | np.integer[Any]]
"""Any bool or integer array: 0 is background, every other value is car."""


def encode(mask_HW: MaskLike) -> str:
    """Return the run-length code of a mask; the empty string if no pixel is car.

    Runs go on from the end of one row into the next, as Kaggle's do. Raises ValueError if the array has other than two
    dimensions, and TypeError if it holds floats, which want a threshold first.
    """
    return format_runs(mask_to_runs(mask_HW))


def decode(text: str, height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask of a run-length code: uint8 ``mask_HW`` of ``height`` x ``width`` pixels, 1 where car, else 0.

    Raises CarvanaError, saying which run and why, if the text is no code of a mask of that size.
    """
    runs = parse_runs(text)
    validate_runs(runs, height * width)
    return runs_to_mask(runs, height, width)


def mask_to_runs(mask_HW: MaskLike) -> NDArray[np.int64]:
    """Return ``runs_N2`` of a mask, in order, with a gap between each two; raises what `encode` does."""
    if mask_HW.ndim != 2:
        raise ValueError(f"A mask has two dimensions, height and width; this array has the shape {mask_HW.shape}.")
    # A mask has a few thousand edges in 2.4 million pixels. At one bit a pixel, 64 pixels are compared at once, and the
    # only array as large as the mask is the mask itself. A word of zeros on either side makes runs that begin with the
    # first pixel or end with the last look like any other.
    packed = np.packbits(mask_HW, bitorder="little")
    words = np.zeros(1 + packed.size // 8 + 1, dtype="<u8")
    words.view(np.uint8)[8 : 8 + packed.size] = packed
    before, here = words[:-1], words[1:]
    edges = here ^ (here << 1 | before >> 63)  # a set bit: this pixel differs from the one before it

    at_word = np.flatnonzero(edges != 0)
    bits = np.unpackbits(edges[at_word].view(np.uint8), bitorder="little")
    at_bit = np.flatnonzero(bits.view(np.bool_))
    runs = (at_word[at_bit // 64] * 64 + at_bit % 64).reshape(-1, 2)  # starts and stops take turns
    runs[:, 1] -= runs[:, 0]
    return runs


def runs_to_mask(runs_N2: NDArray[np.int64], height: int, width: int) -> NDArray[np.uint8]:
    """Return the mask of valid runs: uint8 ``mask_HW`` of ``height`` x ``width`` pixels, 1 where car, else 0."""
    starts, lengths = runs_N2.T
    edges = np.column_stack([starts, starts + lengths]).ravel()
    spans = np.diff(edges, prepend=0, append=height * width)  # background and car take turns, background at both ends
    values = (np.arange(spans.size) % 2).astype(np.uint8)
    return np.repeat(values, spans).reshape(height, width)


def format_runs(runs_N2: NDArray[np.int64]) -> str:
    """Return the text of runs, such as ``879386 40 881253 141``; empty if there are none."""
    one_based = runs_N2 + np.array([1, 0])
    # One long format string is twice as fast as str() of each number.
    return ("%d %d " * len(runs_N2) % tuple(one_based.ravel().tolist())).rstrip()


def parse_runs(text: str) -> NDArray[np.int64]:
    """Return ``runs_N2`` of a run-length code, whether or not they fit an image: that is for `validate` to say.

    Raises CarvanaError if a token is not a whole number, or if their number is odd.
    """
    text = text.strip(" ")
    if not text:
        return np.empty((0, 2), dtype=np.int64)
    # Checked first, since fromstring stops quietly at what it can't read (NumPy before 2.3).
    if text.encode(errors="replace").translate(None, delete=b"0123456789 "):
        raise CarvanaError(_odd_token(text))
    numbers = np.fromstring(text, dtype=np.int64, sep=" ")
    if numbers.size % 2:
        raise CarvanaError(f"It has an odd number of tokens, {numbers.size}: expected pairs of start and length.")
    runs = numbers.reshape(-1, 2)
    runs[:, 0] -= 1
    return runs


def validate_runs(runs_N2: NDArray[np.int64], pixels: int) -> None:
    """Check runs against an image of so many pixels: in order, apart, none empty and none beyond the image.

    A run may begin where the one before it ends: Kaggle takes that too. Raises CarvanaError for the first run that is
    wrong, saying why.
    """
    starts, lengths = runs_N2.T
    # Not `starts + lengths > pixels`: numbers as large as int64 can hold would overflow.
    outside = (starts < 0) | (lengths < 1) | (lengths > pixels - starts)
    if outside.any():
        raise CarvanaError(_outside_reason(runs_N2, int(outside.argmax()), pixels))
    early = starts[1:] < starts[:-1] + lengths[:-1]
    if early.any():
        raise CarvanaError(_order_reason(runs_N2, int(early.argmax()) + 1))


def _odd_token(text: str) -> str:
    tokens = text.split(" ")
    number, token = next(
        (number, token)
        for number, token in enumerate(tokens, start=1)
        if token and not (token.isascii() and token.isdigit())
    )
    return f"Token {number} is {_truncate(token)}: expected whole numbers from 1, with blanks between them."


def _outside_reason(runs_N2: NDArray[np.int64], index: int, pixels: int) -> str:
    start, length = int(runs_N2[index, 0]) + 1, int(runs_N2[index, 1])
    run = _format_run(runs_N2, index)
    if start < 1:
        return f"{run} starts at 0: pixels are numbered from 1."
    if length < 1:
        return f"{run} has length 0: leave empty runs out."
    return f"{run} ends at pixel {start + length - 1}, but the image has only {pixels}: is it encoded at another size?"


def _order_reason(runs_N2: NDArray[np.int64], index: int) -> str:
    run, previous = _format_run(runs_N2, index), _format_run(runs_N2, index - 1)
    if runs_N2[index, 0] < runs_N2[index - 1, 0]:
        return f"{run} is out of order, it starts before {previous}: sort runs by their start."
    return f"{run} overlaps {previous}: name each pixel once."


def _format_run(runs_N2: NDArray[np.int64], index: int) -> str:
    return f"Run {index + 1} ('{format_runs(runs_N2[index : index + 1])}')"


def _truncate(token: str) -> str:
    return repr(token if len(token) <= 20 else token[:20] + "...")
