"""A submission that is checked, kept, sent once, and remembered."""

import gzip
import shutil
import stat
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from pipeline.errors import CarvanaError
from pipeline.kaggle import client
from pipeline.kaggle.api_errors import KaggleError, NotSentError, OutcomeUnknownError, RejectedError, printable
from pipeline.kaggle.client import KaggleClient
from pipeline.kaggle.ledger import (
    LEDGER_FILE,
    NOT_SENT,
    PENDING,
    Ledger,
    LedgerRow,
    is_submitted,
    is_unresolved,
    submission_provenance,
    utc_now,
)
from pipeline.kaggle.transfer import upload
from pipeline.submission import csv_file
from pipeline.utils.files import atomic_write, link_or_copy, remove_path

SUBMISSIONS_DIR = Path("submissions")
SENT_DIR = SUBMISSIONS_DIR / "sent"

_LONGEST_MESSAGE = 250

_UNKNOWN_AT_FIRST_S = 60

_LOOK_AGAIN = (
    "The submission is not at Kaggle so far: run the same again in a minute, which looks once more before it sends."
)

_LEVEL = 5
"""Of gzip: within a few percent of the smallest, in half the time."""

_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class Submitter:
    """The project's submissions: the ledger, what was sent, and Kaggle."""

    def __init__(self, project: Path, kaggle: KaggleClient) -> None:
        self.project = project
        self.kaggle = kaggle
        self.ledger = Ledger(project / LEDGER_FILE)
        self.sent = project / SENT_DIR
        self._sending = FileLock(project / SUBMISSIONS_DIR / ".sending.lock")

    @contextmanager
    def submission_lock(self) -> Iterator[None]:
        """Hold the desk while something is sent; another who sends is waited for."""
        self._sending_folder()
        try:
            self._sending.acquire(timeout=0)
        except Timeout:
            print("Another submission is on its way: waiting for it.", file=sys.stderr)
            self._sending.acquire()
        try:
            yield
        finally:
            self._sending.release()

    def reconcile(self, remote: list[client.KaggleSubmission]) -> list[LedgerRow]:
        """Settle the rows that a crash left open, if nobody is sending now; return those that Kaggle has.

        ``remote`` is what Kaggle listed. A row that was given up is taken back should Kaggle have it after all.
        """
        self._sending_folder()
        arrived = []
        try:
            with self._sending.acquire(timeout=0):
                for row in self.ledger.rows():
                    if is_submitted(row) or not row["tag"]:
                        continue
                    found = find_by_tag(remote, row["tag"])
                    if not found and is_unresolved(row):
                        print(f"The submission of {row['time_utc']} was cut off: looking for it.", file=sys.stderr)
                        # Looked up again, since one that was under way may come a little later.
                        found = self._look_up(row["tag"])
                    settled = self.ledger.update(row, to_row(found) if found else {"status": NOT_SENT})
                    arrived += [settled] if found else []
        except Timeout:
            pass
        return arrived

    def send(self, csv: Path, content: str, message: str) -> LedgerRow:
        """Send a CSV that was checked, once, and return its row; raises KaggleError if Kaggle does not have it then.

        ``content`` is the hash that the check gave. Call within `sending`. The row is written before anything is sent,
        so that a crash at any point leaves one that the next command settles.
        """
        # Of the content, to be told by eye, and of this attempt, so that a retry can look for it.
        tag = f"{content[:8]}-{uuid.uuid4().hex[:8]}"
        kept = self._archive(csv, content)
        row = {
            "time_utc": utc_now(),
            "reference": "",
            "tag": tag,
            "status": PENDING,
            "description": message,
            "content_sha256": content,
            **submission_provenance(self.project, content, self.project / LEDGER_FILE),
        }
        self.ledger.add(row)
        try:
            token = upload(self.kaggle, kept, f"{csv.name.partition('.')[0]}.csv.gz")
        except CarvanaError as error:
            self.ledger.update(row, {"status": NOT_SENT, "error": str(error)})
            raise
        return self.ledger.update(row, to_row(self._create(row, token, message)))

    def wait(self, row: LedgerRow, tell: Callable[[float], object]) -> LedgerRow:
        """Ask for a submission until it is scored, telling the seconds so far, and return its row.

        Raises KaggleError if Kaggle calls it an error, or if that takes longer than an hour.
        """
        patience = self.kaggle.patience
        began, pause = time.monotonic(), patience.first_poll_s
        while (found := self._scored(int(row["reference"]), time.monotonic() - began)) is None:
            waited = time.monotonic() - began
            if waited > patience.longest_wait_s:
                raise KaggleError(
                    f"No score of {row['reference']} after {waited / 60:.0f} minutes: it is sent, and its score comes "
                    "by itself; 'carvana submissions' shows it."
                )
            tell(waited)
            time.sleep(pause)
            pause = min(pause * 1.5, 30.0)
        row = self.ledger.update(row, to_row(found))
        if found.status == "error":
            raise KaggleError(
                f"Kaggle could not score submission {row['reference']}: {found.error or 'it gives no reason'}. "
                "The page of your submissions may tell more."
            )
        return row

    def sent_before(self, content: str) -> LedgerRow | None:
        """Return the last row of a CSV of this content that Kaggle has, or None."""
        before = [row for row in self.ledger.rows() if row["content_sha256"] == content and is_submitted(row)]
        return before[-1] if before else None

    def last_sent(self) -> tuple[str, Path] | None:
        """Return reference and place of the CSV that was sent last, or None if none was."""
        spent = [row for row in self.ledger.rows() if is_submitted(row) and row["content_sha256"]]
        return (spent[-1]["reference"], self._place(spent[-1]["content_sha256"])) if spent else None

    def _scored(self, reference: int, waited_s: float) -> client.KaggleSubmission | None:
        try:
            found = self.kaggle.submission(reference)
        except RejectedError as error:
            # Just made, it may not be known everywhere at Kaggle.
            if error.status == 404 and waited_s < _UNKNOWN_AT_FIRST_S:
                return None
            raise
        except (NotSentError, OutcomeUnknownError) as error:  # it is sent: a network that is away ends no waiting
            print(error, file=sys.stderr)
            return None
        return None if found.status == PENDING else found

    def _place(self, content: str) -> Path:
        return self.sent / f"{content}.csv.gz"

    def _sending_folder(self) -> None:
        (self.project / SUBMISSIONS_DIR).mkdir(exist_ok=True)

    def _archive(self, csv: Path, content: str) -> Path:
        """Put a gzipped copy of a CSV where it stays as it was sent, named by its content, and return it."""
        kept = self._place(content)
        for left_by_a_kill in self.sent.glob(".*.part"):
            remove_path(left_by_a_kill)
        if kept.is_file() and csv_file.content_digest(kept) == content:
            return kept
        with atomic_write(kept) as temporary:
            _copy_packed(csv, temporary)
            if csv_file.content_digest(temporary, compression=".gz") != content:
                raise CarvanaError(f"{csv} changed after it was checked: run the same again when it is whole.")
        return kept

    def _create(self, row: LedgerRow, token: str, message: str) -> client.KaggleSubmission:
        """Submit the upload, and return what Kaggle has then.

        Submitted again only where the connection broke, and a look did not find it. What may be done yet is left open,
        for the next command to look for. Raises KaggleError where Kaggle has no submission, as far as is known.
        """
        description = f"[{row['tag']}] {message}"
        for last in (False, True):
            try:
                reference, said = self.kaggle.create(token, description)
            except OutcomeUnknownError as error:
                print(f"{error} Looking whether the submission arrived.", file=sys.stderr)
                found = self._find_or_defer(row["tag"], error.asked_s)
                if found:
                    return found
                if last or error.slow:
                    raise OutcomeUnknownError(f"{error} {_LOOK_AGAIN}") from None
            except CarvanaError as error:
                # The first try may have arrived after all, and be what Kaggle refuses the second for.
                found = self._find_or_defer(row["tag"]) if last else None
                if found:
                    return found
                if last:
                    raise OutcomeUnknownError(f"{error} {_LOOK_AGAIN}") from None
                self.ledger.update(row, {"status": NOT_SENT, "error": str(error)})
                raise
            else:
                if reference:
                    return client.KaggleSubmission(reference, description, PENDING, "", "", "")
                found = self._find_or_defer(row["tag"])
                if found:
                    return found
                fault = KaggleError(
                    f"Kaggle took the file, but made no submission of it, and says: {said or 'nothing'}"
                )
                self.ledger.update(row, {"status": NOT_SENT, "error": str(fault)})
                raise fault
        raise AssertionError("the last try returns or raises")

    def _find_or_defer(self, tag: str, asked_s: float | None = None) -> client.KaggleSubmission | None:
        try:
            return self._look_up(tag, asked_s)
        except CarvanaError as error:
            raise OutcomeUnknownError(
                f"Whether the submission arrived can't be looked up now. {error} 'carvana submissions' looks again."
            ) from None

    def _look_up(self, tag: str, asked_s: float | None = None) -> client.KaggleSubmission | None:
        """Look for a submission by its tag, for as long as one that was cut off may take to appear."""
        patience = self.kaggle.patience
        seconds = min(max(patience.lookup_s, asked_s or 0), patience.longest_asked_s)
        ends, pause = time.monotonic() + seconds, seconds / 16
        while True:
            found = find_by_tag(self.kaggle.submissions(), tag)
            if found or time.monotonic() + pause > ends:
                return found
            time.sleep(pause)
            pause *= 2


