"""What trained nets look at. Apart from what they learn from, so that a change here retrains nothing; no torch."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt, model_validator

from pipeline.learning.settings import Precision
from pipeline.sections import NonEmptyUnique, StrictModel

Split = Literal["oof", "holdout", "test"]
"""Validation cars of a fold, cars held out of all folds, or test images."""

ViewName = Annotated[str, Field(pattern=r"^(identity|hflip|(hflip\+)?scale:\d+(\.\d+)?)$")]
"""``identity``, ``hflip``, ``scale:0.75`` or ``hflip+scale:0.75``."""

Views = NonEmptyUnique[ViewName]


class SplitTTA(StrictModel):
    """Views of each split, so that a view wanted for an ablation never repredicts test."""

    oof: Views
    """Of validation cars of each fold; maps are kept a view."""

    holdout: Views
    """Of cars that no net trained on; maps are kept a view."""

    test: Views
    """Of test images; maps are summed over the views. Scoring needs the same ones among ``oof`` and ``holdout``."""

    @model_validator(mode="after")
    def _can_be_scored(self) -> "SplitTTA":
        for split in ("oof", "holdout"):
            lacking = set(self.test) - set(getattr(self, split))
            if lacking:
                raise ValueError(
                    f"predict.tta.test has {sorted(lacking)[0]}, which predict.tta.{split} lacks: "
                    "the submission could not be scored"
                )
        return self


class PredictSettings(StrictModel):
    """Section ``predict`` of params.yaml."""

    tta: SplitTTA
    """What each net looks at."""

    checkpoint: Literal["last", "best"] = "last"
    """Of training: ``best`` was selected on the very images that its out-of-fold score reports."""

    precision: Precision = "auto"
    """As in ``train``."""

    shard_images: PositiveInt = 256
    """Images a file of maps; a killed run loses at most one file."""
