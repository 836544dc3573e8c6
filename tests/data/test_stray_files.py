"""Stray files: other endings, junk beside the data, zips that Python can't unpack."""

import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.data.archives import open_archive
from pipeline.data.competition_data import CompetitionData
from pipeline.errors import CarvanaError
from pipeline.segment.image_loader import load_image
from pipeline.segment.outputs import plan_outputs

IDS = ["00087a6bd4dc_01", "00087a6bd4dc_02"]


@pytest.fixture
def jpeg() -> bytes:
    return cv2.imencode(".jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))[1].tobytes()


def folder_of(path: Path, **files: bytes) -> Path:
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


@pytest.mark.parametrize("ending", [".jpg", ".JPG", ".jpeg", ".JPEG", ".jfif"])
def test_images_are_taken_whatever_their_ending(tmp_path: Path, jpeg: bytes, ending: str) -> None:
    folder_of(tmp_path / "test", **{f"{IDS[0]}{ending}": jpeg, f"{IDS[1]}.jpg": jpeg})
    images = CompetitionData(tmp_path).test
    assert images.ids() == IDS
    assert images.image(IDS[0]).shape == (HEIGHT, WIDTH, 3)
    images.check_header(IDS[0])


def test_an_image_with_two_endings_is_refused(tmp_path: Path, jpeg: bytes) -> None:
    folder_of(tmp_path / "test", **{f"{IDS[0]}.jpg": jpeg, f"{IDS[0]}.JPG": jpeg})
    with pytest.raises(CarvanaError, match=IDS[0]):
        CompetitionData(tmp_path).test.ids()


def test_other_files_are_counted_and_junk_is_not(tmp_path: Path, jpeg: bytes) -> None:
    names = {f"{IDS[0]}.jpg": jpeg, "notes.txt": b"", "x.bmp": b"", ".DS_Store": b"", "Thumbs.db": b"", "._a.jpg": b""}
    folder_of(tmp_path / "test", **names)
    assert CompetitionData(tmp_path).test.ignored() == ["notes.txt", "x.bmp"]


def test_masks_may_be_png(tmp_path: Path) -> None:
    folder_of(tmp_path / "train_masks")
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[100:200, 300:400] = 255
    cv2.imwrite(str(tmp_path / "train_masks" / f"{IDS[0]}_mask.png"), mask)
    masks = CompetitionData(tmp_path).masks
    assert masks.ids() == IDS[:1]
    assert np.array_equal(masks.mask(IDS[0]), mask // 255)


def test_a_folder_with_other_files_only_names_the_first(tmp_path: Path) -> None:
    folder_of(tmp_path / "train_masks", **{"a.bmp": b"", "b.bmp": b""})
    with pytest.raises(CarvanaError, match=r"2 files.*_mask\.gif.*a\.bmp"):
        CompetitionData(tmp_path).masks.ids()


def test_junk_in_a_zip_is_not_in_the_way(tmp_path: Path, jpeg: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr(f"train/{IDS[0]}.jpg", jpeg)
        for name in (".DS_Store", "train/.DS_Store", "a/readme.txt", "b/readme.txt", f"__MACOSX/train/._{IDS[0]}.jpg"):
            archive.writestr(name, b"x")
    images = CompetitionData(tmp_path).train
    assert images.ids() == IDS[:1]
    assert images.ignored() == ["readme.txt"]


def test_two_files_of_one_image_in_a_zip_are_refused(tmp_path: Path, jpeg: bytes) -> None:
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr(f"a/{IDS[0]}.jpg", jpeg)
        archive.writestr(f"b/{IDS[0]}.jpg", jpeg)
    with pytest.raises(CarvanaError, match=IDS[0]):
        CompetitionData(tmp_path).train.ids()


@pytest.mark.parametrize(("offset", "value"), [(8, 9), (6, 1)], ids=["deflate64", "encrypted"])
def test_a_zip_that_python_cannot_unpack_is_to_be_unpacked(
    tmp_path: Path, jpeg: bytes, offset: int, value: int
) -> None:
    path = tmp_path / "train.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{IDS[0]}.jpg", jpeg)
    data = bytearray(path.read_bytes())
    data[offset] = value
    data[data.index(b"PK\x01\x02") + offset + 2] = value
    path.write_bytes(data)
    archive = open_archive(tmp_path, "train")
    assert archive is not None
    with pytest.raises(CarvanaError, match=rf"{IDS[0]}.*Unpack.*train"):
        archive.read(f"{IDS[0]}.jpg")


def test_users_images_are_found_by_content_or_suffix(tmp_path: Path, jpeg: bytes) -> None:
    names = {"a.jfif": jpeg, "b": jpeg, "c.JPG": jpeg, "d.png": b"no image", "e.txt": b"text", ".f.jpg": jpeg}
    folder_of(tmp_path / "in", **names)
    jobs = plan_outputs([tmp_path / "in"], tmp_path / "out")
    assert [job.path.name for job in jobs] == ["a.jfif", "b", "c.JPG", "d.png"]


def test_a_png_with_megabytes_of_text_is_read(tmp_path: Path) -> None:
    text = PngImagePlugin.PngInfo()
    text.add_itxt("XML:com.adobe.xmp", "<x/>" * 1_000_000, zip=True)
    Image.new("RGB", (48, 32), "red").save(tmp_path / "a.png", pnginfo=text)
    assert load_image(tmp_path / "a.png", "a.png").shape == (32, 48, 3)
