"""What the submissions scored, and where that stands."""

import bisect
from collections.abc import Iterable, Sequence

from pipeline.kaggle_api.agreement import parse_number
from pipeline.kaggle_api.client import KaggleSubmission, LeaderboardEntry
from pipeline.kaggle_api.ledger import LedgerRow
from pipeline.kaggle_api.submit import Submitter, to_row

_SHOWN = ("time_utc", "reference", "status", "public_score", "private_score", "holdout_dice", "oof_dice", "description")


def refresh_scores(desk: Submitter) -> list[KaggleSubmission]:
    """Settle and renew all rows of the ledger; return the submissions that Kaggle has and it does not know."""
    remote = desk.kaggle.submissions()
    desk.reconcile(remote)
    by_reference = {str(found.reference): found for found in remote}
    known = set()
    for row in desk.ledger.rows():
        found = by_reference.get(row["reference"])
        if found:
            known.add(found.reference)
            desk.ledger.update(row, to_row(found))
    return [found for found in remote if found.reference not in known]


def submissions_table(rows: Sequence[LedgerRow]) -> str:
    """Return the rows for a terminal, oldest first."""
    heads = [column.removesuffix("_utc").replace("_", " ") for column in _SHOWN]
    lines = [heads, *([row[column] for column in _SHOWN] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    text = ("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in lines)
    notes = (f"  {row['reference'] or row['time_utc']}: {row['error']}" for row in rows if row["error"])
    return "\n".join(line.rstrip() for line in (*text, *notes))


def rank(board: Sequence[LeaderboardEntry], score: float) -> int:
    """Return the place, from 1, that a score would have; equal scores share the better place."""
    ascending = sorted(entry.score for entry in board)
    return len(ascending) - bisect.bisect_right(ascending, score) + 1


def best_score(rows: Iterable[LedgerRow], *, public: bool) -> float | None:
    """Return the best score of the ledger, or None if there is none."""
    column = "public_score" if public else "private_score"
    scores = [score for row in rows if (score := parse_number(row[column])) is not None]
    return max(scores, default=None)


def rows_around(board: Sequence[LeaderboardEntry], score: float, around: int = 3) -> str:
    """Return the board's first places and those around a score, for a terminal."""
    ranked = sorted(board, key=lambda entry: -entry.score)
    mine = rank(board, score)
    chosen = sorted({*range(1, 4), *range(mine - around, mine + around)} & set(range(1, len(ranked) + 1)))
    lines = []
    for number in chosen:
        if number == mine:
            lines.append(f"{mine:>6}  {score:.6f}  <- here")
        lines.append(f"{number:>6}  {ranked[number - 1].score:.6f}  {ranked[number - 1].team}")
    if mine > len(ranked):
        lines.append(f"{mine:>6}  {score:.6f}  <- here")
    return "\n".join(lines)
