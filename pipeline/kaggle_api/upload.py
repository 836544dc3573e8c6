"""A file's way to Kaggle's storage: taken up where it broke off, and done only when the storage says so."""

import re
from pathlib import Path

import requests
from tqdm import tqdm

from pipeline.kaggle_api.client import KaggleClient
from pipeline.kaggle_api.faults import KaggleError
from pipeline.kaggle_api.patience import Backoff, retry_after_s
from pipeline.kaggle_api.storage import AnonymousSession

_REFUSED_AT_MOST = 2


class _NotTakenError(KaggleError):
    """The storage did not take the file, or not all of it."""

    def __init__(self, words: str, *, refused: bool = False, asked_s: float | None = None) -> None:
        super().__init__(words)
        self.refused = refused
        self.asked_s = asked_s


def upload(kaggle: KaggleClient, file: Path, name: str) -> str:
    """Put a file into Kaggle's storage under a name, and return the token that stands for it there.

    An upload spends no submission, so it is repeated until it succeeds or patience ends; then raises KaggleError.
    """
    tries, refusals = Backoff(kaggle.patience), 0
    stat = file.stat()
    token, url, start, furthest = "", "", 0, 0
    with AnonymousSession() as storage:
        while True:
            if not url:
                token, url = kaggle.start_upload(name, stat.st_size, int(stat.st_mtime))
                start = 0
            try:
                if start < stat.st_size:
                    _put(storage, url, file, start, kaggle.patience.timeouts)
                return token
            except _NotTakenError as error:
                refusals += error.refused
                if refusals >= _REFUSED_AT_MOST:
                    raise
                tries.wait_or_raise(error, error.asked_s)
                taken = None if error.refused else _taken(storage, url, stat.st_size, kaggle.patience.timeouts)
            if taken is None:
                url = ""
            elif taken > furthest:
                furthest = taken
                tries.reset()
            start = taken or 0


def _put(storage: requests.Session, url: str, file: Path, start: int, timeouts: tuple[float, float]) -> None:
    """Send a file's bytes from ``start``; raises _NotTakenError unless the storage says that it has all."""
    size = file.stat().st_size
    headers = {"Content-Range": f"bytes {start}-{size - 1}/{size}"} if start else {}
    with (
        file.open("rb") as stream,
        tqdm.wrapattr(stream, "read", desc="Uploading", total=size, initial=start, unit="B", leave=False) as body,
    ):
        stream.seek(start)
        try:
            response = storage.put(url, data=body, headers=headers, timeout=timeouts, allow_redirects=False)
        except requests.RequestException:
            raise _NotTakenError("The upload broke off; nothing was submitted. Run the same again.") from None
    if response.status_code not in (200, 201):
        refused = 400 <= response.status_code < 500 and response.status_code not in (408, 429)
        raise _NotTakenError(
            f"Kaggle's storage did not take the upload ({response.status_code}); nothing was submitted. "
            "Run the same again later.",
            refused=refused,
            asked_s=retry_after_s(response.headers.get("Retry-After")),
        )


def _taken(storage: requests.Session, url: str, size: int, timeouts: tuple[float, float]) -> int | None:
    """Return how many bytes the storage has of an upload that broke off; None if it must begin again."""
    try:
        response = storage.put(
            url, headers={"Content-Range": f"bytes */{size}"}, timeout=timeouts, allow_redirects=False
        )
    except requests.RequestException:
        return None
    if response.status_code in (200, 201):
        return size
    if response.status_code != 308:
        return None
    match = re.fullmatch(r"bytes=0-(\d+)", response.headers.get("Range", ""))
    return int(match[1]) + 1 if match else 0
