"""Ingest: provide the data, check every file, and describe it in the manifest."""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from tqdm import tqdm

from pipeline.competition.rle import mask_to_runs
from pipeline.config import DataSettings
from pipeline.data.competition_data import CompetitionData, data_dir
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.submission.csv_file import CSV_HEADER
from pipeline.submission.validation import GeometryCheck, validate_submission
from pipeline.synthetic.sample_competition import draw_sample
from pipeline.utils.files import atomic_write, remove_path
from pipeline.utils.parallel import available_cpus


def ensure_data(settings: DataSettings, home: Path) -> CompetitionData:
    """Return the competition's files, drawing the synthetic sample if needed.

    Downloads from Kaggle are made before, by ``repro.provide_data``.
    """
    folder = data_dir(settings, home)
    if settings.directory is None and settings.source == "sample":
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Files are written atomically, this one last: if it exists, so do the others.
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "truth.csv").is_file():
                for stale in folder.glob(".*.part"):
                    remove_path(stale)
                draw_sample(folder, settings.sample)
    elif settings.directory is not None and not folder.is_dir():
        raise CarvanaError(
            f"data.directory is {folder}, which is not a folder. Set it to the folder with the competition's files."
        )
    return CompetitionData(folder, settings.quality == "hq")


def build_manifest(source: CompetitionData, on_corrupt: Literal["error", "skip"]) -> dict[str, Any]:
    """Check every file and return the manifest.

    All training images and masks are decoded; of test images only headers are read, since prediction decodes them and
    has a fallback. Raises CarvanaError for the first unusable training image; with ``skip`` they are listed under
    ``unreadable`` instead.
    """
    train_ids, test_ids = source.train.ids(), source.test.ids()
    unreadable = dict(_match_images_and_masks(source))
    matched = [image_id for image_id in train_ids if image_id not in unreadable]
    geometry = GeometryCheck()
    unreadable |= dict(
        _find_corrupt(matched, lambda image_id: _decode_both(source, image_id, geometry), "Checking training images")
    )
    for warning in geometry.warnings():
        print(f"warning: training masks in {source.directory}: {warning}", file=sys.stderr)
    bad_headers = dict(_find_corrupt(test_ids, source.test.check_header, "Checking test images"))
    if on_corrupt == "error" and unreadable:
        raise CarvanaError(
            f"{next(iter(unreadable.values()))} ({len(unreadable)} such images. data.on_corrupt: skip leaves them out.)"
        )
    _check_test_ids(source, test_ids)
    if source.truth is not None:
        validate_submission(source.truth, test_ids)
    usable = [image_id for image_id in train_ids if image_id not in unreadable]
    if not usable or not test_ids:
        raise CarvanaError(
            f"{source.directory} has {len(usable)} usable training images and {len(test_ids)} test images. "
            "Set data.directory to the folder with the competition's files."
        )
    return {
        "train": {"images": len(usable), "digest": source.train.archive.fingerprint()},
        "masks": {"images": len(source.masks.ids()), "digest": source.masks.fingerprint()},
        "test": {"images": len(test_ids), "digest": source.test.archive.fingerprint()},
        "unreadable": _portable(unreadable, source.directory),
        "suspect_test_images": _portable(bad_headers, source.directory),
    }


def _match_images_and_masks(source: CompetitionData) -> Iterator[tuple[str, str]]:
    images, masks = set(source.train.ids()), set(source.masks.ids())
    for image_id in sorted(images - masks):
        yield image_id, f"{source.train.where(image_id)} has no mask. Add the mask or remove the image."
    if masks - images and not images & masks:
        raise CarvanaError(f"No mask in {source.directory} belongs to one of its training images. Download both again.")
    for image_id in sorted(masks - images):
        yield image_id, f"The mask of {image_id} in {source.directory} has no image. Add the image or remove the mask."


def _portable(messages: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Sort messages and remove the folder's path, so that equal data give equal manifests on any machine."""
    return {
        key: text.replace(f"{directory}/", "").replace(str(directory), "the data's folder")
        for key, text in sorted(messages.items())
    }


def _decode_both(source: CompetitionData, image_id: str, geometry: GeometryCheck) -> None:
    source.train.image(image_id)
    geometry.add(image_id, mask_to_runs(source.masks.mask(image_id)))


def _find_corrupt(ids: list[str], check: Callable[[str], None], words: str) -> Iterator[tuple[str, str]]:
    """Yield id and message of every corrupt image; decoders release the GIL."""

    def fault(image_id: str) -> str | None:
        try:
            check(image_id)
        except CorruptFileError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(available_cpus()) as pool:
        found: Iterable[str | None] = tqdm(pool.map(fault, ids), desc=words, total=len(ids), unit="image")
        yield from ((image_id, message) for image_id, message in zip(ids, found, strict=True) if message)


def _check_test_ids(source: CompetitionData, test_ids: list[str]) -> None:
    if source.sample_ids is None:
        return
    different = sorted(set(source.sample_ids) ^ set(test_ids))
    if different:
        raise CarvanaError(
            f"{source.directory}: {different[0]} is in only one of the test images and sample_submission.csv "
            f"({len(different)} such ids). Download both again."
        )


def write_truth(source: CompetitionData, target: Path) -> None:
    """Write the CSV of true test masks; only its header if they are not known."""
    with atomic_write(target) as temporary:
        if source.truth is None:
            temporary.write_text(f"{CSV_HEADER}\n", encoding="utf-8")
        else:
            shutil.copyfile(source.truth, temporary)
