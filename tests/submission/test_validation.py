import gzip
import hashlib
import subprocess
import sys
import tracemalloc
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from benchmarks import bench_check
from pipeline.competition import rle
from pipeline.competition.dice import confusion_counts
from pipeline.competition.image_ids import HEIGHT, WIDTH, format_image_id
from pipeline.errors import CarvanaError
from pipeline.submission import csv_file, validation

PIXELS = HEIGHT * WIDTH
IDS = [format_image_id("00087a6bd4dc", angle) for angle in range(1, 4)]
TEXTS = ["1 10 101 10", "", f"6 10 {PIXELS} 1"]


def write(path: Path, texts: dict[str, str], header: str = "img,rle_mask", end: str = "\n") -> Path:
    lines = [header] + [f"{image_id}.jpg,{text}" for image_id, text in texts.items()]
    return pack(path, "".join(line + end for line in lines).encode())


def pack(path: Path, data: bytes) -> Path:
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(data))
    elif path.suffix == ".zip":
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("submission.csv", data)
            archive.writestr("__MACOSX/._submission.csv", b"shadow")
    else:
        path.write_bytes(data)
    return path


def drawn_mask(seed: int) -> np.ndarray:
    """A disc with a ragged edge: hundreds of runs, as a car has."""
    rng = np.random.default_rng(seed)
    y, x = np.ogrid[:HEIGHT, :WIDTH]
    return ((y - 640) ** 2 + (x - 959) ** 2 < (400 + rng.integers(0, 30, size=(HEIGHT, 1))) ** 2).astype(np.uint8)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.zip"])
def test_rows_are_read_from_plain_gzipped_and_zipped_files(tmp_path, name):
    path = write(tmp_path / name, dict(zip(IDS, TEXTS, strict=True)))
    assert list(csv_file.read_rows(path)) == [(2, IDS[0], TEXTS[0]), (3, IDS[1], TEXTS[1]), (4, IDS[2], TEXTS[2])]


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.zip"])
@pytest.mark.parametrize("other", ["b.csv", "b.csv.gz", "b.zip", "b"])
def test_compression_is_told_by_content(tmp_path, name, other):
    texts = dict(zip(IDS, TEXTS, strict=True))
    path = write(tmp_path / name, texts).rename(tmp_path / other)
    assert [text for _, _, text in csv_file.read_rows(path)] == TEXTS
    assert csv_file.content_digest(path) == csv_file.content_digest(write(tmp_path / "plain.csv", texts))


@pytest.mark.parametrize("member", ["SUBMISSION.CSV", "submission", "folder/submission.csv"])
def test_zips_that_hold_a_csv_under_another_name(tmp_path, member):
    plain = write(tmp_path / "plain.csv", dict(zip(IDS, TEXTS, strict=True)))
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.mkdir("folder")
        archive.write(plain, member)
    assert list(csv_file.read_rows(tmp_path / "a.zip")) == list(csv_file.read_rows(plain))


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.zip"])
def test_byte_order_mark_is_accepted(tmp_path, name):
    texts = dict(zip(IDS, TEXTS, strict=True))
    marked = write(tmp_path / name, texts, header="\ufeffimg,rle_mask")
    plain = write(tmp_path / "plain.csv", texts)
    assert validation.validate_submission(marked, IDS) == validation.validate_submission(plain, IDS)
    assert csv_file.content_digest(marked) == csv_file.content_digest(plain)
    assert validation.score_submission(plain, marked).mean == 1


def test_utf16_is_named(tmp_path):
    path = pack(tmp_path / "a.csv", f"img,rle_mask\n{IDS[0]}.jpg,1 2\n".encode("utf-16"))
    with pytest.raises(CarvanaError, match=r"a\.csv.*UTF-16"):
        validation.validate_submission(path)


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz", "a.zip"])
def test_report(tmp_path, name):
    texts = dict(zip(IDS, TEXTS, strict=True))
    path = write(tmp_path / name, texts)
    plain = write(tmp_path / "plain.csv", texts)
    for expected_ids in (None, IDS, set(IDS), reversed_tuple(IDS)):
        assert validation.validate_submission(path, expected_ids) == validation.SubmissionReport(
            rows=3,
            empty=1,
            coverage_min=0.0,
            coverage_mean=pytest.approx(31 / 3 / PIXELS, rel=1e-12),
            coverage_max=20 / PIXELS,
            unlikely=((IDS[0], 20 / PIXELS), (IDS[2], 11 / PIXELS)),
            sha256=hashlib.sha256(plain.read_bytes()).hexdigest(),
        )


