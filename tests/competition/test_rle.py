import io
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from pipeline.competition import rle
from pipeline.competition.image_ids import HEIGHT, WIDTH, mask_filename
from pipeline.errors import CarvanaError
from pipeline.submission import csv_file

# Quoted in public documents of the competition: how the original mask of 00087a6bd4dc_01 begins.
REAL_START = "879386 40 881253 141 883140 205 885009 17 885032 259"

SHAPES = array_shapes(min_dims=2, max_dims=2, max_side=24)
MASKS = SHAPES.flatmap(lambda shape: arrays(np.uint8, shape, elements=st.integers(0, 1)))
# Long runs and their edges, near every word and byte boundary of the packed mask.
SPARSE_MASKS = SHAPES.flatmap(lambda shape: arrays(np.bool_, shape, fill=st.booleans()))


def reference_encode(mask_HW):
    """One pixel at a time, as the competition page puts it."""
    numbers, before = [], 0
    for number, pixel in enumerate([*mask_HW.ravel().tolist(), 0], start=1):
        if pixel and not before:
            numbers.append(number)
        if before and not pixel:
            numbers.append(number - numbers[-1])
        before = pixel
    return " ".join(map(str, numbers))


def draw(text, height, width):
    """Paint a run-length code one run at a time."""
    flat = np.zeros(height * width, dtype=np.uint8)
    numbers = [int(token) for token in text.split()]
    for start, length in zip(numbers[::2], numbers[1::2], strict=True):
        flat[start - 1 : start - 1 + length] = 1
    return flat.reshape(height, width)


def test_encodes_as_kaggle_does():
    mask = draw(REAL_START, HEIGHT, WIDTH)
    # Row 458 counted from 0, so pixel 879386 lies 941 columns in: the shape matters, a round trip would not see it.
    assert mask[458, 941] == 1
    assert mask[458, 940] == 0
    assert rle.encode(mask) == REAL_START
    assert rle.encode(mask.T).split()[:2] != REAL_START.split()[:2]


def test_decodes_as_kaggle_does():
    mask = rle.decode(REAL_START, HEIGHT, WIDTH)
    assert mask.shape == (HEIGHT, WIDTH)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, draw(REAL_START, HEIGHT, WIDTH))


@given(MASKS | SPARSE_MASKS)
def test_encode_equals_the_slow_reference(mask_HW):
    assert rle.encode(mask_HW) == reference_encode(mask_HW)


@given(MASKS | SPARSE_MASKS)
def test_decode_undoes_encode(mask_HW):
    decoded = rle.decode(rle.encode(mask_HW), *mask_HW.shape)
    np.testing.assert_array_equal(decoded, mask_HW.astype(np.uint8))


@given(MASKS)
def test_memory_layout_and_type_do_not_matter(mask_HW):
    code = reference_encode(mask_HW)
    assert rle.encode(np.asfortranarray(mask_HW)) == code
    assert rle.encode(np.repeat(mask_HW, 2, axis=1)[:, ::2]) == code
    assert rle.encode(mask_HW * np.uint8(255)) == code
    assert rle.encode(mask_HW.astype(np.int64) * -256) == code


@pytest.mark.parametrize(
    ("pixels", "code"),
    [
        ([], ""),
        ([0], "1 1"),
        ([HEIGHT * WIDTH - 1], f"{HEIGHT * WIDTH} 1"),
        ([0, HEIGHT * WIDTH - 1], f"1 1 {HEIGHT * WIDTH} 1"),
        ([WIDTH - 1, WIDTH], f"{WIDTH} 2"),  # around the end of a row
        (slice(None), f"1 {HEIGHT * WIDTH}"),
        (slice(63, 129), "64 66"),
    ],
)
def test_masks_that_touch_the_corners(pixels, code):
    mask = np.zeros((HEIGHT, WIDTH), dtype=np.uint8)
    mask.flat[pixels] = 1
    assert rle.encode(mask) == code
    np.testing.assert_array_equal(rle.decode(code, HEIGHT, WIDTH), mask)


def test_encode_refuses_arrays_that_are_not_masks():
    with pytest.raises(TypeError):
        rle.encode(np.zeros((2, 2), dtype=np.float32))
    with pytest.raises(ValueError, match="two dimensions"):
        rle.encode(np.zeros((2, 2, 1), dtype=np.uint8))


def test_decode_takes_touching_runs_and_spare_blanks():
    np.testing.assert_array_equal(rle.decode(" 1 2  3 1 ", 2, 2), [[1, 1], [1, 0]])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1", "tokens"),
        ("1 2 3", "tokens"),
        ("1 2 3 x", "Token 4 is 'x'"),
        ("1.5 2", "Token 1 is '1.5'"),
        ("1 -2", "Token 2 is '-2'"),
        ("+1 2", "Token 1 is '\\+1'"),
        ("1\t2", "Token 1 is '1\\\\t2'"),
        ("１ 2", "Token 1 is '１'"),
        ("x" * 99, "Token 1 is 'xxxxxxxxxxxxxxxxxxxx...'"),
        ("0 2", r"Run 1 \('0 2'\) starts at 0"),
        ("1 2 4 0", r"Run 2 \('4 0'\) has length 0"),
        ("6 2", "'6 2'"),
        ("7 1", "ends at pixel 7"),
        ("1 99999999999999999999999", "image"),
        ("99999999999999999999999 1", "image"),
        ("99999999999999999999999 99999999999999999999999", "image"),
        ("4 1 1 2", r"'1 2'.*'4 1'"),
        ("1 3 3 1", r"Run 2 \('3 1'\) overlaps Run 1 \('1 3'\)"),
        ("1 1 3 1 3 1", r"Run 3 \('3 1'\) overlaps Run 2"),
    ],
)
def test_decode_refuses_malformed_codes(text, reason):
    with pytest.raises(CarvanaError, match=reason):
        rle.decode(text, 2, 3)


@given(st.lists(st.integers(-1, 30), max_size=6), st.integers(1, 20))
def test_decode_accepts_only_sorted_codes_without_overlap(numbers, pixels):
    text = " ".join(map(str, numbers))
    painted = [
        pixel
        for start, length in zip(numbers[::2], numbers[1::2], strict=False)
        for pixel in range(start, start + length)
    ]
    valid = (
        len(numbers) % 2 == 0
        and all(length > 0 for length in numbers[1::2])
        and painted == sorted(set(painted))
        and set(painted) <= set(range(1, pixels + 1))
    )
    try:
        rle.decode(text, 1, pixels)
    except CarvanaError:
        assert not valid
    else:
        assert valid


def test_real_masks_encode_to_the_original_bytes(real_carvana: Path):
    with zipfile.ZipFile(real_carvana / "train_masks.zip") as masks:
        for _, image_id, text in csv_file.read_rows(real_carvana / "train_masks.csv.zip"):
            gif = masks.read(f"train_masks/{mask_filename(image_id)}")
            mask = np.asarray(Image.open(io.BytesIO(gif)))
            assert rle.encode(mask) == text, image_id
            np.testing.assert_array_equal(rle.decode(text, HEIGHT, WIDTH), mask > 0, err_msg=image_id)
