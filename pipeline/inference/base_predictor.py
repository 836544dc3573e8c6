"""The interface of trained nets and their exports, whatever runs them; needs no torch."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import numpy as np

from pipeline.config import InputSettings
from pipeline.models.resize import to_network_input
from pipeline.utils.arrays import Float32Array, UInt8Array

BUILTIN_TTA = "ensemble"
"""The one view of an exported ensemble, which applies all its views itself."""


class BasePredictor(ABC):
    """A net that turns images into probabilities: ``TorchPredictor`` or ``OnnxPredictor``."""

    views: list[str]
    """TTA views, in the order of its outputs."""

    input: InputSettings
    """Size and channels of its input."""

    default_threshold: float | None = None
    """Threshold on its probabilities that an exported ensemble was made with; None for single nets."""

    def __call__(self, image_HWC: UInt8Array) -> Float32Array:
        """Return the probability of foreground at each pixel, float32 (H, W), as the mean of the views.

        ``image_HWC`` is uint8 RGB of any size, (H, W, 3).
        """
        height, width = image_HWC.shape[:2]
        probs_VHW = self.predict_u8([self.preprocess(image_HWC)], height, width)[0]
        return np.asarray(probs_VHW.mean(axis=0, dtype=np.float32) / np.float32(255))

    def preprocess(self, image_HWC: UInt8Array) -> UInt8Array:
        """Return the net's input, uint8 (h, w, C), for an RGB image, uint8 of any size."""
        return to_network_input(image_HWC, self.input)

    @abstractmethod
    def with_tta(self, views: Sequence[str]) -> Self:
        """Return the same net, sharing its weights, with other views; an exported ensemble keeps its own."""

    @abstractmethod
    def predict_u8(self, inputs: list[UInt8Array], height: int, width: int) -> UInt8Array:
        """Return probabilities of each input and view, uint8 (B, V, height, width)."""

    @abstractmethod
    def predict_u8_at_sizes(self, inputs: list[UInt8Array], sizes: Sequence[tuple[int, int]]) -> list[UInt8Array]:
        """Return probabilities of each input at a size of its own: uint8 (V, height, width) each."""
