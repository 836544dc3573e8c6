"""Maps, settings and scores of an ablation."""

from collections.abc import Sequence
from itertools import product
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from pipeline.ablation.search_space import AblationSpace, EnsembleConfig
from pipeline.ablation.statistics import AblationScores
from pipeline.competition.dice import ConfusionCounts, confusion_counts
from pipeline.competition.image_ids import format_image_id
from pipeline.config import AblationSettings, EnsembleSettings, NetId
from pipeline.inference.probability_map import ProbabilityMap, sum_maps

VIEWS = ("identity", "hflip", "scale:0.75")
MODELS = ("small", "large")
FOLDS = (0, 1, 2)
NETS = list(product(MODELS, FOLDS))
SIZE = (60, 90)


Maps = dict[tuple[NetId, str], ProbabilityMap]


def drawn(seed: int, nets: Sequence[NetId] = NETS, views: Sequence[str] = VIEWS) -> tuple[Maps, NDArray[np.uint8]]:
    """Maps and the true mask of an image on which nets agree in most places, as trained ones do."""
    random = np.random.default_rng(seed)
    y, x = np.mgrid[: SIZE[0], : SIZE[1]]
    distance = np.hypot(y - 30, x - 45) - random.uniform(5, 40)
    true_HW = (distance + random.normal(0, 1, distance.shape) < 0).astype(np.uint8)
    maps: Maps = {}
    for net, view in product(nets, views):
        soft = 1 / (1 + np.exp(distance / 2 + random.normal(0, 0.7) + random.normal(0, 0.3, distance.shape)))
        levels = np.rint(np.clip((soft - 0.02) / 0.96, 0, 1) * 255).astype(np.uint8)
        levels[random.random(levels.shape) < 0.02] = random.choice([0, 102, 127, 128, 255])
        maps[net, view] = ProbabilityMap.crop("0123456789ab_01", view, 1, levels)
    return maps, true_HW


def brute_force(setting: EnsembleConfig, maps: Maps, true_HW: NDArray[np.uint8]) -> ConfusionCounts:
    summed = [sum_maps([maps[net, view] for view in setting.views]) for net in setting.nets]
    return confusion_counts(setting.merge_rule.mask(summed, *true_HW.shape), true_HW)


def choices(**changes: Any) -> AblationSpace:
    known: dict[str, Any] = {
        "ablation": AblationSettings(weights=({}, {"small": 3}), threshold=(0.0005, 0.3, 0.4, 0.5, 0.999)),
        "ensemble": EnsembleSettings(),
        "models": MODELS,
        "folds": FOLDS,
        "predicted": {"oof": VIEWS, "holdout": VIEWS},
        "views": ("identity", "hflip"),
    }
    return AblationSpace(**(known | changes))


def trial_of(dice_SC: NDArray[np.float64], settings: Sequence[EnsembleConfig]) -> AblationScores:
    """Every car has 16 images of the same Dice."""
    cars = dice_SC.shape[1]
    images = pd.DataFrame(
        [
            (format_image_id(f"{car:012x}", angle), f"{car:012x}", angle)
            for car in range(cars)
            for angle in range(1, 17)
        ],
        columns=["image_id", "car", "angle"],
    )
    sizes = {(net, view): 1000.0 for setting in settings for net in setting.nets for view in setting.views}
    return AblationScores(settings, images, np.repeat(dice_SC, 16, axis=1), sizes)
