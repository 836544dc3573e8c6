"""A thousand settings on stored maps: counted on undecided pixels, beside a merge of whole rasters for each."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.synthetic_maps import Raster, draw_levels
from benchmarks.timing import Row, compare, format_mb, peak_mb
from pipeline.ablation.runner import ScoringGroup, score_settings
from pipeline.ablation.search_space import AblationSpace, EnsembleConfig
from pipeline.ablation.statistics import AblationScores
from pipeline.competition.dice import confusion_counts
from pipeline.competition.image_ids import format_image_id
from pipeline.config import AblationSettings, EnsembleSettings
from pipeline.data.competition_data import CompetitionData
from pipeline.inference.prediction_store import PredictionStore, ShardWriter, shard_name, write_index
from pipeline.inference.probability_map import ProbabilityMap, sum_maps
from pipeline.utils.parallel import available_cpus

FOLDS = (0, 1, 2, 3, 4)
VIEWS = ("identity", "hflip", "scale:0.75", "scale:1.25")
NETS = [("net", fold) for fold in FOLDS]
SETTINGS = 1000
IMAGES = 512
DRAWN = 16
"""Images that differ; the others are the same under other names."""


def settings(wanted: int = SETTINGS) -> list[EnsembleConfig]:
    """Views x folds x merges x thresholds, as a user might try them; those of few nets are the quicker ones."""
    grid = AblationSpace(
        ablation=AblationSettings(threshold=tuple(np.linspace(0.3, 0.7, 9).round(2).tolist())),
        ensemble=EnsembleSettings(),
        models=("net",),
        folds=FOLDS,
        predicted={"oof": VIEWS, "holdout": VIEWS},
        views=("identity", "hflip"),
    ).grid("holdout")
    # Spread over the grid, so that every kind is among them in its share.
    return [grid[index] for index in np.linspace(0, len(grid) - 1, wanted).astype(int)]


@dataclass(frozen=True, eq=False)
class Ablation:
    """The maps of a folder, tried."""

    folder: Path
    wanted: int = SETTINGS

    @cached_property
    def panels(self) -> list[ScoringGroup]:
        return [ScoringGroup(NETS, [PredictionStore(self.folder / str(fold)) for fold in FOLDS])]

    def trial(self) -> AblationScores:
        masks = Masks(self.folder)
        return score_settings(self.panels, settings(self.wanted), VIEWS, masks.of, "Ablating")

    def __call__(self) -> None:
        self.trial()


@dataclass(frozen=True, eq=False)
class Reading(Ablation):
    """The same with a single setting: what is left is reading the maps."""

    def __call__(self) -> None:
        score_settings(self.panels, settings()[:1], VIEWS, Masks(self.folder).of, "Reading")


@dataclass(frozen=True, eq=False)
class BruteForce(Ablation):
    """Each setting by itself, on whole rasters, of maps that are in memory."""

    images: int = 1

    @cached_property
    def maps(self) -> list[tuple[str, dict[tuple[int, str], ProbabilityMap]]]:
        stores = self.panels[0].stores
        per_image = zip(*(store.compressed(0) for store in stores), strict=True)
        return [
            (
                of_nets[0][0].image_id,
                {(f, p.view): p.decompress() for f, ps in zip(FOLDS, of_nets, strict=True) for p in ps},
            )
            for of_nets in islice(per_image, self.images)
        ]

    def dice(self) -> NDArray[np.float64]:
        masks = Masks(self.folder)
        return np.array(
            [
                [confusion_counts(self._mask(setting, maps), masks.of(image_id)).dice for image_id, maps in self.maps]
                for setting in settings(self.wanted)
            ]
        )

    def _mask(self, setting: EnsembleConfig, maps: dict[tuple[int, str], ProbabilityMap]) -> NDArray[np.bool_]:
        return setting.merge_rule.mask(
            [sum_maps([maps[fold, view] for view in setting.views]) for fold in setting.folds]
        )

    def __call__(self) -> None:
        self.dice()


@dataclass(frozen=True)
class Masks:
    """True masks, by the number that an image's name begins with."""

    folder: Path

    def of(self, image_id: str) -> Raster:
        packed = np.load(self.folder / "masks" / f"{int(image_id[:12], 16) % DRAWN}.npy")
        return np.unpackbits(packed).reshape(1280, 1918)


def run(folder: Path, tiny: bool = False) -> list[Row]:
    """Return settings times images, an item being one setting on one image, and print what the aim speaks of."""
    wanted, images, few_images, rounds = (20, 4, 1, 1) if tiny else (SETTINGS, IMAGES, 4, 3)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        draw(folder, place, images)
        few = Path(temporary) / "few"
        draw(folder, few, few_images)
        ours, brute = Ablation(few, wanted), BruteForce(few, wanted, images=few_images)
        if not np.array_equal(brute.dice(), ours.trial().dice_SI):
            raise AssertionError("the ablation and brute force differ: nothing to compare")
        _report(place, wanted, images)
        name = f"{wanted} settings on an image / whole rasters"
        return [compare(name, ours, brute, few_images * wanted, rounds, warm=False)]


def _report(place: Path, wanted: int, images: int) -> None:
    seconds = []
    for contender in (Reading(place), Ablation(place, wanted)):
        begin = time.perf_counter()
        contender()
        seconds.append(time.perf_counter() - begin)
    reading, whole = seconds
    peak = format_mb(peak_mb(Ablation(place, wanted)))
    print(
        f"{wanted} settings x {images} images x {len(FOLDS)} folds x {len(VIEWS)} views on {available_cpus()} cores: "
        f"{whole:.1f} s, of which reading the maps {reading:.1f} s; peak {peak} MB; apart from "
        f"reading, {wanted * images / (whole - reading):,.0f} settings of an image a second"
    )


def draw(source: Path, place: Path, images: int) -> None:
    """Write masks and the maps of all nets and views for so many images."""
    (place / "masks").mkdir(parents=True)
    masks = CompetitionData(source).masks
    for number, image_id in enumerate(masks.ids()[:DRAWN]):
        np.save(place / "masks" / f"{number}.npy", np.packbits(masks.mask(image_id)))
    image_ids = [format_image_id(f"{number:012x}", 1) for number in range(images)]
    for fold in FOLDS:
        drawn = list(_levels(Masks(place), fold, min(images, DRAWN)))
        (place / str(fold)).mkdir()
        with ShardWriter(place / str(fold) / shard_name(0)) as writer:
            for number, image_id in enumerate(image_ids):
                for view, levels in zip(VIEWS, drawn[number % DRAWN], strict=True):
                    writer.add(ProbabilityMap.crop(image_id, view, 1, levels))
            writer.note_unreadable({})
        facts = {"merged": False, "shard_images": images, "unreadable": {}, "digests": [], "net": ""}
        write_index(place / str(fold), image_ids, VIEWS, **facts)


def _levels(masks: Masks, fold: int, images: int) -> Iterator[Sequence[Raster]]:
    for number in range(images):
        mask_HW = masks.of(f"{number:012x}")
        yield [draw_levels(mask_HW, [number, fold, view]) for view in range(len(VIEWS))]
