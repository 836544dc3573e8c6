"""Score every setting of the search space on stored probability maps."""

import time
from collections import Counter
from collections.abc import Callable, Container, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.ablation.fast_dice import AmbiguousPixels, MapStack, SettingScorer
from pipeline.ablation.search_space import OWN_FOLD, AblationSpace, EnsembleConfig
from pipeline.ablation.statistics import ABLATION_COLUMNS, AblationScores, AblationStatistics, best_settings
from pipeline.competition.dice import confusion_counts
from pipeline.competition.image_ids import parse_image_id
from pipeline.config import SCORED_SPLITS, NetId, Params, ScoredSplit, Steps
from pipeline.data.fold_assignment import HOLDOUT_FOLD, images_in_folds
from pipeline.ensemble.evaluation import MaskLoader
from pipeline.ensemble.merge import MergeRule
from pipeline.ensemble.postprocess import ImageLoader, MaskBuilder
from pipeline.errors import CarvanaError
from pipeline.inference.prediction_store import PredictionStore
from pipeline.inference.probability_map import CompressedMap, ProbabilityMap, sum_maps
from pipeline.utils.parallel import parallel_map
from pipeline.workspace import net_digest, net_dir, predictions_dir


@dataclass(frozen=True)
class ScoringGroup:
    """Nets that all predicted the same images, and trained on none of their cars."""

    nets: Sequence[NetId]
    stores: Sequence[PredictionStore]

    def validate(self, image_ids: Sequence[str], views: Sequence[str], digests: Sequence[str]) -> None:
        """Raise CarvanaError unless the maps are of these images and views, made by nets with these digests."""
        for store, digest in zip(self.stores, digests, strict=True):
            if problem := self._problem(store, image_ids, views, digest):
                raise CarvanaError(f"{store.folder} is out of date: {problem}. Run 'dvc repro'.")

    def _problem(
        self, store: PredictionStore, image_ids: Sequence[str], views: Sequence[str], digest: str
    ) -> str | None:
        missing = [view for view in views if view not in store.views]
        if missing:
            return f"view {missing[0]} is missing"
        if list(views) != store.views:
            return "the views differ from predict.tta"
        if list(image_ids) != store.image_ids:
            return "the images differ from folds.csv"
        if store.shard_images != self.stores[0].shard_images:
            return "the shard size differs from that of other nets"
        return "the maps are from an earlier net" if digest != store.net else None

    def read(self, image_ids: Container[str] | None = None) -> Iterator[list[list[CompressedMap]]]:
        """Yield the stored maps of each image, or of those in ``image_ids``, by net and view."""
        for number in range(self.stores[0].shard_count()):
            yield from map(list, zip(*(store.compressed(number, image_ids) for store in self.stores), strict=True))

    def seconds(self) -> dict[tuple[NetId, str], float]:
        """Return the measured seconds per image, by net and view, where known."""
        timings = ((net, store.timing()) for net, store in zip(self.nets, self.stores, strict=True))
        return {
            (net, view): timing.seconds_per_image([view]) for net, timing in timings if timing for view in timing.views
        }


