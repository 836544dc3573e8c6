"""The submission log (submissions/ledger.csv): rows, provenance, and the correlation of CV and leaderboard scores."""

import csv
import hashlib
import io
import json
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import StatisticsError, correlation
from typing import Any

from filelock import FileLock

from pipeline.errors import CarvanaError
from pipeline.utils.files import read_versioned, write_text

LEDGER_FILE = Path("submissions/ledger.csv")

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
"""Columns of the ledger. Columns added by users are kept."""

PENDING = "pending"
"""Without a reference: it is unknown whether it was submitted. With a reference: waiting for its score."""

NOT_SENT = "not sent"
"""Kaggle does not have it, or rejected it; no submission was used up."""

_FINAL = "complete", "error"

_FROM_GIT = "or restore the file from Git, after copying it (uncommitted rows would be lost)"

_NEVER_CLEARED = "reference", "public_score", "private_score"

LedgerRow = dict[str, str]
"""One submission, by column."""


def utc_now() -> str:
    """Return the current UTC time in ISO 8601, to the second."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


class Ledger:
    """The ledger file. It is read and written as a whole, under a lock, so that concurrent processes lose no rows."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self._lock = FileLock(file.with_name(f".{file.name}.lock"))

    def rows(self) -> list[LedgerRow]:
        """Return all rows, oldest first; raises CarvanaError, naming the line, if the file is invalid."""
        return self._read()[1]

    def add(self, row: Mapping[str, str]) -> None:
        """Append a row."""
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self._lock:
            columns, rows = self._read()
            self._write(columns, [*rows, dict(row)])

    def update(self, row: LedgerRow, changes: Mapping[str, str]) -> LedgerRow:
        """Change cells of a row and return it; a row that was removed meanwhile, such as by Git, is added again.

        An outdated response from Kaggle never clears a score, and never resets a scored row to pending.
        """
        with self._lock:
            columns, rows = self._read()
            found = next((other for other in rows if _is_same(row, other)), None)
            if found is None:
                found = dict.fromkeys(columns, "") | row
                rows.append(found)
            before = dict(found)
            found |= {column: value for column, value in changes.items() if value or column not in _NEVER_CLEARED}
            if before["status"] in _FINAL and changes.get("status") == PENDING:
                found["status"] = before["status"]
            if found != before or row != before:
                self._write(columns, rows)
            return found

    def _read(self) -> tuple[list[str], list[LedgerRow]]:
        try:
            text = read_versioned(self.file)
        except FileNotFoundError:
            return list(LEDGER_COLUMNS), []
        except (OSError, UnicodeDecodeError) as error:
            raise CarvanaError(f"Cannot read {self.file} ({error}). Fix it, {_FROM_GIT}.") from error
        reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
        try:
            columns = list(reader.fieldnames or ())
            missing = [column for column in LEDGER_COLUMNS if column not in columns]
            if missing:
                raise CarvanaError(f"{self.file} has no column {missing[0]}. Add it, {_FROM_GIT}.")
            rows: list[LedgerRow] = []
            for row in reader:
                if None in row or None in row.values():
                    raise CarvanaError(
                        f"{self.file}, line {reader.line_num}, has more or fewer cells than the header. Fix that line "
                        f"(probably a bad Git merge), {_FROM_GIT}."
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
    # Rows added by users have no tag.
    key = "tag" if row["tag"] else "reference"
    return bool(row[key]) and row[key] == other[key]


def is_submitted(row: LedgerRow) -> bool:
    """Return whether Kaggle has the row's submission."""
    return bool(row["reference"])


def is_unresolved(row: LedgerRow) -> bool:
    """Return whether it is unknown if the row's submission reached Kaggle."""
    return row["status"] == PENDING and not row["reference"]


def submission_provenance(project: Path, content_sha256: str, ledger: Path) -> LedgerRow:
    """Return the ledger cells that describe the origin of a CSV with this content.

    ``git_commit`` is the current commit; ``git_clean`` ignores the ledger itself, which every submission changes. The
    hash of dvc.lock and the settings in submission.json are used only if submission.json describes this content.
    Unknown cells stay empty.
    """
    lock, run = project / "dvc.lock", _run_cells(project / "submissions" / "submission.json", content_sha256)
    if run and lock.is_file():
        run["dvc_lock_sha256"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    return {
        "git_commit": _git(project, "rev-parse", "HEAD") or "",
        "git_clean": _clean(project, ledger),
        **run,
    }


def _clean(project: Path, ledger: Path) -> str:
    apart = f":(exclude){ledger.relative_to(project).as_posix()}"
    changed = _git(project, "status", "--porcelain", "--untracked-files=normal", "--", ".", apart)
    return "" if changed is None else "no" if changed else "yes"


def _git(project: Path, *arguments: str) -> str | None:
    """Return git's output, or None without git or a working repository."""
    try:
        run = subprocess.run(["git", *arguments], cwd=project, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _run_cells(file: Path, content_sha256: str) -> LedgerRow:
    try:
        described: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(described, dict) or described.get("content_sha256") != content_sha256:
        return {}
    cv_dice = described.get("own_dice", {})
    nets = described.get("nets", [])
    models = {net.partition("/")[0] for net in nets}
    # Several models are scored out of fold as an ensemble.
    out_of_fold = cv_dice.get("oof", {}).get(models.pop() if len(models) == 1 else "ensemble")
    return {
        "oof_dice": "" if out_of_fold is None else f"{out_of_fold:.6f}",
        "holdout_dice": f"{cv_dice['holdout']:.6f}" if "holdout" in cv_dice else "",
        "nets": " ".join(nets),
        "views": " ".join(described.get("views", ())),
        "merge": " + ".join(map(str, [described.get("merge", ""), *described.get("postprocess", ())])),
        "weights": json.dumps(described["weights"]) if described.get("weights") else "",
        "threshold": str(described.get("threshold", "")),
    }


MIN_SUBMISSIONS = 3
"""Fewest submissions for a correlation."""

CV_COLUMNS = ("holdout_dice", "oof_dice")
"""Columns with cross-validation scores, the more reliable one first."""


@dataclass(frozen=True)
class CvLbCorrelation:
    """Correlation of a cross-validation score with a leaderboard score."""

    cv_column: str
    """``holdout_dice`` or ``oof_dice``."""
    submissions: int
    correlation: float | None
    """Pearson correlation; None if one of the two is constant."""


def cv_lb_correlation(rows: Iterable[LedgerRow], score: str = "public_score") -> list[CvLbCorrelation]:
    """Return the correlation of each CV column with ``score``, for those with enough submissions."""
    rows, found = list(rows), []
    for cv_column in CV_COLUMNS:
        pairs = {
            # Keyed by content, since resubmitting the same file is not a new observation.
            row["content_sha256"]: (mine, theirs)
            for row in rows
            if (mine := parse_number(row[cv_column])) is not None and (theirs := parse_number(row[score])) is not None
        }
        if len(pairs) >= MIN_SUBMISSIONS:
            found.append(CvLbCorrelation(cv_column, len(pairs), _correlation(list(pairs.values()))))
    return found


def parse_number(text: str) -> float | None:
    """Return the number in a cell, or None if there is none."""
    try:
        return float(text)
    except ValueError:
        return None


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    try:
        return correlation(*zip(*pairs, strict=True))
    except StatisticsError:
        return None