def reversed_tuple(items):
    return tuple(reversed(items))


def test_quotes_and_windows_line_ends_are_taken(tmp_path):
    path = pack(tmp_path / "a.csv", f'"img","rle_mask"\r\n"{IDS[0]}.jpg","1 2"\r\n'.encode())
    assert list(csv_file.read_rows(path)) == [(2, IDS[0], "1 2")]


def test_last_line_may_lack_its_end(tmp_path):
    path = pack(tmp_path / "a.csv", f"img,rle_mask\n{IDS[0]}.jpg,1 2".encode())
    assert validation.validate_submission(path).rows == 1


@pytest.mark.parametrize(
    ("lines", "reason"),
    [
        ([], r"row 1.*img,rle_mask"),
        (["img,mask", "X,1 1"], r"row 1.*img,mask.*img,rle_mask"),
        (["img;rle_mask"], r"row 1.*img;rle_mask"),
        (["img,rle_mask"], r"no rows"),
        (["img,rle_mask", "A,1 1", "B"], r"row 3.*\b1\b.*\b2\b"),
        (["img,rle_mask", "A,1 1,2"], r"row 2.*\b3\b.*\b2\b"),
        (["img,rle_mask", "A,1 1", ""], r"row 3.*\b1\b.*\b2\b"),
        (["img,rle_mask", "00087a6bd4dc_01,1 1"], r"row 2.*00087a6bd4dc_01"),
        (["img,rle_mask", "00087a6bd4dc_17.jpg,1 1"], r"row 2.*00087a6bd4dc_17"),
        (["img,rle_mask", "A,1 1", "B,", "A,1 1"], r"row 4.*00087a6bd4dc_01\.jpg"),
        (["img,rle_mask", "A,1 1", "D,1 1"], r"row 3.*00087a6bd4dc_16\.jpg"),
        (["img,rle_mask", "B,1 1"], r"\b2 of 3\b.*00087a6bd4dc_01\.jpg"),
        (["img,rle_mask", '"A,1 1"'], r"row 2.*quot"),
        (["img,rle_mask", 'A,"1 1'], r"row 2.*quot"),
        (['"img,rle_mask"', "A,1 1"], r"row 1.*img,rle_mask"),
        (["img,rle_mask", "A,1"], r"row 2.*00087a6bd4dc_01\.jpg.*odd"),
        (["img,rle_mask", "A,1 x"], r"row 2.*00087a6bd4dc_01\.jpg.*Token 2.*'x'"),
        (["img,rle_mask", "A,1 é"], r"row 2.*00087a6bd4dc_01\.jpg.*Token 2"),
        (["img,rle_mask", "A,0 1"], r"row 2.*00087a6bd4dc_01\.jpg.*'0 1'"),
        (["img,rle_mask", "A,1 0"], r"row 2.*00087a6bd4dc_01\.jpg.*'1 0'"),
        (["img,rle_mask", "A,5 1 1 1"], r"00087a6bd4dc_01\.jpg.*'1 1'"),
        (["img,rle_mask", "A,1 5 2 9"], r"row 2.*00087a6bd4dc_01\.jpg.*'2 9'.*overlap"),
        (["img,rle_mask", f"A,{PIXELS} 2"], r"row 2.*00087a6bd4dc_01\.jpg.*2455040"),
    ],
)
@pytest.mark.parametrize("name", ["a.csv", "a.zip"])
def test_check_refuses(tmp_path, name, lines, reason):
    names = {"A": IDS[0], "B": IDS[1], "D": format_image_id("00087a6bd4dc", 16)}
    lines = [",".join([f"{names[f]}.jpg" if f in names else f for f in line.split(",")]) for line in lines]
    path = pack(tmp_path / name, "".join(line + "\n" for line in lines).encode())
    with pytest.raises(CarvanaError, match=reason) as error:
        validation.validate_submission(path, [] if reason == "no rows" else IDS)
    assert str(path) in str(error.value)