def score_settings(
    groups: Sequence[ScoringGroup],
    settings: Sequence[EnsembleConfig],
    views: Sequence[str],
    true_mask: MaskLoader,
    progress_label: str,
) -> AblationScores:
    """Return the exact Dice of every image under every setting.

    The first setting is the current one; the disagreement between nets is computed with its views and threshold.
    """
    scorer = SettingScorer(settings, groups[0].nets, views)
    current = [views.index(view) for view in settings[0].views]

    def score(compressed_NV: Sequence[Sequence[CompressedMap]]) -> tuple[dict[str, Any], NDArray[np.float64]]:
        image_id = compressed_NV[0][0].image_id
        maps = [[compressed.decompress() for compressed in net_maps] for net_maps in compressed_NV]
        stack = MapStack.of(maps, true_mask(image_id))
        pixels = stack.ambiguous_pixels(scorer.bounds)
        car, angle = parse_image_id(image_id)
        row = {"image_id": image_id, "car": car, "angle": angle, "nets": len(compressed_NV)}
        row["disagreement"] = _disagreement(pixels, current, settings[0].threshold)
        conflict = asdict(stack.label_conflict())
        return row | {"suspect": conflict.pop("pixels"), **conflict}, scorer.dice(pixels)

    rows: list[dict[str, Any]] = []
    dice: list[NDArray[np.float64]] = []
    map_bytes: Counter[tuple[NetId, str]] = Counter()
    images = sum(len(group.stores[0].image_ids) for group in groups)
    with tqdm(total=images, desc=progress_label, unit="image") as bar:
        for row, dice_S in parallel_map(score, _read(groups, map_bytes)):
            rows.append(row)
            dice.append(dice_S)
            bar.update()
    bytes_per_image = {key: size / len(rows) for key, size in map_bytes.items()}
    return AblationScores(settings, pd.DataFrame(rows), np.stack(dice, axis=1), bytes_per_image)


def _read(groups: Sequence[ScoringGroup], map_bytes: Counter[tuple[NetId, str]]) -> Iterator[list[list[CompressedMap]]]:
    """Yield the maps of each image, by net and view, and add up their sizes in ``map_bytes``."""
    for group in groups:
        for compressed_NV in group.read():
            for net, net_maps in zip(group.nets, compressed_NV, strict=True):
                map_bytes.update({(net, compressed.view): compressed.bytes for compressed in net_maps})
            yield compressed_NV


def _disagreement(pixels: AmbiguousPixels, views: Sequence[int], threshold: float) -> int | None:
    """Return the number of pixels on which the nets' masks differ; None if there is only one net."""
    if len(pixels.probs_u8_NVU) == 1:
        return None
    single_net = MergeRule("mean_probability", threshold, (len(views),), (1,))
    masks_NU = pixels.probs_u8_NVU[:, views].sum(axis=1, dtype=np.uint16) >= single_net.min_positive_sum
    return int(np.count_nonzero(masks_NU.min(axis=0) != masks_NU.max(axis=0)))


MAX_CARS = 16
"""Most cars on which post-processing is scored: it works on whole masks, about 100 times slower than the grid."""


@dataclass(frozen=True)
class PostprocessTrial:
    """A setting with post-processing steps."""

    setting: EnsembleConfig
    steps: Steps


