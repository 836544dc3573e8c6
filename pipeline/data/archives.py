"""Read the competition's files from zips and folders. Zips are read in place, never unpacked."""

import errno
import lzma
import os
import threading
import zipfile
import zlib
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Protocol

from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.utils.files import sha256_of

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, LookupError, RuntimeError, ValueError)
"""What zipfile raises for a corrupt zip."""

IMAGE_ENDINGS = (".jpg", ".jpeg", ".jfif")
MASK_ENDINGS = ("_mask.gif", "_mask.png")
_DATA_ENDINGS = (*IMAGE_ENDINGS, ".gif", ".png", ".csv")
"""Endings, in upper or lower case, of the competition's files and of converted copies."""

_JUNK_NAMES = ("thumbs.db", "desktop.ini")


def is_junk(name: str) -> bool:
    """Return whether a base name is that of an operating system's metadata file, which is never read or reported."""
    return name.startswith(".") or name.lower() in _JUNK_NAMES


def ids_by_name(names: Iterable[str], endings: tuple[str, ...]) -> dict[str, str]:
    """Return the names with one of the ``endings``, in upper or lower case, by the part before the ending.

    Raises CarvanaError for two names with the same part.
    """
    found: dict[str, str] = {}
    for name in names:
        ending = next((ending for ending in endings if name.lower().endswith(ending)), None)
        if ending is None or is_junk(name):
            continue
        stem = name[: -len(ending)]
        if stem in found:
            raise CarvanaError(f"{found[stem]} and {name} are files of the same image. Delete one.")
        found[stem] = name
    return found


class Archive(Protocol):
    """Files by their base name, in a zip or a folder; without metadata files such as ``.DS_Store``."""

    path: Path

    def names(self) -> list[str]:
        """Return the base names of all files, sorted."""

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return the bytes of a file, or its first ``limit`` bytes.

        Raises CarvanaError, which names the file, if it is missing or cannot be read, and CorruptFileError if its
        content is not valid.
        """

    def fingerprint(self) -> str:
        """Return a digest of the content, cheap enough to compute at every start."""


class ZipArchive:
    """A zip file. Each process opens its own handle, also after a fork or unpickling."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local: tuple[int, zipfile.ZipFile] | None = None
        self._lock = threading.Lock()

    def __getstate__(self) -> dict[str, object]:
        return {"path": self.path}

    def __setstate__(self, state: dict[str, Path]) -> None:
        self.__init__(state["path"])  # type: ignore[misc]

    @property
    def _zip(self) -> zipfile.ZipFile:
        with self._lock:
            if self._local is None or self._local[0] != os.getpid():
                self._local = (os.getpid(), self._open())
            return self._local[1]

    def _open(self) -> zipfile.ZipFile:
        try:
            return zipfile.ZipFile(self.path)
        except (*_ZIP_ERRORS, OSError) as error:
            raise CarvanaError(f"{self.path} is not a valid zip ({error}). Download it again.") from error

    @cached_property
    def _members(self) -> Mapping[str, zipfile.ZipInfo]:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            name = _safe_base_name(self.path, info.filename)
            if info.is_dir() or is_junk(name):
                continue
            if name in members and name.lower().endswith(_DATA_ENDINGS):
                raise CarvanaError(f"{self.path} has two files named {name}. Download it again.")
            members[name] = info
        return members

    def names(self) -> list[str]:
        """Return the base names of all members, sorted."""
        return sorted(self._members)

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return the bytes of a member; its CRC is checked unless ``limit`` cuts it short."""
        if name not in self._members:
            raise CarvanaError(f"{self.path} does not contain {name}.")
        try:
            with self._zip.open(self._members[name]) as handle:
                return handle.read(limit)
        except RuntimeError as error:  # encrypted, or an unknown compression
            folder = self.path.with_suffix("")
            raise CarvanaError(f"{name} in {self.path}: {error}. Unpack the zip to the folder {folder}.") from error
        except (*_ZIP_ERRORS, OSError) as error:
            # Corrupt zips also raise OSError: EINVAL for an offset before the file's start, no errno by decompressors.
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, None):
                raise _io_error(self.path, error) from error
            raise CorruptFileError(f"{name} in {self.path} is corrupt ({error}). Download the zip again.") from error

    def fingerprint(self) -> str:
        """Return a digest of names, sizes and CRCs from the zip's directory; the members are not read."""
        return sha256_of(*(f"{n} {i.file_size} {i.CRC}".encode() for n, i in sorted(self._members.items())))


class FolderArchive:
    """A folder of unpacked files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        return {
            entry.name: entry.stat().st_size
            for entry in os.scandir(self.path)
            if entry.is_file() and not is_junk(entry.name)
        }

    def names(self) -> list[str]:
        """Return the names of all files, sorted."""
        return sorted(self._sizes)

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return the bytes of a file, or its first ``limit`` bytes."""
        return _read(self.path / name, limit)

    def fingerprint(self) -> str:
        """Return a digest of names and sizes; an edit that keeps the size of a file does not change it."""
        return sha256_of(*(f"{name} {size}".encode() for name, size in sorted(self._sizes.items())))


class SingleFile:
    """One file of a folder, without the other files there, such as a manifest that holds this file's fingerprint."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self._name = name

    def names(self) -> list[str]:
        """Return the name of the file."""
        return [self._name]

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return the bytes of the file, or its first ``limit`` bytes."""
        return _read(self.path / name, limit)

    def fingerprint(self) -> str:
        """Return a digest of the content; the competition's single files are small enough to read."""
        return sha256_of(self._name.encode(), self.read(self._name))


def open_archive(directory: Path, part: str) -> Archive | None:
    """Return the archive of one of the competition's parts in ``directory``, or None if it is not there.

    For a folder of images such as ``train``: ``train.zip``, ``train/train`` (as unzip leaves it) or ``train``. For a
    single file such as ``train_masks.csv``: its zip, a folder of that name, or the file itself. The first one wins.
    """
    zipped = directory / f"{part}.zip"
    if zipped.is_file():
        return ZipArchive(zipped)
    for folder in (directory / part / part, directory / part):
        if folder.is_dir():
            return FolderArchive(folder)
    if (directory / part).is_file():
        return SingleFile(directory, part)
    return None


def _read(path: Path, limit: int) -> bytes:
    try:
        with path.open("rb") as handle:
            return handle.read(limit)
    except OSError as error:
        raise _io_error(path, error) from error


def _io_error(path: Path, error: OSError) -> CarvanaError:
    return CarvanaError(
        f"{path} cannot be read ({error.strerror or error}). Check its drive and its permissions, and run the same "
        "command again."
    )


def _safe_base_name(archive: Path, member: str) -> str:
    """Return the base name of a member; raises CarvanaError if its path is unsafe."""
    if not member.isprintable():
        raise CarvanaError(f"{archive} contains {member!r}, a name with control characters. Do not use this file.")
    path = PurePosixPath(member.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
        raise CarvanaError(f"{archive} contains an unsafe path '{member}'. Do not use this file.")
    return path.name
