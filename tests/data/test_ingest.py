"""Checks of the competition's files: each error names the file at fault."""

import codecs
import gzip
import io
import json
import zipfile
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path, PurePosixPath

import numpy as np
import pytest
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.competition import rle
from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import DataSettings, SampleSettings
from pipeline.data.competition_data import CompetitionData, data_dir, open_test, open_training, read_car_makes
from pipeline.data.ingest import build_manifest, ensure_data, write_truth
from pipeline.errors import CarvanaError
from pipeline.submission.csv_file import read_rows

Files = dict[str, dict[str, bytes]]
"""Members by zip."""

TRAIN = ["00087a6bd4dc_01", "00087a6bd4dc_02", "02159e548029_01", "02159e548029_02"]
TEST = ["0004d4463b50_01", "0004d4463b50_02"]
FIRST = TRAIN[0]
JPEG, GIF, CSV = f"train/{FIRST}.jpg", f"train_masks/{FIRST}_mask.gif", "train_masks.csv"


def jpeg(seed: int, height: int = HEIGHT, width: int = WIDTH) -> bytes:
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 40, width // 40 + 1, 3), np.uint8)
    image_HWC = np.ascontiguousarray(np.repeat(np.repeat(coarse, 40, axis=0), 40, axis=1)[:, :width])
    return simplejpeg.encode_jpeg(image_HWC, 80)


def disc(seed: int) -> NDArray[np.uint8]:
    y, x = np.ogrid[:HEIGHT, :WIDTH]
    return ((y - 640) ** 2 + (x - 959) ** 2 < (400 + 10 * seed) ** 2).astype(np.uint8)


def gif(values_HW: NDArray[np.uint8], palette: bytes = b"\0\0\0\xff\xff\xff") -> bytes:
    image, buffer = Image.fromarray(values_HW), io.BytesIO()
    image.putpalette(palette)
    image.save(buffer, format="GIF")
    return buffer.getvalue()


def table(rows: dict[str, str]) -> bytes:
    return "".join(f"{name},{text}\n" for name, text in ({"img": "rle_mask"} | rows).items()).encode()


@pytest.fixture(scope="session")
def valid_files() -> Files:
    """Two cars to train on and one to test, two angles each, in the competition's zips."""
    masks = {image_id: disc(number) for number, image_id in enumerate(TRAIN)}
    return {
        "train.zip": {f"train/{image_id}.jpg": jpeg(number) for number, image_id in enumerate(TRAIN)},
        "train_masks.zip": {f"train_masks/{image_id}_mask.gif": gif(mask) for image_id, mask in masks.items()},
        "train_masks.csv.zip": {CSV: table({f"{image_id}.jpg": rle.encode(mask) for image_id, mask in masks.items()})},
        "test.zip": {f"test/{image_id}.jpg": jpeg(10 + number) for number, image_id in enumerate(TEST)},
        "sample_submission.csv.zip": {"sample_submission.csv": table({f"{image_id}.jpg": "1 1" for image_id in TEST})},
    }


@pytest.fixture
def files(valid_files: Files) -> Files:
    """A copy of the valid files to break."""
    return deepcopy(valid_files)


def zipped(folder: Path, files: Files) -> CompetitionData:
    folder.mkdir(exist_ok=True)
    for name, members in files.items():
        if not name.endswith(".zip"):
            (folder / name).write_bytes(members[name])
            continue
        with zipfile.ZipFile(folder / name, "w") as archive:
            for member, data in members.items():
                archive.writestr(member, data)
    return CompetitionData(folder)


def unpacked(folder: Path, files: Files) -> CompetitionData:
    folder.mkdir(exist_ok=True)
    for members in files.values():
        for member, data in members.items():
            path = folder / PurePosixPath(member)
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
    return CompetitionData(folder)


def without_csv(files: Files) -> Files:
    del files["train_masks.csv.zip"]
    return files


def edit_row(files: Files, edit: Callable[[bytes], bytes]) -> None:
    """Change the line of the first image in train_masks.csv."""
    lines = files["train_masks.csv.zip"][CSV].splitlines(keepends=True)
    lines[1] = edit(lines[1])
    files["train_masks.csv.zip"][CSV] = b"".join(lines)


