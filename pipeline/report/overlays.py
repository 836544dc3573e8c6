"""Crops, error overlays, heatmaps, figures of the report, and contact sheets."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple, Self

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from pipeline.report.ablation_text import format_dice, format_int, pluralize
from pipeline.report.tables import SPLIT_TITLES
from pipeline.utils.arrays import UInt8Array
from pipeline.utils.files import atomic_write

_TILE_HEIGHT, _TILE_WIDTH, _CAPTION = 320, 480, 26
_COLUMNS = 4
_SHEET_QUALITY, _FIGURE_QUALITY = 88, 80
"""JPEG quality of contact sheets and of the report's figures."""

_CAR_WIDTH, _REGION_WIDTH, _LOCATOR_WIDTH = 720, 480, 320
"""Widths in the report, in pixels, of a car, of the surroundings of a region, and of the image that locates it."""

_MARGIN = 30
"""Pixels around the car in a figure."""

_FRAME_GAP = 4
"""Pixels between a region and its frame."""

_VISIBLE = 96
"""Share of wrong pixels, out of 255, from which a shrunk pixel is drawn as an error."""

TRUTH, FALSE_NEGATIVE, FALSE_POSITIVE = (40, 200, 40), (255, 140, 0), (235, 30, 60)
"""RGB colors of the true outline and of errors."""
NETS = (224, 60, 220)
"""RGB color of the nets' outlines in figures that compare them with the label."""

REGION = (255, 220, 0)
"""RGB color of the frame around a region."""

_OUTLINE = (255, 220, 0)
"""RGB color of a submitted mask's outline."""


@dataclass(frozen=True)
class SheetTile:
    """An image, uint8 RGB (H, W, 3), with masks (H, W) of 0 and 1, and a caption; ``true`` is needed to draw errors."""

    image: UInt8Array
    mask: UInt8Array
    true: UInt8Array | None
    caption: str


