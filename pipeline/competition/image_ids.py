"""Image ids, file names and image size of the competition."""

import re

from pipeline.errors import CarvanaError

HEIGHT = 1280
"""Rows of every image and mask, in pixels."""

WIDTH = 1918
"""Columns of every image and mask, in pixels."""

ANGLES = 16
"""Images per car, one per turntable position, numbered from 1."""

_IMAGE_ID = re.compile(r"([0-9a-f]{12})_(0[1-9]|1[0-6])")


def parse_image_id(image_id: str) -> tuple[str, int]:
    """Return the car id and the turntable angle (1 to 16) of an image id such as ``00087a6bd4dc_01``.

    Raises CarvanaError if the id does not have this form.
    """
    match = _IMAGE_ID.fullmatch(image_id)
    if match is None:
        raise CarvanaError(
            f"'{image_id}' is not an image id. Expected 12 lowercase hex digits, '_' and an angle from 01 to 16."
        )
    return match[1], int(match[2])


def car_id(image_id: str) -> str:
    """Return the car id in an image id; raises CarvanaError if it is not an image id."""
    return parse_image_id(image_id)[0]


def format_image_id(car: str, angle: int) -> str:
    """Return the image id of a car id (12 hex digits) at a turntable angle (1 to 16)."""
    return f"{car}_{angle:02d}"


def image_filename(image_id: str) -> str:
    """Return the file name of an image, as used in submissions and train_masks.csv."""
    return f"{image_id}.jpg"


def mask_filename(image_id: str) -> str:
    """Return the file name of a training mask."""
    return f"{image_id}_mask.gif"