@pytest.mark.parametrize("name", ["a.csv.gz", "a.zip"])
@pytest.mark.parametrize("damage", ["cut", "checksum", "binary"])
def test_damaged_archives_are_named(tmp_path, name, damage):
    path = write(tmp_path / name, dict(zip(IDS, TEXTS, strict=True)))
    data = bytearray(path.read_bytes())
    if damage == "cut":
        del data[len(data) // 2 :]
    elif damage == "checksum":
        # In a gzip's trailer, in the first entry of a zip's directory: each row reads well, but is it the right one?
        data[-8 if name == "a.csv.gz" else data.index(b"PK\1\2") + 16] ^= 0xFF
    else:
        data[:] = bytes(100)
    path.write_bytes(data)
    with pytest.raises(CarvanaError, match=f"{name}"):
        validation.validate_submission(path)


def test_absent_file_is_named(tmp_path):
    with pytest.raises(CarvanaError, match=r"b\.csv"):
        validation.validate_submission(tmp_path / "b.csv")


def test_zip_must_hold_one_csv(tmp_path):
    path = tmp_path / "a.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.csv", "img,rle_mask\n")
        archive.writestr("b.csv", "img,rle_mask\n")
    with pytest.raises(CarvanaError, match=r"a\.zip"):
        validation.validate_submission(path)


@pytest.mark.parametrize("order", [1, -1])
def test_score_is_the_mean_of_each_images_dice(tmp_path, order):
    predicted = [drawn_mask(1), drawn_mask(2), np.zeros((HEIGHT, WIDTH), dtype=np.uint8)]
    true = [drawn_mask(3), np.roll(drawn_mask(2), 1, axis=1), predicted[2]]
    path = write(tmp_path / "a.csv.gz", dict(zip(IDS, map(rle.encode, predicted), strict=True)))
    truth_path = write(tmp_path / "b.csv", dict(list(zip(IDS, map(rle.encode, true), strict=True))[::order]))
    result = validation.score_submission(path, truth_path)
    dice = [confusion_counts(*pair).dice for pair in zip(predicted, true, strict=True)]
    assert result.dice == dict(zip(IDS, dice, strict=True))
    assert list(result.dice) == IDS
    assert result.mean == pytest.approx(sum(dice) / 3, rel=1e-12)
    assert dice[0] < 0.999 and dice[2] == 1


@given(st.permutations(range(1, 7)))
def test_score_matches_rows_in_any_order(tmp_path_factory, order):
    folder = tmp_path_factory.mktemp("order")
    texts = {format_image_id("00087a6bd4dc", angle): f"{angle} {angle * 7}" for angle in range(1, 7)}
    shuffled = {format_image_id("00087a6bd4dc", angle): f"{angle} {angle * 7}" for angle in order}
    result = validation.score_submission(write(folder / "a.csv", texts), write(folder / "b.csv", shuffled))
    assert result.dice == dict.fromkeys(texts, 1.0)


def test_score_refuses_images_that_only_one_file_holds(tmp_path):
    a, b, c = IDS
    both = write(tmp_path / "both.csv", {a: "1 1", b: "1 1"})
    one = write(tmp_path / "one.csv", {b: "1 1"})
    other = write(tmp_path / "other.csv", {a: "1 1", c: "1 1"})
    with pytest.raises(CarvanaError, match=rf"one\.csv.*both\.csv.*{a}"):
        validation.score_submission(one, both)
    with pytest.raises(CarvanaError, match=rf"both\.csv.*row 2.*{a}.*one\.csv"):
        validation.score_submission(both, one)
    with pytest.raises(CarvanaError, match=rf"both\.csv.*row 3.*{b}.*other\.csv"):
        validation.score_submission(both, other)


def test_score_refuses_second_rows_and_malformed_masks_in_either_file(tmp_path):
    good = write(tmp_path / "good.csv", {IDS[0]: "1 1"})
    twice = pack(tmp_path / "twice.csv", f"img,rle_mask\n{IDS[0]}.jpg,1 1\n{IDS[0]}.jpg,1 1\n".encode())
    bad = write(tmp_path / "bad.csv", {IDS[0]: "1 0"})
    bare = write(tmp_path / "bare.csv", {})
    for files in ((twice, good), (good, twice)):
        with pytest.raises(CarvanaError, match=rf"twice\.csv.*row 3.*{IDS[0]}"):
            validation.score_submission(*files)
    for files in ((bad, good), (good, bad)):
        with pytest.raises(CarvanaError, match=rf"bad\.csv.*row 2.*{IDS[0]}.*length 0"):
            validation.score_submission(*files)
    with pytest.raises(CarvanaError, match="nothing to score"):
        validation.score_submission(bare, bare)


