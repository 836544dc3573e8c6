"""Assign cars to folds: folds/folds.csv."""

from pathlib import Path

from pipeline.config import Params
from pipeline.data.fold_assignment import assign_folds, mean_areas, write_folds
from pipeline.workspace import training_images


def run(params: Params) -> None:
    """Read the masks and ``folds``; write the fold of every car."""
    images = training_images(params)
    settings = params.folds
    areas = mean_areas(images.ids(), images.mask)
    write_folds(Path("folds/folds.csv"), assign_folds(areas, settings.count, settings.holdout_cars, settings.seed))
