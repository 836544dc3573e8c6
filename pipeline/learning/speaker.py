"""What trained nets and their exports have in common, whatever runs them; needs no torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from pipeline.learning.rasters import Pixels, to_input
from pipeline.learning.settings import InputSettings

Levels = NDArray[np.uint8]

ENSEMBLE_VIEW = "ensemble"
"""The one view of an ensemble's file, which looks in all its views itself."""


class Speaker(ABC):
    """A net that turns pictures into probabilities: ``inference.Predictor``, ``exporting.runtime.OnnxPredictor``."""

    views: list[str]
    """What it looks at, in the order of its levels."""

    input: InputSettings
    """What it wants to see."""

    own_threshold: float | None = None
    """Where it cuts its own probabilities, if it was made with a threshold: an export of an ensemble."""

    def __call__(self, image_HWC: Pixels) -> NDArray[np.float32]:
        """Return the probability of car at each pixel, float32 (H, W), as the mean of the views.

        ``image`` is uint8 RGB of any size, (H, W, 3).
        """
        height, width = image_HWC.shape[:2]
        levels_VHW = self.levels([self.prepare(image_HWC)], height, width)[0]
        return np.asarray(levels_VHW.mean(axis=0, dtype=np.float32) / np.float32(255))

    def prepare(self, image_HWC: Pixels) -> Pixels:
        """Return a picture, uint8 RGB of any size, as the net sees it, uint8 (h, w, C)."""
        return to_input(image_HWC, self.input)

    @abstractmethod
    def looking_at(self, views: Sequence[str]) -> Self:
        """Return the same net, its weights shared, that looks at other views; an export of an ensemble has its own."""

    @abstractmethod
    def levels(self, inputs: list[Pixels], height: int, width: int) -> Levels:
        """Return the levels of each prepared picture and view, uint8 (B, V, height, width)."""

    @abstractmethod
    def levels_at(self, inputs: list[Pixels], sizes: Sequence[tuple[int, int]]) -> list[Levels]:
        """Return the levels of each prepared picture at a size of its own: uint8 (V, height, width) each."""
