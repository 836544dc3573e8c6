"""What the `carvana` commands for Kaggle do."""

import bisect
import json
import sys
from collections.abc import Iterable, Sequence
from functools import partial
from pathlib import Path

from tqdm import tqdm

from pipeline.config import DataSettings
from pipeline.data.competition_data import CompetitionData, data_dir, kaggle_data_dir
from pipeline.errors import CarvanaError
from pipeline.kaggle import downloader
from pipeline.kaggle.api_errors import DOWNLOAD_RETRY, RetryPolicy
from pipeline.kaggle.client import KaggleClient, KaggleSubmission, LeaderboardEntry, SubmissionLimits
from pipeline.kaggle.downloader import ClientFactory
from pipeline.kaggle.ledger import LedgerRow, cv_lb_correlation, parse_number
from pipeline.kaggle.submitter import Submitter, check_message, to_row
from pipeline.submission import validation

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


def download_competition(
    settings: DataSettings, home: Path, *, thorough: bool = False, patience: RetryPolicy | None = None
) -> None:
    """Fetch what the settings ask for, where it is not here and sound."""
    reach = partial(KaggleClient, settings.competition, patience or DOWNLOAD_RETRY)
    downloader.download_files(
        downloader.required_files(settings), kaggle_data_dir(settings, home), reach, thorough=thorough
    )


def preview_competition(settings: DataSettings, home: Path, patience: RetryPolicy | None = None) -> None:
    """Tell what `fetch` would do, and whether it can."""
    reach = partial(KaggleClient, settings.competition, patience)
    if not settings.is_from_kaggle:
        chosen = f"data.directory is {settings.directory}" if settings.directory else "data.source is 'sample'"
        print(f"Note: {chosen}, so that nothing is fetched. With data.source: kaggle and no data.directory:")
    downloader.preview_download(downloader.required_files(settings), kaggle_data_dir(settings, home), reach)


def submit(
    csv: Path,
    message: str,
    settings: DataSettings,
    home: Path,
    *,
    again: bool = False,
    wait: bool = False,
    dry_run: bool = False,
    patience: RetryPolicy | None = None,
) -> None:
    """Check a CSV, send it once, and keep what was sent and its facts; with ``wait``, until it is scored."""
    message = check_message(message)
    if not csv.is_file():
        raise CarvanaError(f"{csv} does not exist: 'dvc repro' makes submissions/submission.csv.gz.")
    kaggle = KaggleClient(settings.competition, patience)
    desk = Submitter(Path.cwd(), kaggle)
    ids = competition_ids(settings, home, lambda: kaggle)
    bar = partial(tqdm, total=len(ids), unit="row", leave=False, disable=None)
    with desk.submission_lock():
        remote = kaggle.submissions()
        arrived = desk.reconcile(remote)
        report = validation.validate_submission(csv, ids, partial(bar, desc="Checking"))
        print(f"{csv} is sound: {report.rows} images, each once. Content, sha256: {report.sha256}")
        for warning in validation.coverage_warnings(report):
            print(f"warning: {warning}", file=sys.stderr)
        # A submission that was cut off and had arrived is what the same command asks for again.
        row = next((row for row in arrived if row["content_sha256"] == report.sha256), None)
        if row:
            print(f"The submission that was cut off had arrived, as {row['reference']}.")
        elif not again:
            row = _sent_before(desk, report.sha256, remote, wait and not dry_run)
        if row is None:
            _print_difference(csv, desk, partial(bar, desc="Comparing"))
            _check_allowance(kaggle.limits())
            if dry_run:
                print("Nothing was sent: without --dry-run it would be now.")
                return
            row = desk.send(csv, report.sha256, message)
            print(
                f"Sent, as {row['reference']}. {desk.ledger.file.relative_to(desk.project)} has it: commit that file."
            )
    if wait:
        _wait(desk, row)
    else:
        print("'carvana submissions' shows its score when there is one.")


def show_submissions(settings: DataSettings, *, as_json: bool, patience: RetryPolicy | None = None) -> None:
    """Show the ledger, its open rows settled and its scores renewed."""
    desk = Submitter(Path.cwd(), KaggleClient(settings.competition, patience))
    unknown = refresh_scores(desk)
    rows = desk.ledger.rows()
    agreed = cv_lb_correlation(rows)
    if as_json:
        content = {
            "submissions": rows,
            "unknown": [vars(found) for found in unknown],
            "agreements": [vars(found) for found in agreed],
        }
        print(json.dumps(content, indent=2))
        return
    print(submissions_table(rows) if rows else "Nothing was sent from here yet: carvana submit -m '...'")
    for found in agreed:
        value = "can't be told, one never changed" if found.correlation is None else f"{found.correlation:.3f}"
        print(f"Correlation of {found.cv_column} with the public score: {value} ({found.submissions} submissions)")
    if unknown:
        print(f"Kaggle has {len(unknown)} more, which this ledger does not know:")
    for other in unknown:
        print(f"  {other.reference}  {other.status}  {other.public_score or '-'}  {other.description}")


