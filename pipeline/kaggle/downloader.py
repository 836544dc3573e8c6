"""Download the competition's files: which are required, which are missing, and whether they can be downloaded."""

import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from pipeline.config import DataSettings
from pipeline.errors import CarvanaError
from pipeline.kaggle.client import KaggleClient, RemoteFile
from pipeline.kaggle.download_cache import DownloadCache, megabytes
from pipeline.kaggle.transfer import FileDownload
from pipeline.utils.run_state import file_lock
from pipeline.utils.terminal import print_table

IDS = "sample_submission.csv"
"""Lists the images that a submission must contain."""

_MIN_FREE_BYTES = 64 << 20

ClientFactory = Callable[[], KaggleClient]
"""Creates the client; called only if a request is necessary, so that credentials are not needed before."""


def required_files(settings: DataSettings) -> list[str]:
    """Return the names of the required files, without ``.zip``."""
    hq = "_hq" if settings.quality == "hq" else ""
    return [f"train{hq}", f"test{hq}", "train_masks.csv", "metadata.csv", IDS]


def download_files(wanted: Sequence[str], folder: Path, client: ClientFactory, *, thorough: bool = False) -> None:
    """Download and verify the parts ``wanted`` that are missing in ``folder``; without missing ones, make no request.

    ``thorough`` verifies the bytes of existing files instead of trusting size and time. Raises CarvanaError if Kaggle
    does not list a file, the disk is full, or a download fails.
    """
    with file_lock(folder.with_suffix(".lock"), f"the download to {folder.name}"):
        cache = DownloadCache(folder)
        missing = [part for part in wanted if not cache.is_verified(part, thorough)]
        if not missing:
            return
        kaggle = client()
        listed = _find_listed(wanted, kaggle.files(), cache)
        plan = {part: listed[part] for part in missing if not cache.import_existing(part, listed[part])}
        if plan:
            _print_plan(plan, cache)
            _check_disk_space(plan, cache)
        for part, remote in plan.items():
            FileDownload(kaggle, cache, part, remote).run()


def preview_download(wanted: Sequence[str], folder: Path, client: ClientFactory) -> None:
    """Print what `download_files` would download, and check credentials, rules and disk space.

    Raises CarvanaError for the first check that fails.
    """
    kaggle = client()
    files = kaggle.files()
    print(f"Credentials: valid (from {kaggle.source}).")
    cache = DownloadCache(folder)
    listed = _find_listed(wanted, files, cache)
    kaggle.signed_url(min(listed.values(), key=lambda file: file.size).name)
    print(f"Rules of {kaggle.competition}: accepted.")
    missing = {part: remote for part, remote in listed.items() if not cache.is_verified(part)}
    plan = {part: remote for part, remote in missing.items() if not cache.find_existing(part, remote)}
    for part in missing.keys() - plan.keys():
        print(f"{missing[part].name} exists in {folder}, not verified yet.")
    if not plan:
        print(f"Nothing to download: {folder} has all {len(listed)} files.")
        return
    _print_plan(plan, cache)
    print(f"Disk: {megabytes(_check_disk_space(plan, cache))} free. Start the download with 'carvana download'.")


def _find_listed(wanted: Sequence[str], files: list[RemoteFile], cache: DownloadCache) -> dict[str, RemoteFile]:
    """Return each part's entry in Kaggle's list; warns about files that changed since their download."""
    listed = {part: _match(part, files) for part in wanted}
    for part, remote in listed.items():
        cache.warn_if_changed(part, remote)
    return listed


def _match(part: str, files: list[RemoteFile]) -> RemoteFile:
    by_name = {file.name: file for file in files}
    found = by_name.get(f"{part}.zip") or by_name.get(part)
    if found is None:
        names = ", ".join(sorted(by_name)[:12]) or "nothing"
        raise CarvanaError(
            f"Kaggle lists neither {part}.zip nor {part}, only {names}. Check data.competition in params.yaml against "
            "the competition's URL."
        )
    return found


def _print_plan(plan: Mapping[str, RemoteFile], cache: DownloadCache) -> None:
    print(f"Download from Kaggle to {cache.folder}:")
    sizes = {part: cache.partial_size(part) for part in plan}
    rows = [
        (
            remote.name,
            megabytes(remote.size) if remote.size else "unknown",
            megabytes(sizes[part]) if sizes[part] else "",
        )
        for part, remote in plan.items()
    ]
    print_table(["file", "size", "already downloaded"], rows, right=["size", "already downloaded"])


def _check_disk_space(plan: Mapping[str, RemoteFile], cache: DownloadCache) -> int:
    """Return the free bytes of the disk; raises CarvanaError if there are too few."""
    needed = sum(max(0, remote.size - cache.partial_size(part)) for part, remote in plan.items())
    existing = next(path for path in (cache.folder, *cache.folder.absolute().parents) if path.is_dir())
    free = shutil.disk_usage(existing).free
    if free < needed + _MIN_FREE_BYTES:
        raise CarvanaError(
            f"{cache.folder}: not enough disk space ({megabytes(needed)} needed, {megabytes(free)} free). Free some, "
            "or make the folder a link to a larger disk."
        )
    return free
