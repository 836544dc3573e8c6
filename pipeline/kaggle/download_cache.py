"""Files fetched from Kaggle, whole or in part, and the manifest that says which are verified."""

import base64
import errno
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn, Protocol, Self

from tqdm import tqdm

from pipeline.data.archives import ZipArchive
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.kaggle.client import RemoteFile
from pipeline.utils.files import remove_path, write_json
from pipeline.utils.parallel import available_cpus

_BLOCK = 1 << 20

_ZIP_BEGINS = (b"PK\x03\x04", b"PK\x05\x06")


@dataclass(frozen=True)
class FileVersion:
    """What tells one version of a remote file from another, as far as its server says."""

    size: int | None = None
    etag: str | None = None
    modified: str | None = None
    md5: str | None = None
    """Hex digest of the whole file."""

    @classmethod
    def of(cls, headers: Mapping[str, str], size: int | None) -> Self:
        """Return the version that an answer's headers tell, of a file of ``size`` bytes."""
        match = re.search(r"(?:^|[,\s])md5=([A-Za-z0-9+/=]+)", headers.get("x-goog-hash", ""))
        encoded = match[1] if match else headers.get("Content-MD5")
        return cls(size, headers.get("ETag"), headers.get("Last-Modified"), _hex(encoded) if encoded else None)

    def differs(self, other: "FileVersion") -> bool:
        """Return whether anything that both tell is not the same."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return any(mine is not None and theirs is not None and mine != theirs for mine, theirs in pairs)

    @property
    def condition(self) -> str | None:
        """The value for If-Range; weak ETags are not allowed there."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


class PartialDownload:
    """The bytes so far, in a file that survives a kill, and a note of the version that they are of."""

    def __init__(self, file: Path, listing: str) -> None:
        """Take up what is in ``file``; ``listing`` is what Kaggle says of the file now."""
        self.file = file
        self._listing = listing
        self._note = file.with_suffix(".note.part")
        self._digest = hashlib.md5(usedforsecurity=False)
        self.version, self._listing_before = self._read_sidecar()
        if self.version is None or not file.is_file():
            self.restart()
        else:
            with file.open("rb") as stream:
                while block := stream.read(_BLOCK):
                    self._digest.update(block)

    @property
    def size(self) -> int:
        """Bytes so far."""
        return self.file.stat().st_size

    @property
    def md5(self) -> str:
        """Hex digest of the bytes so far."""
        return self._digest.hexdigest()

    @property
    def is_complete(self) -> bool:
        """Whether all bytes are here, of the version that Kaggle lists."""
        return bool(self.version and self.version.size == self.size and self._listing == self._listing_before)

    @property
    def is_zip(self) -> bool:
        """Whether it begins as a zip does."""
        with self.file.open("rb") as stream:
            return stream.read(4) in _ZIP_BEGINS

    def restart(self) -> None:
        """Drop all bytes."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(b"")
        self._digest = hashlib.md5(usedforsecurity=False)
        self.version = None
        self._listing_before = ""
        remove_path(self._note)

    def start(self, version: FileVersion) -> None:
        """Note which version the bytes are of; on disk before the first of them."""
        self.version, self._listing_before = version, self._listing
        write_json(self._note, {"version": asdict(version), "listing": self._listing})

    def add(self, stream: "ByteSink", block: bytes) -> None:
        """Append bytes."""
        stream.write(block)
        self._digest.update(block)

    def finish(self, target: Path) -> None:
        """Give the file its name."""
        with self.file.open("rb") as stream:
            os.fsync(stream.fileno())
        self.file.replace(target)
        remove_path(self._note)

    def _read_sidecar(self) -> tuple[FileVersion | None, str]:
        try:
            note = json.loads(self._note.read_text(encoding="utf-8"))
            return FileVersion(**note["version"]), str(note["listing"])
        except (OSError, ValueError, TypeError, KeyError):
            return None, ""


class ByteSink(Protocol):
    """What takes bytes."""

    def write(self, block: bytes, /) -> object:
        """Take bytes."""


def md5_digest(file: Path) -> str:
    """Return the hex MD5 of a file, which is what Kaggle's storage tells."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def check_zip(file: Path) -> None:
    """Read every member of a zip and hold it against its CRC.

    Raises CorruptFileError for damage, and CarvanaError for a member that climbs out of the zip.
    """
    archive = ZipArchive(file)
    try:
        names = archive.names()
    except CarvanaError as error:
        cause = error.__cause__
        if cause is not None and getattr(cause, "errno", None) in (None, errno.EINVAL):  # else the drive is at fault
            raise CorruptFileError(str(error)) from error
        raise
    # Unpacking and CRCs let other threads run; each has the zip open for itself.
    parts = [names[number :: available_cpus()] for number in range(available_cpus())]
    with (
        ThreadPoolExecutor(available_cpus()) as pool,
        tqdm(total=len(names), desc=f"Verifying {file.name.lstrip('.')}", unit="file", leave=False) as bar,
    ):
        list(pool.map(lambda part: _read_all(ZipArchive(file), part, bar), parts))


