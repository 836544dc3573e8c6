"""Retry policy, and Kaggle's errors in plain words."""

import email.utils
import json
import random
import ssl
import sys
import time
from collections.abc import Collection
from dataclasses import dataclass

import requests
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError, ReadTimeoutError, SSLError

from pipeline.errors import CarvanaError
from pipeline.kaggle.credentials import HOW_TO_GET_ONE


@dataclass(frozen=True)
class RetryPolicy:
    """Times in seconds. Tests take shorter ones."""

    connect_s: float = 10
    """For a connection to come about."""

    silence_s: float = 60
    """Without a byte from the other side."""

    tries: int = 5
    """In a row that came no further: somebody waits for the answer."""

    first_pause_s: float = 1
    """After the first failure; twice as long after each further one."""

    longest_pause_s: float = 60

    longest_asked_s: float = 15 * 60
    """The longest pause that Kaggle may ask for with Retry-After; asked for more, we stop and say so."""

    lookup_s: float = 30
    """How long to look for a submission whose answer was lost, before it counts as not there."""

    first_poll_s: float = 5
    """Between looks at a submission that waits for its score; later looks come further apart."""

    longest_wait_s: float = 60 * 60
    """For a score."""

    @property
    def timeouts(self) -> tuple[float, float]:
        """For requests: to connect, and between bytes."""
        return self.connect_s, self.silence_s


DOWNLOAD_RETRY = RetryPolicy(tries=12)
"""For downloads, which nobody sits beside: a network that is away for some minutes ends none."""


class Backoff:
    """Failures in a row, with a pause after each that grows."""

    def __init__(self, patience: RetryPolicy) -> None:
        self._patience = patience
        self._failed = 0

    def reset(self) -> None:
        """Forget the failures so far: what comes forward may fail as often again."""
        self._failed = 0

    def wait_or_raise(self, error: Exception, asked_s: float | None = None) -> None:
        """Pause before the next try, for ``asked_s`` at least; or raise ``error``, if there have been enough."""
        self._failed += 1
        if self._failed >= self._patience.tries or (asked_s or 0) > self._patience.longest_asked_s:
            raise error from None
        pause = min(self._patience.first_pause_s * 2 ** (self._failed - 1), self._patience.longest_pause_s)
        # Spread, so that many who were cut off at once don't come back at once.
        pause *= random.uniform(0.5, 1)
        if asked_s is not None:
            pause = max(pause, asked_s)
        if pause > 2:
            print(f"{error} Trying again in {pause:.0f} s.", file=sys.stderr)
        time.sleep(pause)


def retry_after_s(value: str | None) -> float | None:
    """Return the seconds that a Retry-After header asks for, given as a number or as a date; None if it is neither."""
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
    """Kaggle did not do what was asked."""


class RejectedError(KaggleError):
    """Kaggle said no: asking again would change nothing."""

    def __init__(self, words: str, status: int) -> None:
        super().__init__(words)
        self.status = status


class NotSentError(KaggleError):
    """What was asked was surely not done: asking again does no harm."""

    def __init__(self, words: str, asked_s: float | None = None) -> None:
        super().__init__(words)
        self.asked_s = asked_s


class OutcomeUnknownError(KaggleError):
    """Nobody knows whether what was asked was done."""

    def __init__(self, words: str, asked_s: float | None = None, *, slow: bool = True) -> None:
        super().__init__(words)
        self.asked_s = asked_s
        self.slow = slow
        """Whether it may be done yet, as when somebody gave up waiting for it; not where the connection was cut."""


def printable(text: object, secrets: Collection[str] = ()) -> str:
    """Return a server's text as one line that does nothing to a terminal and holds none of ``secrets``."""
    plain = "".join(sign if sign.isprintable() else " " for sign in str(text or ""))
    for secret in secrets:
        plain = plain.replace(secret, "***")
    plain = " ".join(plain.split())
    return plain if len(plain) <= _LONGEST_MESSAGE else f"{plain[:_LONGEST_MESSAGE]}..."


def translate_error(error: Exception, competition: str, source: str, secrets: Collection[str]) -> KaggleError:
    """Return what an exception of Kaggle's client means; ``source`` says which credentials were used.

    Nothing of the exception's own text is passed on: addresses in it may be signed.
    """
    if isinstance(error, requests.HTTPError) and error.response is not None:
        return _response_error(error.response, competition, source, secrets)
    machine = local_setup_error(error)
    if machine:
        return machine
    if isinstance(error, requests.RequestException) and not _is_reached(error):
        return NotSentError("Kaggle can't be reached: look to this machine's network (and HTTPS_PROXY).")
    if isinstance(error, requests.Timeout):
        return OutcomeUnknownError("Kaggle did not answer in time.")
    if isinstance(error, requests.ConnectionError | requests.exceptions.ChunkedEncodingError):
        # An answer that stalls after its first bytes is no broken connection, though it is called one.
        stalled = isinstance(error.args[0] if error.args else None, ReadTimeoutError)
        return OutcomeUnknownError("The connection to Kaggle broke off.", slow=stalled)
    return OutcomeUnknownError(f"Kaggle's answer can't be understood ({type(error).__name__}).")


