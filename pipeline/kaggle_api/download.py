"""What the pipeline needs of the competition: which files, whether they are here, and whether they can be fetched."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.data.settings import DataSettings
from pipeline.errors import PipelineError
from pipeline.kaggle_api.client import Kaggle, RemoteFile
from pipeline.kaggle_api.shelf import Shelf, megabytes
from pipeline.kaggle_api.transfer import Transfer
from pipeline.resume import alone

IDS = "sample_submission.csv"
"""The file that says which images a submission must hold."""

_SPARE = 64 << 20

Reach = Callable[[], Kaggle]
"""Return Kaggle; called only where something has to be asked of it, so that nobody needs an account before."""


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
        shelf = Shelf(folder)
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
            Transfer(kaggle, shelf, part, remote).run()


def preview(wanted: Sequence[str], folder: Path, reach: Reach) -> None:
    """Tell what `fetch` would fetch, and whether credentials, rules and disk allow it, without fetching.

    Raises PipelineError for the first thing that stands in the way.
    """
    kaggle = reach()
    files = kaggle.files()
    print(f"Credentials: those from {kaggle.source} work.")
    shelf = Shelf(folder)
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
    print(f"Disk: {megabytes(_demand_room(plan, shelf))} are free. 'carvana download' fetches.")


def _listed(wanted: Sequence[str], files: list[RemoteFile], shelf: Shelf) -> dict[str, RemoteFile]:
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


def _tell(plan: Mapping[str, RemoteFile], shelf: Shelf) -> None:
    print(f"From Kaggle to {shelf.folder}:")
    for part, remote in plan.items():
        here = shelf.begun(part)
        begun = f", {megabytes(here)} of it here" if here else ""
        print(f"  {remote.name:<28}{megabytes(remote.size) if remote.size else 'size unknown':>12}{begun}")


def _demand_room(plan: Mapping[str, RemoteFile], shelf: Shelf) -> int:
    """Return the free bytes of the disk; raises PipelineError if they are too few."""
    needed = sum(max(0, remote.size - shelf.begun(part)) for part, remote in plan.items())
    there = next(place for place in (shelf.folder, *shelf.folder.absolute().parents) if place.is_dir())
    free = shutil.disk_usage(there).free
    if free < needed + _SPARE:
        raise PipelineError(
            f"{shelf.folder} needs {megabytes(needed)} more, and its disk has {megabytes(free)} left: free some, "
            "or make it a link to a larger disk."
        )
    return free
