"""A picture, and what nets have said of it so far: each is asked but once for each view."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import streamlit as st

from pipeline.app.project import Stamp, stamp
from pipeline.ensembling.maps import LevelMap
from pipeline.learning.rasters import Pixels
from pipeline.learning.settings import Device, Precision
from pipeline.learning.speaker import Speaker
from pipeline.params import Params
from pipeline.reporting.crops import Box, data_uri, photograph
from pipeline.serving.masker import Looked, Masker
from pipeline.serving.nets import FOLDS, load

WIDTH, HEIGHT = 1280, 960
"""Of what is shown, at most, but for rounding: as much as a screen has room for."""

_KEPT = 256_000_000
"""Bytes that what nets said of a picture may take, beyond what is shown."""


@dataclass
class Sight:
    """A picture that somebody looks at, kept as long as they do."""

    name: str
    image_HWC: Pixels
    seconds: dict[str, float] = field(default_factory=dict)
    """What took how long so far, by stage: ``reading``, and each net."""
    _said: dict[tuple[str, Stamp], dict[str, LevelMap]] = field(default_factory=dict)
    """By net, the one that was asked for last at the end, then by view."""

    @property
    def shape(self) -> tuple[int, int]:
        """Width and height of the picture as it is shown."""
        rows, columns = self.image_HWC.shape[:2]
        width = max(1, round(columns * min(1.0, WIDTH / columns, HEIGHT / rows)))
        return width, max(1, round(rows * width / columns))  # from the rounded width, as ``photograph`` has it

    @property
    def box(self) -> Box:
        """All of it."""
        return Box(0, 0, *self.image_HWC.shape[:2])

    @cached_property
    def small_HWC(self) -> Pixels:
        """The picture as it is shown."""
        return photograph(self.image_HWC, self.box, self.shape[0])

    @cached_property
    def uri(self) -> str:
        """The picture as it is shown, encoded once."""
        return data_uri(self.small_HWC)

    def look(self, nets: Sequence[str], views: Sequence[str], params: Params) -> Looked:
        """Return what nets say of it, asking them for what they have not said yet.

        Raises PipelineError if a net can't be loaded.
        """
        maps = {}
        for name in nets:
            net = speaker(name, params).looking_at(views)
            key = name, _stamp(name)
            said = self._said[key] = self._said.pop(key, {})
            missing = [view for view in net.views if view not in said]
            if missing:
                begun = time.perf_counter()
                said |= Masker({name: net.looking_at(missing)}).look(self.image_HWC).maps[name]
                self.seconds[name] = time.perf_counter() - begun
            maps[name] = {view: said[view] for view in net.views}
        self._forget(len(nets))
        return Looked(self.image_HWC, maps, {"prepare": 0.0, **{name: self.seconds[name] for name in nets}})

    def _forget(self, needed: int) -> None:
        """Let go of what nets said that were asked long ago, or are trained anew by now, but of the last few."""
        rows, columns = self.image_HWC.shape[:2]
        while len(self._said) > needed and sum(map(len, self._said.values())) * rows * columns > _KEPT:
            del self._said[next(iter(self._said))]


def speaker(name: str, params: Params) -> Speaker:
    """Return a net, loaded once for everybody, and again when it was trained or exported anew."""
    return _speaker(name, _stamp(name), params.predict.weights, params.machine.device, params.predict.precision)


@st.cache_resource(max_entries=16, show_spinner="Loading the net ...")
def _speaker(
    name: str, stamp: Stamp, weights: Literal["last", "best"], device: Device, precision: Precision
) -> Speaker:
    return load(name, ["identity"], weights=weights, device=device, precision=precision)


def _stamp(name: str) -> Stamp:
    try:
        files = sorted((Path(FOLDS) / name).iterdir())
    except OSError:  # an export, or a net that is just being removed
        files = [Path(name)]
    return stamp(files)
