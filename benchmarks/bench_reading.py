"""Read training images and their masks, against PIL reading JPEG and GIF from the same zips."""

import io
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from PIL import Image

from benchmarks.timing import Row, compare
from pipeline.competition.image_ids import image_filename, mask_filename
from pipeline.config import InputSettings
from pipeline.data.competition_data import CompetitionData
from pipeline.models.resize import soft_target, to_network_input

REDUCED = InputSettings(size=(160, 240))


@dataclass(frozen=True, eq=False)
class Ours:
    """JPEG with libjpeg-turbo, masks from train_masks.csv."""

    folder: Path
    image_ids: list[str]
    reduced: bool = False

    @cached_property
    def source(self) -> CompetitionData:
        return CompetitionData(self.folder)

    def __call__(self) -> None:
        for image_id in self.image_ids:
            image_HWC, mask_HW = self.source.train.image(image_id), self.source.masks.mask(image_id)
            if self.reduced:
                to_network_input(image_HWC, REDUCED), soft_target(mask_HW, REDUCED)


@dataclass(frozen=True, eq=False)
class Pil:
    """JPEG and GIF with PIL."""

    folder: Path
    image_ids: list[str]
    reduced: bool = False

    @cached_property
    def zips(self) -> tuple[zipfile.ZipFile, zipfile.ZipFile]:
        return zipfile.ZipFile(self.folder / "train.zip"), zipfile.ZipFile(self.folder / "train_masks.zip")

    def __call__(self) -> None:
        images, masks = self.zips
        for image_id in self.image_ids:
            image = Image.open(io.BytesIO(images.read(f"train/{image_filename(image_id)}"))).convert("RGB")
            mask = Image.open(io.BytesIO(masks.read(f"train_masks/{mask_filename(image_id)}"))).convert("L")
            if self.reduced:
                size = REDUCED.width, REDUCED.height
                image, mask = image.resize(size, Image.Resampling.BOX), mask.resize(size, Image.Resampling.BOX)
            np.asarray(image), np.asarray(mask)


def run(folder: Path, tiny: bool = False) -> list[Row]:
    """Return reading images with their masks on one core, at full size and as a small net's input.

    One item is an image with its mask.
    """
    count, rounds = (2, 1) if tiny else (16, 7)
    cv2.setNumThreads(1)
    ids = CompetitionData(folder).train.ids()
    ids = ids[:: max(1, len(ids) // count)][:count]
    names = {
        False: "read image and mask / PIL with GIF",
        True: f"the same, downsampled to {REDUCED.height} x {REDUCED.width}",
    }
    return [
        compare(name, Ours(folder, ids, reduced), Pil(folder, ids, reduced), len(ids), rounds, None if reduced else 4)
        for reduced, name in names.items()
    ]
