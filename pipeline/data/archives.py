"""Read the competition's files from zips and folders. Zips are read in place, never unpacked."""

import errno
import os
import sys
import threading
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path, PurePath, PurePosixPath
from typing import Protocol

from pipeline.competition.image_ids import parse_image_id
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.submission.csv_file import ZIP_ERRORS
from pipeline.utils.files import sha256_of

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
    """Return the paths in ``archive`` with one of the ``endings``, in upper or lower case, by image id.

    Raises CarvanaError if such a file is not named by an image id, if two are of the same image, or if there are only
    other files.
    """
    paths = archive.paths()
    files: dict[str, str] = {}
    for path in paths:
        ending = next((ending for ending in endings if path.lower().endswith(ending)), None)
        if ending is None:
            continue
        image_id = _posix_path(path).name[: -len(ending)]
        try:
            parse_image_id(image_id)
        except CarvanaError as error:
            raise CarvanaError(f"{path} in {archive.path}: {error} Rename or delete the file.") from error
        if image_id in files:
            raise CarvanaError(
                f"{archive.path} has two files of one image: {files[image_id]}, {path}. Keep one of them."
            )
        files[image_id] = path
    if paths and not files:
        raise CarvanaError(
            f"{archive.path} has {len(paths)} files, but none named <image id>{endings[0]}. The first is {paths[0]}."
        )
    return files


def warn_of_ignored(path: Path, names: Sequence[str]) -> None:
    """Print a warning with the number of files in ``path`` that are not used, and the first of their ``names``."""
    if names:
        shown = ", ".join(name if name.isprintable() else ascii(name) for name in names[:3])
        more = ", ..." if len(names) > 3 else ""
        files = "1 file that is" if len(names) == 1 else f"{len(names)} files that are"
        print(f"warning: {path} has {files} not used: {shown}{more}", file=sys.stderr)


class Archive(Protocol):
    """Files in a zip or a folder, at any depth; without metadata files such as ``.DS_Store``."""

    path: Path

    def paths(self) -> list[str]:
        """Return the paths of all files within the archive, sorted."""

    def read(self, path: str, limit: int = -1) -> bytes:
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
        except (*ZIP_ERRORS, OSError) as error:
            raise CarvanaError(
                f"{self.path} is not a valid zip ({error}). Download it again, or {_unpack_hint(self.path)}"
            ) from error

    @cached_property
    def _members(self) -> list[zipfile.ZipInfo]:
        members = [member for member in self._zip.infolist() if not member.is_dir()]
        return [member for member in members if not is_junk(_member_path(self.path, member.filename))]

    def paths(self) -> list[str]:
        """Return the paths of all members, sorted; zips may contain a path twice."""
        return sorted(member.filename for member in self._members)

    def read(self, path: str, limit: int = -1) -> bytes:
        """Return the bytes of a member; its CRC is checked unless ``limit`` cuts it short."""
        try:
            member = self._zip.getinfo(path)
        except KeyError:
            raise CarvanaError(f"{self.path} does not contain {path}.") from None
        try:
            with self._zip.open(member) as handle:
                return handle.read(limit)
        except RuntimeError as error:
            reason = error if isinstance(error, NotImplementedError) else "it is encrypted"
            raise CarvanaError(
                f"{path} in {self.path} cannot be read: {reason}. Instead, {_unpack_hint(self.path)}"
            ) from error
        except (*ZIP_ERRORS, OSError) as error:
            # Corrupt zips also raise OSError: EINVAL for an offset before the file's start, no errno by decompressors.
            if isinstance(error, OSError) and error.errno not in (errno.EINVAL, None):
                raise _io_error(self.path, error) from error
            raise CorruptFileError(f"{path} in {self.path} is corrupt ({error}). Download the zip again.") from error

    def fingerprint(self) -> str:
        """Return a digest of names, sizes and CRCs from the zip's directory; the members are not read."""
        entries = sorted((_posix_path(member.filename).name, member.file_size, member.CRC) for member in self._members)
        return sha256_of(*(f"{name} {size} {crc}".encode() for name, size, crc in entries))


class FolderArchive:
    """A folder of unpacked files; subfolders are included, as in a zip."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _sizes(self) -> Mapping[str, int]:
        """Size of each file in bytes, by path."""
        return {str(path): _size(self.path / path) for path in walk_files(self.path)}

    def paths(self) -> list[str]:
        """Return the paths of all files, relative to the folder, sorted."""
        return sorted(self._sizes)

    def read(self, path: str, limit: int = -1) -> bytes:
        """Return the bytes of a file, or its first ``limit`` bytes."""
        file = self.path / path
        try:
            with file.open("rb") as handle:
                return handle.read(limit)
        except OSError as error:
            raise _io_error(file, error) from error

    def fingerprint(self) -> str:
        """Return a digest of names and sizes; an edit that keeps the size of a file does not change it."""
        entries = sorted((_posix_path(path).name, size) for path, size in self._sizes.items())
        return sha256_of(*(f"{name} {size}".encode() for name, size in entries))


def open_archive(directory: Path, part: str) -> Archive | None:
    """Return ``train.zip``, or else the folder ``train``, for the part ``train``; None if neither is in ``directory``.

    Case does not matter.
    """
    zipped, folder = _entry(directory, f"{part}.zip"), _entry(directory, part)
    if zipped is not None and zipped.is_file():
        return ZipArchive(zipped)
    return FolderArchive(folder) if folder is not None and folder.is_dir() else None


def find_csv(directory: Path, name: str) -> Path | None:
    """Return the path of one of the competition's CSVs, such as ``train_masks.csv``, or None if it is not there.

    It may have ``.zip`` or ``.gz`` after its name, in upper or lower case, or be in a folder of its name, as some
    programs unpack it. Content shows whether it is compressed, because some browsers unpack a zip and keep its name.
    """
    for file in (f"{name}.zip", name, f"{name}.gz"):
        path = _entry(directory, file)
        if path is not None:
            return path / name if path.is_dir() else path
    return None


def _entry(directory: Path, name: str) -> Path | None:
    """Return the path of a directory's entry; an entry in other case is returned if there is none in this one."""
    if (directory / name).exists():
        return directory / name
    if not directory.is_dir():
        return None
    return next((path for path in sorted(directory.iterdir()) if path.name.lower() == name.lower()), None)


def _unpack_hint(archive: Path) -> str:
    return f"unpack the zip to the folder {archive.with_suffix('')}, and delete or rename the zip, which is used first."


def _size(path: Path) -> int:
    """Return the size of a file in bytes; 0 for a dangling link, which is an error only when it is read."""
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _io_error(path: Path, error: OSError) -> CarvanaError:
    return CarvanaError(
        f"{path} cannot be read ({error.strerror or error}). Check its drive and its permissions, and run the same "
        "command again."
    )


def _posix_path(member: str) -> PurePosixPath:
    return PurePosixPath(member.replace("\\", "/"))  # some programs for Windows write backslashes


def _member_path(archive: Path, member: str) -> PurePosixPath:
    """Return the path of a member; raises CarvanaError if it is that of a data file and unsafe."""
    path = _posix_path(member)
    # Other members are never read, and no member is ever unpacked.
    if path.suffix.lower() in _DATA_ENDINGS and path.parts[0].lower() not in _JUNK_NAMES:
        if not member.isprintable():
            raise CarvanaError(f"{archive} contains {member!r}, a name with control characters. Do not use this file.")
        if path.is_absolute() or ".." in path.parts or path.parts[0].endswith(":"):
            raise CarvanaError(f"{archive} contains an unsafe path '{member}'. Do not use this file.")
    return path