@pytest.mark.parametrize("order", [1, -1])
def test_memory_does_not_grow_with_the_masks(tmp_path, order):
    code = rle.encode(drawn_mask(0))
    texts = {format_image_id(f"{car:012x}", 1): code for car in range(500)}
    path = write(tmp_path / "a.csv.gz", texts)
    truth_path = write(tmp_path / "b.csv.gz", dict(list(texts.items())[::order]))
    assert len(code) * len(texts) > 4e6
    tracemalloc.start()
    validation.validate_submission(path, set(texts))
    validation.score_submission(path, truth_path)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 1e6


Mask = NDArray[np.uint8]

WRONG_ONE_BY_ONE: dict[str, Callable[[Mask], Mask]] = {
    "column order": np.transpose,
    "width 1920": lambda mask: np.pad(mask, ((0, 0), (0, 2)))[:1278],
    "width 1916": lambda mask: np.pad(mask[:, 1:-1], ((0, 1), (0, 0))),
    "half the size": lambda mask: mask[::2, ::2],
    "quarter of the size, padded to full size": lambda mask: np.pad(mask[::4, ::4], ((0, 960), (0, 1438))),
    "inverted": lambda mask: 1 - mask,
    "all foreground": np.ones_like,
    "one pixel": lambda mask: (np.arange(mask.size) == 1_000_000).astype(np.uint8).reshape(mask.shape),
    "shifted down": lambda mask: np.pad(mask, ((500, 0), (0, 0)))[:HEIGHT],
    "shifted left": lambda mask: np.roll(mask, -400, axis=1),
}
"""Mistakes that are found in each mask by itself."""

WRONG_TOGETHER: dict[str, Callable[[Mask], Mask]] = {
    "shifted by 120": lambda mask: np.roll(mask, 120, axis=1),
    "mirrored": lambda mask: mask[:, ::-1],
    "upside down": lambda mask: mask[::-1],
}
"""Mistakes that are found in the masks of a car."""


def encoded(mask_HW: Mask) -> str:
    return rle.encode(np.ascontiguousarray(mask_HW))


def car_mask(angle: int) -> Mask:
    """A shape at the usual center of an angle, wider at the bottom, with a ragged edge."""
    row, column = validation._USUAL_CENTERS[angle - 1]
    y, x = np.ogrid[:HEIGHT, :WIDTH]
    ragged = np.random.default_rng(angle).integers(0, 30, size=(HEIGHT, 1))
    half_width = 380 + (y - row) * 0.7 + ragged
    return ((abs(y - row) < 280) & (abs(x - column) < half_width)).astype(np.uint8)


@pytest.mark.parametrize("mistake", WRONG_ONE_BY_ONE)
def test_a_mask_of_another_geometry_is_named(tmp_path, mistake):
    spoiled = encoded(WRONG_ONE_BY_ONE[mistake](drawn_mask(1)))
    texts = dict(zip(IDS, [encoded(drawn_mask(0)), spoiled, ""], strict=True))
    warnings = validation.validate_submission(write(tmp_path / "a.csv", texts)).warnings
    assert sum(IDS[1] in warning for warning in warnings) == 1
    assert not any(IDS[0] in warning for warning in warnings)
    assert any("1 of 3 masks" in warning and "empty" in warning for warning in warnings)


@pytest.mark.parametrize("mistake", WRONG_TOGETHER)
def test_masks_that_are_all_misplaced_are_noticed(tmp_path, mistake):
    ids = {angle: format_image_id("00087a6bd4dc", angle) for angle in range(1, 17)}
    good = {image_id: encoded(car_mask(angle)) for angle, image_id in ids.items()}
    bad = {image_id: encoded(WRONG_TOGETHER[mistake](car_mask(angle))) for angle, image_id in ids.items()}
    assert validation.validate_submission(write(tmp_path / "good.csv", good)).warnings == ()
    assert validation.validate_submission(write(tmp_path / "bad.csv", bad)).warnings


