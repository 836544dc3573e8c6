"""A picture, and what nets have said of it so far: each is asked but once for each view."""

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
from pipeline.report.overlays import CropBox, crop_photo, data_uri
from pipeline.segment.segmenter import FOLDS_DIR, RawPredictions, Segmenter, load_predictor
from pipeline.utils.arrays import UInt8Array

DISPLAY_WIDTH, DISPLAY_HEIGHT = 1280, 960
"""Of what is shown, at most, but for rounding: as much as a screen has room for."""

_KEPT = 256_000_000
"""Bytes of what nets said of a picture that are kept, unless what is shown takes more."""

_MOST = 1_000_000_000
"""Bytes that what nets say of a picture may take."""

_Net = tuple[str, FileFingerprint, str, str]
"""Its name, and what decides what it says: its files, weights and precision."""


@dataclass
class CachedImage:
    """A picture that somebody looks at, kept as long as they do."""

    name: str
    image_HWC: UInt8Array
    seconds: dict[str, float] = field(default_factory=dict)
    """What took how long so far, by stage: ``reading``, and each net."""
    _predictions: dict[tuple[_Net, str], ProbabilityMap] = field(default_factory=dict)
    """By net and view, what was asked for last at the end."""

    @property
    def shape(self) -> tuple[int, int]:
        """Width and height of the picture as it is shown."""
        rows, columns = self.image_HWC.shape[:2]
        width = max(1, round(columns * min(1.0, DISPLAY_WIDTH / columns, DISPLAY_HEIGHT / rows)))
        return width, max(1, round(rows * width / columns))  # from the rounded width, as ``photograph`` has it

    @property
    def box(self) -> CropBox:
        """All of it."""
        return CropBox(0, 0, *self.image_HWC.shape[:2])

    @cached_property
    def display_HWC(self) -> UInt8Array:
        """The picture as it is shown."""
        return crop_photo(self.image_HWC, self.box, self.shape[0])

    @cached_property
    def uri(self) -> str:
        """The picture as it is shown, encoded once."""
        return data_uri(self.display_HWC)

    def predict(self, nets: Sequence[str], views: Sequence[str], params: Params) -> RawPredictions:
        """Return what nets say of it, asking them for what they have not said yet.

        Raises CarvanaError if a net can't be loaded, or if they are too many.
        """
        self._make_room(len(nets) * len(views))
        maps = {name: self._of_net(name, views, params) for name in nets}
        self._evict(sum(map(len, maps.values())))
        return RawPredictions(self.image_HWC, maps, {"prepare": 0.0, **{name: self.seconds[name] for name in nets}})

    def _of_net(self, name: str, views: Sequence[str], params: Params) -> dict[str, ProbabilityMap]:
        asked = name, _stamp(name), params.predict.checkpoint, params.predict.precision
        wanted = [BUILTIN_TTA] if (asked, BUILTIN_TTA) in self._predictions else views
        if any((asked, view) not in self._predictions for view in wanted):
            net = cached_predictor(name, params).with_tta(views)
            wanted = net.views
            self._run_predictor(asked, net)
        maps = {view: self._predictions.pop((asked, view)) for view in wanted}
        self._predictions |= {(asked, view): level_map for view, level_map in maps.items()}
        return maps

    def _run_predictor(self, asked: _Net, net: BasePredictor) -> None:
        name, missing = asked[0], [view for view in net.views if (asked, view) not in self._predictions]
        begun = time.perf_counter()
        said = Segmenter({name: net.with_tta(missing)}).predict(self.image_HWC).maps[name]
        self.seconds[name] = time.perf_counter() - begun
        # Copied: a crop would keep all of its raster in memory.
        self._predictions |= {(asked, view): replace(m, probs_u8=m.probs_u8.copy()) for view, m in said.items()}

    def _make_room(self, rasters: int) -> None:
        rows, columns = self.image_HWC.shape[:2]
        if rasters * rows * columns > _MOST:
            raise CarvanaError(
                f"{rasters} views of a picture of {rows * columns / 1e6:.0f} million pixels are more than this page "
                f"holds in memory: choose {_MOST // (rows * columns)} nets times views at most, or a smaller picture."
            )

    def _evict(self, needed: int) -> None:
        """Let go of what was asked for long ago, or of nets that are trained again by now."""
        while len(self._predictions) > needed and sum(m.probs_u8.nbytes for m in self._predictions.values()) > _KEPT:
            del self._predictions[next(iter(self._predictions))]


def cached_predictor(name: str, params: Params) -> BasePredictor:
    """Return a net, loaded once for everybody, and again when it was trained or exported again."""
    return _cached_predictor(
        name, _stamp(name), params.predict.checkpoint, params.hardware.device, params.predict.precision
    )


@st.cache_resource(max_entries=16, show_spinner="Loading the net ...")
def _cached_predictor(
    name: str, stamp: FileFingerprint, weights: Literal["last", "best"], device: Device, precision: Precision
) -> BasePredictor:
    return load_predictor(name, ["identity"], weights=weights, device=device, precision=precision)


def _stamp(name: str) -> FileFingerprint:
    try:
        files = sorted((Path(FOLDS_DIR) / name).iterdir())
    except OSError:  # an export, or a net that is just being removed
        files = [Path(name)]
    return file_fingerprint(files)
