"""The competition's files as images and masks by id."""

import csv
import io
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pipeline.competition import rle
from pipeline.competition.image_ids import HEIGHT, WIDTH, image_filename, mask_filename, parse_image_id
from pipeline.config import DataSettings
from pipeline.data.archives import Archive, open_archive
from pipeline.data.decoding import check_jpeg_header, decode_jpeg, decode_mask
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.utils.arrays import UInt8Array
from pipeline.utils.files import sha256_of

_SYNTHETIC = Path(__file__).parents[1] / "synthetic"


def data_dir(settings: DataSettings, home: Path) -> Path:
    """Return the folder of the competition's files; samples of different settings have different folders."""
    if settings.directory is not None:
        return (home / Path(settings.directory).expanduser()).resolve()
    if settings.source == "sample":
        # Other settings and other code draw other images: these stay beside them.
        code = (file.read_bytes() for file in sorted(_SYNTHETIC.glob("*.py")))
        return home / "data" / f"sample-{sha256_of(settings.sample.model_dump_json().encode(), *code)[:8]}"
    return kaggle_data_dir(settings, home)


def kaggle_data_dir(settings: DataSettings, home: Path) -> Path:
    """Return the folder for what is fetched from Kaggle."""
    return home / "data" / settings.competition


class MaskSource(Protocol):
    """Training masks by image id."""

    def ids(self) -> list[str]:
        """Return the ids of all images that have a mask, sorted."""

    def mask(self, image_id: str) -> UInt8Array:
        """Return a mask, uint8 of 0 and 1, (1280, 1918)."""

    def fingerprint(self) -> str:
        """Return a digest of all masks."""


@dataclass(frozen=True)
class RleMasks:
    """Masks from ``train_masks.csv``: a hundred times faster to decode than the GIFs that hold the same."""

    archive: Archive
    file: str = "train_masks.csv"

    @cached_property
    def _rows(self) -> Mapping[str, bytes]:
        lines = self.archive.read(self.file).splitlines()
        if not lines or lines[0].strip() != b"img,rle_mask":
            raise CarvanaError(
                f"{self.file} in {self.archive.path} must begin with the line 'img,rle_mask': fetch it again."
            )
        rows: dict[str, bytes] = {}
        for number, line in enumerate(lines[1:], start=2):
            name, comma, text = line.partition(b",")
            image_id = name.decode("utf-8", "replace").removesuffix(".jpg")
            if not comma or image_id in rows:
                reason = "is a second row of its image" if comma else "has no comma"
                raise CarvanaError(f"Row {number} of {self.file} in {self.archive.path} {reason}: fix the file.")
            rows[image_id] = text
        return rows

    def ids(self) -> list[str]:
        """Return the ids of all rows, sorted."""
        return sorted(self._rows)

    def mask(self, image_id: str) -> UInt8Array:
        """Return a mask, uint8 of 0 and 1, (1280, 1918)."""
        try:
            return rle.decode(self._rows[image_id].decode("utf-8", "replace"), HEIGHT, WIDTH)
        except CarvanaError as error:
            raise CorruptFileError(f"The mask of {image_id} in {self.file} ({self.archive.path}): {error}") from error

    def fingerprint(self) -> str:
        """Return a digest of the file that holds the rows."""
        return self.archive.fingerprint()


@dataclass(frozen=True)
class GifMasks:
    """Masks from ``train_masks.zip``, for those who have no ``train_masks.csv``."""

    archive: Archive

    def ids(self) -> list[str]:
        """Return the ids of all masks, sorted."""
        return _ids(self.archive, "_mask.gif")

    def mask(self, image_id: str) -> UInt8Array:
        """Return a mask, uint8 of 0 and 1, (1280, 1918)."""
        name = mask_filename(image_id)
        return decode_mask(self.archive.read(name), f"{name} in {self.archive.path}")

    def fingerprint(self) -> str:
        """Return a digest of the archive that holds the masks."""
        return self.archive.fingerprint()


@dataclass(frozen=True)
class ImageSet:
    """Photographs by image id."""

    archive: Archive

    def ids(self) -> list[str]:
        """Return the ids of all photographs, sorted."""
        return _ids(self.archive, ".jpg")

    def image(self, image_id: str) -> UInt8Array:
        """Return a photograph as uint8 RGB, (1280, 1918, 3); raises CorruptFileError if it is not sound."""
        return decode_jpeg(self.archive.read(image_filename(image_id)), self.where(image_id))

    def check_header(self, image_id: str) -> None:
        """Raise CorruptFileError unless the file announces a JPEG of the right size; reads the first bytes only."""
        name, where = image_filename(image_id), self.where(image_id)
        try:
            check_jpeg_header(self.archive.read(name, limit=1 << 12), where)
        except CorruptFileError:
            # Camera notes or a preview may stand before the size.
            check_jpeg_header(self.archive.read(name), where)

    def where(self, image_id: str) -> str:
        """Return words for messages that say which file this is."""
        return f"{image_filename(image_id)} in {self.archive.path.name}"


