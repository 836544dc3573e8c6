"""Retry policy, and error messages for failed Kaggle calls."""

import email.utils
import json
import random
import ssl
import sys
import time
import urllib.request
from collections.abc import Collection
from dataclasses import dataclass

import requests
from urllib3.exceptions import (
    ConnectTimeoutError,
    LocationParseError,
    NewConnectionError,
    ProxySchemeUnknown,
    ProxySchemeUnsupported,
    ReadTimeoutError,
    SSLError,
)

from pipeline.errors import CarvanaError
from pipeline.kaggle.credentials import HOW_TO_GET_ONE


@dataclass(frozen=True)
class RetryPolicy:
    """Timeouts and pauses, in seconds. Tests use shorter ones."""

    connect_s: float = 10
    """Timeout for connecting."""

    read_s: float = 60
    """Timeout without receiving a byte."""

    tries: int = 5
    """Most attempts in a row without progress."""

    first_pause_s: float = 1
    """Pause after the first failure; doubled after each further one."""

    longest_pause_s: float = 60

    longest_retry_after_s: float = 15 * 60
    """Longest Retry-After that is waited for; if Kaggle asks for more, the call fails."""

    lookup_s: float = 30
    """How long to look for a submission whose response was lost before it counts as not created."""

    first_poll_s: float = 5
    """First pause between polls for a score; later pauses are longer."""

    longest_wait_s: float = 60 * 60
    """Longest wait for a score."""

    @property
    def timeouts(self) -> tuple[float, float]:
        """Connect and read timeout, for requests."""
        return self.connect_s, self.read_s


DOWNLOAD_RETRY = RetryPolicy(tries=12)
"""For downloads, which run unattended: a network failure of a few minutes must not end them."""


class Backoff:
    """Exponential backoff with jitter, counting failures without progress."""

    def __init__(self, policy: RetryPolicy) -> None:
        self._policy = policy
        self._failures = 0

    def reset(self) -> None:
        """Reset the count after progress."""
        self._failures = 0

    def wait_or_raise(self, error: Exception, retry_after_s: float | None = None) -> None:
        """Pause before the next attempt, for at least ``retry_after_s``; raise ``error`` after too many failures."""
        self._failures += 1
        if self._failures >= self._policy.tries or (retry_after_s or 0) > self._policy.longest_retry_after_s:
            raise error from None
        pause = min(self._policy.first_pause_s * 2 ** (self._failures - 1), self._policy.longest_pause_s)
        pause *= random.uniform(0.5, 1)  # jitter, so that clients that failed together do not retry together
        if retry_after_s is not None:
            pause = max(pause, retry_after_s)
        if pause > 2:
            print(f"{error} Retrying in {pause:.0f} s.", file=sys.stderr)
        time.sleep(pause)


