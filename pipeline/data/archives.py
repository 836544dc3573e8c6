"""Read the competition's files from zips and folders. Zips are read in place, never unpacked."""

import errno
import lzma
import os
import sys
import threading
import zipfile
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Protocol

from pipeline.competition.image_ids import parse_image_id
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.utils.files import sha256_of

_ZIP_ERRORS = (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, LookupError, RuntimeError, ValueError)
"""What zipfile raises for a corrupt zip."""

IMAGE_ENDINGS = (".jpg", ".jpeg", ".jfif")
MASK_ENDINGS = ("_mask.gif", "_mask.png")
_DATA_ENDINGS = (*IMAGE_ENDINGS, ".gif", ".png", ".csv")
"""Endings, in upper or lower case, of the competition's files and of converted copies."""

_JUNK_NAMES = ("__macosx", "@eadir", "lost+found", "thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r")


def is_junk(path: PurePath) -> bool:
    """Return whether a path is that of an operating system's metadata, which is never read or reported.

    The path is relative to the zip or folder. Hidden files and all files in hidden folders are junk, too.
    """
    return any(part.startswith(".") or part.lower() in _JUNK_NAMES for part in path.parts)


def walk_files(folder: Path, without: Path | None = None) -> Iterator[Path]:
    """Yield the paths, relative to ``folder``, of the files in it and its subfolders, except junk and ``without``.

    Links to folders are followed, unless they lead to a folder that was visited or is a parent of ``folder``. Raises
    OSError if a folder cannot be read.
    """
    root = folder.resolve()
    visited = {root} if without is None else {root, without.resolve()}
    for here, folders, files in os.walk(folder, onerror=_raise, followlinks=True):
        below = Path(here).relative_to(folder)
        new: list[str] = []
        for name in sorted(folders):
            target = Path(here, name).resolve()
            if not is_junk(PurePath(name)) and target not in visited and not root.is_relative_to(target):
                visited.add(target)
                new.append(name)
        folders[:] = new
        yield from (below / name for name in sorted(files) if not is_junk(PurePath(name)))


def _raise(error: OSError) -> None:
    raise error


def files_by_id(archive: "Archive", endings: tuple[str, ...]) -> dict[str, str]:
    """Return the names in ``archive`` with one of the ``endings``, in upper or lower case, by image id.

    Raises CarvanaError if such a file is not named by an image id, if two are of the same image, or if there are only
    other files.
    """
    names = archive.names()
    files: dict[str, str] = {}
    for name in names:
        ending = next((ending for ending in endings if name.lower().endswith(ending)), None)
        if ending is None:
            continue
        image_id = name[: -len(ending)]
        try:
            parse_image_id(image_id)
        except CarvanaError as error:
            raise CarvanaError(f"{name} in {archive.path}: {error} Rename or delete the file.") from error
        if image_id in files:
            both = sorted({*archive.paths(files[image_id]), *archive.paths(name)})
            raise CarvanaError(f"{archive.path} has several files of one image: {', '.join(both)}. Keep one of them.")
        files[image_id] = name
    if names and not files:
        raise CarvanaError(
            f"{archive.path} has {len(names)} files, but none named <image id>{endings[0]}. The first is {names[0]}."
        )
    return files


def other_files(archive: "Archive", used: Collection[str]) -> list[str]:
    """Return the paths of the files in ``archive`` whose names are not among those that are ``used``, sorted."""
    names = set(archive.names()).difference(used)
    return sorted(path for name in names for path in archive.paths(name))


def warn_of_ignored(path: Path, names: Sequence[str]) -> None:
    """Print a warning with the number of files in ``path`` that are not used, and the first of their ``names``."""
    if names:
        shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:3])
        more = ", ..." if len(names) > 3 else ""
        files = "1 file that is" if len(names) == 1 else f"{len(names)} files that are"
        print(f"warning: {path} has {files} not used: {shown}{more}", file=sys.stderr)


class Archive(Protocol):
    """Files by their base name, in a zip or a folder; without metadata files such as ``.DS_Store``."""

    path: Path

    def names(self) -> list[str]:
        """Return the base names of all files, sorted; a name occurs as often as there are files of it."""

    def paths(self, name: str) -> list[str]:
        """Return the paths, within the archive, of all files with this base name."""

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return the bytes of a file, or its first ``limit`` bytes.

        Raises CarvanaError, which names the file, if it is missing, ambiguous or cannot be read, and CorruptFileError
        if its content is not valid.
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
            raise CarvanaError(
                f"{self.path} is not a valid zip ({error}). Download it again, or {_unpack_hint(self.path)}"
            ) from error

    @cached_property
    def _members(self) -> Mapping[str, list[zipfile.ZipInfo]]:
        members: dict[str, list[zipfile.ZipInfo]] = {}
        for info in self._zip.infolist():
            path = _member_path(self.path, info.filename)
            if not info.is_dir() and not is_junk(path):
                members.setdefault(path.name, []).append(info)
        return members

    def names(self) -> list[str]:
        """Return the base names of all members, sorted."""
        return sorted(name for name, members in self._members.items() for _ in members)

    def paths(self, name: str) -> list[str]:
        """Return the paths of all members with this base name."""
        return [member.filename for member in self._members.get(name, ())]

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return the bytes of a member; its CRC is checked unless ``limit`` cuts it short."""
        _check_single(self, name)
        try:
            with self._zip.open(self._members[name][0]) as handle:
                return handle.read(limit)
        except (NotImplementedError, RuntimeError) as error:
            reason = error if isinstance(error, NotImplementedError) else "it is encrypted"
            raise CarvanaError(
                f"{name} in {self.path} cannot be read: {reason}. Instead, {_unpack_hint(self.path)}"
            ) from error
        except (*_ZIP_ERRORS, OSError) as error:
            # Corrupt zips also raise OSError: EINVAL for an offset before the file's start, no errno by decompressors.
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, None):
                raise _io_error(self.path, error) from error
            raise CorruptFileError(f"{name} in {self.path} is corrupt ({error}). Download the zip again.") from error

    def fingerprint(self) -> str:
        """Return a digest of names, sizes and CRCs from the zip's directory; the members are not read."""
        entries = sorted(
            (name, member.file_size, member.CRC) for name, members in self._members.items() for member in members
        )
        return sha256_of(*(f"{name} {size} {crc}".encode() for name, size, crc in entries))


