"""Settings compared on stored maps: each map is read once, and all settings are counted on its undecided pixels."""

from collections import Counter as Tally
from collections import deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.competition.layout import parse_image_id
from pipeline.cores import available_cpus
from pipeline.ensembling.counting import SettingScorer
from pipeline.ensembling.ensemble import MergeRule
from pipeline.ensembling.grid import EnsembleConfig, NetId
from pipeline.ensembling.maps import CompressedMap, PredictionStore
from pipeline.ensembling.scoring import MaskLoader
from pipeline.ensembling.undecided import AmbiguousPixels, MapStack
from pipeline.errors import CarvanaError

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class ScoringGroup:
    """Nets that all predicted the same images, and trained on none of their cars."""

    nets: Sequence[NetId]
    stores: Sequence[PredictionStore]

    def validate(self, image_ids: Sequence[str], views: Sequence[str], digests: Sequence[str]) -> None:
        """Raise CarvanaError unless the maps are of these images and views, and of nets of these digests."""
        for store, digest in zip(self.stores, digests, strict=True):
            fault = (
                f"lacks the view {next(view for view in views if view not in store.views)}"
                if set(views) - set(store.views)
                else "has other views than predict.tta says"
                if list(views) != store.views
                else "is of other images than folds.csv says"
                if list(image_ids) != store.image_ids
                else "has files of another length than those of other nets"
                if store.shard_images != self.stores[0].shard_images
                else "is of an earlier net"
                if digest != store.net
                else None
            )
            if fault:
                raise CarvanaError(f"{store.folder} {fault}: 'dvc repro' makes its maps again.")

    def read(self, image_ids: Container[str] | None = None) -> Iterator[list[list[CompressedMap]]]:
        """Yield the stored maps of each image, or of some, by net and view."""
        for number in range(self.stores[0].shard_count()):
            yield from map(list, zip(*(store.compressed(number, image_ids) for store in self.stores), strict=True))

    def seconds(self) -> dict[tuple[NetId, str], float]:
        """Return the measured seconds an image, by net and view, as far as they are known."""
        timings = ((net, store.timing()) for net, store in zip(self.nets, self.stores, strict=True))
        return {
            (net, view): timing.seconds_per_image([view]) for net, timing in timings if timing for view in timing.views
        }


@dataclass(frozen=True)
class AblationScores:
    """What all settings scored on one split."""

    settings: Sequence[EnsembleConfig]
    images: pd.DataFrame
    """A row an image: image_id, car, angle, nets, disagreement, suspect, top, left, height, width."""
    dice_SI: NDArray[np.float64]
    """By setting and image."""
    map_bytes: Mapping[tuple[NetId, str], float]
    """Bytes an image of the stored maps, by net and view."""


def score_settings(
    panels: Sequence[ScoringGroup],
    settings: Sequence[EnsembleConfig],
    views: Sequence[str],
    true_mask: MaskLoader,
    words: str,
) -> AblationScores:
    """Return the Dice of every image under every setting, equal to what whole rasters give.

    The first setting is the current one, by which it is told how far the nets of an image differ.
    """
    counter = SettingScorer(settings, panels[0].nets, views)
    current = [views.index(view) for view in settings[0].views]

    def look(packed_NV: Sequence[Sequence[CompressedMap]]) -> tuple[dict[str, Any], NDArray[np.float64]]:
        image_id = packed_NV[0][0].image_id
        stack = MapStack.of([[packed.decompress() for packed in of_net] for of_net in packed_NV], true_mask(image_id))
        pixels = stack.ambiguous_pixels(counter.bounds)
        car, angle = parse_image_id(image_id)
        row = {"image_id": image_id, "car": car, "angle": angle, "nets": len(packed_NV)}
        row["disagreement"] = _disagreement(pixels, current, settings[0].threshold)
        suspicion = asdict(stack.label_conflict())
        return row | {"suspect": suspicion.pop("pixels"), **suspicion}, counter.dice(pixels)

    rows: list[dict[str, Any]] = []
    dice: list[NDArray[np.float64]] = []
    tally: Tally[tuple[NetId, str]] = Tally()
    with tqdm(total=sum(len(panel.stores[0].image_ids) for panel in panels), desc=words, unit="image") as bar:
        for row, dice_S in parallel_map(look, _read(panels, tally)):
            rows.append(row)
            dice.append(dice_S)
            bar.update()
    sizes = {key: size / len(rows) for key, size in tally.items()}
    return AblationScores(settings, pd.DataFrame(rows), np.stack(dice, axis=1), sizes)


def _read(panels: Sequence[ScoringGroup], sizes: Tally[tuple[NetId, str]]) -> Iterator[list[list[CompressedMap]]]:
    """Yield the maps of each image, by net and view, and count their bytes."""
    for panel in panels:
        for packed_NV in panel.read():
            for net, of_net in zip(panel.nets, packed_NV, strict=True):
                sizes.update({(net, packed.view): packed.bytes for packed in of_net})
            yield packed_NV


def _disagreement(pixels: AmbiguousPixels, views: Sequence[int], threshold: float) -> int | None:
    """Return on how many pixels the masks of single nets differ; None for a net by itself."""
    if len(pixels.probs_u8_NVU) == 1:
        return None
    alone = MergeRule("mean_probability", threshold, (len(views),), (1,))
    masks_NU = pixels.probs_u8_NVU[:, views].sum(axis=1, dtype=np.uint16) >= alone.min_positive_sum
    return int(np.count_nonzero(masks_NU.min(axis=0) != masks_NU.max(axis=0)))


def parallel_map(work: Callable[[S], T], items: Iterator[S]) -> Iterator[T]:
    """Yield the results in order, computed on all cores; few items wait at a time, since maps are large."""
    with ThreadPoolExecutor(available_cpus()) as pool:
        running: deque[Future[T]] = deque()
        for item in items:
            running.append(pool.submit(work, item))
            if len(running) > 2 * available_cpus():
                yield running.popleft().result()
        while running:
            yield running.popleft().result()