def parse_retry_after(value: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which holds a number or a date; None if it holds neither."""
    if not value:
        return None
    if value.strip().isdigit():
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return None


_LONGEST_MESSAGE = 300


class KaggleError(CarvanaError):
    """A Kaggle call failed."""


class RejectedError(KaggleError):
    """Kaggle rejected the call; a retry would not help."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class NotSentError(KaggleError):
    """The call certainly had no effect; a retry is safe."""

    def __init__(self, message: str, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class OutcomeUnknownError(KaggleError):
    """It is unknown whether the call had an effect."""

    def __init__(self, message: str, retry_after_s: float | None = None, *, slow: bool = True) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.slow = slow
        """Whether the call may still take effect later, as after a timeout, but not after a broken connection."""


def printable(text: object, secrets: Collection[str] = ()) -> str:
    """Return a server's text as one line without control characters, with ``secrets`` replaced by ``***``."""
    plain = "".join(char if char.isprintable() else " " for char in str(text or ""))
    for secret in secrets:
        plain = plain.replace(secret, "***")
    plain = " ".join(plain.split())
    return plain if len(plain) <= _LONGEST_MESSAGE else f"{plain[:_LONGEST_MESSAGE]}..."


def translate_error(error: Exception, competition: str, source: str, secrets: Collection[str]) -> KaggleError:
    """Return an exception of Kaggle's client as a KaggleError; ``source`` names the credentials used.

    The exception's text is not passed on, because it may contain signed URLs.
    """
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return _response_error(error.response, competition, source, secrets)
    setup_error = local_setup_error(error)
    if setup_error:
        return setup_error
    if isinstance(error, requests.RequestException) and not _is_reached(error):
        return NotSentError("Cannot reach Kaggle. Check your network (and HTTPS_PROXY).")
    if isinstance(error, requests.Timeout):
        return OutcomeUnknownError("Kaggle did not answer in time.")
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        # A response that stalls after its first bytes is also raised as a ConnectionError.
        stalled = isinstance(error.args[0] if error.args else None, ReadTimeoutError)
        return OutcomeUnknownError("The connection to Kaggle was interrupted.", slow=stalled)
    return OutcomeUnknownError(f"Unexpected response from Kaggle ({type(error).__name__}).")


def local_setup_error(error: Exception) -> RejectedError | None:
    """Return an error about this machine's setup, after which nothing was sent; None for other exceptions."""
    if isinstance(error, requests.exceptions.SSLError) and isinstance(_reason(error), SSLError):
        cause = _reason(error).args[:1]  # type: ignore[attr-defined]
        if not cause or not isinstance(cause[0], ssl.SSLCertVerificationError):
            return None  # the connection broke, possibly after the request was sent
        return RejectedError(
            "TLS certificate verification failed. Check this machine's clock and certificates, or set "
            "REQUESTS_CA_BUNDLE if your network uses a proxy.",
            0,
        )
    if _is_proxy_setting(error):
        return RejectedError(
            "The proxy setting (HTTPS_PROXY, HTTP_PROXY or ALL_PROXY) cannot be used. Set it to http://HOST:PORT, or "
            "unset it; SOCKS proxies are not supported.",
            0,
        )
    if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        return RejectedError(f"Problem with this machine's setup: {printable(error)}.", 0)
    if "Tunnel connection failed" in str(_reason(error)):
        return RejectedError("Your network's proxy refused the connection. Check HTTPS_PROXY and its password.", 0)
    return None


def _is_proxy_setting(error: Exception) -> bool:
    if isinstance(error, requests.exceptions.InvalidProxyURL | ProxySchemeUnknown | ProxySchemeUnsupported):
        return True
    # requests raises InvalidSchema also for a SOCKS proxy, and urllib3 its own errors for other schemes and ports.
    setting = isinstance(error, requests.exceptions.InvalidSchema | requests.exceptions.InvalidURL | LocationParseError)
    return setting and bool(urllib.request.getproxies())


def _reason(error: Exception) -> object:
    """Return the innermost exception inside urllib3's."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    # A ProxyError may hide a connection that broke after the request was sent.
    return getattr(reason, "original_error", reason)


def _is_reached(error: requests.RequestException) -> bool:
    """Return whether the request may have reached Kaggle."""
    return not isinstance(_reason(error), NewConnectionError | ConnectTimeoutError)


def _response_error(
    response: requests.Response, competition: str, source: str, secrets: Collection[str]
) -> KaggleError:
    status, message = _status_and_message(response)
    detail = f" Kaggle's message: {printable(message, secrets)}" if message else ""
    page = f"https://www.kaggle.com/c/{competition}"
    if status == 401:
        return RejectedError(f"Kaggle rejected the credentials from {source} (401): {HOW_TO_GET_ONE}.{detail}", 401)
    if status == 403:
        return RejectedError(f"{_forbidden(message.lower(), competition, page)}{detail}", 403)
    if status == 404:
        return RejectedError(
            f"Not found in competition '{competition}' (404). Check data.competition in params.yaml against the "
            f"competition's URL.{detail}",
            404,
        )
    if status == 407:
        return RejectedError("Your network's proxy requires a password (407). Put it into HTTPS_PROXY.", 407)
    if status == 429:
        retry_after = parse_retry_after(response.headers.get("Retry-After"))
        when = f"in {retry_after / 60:.0f} minutes" if retry_after and retry_after > 90 else "later"
        return NotSentError(f"Too many requests to Kaggle (429). Try again {when}.{detail}", retry_after)
    if status >= 500 or status == 408:
        retry_after = parse_retry_after(response.headers.get("Retry-After"))
        return OutcomeUnknownError(f"Kaggle server error ({status}). Try again later.{detail}", retry_after)
    return RejectedError(f"Kaggle rejected the request ({status}).{detail or ' It gave no reason.'}", status)


def _forbidden(message: str, competition: str, page: str) -> str:
    """Return what to do about a 403; Kaggle's message tells its three causes apart."""
    rules = f"accept the competition's rules at {page}/rules ('Join' or 'Late Submission')"
    phone = "verify your account by phone at https://www.kaggle.com/settings"
    name = f"check that data.competition, '{competition}', is the name in the competition's URL"
    if "rule" in message or "accept" in message:
        return f"Kaggle denied access (403). First {rules}."
    if "phone" in message or "verif" in message:
        return f"Kaggle denied access (403). First {phone}."
    if "competitions.get" in message:
        return f"Kaggle shows no such competition to you (403): {name}."
    return f"Kaggle denied access (403): {rules}; {phone}; or {name}."


def _status_and_message(response: requests.Response) -> tuple[int, str]:
    """Return status and message of an error response; the client often drops the message."""
    try:
        body = json.loads(response.text)
    except (ValueError, requests.RequestException):
        body = None
    if not isinstance(body, dict):  # an HTML page
        return response.status_code, ""
    code = body.get("code")
    return code if isinstance(code, int) and code >= 400 else response.status_code, str(body.get("message") or "")
