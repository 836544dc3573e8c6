import errno
import pickle
import random
import zipfile
from concurrent.futures import ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from pipeline.data.archives import Archive, FolderArchive, ZipArchive, find_csv, open_archive
from pipeline.errors import CarvanaError, CorruptFileError

FILES = {f"{number:02d}.jpg": random.Random(number).randbytes(5000 + number) for number in range(20)}


def write_zip(path: Path, members: dict[str, bytes], how: int = zipfile.ZIP_STORED) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", how) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return path


def write_folder(path: Path, files: dict[str, bytes]) -> Path:
    path.mkdir(parents=True)
    for name, data in files.items():
        (path / name).write_bytes(data)
    return path


def found(directory: Path) -> Archive:
    archive = open_archive(directory, "train")
    assert archive is not None
    return archive


def contents(archive: Archive) -> dict[str, bytes]:
    """Content of each file by base name."""
    return {Path(path).name: archive.read(path) for path in archive.paths()}


@pytest.fixture
def zipped(tmp_path: Path) -> ZipArchive:
    """A zip as Kaggle packs them: a folder's entry, then members below it."""
    return ZipArchive(write_zip(tmp_path / "train.zip", {"train/": b"", **{f"train/{n}": d for n, d in FILES.items()}}))


# ---------------------------------------------------------------- zips and folders


def test_zip_and_folders_read_alike(tmp_path: Path, zipped: ZipArchive) -> None:
    write_folder(tmp_path / "flat" / "train", FILES)
    write_folder(tmp_path / "as_unzip_leaves_it" / "train" / "train", FILES)
    for archive in (found(tmp_path), found(tmp_path / "flat"), found(tmp_path / "as_unzip_leaves_it")):
        assert contents(archive) == FILES
        path = next(path for path in archive.paths() if path.endswith("07.jpg"))
        assert archive.read(path, limit=100) == FILES["07.jpg"][:100]


def test_files_of_one_name_are_read_by_their_paths(tmp_path: Path) -> None:
    files = {"a/b/c/x.txt": b"1", "x.txt": b"2"}
    archive = ZipArchive(write_zip(tmp_path / "train.zip", files))
    assert {path: archive.read(path) for path in archive.paths()} == files


@pytest.mark.parametrize("where", ["a.csv.zip", "a.csv", "a.csv.gz", "A.CSV.ZIP", "a.csv/a.csv", "a.csv.zip/a.csv"])
def test_a_csv_may_have_other_endings_or_be_in_a_folder_of_its_name(tmp_path: Path, where: str) -> None:
    (tmp_path / where).parent.mkdir(exist_ok=True)
    (tmp_path / where).write_bytes(b"img,rle_mask\n")
    assert find_csv(tmp_path, "a.csv") == tmp_path / where


def test_of_several_forms_of_a_csv_the_zip_is_preferred_and_nothing_is_none(tmp_path: Path) -> None:
    assert find_csv(tmp_path, "a.csv") is None
    for name in ("a.csv.gz", "a.csv", "a.csv.zip"):
        (tmp_path / name).touch()
        assert find_csv(tmp_path, "a.csv") == tmp_path / name


def test_a_zip_is_preferred_to_the_folder_beside_it_and_nothing_is_none(tmp_path: Path, zipped: ZipArchive) -> None:
    write_folder(tmp_path / "train", {"other.jpg": b""})
    assert isinstance(found(tmp_path), ZipArchive)
    assert open_archive(tmp_path, "test") is None


@pytest.mark.parametrize("archive_of", ["zip", "folder"])
def test_a_file_that_is_not_there_is_named(tmp_path: Path, zipped: ZipArchive, archive_of: str) -> None:
    archive = zipped if archive_of == "zip" else FolderArchive(write_folder(tmp_path / "train", FILES))
    with pytest.raises(CarvanaError, match=r"train.*99\.jpg"):
        archive.read("99.jpg")


# ---------------------------------------------------------------- corrupt and unsafe zips


@pytest.mark.parametrize(
    "member", ["../x.jpg", "train/../../x.jpg", "/etc/x.jpg", "C:/x.jpg", "C:\\x.jpg", "..\\x.jpg", "\\\\host\\x.jpg"]
)
def test_an_unsafe_path_in_a_zip_is_an_error(tmp_path: Path, member: str) -> None:
    path = write_zip(tmp_path / "train.zip", {"train/01.jpg": b"1", member: b"2"})
    with pytest.raises(CarvanaError, match=r"train\.zip.*x\.jpg"):
        ZipArchive(path).paths()


