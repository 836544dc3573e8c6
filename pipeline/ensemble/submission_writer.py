"""Write a submission from stored probability maps, shard by shard, so memory use is independent of the image count."""

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
"""Returns the RLE for an unreadable image, by id."""


def write_submission(
    stores: Sequence[PredictionStore], mask_builder: MaskBuilder, fallback: FallbackRow, work: Path, target: Path
) -> None:
    """Merge the probability maps of every test image and write the gzipped CSV ``target``.

    Finished parts of an interrupted run in ``work`` are reused. Raises CarvanaError if the nets' stores hold maps of
    different images.
    """
    _check_same_images(stores)
    shards = range(stores[0].shard_count())
    missing = [number for number in shards if not _part(work, number).is_file()]
    # Decompressing, adding and compressing release the GIL. One shard per thread bounds the memory.
    with ThreadPoolExecutor(available_cpus()) as pool, tqdm(total=len(shards), desc="Merging", unit="shard") as bar:
        bar.update(len(shards) - len(missing))
        for _ in pool.map(
            lambda number: _write_part(stores, mask_builder, fallback, number, _part(work, number)), missing
        ):
            bar.update()
    with atomic_write(target) as temporary:
        join_parts((_part(work, number) for number in shards), temporary)


def mean_mask_rows(image_ids: Sequence[str], mask: Callable[[str], NDArray[np.uint8]]) -> FallbackRow:
    """Return the fallback that uses the rounded mean of the training masks at the image's angle."""
    lock = Lock()

    @cache
    def of_angle(angle: int) -> str:
        ids = [image_id for image_id in image_ids if parse_image_id(image_id)[1] == angle]
        total_HW = np.zeros((HEIGHT, WIDTH), np.uint16)
        for image_id in ids:
            total_HW += mask(image_id)
        return rle.encode(2 * total_HW >= len(ids)) if ids else ""

    def fallback(image_id: str) -> str:
        with lock:  # so that only one thread decodes all masks of an angle
            return of_angle(parse_image_id(image_id)[1])

    return fallback


def shard_rows(
    stores: Sequence[PredictionStore], mask_builder: MaskBuilder, fallback: FallbackRow, number: int
) -> Iterator[str]:
    """Yield the CSV rows of a shard's images, in order, without line endings."""
    maps = zip(*(store.images(number) for store in stores), strict=True)
    for image_id in stores[0].shard_ids(number):
        if image_id in stores[0].unreadable:
            mask_rle = fallback(image_id)
        else:
            net_maps = next(maps)
            if any(prob_map.image_id != image_id for prob_map in net_maps):
                raise CarvanaError(f"The maps of {image_id} are missing or out of order: {REBUILD_HINT}.")
            mask_rle = rle.encode(mask_builder.mask(net_maps))
        yield f"{image_filename(image_id)},{mask_rle}"


def _write_part(
    stores: Sequence[PredictionStore], mask_builder: MaskBuilder, fallback: FallbackRow, number: int, path: Path
) -> None:
    lines = ([CSV_HEADER] if number == 0 else []) + list(shard_rows(stores, mask_builder, fallback, number))
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
