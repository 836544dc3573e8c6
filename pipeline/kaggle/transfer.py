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
from pipeline.kaggle.api_errors import Backoff, KaggleError, local_setup_error, parse_retry_after
from pipeline.kaggle.client import KaggleClient, RemoteFile
from pipeline.kaggle.download_cache import DownloadCache, FileVersion, PartialDownload, check_zip


class AnonymousSession(requests.Session):
    """A session that never sends credentials, not even those that requests would read from ~/.netrc on a redirect."""

    def __init__(self) -> None:
        super().__init__()
        self.auth = lambda request: request

    def rebuild_auth(self, prepared_request: requests.PreparedRequest, response: requests.Response) -> None:
        """Do not add credentials to redirected requests."""


_BLOCK = 1 << 18

_MAX_CORRUPT = 3


class _TruncatedDownloadError(KaggleError):
    """A download ended early or could not start."""

    def __init__(self, message: str, *, retry_after_s: float | None = None, expired: bool = False) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s
        self.expired = expired
        """Whether a new signed URL is needed."""


class FileDownload:
    """Downloads one file, resuming an earlier attempt."""

    def __init__(self, kaggle: KaggleClient, cache: DownloadCache, part: str, remote: RemoteFile) -> None:
        """Continue the unfinished download of ``part``, if any; ``remote`` is its entry in Kaggle's list."""
        self._kaggle = kaggle
        self._cache = cache
        self._part = part
        self._remote = remote
        self._partial = PartialDownload(cache.partial(part), f"{remote.name} {remote.size} {remote.created}")
        self._storage = AnonymousSession()
        self._bar: tqdm[NoReturn] = tqdm(
            desc=remote.name, total=remote.size or None, initial=self._partial.size, unit="B", unit_scale=True
        )

    def run(self) -> None:
        """Download, verify, rename and record the file."""
        with self._bar, self._storage:
            for _ in range(_MAX_CORRUPT):
                self._fetch()
                try:
                    return self._finalize()
                except CorruptFileError as error:
                    print(f"\n{error} Downloading it again.", file=sys.stderr)
                    self._restart()
                except CarvanaError as error:
                    if error.__cause__ is None:  # the content is unsafe, rather than a disk error
                        self._restart()
                    raise
        raise CarvanaError(
            f"{self._remote.name} was damaged in {_MAX_CORRUPT} downloads. A proxy may change it, or this machine's "
            "disk or memory may be faulty."
        )

    def _fetch(self) -> None:
        """Download to the end, resuming after interruptions; gives up after several attempts without progress."""
        backoff, furthest, url = Backoff(self._kaggle.policy), self._partial.size, ""
        while not self._partial.is_complete:
            try:
                url = url or self._kaggle.signed_url(self._remote.name)
                self._resume(url)
                return
            except _TruncatedDownloadError as error:
                url = "" if error.expired else url
                if self._partial.size > furthest:
                    furthest = self._partial.size
                    backoff.reset()
                try:
                    backoff.wait_or_raise(error, error.retry_after_s)
                except _TruncatedDownloadError:
                    raise KaggleError(f"{error} Run the command again later; it resumes the download.") from None

    def _resume(self, url: str) -> None:
        """Download the remaining bytes; raises _TruncatedDownloadError if it ends early."""
        try:
            with self._storage.get(
                url, headers=self._headers(), stream=True, timeout=self._kaggle.policy.timeouts
            ) as response:
                self._check_content(response)
                self._prepare(response)
                with self._partial.file.open("ab", buffering=0) as output:
                    # read1 returns bytes as they arrive; waiting for full blocks would lose some when it breaks.
                    while block := response.raw.read1(_BLOCK, decode_content=False):
                        self._partial.add(output, block)
                        self._bar.update(len(block))
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            # Not the error's text, which contains the signed URL.
            timeout = isinstance(error, requests.Timeout | urllib3.exceptions.TimeoutError)
            kind = "timed out" if timeout else "was interrupted"
            raise local_setup_error(error) or _TruncatedDownloadError(
                f"The download of {self._remote.name} {kind}."
            ) from None
        self._check_complete()

    def _check_complete(self) -> None:
        """Raise _TruncatedDownloadError unless all bytes arrived; if the size is unknown, check the zip's end."""
        partial, name = self._partial, self._remote.name
        size, expected = partial.size, partial.version.size if partial.version else None
        if expected is None:
            ended = zipfile.is_zipfile(partial.file) if partial.is_zip else size >= self._remote.size
        elif size > expected:
            self._restart()
            raise _TruncatedDownloadError(f"The download of {name} is larger than expected.")
        else:
            ended = size == expected
        if not ended:
            raise _TruncatedDownloadError(f"The download of {name} ended early.")

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        start, version = self._partial.size, self._partial.version
        if start and version:
            headers["Range"] = f"bytes={start}-"
            if version.condition:
                headers["If-Range"] = version.condition
        return headers

    def _check_content(self, response: requests.Response) -> None:
        """Raise _TruncatedDownloadError unless the response contains bytes of the file, not an error page."""
        status, name = response.status_code, self._remote.name
        if status in (200, 206):
            if "text/html" in response.headers.get("Content-Type", ""):
                raise _TruncatedDownloadError(f"Got an HTML page instead of {name}, maybe from a proxy.", expired=True)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _TruncatedDownloadError(f"{name} came with an unexpected content encoding.")
            return
        if status == 416:
            self._restart()
            raise _TruncatedDownloadError(f"{name} is smaller on the server than the local part. Starting over.")
        if status in (408, 429) or status >= 500:
            retry_after = parse_retry_after(response.headers.get("Retry-After"))
            raise _TruncatedDownloadError(f"Server error for {name} ({status}).", retry_after_s=retry_after)
        raise _TruncatedDownloadError(f"The URL of {name} expired or was rejected ({status}).", expired=True)

    def _prepare(self, response: requests.Response) -> None:
        """Compare the response with the local bytes; start over if they belong to different versions."""
        start, total = _extent(response)
        version = FileVersion.of(response.headers, total)
        known = self._partial.version
        if known is not None and known.differs(version):
            print(f"\n{self._remote.name} changed on Kaggle. Downloading it again.", file=sys.stderr)
            self._restart()
        elif start != self._partial.size:
            self._restart()
        elif start and not (version.condition or self._partial.is_zip):
            # Without ETag, date or CRC, a mix of two versions would go unnoticed.
            self._restart()
        if start != self._partial.size:
            raise _TruncatedDownloadError(f"The server sent the wrong range of {self._remote.name}.")
        if self._partial.version is None:
            self._partial.start(version)
        if total:
            self._bar.total = total
            self._bar.refresh()

    def _finalize(self) -> None:
        partial, remote = self._partial, self._remote
        version = partial.version or FileVersion()
        if version.md5 and version.md5 != partial.md5:
            raise CorruptFileError(f"{remote.name} does not match the MD5 reported by Kaggle.")
        is_zip = partial.is_zip
        if is_zip:
            check_zip(partial.file)
        elif remote.name.endswith(".zip") or remote.size not in (0, partial.size):
            raise CorruptFileError(f"{remote.name} is not a zip, or has the wrong size.")
        target = self._cache.folder / (f"{self._part}.zip" if is_zip else self._part)
        self._cache.move_aside(self._part)
        partial.finish(target)
        self._cache.record(self._part, target, remote, partial.md5, version.etag)

    def _restart(self) -> None:
        self._partial.restart()
        self._bar.reset(self._bar.total)


