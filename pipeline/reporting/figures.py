"""Photographs with captions: the worst images, and those whose label looks wrong."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any

from PIL import Image

from pipeline.reporting import crops
from pipeline.reporting.crops import CropBox
from pipeline.reporting.pictures import UInt8Array
from pipeline.reporting.tables import SPLIT_TITLES
from pipeline.reporting.words import format_dice, format_int, pluralize

_CAR_WIDTH, _REGION_WIDTH, _PLACE_WIDTH = 720, 480, 320
_MARGIN = 30


@dataclass(frozen=True)
class FigureImage:
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
    pictures: Sequence[FigureImage]


def worst_image_figure(
    row: Mapping[Any, Any], make: str | None, image: UInt8Array, true: UInt8Array, mask: UInt8Array, doubt: UInt8Array
) -> Figure:
    """Return the image of a row of image_disagreement.csv, with its errors and the disagreement of its nets."""
    box = CropBox.around([true, mask], _MARGIN)
    several = row["nets"] > 1
    part = f"where the {format_int(row['nets'])} nets differ" if several else "where the net is undecided"
    pictures = [
        _picture(crops.error_overlay(image, mask, true, box, _CAR_WIDTH), "errors"),
        _picture(crops.heatmap_overlay(image, doubt, box, _CAR_WIDTH), part),
    ]
    differ = [f"{pluralize(row['disagreement'], 'pixel')} where nets differ"] if several else []
    return Figure(row["image_id"], [f"Dice {format_dice(row['dice'])}", *_car(row, make), *differ], pictures)


def label_error_figure(
    row: Mapping[Any, Any], make: str | None, image: UInt8Array, true: UInt8Array, nets: Sequence[UInt8Array]
) -> Figure:
    """Return the region of an image, of this row of image_disagreement.csv, where all nets contradict the label."""
    top, left = int(row["top"]), int(row["left"])
    region = CropBox(top, left, top + int(row["height"]), left + int(row["width"]))
    box = region.in_context(2.5, 160, *true.shape)
    pictures = [
        _picture(crops.locator(image, box, _PLACE_WIDTH), "where it is"),
        _picture(crops.crop_photo(image, box, _REGION_WIDTH), "the photograph"),
        _picture(
            crops.with_frame(crops.with_outlines(image, true, nets, box, _REGION_WIDTH), region, box),
            "label green, nets magenta, the region framed yellow",
        ),
    ]
    agree = {1: "its one net is", 2: "both nets are"}.get(int(row["nets"]), f"all {format_int(row['nets'])} nets are")
    sides = f"{format_int(row['width'])} x {format_int(row['height'])}"
    size = f"{pluralize(row['suspect'], 'pixel')}, {sides}, of which {agree} certain"
    return Figure(row["image_id"], [size, *_car(row, make), f"Dice {format_dice(row['dice'])}"], pictures)


def prediction_grid_figure(net: str, dice_of_all: float, jpeg: bytes) -> Figure:
    """Return the panel that a net's training ended with, as it lies in the net's folder."""
    width, height = Image.open(BytesIO(jpeg)).size
    picture = FigureImage(crops.jpeg_uri(jpeg), "photograph, truth, prediction, error", width, height)
    return Figure(net, [f"Dice {format_dice(dice_of_all)} on all its validation images"], [picture])


def _car(row: Mapping[Any, Any], make: str | None) -> list[str]:
    car = f"car {row['car']} ({make})" if make else f"car {row['car']}"
    return [car, f"angle {format_int(row['angle'])}", SPLIT_TITLES[row["split"]].lower()]


def _picture(raster: UInt8Array, words: str) -> FigureImage:
    height, width = raster.shape[:2]
    return FigureImage(crops.data_uri(raster), words, width, height)
