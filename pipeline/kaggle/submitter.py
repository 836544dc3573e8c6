"""Submit a CSV exactly once: archive it, log it before the request, and recover after a crash."""

import codecs
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

_PROPAGATION_S = 60
"""How long a new submission may be unknown to parts of Kaggle."""

_LOOK_AGAIN = (
    "The submission is not on Kaggle so far. Run the command again in a minute; it checks once more before it submits."
)

_GZIP_LEVEL = 5
"""Within a few percent of the smallest size, in half the time."""

_WRITABLE = stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH


class Submitter:
    """The project's submissions: the ledger, the archive of submitted files, and Kaggle."""

    def __init__(self, project: Path, kaggle: KaggleClient) -> None:
        self.project = project
        self.kaggle = kaggle
        self.ledger = Ledger(project / LEDGER_FILE)
        self.sent = project / SENT_DIR
        self._lock = FileLock(project / SUBMISSIONS_DIR / ".sending.lock")

    @contextmanager
    def submission_lock(self) -> Iterator[None]:
        """Hold the lock while submitting; waits for another process that is submitting."""
        self._make_folder()
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            print("Another submission is in progress. Waiting for it.", file=sys.stderr)
            self._lock.acquire()
        try:
            yield
        finally:
            self._lock.release()

    def reconcile(self, remote: list[client.KaggleSubmission]) -> list[LedgerRow]:
        """Update unresolved rows after a crash, unless another process is submitting; return those that Kaggle has.

        ``remote``: the submissions that Kaggle lists. A row marked as not sent is corrected if Kaggle has it after all.
        """
        self._make_folder()
        arrived = []
        try:
            with self._lock.acquire(timeout=0):
                for row in self.ledger.rows():
                    if is_submitted(row) or not row["tag"]:
                        continue
                    found = find_by_tag(remote, row["tag"])
                    if not found and is_unresolved(row):
                        print(f"The submission of {row['time_utc']} was interrupted. Looking for it.", file=sys.stderr)
                        # It may appear with a delay.
                        found = self._look_up(row["tag"])
                    updated = self.ledger.update(row, to_row(found) if found else {"status": NOT_SENT})
                    arrived += [updated] if found else []
        except Timeout:
            pass
        return arrived

    def send(self, csv: Path, content: str, message: str) -> LedgerRow:
        """Submit a validated CSV once and return its row; raises KaggleError if Kaggle does not have it afterwards.

        ``content``: the SHA-256 from validation. Call this within `submission_lock`. The row is written before the
        request, so that after a crash at any point the next command can reconcile it.
        """
        # The content makes the tag recognizable; the random part identifies this attempt.
        tag = f"{content[:8]}-{uuid.uuid4().hex[:8]}"
        archived = self._archive(csv, content)
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
            token = upload(self.kaggle, archived, f"{csv.name.partition('.')[0]}.csv.gz")
        except CarvanaError as error:
            self.ledger.update(row, {"status": NOT_SENT, "error": str(error)})
            raise
        return self.ledger.update(row, to_row(self._create(row, token, message)))

    def wait(self, row: LedgerRow, on_wait: Callable[[float], object]) -> LedgerRow:
        """Poll a submission until it is scored and return its row; ``on_wait`` is called with the seconds waited.

        Raises KaggleError if scoring failed or took longer than an hour.
        """
        policy = self.kaggle.policy
        start, pause = time.monotonic(), policy.first_poll_s
        while (found := self._scored(int(row["reference"]), time.monotonic() - start)) is None:
            waited = time.monotonic() - start
            if waited > policy.longest_wait_s:
                raise KaggleError(
                    f"No score for {row['reference']} after {waited / 60:.0f} minutes. It is submitted; see its score "
                    "later with 'carvana submissions'."
                )
            on_wait(waited)
            time.sleep(pause)
            pause = min(pause * 1.5, 30.0)
        row = self.ledger.update(row, to_row(found))
        if found.status == "error":
            raise KaggleError(
                f"Kaggle could not score submission {row['reference']}: {found.error or 'no reason given'}. "
                "Your submissions page on Kaggle may show more."
            )
        return row

    def sent_before(self, content: str) -> LedgerRow | None:
        """Return the last submitted row with this content, or None."""
        before = [row for row in self.ledger.rows() if row["content_sha256"] == content and is_submitted(row)]
        return before[-1] if before else None

    def last_sent(self) -> tuple[str, Path] | None:
        """Return reference and archived file of the last submission, or None if there is none."""
        sent = [row for row in self.ledger.rows() if is_submitted(row) and row["content_sha256"]]
        return (sent[-1]["reference"], self._archive_path(sent[-1]["content_sha256"])) if sent else None

    def _scored(self, reference: int, waited_s: float) -> client.KaggleSubmission | None:
        try:
            found = self.kaggle.submission(reference)
        except RejectedError as error:
            if error.status == 404 and waited_s < _PROPAGATION_S:
                return None
            raise
        except (NotSentError, OutcomeUnknownError) as error:  # it is submitted, so keep waiting despite network errors
            print(error, file=sys.stderr)
            return None
        return None if found.status == PENDING else found

    def _archive_path(self, content: str) -> Path:
        return self.sent / f"{content}.csv.gz"

    def _make_folder(self) -> None:
        (self.project / SUBMISSIONS_DIR).mkdir(exist_ok=True)

    def _archive(self, csv: Path, content: str) -> Path:
        """Store a gzipped copy of a CSV, named by its content, and return its path."""
        archived = self._archive_path(content)
        for leftover in self.sent.glob(".*.part"):
            remove_path(leftover)
        if archived.is_file() and csv_file.content_digest(archived) == content:
            return archived
        with atomic_write(archived) as temporary:
            _copy_gzipped(csv, temporary)
            if csv_file.content_digest(temporary) != content:
                raise CarvanaError(f"{csv} changed after validation. Run the command again when it is complete.")
        return archived

    def _create(self, row: LedgerRow, token: str, message: str) -> client.KaggleSubmission:
        """Create the submission from the upload and return it.

        It is created again only if the connection broke and a lookup did not find it. If it may still appear, the row
        is left unresolved for the next command. Raises KaggleError if Kaggle has no submission, as far as is known.
        """
        description = f"[{row['tag']}] {message}"
        for last in (False, True):
            try:
                reference, response = self.kaggle.create(token, description)
            except OutcomeUnknownError as error:
                print(f"{error} Checking whether the submission arrived.", file=sys.stderr)
                found = self._find_or_defer(row["tag"], error.retry_after_s)
                if found:
                    return found
                if last or error.slow:
                    raise OutcomeUnknownError(f"{error} {_LOOK_AGAIN}") from None
            except CarvanaError as error:
                # Kaggle may reject the second attempt because the first one arrived after all.
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
                failure = KaggleError(
                    f"Upload succeeded but no submission was created. Kaggle's message: {response or 'none'}"
                )
                self.ledger.update(row, {"status": NOT_SENT, "error": str(failure)})
                raise failure
        raise AssertionError("the last attempt returns or raises")

    def _find_or_defer(self, tag: str, retry_after_s: float | None = None) -> client.KaggleSubmission | None:
        try:
            return self._look_up(tag, retry_after_s)
        except CarvanaError as error:
            raise OutcomeUnknownError(
                f"Could not check whether the submission arrived. {error} 'carvana submissions' checks again."
            ) from None

    def _look_up(self, tag: str, retry_after_s: float | None = None) -> client.KaggleSubmission | None:
        """Look for a submission by its tag, for as long as an interrupted one may take to appear."""
        policy = self.kaggle.policy
        seconds = min(max(policy.lookup_s, retry_after_s or 0), policy.longest_retry_after_s)
        deadline, pause = time.monotonic() + seconds, seconds / 16
        while True:
            found = find_by_tag(self.kaggle.submissions(), tag)
            if found or time.monotonic() + pause > deadline:
                return found
            time.sleep(pause)
            pause *= 2