def local_setup_error(error: Exception) -> RejectedError | None:
    """Return what an exception means that tells of this machine's set-up, or None; nothing was sent then."""
    if isinstance(error, requests.exceptions.SSLError) and isinstance(_reason(error), SSLError):
        cause = _reason(error).args[:1]  # type: ignore[attr-defined]
        if not cause or not isinstance(cause[0], ssl.SSLCertVerificationError):
            return None  # the connection broke, maybe after the request was sent
        return RejectedError(
            "The connection is not trusted (a certificate was refused): set this machine's clock and certificates "
            "right, or REQUESTS_CA_BUNDLE where a proxy of your network stands between.",
            0,
        )
    if isinstance(error, requests.exceptions.InvalidProxyURL):
        return RejectedError("The address of the proxy in HTTPS_PROXY or HTTP_PROXY is none: fix it.", 0)
    if isinstance(error, OSError) and not isinstance(error, requests.RequestException):
        return RejectedError(f"This machine's set-up stands in the way: {printable(error)}.", 0)
    if "Tunnel connection failed" in str(_reason(error)):
        return RejectedError("The proxy of your network lets nothing through: look to HTTPS_PROXY and its password.", 0)
    return None


def _reason(error: Exception) -> object:
    """Return the innermost exception that urllib3 keeps."""
    reason = getattr(error.args[0] if error.args else None, "reason", None)
    # Called an error of the proxy even where the connection to it came about, and broke after the request was sent.
    return getattr(reason, "original_error", reason)


def _is_reached(error: requests.RequestException) -> bool:
    """Return whether the request may have arrived."""
    return not isinstance(_reason(error), NewConnectionError | ConnectTimeoutError)


def _response_error(
    response: requests.Response, competition: str, source: str, secrets: Collection[str]
) -> KaggleError:
    status, said = _status_and_message(response)
    told = f" Kaggle says: {printable(said, secrets)}" if said else ""
    page = f"https://www.kaggle.com/c/{competition}"
    if status == 401:
        return RejectedError(f"Kaggle refused the credentials from {source} (401): {HOW_TO_GET_ONE}.{told}", 401)
    if status == 403:
        return RejectedError(f"{_forbidden(said.lower(), competition, page)}{told}", 403)
    if status == 404:
        return RejectedError(
            f"Kaggle knows nothing of that name in '{competition}' (404): compare data.competition in params.yaml "
            f"with the competition's address.{told}",
            404,
        )
    if status == 407:
        return RejectedError("The proxy of your network asks for a password (407): put it into HTTPS_PROXY.", 407)
    if status == 429:
        asked = retry_after_s(response.headers.get("Retry-After"))
        when = f"in {asked / 60:.0f} minutes" if asked and asked > 90 else "later"
        return NotSentError(f"Kaggle was asked too often (429): run the same again {when}.{told}", asked)
    if status >= 500 or status == 408:
        asked = retry_after_s(response.headers.get("Retry-After"))
        words = f"Kaggle has a fault of its own ({status}): run the same again later.{told}"
        return OutcomeUnknownError(words, asked)
    return RejectedError(f"Kaggle refused this request ({status}).{told or ' It gives no reason.'}", status)


def _forbidden(said: str, competition: str, page: str) -> str:
    """Return what a 403 asks for; Kaggle answers so for three things, and its words tell them apart."""
    rules = f"accept the competition's rules once, at {page}/rules ('Join' or 'Late Submission')"
    phone = "verify your account by phone, at https://www.kaggle.com/settings"
    name = f"see that data.competition, '{competition}', is the name in the competition's address"
    if "rule" in said or "accept" in said:
        return f"Kaggle asks you first (403) to {rules}."
    if "phone" in said or "verif" in said:
        return f"Kaggle asks you first (403) to {phone}."
    if "competitions.get" in said:
        return f"Kaggle shows no such competition to you (403): {name}."
    return f"Kaggle does not allow this (403): {rules}; {phone}; or {name}."


def _status_and_message(response: requests.Response) -> tuple[int, str]:
    """Return the status and the words of an error; the client often drops the words."""
    try:
        body = json.loads(response.text)
    except (ValueError, requests.RequestException):
        body = None
    if not isinstance(body, dict):  # a page for browsers
        return response.status_code, ""
    code = body.get("code")
    return code if isinstance(code, int) and code >= 400 else response.status_code, str(body.get("message") or "")
