"""Merged maps of cars with masks, compared with those masks."""

from collections.abc import Callable, Container, Iterator, Sequence

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from tqdm import tqdm

from pipeline.competition.layout import parse_image_id
from pipeline.competition.metric import confusion_counts
from pipeline.ensembling.maps import PredictionStore
from pipeline.ensembling.postprocess import MaskBuilder

MaskLoader = Callable[[str], NDArray[np.uint8]]
"""Mask (1280, 1918) of 0 and 1, by image id."""

SCORE_COLUMNS = ("dice", "iou", "accuracy")


def iter_masks(
    stores: Sequence[PredictionStore],
    decision: MaskBuilder,
    views: Sequence[str],
    image_ids: Container[str] | None = None,
) -> Iterator[tuple[str, NDArray[np.bool_]]]:
    """Yield the id and mask of every image, or of some, merged from the maps of nets that all predicted it."""
    for number in range(stores[0].shard_count()):
        for maps in zip(*(store.images(number, views) for store in stores), strict=True):
            if image_ids is None or maps[0].image_id in image_ids:
                yield maps[0].image_id, decision.mask(maps)


def score_images(
    stores: Sequence[PredictionStore], decision: MaskBuilder, views: Sequence[str], true_mask: MaskLoader, words: str
) -> pd.DataFrame:
    """Return a row an image: image_id, car, angle, dice, iou, accuracy, as Kaggle counts them at 1280 x 1918."""
    rows = []
    masks = iter_masks(stores, decision, views)
    for image_id, mask_HW in tqdm(masks, desc=words, total=len(stores[0].image_ids), unit="image"):
        counts = confusion_counts(mask_HW, true_mask(image_id))
        rows.append((image_id, *parse_image_id(image_id), counts.dice, counts.iou, counts.accuracy))
    return pd.DataFrame(rows, columns=["image_id", "car", "angle", *SCORE_COLUMNS])


def summarise(images: pd.DataFrame) -> dict[str, float]:
    """Return the means over images, and how many images and cars they rest on."""
    means = {name: round(float(images[name].mean()), 6) for name in SCORE_COLUMNS}
    return means | {"images": len(images), "cars": int(images["car"].nunique())}
