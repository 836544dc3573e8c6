"""Write a synthetic sample of the competition: the same files, with rendered cars, usable without a Kaggle account.

Equal settings give equal bytes with the same library versions, whatever the number of processes.
``pipeline.synthetic.car_photo`` renders the images; this module writes the competition's files.
"""

import csv
import hashlib
import io
import os
import zipfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing import get_context, parent_process
from pathlib import Path
from threading import Thread
from typing import NamedTuple

import cv2
import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image
from tqdm import tqdm

from pipeline.competition import rle
from pipeline.competition.image_ids import format_image_id, image_filename, mask_filename
from pipeline.config import SampleSettings
from pipeline.synthetic.car_design import design_car
from pipeline.synthetic.car_photo import draw_car
from pipeline.utils.files import atomic_write, write_text
from pipeline.utils.parallel import available_cpus

_JPEG_QUALITY = 90
_MEMBER_DATE = (2017, 7, 28, 0, 0, 0)  # as in Kaggle's zips
_HEADER = ("img", "rle_mask")
_METADATA_HEADER = ("id", "year", "make", "model", "trim1", "trim2")
_MAKES = ("Aldera", "Borealis", "Corvanto", "Delmira", "Estrada Motors", "Fennhill")
_TRIMS = ("", "Base", "Sport", "Touring", "Limited")


class EncodedImage(NamedTuple):
    """An image and its mask, encoded as in the competition's files."""

    image_id: str
    jpeg: bytes
    gif: bytes
    rle_mask: str


def draw_sample(folder: Path, settings: SampleSettings, workers: int | None = None) -> None:
    """Write a synthetic sample into ``folder``, which is created if it does not exist.

    Writes train.zip, train_masks.zip, train_masks.csv.zip, test.zip, metadata.csv.zip and sample_submission.csv.zip in
    Kaggle's layout, and truth.csv, the masks of test.zip in the format of train_masks.csv. Each file is written
    atomically and replaces an existing one; truth.csv is the last. ``workers`` is the number of processes; None: one
    per CPU.
    """
    folder.mkdir(parents=True, exist_ok=True)
    cars = car_ids(settings)
    train = sorted(range(settings.train_cars), key=cars.__getitem__)
    test = sorted(range(settings.train_cars, len(cars)), key=cars.__getitem__)

    with _draw_in_parallel(settings.seed, cars, train + test, workers) as drawn:
        with _atomic_zip(folder / "train_masks.zip") as masks:
            train_masks = _write_split(folder, "train", len(train), drawn, masks)
        test_masks = _write_split(folder, "test", len(test), drawn)
    _write_zipped_csv(folder / "train_masks.csv.zip", [_HEADER, *train_masks])
    _write_zipped_csv(folder / "sample_submission.csv.zip", [_HEADER, *((name, "1 1") for name, _ in test_masks)])
    metadata = sorted(_metadata_row(settings.seed, index, car) for index, car in enumerate(cars))
    _write_zipped_csv(folder / "metadata.csv.zip", [_METADATA_HEADER, *metadata], quote=True)
    write_text(folder / "truth.csv", _format_csv([_HEADER, *test_masks]))


def car_ids(settings: SampleSettings) -> list[str]:
    """Return the ids of the sample's cars, 12 hex digits each, all different: training cars, then test cars."""
    cars: dict[str, None] = {}
    attempt = 0
    while len(cars) < settings.train_cars + settings.test_cars:
        cars[hashlib.sha256(f"{settings.seed}/{attempt}".encode()).hexdigest()[:12]] = None
        attempt += 1
    return list(cars)


# ---------------------------------------------------------------- drawing


@contextmanager
def _draw_in_parallel(
    seed: int, cars: list[str], order: list[int], workers: int | None
) -> Iterator[Iterator[list[EncodedImage]]]:
    """Yield an iterator over the images of each car in ``order``, rendered ahead by a pool of processes."""
    workers = min(workers or available_cpus(), len(order))
    # Spawned, because a forked process can hang if a library had threads.
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_init_worker)
    try:
        yield pool.map(_draw_and_encode, [seed] * len(order), order, [cars[index] for index in order])
    finally:
        pool.shutdown(cancel_futures=True)


