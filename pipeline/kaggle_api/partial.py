"""A file on its way here: what has come so far, of which version, and whether it is what was sent."""

import base64
import errno
import hashlib
import json
import os
import re
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn, Protocol, Self

from tqdm import tqdm

from pipeline.cores import available_cpus
from pipeline.data.archive import ZipArchive
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.files import remove_path, write_json

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
