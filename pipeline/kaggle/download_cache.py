"""Files downloaded from Kaggle, complete or partial, and the manifest of verified files."""

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
    """Identifies a version of a remote file, as far as its server reports it."""

    size: int | None = None
    etag: str | None = None
    modified: str | None = None
    md5: str | None = None
    """Hex digest of the whole file."""

    @classmethod
    def of(cls, headers: Mapping[str, str], size: int | None) -> Self:
        """Return the version in a response's headers, for a file of ``size`` bytes."""
        match = re.search(r"(?:^|[,\s])md5=([A-Za-z0-9+/=]+)", headers.get("x-goog-hash", ""))
        encoded = match[1] if match else headers.get("Content-MD5")
        return cls(size, headers.get("ETag"), headers.get("Last-Modified"), _hex(encoded) if encoded else None)

    def differs(self, other: "FileVersion") -> bool:
        """Return whether any property that both know differs."""
        pairs = zip(asdict(self).values(), asdict(other).values(), strict=True)
        return any(mine is not None and theirs is not None and mine != theirs for mine, theirs in pairs)

    @property
    def condition(self) -> str | None:
        """The value for If-Range, which does not allow weak ETags."""
        return self.etag if self.etag and not self.etag.startswith("W/") else self.modified


class PartialDownload:
    """The bytes downloaded so far, in a file that survives a crash, and a sidecar file with their version."""

    def __init__(self, file: Path, listing: str) -> None:
        """Continue with the content of ``file``; ``listing`` describes the file as Kaggle lists it now."""
        self.file = file
        self._listing = listing
        self._sidecar = file.with_suffix(".note.part")
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
        """Number of bytes so far."""
        return self.file.stat().st_size

    @property
    def md5(self) -> str:
        """Hex digest of the bytes so far."""
        return self._digest.hexdigest()

    @property
    def is_complete(self) -> bool:
        """Whether all bytes of the listed version are present."""
        return bool(self.version and self.version.size == self.size and self._listing == self._listing_before)

    @property
    def is_zip(self) -> bool:
        """Whether it starts like a zip."""
        with self.file.open("rb") as stream:
            return stream.read(4) in _ZIP_BEGINS

    def restart(self) -> None:
        """Delete all bytes."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_bytes(b"")
        self._digest = hashlib.md5(usedforsecurity=False)
        self.version = None
        self._listing_before = ""
        remove_path(self._sidecar)

    def start(self, version: FileVersion) -> None:
        """Record the version, on disk before the first byte."""
        self.version, self._listing_before = version, self._listing
        write_json(self._sidecar, {"version": asdict(version), "listing": self._listing})

    def add(self, stream: "ByteSink", block: bytes) -> None:
        """Append bytes."""
        stream.write(block)
        self._digest.update(block)

    def finish(self, target: Path) -> None:
        """Move the complete file to ``target``."""
        with self.file.open("rb") as stream:
            os.fsync(stream.fileno())
        self.file.replace(target)
        remove_path(self._sidecar)

    def _read_sidecar(self) -> tuple[FileVersion | None, str]:
        try:
            note = json.loads(self._sidecar.read_text(encoding="utf-8"))
            return FileVersion(**note["version"]), str(note["listing"])
        except (OSError, ValueError, TypeError, KeyError):
            return None, ""


class ByteSink(Protocol):
    """Anything with a ``write`` method for bytes."""

    def write(self, block: bytes, /) -> object:
        """Write bytes."""


def md5_digest(file: Path) -> str:
    """Return the hex MD5 of a file, the digest that Kaggle's storage reports."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()


def check_zip(file: Path) -> None:
    """Read every member of a zip and check its CRC.

    Raises CorruptFileError if it is damaged, and CarvanaError if it contains an unsafe path.
    """
    archive = ZipArchive(file)
    try:
        paths = archive.paths()
    except CarvanaError as error:
        cause = error.__cause__
        if cause is not None and getattr(cause, "errno", None) in (None, errno.EINVAL):  # otherwise it is a disk error
            raise CorruptFileError(str(error)) from error
        raise
    # Decompression and CRCs release the GIL. Each thread opens the zip itself.
    parts = [paths[number :: available_cpus()] for number in range(available_cpus())]
    with (
        ThreadPoolExecutor(available_cpus()) as pool,
        tqdm(total=len(paths), desc=f"Verifying {file.name.lstrip('.')}", unit="file", leave=False) as bar,
    ):
        list(pool.map(lambda part: _read_all(ZipArchive(file), part, bar), parts))


