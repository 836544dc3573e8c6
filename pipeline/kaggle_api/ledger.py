"""submissions/ledger.csv: what was sent to Kaggle, from which state of the project, and what it scored."""

import csv
import io
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path

from filelock import FileLock

from pipeline.errors import CarvanaError
from pipeline.files import write_text

LEDGER_COLUMNS = (
    "time_utc",
    "reference",
    "tag",
    "status",
    "public_score",
    "private_score",
    "oof_dice",
    "holdout_dice",
    "description",
    "content_sha256",
    "git_commit",
    "git_clean",
    "dvc_lock_sha256",
    "nets",
    "views",
    "merge",
    "weights",
    "threshold",
    "error",
)
"""Columns; those that people add stay as they are."""

PENDING = "pending"
"""Not settled: without a reference it may or may not have been sent, with one it waits for its score."""

NOT_SENT = "not sent"
"""Kaggle does not have it, or refused it: no submission was spent."""

_FINAL = "complete", "error"

_FROM_GIT = "or take the file from git, after you copied it: rows that are not committed would be lost"

_ONCE_KNOWN = "reference", "public_score", "private_score"

LedgerRow = dict[str, str]
"""One submission, by column."""


def utc_now() -> str:
    """Return the time in UTC, to the second, ISO 8601."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Ledger:
    """The file, read and written whole, under a lock: two at once neither tear it nor lose each other's rows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = FileLock(file.with_name(f".{file.name}.lock"))

    def rows(self) -> list[LedgerRow]:
        """Return all rows, oldest first; raises CarvanaError that names the line of a damaged file."""
        return self._read()[1]

    def add(self, row: Mapping[str, str]) -> None:
        """Append a row."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            columns, rows = self._read()
            self._write(columns, [*rows, dict(row)])

    def update(self, row: LedgerRow, changes: Mapping[str, str]) -> LedgerRow:
        """Change cells of a row and return it; one that was taken out meanwhile, by git maybe, comes back.

        What is known stays known: an older answer of Kaggle's makes no score empty, and nothing scored pending again.
        """
        with self._lock:
            columns, rows = self._read()
            found = next((other for other in rows if _is_same(row, other)), None)
            if found is None:
                found = dict.fromkeys(columns, "") | row
                rows.append(found)
            before = dict(found)
            found |= {column: value for column, value in changes.items() if value or column not in _ONCE_KNOWN}
            if before["status"] in _FINAL and changes.get("status") == PENDING:
                found["status"] = before["status"]
            if found != before or row != before:
                self._write(columns, rows)
            return found

    def _read(self) -> tuple[list[str], list[LedgerRow]]:
        try:
            text = self.file.read_text(encoding="utf-8-sig")  # with the mark that spreadsheets set
        except FileNotFoundError:
            return list(LEDGER_COLUMNS), []
        except (OSError, UnicodeDecodeError) as error:
            raise CarvanaError(f"{self.file} can't be read ({error}): fix it, {_FROM_GIT}.") from error
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            columns = list(reader.fieldnames or ())
            missing = [column for column in LEDGER_COLUMNS if column not in columns]
            if missing:
                raise CarvanaError(f"{self.file} has no column {missing[0]}: put it back, {_FROM_GIT}.")
            rows: list[LedgerRow] = []
            for row in reader:
                if None in row or None in row.values():
                    raise CarvanaError(
                        f"{self.file}, line {reader.line_num}, has more or fewer cells than the header: fix it "
                        f"(a merge of two branches, maybe), {_FROM_GIT}."
                    )
                rows.append(dict(row))
        except csv.Error as error:
            raise CarvanaError(f"{self.file}, line {reader.line_num}: {error}. Fix it, {_FROM_GIT}.") from None
        return columns, rows

    def _write(self, columns: list[str], rows: list[LedgerRow]) -> None:
        text = io.StringIO(newline="")
        writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_text(self.file, text.getvalue())


def _is_same(row: LedgerRow, other: LedgerRow) -> bool:
    # Rows that people add have no tag.
    key = "tag" if row["tag"] else "reference"
    return bool(row[key]) and row[key] == other[key]


def is_submitted(row: LedgerRow) -> bool:
    """Return whether the row stands for a submission that Kaggle has."""
    return bool(row["reference"])


def is_unresolved(row: LedgerRow) -> bool:
    """Return whether it is not known if the row's submission was sent."""
    return row["status"] == PENDING and not row["reference"]