def write_contact_sheet(path: Path, tiles: Sequence[SheetTile], title: str) -> None:
    """Write tiles as one JPEG, four per row.

    With a true mask: true outline green, false negatives orange, false positives red. Without: mask outline yellow.
    """
    rows = -(-len(tiles) // _COLUMNS)
    height, width = _CAPTION + max(1, rows) * (_TILE_HEIGHT + _CAPTION), _COLUMNS * _TILE_WIDTH
    sheet_HWC = np.full((height, width, 3), 24, np.uint8)
    _put_text(sheet_HWC, title, 8, 18)
    for index, tile in enumerate(tiles):
        top = _CAPTION + index // _COLUMNS * (_TILE_HEIGHT + _CAPTION)
        left = index % _COLUMNS * _TILE_WIDTH
        sheet_HWC[top : top + _TILE_HEIGHT, left : left + _TILE_WIDTH] = _draw_tile(tile)
        _put_text(sheet_HWC, tile.caption, left + 8, top + _TILE_HEIGHT + 18)
    with atomic_write(path) as temporary:
        temporary.write_bytes(_encode_jpeg(sheet_HWC, _SHEET_QUALITY))


def _draw_tile(tile: SheetTile) -> UInt8Array:
    small_HWC = _thumbnail(tile.image)
    if tile.true is None:
        _outline(small_HWC, tile.mask, _OUTLINE)
        return small_HWC
    _outline(small_HWC, tile.true, TRUTH)
    for wrong_HW, color in ((tile.true & ~tile.mask, FALSE_NEGATIVE), (tile.mask & ~tile.true, FALSE_POSITIVE)):
        # The threshold is below 50 %, so that thin errors stay visible when shrunk.
        visible_HW = _thumbnail((wrong_HW & np.uint8(1)) * np.uint8(255)) > _VISIBLE
        small_HWC[visible_HW] = color
    return small_HWC


def _thumbnail(image: UInt8Array) -> UInt8Array:
    return np.asarray(cv2.resize(image, (_TILE_WIDTH, _TILE_HEIGHT), interpolation=cv2.INTER_AREA), np.uint8)


def _outline(small_HWC: UInt8Array, mask_HW: UInt8Array, color: tuple[int, int, int]) -> None:
    small_HW = _thumbnail(mask_HW * np.uint8(255))
    contours, _ = cv2.findContours((small_HW >= 128).view(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    cv2.drawContours(small_HWC, contours, -1, color, 1)


def _put_text(sheet_HWC: UInt8Array, text: str, left: int, base: int) -> None:
    cv2.putText(sheet_HWC, text, (left, base), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (235, 235, 235), 1, cv2.LINE_AA)


class CropBox(NamedTuple):
    """A box of pixels; ``bottom`` and ``right`` are exclusive."""

    top: int
    left: int
    bottom: int
    right: int

    @classmethod
    def around(cls, masks: Sequence[NDArray[np.generic]], margin: int) -> Self:
        """Return the bounding box of all masks, with a margin; the whole image if all are empty."""
        any_HW = np.logical_or.reduce(masks)
        rows, columns = np.flatnonzero(any_HW.any(axis=1)), np.flatnonzero(any_HW.any(axis=0))
        if not len(rows):
            return cls(0, 0, *any_HW.shape)
        inner = cls(int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1)
        return inner.grown(margin, margin, *any_HW.shape)

    def grown(self, rows: int, columns: int, height: int, width: int) -> Self:
        """Return the box enlarged by ``rows`` and ``columns`` on each side, clipped to an image."""
        top, left = max(0, self.top - rows), max(0, self.left - columns)
        return type(self)(top, left, min(height, self.bottom + rows), min(width, self.right + columns))

    def in_context(self, factor: float, min_height: int, height: int, width: int) -> Self:
        """Return this box enlarged ``factor`` times, at least ``min_height`` high, with aspect ratio 4:3 if it fits."""
        rows, columns = self.bottom - self.top, self.right - self.left
        wanted = max(factor * rows, 0.75 * factor * columns, min_height)
        return self.grown(round((wanted - rows) / 2), round((wanted / 0.75 - columns) / 2), height, width)

    def cut(self, image: UInt8Array) -> UInt8Array:
        """Return this part of an image or mask."""
        return image[self.top : self.bottom, self.left : self.right]


def crop_image(image_HWC: UInt8Array, box: CropBox, width: int) -> UInt8Array:
    """Return a part of an image, resized to ``width`` pixels."""
    return _scaled(box.cut(image_HWC), width)


def error_overlay(
    image_HWC: UInt8Array, mask_HW: UInt8Array, true_HW: UInt8Array, box: CropBox, width: int
) -> UInt8Array:
    """Return a part of an image with the true outline, false negatives and false positives."""
    crop_HWC = crop_image(image_HWC, box, width)
    _draw_contour(crop_HWC, box.cut(true_HW), TRUTH)
    for wrong_HW, color in ((true_HW & ~mask_HW, FALSE_NEGATIVE), (mask_HW & ~true_HW, FALSE_POSITIVE)):
        crop_HWC[_scaled(box.cut(wrong_HW & np.uint8(1)) * np.uint8(255), width) > _VISIBLE] = color
    return crop_HWC


def heatmap_overlay(image_HWC: UInt8Array, values_HW: UInt8Array, box: CropBox, width: int) -> UInt8Array:
    """Return a part of an image, dark and gray, with a heatmap of ``values_HW``: violet is low, yellow is high."""
    gray_HW = cv2.cvtColor(crop_image(image_HWC, box, width), cv2.COLOR_RGB2GRAY)
    part_HW = box.cut(values_HW)
    # Dilated first, so that lines of one pixel stay visible when shrunk.
    size = max(1, round(part_HW.shape[1] / width)) + 1
    heat_HW = _scaled(np.asarray(cv2.dilate(part_HW, np.ones((size, size), np.uint8)), np.uint8), width)
    colors_HWC = cv2.cvtColor(cv2.applyColorMap(heat_HW, cv2.COLORMAP_INFERNO), cv2.COLOR_BGR2RGB)
    share_HW1 = np.sqrt(heat_HW.astype(np.float32) / 255)[..., None]
    mixed_HWC = 0.55 * gray_HW[..., None] * (1 - share_HW1) + colors_HWC * share_HW1
    return np.asarray(np.rint(mixed_HWC), np.uint8)


def with_outlines(
    image_HWC: UInt8Array, true_HW: UInt8Array, nets: Sequence[UInt8Array], box: CropBox, width: int
) -> UInt8Array:
    """Return a part of an image with the outlines of the nets' masks, and the true outline on top."""
    crop_HWC = crop_image(image_HWC, box, width)
    for net_HW in nets:
        _draw_contour(crop_HWC, box.cut(net_HW), NETS, thickness=2)
    _draw_contour(crop_HWC, box.cut(true_HW), TRUTH, thickness=2)
    return crop_HWC


def locator(image_HWC: UInt8Array, box: CropBox, width: int) -> UInt8Array:
    """Return the whole image, small, with a frame around the box."""
    height_pixels, width_pixels = image_HWC.shape[:2]
    crop_HWC = crop_image(image_HWC, CropBox(0, 0, height_pixels, width_pixels), width)
    scale = width / width_pixels
    top_left, bottom_right = (
        (round(x * scale), round(y * scale)) for x, y in ((box.left, box.top), (box.right, box.bottom))
    )
    cv2.rectangle(crop_HWC, top_left, bottom_right, (255, 255, 255), 4)
    cv2.rectangle(crop_HWC, top_left, bottom_right, NETS, 2)
    return crop_HWC


def with_frame(crop_HWC: UInt8Array, region: CropBox, box: CropBox) -> UInt8Array:
    """Return a crop of an image (``box``) with a thin frame just outside a region of it."""
    scale = crop_HWC.shape[1] / (box.right - box.left)
    top_left = round((region.left - box.left) * scale) - _FRAME_GAP, round((region.top - box.top) * scale) - _FRAME_GAP
    bottom_right = (
        round((region.right - box.left) * scale) + _FRAME_GAP,
        round((region.bottom - box.top) * scale) + _FRAME_GAP,
    )
    marked_HWC = crop_HWC.copy()
    cv2.rectangle(marked_HWC, top_left, bottom_right, (0, 0, 0), 4)
    cv2.rectangle(marked_HWC, top_left, bottom_right, REGION, 2)
    return marked_HWC


def data_uri(crop_HWC: UInt8Array) -> str:
    """Return an image as a JPEG data URI."""
    return jpeg_uri(_encode_jpeg(crop_HWC, _FIGURE_QUALITY))


def jpeg_uri(jpeg: bytes) -> str:
    """Return JPEG bytes as a data URI."""
    return f"data:image/jpeg;base64,{base64.b64encode(jpeg).decode()}"


def _encode_jpeg(image_HWC: UInt8Array, quality: int) -> bytes:
    # Without chroma subsampling, which would wash out lines of one pixel.
    full_chroma = (cv2.IMWRITE_JPEG_SAMPLING_FACTOR, cv2.IMWRITE_JPEG_SAMPLING_FACTOR_444)
    options = (cv2.IMWRITE_JPEG_QUALITY, quality, *full_chroma)
    return cv2.imencode(".jpg", cv2.cvtColor(image_HWC, cv2.COLOR_RGB2BGR), options)[1].tobytes()


def _scaled(image: UInt8Array, width: int) -> UInt8Array:
    rows, columns = image.shape[:2]
    method = cv2.INTER_AREA if width < columns else cv2.INTER_CUBIC if image.ndim == 3 else cv2.INTER_LINEAR
    size = (width, max(1, round(rows * width / columns)))
    return np.asarray(cv2.resize(image, size, interpolation=method), np.uint8)


def _draw_contour(crop_HWC: UInt8Array, mask_HW: UInt8Array, color: tuple[int, int, int], thickness: int = 1) -> None:
    inside_HW = (_scaled(mask_HW * np.uint8(255), crop_HWC.shape[1]) >= 128).view(np.uint8)
    # Unlike a contour, the morphological gradient draws no line along the edge of the crop.
    border_HW = cv2.morphologyEx(inside_HW, cv2.MORPH_GRADIENT, np.ones((thickness + 1, thickness + 1), np.uint8))
    crop_HWC[border_HW > 0] = color


@dataclass(frozen=True)
class FigureImage:
    """An image embedded in the page."""

    source: str
    """Data URI."""
    caption: str
    width: int
    height: int


@dataclass(frozen=True)
class Figure:
    """Several views of one image, side by side, with facts about it."""

    title: str
    facts: Sequence[str]
    images: Sequence[FigureImage]


def worst_image_figure(
    row: Mapping[Any, Any],
    make: str | None,
    image: UInt8Array,
    true: UInt8Array,
    mask: UInt8Array,
    disagreement: UInt8Array,
) -> Figure:
    """Return the image of a row of image_disagreement.csv, with its errors and the disagreement between nets."""
    box = CropBox.around([true, mask], _MARGIN)
    several = row["nets"] > 1
    caption = f"disagreement between {format_int(row['nets'])} nets" if several else "uncertainty of the net"
    images = [
        _figure_image(error_overlay(image, mask, true, box, _CAR_WIDTH), "errors"),
        _figure_image(heatmap_overlay(image, disagreement, box, _CAR_WIDTH), caption),
    ]
    pixels = [f"nets disagree on {pluralize(row['disagreement'], 'pixel')}"] if several else []
    return Figure(row["image_id"], [f"Dice {format_dice(row['dice'])}", *_describe_car(row, make), *pixels], images)


def label_error_figure(
    row: Mapping[Any, Any], make: str | None, image: UInt8Array, true: UInt8Array, nets: Sequence[UInt8Array]
) -> Figure:
    """Return the region of the image of a row of image_disagreement.csv where all nets contradict the label."""
    top, left = int(row["top"]), int(row["left"])
    region = CropBox(top, left, top + int(row["height"]), left + int(row["width"]))
    box = region.in_context(2.5, 160, *true.shape)
    images = [
        _figure_image(locator(image, box, _LOCATOR_WIDTH), "location"),
        _figure_image(crop_image(image, box, _REGION_WIDTH), "image"),
        _figure_image(
            with_frame(with_outlines(image, true, nets, box, _REGION_WIDTH), region, box),
            "label green, nets magenta, region framed in yellow",
        ),
    ]
    agree = (
        f"all {format_int(row['nets'])} nets contradict the label"
        if row["nets"] > 1
        else "the net contradicts the label"
    )
    size = f"{pluralize(row['suspect'], 'pixel')} ({format_int(row['width'])} x {format_int(row['height'])}), {agree}"
    return Figure(row["image_id"], [size, *_describe_car(row, make), f"Dice {format_dice(row['dice'])}"], images)


def prediction_grid_figure(net: str, validation_dice: float, jpeg: bytes) -> Figure:
    """Return the prediction grid (``panel.jpg``) of a net's last epoch."""
    width, height = Image.open(BytesIO(jpeg)).size
    grid = FigureImage(jpeg_uri(jpeg), "image, true mask, probability, errors", width, height)
    return Figure(net, [f"Dice {format_dice(validation_dice)} on all its validation images"], [grid])


def _describe_car(row: Mapping[Any, Any], make: str | None) -> list[str]:
    car = f"car {row['car']} ({make})" if make else f"car {row['car']}"
    return [car, f"angle {format_int(row['angle'])}", SPLIT_TITLES[row["split"]].lower()]


def _figure_image(image: UInt8Array, caption: str) -> FigureImage:
    height, width = image.shape[:2]
    return FigureImage(data_uri(image), caption, width, height)
