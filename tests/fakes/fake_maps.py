"""Probability maps of random numbers."""

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.errors import CorruptFileError
from pipeline.inference.prediction_store import PredictionStream, PredictJob
from pipeline.inference.probability_map import maps_of_views

IDS = [f"0123456789ab_{angle:02d}" for angle in range(1, 6)]
FULL = 255


def levels(seed: int, height: int = 40, width: int = 50, views: int = 1) -> NDArray[np.uint8]:
    """Views of a picture that are certain in most places, as those of trained nets are."""
    random = np.random.default_rng(seed)
    raster = random.integers(0, 256, (views, height, width), np.uint8)
    raster[:, random.random((height, width)) < 0.4] = 0
    raster[:, :7] = 0
    raster[:, :, -5:] = 0
    return raster


def whole(seed: int, views: int = 1) -> NDArray[np.uint8]:
    raster = np.zeros((views, HEIGHT, WIDTH), np.uint8)
    raster[:, 300:340, 500:550] = levels(seed, views=views)
    return raster


def as_maps(job: PredictJob, images: Iterable[tuple[str, NDArray[np.uint8] | CorruptFileError]]) -> PredictionStream:
    """Yield what a predictor yields, from the views (V, H, W) of each image."""
    for image_id, views in images:
        unreadable = isinstance(views, CorruptFileError)
        yield image_id, views if unreadable else maps_of_views(image_id, job.views, views, job.test)
