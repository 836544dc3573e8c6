"""Where the competition's files come from, and how cars are dealt to folds."""

import re
from pathlib import Path
from typing import Literal

from pydantic import Field, field_validator, model_validator

from pipeline.files import sha256_of
from pipeline.sections import NonEmptyUnique, StrictModel

DRAWING = ("sample.py", "drawing.py", "car_design.py", "car_model.py", "car_texture.py")
"""Files beside this one that decide what a sample looks like."""

_ADDRESS = re.compile(r"(?:(?:https?://)?(?:www\.)?kaggle\.com/)?(?:(?:c|competitions)/)?([a-z0-9-]+)(?:[/?#].*)?")


class SampleSettings(StrictModel):
    """Section ``data.sample`` of params.yaml: how large a sample to draw, and which."""

    train_cars: int = Field(default=14, ge=2, le=1000)
    """Cars with masks to learn from, 16 pictures each."""

    test_cars: int = Field(default=4, ge=1, le=1000)
    """Further cars, 16 pictures each, whose masks go to truth.csv only."""

    seed: int = Field(default=0, ge=0, le=2**32 - 1)
    """Another seed gives other cars."""


class DataSettings(StrictModel):
    """Section ``data`` of params.yaml."""

    source: Literal["sample", "directory", "kaggle"]
    """Where the competition's files come from."""

    directory: str | None = None
    """Folder with the zips, or what they unpack to. Setting it alone is enough: it overrides ``source``."""

    competition: str = "carvana-image-masking-challenge"
    """Name of the competition at Kaggle, as in its address; the address itself does as well."""

    quality: Literal["standard", "hq"] = "standard"
    """Photographs as scored by everyone, or the larger files of the same size that Kaggle has beside them."""

    on_corrupt: Literal["error", "skip"] = "error"
    """What to do with a training image or mask that can't be read: stop, or go on without it and list it."""

    sample: SampleSettings = SampleSettings()
    """The drawn stand-in."""

    @field_validator("competition")
    @classmethod
    def _is_a_name(cls, value: str) -> str:
        match = _ADDRESS.fullmatch(value.strip().lower())
        if match is None:
            raise ValueError(
                f"data.competition can't be {value!r}: give the name in the competition's address, "
                "such as carvana-image-masking-challenge"
            )
        return match[1]

    @property
    def is_from_kaggle(self) -> bool:
        """Whether the files are fetched from Kaggle."""
        return self.source == "kaggle" and self.directory is None

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> "DataSettings":
        if self.source == "directory" and self.directory is None:
            raise ValueError("data.source is 'directory', but data.directory is not set: give it the path")
        return self


class FoldSettings(StrictModel):
    """Section ``folds`` of params.yaml."""

    count: int = Field(ge=2)
    """Folds that the cars are dealt to."""

    active: NonEmptyUnique[int]
    """Folds to train and predict: all of them, or fewer to save time."""

    holdout_cars: int = Field(ge=0)
    """Cars kept out of every fold, so that an ensemble of folds can be scored; 0 for a final run."""

    seed: int = Field(default=0, ge=0)
    """Of the dealing."""

    @model_validator(mode="after")
    def _active_exist(self) -> "FoldSettings":
        outside = [fold for fold in self.active if not 0 <= fold < self.count]
        if outside:
            raise ValueError(f"folds.active has {outside[0]}, but the {self.count} folds are 0 to {self.count - 1}")
        return self


def data_dir(settings: DataSettings, home: Path) -> Path:
    """Return the folder of the competition's files; samples of different settings have different folders."""
    if settings.directory is not None:
        return (home / Path(settings.directory).expanduser()).resolve()
    if settings.source == "sample":
        # Other settings and other code draw other pictures: these stay beside them.
        code = (Path(__file__).with_name(name).read_bytes() for name in DRAWING)
        return home / "data" / f"sample-{sha256_of(settings.sample.model_dump_json().encode(), *code)[:8]}"
    return kaggle_data_dir(settings, home)


def kaggle_data_dir(settings: DataSettings, home: Path) -> Path:
    """Return the folder for what is fetched from Kaggle."""
    return home / "data" / settings.competition
