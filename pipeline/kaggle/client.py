"""Kaggle's calls, by way of its own client, with time-outs, retries where they do no harm, and errors in words."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any, TypeVar
from urllib.parse import urljoin

import requests
from kagglesdk.competitions.services.competition_api_service import CompetitionApiClient
from kagglesdk.competitions.types import competition_api_service as types
from kagglesdk.kaggle_creds import KaggleCredentials
from kagglesdk.kaggle_env import get_env
from kagglesdk.kaggle_http_client import KaggleHttpClient
from kagglesdk.users.services.account_service import AccountClient
from requests.adapters import HTTPAdapter

from pipeline.errors import CarvanaError
from pipeline.kaggle.api_errors import (
    Backoff,
    KaggleError,
    NotSentError,
    OutcomeUnknownError,
    RejectedError,
    RetryPolicy,
    printable,
    translate_error,
)
from pipeline.kaggle.credentials import Credential, find, has_run_out

T = TypeVar("T")

_PAGE = 200


@dataclass(frozen=True)
class RemoteFile:
    """A file as Kaggle lists it."""

    name: str
    size: int
    """Bytes, 0 where Kaggle does not say."""
    created: str
    """When it was put there, ISO 8601; empty where Kaggle does not say."""


@dataclass(frozen=True)
class SubmissionLimits:
    """How many submissions may be made."""

    made_today: int
    made_in_all: int
    left: int
    of_all: bool
    """Whether it is the total, not the day, that leaves no more."""


@dataclass(frozen=True)
class KaggleSubmission:
    """A submission as Kaggle lists it."""

    reference: int
    description: str
    status: str
    """``pending``, ``complete`` or ``error``."""
    public_score: str
    """As Kaggle writes it; empty until there is one."""
    private_score: str
    error: str
    """Why Kaggle could not score it."""


@dataclass(frozen=True)
class LeaderboardEntry:
    """A row of the leaderboard."""

    team: str
    score: float


class KaggleClient:
    """One competition at Kaggle. Making it asks nothing of the network."""

    def __init__(self, competition: str, patience: RetryPolicy | None = None) -> None:
        self.competition = competition
        self.patience = patience or RetryPolicy()
        self._credentials = find(self._renewed_login)
        self._calls = self._calls_with(self._credentials[0])

    @property
    def source(self) -> str:
        """Which credentials are in use, in words."""
        return self._credentials[0].source

    def files(self) -> list[RemoteFile]:
        """Return all files of the competition, page by page."""

        def page(token: str) -> tuple[Any, str]:
            request = types.ApiListDataFilesRequest()
            request.competition_name, request.page_size, request.page_token = self.competition, _PAGE, token or None
            answer = self._call("list_data_files", request)
            return answer.files, answer.next_page_token

        return [
            RemoteFile(self._sanitize(file.name), file.total_bytes, _moment(file.creation_date))
            for file in _pages(page)
        ]

    def signed_url(self, name: str) -> str:
        """Return an address, good for some time, from which anyone can fetch a file; part of it is a secret."""
        request = types.ApiDownloadDataFileRequest()
        request.competition_name, request.file_name = self.competition, name
        response = self._call("download_data_file", request)
        response.close()
        address = response.headers.get("Location")
        if not address:
            raise KaggleError(f"Kaggle gives no address for {name}: run the same again later.")
        return urljoin(str(response.url), str(address))

    def limits(self) -> SubmissionLimits:
        """Return how many submissions may be made."""
        request = types.ApiGetSubmissionLimitsRequest()
        request.competition_name = self.competition
        answer = self._call("get_submission_limits", request)
        return SubmissionLimits(
            answer.num_today, answer.num_total, answer.num_allowed_now, bool(answer.limited_by_total)
        )

    def start_upload(self, name: str, size: int, modified: int) -> tuple[str, str]:
        """Return the token that stands for a file to upload, and the address to put its bytes to."""
        request = types.ApiStartSubmissionUploadRequest()
        request.competition_name, request.file_name = self.competition, name
        request.content_length, request.last_modified_epoch_seconds = size, modified
        answer = self._call("start_submission_upload", request)
        if not answer.token or not answer.create_url:
            raise KaggleError("Kaggle gives no address to upload to: run the same again later.")
        return answer.token, answer.create_url

    def create(self, token: str, description: str) -> tuple[int, str]:
        """Submit an uploaded file, and return its reference, 0 where Kaggle gave none, and what Kaggle said.

        This spends a submission. So it is asked again only where it surely was not done; raises LostAnswerError
        where nobody knows.
        """
        request = types.ApiCreateSubmissionRequest()
        request.competition_name, request.blob_file_tokens = self.competition, token
        request.submission_description = description
        answer = self._call("create_submission", request, repeat=False)
        return answer.ref, self._sanitize(answer.message)

    def submissions(self) -> list[KaggleSubmission]:
        """Return all submissions, newest first, page by page."""

        def page(token: str) -> tuple[Any, str]:
            request = types.ApiListSubmissionsRequest()
            request.competition_name, request.page_size, request.page_token = self.competition, _PAGE, token or None
            answer = self._call("list_submissions", request)
            return answer.submissions, answer.next_page_token

        return [self._submission(found) for found in _pages(page)]

    def submission(self, reference: int) -> KaggleSubmission:
        """Return one submission."""
        request = types.ApiGetSubmissionRequest()
        request.ref = reference
        return self._submission(self._call("get_submission", request))

    def leaderboard(self, *, public: bool) -> list[LeaderboardEntry]:
        """Return the leaderboard, page by page: the private one, where Kaggle shows it and ``public`` is not set."""

        def page(token: str) -> tuple[Any, str]:
            request = types.ApiGetLeaderboardRequest()
            request.competition_name, request.page_size, request.page_token = self.competition, _PAGE, token or None
            request.override_public = public
            answer = self._call("get_leaderboard", request)
            return answer.submissions, answer.next_page_token

        return [
            LeaderboardEntry(self._sanitize(row.team_name), float(row.score))
            for row in _pages(page)
            if _is_number(row.score)
        ]

    def _submission(self, found: Any) -> KaggleSubmission:
        return KaggleSubmission(
            found.ref,
            self._sanitize(found.description),
            found.status.name.lower(),
            self._sanitize(found.public_score),
            self._sanitize(found.private_score),
            self._sanitize(found.error_description),
        )

    def _sanitize(self, text: object) -> str:
        return printable(text, self._secrets)

    @property
    def _secrets(self) -> list[str]:
        return [secret for credential in self._credentials for secret in credential.secrets]

    def _call(self, method: str, request: Any, *, repeat: bool = True) -> Any:
        """Make a call; again where that does no harm, and with the next credentials where these are refused."""
        tries = Backoff(self.patience)
        while True:
            try:
                return getattr(self._calls, method)(request)
            except KaggleError as error:  # of a login that has to be renewed
                fault = error
            except CarvanaError:
                raise
            except Exception as error:  # the client raises whatever its parser does
                fault = translate_error(error, self.competition, self.source, self._secrets)
            if isinstance(fault, RejectedError) and fault.status == 401 and len(self._credentials) > 1:
                self._use_next_credentials()
            elif isinstance(fault, NotSentError) or (repeat and isinstance(fault, OutcomeUnknownError)):
                tries.wait_or_raise(fault, fault.asked_s)
            else:
                # Without its cause, whose text may hold a signed address.
                raise fault from None

    def _use_next_credentials(self) -> None:
        refused = self._credentials.pop(0)
        print(
            f"warning: Kaggle refused the credentials from {refused.source} (401); using those from {self.source}. "
            "Take the refused ones away, or renew them.",
            file=sys.stderr,
        )
        self._calls = self._calls_with(self._credentials[0])

    def _calls_with(self, credential: Credential | None) -> CompetitionApiClient:
        return CompetitionApiClient(_TimedHttp(credential, self.patience))

    def _renewed_login(self, file: Path) -> str | None:
        """Return the token of an OAuth login, by way of Kaggle's client, which keeps a renewed one in its file."""
        # In place of its whole client, which would look for credentials of its own and wait for ever.
        client = SimpleNamespace(users=SimpleNamespace(account_client=AccountClient(_TimedHttp(None, self.patience))))
        try:
            login = KaggleCredentials.load(client=client, file_path=str(file))
            stored = json.loads(file.read_text(encoding="utf-8"))
            secrets = [str(stored[key]) for key in ("refresh_token", "access_token") if stored.get(key)]
        except (OSError, ValueError, AttributeError, TypeError):
            raise CarvanaError(f"{file} can't be understood: run 'kaggle auth login' again.") from None
        if login is None:
            return None
        try:
            if has_run_out(file):  # the client's own test comes half an hour late
                login.refresh_access_token()
            token: str | None = login.get_access_token()
        except Exception as error:
            fault = translate_error(error, self.competition, f"the login in {file}", secrets)
            # What it was needed for was not asked.
            raise NotSentError(str(fault)) if isinstance(fault, OutcomeUnknownError) else fault from None
        return token


