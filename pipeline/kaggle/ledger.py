"""The submission log: rows, where a submission came from, correlation of CV and leaderboard."""

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
            text = read_versioned(self.file)
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
    # Rows that people add have no tag.
    key = "tag" if row["tag"] else "reference"
    return bool(row[key]) and row[key] == other[key]


def is_submitted(row: LedgerRow) -> bool:
    """Return whether the row stands for a submission that Kaggle has."""
    return bool(row["reference"])


def is_unresolved(row: LedgerRow) -> bool:
    """Return whether it is not known if the row's submission was sent."""
    return row["status"] == PENDING and not row["reference"]


def submission_provenance(project: Path, content_sha256: str, ledger: Path) -> LedgerRow:
    """Return the cells of the ledger that say where a CSV of this content comes from.

    The commit is the one it is sent from; ``git_clean`` leaves the ledger itself out, which every submission changes.
    The hash of ``dvc.lock`` and what ``submission.json`` says are taken only if the latter speaks of this very content:
    a CSV from elsewhere is not of this run. Cells of what is not known stay empty.
    """
    lock, facts = project / "dvc.lock", _facts(project / "submissions" / "submission.json", content_sha256)
    if facts and lock.is_file():
        facts["dvc_lock_sha256"] = hashlib.sha256(lock.read_bytes()).hexdigest()
    return {
        "git_commit": _git(project, "rev-parse", "HEAD") or "",
        "git_clean": _clean(project, ledger),
        **facts,
    }


def _clean(project: Path, ledger: Path) -> str:
    apart = f":(exclude){ledger.relative_to(project).as_posix()}"
    changed = _git(project, "status", "--porcelain", "--untracked-files=normal", "--", ".", apart)
    return "" if changed is None else "no" if changed else "yes"


def _git(project: Path, *arguments: str) -> str | None:
    """Return what git says, or None where there is no git, no repository, or a broken one."""
    try:
        run = subprocess.run(["git", *arguments], cwd=project, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return run.stdout.strip() if run.returncode == 0 else None


def _facts(file: Path, content_sha256: str) -> LedgerRow:
    try:
        described: Any = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    if not isinstance(described, dict) or described.get("content_sha256") != content_sha256:
        return {}
    own = described.get("own_dice", {})
    nets = described.get("nets", [])
    models = {net.partition("/")[0] for net in nets}
    # Several models are scored out of fold as the ensemble merges them.
    out_of_fold = own.get("oof", {}).get(models.pop() if len(models) == 1 else "ensemble")
    return {
        "oof_dice": "" if out_of_fold is None else f"{out_of_fold:.6f}",
        "holdout_dice": f"{own['holdout']:.6f}" if "holdout" in own else "",
        "nets": " ".join(nets),
        "views": " ".join(described.get("views", ())),
        "merge": " + ".join(map(str, [described.get("merge", ""), *described.get("postprocess", ())])),
        "weights": json.dumps(described["weights"]) if described.get("weights") else "",
        "threshold": str(described.get("threshold", "")),
    }


MIN_SUBMISSIONS = 3
"""Submissions that a correlation takes."""

CV_COLUMNS = ("holdout_dice", "oof_dice")
"""Columns of own Dices, the better guide first."""


@dataclass(frozen=True)
class CvLbCorrelation:
    """How far an own score foretells the public one."""

    cv_column: str
    """``holdout_dice`` or ``oof_dice``."""
    submissions: int
    correlation: float | None
    """Pearson's, -1 to 1; None where one of the two never changed."""


def cv_lb_correlation(rows: Iterable[LedgerRow], score: str = "public_score") -> list[CvLbCorrelation]:
    """Return the correlation of each own Dice with a score, once there are three submissions with both."""
    rows, found = list(rows), []
    for own in CV_COLUMNS:
        pairs = {
            # The same content sent again is no second observation.
            row["content_sha256"]: (mine, theirs)
            for row in rows
            if (mine := parse_number(row[own])) is not None and (theirs := parse_number(row[score])) is not None
        }
        if len(pairs) >= MIN_SUBMISSIONS:
            found.append(CvLbCorrelation(own, len(pairs), _correlation(list(pairs.values()))))
    return found


def parse_number(text: str) -> float | None:
    """Return a cell's number, or None where it holds none."""
    try:
        return float(text)
    except ValueError:
        return None


def _correlation(pairs: Sequence[tuple[float, float]]) -> float | None:
    try:
        return correlation(*zip(*pairs, strict=True))
    except StatisticsError:
        return None
