"""What trained nets and their exports have in common, whatever runs them; needs no torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np

from pipeline.config import InputSettings
from pipeline.models.resize import to_network_input
from pipeline.utils.arrays import Float32Array, UInt8Array

BUILTIN_TTA = "ensemble"
"""The one view of an ensemble's file, which looks in all its views itself."""


class BasePredictor(ABC):
    """A net that turns pictures into probabilities: ``TorchPredictor`` and ``OnnxPredictor``."""

    views: list[str]
    """What it looks at, in the order of its levels."""

    input: InputSettings
    """What it wants to see."""

    default_threshold: float | None = None
    """Where it cuts its own probabilities, if it was made with a threshold: an export of an ensemble."""

    def __call__(self, image_HWC: UInt8Array) -> Float32Array:
        """Return the probability of car at each pixel, float32 (H, W), as the mean of the views.

        ``image`` is uint8 RGB of any size, (H, W, 3).
        """
        height, width = image_HWC.shape[:2]
        levels_VHW = self.predict_u8([self.preprocess(image_HWC)], height, width)[0]
        return np.asarray(levels_VHW.mean(axis=0, dtype=np.float32) / np.float32(255))

    def preprocess(self, image_HWC: UInt8Array) -> UInt8Array:
        """Return a picture, uint8 RGB of any size, as the net sees it, uint8 (h, w, C)."""
        return to_network_input(image_HWC, self.input)

    @abstractmethod
    def with_tta(self, views: Sequence[str]) -> Self:
        """Return the same net, its weights shared, that looks at other views; an export of an ensemble has its own."""

    @abstractmethod
    def predict_u8(self, inputs: list[UInt8Array], height: int, width: int) -> UInt8Array:
        """Return the levels of each prepared picture and view, uint8 (B, V, height, width)."""

    @abstractmethod
    def predict_u8_at_sizes(self, inputs: list[UInt8Array], sizes: Sequence[tuple[int, int]]) -> list[UInt8Array]:
        """Return the levels of each prepared picture at a size of its own: uint8 (V, height, width) each."""
