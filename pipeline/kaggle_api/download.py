"""The competition's files, fetched by name, taken up where they stopped, and verified before they get their names."""

import json
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

import requests
import urllib3
from tqdm import tqdm

from pipeline.data.settings import DataSettings
from pipeline.errors import CorruptFileError, PipelineError
from pipeline.files import write_json
from pipeline.kaggle_api.client import Kaggle, RemoteFile
from pipeline.kaggle_api.faults import KaggleError
from pipeline.kaggle_api.partial import Partial, Version, begins_as_zip, demand_sound_zip, md5_of
from pipeline.kaggle_api.patience import Tries, retry_after
from pipeline.resume import alone

MANIFEST = "fetched.json"
"""Beside the files: what each is, so that the next run verifies without fetching."""

IDS = "sample_submission.csv"
"""The file that says which images a submission must hold."""

_BLOCK = 1 << 18
_SPARE = 64 << 20
_SPOILED_AT_MOST = 3

Reach = Callable[[], Kaggle]
"""Return Kaggle; called only where something has to be asked of it, so that nobody needs an account before."""


@dataclass(frozen=True)
class Fetched:
    """What the manifest says of a file here."""

    file: str
    """Its name here."""
    listed: str
    """Its name at Kaggle."""
    size: int
    md5: str
    modified_ns: int
    """When the file here was written; while that and the size stay, its bytes are not read again."""
    listed_size: int
    created: str
    """When Kaggle says that it was put there."""
    etag: str | None


def parts(settings: DataSettings) -> list[str]:
    """Return what is needed of the competition, without ``.zip``."""
    hq = "_hq" if settings.quality == "hq" else ""
    return [f"train{hq}", f"test{hq}", "train_masks.csv", "metadata.csv", IDS]


def fetch(wanted: Sequence[str], folder: Path, reach: Reach, *, thorough: bool = False) -> None:
    """Make sure that the parts in ``wanted`` are in ``folder``, verified; with all there, nothing is asked of Kaggle.

    ``thorough`` reads all bytes of what is here, where else size and time are trusted.
    Raises PipelineError where a file is not listed, the disk has no room, or Kaggle does not answer well.
    """
    with alone(folder.with_suffix(".lock"), f"the download to {folder.name}"):
        shelf = _Shelf(folder)
        missing = {part for part in wanted if not shelf.holds(part, thorough)}
        if not missing:
            return
        kaggle = reach()
        files = kaggle.files()
        listed = {part: _match(part, files) for part in wanted}
        for part in listed.keys() - missing:
            shelf.tell_if_changed(part, listed[part])
        plan = {part: listed[part] for part in wanted if part in missing and not shelf.adopt(part, listed[part])}
        if not plan:
            return
        _tell(plan, shelf)
        _demand_room(plan, shelf)
        for part, remote in plan.items():
            _Fetch(kaggle, shelf, part, remote).run()


def preview(wanted: Sequence[str], folder: Path, reach: Reach) -> None:
    """Tell what `fetch` would fetch, and whether credentials, rules and disk allow it, without fetching.

    Raises PipelineError for the first thing that stands in the way.
    """
    kaggle = reach()
    files = kaggle.files()
    print(f"Credentials: those from {kaggle.source} work.")
    shelf = _Shelf(folder)
    listed = {part: _match(part, files) for part in wanted}
    kaggle.signed_url(min(listed.values(), key=lambda file: file.size).name)
    print(f"Rules of {kaggle.competition}: accepted.")
    plan = {part: remote for part, remote in listed.items() if not shelf.holds(part)}
    for part in listed.keys() - plan.keys():
        shelf.tell_if_changed(part, listed[part])
    if not plan:
        print(f"Nothing to fetch: {folder} has all {len(listed)} files.")
        return
    _tell(plan, shelf)
    free = _demand_room(plan, shelf)
    print(f"Disk: {_megabytes(free)} are free. 'carvana download' fetches.")


def _match(part: str, files: list[RemoteFile]) -> RemoteFile:
    by_name = {file.name: file for file in files}
    found = by_name.get(f"{part}.zip") or by_name.get(part)
    if found is None:
        names = ", ".join(sorted(by_name)[:12]) or "nothing"
        raise PipelineError(
            f"Kaggle lists neither {part}.zip nor {part}, but {names}: compare data.competition in params.yaml with "
            "the competition's address."
        )
    return found


def _tell(plan: Mapping[str, RemoteFile], shelf: "_Shelf") -> None:
    print(f"From Kaggle to {shelf.folder}:")
    for part, remote in plan.items():
        here = shelf.begun(part)
        begun = f", {_megabytes(here)} of it here" if here else ""
        print(f"  {remote.name:<28}{_megabytes(remote.size) if remote.size else 'size unknown':>12}{begun}")


