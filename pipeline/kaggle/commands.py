"""The Kaggle commands: download, submit, submissions, leaderboard."""

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
from pipeline.utils.terminal import print_table

_SHOWN = ("time_utc", "reference", "status", "public_score", "private_score", "holdout_dice", "oof_dice", "description")


def refresh_scores(submitter: Submitter) -> list[KaggleSubmission]:
    """Update all ledger rows from Kaggle; return submissions that are not in the ledger."""
    remote = submitter.kaggle.submissions()
    submitter.reconcile(remote)
    by_reference = {str(found.reference): found for found in remote}
    known = set()
    for row in submitter.ledger.rows():
        found = by_reference.get(row["reference"])
        if found:
            known.add(found.reference)
            submitter.ledger.update(row, to_row(found))
    return [found for found in remote if found.reference not in known]


def print_submissions(rows: Sequence[LedgerRow]) -> None:
    """Print ledger rows as a table, oldest first, and below it why submissions failed."""
    heads = [column.removesuffix("_utc").replace("_", " ") for column in _SHOWN]
    print_table(heads, [[row[column] for column in _SHOWN] for row in rows])
    for row in rows:
        if row["error"]:
            print(f"  {row['reference'] or row['time_utc']}: {row['error']}")


def rank(board: Sequence[LeaderboardEntry], score: float) -> int:
    """Return the rank, from 1, that a score would have; equal scores share the better rank."""
    ascending = sorted(entry.score for entry in board)
    return len(ascending) - bisect.bisect_right(ascending, score) + 1


def best_score(rows: Iterable[LedgerRow], *, public: bool) -> float | None:
    """Return the best score in the ledger, or None if there is none."""
    column = "public_score" if public else "private_score"
    scores = [score for row in rows if (score := parse_number(row[column])) is not None]
    return max(scores, default=None)


def rows_around(board: Sequence[LeaderboardEntry], score: float, around: int = 3) -> list[tuple[str, str, str]]:
    """Return rank, score and team of the top of the leaderboard and around a score, with a row for the score itself."""
    ranked = sorted(board, key=lambda entry: -entry.score)
    mine = rank(board, score)
    chosen = sorted({*range(1, 4), *range(mine - around, mine + around)} & set(range(1, len(ranked) + 1)))
    rows = [(number, ranked[number - 1].score, ranked[number - 1].team) for number in chosen]
    rows.insert(sum(number < mine for number in chosen), (mine, score, "<- here"))
    return [(str(number), f"{value:.6f}", team) for number, value, team in rows]


def download_competition(
    settings: DataSettings, home: Path, *, thorough: bool = False, policy: RetryPolicy | None = None
) -> None:
    """Download the required files that are missing or damaged; ``thorough`` verifies existing ones byte by byte."""
    client = partial(KaggleClient, settings.competition, policy or DOWNLOAD_RETRY)
    downloader.download_files(
        downloader.required_files(settings), kaggle_data_dir(settings, home), client, thorough=thorough
    )


def preview_competition(settings: DataSettings, home: Path, policy: RetryPolicy | None = None) -> None:
    """Print what `download_competition` would download; raises CarvanaError if it would fail."""
    client = partial(KaggleClient, settings.competition, policy)
    if not settings.is_from_kaggle:
        chosen = f"data.directory is {settings.directory}" if settings.directory else "data.source is 'sample'"
        print(f"Note: {chosen}, so nothing is downloaded. With data.source: kaggle and no data.directory:")
    downloader.preview_download(downloader.required_files(settings), kaggle_data_dir(settings, home), client)


def submit(
    csv: Path,
    message: str,
    settings: DataSettings,
    home: Path,
    *,
    again: bool = False,
    wait: bool = False,
    dry_run: bool = False,
    policy: RetryPolicy | None = None,
) -> None:
    """Validate a CSV, submit it once, and log it in the ledger; with ``wait``, wait for its score.

    Raises CarvanaError if the CSV is invalid, was submitted before (unless ``again``), or Kaggle rejects it.
    """
    message = check_message(message)
    if not csv.is_file():
        raise CarvanaError(f"{csv} does not exist. 'dvc repro' creates submissions/submission.csv.gz.")
    kaggle = KaggleClient(settings.competition, policy)
    submitter = Submitter(Path.cwd(), kaggle)
    ids = competition_ids(settings, home, lambda: kaggle)
    bar = partial(tqdm, total=len(ids), unit="row", leave=False, disable=None)
    with submitter.submission_lock():
        remote = kaggle.submissions()
        arrived = submitter.reconcile(remote)
        report = validation.validate_submission(csv, ids, partial(bar, desc="Checking"))
        print(f"{csv} is valid: {report.rows} images. SHA-256 of its content: {report.sha256}")
        for warning in report.warnings:
            print(f"warning: {warning}", file=sys.stderr)
        # An interrupted submission that did arrive counts as the one requested now.
        row = next((row for row in arrived if row["content_sha256"] == report.sha256), None)
        if row:
            print(f"The interrupted submission had arrived, as {row['reference']}.")
        elif not again:
            row = _sent_before(submitter, report.sha256, remote, wait and not dry_run)
        if row is None:
            _print_difference(csv, submitter, partial(bar, desc="Comparing"))
            _check_allowance(kaggle.limits())
            if dry_run:
                print("Nothing was submitted (--dry-run).")
                return
            row = submitter.send(csv, report.sha256, message)
            print(
                f"Submitted as {row['reference']}. Commit {submitter.ledger.file.relative_to(submitter.project)}, "
                "which logs it."
            )
    if wait:
        _wait(submitter, row)
    else:
        print("See its score with 'carvana submissions'.")