class FolderArchive:
    """A folder of unpacked files; subfolders are included, as in a zip."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _files(self) -> Mapping[str, list[tuple[Path, int]]]:
        """Path and size of each file, by base name."""
        files: dict[str, list[tuple[Path, int]]] = {}
        for relative in walk_files(self.path):
            path = self.path / relative
            files.setdefault(path.name, []).append((path, _size(path)))
        return files

    def names(self) -> list[str]:
        """Return the base names of all files, sorted."""
        return sorted(name for name, files in self._files.items() for _ in files)

    def paths(self, name: str) -> list[str]:
        """Return the paths, relative to the folder, of all files with this base name."""
        return [str(path.relative_to(self.path)) for path, _ in self._files.get(name, ())]

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return the bytes of a file, or its first ``limit`` bytes."""
        _check_single(self, name)
        return _read(self._files[name][0][0], limit)

    def fingerprint(self) -> str:
        """Return a digest of names and sizes; an edit that keeps the size of a file does not change it."""
        entries = sorted((name, size) for name, files in self._files.items() for _, size in files)
        return sha256_of(*(f"{name} {size}".encode() for name, size in entries))


class SingleFile:
    """One file of a folder, without the other files there, such as a manifest that holds this file's fingerprint."""

    def __init__(self, file: Path) -> None:
        self.path = file.parent
        self._file = file

    def names(self) -> list[str]:
        """Return the name of the file."""
        return [self._file.name]

    def paths(self, name: str) -> list[str]:
        """Return the name of the file."""
        return [name]

    def read(self, name: str, limit: int = -1) -> bytes:
        """Return the bytes of the file, or its first ``limit`` bytes; ``name`` may lack an ending such as ``.gz``."""
        return _read(self._file, limit)

    def fingerprint(self) -> str:
        """Return a digest of the content; the competition's single files are small enough to read."""
        return sha256_of(self._file.name.encode(), _read(self._file))


def open_archive(directory: Path, part: str) -> Archive | None:
    """Return the archive of one of the competition's parts in ``directory``, or None if it is not there.

    For a folder of images such as ``train``: ``train.zip`` or ``train``. For a single file such as ``train_masks.csv``:
    its zip, a folder of that name, the file itself, or its gzip. The first one wins. Case does not matter.
    """
    zipped, plain, gzipped = (_entry(directory, name) for name in (f"{part}.zip", part, f"{part}.gz"))
    if zipped is not None and zipped.is_file():
        return ZipArchive(zipped)
    if plain is not None and plain.is_dir():
        return FolderArchive(plain)
    file = plain or gzipped
    return None if file is None else SingleFile(file)


def _entry(directory: Path, name: str) -> Path | None:
    """Return the path of a directory's entry; an entry in other case is returned if there is none in this one."""
    if (directory / name).exists():
        return directory / name
    if not directory.is_dir():
        return None
    return next((path for path in sorted(directory.iterdir()) if path.name.lower() == name.lower()), None)


def _check_single(archive: Archive, name: str) -> None:
    """Raise CarvanaError unless the archive has exactly one file of this base name."""
    paths = archive.paths(name)
    if not paths:
        raise CarvanaError(f"{archive.path} does not contain {name}.")
    if len(paths) > 1:
        raise CarvanaError(f"{archive.path} has several files named {name}: {', '.join(paths)}. Keep one of them.")


def _unpack_hint(archive: Path) -> str:
    return f"unpack the zip to the folder {archive.with_suffix('')}, and delete or rename the zip, which is used first."


def _size(path: Path) -> int:
    """Return the size of a file in bytes; 0 for a dangling link, which is an error only when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _read(path: Path, limit: int = -1) -> bytes:
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


def _member_path(archive: Path, member: str) -> PurePosixPath:
    """Return the path of a member; raises CarvanaError if it is that of a data file and unsafe."""
    path = PurePosixPath(member.replace("\\", "/"))
    # Other members are never read, and no member is ever unpacked.
    if path.suffix.lower() in _DATA_ENDINGS and path.parts[0].lower() not in _JUNK_NAMES:
        if not member.isprintable():
            raise CarvanaError(f"{archive} contains {member!r}, a name with control characters. Do not use this file.")
        if path.is_absolute() or ".." in path.parts or path.parts[0].endswith(":"):
            raise CarvanaError(f"{archive} contains an unsafe path '{member}'. Do not use this file.")
    return path