def _demand_room(plan: Mapping[str, RemoteFile], shelf: "_Shelf") -> int:
    """Return the free bytes of the disk; raises PipelineError if they are too few."""
    needed = sum(max(0, remote.size - shelf.begun(part)) for part, remote in plan.items())
    shelf.folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(shelf.folder).free
    if free < needed + _SPARE:
        raise PipelineError(
            f"{shelf.folder} needs {_megabytes(needed)} more, and its disk has {_megabytes(free)} left: free some, "
            "or make it a link to a larger disk."
        )
    return free


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


class _Shelf:
    """The folder of what was fetched, with its manifest."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def holds(self, part: str, thorough: bool = False) -> bool:
        """Return whether the part is here as the manifest says."""
        known = self._manifest().get(part)
        if known is None:
            return False
        try:
            stat = (self.folder / known.file).stat()
        except OSError:
            return False
        if stat.st_size != known.size:
            same = False
        elif stat.st_mtime_ns == known.modified_ns and not thorough:
            return True
        else:
            same = md5_of(self.folder / known.file) == known.md5
        if not same:
            print(f"warning: {self.folder / known.file} is not as it was fetched.", file=sys.stderr)
        return same

    def adopt(self, part: str, remote: RemoteFile) -> bool:
        """Take a file that is here without being in the manifest, if it is sound; return whether it was."""
        for file in (self.folder / f"{part}.zip", self.folder / part):
            if not file.is_file():
                continue
            if not remote.size or file.stat().st_size == remote.size:
                try:
                    if begins_as_zip(file):
                        demand_sound_zip(file)
                    elif remote.name.endswith(".zip") or not remote.size or part in self._manifest():
                        # Nothing tells whether a plain file is sound but its size, and the manifest, which said no.
                        continue
                except CorruptFileError:
                    continue
                self.enter(part, file, remote, md5_of(file), None)
                print(f"{file} was here already, and is sound.")
                return True
        return False

    def tell_if_changed(self, part: str, remote: RemoteFile) -> None:
        """Warn where Kaggle has another version than the one here."""
        known = self._manifest().get(part)
        if known and (known.listed_size, known.created) != (remote.size, remote.created):
            print(
                f"warning: Kaggle has another {remote.name} now ({_megabytes(remote.size)}, of "
                f"{remote.created or 'no date'}) than the one here (of {known.created or 'no date'}), which stays. "
                f"To fetch the new one, delete {self.folder / known.file}.",
                file=sys.stderr,
            )

    def begun(self, part: str) -> int:
        """Return how many bytes of a part are here, unfinished."""
        file = self.partial(part)
        return file.stat().st_size if file.is_file() else 0

    def partial(self, part: str) -> Path:
        """Return where a part comes in."""
        return self.folder / f".{part}.part"

    def enter(self, part: str, file: Path, remote: RemoteFile, md5: str, etag: str | None) -> None:
        """Note what a verified file is."""
        stat = file.stat()
        entry = Fetched(file.name, remote.name, stat.st_size, md5, stat.st_mtime_ns, remote.size, remote.created, etag)
        entries = {**self._manifest(), part: entry}
        write_json(self.folder / MANIFEST, {name: asdict(value) for name, value in sorted(entries.items())})

    def _manifest(self) -> dict[str, Fetched]:
        try:
            content = json.loads((self.folder / MANIFEST).read_text(encoding="utf-8"))
            return {part: Fetched(**entry) for part, entry in content.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            raise PipelineError(
                f"{self.folder / MANIFEST} can't be read ({error}): delete it; sound files are not fetched again."
            ) from error


class _CutOffError(KaggleError):
    """The storage stopped before the end."""

    def __init__(self, words: str, *, asked_s: float | None = None, expired: bool = False) -> None:
        super().__init__(words)
        self.asked_s = asked_s
        self.expired = expired


class _Fetch:
    """One file's way here."""

    def __init__(self, kaggle: Kaggle, shelf: _Shelf, part: str, remote: RemoteFile) -> None:
        self._kaggle = kaggle
        self._shelf = shelf
        self._part = part
        self._remote = remote
        self._partial = Partial(shelf.partial(part))
        self._storage = requests.Session()
        self._storage.auth = lambda request: request  # or requests would look for some in ~/.netrc
        self._bar: tqdm[NoReturn] = tqdm(
            desc=remote.name, total=remote.size or None, initial=self._partial.size, unit="B", unit_scale=True
        )

    def run(self) -> None:
        """Fetch, verify, name and note the file."""
        with self._bar, self._storage:
            for _ in range(_SPOILED_AT_MOST):
                self._fetch()
                try:
                    return self._take_in()
                except CorruptFileError as error:
                    print(f"\n{error} It is fetched anew.", file=sys.stderr)
                    self._restart()
        raise PipelineError(
            f"{self._remote.name} came damaged {_SPOILED_AT_MOST} times: something between Kaggle and here changes it, "
            "a proxy maybe, or this machine's disk or memory is at fault."
        )

    def _fetch(self) -> None:
        """Fetch to the end, taking up after whatever breaks off, as long as it comes forward."""
        tries = Tries(self._kaggle.patience)
        url = ""
        while not self._complete():
            before = self._partial.size
            try:
                url = url or self._kaggle.signed_url(self._remote.name)
                self._go_on(url)
                return
            except _CutOffError as error:
                url = "" if error.expired else url
                if self._partial.size > before:
                    tries.progressed()
                self._pause(tries, error)

    def _pause(self, tries: Tries, error: "_CutOffError") -> None:
        try:
            tries.again(error, error.asked_s)
        except _CutOffError:
            raise KaggleError(f"{error} Run the same again later: it goes on from there.") from None

    def _complete(self) -> bool:
        """Return whether a killed run had all bytes already."""
        version = self._partial.version
        return bool(version and version.size and self._partial.size == version.size)

    def _go_on(self, url: str) -> None:
        """Fetch from where the bytes end; raises _CutOffError if the end does not come."""
        try:
            with self._storage.get(
                url, headers=self._headers(), stream=True, timeout=self._kaggle.patience.timeouts
            ) as response:
                self._demand_content(response)
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
            raise _CutOffError(f"The download of {self._remote.name} {kind}.") from None
        expected = (self._partial.version or Version()).size or self._remote.size
        if self._partial.size < expected:
            raise _CutOffError(f"The download of {self._remote.name} ended before its end.")
        if self._partial.size > expected > 0:
            self._restart()
            raise _CutOffError(f"The download of {self._remote.name} is longer than it should be.")

    def _headers(self) -> dict[str, str]:
        headers = {"Accept-Encoding": "identity"}
        start, version = self._partial.size, self._partial.version
        if start and version:
            headers["Range"] = f"bytes={start}-"
            if version.condition:
                headers["If-Range"] = version.condition
        return headers

    def _demand_content(self, response: requests.Response) -> None:
        """Raise unless the answer holds bytes of the file: an error's page must not become part of it."""
        status, name = response.status_code, self._remote.name
        if status in (200, 206):
            return
        if status == 416:
            self._restart()
            raise _CutOffError(f"The storage has less of {name} than is here: it is fetched anew.")
        if status in (408, 429) or status >= 500:
            asked = retry_after(response.headers.get("Retry-After"))
            raise _CutOffError(f"The storage of {name} has a fault of its own ({status}).", asked_s=asked)
        raise _CutOffError(f"The address of {name} has expired or is refused ({status}).", expired=True)

    def _prepare(self, response: requests.Response) -> None:
        """Hold the answer against what is here, which is dropped where the two are not of one version."""
        start, total = _extent(response)
        version = Version.of(response.headers, total)
        known = self._partial.version
        if known is not None and known.differs(version):
            print(f"\n{self._remote.name} changed at Kaggle: it is fetched anew.", file=sys.stderr)
            self._restart()
        elif start != self._partial.size:
            self._restart()
        elif start and not (version.condition or self._partial.is_zip):
            # Nothing would tell whether the rest is of the same version: no name for it, and no CRC in it.
            self._restart()
        if start != self._partial.size:
            raise _CutOffError(f"The storage of {self._remote.name} sends another part than was asked for.")
        if self._partial.version is None:
            self._partial.begin(version)
        if total:
            self._bar.total = total
            self._bar.refresh()

    def _take_in(self) -> None:
        partial, remote = self._partial, self._remote
        version = partial.version or Version()
        if version.md5 and version.md5 != partial.md5:
            raise CorruptFileError(f"{remote.name} has another MD5 than Kaggle's storage says.")
        is_zip = partial.is_zip
        if not is_zip and remote.name.endswith(".zip"):
            raise CorruptFileError(f"{remote.name} came, but is no zip.")
        if is_zip:
            demand_sound_zip(partial.file)
        target = self._shelf.folder / (f"{self._part}.zip" if is_zip else self._part)
        partial.finish(target)
        self._shelf.enter(self._part, target, remote, partial.md5, version.etag)

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