# ---------------------------------------------------------------- valid data


def test_manifest_describes_the_data(tmp_path: Path, files: Files) -> None:
    manifest = build_manifest(zipped(tmp_path, files), "error")
    assert {part: manifest[part]["images"] for part in ("train", "masks", "test")} == {
        "train": 4,
        "masks": 4,
        "test": 2,
    }
    assert manifest["unreadable"] == manifest["suspect_test_images"] == {}
    labeled = open_training(CompetitionData(tmp_path), manifest)
    assert labeled.ids() == TRAIN
    assert labeled.image(FIRST).shape == (HEIGHT, WIDTH, 3)
    np.testing.assert_array_equal(labeled.mask(FIRST), disc(0))
    assert open_test(CompetitionData(tmp_path), manifest).ids() == TEST


@pytest.mark.parametrize("masks", ["csv", "gif"])
@pytest.mark.parametrize("write", [zipped, unpacked])
def test_zipped_and_unpacked_data_are_the_same_data(
    tmp_path: Path, files: Files, valid_files: Files, write: Callable[[Path, Files], CompetitionData], masks: str
) -> None:
    reference = build_manifest(zipped(tmp_path / "reference", valid_files), "error")
    source = write(tmp_path / "data", files if masks == "csv" else without_csv(files))
    manifest = build_manifest(source, "error")
    for part in ("train", "masks", "test"):
        assert manifest[part]["images"] == reference[part]["images"]
    labeled = open_training(source, manifest)
    assert labeled.ids() == TRAIN
    for number, image_id in enumerate(TRAIN):
        np.testing.assert_array_equal(labeled.mask(image_id), disc(number))
    assert source.sample_ids == TEST


@pytest.mark.parametrize("white", [1, 255])
def test_white_is_1_or_255_by_reader(tmp_path: Path, files: Files, white: int) -> None:
    files["train_masks.zip"][GIF] = gif(disc(0), bytes([0, 0, 0, white, white, white]))
    np.testing.assert_array_equal(zipped(tmp_path, without_csv(files)).masks.mask(FIRST), disc(0))


def test_an_empty_mask_is_a_mask(tmp_path: Path, files: Files) -> None:
    edit_row(files, lambda line: line.partition(b",")[0] + b",\n")
    source = zipped(tmp_path, files)
    assert build_manifest(source, "error")["unreadable"] == {}
    assert not source.masks.mask(FIRST).any()


# ---------------------------------------------------------------- one error at a time


def truncated_jpeg(files: Files) -> None:
    files["train.zip"][JPEG] = files["train.zip"][JPEG][:-2000]


