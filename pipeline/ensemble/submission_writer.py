"""From maps to the rows of a submission, shard by shard, in memory that does not grow with the number of images."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from threading import Lock

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.competition import rle
from pipeline.competition.image_ids import HEIGHT, WIDTH, image_filename, parse_image_id
from pipeline.ensemble.postprocess import MaskBuilder
from pipeline.errors import CarvanaError
from pipeline.inference.prediction_store import REBUILD_HINT, PredictionStore
from pipeline.submission.csv_file import CSV_HEADER, compress_part, join_parts
from pipeline.utils.files import atomic_write
from pipeline.utils.parallel import available_cpus

FallbackRow = Callable[[str], str]
"""Run-length code for an image that can't be read, by its id."""


def write_submission(
    stores: Sequence[PredictionStore], decision: MaskBuilder, fallback: FallbackRow, work: Path, target: Path
) -> None:
    """Merge the nets' maps of every test image and write the gzipped CSV ``target``.

    Parts that a killed run left in ``work`` are kept. Raises CarvanaError if the nets disagree about the images.
    """
    _check_same_images(stores)
    shards = range(stores[0].shard_count())
    missing = [number for number in shards if not _part(work, number).is_file()]
    # Decompressing, adding and compressing let other threads run; a few shards at a time bound the memory.
    with ThreadPoolExecutor(available_cpus()) as pool, tqdm(total=len(shards), desc="Merging", unit="shard") as bar:
        bar.update(len(shards) - len(missing))
        # A task is no more than a number and a row of text on disk, so all of them may wait at once.
        for _ in pool.map(lambda number: _write_part(stores, decision, fallback, number, _part(work, number)), missing):
            bar.update()
    with atomic_write(target) as temporary:
        join_parts((_part(work, number) for number in shards), temporary)


def mean_mask_rows(image_ids: Sequence[str], mask: Callable[[str], NDArray[np.uint8]]) -> FallbackRow:
    """Return the fallback that gives an image the mean of the training masks at its angle, rounded."""

    lock = Lock()

    @cache
    def of_angle(angle: int) -> str:
        ids = [image_id for image_id in image_ids if parse_image_id(image_id)[1] == angle]
        total_HW = np.zeros((HEIGHT, WIDTH), np.uint16)
        for image_id in ids:
            total_HW += mask(image_id)
        return rle.encode(2 * total_HW >= len(ids)) if ids else ""

    def fallback(image_id: str) -> str:
        with lock:  # or each of several threads would decode all masks of an angle
            return of_angle(parse_image_id(image_id)[1])

    return fallback


def shard_rows(
    stores: Sequence[PredictionStore], decision: MaskBuilder, fallback: FallbackRow, number: int
) -> Iterator[str]:
    """Yield the CSV rows of a shard's images, in order, without line ends."""
    maps = zip(*(store.images(number) for store in stores), strict=True)
    for image_id in stores[0].shard_ids(number):
        if image_id in stores[0].unreadable:
            text = fallback(image_id)
        else:
            of_nets = next(maps)
            if any(level_map.image_id != image_id for level_map in of_nets):
                raise CarvanaError(f"The maps of {image_id} are missing or out of order: {REBUILD_HINT}.")
            text = rle.encode(decision.mask(of_nets))
        yield f"{image_filename(image_id)},{text}"


def _write_part(
    stores: Sequence[PredictionStore], decision: MaskBuilder, fallback: FallbackRow, number: int, path: Path
) -> None:
    lines = ([CSV_HEADER] if number == 0 else []) + list(shard_rows(stores, decision, fallback, number))
    with atomic_write(path) as temporary:
        temporary.write_bytes(compress_part("".join(f"{line}\n" for line in lines).encode()))


def _part(work: Path, number: int) -> Path:
    return work / f"part-{number:05d}.deflate"


def _check_same_images(stores: Sequence[PredictionStore]) -> None:
    first = stores[0]
    for other in stores[1:]:
        same_images = other.image_ids == first.image_ids and other.shard_images == first.shard_images
        if not same_images or other.unreadable.keys() != first.unreadable.keys():
            raise CarvanaError(f"{other.folder} and {first.folder} hold maps of different images: {REBUILD_HINT}.")
