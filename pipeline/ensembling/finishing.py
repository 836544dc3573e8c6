"""Steps after the merge tried on a few settings: on whole rasters, since a step may change any pixel."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.competition.metric import confusion_counts
from pipeline.ensembling.ablation import AblationScores, ScoringGroup, parallel_map
from pipeline.ensembling.ensemble import Steps
from pipeline.ensembling.grid import EnsembleConfig
from pipeline.ensembling.maps import CompressedMap, ProbabilityMap, sum_maps
from pipeline.ensembling.postprocess import ImageLoader, MaskBuilder
from pipeline.ensembling.scoring import MaskLoader

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
