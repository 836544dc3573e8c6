"""Photographs with captions: the worst images, and those whose label looks wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from pipeline.reporting import crops
from pipeline.reporting.crops import Box
from pipeline.reporting.pictures import Raster
from pipeline.reporting.tables import SPLITS
from pipeline.reporting.words import count, dice, whole

_CAR_WIDTH, _REGION_WIDTH, _PLACE_WIDTH = 720, 480, 320
_MARGIN = 30


@dataclass(frozen=True)
class Picture:
    """A picture that stands in the page itself."""

    source: str
    words: str
    width: int
    height: int


@dataclass(frozen=True)
class Figure:
    """Pictures of one image, side by side, with what is known of it."""

    title: str
    facts: Sequence[str]
    pictures: Sequence[Picture]


def worst(row: Mapping[Any, Any], make: str | None, image: Raster, true: Raster, mask: Raster, doubt: Raster) -> Figure:
    """Return an image, of this row of doubts.csv, with its errors and with what the nets that never saw it doubt."""
    box = Box.around([true, mask], _MARGIN)
    several = row["nets"] > 1
    part = f"where the {whole(row['nets'])} nets differ" if several else "where the net is undecided"
    pictures = [
        _picture(crops.error(image, mask, true, box, _CAR_WIDTH), "errors"),
        _picture(crops.doubt(image, doubt, box, _CAR_WIDTH), part),
    ]
    differ = [f"{count(row['disagreement'], 'pixel')} where nets differ"] if several else []
    return Figure(row["image_id"], [f"Dice {dice(row['dice'])}", *_car(row, make), *differ], pictures)


def suspect(row: Mapping[Any, Any], make: str | None, image: Raster, true: Raster, nets: Sequence[Raster]) -> Figure:
    """Return the region of an image, of this row of doubts.csv, where all nets contradict the label."""
    top, left = int(row["top"]), int(row["left"])
    region = Box(top, left, top + int(row["height"]), left + int(row["width"]))
    box = region.in_context(2.5, 160, *true.shape)
    pictures = [
        _picture(crops.place(image, box, _PLACE_WIDTH), "where it is"),
        _picture(crops.photograph(image, box, _REGION_WIDTH), "the photograph"),
        _picture(
            crops.framed(crops.outlines(image, true, nets, box, _REGION_WIDTH), region, box),
            "label green, nets magenta, the region framed yellow",
        ),
    ]
    agree = {1: "its one net is", 2: "both nets are"}.get(int(row["nets"]), f"all {whole(row['nets'])} nets are")
    size = f"{count(row['suspect'], 'pixel')}, {whole(row['width'])} x {whole(row['height'])}, of which {agree} certain"
    return Figure(row["image_id"], [size, *_car(row, make), f"Dice {dice(row['dice'])}"], pictures)


def panel(net: str, dice_of_all: float, jpeg: bytes) -> Figure:
    """Return the panel that a net's training ended with, as it lies in the net's folder."""
    width, height = Image.open(BytesIO(jpeg)).size
    picture = Picture(crops.jpeg_uri(jpeg), "photograph, truth, prediction, error", width, height)
    return Figure(net, [f"Dice {dice(dice_of_all)} on all its validation images"], [picture])


def _car(row: Mapping[Any, Any], make: str | None) -> list[str]:
    car = f"car {row['car']} ({make})" if make else f"car {row['car']}"
    return [car, f"angle {whole(row['angle'])}", SPLITS[row["split"]].lower()]


def _picture(raster: Raster, words: str) -> Picture:
    height, width = raster.shape[:2]
    return Picture(crops.data_uri(raster), words, width, height)
