"""The competition's files, fetched by name, taken up where they stopped, and verified before they get their names."""

import json
import shutil
import sys
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NoReturn

import requests
import urllib3
from tqdm import tqdm

from pipeline.data.settings import DataSettings
from pipeline.errors import CorruptFileError, PipelineError
from pipeline.files import write_json
from pipeline.kaggle_api.client import Kaggle, RemoteFile
from pipeline.kaggle_api.faults import KaggleError, of_machine
from pipeline.kaggle_api.partial import Partial, Version, demand_sound_zip, md5_of
from pipeline.kaggle_api.patience import Tries, retry_after
from pipeline.kaggle_api.storage import Storage
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
        missing = [part for part in wanted if not shelf.holds(part, thorough)]
        if not missing:
            return
        kaggle = reach()
        listed = _listed(wanted, kaggle.files(), shelf)
        plan = {part: listed[part] for part in missing if not shelf.adopt(part, listed[part])}
        if plan:
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
    listed = _listed(wanted, files, shelf)
    kaggle.signed_url(min(listed.values(), key=lambda file: file.size).name)
    print(f"Rules of {kaggle.competition}: accepted.")
    missing = {part: remote for part, remote in listed.items() if not shelf.holds(part)}
    plan = {part: remote for part, remote in missing.items() if not shelf.lying(part, remote)}
    for part in missing.keys() - plan.keys():
        print(f"{missing[part].name} lies in {folder}, not verified yet.")
    if not plan:
        print(f"Nothing to fetch: {folder} has all {len(listed)} files.")
        return
    _tell(plan, shelf)
    print(f"Disk: {_megabytes(_demand_room(plan, shelf))} are free. 'carvana download' fetches.")


def _listed(wanted: Sequence[str], files: list[RemoteFile], shelf: "_Shelf") -> dict[str, RemoteFile]:
    """Return what Kaggle lists of each part; tells what changed since it was fetched."""
    listed = {part: _match(part, files) for part in wanted}
    for part, remote in listed.items():
        shelf.tell_if_changed(part, remote)
    return listed


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
    there = next(place for place in (shelf.folder, *shelf.folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
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
        if stat.st_size == known.size and stat.st_mtime_ns == known.modified_ns and not thorough:
            return True
        if stat.st_size == known.size and md5_of(self.folder / known.file) == known.md5:
            if stat.st_mtime_ns != known.modified_ns:
                self._note(part, replace(known, modified_ns=stat.st_mtime_ns))
            return True
        print(f"warning: {self.folder / known.file} is not as it was fetched.", file=sys.stderr)
        return False

    def lying(self, part: str, remote: RemoteFile) -> Path | None:
        """Return a zip that lies here without being in the manifest, and may be what Kaggle lists; or None."""
        file = self.folder / f"{part}.zip"
        if part in self._manifest() or not file.is_file():
            return None
        return file if not remote.size or file.stat().st_size == remote.size else None

    def adopt(self, part: str, remote: RemoteFile) -> bool:
        """Take a zip that lies here, if it is sound; return whether it was. Of other files nothing tells."""
        file = self.lying(part, remote)
        if file is None:
            return False
        try:
            demand_sound_zip(file)
        except PipelineError as error:
            print(f"warning: {error}", file=sys.stderr)
            return False
        self.enter(part, file, remote, md5_of(file), None)
        print(f"{file} was here already, and is sound.")
        return True

    def tell_if_changed(self, part: str, remote: RemoteFile) -> None:
        """Warn where Kaggle has another version than the one that was fetched."""
        known = self._manifest().get(part)
        if known and (known.listed_size, known.created) != (remote.size, remote.created):
            print(
                f"warning: Kaggle has another {remote.name} now ({_megabytes(remote.size)}, of "
                f"{remote.created or 'no date'}) than the one that was fetched (of {known.created or 'no date'}). "
                f"A file that is here stays: to fetch the new one, delete {self.folder / known.file}.",
                file=sys.stderr,
            )

    def make_way(self, part: str, target: Path) -> None:
        """Move aside what lies here under a name of the part, and is none of ours."""
        known = self._manifest().get(part)
        for place in (self.folder / f"{part}.zip", self.folder / part):
            ours = known is not None and known.file == place.name and place.is_file()
            if place.exists() and not (ours and place == target):
                aside = place.with_name(f"{place.name}.{time.strftime('%Y%m%d-%H%M%S')}.aside")
                place.rename(aside)
                print(f"\nwarning: {place} was in the way, and is {aside.name} now.", file=sys.stderr)

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
        self._note(part, entry)

    def _note(self, part: str, entry: Fetched) -> None:
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
                f"{self.folder / MANIFEST} can't be read ({error}): delete it; zips that are sound stay."
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
        self._partial = Partial(shelf.partial(part), f"{remote.name} {remote.size} {remote.created}")
        self._storage = Storage()
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
                except PipelineError:  # what it holds is refused: nothing to go on from
                    self._restart()
                    raise
        raise PipelineError(
            f"{self._remote.name} came damaged {_SPOILED_AT_MOST} times: something between Kaggle and here changes it, "
            "a proxy maybe, or this machine's disk or memory is at fault."
        )

    def _fetch(self) -> None:
        """Fetch to the end, taking up after whatever breaks off, as long as it comes further than before."""
        tries, furthest, url = Tries(self._kaggle.patience), self._partial.size, ""
        while not self._partial.is_complete:
            try:
                url = url or self._kaggle.signed_url(self._remote.name)
                self._go_on(url)
                return
            except _CutOffError as error:
                url = "" if error.expired else url
                if self._partial.size > furthest:
                    furthest = self._partial.size
                    tries.progressed()
                self._pause(tries, error)

    def _pause(self, tries: Tries, error: "_CutOffError") -> None:
        try:
            tries.again(error, error.asked_s)
        except _CutOffError:
            raise KaggleError(f"{error} Run the same again later: it goes on from there.") from None

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
            raise of_machine(error) or _CutOffError(f"The download of {self._remote.name} {kind}.") from None
        self._demand_end()

    def _demand_end(self) -> None:
        """Raise _CutOffError unless all bytes came; a zip tells by itself where the storage does not."""
        partial, name = self._partial, self._remote.name
        size, expected = partial.size, partial.version.size if partial.version else None
        if expected is None:
            ended = zipfile.is_zipfile(partial.file) if partial.is_zip else size >= self._remote.size
        elif size > expected:
            self._restart()
            raise _CutOffError(f"The download of {name} is longer than it should be.")
        else:
            ended = size == expected
        if not ended:
            raise _CutOffError(f"The download of {name} ended before its end.")

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
            if "text/html" in response.headers.get("Content-Type", ""):
                raise _CutOffError(f"A page for browsers came in place of {name}, of a proxy maybe.", expired=True)
            if response.headers.get("Content-Encoding", "identity") != "identity":
                raise _CutOffError(f"{name} came packed otherwise than it is stored.")
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
        if is_zip:
            demand_sound_zip(partial.file)
        elif remote.name.endswith(".zip") or remote.size not in (0, partial.size):
            raise CorruptFileError(f"What came is no {remote.name}, or not of the length that Kaggle lists.")
        target = self._shelf.folder / (f"{self._part}.zip" if is_zip else self._part)
        self._shelf.make_way(self._part, target)
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
