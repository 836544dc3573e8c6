"""Where the competition's files come from."""

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from pipeline.errors import PipelineError
from pipeline.files import sha256_of


class SampleSettings(BaseModel):
    """Section ``data.sample`` of params.yaml: the drawn stand-in for the competition."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    train_cars: int = Field(14, ge=1, le=1000)
    """Cars with masks, 16 images each."""

    test_cars: int = Field(4, ge=1, le=1000)
    """Cars to predict, 16 images each."""

    seed: int = Field(0, ge=0)
    """Of the drawing."""


class DataSettings(BaseModel):
    """Section ``data`` of params.yaml."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    source: Literal["sample", "directory", "kaggle"]
    """Where the competition's files come from."""

    directory: str | None = None
    """Folder with the zips, or what they unpack to. Setting it alone is enough: it overrides ``source``."""

    on_corrupt: Literal["error", "skip"] = "error"
    """What to do with a training image or mask that can't be read: stop, or go on without it and list it."""

    sample: SampleSettings = SampleSettings()
    """The drawn stand-in."""

    @model_validator(mode="after")
    def _has_what_it_needs(self) -> "DataSettings":
        if self.source == "directory" and self.directory is None:
            raise ValueError("data.source is 'directory', but data.directory is not set: give it the path")
        return self


def locate(settings: DataSettings, home: Path) -> Path:
    """Return the folder of the competition's files; samples of different settings have different folders."""
    if settings.directory is not None:
        return (home / Path(settings.directory).expanduser()).resolve()
    if settings.source == "sample":
        return home / "data" / f"sample-{sha256_of(settings.sample.model_dump_json().encode())[:8]}"
    raise PipelineError(
        "data.source 'kaggle' can't fetch yet: fetch the competition's zips with Kaggle's own client "
        "and set data.directory to their folder."
    )