def show_submissions(settings: DataSettings, *, as_json: bool, policy: RetryPolicy | None = None) -> None:
    """Print the ledger with updated scores."""
    submitter = Submitter(Path.cwd(), KaggleClient(settings.competition, policy))
    unknown = refresh_scores(submitter)
    rows = submitter.ledger.rows()
    correlations = cv_lb_correlation(rows)
    if as_json:
        content = {
            "submissions": rows,
            "unknown": [vars(found) for found in unknown],
            "correlations": [vars(found) for found in correlations],
        }
        print(json.dumps(content, indent=2))
        return
    if rows:
        print_submissions(rows)
    else:
        print("No submissions from this project yet. Submit with: carvana submit -m '...'")
    for found in correlations:
        value = "undefined, one of them is constant" if found.correlation is None else f"{found.correlation:.3f}"
        print(f"Correlation of {found.cv_column} with the public score: {value} ({found.submissions} submissions)")
    if unknown:
        print(f"{len(unknown)} more submissions on Kaggle that are not in this ledger:")
    for other in unknown:
        print(f"  {other.reference}  {other.status}  {other.public_score or '-'}  {other.description}")


def show_leaderboard(
    settings: DataSettings, score: float | None, *, public: bool, policy: RetryPolicy | None = None
) -> None:
    """Print the rank that a score would have, by default the best in the ledger."""
    kaggle = KaggleClient(settings.competition, policy)
    which = "public" if public else "private"
    if score is None:
        score = best_score(Submitter(Path.cwd(), kaggle).ledger.rows(), public=public)
    if score is None:
        raise CarvanaError(
            f"The ledger has no {which} score yet. Run 'carvana submissions' to update it, or give a score, such as "
            "'carvana leaderboard 0.9965'. For the public leaderboard add --public."
        )
    board = kaggle.leaderboard(public=public)
    if not board:
        raise CarvanaError("Kaggle shows no leaderboard for this competition.")
    print(f"{score:.6f} would rank {rank(board, score)} of {len(board) + 1} on the {which} leaderboard")
    if not public:
        print("(or the public one, if Kaggle does not show the private one)")
    print_table(["rank", "score", "team"], rows_around(board, score), right=["rank"])


def competition_ids(settings: DataSettings, home: Path, client: ClientFactory) -> list[str]:
    """Return the ids in the competition's sample_submission.csv, which is downloaded if missing.

    Never those of the synthetic sample, which cannot be submitted.
    """
    if settings.directory is not None:
        own = CompetitionData(data_dir(settings, home)).sample_ids
        if own:
            return own
    folder = kaggle_data_dir(settings, home)
    downloader.download_files([downloader.IDS], folder, client)
    ids = CompetitionData(folder).sample_ids
    if not ids:
        raise CarvanaError(f"{folder / downloader.IDS} lists no images. Delete it; it is downloaded again.")
    return ids


def _sent_before(submitter: Submitter, content: str, remote: list[KaggleSubmission], wait: bool) -> LedgerRow | None:
    """Return the row of an earlier submission with this content to ``wait`` for; None if there is none.

    Raises CarvanaError if there is one and ``wait`` is false.
    """
    row = submitter.sent_before(content)
    if row and wait:
        print(f"This content was submitted before, as {row['reference']}. Waiting for its score.")
        return row
    if row:
        scored = f" (score {row['public_score']})" if row["public_score"] else ""
        raise CarvanaError(
            f"This content was submitted before, on {row['time_utc']} as {row['reference']}{scored}. "
            "Use --again to submit it once more."
        )
    elsewhere = next((found for found in remote if found.description.startswith(f"[{content[:8]}-")), None)
    if elsewhere:
        raise CarvanaError(
            f"This content was submitted before, from another copy of the project, as {elsewhere.reference} "
            f"({elsewhere.description}). Use --again to submit it once more."
        )
    return None


def _print_difference(csv: Path, submitter: Submitter, progress: validation.ProgressBar) -> None:
    last = submitter.last_sent()
    if last is None:
        print("No earlier submission to compare with.")
        return
    reference, file = last
    if not file.is_file():
        print(f"No comparison with the last submission, {reference}: its file is not in {file.parent.name}/.")
        return
    try:
        dice = validation.score_submission(csv, file, progress, spill_dir=file.parent).mean
    except (CarvanaError, OSError) as error:
        print(f"No comparison with the last submission, {reference}: {error}", file=sys.stderr)
    else:
        print(f"Mean Dice between this and the last submission, {reference}: {dice:.6f}")


def _check_allowance(limits: SubmissionLimits) -> None:
    if limits == SubmissionLimits(0, 0, 0, False):
        # Kaggle reports only zeros before a first submission.
        print("The number of submissions left is unknown.", file=sys.stderr)
        return
    if limits.left < 1:
        until = "the total limit is reached" if limits.limited_by_total else "try again after midnight UTC"
        raise CarvanaError(f"No submissions left ({limits.made_today} made today): {until}.")
    print(f"Submissions left: {limits.left} ({limits.made_today} made today).")


def _wait(submitter: Submitter, row: LedgerRow) -> None:
    with tqdm(desc="Waiting for the score", bar_format="{desc}: {elapsed}", leave=False, disable=None) as bar:

        def on_wait(seconds: float) -> None:
            if bar.disable:  # no terminal
                print(f"Waiting for the score of {row['reference']}: {seconds:.0f} s", file=sys.stderr)
            bar.refresh()

        row = submitter.wait(row, on_wait)
    private = f", private {row['private_score']}" if row["private_score"] else ""
    print(f"Score: public {row['public_score'] or '(not shown)'}{private}")
