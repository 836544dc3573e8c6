"""Kaggle's API, through Kaggle's own client, with timeouts, safe retries and readable errors."""

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
from pipeline.kaggle.credentials import Credential, find, is_expired

T = TypeVar("T")

_PAGE = 200


@dataclass(frozen=True)
class RemoteFile:
    """A file as Kaggle lists it."""

    name: str
    size: int
    """Bytes; 0 if unknown."""
    created: str
    """Creation time, ISO 8601; empty if unknown."""


@dataclass(frozen=True)
class SubmissionLimits:
    """How many submissions were made and are allowed."""

    made_today: int
    made_in_all: int
    left: int
    limited_by_total: bool
    """Whether the total limit, not the daily one, is exhausted."""


@dataclass(frozen=True)
class KaggleSubmission:
    """A submission as Kaggle lists it."""

    reference: int
    description: str
    status: str
    """``pending``, ``complete`` or ``error``."""
    public_score: str
    """As Kaggle formats it; empty until it is scored."""
    private_score: str
    error: str
    """Why scoring failed."""


@dataclass(frozen=True)
class LeaderboardEntry:
    """One row of the leaderboard."""

    team: str
    score: float


class KaggleClient:
    """API client for one competition. The constructor makes no network request.

    Every call raises KaggleError if it fails after retries.
    """

    def __init__(self, competition: str, policy: RetryPolicy | None = None) -> None:
        self.competition = competition
        self.policy = policy or RetryPolicy()
        self._credentials = find(self._refresh_login)
        self._api = self._api_with(self._credentials[0])

    @property
    def source(self) -> str:
        """Where the credentials in use come from."""
        return self._credentials[0].source

    def files(self) -> list[RemoteFile]:
        """Return all files of the competition."""
        return [
            RemoteFile(self._sanitize(file.name), file.total_bytes, _iso_time(file.creation_date))
            for file in self._list("list_data_files", types.ApiListDataFilesRequest(), "files")
        ]

    def signed_url(self, name: str) -> str:
        """Return a temporary URL from which a file can be downloaded without credentials; treat it as a secret."""
        request = types.ApiDownloadDataFileRequest()
        request.competition_name, request.file_name = self.competition, name
        response = self._call("download_data_file", request)
        response.close()
        address = response.headers.get("Location")
        if not address:
            raise KaggleError(f"Kaggle returned no download URL for {name}. Try again later.")
        return urljoin(str(response.url), str(address))

    def limits(self) -> SubmissionLimits:
        """Return the submission limits."""
        request = types.ApiGetSubmissionLimitsRequest()
        request.competition_name = self.competition
        answer = self._call("get_submission_limits", request)
        return SubmissionLimits(
            answer.num_today, answer.num_total, answer.num_allowed_now, bool(answer.limited_by_total)
        )

    def start_upload(self, name: str, size: int, modified: int) -> tuple[str, str]:
        """Start an upload of ``size`` bytes; return its token, and the URL to upload to."""
        request = types.ApiStartSubmissionUploadRequest()
        request.competition_name, request.file_name = self.competition, name
        request.content_length, request.last_modified_epoch_seconds = size, modified
        answer = self._call("start_submission_upload", request)
        if not answer.token or not answer.create_url:
            raise KaggleError("Kaggle returned no upload URL. Try again later.")
        return answer.token, answer.create_url

    def create(self, token: str, description: str) -> tuple[int, str]:
        """Submit an uploaded file; return its reference (0 if Kaggle returned none) and Kaggle's message.

        This uses up a submission, so it is retried only if it certainly had no effect. Raises OutcomeUnknownError if
        that is unknown.
        """
        request = types.ApiCreateSubmissionRequest()
        request.competition_name, request.blob_file_tokens = self.competition, token
        request.submission_description = description
        answer = self._call("create_submission", request, repeat=False)
        return answer.ref, self._sanitize(answer.message)

    def submissions(self) -> list[KaggleSubmission]:
        """Return all submissions, newest first."""
        found = self._list("list_submissions", types.ApiListSubmissionsRequest(), "submissions")
        return [self._submission(submission) for submission in found]

    def submission(self, reference: int) -> KaggleSubmission:
        """Return one submission."""
        request = types.ApiGetSubmissionRequest()
        request.ref = reference
        return self._submission(self._call("get_submission", request))

    def leaderboard(self, *, public: bool) -> list[LeaderboardEntry]:
        """Return the leaderboard: the private one, if Kaggle shows it and ``public`` is false."""
        request = types.ApiGetLeaderboardRequest()
        request.override_public = public
        return [
            LeaderboardEntry(self._sanitize(row.team_name), float(row.score))
            for row in self._list("get_leaderboard", request, "submissions")
            if _is_number(row.score)
        ]

    def _list(self, method: str, request: Any, items: str) -> Iterator[Any]:
        """Yield what all pages of a listing hold in the attribute ``items``."""
        request.competition_name, request.page_size = self.competition, _PAGE

        def page(token: str) -> tuple[Any, str]:
            request.page_token = token or None
            answer = self._call(method, request)
            return getattr(answer, items), answer.next_page_token

        return _pages(page)

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
        """Make a call. Retry if that is safe, and try the next credentials if these are rejected."""
        backoff = Backoff(self.policy)
        while True:
            try:
                return getattr(self._api, method)(request)
            except KaggleError as error:  # from refreshing a login
                failure = error
            except CarvanaError:
                raise
            except Exception as error:  # the client passes on any exception of its parser
                failure = translate_error(error, self.competition, self.source, self._secrets)
            if isinstance(failure, RejectedError) and failure.status == 401 and len(self._credentials) > 1:
                self._use_next_credentials()
            elif isinstance(failure, NotSentError) or (repeat and isinstance(failure, OutcomeUnknownError)):
                backoff.wait_or_raise(failure, failure.retry_after_s)
            else:
                # Without its cause, whose text may contain a signed URL.
                raise failure from None

    def _use_next_credentials(self) -> None:
        rejected = self._credentials.pop(0)
        print(
            f"warning: Kaggle rejected the credentials from {rejected.source} (401). Using those from {self.source}. "
            "Remove or renew the rejected ones.",
            file=sys.stderr,
        )
        self._api = self._api_with(self._credentials[0])

    def _api_with(self, credential: Credential | None) -> CompetitionApiClient:
        return CompetitionApiClient(_TimedHttp(credential, self.policy))

    def _refresh_login(self, file: Path) -> str | None:
        """Return the access token of an OAuth login, refreshed if necessary; Kaggle's client updates the file."""
        # Not Kaggle's full client, which would look for credentials itself and has no timeouts.
        client = SimpleNamespace(users=SimpleNamespace(account_client=AccountClient(_TimedHttp(None, self.policy))))
        try:
            login = KaggleCredentials.load(client=client, file_path=str(file))
            stored = json.loads(file.read_text(encoding="utf-8"))
            secrets = [str(stored[key]) for key in ("refresh_token", "access_token") if stored.get(key)]
        except (OSError, ValueError, AttributeError, TypeError):
            raise CarvanaError(f"{file} is not a valid login file. Run 'kaggle auth login' again.") from None
        if login is None:
            return None
        try:
            if is_expired(file):  # the client's own check is half an hour late
                login.refresh_access_token()
            token: str | None = login.get_access_token()
        except Exception as error:
            failure = translate_error(error, self.competition, f"the login in {file}", secrets)
            # The call that needed the token was not sent.
            raise NotSentError(str(failure)) if isinstance(failure, OutcomeUnknownError) else failure from None
        return token