def check_message(message: str) -> str:
    """Return a submission message as one line; raises CarvanaError if it is empty or too long."""
    message = printable(message)
    if not message:
        raise CarvanaError("-m is empty. Describe the submission in a few words.")
    if len(message) > _LONGEST_MESSAGE:
        raise CarvanaError(f"-m is longer than {_LONGEST_MESSAGE} characters. Shorten it.")
    return message


def to_row(found: client.KaggleSubmission) -> LedgerRow:
    """Return the ledger cells that come from Kaggle."""
    return {
        "reference": str(found.reference),
        "status": found.status,
        "public_score": found.public_score,
        "private_score": found.private_score,
        "error": found.error,
    }


def find_by_tag(remote: list[client.KaggleSubmission], tag: str) -> client.KaggleSubmission | None:
    """Return the submission whose description starts with the tag, or None."""
    return next((found for found in remote if found.description.startswith(f"[{tag}]")), None)


def _is_plain_gzip(csv: Path) -> bool:
    """Return whether a CSV can be sent as it is: gzipped, and without a byte order mark, which Kaggle may reject."""
    if csv_file.compression_of(csv) != "gzip":
        return False
    with gzip.open(csv) as stream:
        start = stream.read(len(codecs.BOM_UTF8))
    return start == csv_file.without_bom(start)


def _copy_gzipped(csv: Path, target: Path) -> None:
    """Copy a CSV, gzipped; read-only files, such as links into DVC's cache, are linked to save space."""
    if not _is_plain_gzip(csv):
        with target.open("wb") as raw, gzip.GzipFile("", "wb", _GZIP_LEVEL, raw, mtime=0) as packed:
            packed.writelines(csv_file.read_lines(csv))
    elif csv.stat().st_mode & _WRITABLE:
        shutil.copyfile(csv, target)
    else:
        link_or_copy(csv, target)
