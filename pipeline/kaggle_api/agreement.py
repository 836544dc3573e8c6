"""How far an own Dice foretells a score of Kaggle's, by the ledger alone."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import StatisticsError, correlation

from pipeline.kaggle_api.ledger import LedgerRow

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