class _TimedHttp(KaggleHttpClient):  # type: ignore[misc]
    """The client's connection, with timeouts and the given credentials, and without following redirects."""

    def __init__(self, credential: Credential | None, policy: RetryPolicy) -> None:
        try:
            environment = get_env()
        except Exception:
            raise CarvanaError("KAGGLE_API_ENVIRONMENT is not a Kaggle environment. Unset it.") from None
        super().__init__(env=environment, user_agent="carvana-pipeline")
        self._credential = credential
        self._policy = policy

    def _init_session(self) -> None:
        if self._session is not None:
            return
        super()._init_session()
        session: Any = self._session
        # Signed URLs are downloaded separately, without credentials and by ranges.
        session.get_redirect_target = lambda response: None
        for scheme in ("https://", "http://"):
            session.mount(scheme, _TimedAdapter(self._policy))

    def _try_fill_auth(self) -> None:
        # The client itself would prefer a token from the environment to the given credentials.
        session: Any = self._session
        session.auth = self._credential.auth if self._credential else None
        self._signed_in = self._credential is not None


class _TimedAdapter(HTTPAdapter):
    def __init__(self, policy: RetryPolicy) -> None:
        super().__init__()
        self._timeouts = policy.timeouts

    def send(self, *arguments: Any, **options: Any) -> requests.Response:
        if options.get("timeout") is None:
            options["timeout"] = self._timeouts
        return super().send(*arguments, **options)


def _pages(page: Callable[[str], tuple[list[T | None] | None, str | None]]) -> Iterator[T]:
    """Yield the items of all pages; each page is requested with the token of the previous one."""
    token, seen = "", {""}
    while True:
        items, following = page(token)
        yield from (item for item in items or () if item is not None)
        token = following or ""
        if token in seen:  # the last page, or a server that repeats its tokens
            return
        seen.add(token)


def _iso_time(value: datetime | None) -> str:
    return value.isoformat() if value else ""


def _is_number(text: object) -> bool:
    try:
        float(str(text))
    except ValueError:
        return False
    return True
