"""The folder of what was fetched, with a manifest that says what each file is."""

import json
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pipeline.errors import CarvanaError
from pipeline.files import write_json
from pipeline.kaggle_api.client import RemoteFile
from pipeline.kaggle_api.partial import check_zip, md5_digest

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
