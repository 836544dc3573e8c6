"""An image with its cached predictions: each net runs at most once per view."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import streamlit as st

from pipeline.app.page_parts import FileFingerprint, file_fingerprint
from pipeline.config import Device, Params, Precision
from pipeline.errors import CarvanaError
from pipeline.inference.base_predictor import BUILTIN_TTA, BasePredictor
from pipeline.inference.probability_map import ProbabilityMap
from pipeline.report.overlays import CropBox, crop_image, data_uri
from pipeline.segment.segmenter import FOLDS_DIR, RawPredictions, Segmenter, load_predictor
from pipeline.utils.arrays import UInt8Array

DISPLAY_WIDTH, DISPLAY_HEIGHT = 1280, 960
"""Largest size at which images are displayed, in pixels."""

_CACHE_BYTES = 256_000_000
"""Size of the predictions kept per image, unless those on display need more."""

_MAX_BYTES = 1_000_000_000
"""Most memory that the predictions of an image may take."""

_NetKey = tuple[str, FileFingerprint, str, str]
"""Everything a prediction depends on: the net's name, files, checkpoint and precision."""


@dataclass
class CachedImage:
    """The image of a user's session, with its predictions."""

    name: str
    image_HWC: UInt8Array
    seconds: dict[str, float] = field(default_factory=dict)
    """Time by step: ``reading``, and each net."""
    _predictions: dict[tuple[_NetKey, str], ProbabilityMap] = field(default_factory=dict)
    """By net and view, least recently used first."""

    @property
    def shape(self) -> tuple[int, int]:
        """Width and height of the displayed image."""
        rows, columns = self.image_HWC.shape[:2]
        width = max(1, round(columns * min(1.0, DISPLAY_WIDTH / columns, DISPLAY_HEIGHT / rows)))
        return width, max(1, round(rows * width / columns))  # from the rounded width, like `crop_image`

    @property
    def box(self) -> CropBox:
        """The box of the whole image."""
        return CropBox(0, 0, *self.image_HWC.shape[:2])

    @cached_property
    def display_HWC(self) -> UInt8Array:
        """The image at display size, uint8 RGB."""
        return crop_image(self.image_HWC, self.box, self.shape[0])

    @cached_property
    def uri(self) -> str:
        """The image at display size, as a data URI."""
        return data_uri(self.display_HWC)

    def predict(self, nets: Sequence[str], views: Sequence[str], params: Params) -> RawPredictions:
        """Return the predictions of some nets, running them only for views that are not cached.

        Raises CarvanaError if a net cannot be loaded, or if the predictions would take too much memory.
        """
        self._check_memory(len(nets) * len(views))
        maps = {name: self._net_maps(name, views, params) for name in nets}
        self._evict(sum(map(len, maps.values())))
        return RawPredictions(self.image_HWC, maps, {"prepare": 0.0, **{name: self.seconds[name] for name in nets}})

    def _net_maps(self, name: str, views: Sequence[str], params: Params) -> dict[str, ProbabilityMap]:
        key = name, _fingerprint(name), params.predict.checkpoint, params.predict.precision
        wanted = [BUILTIN_TTA] if (key, BUILTIN_TTA) in self._predictions else views
        if any((key, view) not in self._predictions for view in wanted):
            net = cached_predictor(name, params).with_tta(views)
            wanted = net.views
            self._run_predictor(key, net)
        maps = {view: self._predictions.pop((key, view)) for view in wanted}
        self._predictions |= {(key, view): prob_map for view, prob_map in maps.items()}
        return maps

    def _run_predictor(self, key: _NetKey, net: BasePredictor) -> None:
        name, missing = key[0], [view for view in net.views if (key, view) not in self._predictions]
        start = time.perf_counter()
        maps = Segmenter({name: net.with_tta(missing)}).predict(self.image_HWC).maps[name]
        self.seconds[name] = time.perf_counter() - start
        # Copied, because a cropped view would keep the full-size array in memory.
        self._predictions |= {(key, view): replace(m, probs_u8=m.probs_u8.copy()) for view, m in maps.items()}

    def _check_memory(self, maps: int) -> None:
        rows, columns = self.image_HWC.shape[:2]
        if maps * rows * columns > _MAX_BYTES:
            raise CarvanaError(
                f"{maps} combinations of nets and views are too many for an image of {rows * columns / 1e6:.0f} "
                f"megapixels. Choose at most {_MAX_BYTES // (rows * columns)}, or a smaller image."
            )

    def _evict(self, needed: int) -> None:
        """Delete the least recently used predictions, such as those of nets that were retrained."""
        while (
            len(self._predictions) > needed
            and sum(m.probs_u8.nbytes for m in self._predictions.values()) > _CACHE_BYTES
        ):
            del self._predictions[next(iter(self._predictions))]


def cached_predictor(name: str, params: Params) -> BasePredictor:
    """Return a predictor, shared by all sessions and reloaded when the net was retrained or exported again."""
    return _cached_predictor(
        name, _fingerprint(name), params.predict.checkpoint, params.hardware.device, params.predict.precision
    )


@st.cache_resource(max_entries=16, show_spinner="Loading the net ...")
def _cached_predictor(
    name: str, fingerprint: FileFingerprint, weights: Literal["last", "best"], device: Device, precision: Precision
) -> BasePredictor:
    return load_predictor(name, ["identity"], weights=weights, device=device, precision=precision)


def _fingerprint(name: str) -> FileFingerprint:
    try:
        files = sorted((Path(FOLDS_DIR) / name).iterdir())
    except OSError:  # an export, or a net that is being deleted
        files = [Path(name)]
    return file_fingerprint(files)
