"""What the pipeline needs of the competition: which files, whether they are here, and whether they can be fetched."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.config import DataSettings
from pipeline.errors import CarvanaError
from pipeline.kaggle.client import KaggleClient, RemoteFile
from pipeline.kaggle.download_cache import DownloadCache, megabytes
from pipeline.kaggle.transfer import FileDownload
from pipeline.utils.run_state import file_lock

IDS = "sample_submission.csv"
"""The file that says which images a submission must hold."""

_SPARE = 64 << 20

ClientFactory = Callable[[], KaggleClient]
"""Return Kaggle; called only where something has to be asked of it, so that nobody needs an account before."""


def required_files(settings: DataSettings) -> list[str]:
    """Return what is needed of the competition, without ``.zip``."""
    hq = "_hq" if settings.quality == "hq" else ""
    return [f"train{hq}", f"test{hq}", "train_masks.csv", "metadata.csv", IDS]


def download_files(wanted: Sequence[str], folder: Path, reach: ClientFactory, *, thorough: bool = False) -> None:
    """Make sure that the parts in ``wanted`` are in ``folder``, verified; with all there, nothing is asked of Kaggle.

    ``thorough`` reads all bytes of what is here, where else size and time are trusted.
    Raises CarvanaError where a file is not listed, the disk has no room, or Kaggle does not answer well.
    """
    with file_lock(folder.with_suffix(".lock"), f"the download to {folder.name}"):
        shelf = DownloadCache(folder)
        missing = [part for part in wanted if not shelf.is_verified(part, thorough)]
        if not missing:
            return
        kaggle = reach()
        listed = _listed(wanted, kaggle.files(), shelf)
        plan = {part: listed[part] for part in missing if not shelf.import_existing(part, listed[part])}
        if plan:
            _print_plan(plan, shelf)
            _check_disk_space(plan, shelf)
        for part, remote in plan.items():
            FileDownload(kaggle, shelf, part, remote).run()


def preview_download(wanted: Sequence[str], folder: Path, reach: ClientFactory) -> None:
    """Tell what `fetch` would fetch, and whether credentials, rules and disk allow it, without fetching.

    Raises CarvanaError for the first thing that stands in the way.
    """
    kaggle = reach()
    files = kaggle.files()
    print(f"Credentials: those from {kaggle.source} work.")
    shelf = DownloadCache(folder)
    listed = _listed(wanted, files, shelf)
    kaggle.signed_url(min(listed.values(), key=lambda file: file.size).name)
    print(f"Rules of {kaggle.competition}: accepted.")
    missing = {part: remote for part, remote in listed.items() if not shelf.is_verified(part)}
    plan = {part: remote for part, remote in missing.items() if not shelf.find_existing(part, remote)}
    for part in missing.keys() - plan.keys():
        print(f"{missing[part].name} lies in {folder}, not verified yet.")
    if not plan:
        print(f"Nothing to fetch: {folder} has all {len(listed)} files.")
        return
    _print_plan(plan, shelf)
    print(f"Disk: {megabytes(_check_disk_space(plan, shelf))} are free. 'carvana download' fetches.")


def _listed(wanted: Sequence[str], files: list[RemoteFile], shelf: DownloadCache) -> dict[str, RemoteFile]:
    """Return what Kaggle lists of each part; tells what changed since it was fetched."""
    listed = {part: _match(part, files) for part in wanted}
    for part, remote in listed.items():
        shelf.warn_if_changed(part, remote)
    return listed


def _match(part: str, files: list[RemoteFile]) -> RemoteFile:
    by_name = {file.name: file for file in files}
    found = by_name.get(f"{part}.zip") or by_name.get(part)
    if found is None:
        names = ", ".join(sorted(by_name)[:12]) or "nothing"
        raise CarvanaError(
            f"Kaggle lists neither {part}.zip nor {part}, but {names}: compare data.competition in params.yaml with "
            "the competition's address."
        )
    return found


def _print_plan(plan: Mapping[str, RemoteFile], shelf: DownloadCache) -> None:
    print(f"From Kaggle to {shelf.folder}:")
    for part, remote in plan.items():
        here = shelf.partial_size(part)
        begun = f", {megabytes(here)} of it here" if here else ""
        print(f"  {remote.name:<28}{megabytes(remote.size) if remote.size else 'size unknown':>12}{begun}")


def _check_disk_space(plan: Mapping[str, RemoteFile], shelf: DownloadCache) -> int:
    """Return the free bytes of the disk; raises CarvanaError if they are too few."""
    needed = sum(max(0, remote.size - shelf.partial_size(part)) for part, remote in plan.items())
    there = next(place for place in (shelf.folder, *shelf.folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed + _SPARE:
        raise CarvanaError(
            f"{shelf.folder} needs {megabytes(needed)} more, and its disk has {megabytes(free)} left: free some, "
            "or make it a link to a larger disk."
        )
    return free
