"""How long maps took to predict: measured by whoever predicts, kept beside them."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field, NonNegativeInt, TypeAdapter

from pipeline.errors import CarvanaError
from pipeline.files import write_json

TIMING_FILE = "timing.json"

_Seconds = Annotated[float, Field(ge=0, allow_inf_nan=False)]


@dataclass(frozen=True)
class Timing:
    """Wall seconds of predicting some images, of which ``views`` tells apart what the device spent on each view.

    The first batch of a run, which warms up, is left out, unless there was no other.
    """

    images: NonNegativeInt
    seconds: _Seconds
    views: Mapping[str, _Seconds]
    device: str

    def seconds_per_image(self, views: Sequence[str]) -> float:
        """Return the seconds an image that predicting only these views would take.

        That is ``seconds / images``, apportioned by the views' shares of the device's time. So what all views have in
        common, such as reading the photograph and storing its map, is shared out with them. Raises CarvanaError
        where nothing was timed, or not one of these views.
        """
        lacking = [view for view in views if view not in self.views]
        if lacking or not self.images:
            raise CarvanaError(f"How long {lacking[0] if lacking else 'prediction'} takes was not measured.")
        # A clock too coarse to tell the views apart takes them for equal.
        spent = self.views if any(self.views.values()) else dict.fromkeys(self.views, 1.0)
        share = sum(spent[view] for view in views) / sum(spent.values()) if views else 0.0
        return share * self.seconds / self.images


WarmupAndRest = tuple[Timing, Timing]
"""What some images took: a batch that warmed up, no images where there was none, and the others."""


def total_timing(laps: Sequence[WarmupAndRest]) -> Timing:
    """Return what all the images took together, without batches that warmed up if there are others."""
    later = [timing for _, timing in laps if timing.images]
    counted = later or [first for first, _ in laps if first.images]
    views: dict[str, float] = {}
    for timing in counted:
        for view, seconds in timing.views.items():
            views[view] = views.get(view, 0.0) + seconds
    # A run may have been taken up on another device.
    device = " and ".join(dict.fromkeys(timing.device for timing in counted))
    return Timing(sum(t.images for t in counted), sum(t.seconds for t in counted), views, device)


def write_timing(path: Path, timing: Timing) -> None:
    """Write what ``read_timing`` reads; the file appears whole or not at all."""
    write_json(path, asdict(timing))


def read_timing(path: Path) -> Timing:
    """Return what was written; raises OSError, or ValueError if that is something else."""
    return TypeAdapter(Timing).validate_json(path.read_bytes(), strict=True)


def write_warmup_and_rest(path: Path, laps: WarmupAndRest) -> None:
    """Write what ``read_laps`` reads; the file appears whole or not at all."""
    write_json(path, [asdict(timing) for timing in laps])


def read_warmup_and_rest(path: Path) -> WarmupAndRest | None:
    """Return what was written, or None where nothing is that can be read: no time is worth stopping for."""
    try:
        return TypeAdapter(WarmupAndRest).validate_json(path.read_bytes(), strict=True)
    except (OSError, ValueError):
        return None