class _TimedHttp(KaggleHttpClient):  # type: ignore[misc]
    """The client's connection, with time-outs, with credentials of our choice, and without following redirects."""

    def __init__(self, credential: Credential | None, patience: RetryPolicy) -> None:
        try:
            environment = get_env()
        except Exception:
            raise CarvanaError("KAGGLE_API_ENVIRONMENT names no environment of Kaggle's: unset it.") from None
        super().__init__(env=environment, user_agent="carvana-pipeline")
        self._credential = credential
        self._patience = patience

    def _init_session(self) -> None:
        if self._session is not None:
            return
        super()._init_session()
        session: Any = self._session
        # Signed addresses are fetched from apart, without credentials and by ranges.
        session.get_redirect_target = lambda response: None
        for scheme in ("https://", "http://"):
            session.mount(scheme, _TimedAdapter(self._patience))

    def _try_fill_auth(self) -> None:
        # The client's own would prefer a token of the environment to the key it was given.
        session: Any = self._session
        session.auth = self._credential.auth if self._credential else None
        self._signed_in = self._credential is not None


class _TimedAdapter(HTTPAdapter):
    def __init__(self, patience: RetryPolicy) -> None:
        super().__init__()
        self._timeouts = patience.timeouts

    def send(self, *arguments: Any, **options: Any) -> requests.Response:
        if options.get("timeout") is None:
            options["timeout"] = self._timeouts
        return super().send(*arguments, **options)


def _pages(page: Callable[[str], tuple[list[T | None] | None, str | None]]) -> Iterator[T]:
    """Yield what all pages hold, each asked for by the token of the one before."""
    token, seen = "", {""}
    while True:
        items, following = page(token)
        yield from (item for item in items or () if item is not None)
        token = following or ""
        if token in seen:  # the last, or a server that goes round in circles
            return
        seen.add(token)


def _moment(value: datetime | None) -> str:
    return value.isoformat() if value else ""


def _is_number(text: object) -> bool:
    try:
        float(str(text))
    except ValueError:
        return False
    return True