def test_a_few_wrong_masks_are_counted_and_the_first_named(tmp_path):
    codes = [encoded(car_mask(angle)) for angle in range(1, 17)]
    texts = {format_image_id(f"{car:012x}", angle): codes[angle - 1] for car in range(20) for angle in range(1, 17)}
    wrong = list(texts)[100:105]
    path = write(tmp_path / "a.csv", texts | dict.fromkeys(wrong, encoded(drawn_mask(0).T)))
    (warning,) = validation.validate_submission(path).warnings
    assert "5 of 320" in warning
    assert [image_id in warning for image_id in wrong] == [True] * 3 + [False] * 2


def test_a_rare_estimate_of_another_width_is_no_mistake():
    """The distance of rows is estimated: in some of 100,064 masks it is a pixel and a half off."""
    number = np.arange(600)
    usual = np.column_stack([(number + 300) * WIDTH + 500, np.full(600, 900)])
    leaning = np.column_stack([(number + 300) * WIDTH + 200 + number, number + 400])
    geometry = validation.GeometryCheck()
    geometry.add(IDS[0], leaning)
    assert any(IDS[0] in warning for warning in geometry.warnings())
    for car in range(300):
        geometry.add(format_image_id(f"{car:012x}", 1 + car % 16), usual)
    assert not any(IDS[0] in warning for warning in geometry.warnings())


def test_rare_real_masks_are_no_mistakes():
    """Cars that touch both edges of the image, so that one run covers hundreds of rows."""
    mask = drawn_mask(0)
    mask[500:700] = 1
    geometry = validation.GeometryCheck()
    geometry.add(IDS[0], rle.mask_to_runs(mask))
    assert geometry.warnings() == []


@pytest.mark.parametrize("mistake", [*WRONG_ONE_BY_ONE, *WRONG_TOGETHER])
def test_mistakes_in_real_masks_are_noticed(real_carvana: Path, mistake: str):
    alone = mistake in WRONG_ONE_BY_ONE
    spoil = (WRONG_ONE_BY_ONE | WRONG_TOGETHER)[mistake]
    geometry, ids = validation.GeometryCheck(), []
    for _, image_id, text in islice(csv_file.read_rows(real_carvana / "train_masks.csv.zip"), 32):
        single = validation.GeometryCheck()
        runs = rle.mask_to_runs(np.ascontiguousarray(spoil(rle.decode(text, HEIGHT, WIDTH))))
        single.add(image_id, runs)
        geometry.add(image_id, runs)
        ids += [image_id] if single.warnings() else []
    assert geometry.warnings()
    if alone:
        assert len(ids) > 24


def test_real_csv_passes_and_scores_itself(real_carvana: Path):
    path = real_carvana / "train_masks.csv.zip"
    report = validation.validate_submission(path)
    assert (report.rows, report.empty, report.warnings) == (320, 0, ())
    assert 0.08 < report.coverage_min < report.coverage_mean < report.coverage_max < 0.42
    with zipfile.ZipFile(path) as archive:
        assert report.sha256 == hashlib.sha256(archive.read("train_masks.csv")).hexdigest()
    assert validation.score_submission(path, path).mean == 1


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peaks of memory are read where Linux has them")
@pytest.mark.parametrize("cars", [600, pytest.param(bench_check.CARS, marks=pytest.mark.long)])
def test_large_submissions_are_checked_and_compared_in_little_memory(tmp_path: Path, cars: int) -> None:
    """Up to 100,064 rows, 0.8 GB of text: each in a process of its own, libraries included."""
    code = """
import sys
from pathlib import Path
from benchmarks.bench_check import Check, Compare
csv, last = Path("submission.csv.gz"), Path("last.csv.gz")
(Check(csv, int(sys.argv[2])) if sys.argv[1] == "check" else Compare(csv, last))()
# Not getrusage, which counts what the process that started this one had in memory.
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""
    bench_check.write(tmp_path / "submission.csv.gz", 0, cars)
    bench_check.write(tmp_path / "last.csv.gz", 1, cars, backwards=True)  # so that all of it has to wait on disk
    for what in ("check", "compare"):
        run = subprocess.run(
            [sys.executable, "-c", code, what, str(cars)],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=True,
        )
        assert int(run.stdout) * 1024 < 300e6, what
