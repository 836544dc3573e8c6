"""How long to wait for Kaggle, how often to ask again, and how to pause in between."""

import email.utils
import random
import sys
import time
from dataclasses import dataclass


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