def check_message(message: str) -> str:
    """Return a description as one line; raises CarvanaError for one that is empty or too long."""
    message = printable(message)
    if not message:
        raise CarvanaError("-m is empty: say in a few words what this submission is.")
    if len(message) > _LONGEST_MESSAGE:
        raise CarvanaError(f"-m is longer than {_LONGEST_MESSAGE} signs: say it shorter.")
    return message


def to_row(found: client.KaggleSubmission) -> LedgerRow:
    """Return the cells of the ledger that Kaggle decides."""
    return {
        "reference": str(found.reference),
        "status": found.status,
        "public_score": found.public_score,
        "private_score": found.private_score,
        "error": found.error,
    }


def find_by_tag(remote: list[client.KaggleSubmission], tag: str) -> client.KaggleSubmission | None:
    """Return the submission whose description begins with a tag, or None."""
    return next((found for found in remote if found.description.startswith(f"[{tag}]")), None)


def _copy_packed(csv: Path, target: Path) -> None:
    """Copy a CSV, gzipped; what DVC holds, read-only and by a link, is linked, so that it takes no room twice."""
    if csv.suffix != ".gz":
        with target.open("wb") as raw, gzip.GzipFile("", "wb", _LEVEL, raw, mtime=0) as packed:
            packed.writelines(csv_file.read_lines(csv))
    elif csv.stat().st_mode & _WRITABLE:
        shutil.copyfile(csv, target)
    else:
        link_or_copy(csv, target)
