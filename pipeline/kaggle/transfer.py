"""Downloads that resume, and uploads."""

import re
import sys
import zipfile
from pathlib import Path
from typing import NoReturn

import requests
import urllib3
from tqdm import tqdm

from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.kaggle.api_errors import Backoff, KaggleError, local_setup_error, retry_after_s
from pipeline.kaggle.client import KaggleClient, RemoteFile
from pipeline.kaggle.download_cache import DownloadCache, FileVersion, PartialDownload, check_zip


class AnonymousSession(requests.Session):
    """A session without credentials, also where the storage redirects; requests would look for some in ~/.netrc."""

    def __init__(self) -> None:
        super().__init__()
        self.auth = lambda request: request

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Leave a redirected request as it is."""


_BLOCK = 1 << 18

_MAX_CORRUPT = 3


class _TruncatedDownloadError(KaggleError):
    """The storage stopped before the end."""

    def __init__(self, words: str, *, asked_s: float | None = None, expired: bool = False) -> None:
        super().__init__(words)
        self.asked_s = asked_s
        self.expired = expired


class FileDownload:
    """One part of the competition on its way to the shelf."""

    def __init__(self, kaggle: KaggleClient, shelf: DownloadCache, part: str, remote: RemoteFile) -> None:
        """Take up what an earlier run left of the part; ``remote`` is what Kaggle lists of it."""
        self._kaggle = kaggle
        self._shelf = shelf
        self._part = part
        self._remote = remote
        self._partial = PartialDownload(shelf.partial(part), f"{remote.name} {remote.size} {remote.created}")
        self._storage = AnonymousSession()
        self._bar: tqdm[NoReturn] = tqdm(
            desc=remote.name, total=remote.size or None, initial=self._partial.size, unit="B", unit_scale=True
        )

    def run(self) -> None:
        """Fetch, verify, name and note the file."""
        with self._bar, self._storage:
            for _ in range(_MAX_CORRUPT):
                self._fetch()
                try:
                    return self._finalize()
                except CorruptFileError as error:
                    print(f"\n{error} It is fetched again.", file=sys.stderr)
                    self._restart()
                except CarvanaError as error:
                    if error.__cause__ is None:  # it holds what is refused, and not: the drive failed
                        self._restart()
                    raise
        raise CarvanaError(
            f"{self._remote.name} came damaged {_MAX_CORRUPT} times: something between Kaggle and here changes it, "
            "a proxy maybe, or this machine's disk or memory is at fault."
        )

    def _fetch(self) -> None:
        """Fetch to the end, taking up after whatever breaks off, as long as it comes further than before."""
        tries, furthest, url = Backoff(self._kaggle.patience), self._partial.size, ""
        while not self._partial.is_complete:
            try:
                url = url or self._kaggle.signed_url(self._remote.name)
                self._resume(url)
                return
            except _TruncatedDownloadError as error:
                url = "" if error.expired else url
                if self._partial.size > furthest:
                    furthest = self._partial.size
                    tries.reset()
                self._pause(tries, error)

    def _pause(self, tries: Backoff, error: "_TruncatedDownloadError") -> None:
        try:
            tries.wait_or_raise(error, error.asked_s)
        except _TruncatedDownloadError:
            raise KaggleError(f"{error} Run the same again later: it goes on from there.") from None

    def _resume(self, url: str) -> None:
        """Fetch from where the bytes end; raises _CutOffError if the end does not come."""
        try:
            with self._storage.get(
                url, headers=self._headers(), stream=True, timeout=self._kaggle.patience.timeouts
            ) as response:
                self._check_content(response)
                self._prepare(response)
                with self._partial.file.open("ab", buffering=0) as output:
                    # As they come: whole blocks would be lost with what is missing of them when it breaks off.
                    while block := response.raw.read1(_BLOCK, decode_content=False):
                        self._partial.add(output, block)
                        self._bar.update(len(block))
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            # Not its own words, since they hold the signed address.
            late = isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError)
            kind = "did not go on in time" if late else "broke off"
            raise local_setup_error(error) or _TruncatedDownloadError(
                f"The download of {self._remote.name} {kind}."
            ) from None
        self._check_complete()

    def _check_complete(self) -> None:
        """Raise _CutOffError unless all bytes came; a zip tells by itself where the storage does not."""
        partial, name = self._partial, self._remote.name
        size, expected = partial.size, partial.version.size if partial.version else None
        if expected is None:
            ended = zipfile.is_zipfile(partial.file) if partial.is_zip else size >= self._remote.size
        elif size > expected:
            self._restart()
            raise _TruncatedDownloadError(f"The download of {name} is longer than it should be.")
        else:
            ended = size == expected
        if not ended:
            raise _TruncatedDownloadError(f"The download of {name} ended before its end.")

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        start, version = self._partial.size, self._partial.version
        if start and version:
            headers["Range"] = f"bytes={start}-"
            if version.condition:
                headers["If-Range"] = version.condition
        return headers

    def _check_content(self, response: requests.Response) -> None:
        """Raise unless the answer holds bytes of the file: an error's page must not become part of it."""
        status, name = response.status_code, self._remote.name
        if status in (200, 206):
            if "text/html" in response.headers.get("Content-Type", ""):
                raise _TruncatedDownloadError(
                    f"A page for browsers came in place of {name}, of a proxy maybe.", expired=True
                )
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _TruncatedDownloadError(f"{name} came packed otherwise than it is stored.")
            return
        if status == 416:
            self._restart()
            raise _TruncatedDownloadError(f"The storage has less of {name} than is here: it is fetched again.")
        if status in (408, 429) or status >= 500:
            asked = retry_after_s(response.headers.get("Retry-After"))
            raise _TruncatedDownloadError(f"The storage of {name} has a fault of its own ({status}).", asked_s=asked)
        raise _TruncatedDownloadError(f"The address of {name} has expired or is refused ({status}).", expired=True)

    def _prepare(self, response: requests.Response) -> None:
        """Hold the answer against what is here, which is dropped where the two are not of one version."""
        start, total = _extent(response)
        version = FileVersion.of(response.headers, total)
        known = self._partial.version
        if known is not None and known.differs(version):
            print(f"\n{self._remote.name} changed at Kaggle: it is fetched again.", file=sys.stderr)
            self._restart()
        elif start != self._partial.size:
            self._restart()
        elif start and not (version.condition or self._partial.is_zip):
            # Nothing would tell whether the rest is of the same version: no name for it, and no CRC in it.
            self._restart()
        if start != self._partial.size:
            raise _TruncatedDownloadError(f"The storage of {self._remote.name} sends another part than was asked for.")
        if self._partial.version is None:
            self._partial.start(version)
        if total:
            self._bar.total = total
            self._bar.refresh()

    def _finalize(self) -> None:
        partial, remote = self._partial, self._remote
        version = partial.version or FileVersion()
        if version.md5 and version.md5 != partial.md5:
            raise CorruptFileError(f"{remote.name} has another MD5 than Kaggle's storage says.")
        is_zip = partial.is_zip
        if is_zip:
            check_zip(partial.file)
        elif remote.name.endswith(".zip") or remote.size not in (0, partial.size):
            raise CorruptFileError(f"What came is no {remote.name}, or not of the length that Kaggle lists.")
        target = self._shelf.folder / (f"{self._part}.zip" if is_zip else self._part)
        self._shelf.move_aside(self._part)
        partial.finish(target)
        self._shelf.record(self._part, target, remote, partial.md5, version.etag)

    def _restart(self) -> None:
        self._partial.restart()
        self._bar.reset(self._bar.total)


def _extent(response: requests.Response) -> tuple[int, int | None]:
    """Return at which byte an answer begins, and how many bytes the whole file has, if that is told."""
    if response.status_code == 206:
        unit, _, content = response.headers.get("Content-Range", "").partition(" ")
        span, _, total = content.partition("/")
        start = span.partition("-")[0]
        if unit != "bytes" or not start.isdigit():
            return -1, None
        return int(start), int(total) if total.isdigit() else None
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


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