def _read_all(archive: ZipArchive, names: list[str], bar: "tqdm[NoReturn]") -> None:
    for name in names:
        archive.read(name)
        bar.update()


def _hex(encoded: str) -> str | None:
    try:
        return base64.b64decode(encoded, validate=True).hex()
    except ValueError:
        return None


DOWNLOAD_MANIFEST = "download_manifest.json"
"""Beside the files: what each is, so that the next run verifies without fetching."""


@dataclass(frozen=True)
class DownloadRecord:
    """What the manifest says of a file here."""

    file: str
    """Its name here."""
    listed: str
    """Its name at Kaggle."""
    size: int
    md5: str
    modified_ns: int
    """When the file here was written; while that and the size stay, its bytes are not read again."""
    listed_size: int
    created: str
    """When Kaggle says that it was put there."""
    etag: str | None


class DownloadCache:
    """The folder of what was fetched, with its manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_verified(self, part: str, thorough: bool = False) -> bool:
        """Return whether the part is here as the manifest says."""
        known = self._manifest().get(part)
        if known is None:
            return False
        try:
            stat = (self.folder / known.file).stat()
        except OSError:
            return False
        if stat.st_size == known.size and stat.st_mtime_ns == known.modified_ns and not thorough:
            return True
        if stat.st_size == known.size and md5_digest(self.folder / known.file) == known.md5:
            if stat.st_mtime_ns != known.modified_ns:
                self._note(part, replace(known, modified_ns=stat.st_mtime_ns))
            return True
        print(f"warning: {self.folder / known.file} is not as it was fetched.", file=sys.stderr)
        return False

    def find_existing(self, part: str, remote: RemoteFile) -> Path | None:
        """Return a zip that lies here, is not in the manifest, and may be what Kaggle lists; or None."""
        file, known = self.folder / f"{part}.zip", self._manifest().get(part)
        if not file.is_file() or (known and not _differs(known, remote)):  # then it is not what the manifest says
            return None
        return file if not remote.size or file.stat().st_size == remote.size else None

    def import_existing(self, part: str, remote: RemoteFile) -> bool:
        """Take a zip that lies here, if it is sound; return whether it was. Of other files nothing tells."""
        file = self.find_existing(part, remote)
        if file is None:
            return False
        try:
            check_zip(file)
        except CarvanaError as error:
            print(f"warning: {error}", file=sys.stderr)
            return False
        self.record(part, file, remote, md5_digest(file), None)
        print(f"{file} was here already, and is sound.")
        return True

    def warn_if_changed(self, part: str, remote: RemoteFile) -> None:
        """Warn where Kaggle has another version than the one that was fetched."""
        known = self._manifest().get(part)
        if known and _differs(known, remote):
            file, since = self.folder / known.file, known.created or "no date"
            hint = f" It stays: to fetch the new one, delete {file}." if file.is_file() else ""
            print(
                f"warning: Kaggle has another {remote.name} now ({megabytes(remote.size)}, of "
                f"{remote.created or 'no date'}) than the one that was fetched (of {since}).{hint}",
                file=sys.stderr,
            )

    def move_aside(self, part: str) -> None:
        """Move aside what lies here under a name of the part: it may be somebody's."""
        for place in (self.folder / f"{part}.zip", self.folder / part):
            if place.exists():
                aside = place.with_name(f"{place.name}.{time.strftime('%Y%m%d-%H%M%S')}.bak")
                place.rename(aside)
                print(f"\nwarning: {place} was in the way, and is {aside.name} now.", file=sys.stderr)

    def partial_size(self, part: str) -> int:
        """Return how many bytes of a part are here, unfinished."""
        file = self.partial(part)
        return file.stat().st_size if file.is_file() else 0

    def partial(self, part: str) -> Path:
        """Return where a part comes in."""
        return self.folder / f".{part}.part"

    def record(self, part: str, file: Path, remote: RemoteFile, md5: str, etag: str | None) -> None:
        """Note what a verified file is."""
        stat = file.stat()
        entry = DownloadRecord(
            file.name, remote.name, stat.st_size, md5, stat.st_mtime_ns, remote.size, remote.created, etag
        )
        self._note(part, entry)

    def _note(self, part: str, entry: DownloadRecord) -> None:
        entries = {**self._manifest(), part: entry}
        write_json(self.folder / DOWNLOAD_MANIFEST, {name: asdict(value) for name, value in sorted(entries.items())})

    def _manifest(self) -> dict[str, DownloadRecord]:
        try:
            content = json.loads((self.folder / DOWNLOAD_MANIFEST).read_text(encoding="utf-8"))
            return {part: DownloadRecord(**entry) for part, entry in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise CarvanaError(
                f"{self.folder / DOWNLOAD_MANIFEST} can't be read ({error}): delete it; zips that are sound stay."
            ) from error


def _differs(known: DownloadRecord, remote: RemoteFile) -> bool:
    return (known.listed_size, known.created) != (remote.size, remote.created)


def megabytes(size: int) -> str:
    """Return a number of bytes in words."""
    return f"{size / 1e6:,.1f} MB"