def score_postprocessing(
    groups: Sequence[ScoringGroup],
    scores: AblationScores,
    trials: Sequence[PostprocessTrial],
    true_mask: MaskLoader,
    image: ImageLoader,
    progress_label: str,
) -> tuple[AblationScores, list[float]]:
    """Return the scores of ``trials``, in their order, and the seconds per image that each adds to the merge.

    Only the images of the first ``MAX_CARS`` cars in ``scores`` are used.
    """
    cars = sorted(set(scores.images["car"]))[:MAX_CARS]
    images = scores.images[scores.images["car"].isin(cars)].reset_index(drop=True)
    image_ids = set(images["image_id"])
    by_setting: dict[EnsembleConfig, list[tuple[int, Steps]]] = {}
    for index, trial in enumerate(trials):
        by_setting.setdefault(trial.setting, []).append((index, trial.steps))

    def score(work: tuple[ScoringGroup, list[list[CompressedMap]]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        group, compressed_NV = work
        true_HW = true_mask(compressed_NV[0][0].image_id)
        net_maps = zip(group.nets, compressed_NV, strict=True)
        maps = {(net, m.view): m.decompress() for net, compressed_V in net_maps for m in compressed_V}
        dice, seconds = np.empty(len(trials)), np.empty(len(trials))
        for setting, setting_trials in by_setting.items():
            summed = [sum_maps([maps[net, view] for view in setting.views]) for net in setting.nets]
            merge_seconds = _timed_mask(MaskBuilder(setting.merge_rule), summed)[1]
            for index, steps in setting_trials:
                mask_HW, total_seconds = _timed_mask(MaskBuilder(setting.merge_rule, steps, image), summed)
                dice[index] = confusion_counts(mask_HW, true_HW).dice
                seconds[index] = total_seconds - merge_seconds
        return dice, seconds

    work = ((group, maps) for group in groups for maps in group.read(image_ids))
    results = list(tqdm(parallel_map(score, work), desc=progress_label, total=len(images), unit="image"))
    dice_SI, seconds_SI = (np.stack(columns, axis=1) for columns in zip(*results, strict=True))
    seconds_S = seconds_SI.mean(axis=1)
    extra_S = [max(0.0, seconds) if trial.steps else 0.0 for trial, seconds in zip(trials, seconds_S, strict=True)]
    return replace(scores, settings=[trial.setting for trial in trials], images=images, dice_SI=dice_SI), extra_S


def _timed_mask(mask_builder: MaskBuilder, maps: Sequence[ProbabilityMap]) -> tuple[NDArray[np.bool_], float]:
    start = time.perf_counter()
    return mask_builder.mask(maps), time.perf_counter() - start


_FOLD_SUBSET_COLUMNS = ["models", "count", "folds", "dice"]
_POSTPROCESS_COLUMNS = [*(name for name in ABLATION_COLUMNS if name != "front"), "postprocess"]
_DISAGREEMENT_COLUMNS = [
    *("split", "image_id", "car", "angle", "dice", "nets", "disagreement", "suspect"),
    *("top", "left", "height", "width"),
]


@dataclass
class AblationTables:
    """The results of an ablation: one field per file in ``reports/``."""

    summary: dict[str, Any] = field(default_factory=dict)
    """Content of ablation.json: per split a summary, or why it was skipped; and the search space."""
    settings: list[pd.DataFrame] = field(default_factory=lambda: [pd.DataFrame(columns=list(ABLATION_COLUMNS))])
    postprocess: list[pd.DataFrame] = field(default_factory=lambda: [pd.DataFrame(columns=_POSTPROCESS_COLUMNS)])
    fold_subsets: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=_FOLD_SUBSET_COLUMNS))
    disagreement: list[pd.DataFrame] = field(default_factory=lambda: [pd.DataFrame(columns=_DISAGREEMENT_COLUMNS)])


@dataclass(frozen=True)
class AblationRunner:
    """Scores the settings of a search space on both splits."""

    space: AblationSpace
    holdout_cars: int
    """Number of cars held out of all folds."""
    groups: Callable[[ScoredSplit], Sequence[ScoringGroup]]
    """Opens and checks the stored maps of a split."""
    true_mask: MaskLoader
    image: ImageLoader
    """Called only by post-processing steps that need the image."""

    def run(self) -> AblationTables:
        """Score every split that can be scored; raises CarvanaError if one that the settings demand cannot."""
        skipped = {split: self.space.why_not_scorable(split, self.holdout_cars) for split in SCORED_SPLITS}
        tables = AblationTables({"search_space": self.space.fingerprint()})
        for split, reason in skipped.items():
            if reason:
                tables.summary[split] = {"skipped": reason}
            else:
                self._add_split(tables, split)
        return tables

    def _add_split(self, tables: AblationTables, split: ScoredSplit) -> None:
        grid, groups = self.space.grid(split), self.groups(split)
        subsets = self.space.fold_subsets() if split == "holdout" else []
        settings = list(dict.fromkeys([*grid, *subsets]))
        scores = score_settings(groups, settings, self.space.predicted[split], self.true_mask, f"Ablation, {split}")
        statistics = AblationStatistics(
            split,
            replace(scores, settings=grid, dice_SI=scores.dice_SI[: len(grid)]),
            pooled_cost(groups),
            self.space.ablation.tolerance,
        )
        tables.summary[split] = statistics.summary() | {"warnings": self.space.warnings(split)}
        tables.settings.append(statistics.table)
        tables.disagreement.append(scores.images.assign(split=split, dice=scores.dice_SI[0])[_DISAGREEMENT_COLUMNS])
        tables.postprocess.append(self._postprocess_table(split, groups, statistics))
        if subsets:
            tables.fold_subsets = _fold_subset_table(scores, subsets)

    def _postprocess_table(
        self, split: ScoredSplit, groups: Sequence[ScoringGroup], statistics: AblationStatistics
    ) -> pd.DataFrame:
        """Return one row per trial: the current setting as it is, then it and the best ones with each list of steps."""
        ablation = self.space.ablation
        settings = [statistics.scores.settings[0], *best_settings(statistics, ablation.postprocess_best)]
        trials = [PostprocessTrial(setting, steps) for setting in settings for steps in ablation.postprocess]
        if not trials:
            return pd.DataFrame(columns=_POSTPROCESS_COLUMNS)
        current = PostprocessTrial(settings[0], self.space.ensemble.postprocess)
        trials = list(dict.fromkeys([current, *trials]))
        scores, extra_seconds = score_postprocessing(
            groups, statistics.scores, trials, self.true_mask, self.image, f"Post-processing, {split}"
        )
        table = replace(statistics, scores=scores).table.drop(columns="front")
        # Without timings the cost is in forward passes, to which post-processing adds nothing.
        table["cost"] += extra_seconds if table["seconds"].notna().all() else 0
        table["seconds"] += extra_seconds
        return table.assign(postprocess=[" ".join(trial.steps) or "none" for trial in trials])


