"""Steps after the merge tried on a few settings: on whole rasters, since a step may change any pixel."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.competition.metric import count
from pipeline.ensembling.ablation import Panel, Trial, side_by_side
from pipeline.ensembling.ensemble import Steps
from pipeline.ensembling.grid import Setting
from pipeline.ensembling.maps import PackedMap, sum_maps
from pipeline.ensembling.postprocess import Decision, Photo
from pipeline.ensembling.scoring import TrueMask

CARS = 16
"""Cars that steps are tried on, at most: a mask at a time they take a hundred times as long as the grid."""


@dataclass(frozen=True)
class Finishing:
    """A setting with the steps that follow it."""

    setting: Setting
    steps: Steps


def try_steps(
    panels: Sequence[Panel], trial: Trial, tried: Sequence[Finishing], true_mask: TrueMask, photo: Photo, words: str
) -> Trial:
    """Return a trial of settings with steps, in their order, on the first ``CARS`` cars of one without."""
    cars = sorted(set(trial.images["car"]))[:CARS]
    images = trial.images[trial.images["car"].isin(cars)].reset_index(drop=True)
    wanted = set(images["image_id"])
    by_setting: dict[Setting, list[tuple[int, Steps]]] = {}
    for index, finishing in enumerate(tried):
        by_setting.setdefault(finishing.setting, []).append((index, finishing.steps))

    def look(work: tuple[Panel, list[list[PackedMap]]]) -> NDArray[np.float64]:
        panel, packed_NV = work
        true_HW = true_mask(packed_NV[0][0].image_id)
        maps = {(n, p.view): p.unpack() for n, of_net in zip(panel.nets, packed_NV, strict=True) for p in of_net}
        dice = np.empty(len(tried))
        for setting, followed in by_setting.items():
            summed = [sum_maps([maps[net, view] for view in setting.views]) for net in setting.nets]
            for index, steps in followed:
                dice[index] = count(Decision(setting.merger, steps, photo).mask(summed), true_HW).dice
        return dice

    packed = ((panel, maps) for panel in panels for maps in panel.read(wanted))
    dice = list(tqdm(side_by_side(look, packed), desc=words, total=len(images), unit="image"))
    return replace(trial, settings=[f.setting for f in tried], images=images, dice_SI=np.stack(dice, axis=1))