def show_leaderboard(
    settings: DataSettings, score: float | None, *, public: bool, patience: RetryPolicy | None = None
) -> None:
    """Show where a score would stand, by default the best of the ledger."""
    kaggle = KaggleClient(settings.competition, patience)
    which = "public" if public else "private"
    if score is None:
        score = best_score(Submitter(Path.cwd(), kaggle).ledger.rows(), public=public)
    if score is None:
        raise CarvanaError(
            f"The ledger has no {which} score yet: run 'carvana submissions' for fresh ones, or give one, such as "
            "'carvana leaderboard 0.9965'. With --public it is about the public board."
        )
    board = kaggle.leaderboard(public=public)
    if not board:
        raise CarvanaError("Kaggle shows no leaderboard of this competition.")
    print(f"{score:.6f} would be number {rank(board, score)} of {len(board) + 1}, on the {which} leaderboard")
    if not public:
        print("(or the public one, while Kaggle does not show the private)")
    print(rows_around(board, score))


def competition_ids(settings: DataSettings, home: Path, reach: ClientFactory) -> list[str]:
    """Return the ids of the competition's own sample_submission.csv, fetched if it is not here.

    Not those of the drawn sample: its submissions are none for Kaggle.
    """
    if settings.directory is not None:
        own = CompetitionData(data_dir(settings, home)).sample_ids
        if own:
            return own
    folder = kaggle_data_dir(settings, home)
    downloader.download_files([downloader.IDS], folder, reach)
    ids = CompetitionData(folder).sample_ids
    if not ids:
        raise CarvanaError(f"The {downloader.IDS} in {folder} lists no image: delete it, and it is fetched again.")
    return ids


def _sent_before(desk: Submitter, content: str, remote: list[KaggleSubmission], wait: bool) -> LedgerRow | None:
    """Return the row of a CSV of this content to wait for, or None; raises CarvanaError if it was sent before."""
    row = desk.sent_before(content)
    if row and wait:
        print(f"This content was sent before, as {row['reference']}: waiting for that.")
        return row
    if row:
        scored = f", and scored {row['public_score']}" if row["public_score"] else ""
        raise CarvanaError(
            f"This content was sent before, on {row['time_utc']} as {row['reference']}{scored}: "
            "--again sends it once more."
        )
    elsewhere = next((found for found in remote if found.description.startswith(f"[{content[:8]}-")), None)
    if elsewhere:
        raise CarvanaError(
            f"This content was sent before, from another place, as {elsewhere.reference} ({elsewhere.description}): "
            "--again sends it once more."
        )
    return None


def _print_difference(csv: Path, desk: Submitter, progress: validation.ProgressBar) -> None:
    last = desk.last_sent()
    if last is None:
        print("There is no earlier submission in the ledger to compare with.")
        return
    reference, file = last
    if not file.is_file():
        print(f"The last submission, {reference}, is not in {file.parent.name}/ here: no comparison with it.")
        return
    try:
        dice = validation.score_submission(csv, file, progress, spill_dir=file.parent).mean
    except (CarvanaError, OSError) as error:
        print(f"There is no comparison with the last submission, {reference}: {error}", file=sys.stderr)
    else:
        print(f"Mean Dice between this and the last submission, {reference}: {dice:.6f}")


def _check_allowance(limits: SubmissionLimits) -> None:
    if limits == SubmissionLimits(0, 0, 0, False):
        print("Kaggle does not say how many are left: so it is before a first submission.", file=sys.stderr)
        return
    if limits.left < 1:
        until = "no more may be sent in all" if limits.of_all else "the next may be sent after midnight, UTC"
        raise CarvanaError(f"Kaggle allows no further submission now, after {limits.made_today} today: {until}.")
    print(f"Kaggle allows {limits.left} more now, after {limits.made_today} today.")


def _wait(desk: Submitter, row: LedgerRow) -> None:
    with tqdm(desc="Waiting for the score", bar_format="{desc}: {elapsed}", leave=False, disable=None) as bar:

        def tell(seconds: float) -> None:
            if bar.disable:  # no terminal
                print(f"Waiting for the score of {row['reference']}: {seconds:.0f} s", file=sys.stderr)
            bar.refresh()

        row = desk.wait(row, tell)
    private = f", private {row['private_score']}" if row["private_score"] else ""
    print(f"Scored: public {row['public_score'] or '(none shown)'}{private}")
