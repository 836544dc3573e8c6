"""A picture, and what nets have said of it so far: each is asked but once for each view."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import streamlit as st

from pipeline.app.project import Stamp, stamp
from pipeline.ensembling.maps import LevelMap
from pipeline.errors import PipelineError
from pipeline.learning.rasters import Pixels
from pipeline.learning.settings import Device, Precision
from pipeline.learning.speaker import ENSEMBLE_VIEW, Speaker
from pipeline.params import Params
from pipeline.reporting.crops import Box, data_uri, photograph
from pipeline.serving.masker import Looked, Masker
from pipeline.serving.nets import FOLDS, load

WIDTH, HEIGHT = 1280, 960
"""Of what is shown, at most, but for rounding: as much as a screen has room for."""

_KEPT = 256_000_000
"""Bytes of what nets said of a picture that are kept, unless what is shown takes more."""

_MOST = 1_000_000_000
"""Bytes that what nets say of a picture may take."""

_Net = tuple[str, Stamp, str, str]
"""Its name, and what decides what it says: its files, weights and precision."""


@dataclass
class Sight:
    """A picture that somebody looks at, kept as long as they do."""

    name: str
    image_HWC: Pixels
    seconds: dict[str, float] = field(default_factory=dict)
    """What took how long so far, by stage: ``reading``, and each net."""
    _said: dict[tuple[_Net, str], LevelMap] = field(default_factory=dict)
    """By net and view, what was asked for last at the end."""

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

        Raises PipelineError if a net can't be loaded, or if they are too many.
        """
        self._demand_room(len(nets) * len(views))
        maps = {name: self._of_net(name, views, params) for name in nets}
        self._forget(sum(map(len, maps.values())))
        return Looked(self.image_HWC, maps, {"prepare": 0.0, **{name: self.seconds[name] for name in nets}})

    def _of_net(self, name: str, views: Sequence[str], params: Params) -> dict[str, LevelMap]:
        asked = name, _stamp(name), params.predict.weights, params.predict.precision
        wanted = [ENSEMBLE_VIEW] if (asked, ENSEMBLE_VIEW) in self._said else views
        if any((asked, view) not in self._said for view in wanted):
            net = speaker(name, params).looking_at(views)
            wanted = net.views
            self._ask(asked, net)
        maps = {view: self._said.pop((asked, view)) for view in wanted}
        self._said |= {(asked, view): level_map for view, level_map in maps.items()}
        return maps

    def _ask(self, asked: _Net, net: Speaker) -> None:
        name, missing = asked[0], [view for view in net.views if (asked, view) not in self._said]
        begun = time.perf_counter()
        said = Masker({name: net.looking_at(missing)}).look(self.image_HWC).maps[name]
        self.seconds[name] = time.perf_counter() - begun
        # Copied: a crop would keep all of its raster in memory.
        self._said |= {(asked, view): replace(m, levels=m.levels.copy()) for view, m in said.items()}

    def _demand_room(self, rasters: int) -> None:
        rows, columns = self.image_HWC.shape[:2]
        if rasters * rows * columns > _MOST:
            raise PipelineError(
                f"{rasters} views of a picture of {rows * columns / 1e6:.0f} million pixels are more than this page "
                f"holds in memory: choose {_MOST // (rows * columns)} nets times views at most, or a smaller picture."
            )

    def _forget(self, needed: int) -> None:
        """Let go of what was asked for long ago, or of nets that are trained anew by now."""
        while len(self._said) > needed and sum(m.levels.nbytes for m in self._said.values()) > _KEPT:
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