def corrupt_jpeg(files: Files) -> None:
    data = bytearray(files["train.zip"][JPEG])
    data[len(data) // 2 : len(data) // 2 + 64] = bytes(range(64))
    files["train.zip"][JPEG] = bytes(data)


def no_jpeg(files: Files) -> None:
    files["train.zip"][JPEG] = b"<html>Too many requests</html>"


def small_jpeg(files: Files) -> None:
    files["train.zip"][JPEG] = jpeg(0, 640, 960)


def image_without_mask(files: Files) -> None:
    edit_row(files, lambda line: b"")


def mask_without_image(files: Files) -> None:
    del files["train.zip"][JPEG]


def gray_gif(files: Files) -> None:
    mask = disc(0)
    mask[0, 0] = 2
    without_csv(files)["train_masks.zip"][GIF] = gif(mask, bytes([0, 0, 0, 255, 255, 255, 128, 128, 128]))


def truncated_gif(files: Files) -> None:
    data = without_csv(files)["train_masks.zip"][GIF]
    files["train_masks.zip"][GIF] = data[: len(data) // 2]


def transposed_gif(files: Files) -> None:
    without_csv(files)["train_masks.zip"][GIF] = gif(disc(0).T.copy())


def gif_that_claims_gigabytes(files: Files) -> None:
    data = without_csv(files)["train_masks.zip"][GIF]
    files["train_masks.zip"][GIF] = data[:6] + b"\xff\xff\xff\xff" + data[10:]


def odd_row(files: Files) -> None:
    edit_row(files, lambda line: line.rstrip() + b" 7\n")


def row_beyond_the_image(files: Files) -> None:
    edit_row(files, lambda line: line.rstrip() + b" 2455040 2\n")


def row_that_is_no_text(files: Files) -> None:
    edit_row(files, lambda line: line.rstrip() + b" \xff\n")


JPEG_AT_FAULT = rf"{FIRST}\.jpg.*train\.zip"
GIF_AT_FAULT = rf"{FIRST}_mask\.gif.*train_masks\.zip"
ROW_AT_FAULT = rf"{FIRST}.*train_masks\.csv"
PER_IMAGE = {
    truncated_jpeg: JPEG_AT_FAULT,
    corrupt_jpeg: JPEG_AT_FAULT,
    no_jpeg: JPEG_AT_FAULT,
    small_jpeg: JPEG_AT_FAULT + ".*960 x 640.*1918 x 1280",
    image_without_mask: JPEG_AT_FAULT + ".*mask",
    mask_without_image: f"mask.*{FIRST}",
    gray_gif: GIF_AT_FAULT,
    truncated_gif: GIF_AT_FAULT,
    transposed_gif: GIF_AT_FAULT + ".*1280 x 1918.*1918 x 1280",
    gif_that_claims_gigabytes: GIF_AT_FAULT,
    odd_row: ROW_AT_FAULT + ".*odd",
    row_beyond_the_image: ROW_AT_FAULT + ".*2455040",
    row_that_is_no_text: ROW_AT_FAULT,
}
"""Errors of one training image, which may be skipped, and the names in their messages."""


@pytest.mark.parametrize("spoil", PER_IMAGE)
def test_a_faulty_image_or_mask_stops_or_is_skipped(
    tmp_path: Path, files: Files, spoil: Callable[[Files], None]
) -> None:
    spoil(files)
    source = zipped(tmp_path, files)
    with pytest.raises(CarvanaError, match=PER_IMAGE[spoil] + r".*\b1\b.*data\.on_corrupt"):
        build_manifest(source, "error")
    manifest = build_manifest(source, "skip")
    assert list(manifest["unreadable"]) == [FIRST]
    assert manifest["train"]["images"] == 3
    assert open_training(CompetitionData(tmp_path), manifest).ids() == TRAIN[1:]


def test_a_drive_that_fails_is_not_skipped(tmp_path: Path, files: Files) -> None:
    source = unpacked(tmp_path, files)
    source.train.ids()
    (tmp_path / JPEG).unlink()
    with pytest.raises(CarvanaError, match=rf"{FIRST}\.jpg.*No such file"):
        build_manifest(source, "skip")


def test_all_faulty_images_are_counted_and_listed(tmp_path: Path, files: Files) -> None:
    files["train.zip"][JPEG] = b""
    files["train.zip"][f"train/{TRAIN[2]}.jpg"] = b""
    source = zipped(tmp_path, files)
    with pytest.raises(CarvanaError, match=r"\b2\b.*data\.on_corrupt"):
        build_manifest(source, "error")
    assert list(build_manifest(source, "skip")["unreadable"]) == [TRAIN[0], TRAIN[2]]


@pytest.mark.parametrize("write", [zipped, unpacked])
@pytest.mark.parametrize("spoil", PER_IMAGE)
def test_the_manifest_has_no_path_of_this_machine(
    tmp_path: Path, files: Files, spoil: Callable[[Files], None], write: Callable[[Path, Files], CompetitionData]
) -> None:
    spoil(files)
    manifest = build_manifest(write(tmp_path, files), "skip")
    assert str(tmp_path) not in json.dumps(manifest)
    assert FIRST in manifest["unreadable"][FIRST]


def unknown_image_name(files: Files) -> None:
    files["train.zip"]["train/my_car.jpg"] = jpeg(0)


def unknown_mask_name(files: Files) -> None:
    without_csv(files)["train_masks.zip"]["train_masks/my_car_mask.gif"] = gif(disc(0))


def row_without_comma(files: Files) -> None:
    edit_row(files, lambda line: line.replace(b",", b";"))


def two_rows_of_an_image(files: Files) -> None:
    edit_row(files, lambda line: line * 2)


def no_header(files: Files) -> None:
    files["train_masks.csv.zip"][CSV] = files["train_masks.csv.zip"][CSV].partition(b"\n")[2]


def no_train(files: Files) -> None:
    del files["train.zip"]


def no_test(files: Files) -> None:
    del files["test.zip"]


def no_masks(files: Files) -> None:
    del without_csv(files)["train_masks.zip"]


def empty_test(files: Files) -> None:
    files["test.zip"] = {"test/": b""}
    del files["sample_submission.csv.zip"]


def masks_of_other_images(files: Files) -> None:
    files["train_masks.csv.zip"][CSV] = table({f"{image_id}.jpg": "1 1" for image_id in TEST})


def a_test_image_too_many(files: Files) -> None:
    files["test.zip"]["test/0004d4463b50_16.jpg"] = jpeg(0)


def sample_submission_of_other_columns(files: Files) -> None:
    files["sample_submission.csv.zip"]["sample_submission.csv"] = b"image,mask\n"


def truth_of_other_images(files: Files) -> None:
    files["truth.csv"] = {"truth.csv": table({f"{image_id}.jpg": "1 1" for image_id in TEST[:1]})}


def malformed_truth(files: Files) -> None:
    files["truth.csv"] = {"truth.csv": table({f"{image_id}.jpg": "5 1 1 1" for image_id in TEST})}


PER_FILE = {
    truth_of_other_images: rf"truth\.csv.*{TEST[1]}",
    malformed_truth: rf"truth\.csv.*row 2.*{TEST[0]}",
    unknown_image_name: r"train\.zip.*my_car",
    unknown_mask_name: r"train_masks\.zip.*my_car",
    row_without_comma: r"train_masks\.csv.*row 2",
    two_rows_of_an_image: r"train_masks\.csv.*row 3",
    no_header: r"train_masks\.csv.*img,rle_mask",
    no_train: r"train\.zip.*data\.directory",
    no_test: r"test\.zip.*data\.directory",
    no_masks: r"train_masks\.zip.*data\.directory",
    empty_test: r"\b0 test images.*data\.directory",
    masks_of_other_images: "mask",
    a_test_image_too_many: r"sample_submission\.csv.*0004d4463b50_16",
    sample_submission_of_other_columns: r"sample_submission\.csv.*\bimg\b",
}
"""Errors that are never skipped, and the names in their messages."""


@pytest.mark.parametrize("spoil", PER_FILE)
def test_errors_of_whole_files_are_never_skipped(tmp_path: Path, files: Files, spoil: Callable[[Files], None]) -> None:
    spoil(files)
    source = zipped(tmp_path, files)
    for on_corrupt in ("error", "skip"):
        with pytest.raises(CarvanaError, match=PER_FILE[spoil]) as caught:
            build_manifest(source, on_corrupt)
        assert str(tmp_path) in str(caught.value)


def test_a_corrupt_test_image_is_listed_and_does_not_stop(tmp_path: Path, files: Files) -> None:
    not_a_jpeg, wrong_size, truncated = f"test/{TEST[0]}.jpg", f"test/{TEST[1]}.jpg", "test/0004d4463b50_03.jpg"
    files["test.zip"] |= {not_a_jpeg: b"", wrong_size: jpeg(0, 640, 960), truncated: jpeg(0)[:-2000]}
    del files["sample_submission.csv.zip"]
    manifest = build_manifest(zipped(tmp_path, files), "error")
    assert list(manifest["suspect_test_images"]) == TEST
    assert f"{TEST[0]}.jpg in test.zip" in manifest["suspect_test_images"][TEST[0]]
    images = open_test(CompetitionData(tmp_path), manifest)
    assert images.ids() == [*TEST, "0004d4463b50_03"]
    for image_id in images.ids():
        with pytest.raises(CarvanaError, match=rf"{image_id}\.jpg in .*test\.zip"):
            images.image(image_id)


def in_zip(*names: str, data: bytes) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name in names:
            archive.writestr(name, data)
            archive.writestr(f"__MACOSX/._{name}", b"metadata of macOS")
    return file.getvalue()


FORMS: dict[str, Callable[[str, bytes], tuple[str, bytes]]] = {
    "plain": lambda name, data: (name, data),
    "byte order mark": lambda name, data: (name, codecs.BOM_UTF8 + data),
    "Windows line ends": lambda name, data: (name, data.replace(b"\n", b"\r\n")),
    "gzip": lambda name, data: (f"{name}.gz", gzip.compress(data)),
    "gzip named .csv": lambda name, data: (name, gzip.compress(data)),
    "gzip named .zip": lambda name, data: (f"{name}.zip", gzip.compress(data)),
    "zip": lambda name, data: (f"{name}.zip", in_zip(name, data=data)),
    "zip named .csv": lambda name, data: (name, in_zip(name, data=data)),
    "zip named .gz": lambda name, data: (f"{name}.gz", in_zip(name, data=data)),
    "plain named .zip": lambda name, data: (f"{name}.zip", data),
    "plain named .gz": lambda name, data: (f"{name}.gz", data),
    "folder": lambda name, data: (f"{name}/{name}", data),
    "other case": lambda name, data: (name.upper(), data),
}
"""Ways to store a CSV: file name and content, given the CSV's own."""


@pytest.mark.parametrize("form", FORMS)
def test_every_csv_is_read_in_every_form(tmp_path: Path, files: Files, form: str) -> None:
    tables = {name: files.pop(f"{name}.zip")[name] for name in (CSV, "sample_submission.csv")}
    tables["metadata.csv"] = b'"id","year","make"\n"00087a6bd4dc","2012","Mini, or ""Mini"""\n'
    tables["truth.csv"] = b"img,rle_mask\n" + b"".join(f"{image_id}.jpg,1 9\n".encode() for image_id in TEST)
    source = zipped(tmp_path, files)
    for name, data in tables.items():
        file, content = FORMS[form](name, data)
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_bytes(content)
    manifest = build_manifest(source, "error")
    assert manifest["masks"]["images"] == len(TRAIN)
    np.testing.assert_array_equal(open_training(source, manifest).mask(FIRST), disc(0))
    assert source.sample_ids == TEST
    assert read_car_makes(tmp_path) == {"00087a6bd4dc": 'Mini, or "Mini"'}
    write_truth(source, tmp_path / "copy.csv")
    assert [image_id for _, image_id, _ in read_rows(tmp_path / "copy.csv")] == TEST


@pytest.mark.parametrize("name", [CSV, "sample_submission.csv", "metadata.csv", "truth.csv"])
@pytest.mark.parametrize(
    "damage", ["UTF-16", "binary", "truncated gzip", "gzip of a gzip", "two CSVs", "empty folder", "CR"]
)
def test_a_csv_that_cannot_be_read_is_named(tmp_path: Path, files: Files, name: str, damage: str) -> None:
    files.pop(f"{name}.zip", None)
    source = zipped(tmp_path, files)
    text = "img,rle_mask\n" + "".join(f"{image_id}.jpg,1 9\n" for image_id in (*TRAIN, *TEST))
    data = {
        "UTF-16": text.encode("utf-16"),
        "binary": bytes(100),
        "truncated gzip": gzip.compress(text.encode())[:-12],
        "gzip of a gzip": gzip.compress(gzip.compress(text.encode())),
        "two CSVs": in_zip(f"a/{name}", f"b/{name}", data=text.encode()),
        "CR": text.replace("\n", "\r").encode(),
    }
    if damage == "empty folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(data[damage])
    with pytest.raises(CarvanaError, match=rf"{name}\b"):
        build_manifest(source, "error")
        read_car_makes(tmp_path)


@pytest.mark.parametrize("masks", ["csv", "gif"])
def test_training_masks_of_another_geometry_are_warned_of(
    tmp_path: Path, files: Files, masks: str, capsys: pytest.CaptureFixture[str]
) -> None:
    build_manifest(zipped(tmp_path / "good", files), "error")
    assert "warning" not in capsys.readouterr().err
    if masks == "csv":
        in_columns = rle.encode(np.ascontiguousarray(disc(0).T))
        edit_row(files, lambda line: line.partition(b",")[0] + f",{in_columns}\n".encode())
    else:
        without_csv(files)["train_masks.zip"][GIF] = gif(1 - disc(0))
    build_manifest(zipped(tmp_path / "bad", files), "error")
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    assert FIRST in line and not any(image_id in line for image_id in TRAIN[1:])


# ---------------------------------------------------------------- data that change later


@pytest.mark.parametrize("write", [zipped, unpacked])
def test_data_that_changed_after_the_manifest_are_refused(
    tmp_path: Path, files: Files, write: Callable[[Path, Files], CompetitionData]
) -> None:
    manifest = build_manifest(write(tmp_path, files), "error")
    assert open_training(CompetitionData(tmp_path), manifest).ids() == TRAIN
    original = deepcopy(files)

    files["test.zip"][f"test/{TEST[0]}.jpg"] = jpeg(99)
    write(tmp_path, files)
    open_training(CompetitionData(tmp_path), manifest)
    with pytest.raises(CarvanaError, match=rf"test.*{tmp_path}"):
        open_test(CompetitionData(tmp_path), manifest)

    files = deepcopy(original)
    files["train.zip"][JPEG] = jpeg(98)
    write(tmp_path, files)
    open_test(CompetitionData(tmp_path), manifest)
    with pytest.raises(CarvanaError, match="train"):
        open_training(CompetitionData(tmp_path), manifest)

    files = deepcopy(original)
    edit_row(files, lambda line: line.replace(b"9", b"8"))  # its size stays
    write(tmp_path, files)
    with pytest.raises(CarvanaError, match="masks"):
        open_training(CompetitionData(tmp_path), manifest)


def test_a_manifest_beside_the_data_does_not_change_them(tmp_path: Path, files: Files) -> None:
    manifest = build_manifest(unpacked(tmp_path, files), "error")
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    open_training(CompetitionData(tmp_path), manifest)
    open_test(CompetitionData(tmp_path), manifest)


# ---------------------------------------------------------------- where data come from


def test_the_directory_alone_overrides_the_sample(tmp_path: Path, files: Files) -> None:
    zipped(tmp_path / "mine", files)
    (tmp_path / "root").mkdir()
    for directory in (str(tmp_path / "mine"), "../mine"):
        source = ensure_data(DataSettings(source="sample", directory=directory), tmp_path / "root")
        assert source.train.ids() == TRAIN
    assert list((tmp_path / "root").iterdir()) == []


def test_a_sample_of_other_settings_has_another_folder(tmp_path: Path) -> None:
    folders = {
        data_dir(DataSettings(source="sample", sample=SampleSettings(seed=seed)), tmp_path) for seed in (0, 0, 1)
    }
    assert len(folders) == 2


def test_known_test_masks_are_shown_while_they_belong_to_the_data(tmp_path: Path, files: Files) -> None:
    for name in ("with", "without"):
        zipped(tmp_path / name, files)
    (tmp_path / "with" / "truth.csv").write_bytes(b"img,rle_mask\n00087a6bd4dc_01.jpg,1 1\n")
    place = tmp_path / "data" / "truth.csv"
    write_truth(ensure_data(DataSettings(source="directory", directory="with"), tmp_path), place)
    assert place.read_bytes() == b"img,rle_mask\n00087a6bd4dc_01.jpg,1 1\n"
    write_truth(ensure_data(DataSettings(source="directory", directory="without"), tmp_path), place)
    assert place.read_bytes() == b"img,rle_mask\n"


def test_data_directory_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(CarvanaError, match=r"data\.directory.*nowhere"):
        ensure_data(DataSettings(source="sample", directory="nowhere"), tmp_path)
