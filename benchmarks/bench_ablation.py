"""Score a thousand ensemble settings on stored maps: the fast ablation against merging full-size maps per setting."""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from benchmarks.synthetic_maps import synthetic_map
from benchmarks.timing import Row, compare, format_mb, peak_mb, seconds_of
from pipeline.ablation.runner import ScoringGroup, score_settings
from pipeline.ablation.search_space import AblationSpace, EnsembleConfig
from pipeline.ablation.statistics import AblationScores
from pipeline.competition.dice import confusion_counts
from pipeline.competition.image_ids import HEIGHT, WIDTH, format_image_id
from pipeline.config import AblationSettings, EnsembleSettings
from pipeline.data.competition_data import CompetitionData
from pipeline.inference.prediction_store import PredictionStore, ShardWriter, shard_name, write_index
from pipeline.inference.probability_map import ProbabilityMap, sum_maps
from pipeline.utils.arrays import UInt8Array
from pipeline.utils.parallel import available_cpus

FOLDS = (0, 1, 2, 3, 4)
VIEWS = ("identity", "hflip", "scale:0.75", "scale:1.25")
NETS = [("net", fold) for fold in FOLDS]
SETTINGS = 1000
IMAGES = 512
UNIQUE_IMAGES = 16
"""Number of different images; the others repeat them under other ids."""


def settings(count: int = SETTINGS) -> list[EnsembleConfig]:
    """Return ``count`` combinations of views, folds, merge rules and thresholds, as a user might ablate them."""
    grid = AblationSpace(
        ablation=AblationSettings(threshold=tuple(np.linspace(0.3, 0.7, 9).round(2).tolist())),
        ensemble=EnsembleSettings(),
        models=("net",),
        folds=FOLDS,
        predicted={"oof": VIEWS, "holdout": VIEWS},
        views=("identity", "hflip"),
    ).grid("holdout")
    # Evenly spaced over the grid, since settings with few nets are faster.
    return [grid[index] for index in np.linspace(0, len(grid) - 1, count).astype(int)]


@dataclass(frozen=True, eq=False)
class Ablation:
    """The fast ablation of the maps in a folder."""

    folder: Path
    count: int = SETTINGS

    @cached_property
    def groups(self) -> list[ScoringGroup]:
        return [ScoringGroup(NETS, [PredictionStore(self.folder / str(fold)) for fold in FOLDS])]

    def scores(self) -> AblationScores:
        return score_settings(self.groups, settings(self.count), VIEWS, Masks(self.folder).mask, "Ablating")

    def __call__(self) -> None:
        self.scores()


@dataclass(frozen=True, eq=False)
class Reading(Ablation):
    """The same with one setting, which takes little more than reading the maps."""

    def __call__(self) -> None:
        score_settings(self.groups, settings()[:1], VIEWS, Masks(self.folder).mask, "Reading")


@dataclass(frozen=True, eq=False)
class BruteForce(Ablation):
    """Every setting by itself, on full-size maps that are in memory."""

    images: int = 1

    @cached_property
    def maps(self) -> list[tuple[str, dict[tuple[int, str], ProbabilityMap]]]:
        stores = self.groups[0].stores
        per_image = zip(*(store.compressed(0) for store in stores), strict=True)
        return [
            (
                by_fold[0][0].image_id,
                {(f, m.view): m.decompress() for f, maps in zip(FOLDS, by_fold, strict=True) for m in maps},
            )
            for by_fold in islice(per_image, self.images)
        ]

    def dice(self) -> NDArray[np.float64]:
        masks = Masks(self.folder)
        return np.array(
            [
                [confusion_counts(self._mask(setting, maps), masks.mask(image_id)).dice for image_id, maps in self.maps]
                for setting in settings(self.count)
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
    """True masks, by the car number at the start of the image id."""

    folder: Path

    def mask(self, image_id: str) -> UInt8Array:
        packed = np.load(self.folder / "masks" / f"{int(image_id[:12], 16) % UNIQUE_IMAGES}.npy")
        return np.unpackbits(packed).reshape(HEIGHT, WIDTH)


def run(folder: Path, tiny: bool = False) -> list[Row]:
    """Return the comparison with brute force, one item being one setting on one image; print a full-size run."""
    count, images, few_images, rounds = (20, 4, 1, 1) if tiny else (SETTINGS, IMAGES, 4, 3)
    with tempfile.TemporaryDirectory() as temporary:
        full, few = Path(temporary), Path(temporary) / "few"
        write_maps(folder, full, images)
        write_maps(folder, few, few_images)
        ours, brute = Ablation(few, count), BruteForce(few, count, images=few_images)
        if not np.array_equal(brute.dice(), ours.scores().dice_SI):
            raise AssertionError("The Dice of the ablation differs from brute force.")
        _print_full_run(full, count, images)
        name = f"{count} settings on an image / full-size maps"
        return [compare(name, ours, brute, few_images * count, rounds, warm=False)]


def _print_full_run(folder: Path, count: int, images: int) -> None:
    reading = seconds_of(Reading(folder))
    total = seconds_of(Ablation(folder, count))
    peak = format_mb(peak_mb(Ablation(folder, count)))
    print(
        f"{count} settings x {images} images x {len(FOLDS)} folds x {len(VIEWS)} views on {available_cpus()} cores: "
        f"{total:.1f} s, of which {reading:.1f} s reading the maps; peak {peak} MB; without reading, "
        f"{count * images / (total - reading):,.0f} settings on an image per second"
    )


def write_maps(source: Path, target: Path, images: int) -> None:
    """Write true masks, and the maps of all nets and views, for ``images`` images."""
    (target / "masks").mkdir(parents=True)
    masks = CompetitionData(source).masks
    for number, image_id in enumerate(masks.ids()[:UNIQUE_IMAGES]):
        np.save(target / "masks" / f"{number}.npy", np.packbits(masks.mask(image_id)))
    image_ids = [format_image_id(f"{number:012x}", 1) for number in range(images)]
    for fold in FOLDS:
        views_of_images = list(_synthetic_views(Masks(target), fold, min(images, UNIQUE_IMAGES)))
        (target / str(fold)).mkdir()
        with ShardWriter(target / str(fold) / shard_name(0)) as writer:
            for number, image_id in enumerate(image_ids):
                for view, probs_HW in zip(VIEWS, views_of_images[number % UNIQUE_IMAGES], strict=True):
                    writer.add(ProbabilityMap.crop(image_id, view, 1, probs_HW))
            writer.note_unreadable({})
        facts = {"merged": False, "shard_images": images, "unreadable": {}, "digests": [], "net": ""}
        write_index(target / str(fold), image_ids, VIEWS, **facts)


def _synthetic_views(masks: Masks, fold: int, images: int) -> Iterator[Sequence[UInt8Array]]:
    for number in range(images):
        mask_HW = masks.mask(f"{number:012x}")
        yield [synthetic_map(mask_HW, [number, fold, view]) for view in range(len(VIEWS))]