@pytest.mark.parametrize("damage", ["cut short", "empty", "no zip", "missing"])
def test_an_unreadable_zip_is_named(tmp_path: Path, zipped: ZipArchive, damage: str) -> None:
    path = zipped.path
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes({"cut short": path.read_bytes()[:-3000], "empty": b"", "no zip": b"<html>"}[damage])
    with pytest.raises(CarvanaError, match=r"train\.zip"):
        ZipArchive(path).paths()


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_corrupt_member_is_named_and_the_others_are_read(tmp_path: Path, how: int) -> None:
    path = write_zip(tmp_path / "train.zip", FILES, how)
    with zipfile.ZipFile(path) as archive:
        info = archive.getinfo("07.jpg")
    data = bytearray(path.read_bytes())
    data[info.header_offset + 30 + len("07.jpg") + info.compress_size // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(CorruptFileError, match=r"07\.jpg.*train\.zip"):
        ZipArchive(path).read("07.jpg")
    assert ZipArchive(path).read("08.jpg") == FILES["08.jpg"]


@pytest.mark.parametrize("how", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_whichever_byte_is_wrong_the_error_is_one_for_users(tmp_path: Path, how: int) -> None:
    path = write_zip(tmp_path / "train.zip", {"train/é.jpg": b"abcabcabd" * 9, "train/02.jpg": b"xyz"}, how)
    valid, wrong = path.read_bytes(), tmp_path / "wrong.zip"
    for place in range(len(valid)):
        for flip in (0xFF, 0x01):
            data = bytearray(valid)
            data[place] ^= flip
            wrong.write_bytes(data)
            try:
                contents(ZipArchive(wrong))
            except CarvanaError as error:
                assert "wrong.zip" in str(error)


@pytest.mark.parametrize("archive_of", ["zip", "folder"])
def test_a_drive_that_fails_is_no_corrupt_file(
    tmp_path: Path, zipped: ZipArchive, archive_of: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Corrupt files may be skipped; files on a failing drive may be fine."""
    archive = zipped if archive_of == "zip" else FolderArchive(write_folder(tmp_path / "train", FILES))
    archive.paths()

    def fail(*_: object, **__: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(zipfile.ZipFile, "open", fail)
    monkeypatch.setattr(Path, "open", fail)
    path = "train/07.jpg" if archive_of == "zip" else "07.jpg"
    with pytest.raises(CarvanaError, match=r"train.*Input/output error") as caught:
        archive.read(path)
    assert not isinstance(caught.value, CorruptFileError)


# ---------------------------------------------------------------- several processes and threads


def test_works_after_pickling(zipped: ZipArchive) -> None:
    assert contents(zipped) == FILES
    assert contents(pickle.loads(pickle.dumps(zipped))) == FILES


def test_forked_processes_and_their_parent_read_at_once(zipped: ZipArchive) -> None:
    """A file handle that a fork inherits shares its place with the parent's: each would read the other's bytes."""
    zipped.paths()
    zipped.read("train/01.jpg")
    context = get_context("fork")
    results = context.SimpleQueue()
    children = [context.Process(target=_read_often, args=(zipped, results)) for _ in range(2)]
    for child in children:
        child.start()
    assert all(contents(zipped) == FILES for _ in range(10))
    assert [results.get() for _ in children] == [True, True]
    for child in children:
        child.join()


def _read_often(archive: ZipArchive, results: "object") -> None:
    try:
        results.put(all(contents(archive) == FILES for _ in range(10)))  # type: ignore[attr-defined]
    except BaseException as error:
        results.put(error)  # type: ignore[attr-defined]


def test_threads_read_at_once(zipped: ZipArchive) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(zipped.read, (f"train/{name}" for name in FILES))) == list(FILES.values())


# ---------------------------------------------------------------- fingerprints


def test_a_zips_fingerprint_follows_content_and_names_not_packing(tmp_path: Path) -> None:
    prints = {
        label: ZipArchive(write_zip(tmp_path / f"{label}.zip", members, how)).fingerprint()
        for label, members, how in [
            ("original", FILES, zipfile.ZIP_STORED),
            ("packed", dict(reversed(FILES.items())), zipfile.ZIP_DEFLATED),
            ("edited", FILES | {"03.jpg": FILES["03.jpg"][:-1] + b"!"}, zipfile.ZIP_STORED),
            ("renamed", {f"x{name}": data for name, data in FILES.items()}, zipfile.ZIP_STORED),
            ("fewer", dict(list(FILES.items())[:-1]), zipfile.ZIP_STORED),
        ]
    }
    assert prints.pop("packed") == prints["original"]
    assert len(set(prints.values())) == len(prints)


def test_a_folders_fingerprint_follows_names_and_sizes(tmp_path: Path) -> None:
    changes = {"original": FILES, "edited": FILES | {"03.jpg": b"!"}, "more": FILES | {"99.jpg": b""}}
    prints = {
        label: FolderArchive(write_folder(tmp_path / label, files)).fingerprint() for label, files in changes.items()
    }
    assert len(set(prints.values())) == len(prints)
    assert prints["original"] == FolderArchive(write_folder(tmp_path / "copy", FILES)).fingerprint()
