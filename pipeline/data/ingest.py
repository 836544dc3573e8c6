"""Data coming in: where it comes from, whether it is sound, and the manifest that says what it is."""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock
from tqdm import tqdm

from pipeline.config import DataSettings
from pipeline.data.competition_data import CompetitionData, data_dir
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.submission.csv_file import CSV_HEADER
from pipeline.submission.validation import validate_submission
from pipeline.synthetic.sample_competition import draw_sample
from pipeline.utils.files import atomic_write, remove_path
from pipeline.utils.parallel import available_cpus


def ensure_data(settings: DataSettings, home: Path) -> CompetitionData:
    """Make sure that the files are there, drawing those of the sample, and return them.

    What comes from Kaggle is fetched by `pipeline.kaggle.downloader` before.
    """
    folder = data_dir(settings, home)
    if settings.directory is None and settings.source == "sample":
        folder.parent.mkdir(parents=True, exist_ok=True)
        # Every file appears whole, this one last: where it is, so are the others.
        with FileLock(folder.with_suffix(".lock")):
            if not (folder / "truth.csv").is_file():
                for left_by_a_kill in folder.glob(".*.part"):
                    remove_path(left_by_a_kill)
                draw_sample(folder, settings.sample)
    elif settings.directory is not None and not folder.is_dir():
        raise CarvanaError(f"data.directory is {folder}, which is no folder: give it the path of one.")
    return CompetitionData(folder, settings.quality == "hq")


def build_manifest(source: CompetitionData, on_corrupt: Literal["error", "skip"]) -> dict[str, Any]:
    """Check every file and return the manifest.

    Training images and masks are decoded, each; of test images only the headers are read, since prediction
    decodes them anyway and knows what to do with a bad one. Raises CarvanaError for the first fault, but with
    ``skip`` lists training images that can't be used under ``unreadable``.
    """
    train_ids, test_ids = source.train.ids(), source.test.ids()
    unreadable = dict(_match_images_and_masks(source))
    sound = [image_id for image_id in train_ids if image_id not in unreadable]
    unreadable |= dict(
        _find_corrupt(sound, lambda image_id: _decode_both(source, image_id), "Checking training images")
    )
    bad_headers = dict(_find_corrupt(test_ids, source.test.check_header, "Checking test images"))
    if on_corrupt == "error" and unreadable:
        raise CarvanaError(
            f"{next(iter(unreadable.values()))} ({len(unreadable)} such in all; "
            "data.on_corrupt: skip goes on without them.)"
        )
    _check_test_ids(source, test_ids)
    if source.truth is not None:
        validate_submission(source.truth, test_ids)
    usable = [image_id for image_id in train_ids if image_id not in unreadable]
    if not usable or not test_ids:
        raise CarvanaError(
            f"{source.directory} holds {len(usable)} usable training and {len(test_ids)} test images: "
            "set data.directory to the folder with the competition's files."
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
        yield image_id, f"{source.train.where(image_id)} has no mask: add it, or take the image away."
    if masks - images and not images & masks:
        raise CarvanaError(f"No mask in {source.directory} belongs to any of its training images: fetch both again.")
    for image_id in sorted(masks - images):
        yield image_id, f"The mask of {image_id} in {source.directory} has no image: add it, or take the mask away."


def _portable(messages: Mapping[str, str], directory: Path) -> dict[str, str]:
    """Sort messages and cut the folder's path out of them: the same data make the same manifest anywhere."""
    return {
        key: text.replace(f"{directory}/", "").replace(str(directory), "the data's folder")
        for key, text in sorted(messages.items())
    }


def _decode_both(source: CompetitionData, image_id: str) -> None:
    source.train.image(image_id)
    source.masks.mask(image_id)


def _find_corrupt(ids: list[str], check: Callable[[str], None], words: str) -> Iterator[tuple[str, str]]:
    """Yield the id and the message of every image that is not sound; decoders let other threads run."""

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
            f"({len(different)} such in all): fetch both again."
        )


def write_truth(source: CompetitionData, target: Path) -> None:
    """Write the masks of the test images as a CSV, which has a header only where they are not known."""
    with atomic_write(target) as temporary:
        if source.truth is None:
            temporary.write_text(f"{CSV_HEADER}\n", encoding="utf-8")
        else:
            shutil.copyfile(source.truth, temporary)