def _fold_subset_table(scores: AblationScores, subsets: Sequence[EnsembleConfig]) -> pd.DataFrame:
    dice = dict(zip(scores.settings, scores.dice_SI.mean(axis=1).tolist(), strict=True))
    rows = [(row["models"], len(s.folds), row["folds"], dice[s]) for s in subsets for row in [s.row()]]
    return pd.DataFrame(rows, columns=_FOLD_SUBSET_COLUMNS)


def pooled_cost(groups: Sequence[ScoringGroup]) -> dict[tuple[NetId, str], float]:
    """Return the seconds per image by net and view, averaged over all folds of a model and all views of one scale.

    These do the same work (a flip costs next to nothing), so timing differences between them are noise that must not
    decide between settings.
    """
    known = pd.DataFrame(
        [
            (net, view, net[0], view.partition("scale:")[2] or "1", seconds)
            for group in groups
            for (net, view), seconds in group.seconds().items()
        ],
        columns=["net", "view", "model", "scale", "seconds"],
    )
    known["seconds"] = known.groupby(["model", "scale"])["seconds"].transform("mean")
    return {(row.net, row.view): float(row.seconds) for row in known.itertuples()}  # type: ignore[misc, arg-type]


def scoring_groups(
    params: Params, image_ids: Sequence[str], fold_by_car: dict[str, int], split: ScoredSplit
) -> list[ScoringGroup]:
    """Return the stored maps of a split: one group per fold out of fold, one group on held-out cars.

    Raises CarvanaError if maps are out of date.
    """
    models, active = params.models.active, params.folds.active
    if split == "holdout":
        nets = [(model, fold) for model in models for fold in active]
        return [_scoring_group(params, split, nets, nets, images_in_folds(image_ids, fold_by_car, [HOLDOUT_FOLD]))]
    return [
        _scoring_group(
            params,
            split,
            [(model, OWN_FOLD) for model in models],
            [(model, fold) for model in models],
            images_in_folds(image_ids, fold_by_car, [fold]),
        )
        for fold in active
    ]


def _scoring_group(
    params: Params, split: ScoredSplit, names: Sequence[NetId], nets: Sequence[NetId], image_ids: Sequence[str]
) -> ScoringGroup:
    group = ScoringGroup(names, [PredictionStore(predictions_dir(split, *net)) for net in nets])
    group.validate(
        image_ids,
        getattr(params.predict.tta, split),
        [net_digest(net_dir(*net), params.predict.checkpoint) for net in nets],
    )
    return group