def _read_all(archive: ZipArchive, paths: list[str], bar: "tqdm[NoReturn]") -> None:
    for path in paths:
        archive.read(path)
        bar.update()


def _hex(encoded: str) -> str | None:
    try:
        return base64.b64decode(encoded, validate=True).hex()
    except ValueError:
        return None


DOWNLOAD_MANIFEST = "download_manifest.json"
"""Manifest next to the files, so that the next run can verify them without downloading."""


@dataclass(frozen=True)
class DownloadRecord:
    """A file's entry in the manifest."""

    file: str
    """Local name."""
    listed: str
    """Name on Kaggle."""
    size: int
    md5: str
    modified_ns: int
    """Local modification time; while it and the size are unchanged, the content is trusted."""
    listed_size: int
    """Size on Kaggle."""
    created: str
    """Creation time on Kaggle."""
    etag: str | None


class DownloadCache:
    """The download folder with its manifest. A *part* is a required file, named without ``.zip``."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def is_verified(self, part: str, thorough: bool = False) -> bool:
        """Return whether the part matches the manifest; ``thorough`` compares MD5 even if size and time match."""
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
                self._write_record(part, replace(known, modified_ns=stat.st_mtime_ns))
            return True
        print(f"warning: {self.folder / known.file} changed after its download.", file=sys.stderr)
        return False

    def find_existing(self, part: str, remote: RemoteFile) -> Path | None:
        """Return an existing zip that is not in the manifest and may be the listed file, or None."""
        file, known = self.folder / f"{part}.zip", self._manifest().get(part)
        if not file.is_file() or (known and not _differs(known, remote)):  # known means: changed since its download
            return None
        return file if not remote.size or file.stat().st_size == remote.size else None

    def import_existing(self, part: str, remote: RemoteFile) -> bool:
        """Add an existing valid zip to the manifest; return whether there is one. Other files cannot be verified."""
        file = self.find_existing(part, remote)
        if file is None:
            return False
        try:
            check_zip(file)
        except CarvanaError as error:
            print(f"warning: {error}", file=sys.stderr)
            return False
        self.record(part, file, remote, md5_digest(file), None)
        print(f"{file} exists already and is valid.")
        return True

    def warn_if_changed(self, part: str, remote: RemoteFile) -> None:
        """Warn if Kaggle lists another version than the downloaded one."""
        known = self._manifest().get(part)
        if known and _differs(known, remote):
            file = self.folder / known.file
            hint = f" To download the new version, delete {file}." if file.is_file() else ""
            print(
                f"warning: {remote.name} changed on Kaggle: now {megabytes(remote.size)}, created "
                f"{remote.created or 'at an unknown time'}; the downloaded version was created "
                f"{known.created or 'at an unknown time'}.{hint}",
                file=sys.stderr,
            )

    def move_aside(self, part: str) -> None:
        """Rename existing files with the part's names; they may be the user's own."""
        for path in (self.folder / f"{part}.zip", self.folder / part):
            if path.exists():
                backup = path.with_name(f"{path.name}.{time.strftime('%Y%m%d-%H%M%S')}.bak")
                path.rename(backup)
                print(f"\nwarning: {path} already exists; renamed to {backup.name}.", file=sys.stderr)

    def partial_size(self, part: str) -> int:
        """Return the size of a part's unfinished download."""
        file = self.partial(part)
        return file.stat().st_size if file.is_file() else 0

    def partial(self, part: str) -> Path:
        """Return the path of a part's unfinished download."""
        return self.folder / f".{part}.part"

    def record(self, part: str, file: Path, remote: RemoteFile, md5: str, etag: str | None) -> None:
        """Add a verified file to the manifest."""
        stat = file.stat()
        entry = DownloadRecord(
            file.name, remote.name, stat.st_size, md5, stat.st_mtime_ns, remote.size, remote.created, etag
        )
        self._write_record(part, entry)

    def _write_record(self, part: str, entry: DownloadRecord) -> None:
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
                f"Cannot read {self.folder / DOWNLOAD_MANIFEST} ({error}). Delete it; valid zips are kept."
            ) from error


def _differs(known: DownloadRecord, remote: RemoteFile) -> bool:
    return (known.listed_size, known.created) != (remote.size, remote.created)


def megabytes(size: int) -> str:
    """Return a number of bytes as MB."""
    return f"{size / 1e6:,.1f} MB"
