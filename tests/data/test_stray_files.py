"""Stray files: other endings, junk beside the data, files in subfolders, zips that Python cannot unpack."""

import io
import os
import zipfile
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.data.archives import open_archive
from pipeline.data.competition_data import CompetitionData
from pipeline.data.decoding import decode_mask
from pipeline.data.ingest import build_manifest
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.segment.image_loader import load_image
from pipeline.segment.outputs import plan_outputs

IDS = ["00087a6bd4dc_01", "00087a6bd4dc_02"]


@pytest.fixture(scope="module")
def jpeg() -> bytes:
    return cv2.imencode(".jpg", np.zeros((HEIGHT, WIDTH, 3), np.uint8))[1].tobytes()


@pytest.fixture(scope="module")
def mask_png() -> bytes:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[400:800, 500:1400] = 255
    return cv2.imencode(".png", mask)[1].tobytes()


def folder_of(path: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(data)
    return path


def zip_of(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


class TestImages:
    @pytest.mark.parametrize("ending", [".jpg", ".JPG", ".jpeg", ".JPEG", ".jfif"])
    @pytest.mark.parametrize("zipped", [False, True])
    def test_any_ending_of_jpegs_is_an_image(self, tmp_path: Path, jpeg: bytes, ending: str, zipped: bool) -> None:
        files = {f"test/{IDS[0]}{ending}": jpeg, f"test/{IDS[1]}.jpg": jpeg}
        if zipped:
            zip_of(tmp_path / "test.zip", files)
        else:
            folder_of(tmp_path, files)
        images = CompetitionData(tmp_path).test
        assert images.ids() == IDS
        assert images.image(IDS[0]).shape == (HEIGHT, WIDTH, 3)
        images.check_header(IDS[0])

    def test_two_files_of_one_image_are_an_error(self, tmp_path: Path, jpeg: bytes) -> None:
        folder_of(tmp_path / "test", {f"{IDS[0]}.jpg": jpeg, f"{IDS[0]}.JPG": jpeg})
        with pytest.raises(CarvanaError, match=rf"test.*{IDS[0]}\.JPG, {IDS[0]}\.jpg"):
            CompetitionData(tmp_path).test.ids()

    def test_an_uppercase_id_is_named(self, tmp_path: Path, jpeg: bytes) -> None:
        folder_of(tmp_path / "test", {f"{IDS[0].upper()}.JPG": jpeg})
        with pytest.raises(CarvanaError, match=rf"{IDS[0].upper()}\.JPG.*test.*lowercase"):
            CompetitionData(tmp_path).test.ids()

    @pytest.mark.parametrize("below", ["test", "part1", "a/b"])
    def test_images_in_subfolders_are_found_as_in_a_zip(self, tmp_path: Path, jpeg: bytes, below: str) -> None:
        files = {f"{IDS[0]}.jpg": jpeg, f"{below}/{IDS[1]}.jpg": jpeg}
        folder_of(tmp_path / "folder/test", files)
        (tmp_path / "zip").mkdir()
        zip_of(tmp_path / "zip/test.zip", files)
        for directory in ("folder", "zip"):
            images = CompetitionData(tmp_path / directory).test
            assert images.ids() == IDS
            assert images.image(IDS[1]).shape == (HEIGHT, WIDTH, 3)

    def test_copies_in_subfolders_are_named(self, tmp_path: Path, jpeg: bytes) -> None:
        folder_of(tmp_path / "test", {f"{IDS[0]}.jpg": jpeg, f"copy/{IDS[0]}.jpg": jpeg})
        with pytest.raises(CarvanaError, match=rf"copy/{IDS[0]}\.jpg"):
            CompetitionData(tmp_path).test.ids()

    def test_a_dangling_link_is_an_image_that_cannot_be_read(self, tmp_path: Path, jpeg: bytes) -> None:
        folder_of(tmp_path / "test", {f"{IDS[0]}.jpg": jpeg})
        (tmp_path / "test" / f"{IDS[1]}.jpg").symlink_to(tmp_path / "gone.jpg")
        images = CompetitionData(tmp_path).test
        assert images.ids() == IDS
        with pytest.raises(CarvanaError, match=rf"{IDS[1]}\.jpg"):
            images.check_header(IDS[1])

    def test_links_to_folders_are_followed_once(self, tmp_path: Path, jpeg: bytes) -> None:
        folder_of(tmp_path / "elsewhere", {f"{IDS[0]}.jpg": jpeg})
        (tmp_path / "test").mkdir()
        (tmp_path / "test/part").symlink_to(tmp_path / "elsewhere")
        (tmp_path / "test/loop").symlink_to(tmp_path / "test")
        (tmp_path / "test/parent").symlink_to(tmp_path)
        (tmp_path / "elsewhere/again").symlink_to(tmp_path / "elsewhere")
        assert CompetitionData(tmp_path).test.ids() == IDS[:1]

    @pytest.mark.parametrize("name", ["TEST.zip", "Test.ZIP"])
    def test_the_case_of_a_zips_name_does_not_matter(self, tmp_path: Path, jpeg: bytes, name: str) -> None:
        zip_of(tmp_path / name, {f"test/{IDS[0]}.jpg": jpeg})
        assert CompetitionData(tmp_path).test.ids() == IDS[:1]


class TestMasks:
    @pytest.mark.parametrize("ending", ["_mask.png", "_mask.PNG", "_MASK.png"])
    def test_masks_may_be_png(self, tmp_path: Path, mask_png: bytes, ending: str) -> None:
        folder_of(tmp_path / "train_masks", {f"{IDS[0]}{ending}": mask_png})
        masks = CompetitionData(tmp_path).masks
        assert masks.ids() == IDS[:1]
        assert masks.mask(IDS[0]).sum() == 400 * 900

    def test_a_folder_with_other_files_only_names_the_first(self, tmp_path: Path) -> None:
        folder_of(tmp_path / "train_masks", {"a.bmp": b"", "b.bmp": b""})
        with pytest.raises(CarvanaError, match=r"train_masks.*2 files.*_mask\.gif.*a\.bmp"):
            CompetitionData(tmp_path).masks.ids()

    def test_masks_of_other_types_are_named_before_the_image_without_a_mask(
        self, tmp_path: Path, jpeg: bytes, mask_png: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder_of(tmp_path / "train", {f"{image_id}.jpg": jpeg for image_id in IDS})
        folder_of(tmp_path / "train_masks", {f"{IDS[0]}_mask.png": mask_png, f"{IDS[1]}_mask.bmp": b""})
        folder_of(tmp_path / "test", {f"{IDS[0]}.jpg": jpeg})
        with pytest.raises(CarvanaError, match=IDS[1]):
            build_manifest(CompetitionData(tmp_path), "error")
        assert f"{IDS[1]}_mask.bmp" in capsys.readouterr().err

    def test_a_png_mask_with_megabytes_of_text_is_read(self, mask_png: bytes) -> None:
        text, buffer = PngImagePlugin.PngInfo(), io.BytesIO()
        text.add_text("history", "x" * 50_000_000, zip=True)
        Image.open(io.BytesIO(mask_png)).save(buffer, format="PNG", pnginfo=text, icc_profile=bytes(2_000_000))
        assert decode_mask(buffer.getvalue(), "a_mask.png").sum() == 400 * 900

    @pytest.mark.parametrize("kind", ["GIF", "PNG"])
    def test_a_damaged_mask_is_named(self, mask_png: bytes, kind: str) -> None:
        buffer = io.BytesIO()
        Image.open(io.BytesIO(mask_png)).save(buffer, format=kind)
        rng = np.random.default_rng(0)
        for _ in range(100):
            data = bytearray(buffer.getvalue())
            data[int(rng.integers(min(len(data), 900)))] ^= int(rng.integers(1, 256))
            try:
                decode_mask(bytes(data), "a_mask")
            except CorruptFileError as error:
                assert "a_mask" in str(error)


class TestOtherFiles:
    JUNK = (".DS_Store", "Thumbs.db", "desktop.ini", "._a.jpg", ".ipynb_checkpoints/a.jpg", "@eaDir/a.jpg/b.jpg")

    def test_they_are_counted_and_junk_is_not(
        self, tmp_path: Path, jpeg: bytes, mask_png: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder_of(tmp_path / "train", {f"{IDS[0]}.jpg": jpeg} | dict.fromkeys(self.JUNK, b""))
        folder_of(tmp_path / "train_masks", {f"{IDS[0]}_mask.png": mask_png})
        names = ["a.txt", "b.bmp", "sub/c.heic", f"{IDS[1]}.png"]
        folder_of(tmp_path / "test", {f"{IDS[0]}.jpg": jpeg} | dict.fromkeys(names, b""))
        source = CompetitionData(tmp_path)
        assert source.train.ignored() == []
        assert source.test.ignored() == sorted(names)
        build_manifest(source, "error")
        (warning,) = [line for line in capsys.readouterr().err.splitlines() if "not used" in line]
        assert all(part in warning for part in (str(tmp_path / "test"), "4 files", f"{IDS[1]}.png", "a.txt", "..."))

    @pytest.mark.parametrize(
        "names",
        [
            (".DS_Store", "train/.DS_Store"),
            ("__MACOSX/._train", f"__MACOSX/train/._{IDS[0]}.jpg", f"__MACOSX/train/{IDS[0]}.jpg"),
            ("train/Icon\r",),
            ("train/Thumbs.db", "Thumbs.db"),
        ],
    )
    def test_junk_in_a_zip_is_never_in_the_way(self, tmp_path: Path, jpeg: bytes, names: tuple[str, ...]) -> None:
        zip_of(tmp_path / "train.zip", {f"train/{IDS[0]}.jpg": jpeg} | dict.fromkeys(names, b"x"))
        images = CompetitionData(tmp_path).train
        assert images.ids() == IDS[:1]
        assert images.ignored() == []

    def test_other_members_are_never_in_the_way(self, tmp_path: Path, jpeg: bytes) -> None:
        names = ["a/readme.txt", "b/readme.txt", "a/notes.csv", "b/notes.csv", "a/x.png", "b/x.png", "tab\t.txt"]
        zip_of(tmp_path / "train.zip", {f"train/{IDS[0]}.jpg": jpeg} | dict.fromkeys(names, b"x"))
        images = CompetitionData(tmp_path).train
        assert images.image(IDS[0]).shape == (HEIGHT, WIDTH, 3)
        assert images.ignored() == sorted(names)

    def test_two_members_of_one_image_are_an_error(self, tmp_path: Path, jpeg: bytes) -> None:
        zip_of(tmp_path / "train.zip", {f"a/{IDS[0]}.jpg": jpeg, f"b/{IDS[0]}.jpg": jpeg})
        with pytest.raises(CarvanaError, match=rf"train\.zip.*a/{IDS[0]}\.jpg, b/{IDS[0]}\.jpg"):
            CompetitionData(tmp_path).train.ids()

    @pytest.mark.parametrize(("offset", "value"), [(8, 9), (6, 1)], ids=["deflate64", "encrypted"])
    def test_a_zip_that_python_cannot_unpack_is_to_be_unpacked(
        self, tmp_path: Path, jpeg: bytes, offset: int, value: int
    ) -> None:
        path = zip_of(tmp_path / "train.zip", {f"{IDS[0]}.jpg": jpeg})
        data = bytearray(path.read_bytes())
        data[offset] = value
        data[data.index(b"PK\x01\x02") + offset + 2] = value
        path.write_bytes(data)
        with pytest.raises(CarvanaError, match=rf"{IDS[0]}.*train\.zip.*{tmp_path}/train,") as caught:
            CompetitionData(tmp_path).train.image(IDS[0])
        assert not isinstance(caught.value, CorruptFileError)

    def test_a_zip_that_cannot_be_unpacked_beside_other_files_does_not_matter(
        self, tmp_path: Path, jpeg: bytes
    ) -> None:
        """Only members that are read need to be readable."""
        path = zip_of(tmp_path / "train.zip", {f"{IDS[0]}.jpg": jpeg, "notes.txt": b"x"})
        data = bytearray(path.read_bytes())
        for start in (data.rindex(b"PK\x03\x04") + 6, data.rindex(b"PK\x01\x02") + 8):
            data[start] = 1  # encrypted
        path.write_bytes(data)
        assert CompetitionData(tmp_path).train.image(IDS[0]).shape == (HEIGHT, WIDTH, 3)


class TestUsersImages:
    def test_content_or_suffix_makes_an_image(
        self, tmp_path: Path, jpeg: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        images = {"a.jfif": jpeg, "b": jpeg, "c.JPG": jpeg, "d.png": b"no image", "sub/e.jpeg": jpeg}
        others = {"e.txt": b"text", "f.heic": b"\0\0\0\x18ftypheic", "g.bmp": b"BM", "sub/h.gif": b"GIF89a"}
        folder_of(tmp_path / "in", images | others | {".f.jpg": jpeg, "Thumbs.db": b"", "__MACOSX/._a.jpg": b""})
        os.mkfifo(tmp_path / "in/pipe")
        jobs = plan_outputs([tmp_path / "in"], tmp_path / "out")
        assert [str(job.path.relative_to(tmp_path / "in")) for job in jobs] == sorted(images)
        warning = capsys.readouterr().err
        assert all(part in warning for part in (str(tmp_path / "in"), "5 files", "e.txt, f.heic, g.bmp, ..."))

    def test_nothing_is_said_where_all_are_images(
        self, tmp_path: Path, jpeg: bytes, capsys: pytest.CaptureFixture[str]
    ) -> None:
        folder_of(tmp_path / "in", {"a.jpg": jpeg, ".DS_Store": b""})
        plan_outputs([tmp_path / "in"], tmp_path / "out")
        assert capsys.readouterr().err == ""

    def test_linked_folders_are_searched_but_no_parents(self, tmp_path: Path, jpeg: bytes) -> None:
        folder_of(tmp_path, {"x/a.jpg": jpeg, "private.jpg": jpeg, "in/b.jpg": jpeg})
        (tmp_path / "in/link").symlink_to(tmp_path / "x")
        (tmp_path / "in/up").symlink_to(tmp_path)
        jobs = plan_outputs([tmp_path / "in"], tmp_path / "out")
        assert [job.path.name for job in jobs] == ["b.jpg", "a.jpg"]
        assert jobs[1].target("mask") == tmp_path / "out/link/a_mask.png"

    @pytest.mark.parametrize("megabytes", [4, 50])
    @pytest.mark.parametrize("place", ["text", "profile"])
    def test_a_png_with_megabytes_of_metadata_is_read(self, tmp_path: Path, megabytes: int, place: str) -> None:
        text = PngImagePlugin.PngInfo()
        metadata = "x" * (megabytes << 20)
        if place == "text":
            text.add_itxt("XML:com.adobe.xmp", metadata, zip=True)
        profile = metadata.encode() if place == "profile" else None
        Image.new("RGB", (48, 32), "red").save(tmp_path / "a.png", pnginfo=text, icc_profile=profile)
        assert (load_image(tmp_path / "a.png", "a.png") == (255, 0, 0)).all()

    def test_the_orientation_in_long_text_counts(self, tmp_path: Path) -> None:
        text = PngImagePlugin.PngInfo()
        text.add_itxt("XML:com.adobe.xmp", 'tiff:Orientation="6"' + "<x/>" * 1_000_000, zip=True)
        Image.new("RGB", (48, 32)).save(tmp_path / "a.png", pnginfo=text)
        assert load_image(tmp_path / "a.png", "a.png").shape == (48, 32, 3)


def test_a_part_that_is_not_there_is_none(tmp_path: Path) -> None:
    assert open_archive(tmp_path, "train") is None
    assert open_archive(tmp_path / "gone", "train") is None
