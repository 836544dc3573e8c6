"""What an ONNX file says of itself, in its metadata, so that the file alone is enough to use it. No torch here."""

from collections.abc import Mapping
from typing import Literal

from pydantic import ValidationError

from pipeline.learning.settings import InputSettings
from pipeline.sections import StrictModel

KEY = "carvana"
"""The one entry of ONNX's ``metadata_props`` that is ours: JSON."""


class OnnxMetadata(StrictModel):
    """What a file is made of, and what it wants."""

    kind: Literal["net", "ensemble"]
    """``net``: float pixels to logits at their size. ``ensemble``: uint8 pixels to probabilities at any size."""

    model: str
    """Name of the model in params.yaml."""

    folds: tuple[int, ...]
    """Whose nets are in it."""

    input: InputSettings
    """What a net wants to see."""

    views: tuple[str, ...] = ("identity",)
    """What an ensemble looks at by itself."""

    merge: str = "mean_probability"
    """How an ensemble merges its nets."""

    threshold: float = 0.5
    """Probability from which on a pixel is car."""

    @property
    def decision_threshold(self) -> float:
        """From which of the file's own probabilities on a pixel is car: those of a vote are shares of nets."""
        return 0.5 if self.merge == "majority_vote" else self.threshold

    def metadata(self) -> dict[str, str]:
        """Return them as ``metadata_props``."""
        return {KEY: self.model_dump_json()}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "OnnxMetadata | None":
        """Return the facts in ``metadata_props``, or None where there are none that can be read."""
        try:
            return cls.model_validate_json(metadata[KEY])
        except (KeyError, ValidationError):
            return None