@dataclass(frozen=True)
class CompetitionData:
    """A folder with the competition's files, zipped or unpacked."""

    directory: Path
    hq: bool = False
    """Whether the photographs are to be the HQ ones; else these do where there are no others."""

    @cached_property
    def train(self) -> ImageSet:
        """Training photographs."""
        return ImageSet(self._any_of(*self._names("train")))

    @cached_property
    def test(self) -> ImageSet:
        """Test photographs."""
        return ImageSet(self._any_of(*self._names("test")))

    @cached_property
    def masks(self) -> MaskSource:
        """Training masks, from the CSV where it is there, else from the GIFs."""
        rows = open_archive(self.directory, "train_masks.csv")
        return RleMasks(rows) if rows else GifMasks(self._any_of("train_masks"))

    @cached_property
    def sample_ids(self) -> list[str] | None:
        """Test ids in the order of ``sample_submission.csv``, or None where that file is missing."""
        archive = open_archive(self.directory, "sample_submission.csv")
        if archive is None:
            return None
        reader = csv.DictReader(io.StringIO(archive.read("sample_submission.csv").decode("utf-8", "replace")))
        if "img" not in (reader.fieldnames or ()):
            raise CarvanaError(f"sample_submission.csv in {archive.path} has no column img: fetch it again.")
        return [row["img"].removesuffix(".jpg") for row in reader]

    @property
    def truth(self) -> Path | None:
        """CSV with the masks of the test images, where they are known."""
        path = self.directory / "truth.csv"
        return path if path.is_file() else None

    def _names(self, part: str) -> list[str]:
        return [f"{part}_hq"] if self.hq else [part, f"{part}_hq"]

    def _any_of(self, *parts: str) -> Archive:
        for part in parts:
            archive = open_archive(self.directory, part)
            if archive is not None:
                return archive
        raise CarvanaError(
            f"{self.directory} holds neither {parts[0]}.zip nor a folder {parts[0]}: "
            "set data.directory to the folder with the competition's files."
        )


@dataclass(frozen=True)
class LabeledImages:
    """Training photographs with their masks, less those that can't be used."""

    photos: ImageSet
    masks: MaskSource
    skipped: Collection[str]

    def ids(self) -> list[str]:
        """Return the ids of all usable images, sorted."""
        return [image_id for image_id in self.photos.ids() if image_id not in self.skipped]

    def image(self, image_id: str) -> UInt8Array:
        """Return a photograph, uint8 RGB (1280, 1918, 3)."""
        return self.photos.image(image_id)

    def mask(self, image_id: str) -> UInt8Array:
        """Return a mask, uint8 of 0 and 1, (1280, 1918)."""
        return self.masks.mask(image_id)


def open_training(source: CompetitionData, manifest: Mapping[str, Any]) -> LabeledImages:
    """Return the training images that ``manifest`` was made of; raises CarvanaError if they changed since."""
    _check_fingerprint(source, manifest, "train", source.train.archive.fingerprint())
    _check_fingerprint(source, manifest, "masks", source.masks.fingerprint())
    return LabeledImages(source.train, source.masks, manifest["unreadable"])


def open_test(source: CompetitionData, manifest: Mapping[str, Any]) -> ImageSet:
    """Return the test images that ``manifest`` was made of; raises CarvanaError if they changed since."""
    _check_fingerprint(source, manifest, "test", source.test.archive.fingerprint())
    return source.test


def _check_fingerprint(source: CompetitionData, manifest: Mapping[str, Any], part: str, digest: str) -> None:
    if manifest[part]["digest"] != digest:
        raise CarvanaError(
            f"The {part} files in {source.directory} are not those of data/manifest.json: "
            "run 'dvc repro --force download' to take the new ones in."
        )


def _is_data_file(name: str, ending: str) -> bool:
    # Macs put a file of the same name, with "._" before it, beside each.
    return name.endswith(ending) and not name.startswith(".")


def _ids(archive: Archive, ending: str) -> list[str]:
    ids = [name.removesuffix(ending) for name in archive.names() if _is_data_file(name, ending)]
    for image_id in ids:
        try:
            parse_image_id(image_id)
        except CarvanaError as error:
            raise CarvanaError(f"{archive.path}: {error} Take the file away or give it its name.") from error
    return ids


METADATA_FILE = "metadata.csv"


def read_car_makes(directory: Path) -> dict[str, str]:
    """Return the make of every car that metadata.csv names one of; empty where the competition's file is not there.

    Raises CarvanaError if the file is none of the competition's.
    """
    archive = open_archive(directory, METADATA_FILE)
    if archive is None:
        return {}
    rows = csv.DictReader(io.StringIO(archive.read(METADATA_FILE).decode("utf-8", "replace")))
    if not {"id", "make"} <= set(rows.fieldnames or ()):
        raise CarvanaError(f"{METADATA_FILE} in {archive.path} has no columns id and make: fetch it again.")
    return {row["id"]: row["make"].strip() for row in rows if row["id"] and row["make"] and row["make"].strip()}