def _extent(response: requests.Response) -> tuple[int, int | None]:
    """Return the first byte's position in a response, and the size of the whole file if known."""
    if response.status_code == 206:
        unit, _, content = response.headers.get("Content-Range", "").partition(" ")
        span, _, total = content.partition("/")
        start = span.partition("-")[0]
        if unit != "bytes" or not start.isdigit():
            return -1, None
        return int(start), int(total) if total.isdigit() else None
    length = response.headers.get("Content-Length", "")
    return 0, int(length) if length.isdigit() else None


_MAX_REJECTIONS = 2


class _UploadError(KaggleError):
    """An upload was rejected or interrupted."""

    def __init__(self, message: str, *, rejected: bool = False, retry_after_s: float | None = None) -> None:
        super().__init__(message)
        self.rejected = rejected
        self.retry_after_s = retry_after_s


def upload(kaggle: KaggleClient, file: Path, name: str) -> str:
    """Upload a file to Kaggle's storage under a name, and return its token.

    An upload uses up no submission, so it is retried. Raises KaggleError if it keeps failing.
    """
    backoff, rejections = Backoff(kaggle.policy), 0
    stat = file.stat()
    token, url, start, furthest = "", "", 0, 0
    with AnonymousSession() as storage:
        while True:
            if not url:
                token, url = kaggle.start_upload(name, stat.st_size, int(stat.st_mtime))
                start = 0
            try:
                if start < stat.st_size:
                    _put(storage, url, file, start, kaggle.policy.timeouts)
                return token
            except _UploadError as error:
                rejections += error.rejected
                if rejections >= _MAX_REJECTIONS:
                    raise
                backoff.wait_or_raise(error, error.retry_after_s)
                received = None if error.rejected else _received(storage, url, stat.st_size, kaggle.policy.timeouts)
            if received is None:
                url = ""
            elif received > furthest:
                furthest = received
                backoff.reset()
            start = received or 0


def _put(storage: requests.Session, url: str, file: Path, start: int, timeouts: tuple[float, float]) -> None:
    """Send a file's bytes from ``start``; raises _UploadError unless the storage confirms that it is complete."""
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
            raise _UploadError("The upload was interrupted; nothing was submitted. Run the command again.") from None
    if response.status_code not in (200, 201):
        rejected = 400 <= response.status_code < 500 and response.status_code not in (408, 429)
        raise _UploadError(
            f"Kaggle's storage rejected the upload ({response.status_code}); nothing was submitted. Try again later.",
            rejected=rejected,
            retry_after_s=parse_retry_after(response.headers.get("Retry-After")),
        )


def _received(storage: requests.Session, url: str, size: int, timeouts: tuple[float, float]) -> int | None:
    """Return how many bytes of an interrupted upload the storage has; None if it must start over."""
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
