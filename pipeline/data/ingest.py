"""Provide the competition's files, check them, and describe them in data/manifest.json."""

import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Lock
from typing import Any, Literal

from filelock import FileLock
from tqdm import tqdm

from pipeline.competition.rle import mask_to_runs
from pipeline.config import DataSettings
from pipeline.data.archives import warn_of_ignored
from pipeline.data.competition_data import CompetitionData, data_dir
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.submission.csv_file import CSV_HEADER
from pipeline.submission.validation import GeometryCheck, validate_submission
from pipeline.synthetic.sample_competition import draw_sample
from pipeline.utils.files import atomic_write, remove_path
from pipeline.utils.parallel import available_cpus


def ensure_data(settings: DataSettings, root: Path) -> CompetitionData:
    """Return the competition's files; the synthetic sample is drawn if it is missing.

    Files from Kaggle are downloaded before, by ``pipeline.kaggle.commands``. Raises CarvanaError if ``data.directory``
    is not a folder.
    """
    folder = data_dir(settings, root)
    if settings.directory is None and settings.source == "sample":
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Files are written atomically, truth.csv last: if it exists, the sample is complete.
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "truth.csv").is_file():
                for stale in folder.glob(".*.part"):
                    remove_path(stale)
                draw_sample(folder, settings.sample)
    elif settings.directory is not None and not folder.is_dir():
        raise CarvanaError(
            f"data.directory: {folder} is not a folder. Set it to the folder with the competition's files."
        )
    return CompetitionData(folder, settings.quality == "hq")


def build_manifest(source: CompetitionData, on_corrupt: Literal["error", "skip"]) -> dict[str, Any]:
    """Check every file and return the manifest: number of images and digest of each part, and corrupt images.

    All training images and masks are decoded. Of test images only the headers are read, because prediction decodes
    them anyway and has a fallback for corrupt ones. Files that are not used are counted in a warning. Raises
    CarvanaError for the first problem; with ``skip``, training images that cannot be used are listed under
    ``unreadable`` instead.
    """
    train_ids, test_ids = source.train.ids(), source.test.ids()
    for part in (source.train, source.masks, source.test):
        warn_of_ignored(part.path, part.ignored())
    geometry, geometry_lock = GeometryCheck(), Lock()

    def decode_pair(image_id: str) -> None:
        source.train.image(image_id)
        runs = mask_to_runs(source.masks.mask(image_id))
        with geometry_lock:
            geometry.add(image_id, runs)

    unreadable = dict(_match_images_and_masks(source))
    matched = [image_id for image_id in train_ids if image_id not in unreadable]
    unreadable |= dict(_find_corrupt(matched, decode_pair, "Checking training images"))
    _print_warnings(f"training masks in {source.directory}", geometry.warnings())
    bad_headers = dict(_find_corrupt(test_ids, source.test.check_header, "Checking test images"))
    if on_corrupt == "error" and unreadable:
        raise CarvanaError(
            f"{next(iter(unreadable.values()))} ({len(unreadable)} such images in all. "
            "To train without them, set data.on_corrupt: skip.)"
        )
    _check_test_ids(source, test_ids)
    if source.truth is not None:
        _print_warnings(str(source.truth), validate_submission(source.truth, test_ids).warnings)
    usable = [image_id for image_id in train_ids if image_id not in unreadable]
    if not usable or not test_ids:
        raise CarvanaError(
            f"{source.directory} contains {len(usable)} usable training and {len(test_ids)} test images. "
            "Set data.directory to the folder with the competition's files."
        )
    return {
        "train": {"images": len(usable), "digest": source.train.archive.fingerprint()},
        "masks": {"images": len(source.masks.ids()), "digest": source.masks.fingerprint()},
        "test": {"images": len(test_ids), "digest": source.test.archive.fingerprint()},
        "unreadable": _portable(unreadable, source.directory),
        "suspect_test_images": _portable(bad_headers, source.directory),
    }


def _print_warnings(name: str, warnings: Iterable[str]) -> None:
    for warning in warnings:
        print(f"warning: {name}: {warning}", file=sys.stderr)


def _match_images_and_masks(source: CompetitionData) -> Iterator[tuple[str, str]]:
    """Yield the id and a message for each training image without a mask and each mask without an image.

    Raises CarvanaError if no mask belongs to any of the images.
    """
    images, masks = set(source.train.ids()), set(source.masks.ids())
    for image_id in sorted(images - masks):
        yield image_id, f"{source.train.location(image_id)} has no mask. Add the mask or remove the image."
    if masks - images and not images & masks:
        raise CarvanaError(f"{source.directory}: no mask belongs to any training image. Download both again.")
    for image_id in sorted(masks - images):
        yield image_id, f"The mask of {image_id} in {source.directory} has no image. Add the image or remove the mask."


def _portable(messages: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Return the messages sorted and without the folder's path, so that equal data give equal manifests anywhere."""
    return {
        key: text.replace(f"{directory}/", "").replace(str(directory), "the data folder")
        for key, text in sorted(messages.items())
    }


def _find_corrupt(ids: list[str], check: Callable[[str], None], label: str) -> Iterator[tuple[str, str]]:
    """Yield the id and the message of each image for which ``check`` raises CorruptFileError."""

    def message_of(image_id: str) -> str | None:
        try:
            check(image_id)
        except CorruptFileError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(available_cpus()) as pool:  # threads, because decoders release the GIL
        messages: Iterable[str | None] = tqdm(pool.map(message_of, ids), desc=label, total=len(ids), unit="image")
        yield from ((image_id, message) for image_id, message in zip(ids, messages, strict=True) if message)


def _check_test_ids(source: CompetitionData, test_ids: list[str]) -> None:
    """Raise CarvanaError unless the test images are those of sample_submission.csv, if that file is there."""
    if source.sample_ids is None:
        return
    different = sorted(set(source.sample_ids) ^ set(test_ids))
    if different:
        raise CarvanaError(
            f"{source.directory}: the test images and sample_submission.csv differ in {len(different)} images, first "
            f"{different[0]}. Download both again."
        )


def write_truth(source: CompetitionData, target: Path) -> None:
    """Write the CSV of true test masks to ``target``; if they are unknown, it has only a header."""
    with atomic_write(target) as temporary:
        if source.truth is None:
            temporary.write_text(f"{CSV_HEADER}\n", encoding="utf-8")
        else:
            shutil.copyfile(source.truth, temporary)
