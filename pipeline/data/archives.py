"""One reader over zips and folders: names in, bytes out. Zips are read in place, never unpacked."""

import errno
import lzma
import os
import threading
import zipfile
import zlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Protocol

from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.utils.files import sha256_of

_DAMAGED = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, LookupError, RuntimeError, ValueError)
"""What zipfile raises for a damaged, encrypted or otherwise packed zip."""


class Archive(Protocol):
    """Files by their base name, wherever they lie."""

    path: Path

    def names(self) -> list[str]:
        """Return the base names of all files, sorted."""

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return a file's bytes, or its first ``limit`` bytes; raises CarvanaError that names the file."""

    def fingerprint(self) -> str:
        """Return a digest of what the archive holds, cheap enough to take at every start."""


class ZipArchive:
    """A zip, open once per process: workers that fork or unpickle open their own."""

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
        except (*_DAMAGED, OSError) as error:
            raise CarvanaError(f"{self.path} can't be read as a zip ({error}): fetch it again.") from error

    @cached_property
    def _members(self) -> Mapping[str, zipfile.ZipInfo]:
        members: dict[str, zipfile.ZipInfo] = {}
        for info in self._zip.infolist():
            if not info.is_dir():
                members[_safe_base_name(self.path, info.filename, members)] = info
        return members

    def names(self) -> list[str]:
        """Return the base names of all members, sorted."""
        return sorted(self._members)

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return a member's bytes; its CRC is checked when it is read whole."""
        if name not in self._members:
            raise CarvanaError(f"{self.path} has no file {name}.")
        try:
            with self._zip.open(self._members[name]) as handle:
                return handle.read(limit)
        except (*_DAMAGED, OSError) as error:
            # EINVAL: a damaged directory points before the file's start. None: unpackers, not the system, say so.
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, None):
                raise _io_error(self.path, error) from error
            raise CorruptFileError(f"{name} in {self.path} can't be read ({error}): fetch the zip again.") from error

    def fingerprint(self) -> str:
        """Return a digest of names, sizes and CRCs, taken from the zip's directory without reading the members."""
        return sha256_of(*(f"{n} {i.file_size} {i.CRC}".encode() for n, i in sorted(self._members.items())))


class FolderArchive:
    """A folder of unpacked files."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        return {entry.name: entry.stat().st_size for entry in os.scandir(self.path) if entry.is_file()}

    def names(self) -> list[str]:
        """Return the names of all files, sorted."""
        return sorted(self._sizes)

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return a file's bytes."""
        return _read(self.path / name, limit)

    def fingerprint(self) -> str:
        """Return a digest of names and sizes; the bytes are not read, so an edit that keeps the size is not seen."""
        return sha256_of(*(f"{name} {size}".encode() for name, size in sorted(self._sizes.items())))


class SingleFile:
    """One file of a folder; what else lies there, such as a manifest that says what this file is, is none of its."""

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        self._name = name

    def names(self) -> list[str]:
        """Return the one name."""
        return [self._name]

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return the file's bytes."""
        return _read(self.path / name, limit)

    def fingerprint(self) -> str:
        """Return a digest of the bytes: the competition's single files are tables, read in no time."""
        return sha256_of(self._name.encode(), self.read(self._name))


def open_archive(directory: Path, part: str) -> Archive | None:
    """Return the archive of a part such as ``train``, or None.

    Takes ``train.zip``, the folder ``train`` or, as unzip leaves it, ``train/train``; for the single files of the
    competition, ``train_masks.csv.zip`` or ``train_masks.csv``, their own zip or the folder they lie in.
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
        f"{path} can't be read ({error.strerror or error}): see that its drive is there and that it may be read, "
        "then run the same again."
    )


def _safe_base_name(archive: Path, member: str, taken: Mapping[str, object]) -> str:
    if not member.isprintable():
        raise CarvanaError(f"{archive} holds {member!r}, a name with control characters: don't use this file.")
    path = PurePosixPath(member.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or (path.parts and path.parts[0].endswith(":")):
        raise CarvanaError(f"{archive} holds '{member}', a path that climbs out of the zip: don't use this file.")
    if path.name in taken:
        raise CarvanaError(f"{archive} holds two files named {path.name}: fetch it again.")
    return path.name
