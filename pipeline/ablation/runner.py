"""Score every setting of the search space on stored probability maps."""

import time
from collections import Counter as Tally
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


MAX_CARS = 16
"""Cars that steps are tried on, at most: a mask at a time they take a hundred times as long as the grid."""


@dataclass(frozen=True)
class PostprocessTrial:
    """A setting with the steps that follow it."""

    setting: EnsembleConfig
    steps: Steps


def score_postprocessing(
    panels: Sequence[ScoringGroup],
    trial: AblationScores,
    tried: Sequence[PostprocessTrial],
    true_mask: MaskLoader,
    photo: ImageLoader,
    words: str,
) -> tuple[AblationScores, list[float]]:
    """Return a trial of settings with steps, in their order, on the first ``CARS`` cars of one without.

    And the seconds an image that the steps of each take, beyond the merge.
    """
    cars = sorted(set(trial.images["car"]))[:MAX_CARS]
    images = trial.images[trial.images["car"].isin(cars)].reset_index(drop=True)
    wanted = set(images["image_id"])
    by_setting: dict[EnsembleConfig, list[tuple[int, Steps]]] = {}
    for index, finishing in enumerate(tried):
        by_setting.setdefault(finishing.setting, []).append((index, finishing.steps))

    def look(work: tuple[ScoringGroup, list[list[CompressedMap]]]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        panel, packed_NV = work
        true_HW = true_mask(packed_NV[0][0].image_id)
        maps = {(n, p.view): p.decompress() for n, of_net in zip(panel.nets, packed_NV, strict=True) for p in of_net}
        dice, seconds = np.empty(len(tried)), np.empty(len(tried))
        for setting, followed in by_setting.items():
            summed = [sum_maps([maps[net, view] for view in setting.views]) for net in setting.nets]
            merged_s = _timed(MaskBuilder(setting.merge_rule), summed)[1]
            for index, steps in followed:
                mask_HW, seconds[index] = _timed(MaskBuilder(setting.merge_rule, steps, photo), summed)
                dice[index] = confusion_counts(mask_HW, true_HW).dice
                seconds[index] -= merged_s
        return dice, seconds

    packed = ((panel, maps) for panel in panels for maps in panel.read(wanted))
    found = list(tqdm(parallel_map(look, packed), desc=words, total=len(images), unit="image"))
    dice_SI, seconds_SI = (np.stack(columns, axis=1) for columns in zip(*found, strict=True))
    extra_S = [max(0.0, seconds) if f.steps else 0.0 for f, seconds in zip(tried, seconds_SI.mean(axis=1), strict=True)]
    return replace(trial, settings=[f.setting for f in tried], images=images, dice_SI=dice_SI), extra_S


def _timed(decision: MaskBuilder, maps: Sequence[ProbabilityMap]) -> tuple[NDArray[np.bool_], float]:
    begun = time.perf_counter()
    return decision.mask(maps), time.perf_counter() - begun


_WORTH = ("models", "count", "folds", "dice")
_POSTPROCESS = [*(name for name in ABLATION_COLUMNS if name != "front"), "postprocess"]
_DOUBTS = (
    *("split", "image_id", "car", "angle", "dice", "nets", "disagreement", "suspect"),
    *("top", "left", "height", "width"),
)


@dataclass
class AblationTables:
    """What an ablation found, a table a file of ``reports/``."""

    facts: dict[str, Any] = field(default_factory=dict)
    """Summary of each split, or why it was refused, and what there was to choose from."""
    settings: list[pd.DataFrame] = field(default_factory=lambda: [pd.DataFrame(columns=list(ABLATION_COLUMNS))])
    postprocess: list[pd.DataFrame] = field(default_factory=lambda: [pd.DataFrame(columns=_POSTPROCESS)])
    fold_worth: pd.DataFrame = field(default_factory=lambda: pd.DataFrame(columns=list(_WORTH)))
    doubts: list[pd.DataFrame] = field(default_factory=lambda: [pd.DataFrame(columns=list(_DOUBTS))])


@dataclass(frozen=True)
class AblationRunner:
    """What is to be compared, and on what."""

    choices: AblationSpace
    held_out: int
    """Cars held out of all folds."""
    panels: Callable[[ScoredSplit], Sequence[ScoringGroup]]
    """Maps of a split, checked."""
    true_mask: MaskLoader
    photo: ImageLoader
    """Asked for by steps that look at photographs."""

    def run(self) -> AblationTables:
        """Score all that can be scored; raises CarvanaError for what was asked for and can't be."""
        refusals = {split: self.choices.why_not_scorable(split, self.held_out) for split in SCORED_SPLITS}
        findings = AblationTables({"choices": self.choices.fingerprint()})
        for split, refusal in refusals.items():
            if refusal:
                findings.facts[split] = {"refused": refusal}
            else:
                self._add(findings, split)
        return findings

    def _add(self, findings: AblationTables, split: ScoredSplit) -> None:
        grid, panels = self.choices.grid(split), self.panels(split)
        subsets = self.choices.fold_subsets() if split == "holdout" else []
        settings = list(dict.fromkeys([*grid, *subsets]))
        trial = score_settings(panels, settings, self.choices.predicted[split], self.true_mask, f"Ablating on {split}")
        verdict = AblationStatistics(
            split,
            replace(trial, settings=grid, dice_SI=trial.dice_SI[: len(grid)]),
            pooled_cost(panels),
            self.choices.ablation.tolerance,
        )
        findings.facts[split] = verdict.summary() | {"cautions": self.choices.warnings(split)}
        findings.settings.append(verdict.table)
        findings.doubts.append(trial.images.assign(split=split, dice=trial.dice_SI[0])[list(_DOUBTS)])
        findings.postprocess.append(self._finished(split, panels, verdict))
        if subsets:
            findings.fold_worth = _fold_worth(trial, subsets)

    def _finished(
        self, split: ScoredSplit, panels: Sequence[ScoringGroup], verdict: AblationStatistics
    ) -> pd.DataFrame:
        """Return the rows of the current and the best settings with each list of steps, as they are now first."""
        ablation, now = self.choices.ablation, self.choices.ensemble.postprocess
        settings = [verdict.trial.settings[0], *best_settings(verdict, ablation.postprocess_best)]
        tried = [PostprocessTrial(setting, steps) for setting in settings for steps in ablation.postprocess]
        if not tried:
            return pd.DataFrame(columns=_POSTPROCESS)
        tried = list(dict.fromkeys([PostprocessTrial(settings[0], now), *tried]))
        trial, extra_s = score_postprocessing(
            panels, verdict.trial, tried, self.true_mask, self.photo, f"Post-processing {split}"
        )
        table = replace(verdict, trial=trial).table.drop(columns="front")
        # Passes do not add to seconds: where nets were not timed, the cost stays theirs.
        table["cost"] += extra_s if table["seconds"].notna().all() else 0
        table["seconds"] += extra_s
        return table.assign(postprocess=[" ".join(f.steps) or "none" for f in tried])


def _fold_worth(trial: AblationScores, subsets: Sequence[EnsembleConfig]) -> pd.DataFrame:
    dice = dict(zip(trial.settings, trial.dice_SI.mean(axis=1).tolist(), strict=True))
    rows = [(row["models"], len(s.folds), row["folds"], dice[s]) for s in subsets for row in [s.row()]]
    return pd.DataFrame(rows, columns=list(_WORTH))


def pooled_cost(panels: Sequence[ScoringGroup]) -> dict[tuple[NetId, str], float]:
    """Return the seconds an image by net and view: the mean over all folds of a model and all views of a size.

    Their nets do the same work, and a flip is nothing beside it: what the clock says of them otherwise is noise, which
    must not decide between settings.
    """
    known = pd.DataFrame(
        [(net, view, net[0], _size(view), seconds) for p in panels for (net, view), seconds in p.seconds().items()],
        columns=["net", "view", "model", "size", "seconds"],
    )
    known["seconds"] = known.groupby(["model", "size"])["seconds"].transform("mean")
    return {(row.net, row.view): float(row.seconds) for row in known.itertuples()}  # type: ignore[misc, arg-type]


def _size(view: str) -> str:
    return view.partition("scale:")[2] or "1"


def scoring_groups(
    params: Params, image_ids: Sequence[str], fold_by_car: dict[str, int], split: ScoredSplit
) -> list[ScoringGroup]:
    """Return the maps of a split, that of each fold by itself out of fold; raises CarvanaError for stale ones."""
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
    panel = ScoringGroup(names, [PredictionStore(predictions_dir(split, *net)) for net in nets])
    panel.validate(
        image_ids,
        getattr(params.predict.tta, split),
        [net_digest(net_dir(*net), params.predict.checkpoint) for net in nets],
    )
    return panel