def _init_worker() -> None:
    cv2.setNumThreads(1)
    parent = parent_process()

    def exit_with_parent() -> None:
        # Otherwise the processes of a pool wait for work forever after their parent is killed.
        if parent is not None:
            parent.join()
            os._exit(1)

    Thread(target=exit_with_parent, daemon=True).start()


def _draw_and_encode(seed: int, index: int, car: str) -> list[EncodedImage]:
    images = []
    for angle, (image_HWC, mask_HW) in enumerate(draw_car(seed, index), start=1):
        jpeg = simplejpeg.encode_jpeg(image_HWC, _JPEG_QUALITY, colorspace="RGB", colorsubsampling="420")
        images.append(EncodedImage(format_image_id(car, angle), jpeg, _encode_gif(mask_HW), rle.encode(mask_HW)))
    return images


def _encode_gif(mask_HW: NDArray[np.uint8]) -> bytes:
    """Return a mask of 0 and 1 as Kaggle encodes it: a palette GIF with colors 0 black and 1 white."""
    image = Image.fromarray(mask_HW)
    image.putpalette([0, 0, 0, 255, 255, 255])
    buffer = io.BytesIO()
    image.save(buffer, format="GIF")
    return buffer.getvalue()


def _metadata_row(seed: int, index: int, car: str) -> tuple[str, ...]:
    """Return the row of metadata.csv of a car."""
    rng = np.random.default_rng((seed, 3, index))
    make, trim = str(rng.choice(_MAKES)), str(rng.choice(_TRIMS))
    model = design_car(seed, index).proportions.kind.capitalize()
    return car, str(rng.integers(2008, 2018)), make, model, model, trim


# ---------------------------------------------------------------- files


def _write_split(
    folder: Path, split: str, cars: int, drawn: Iterator[list[EncodedImage]], masks: zipfile.ZipFile | None = None
) -> list[tuple[str, str]]:
    """Write the next ``cars`` cars to <split>.zip, their masks to ``masks`` if given; return rows (img, rle_mask)."""
    rows = []
    with _atomic_zip(folder / f"{split}.zip") as images:
        for _ in tqdm(range(cars), desc=f"Drawing {split} cars", unit="car"):
            for image in next(drawn):
                name = image_filename(image.image_id)
                _add_member(images, f"{split}/{name}", image.jpeg, zipfile.ZIP_STORED)  # a JPEG does not shrink further
                if masks is not None:
                    _add_member(masks, f"{split}_masks/{mask_filename(image.image_id)}", image.gif)
                rows.append((name, image.rle_mask))
    return rows


def _write_zipped_csv(path: Path, rows: Iterable[tuple[str, ...]], quote: bool = False) -> None:
    """Write ``rows`` as a CSV into a zip; its one member is named like the zip without ``.zip``."""
    with _atomic_zip(path) as archive:
        _add_member(archive, path.stem, _format_csv(rows, quote).encode())


def _format_csv(rows: Iterable[tuple[str, ...]], quote: bool = False) -> str:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n", quoting=csv.QUOTE_ALL if quote else csv.QUOTE_MINIMAL).writerows(rows)
    return text.getvalue()


@contextmanager
def _atomic_zip(path: Path) -> Iterator[zipfile.ZipFile]:
    with atomic_write(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
        yield archive


def _add_member(archive: zipfile.ZipFile, name: str, content: bytes, compression: int = zipfile.ZIP_DEFLATED) -> None:
    """Add a member with a fixed date and fixed permissions, so that equal content gives equal bytes."""
    entry = zipfile.ZipInfo(name, _MEMBER_DATE)
    entry.create_system = 3
    entry.external_attr = 0o644 << 16
    archive.writestr(entry, content, compression)
