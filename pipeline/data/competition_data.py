"""The competition's images, masks and tables, read from zips or folders by image id."""

import csv
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

from pipeline.competition import rle
from pipeline.competition.image_ids import HEIGHT, WIDTH, image_filename, mask_filename
from pipeline.config import DataSettings
from pipeline.data.archives import IMAGE_ENDINGS, MASK_ENDINGS, Archive, files_by_id, find_csv, open_archive
from pipeline.data.decoding import check_jpeg_header, decode_jpeg, decode_mask
from pipeline.errors import CarvanaError, CorruptFileError
from pipeline.submission.csv_file import read_lines, read_rows
from pipeline.utils.arrays import UInt8Array
from pipeline.utils.files import sha256_of

_SYNTHETIC = Path(__file__).parents[1] / "synthetic"


def data_dir(settings: DataSettings, root: Path) -> Path:
    """Return the folder of the competition's files, given the project's root; it may not exist yet."""
    if settings.directory is not None:
        return (root / Path(settings.directory).expanduser()).resolve()
    if settings.source == "sample":
        # The name depends on the settings and the code, because a change of either draws other images.
        code = (file.read_bytes() for file in sorted(_SYNTHETIC.glob("*.py")))
        return root / "data" / f"sample-{sha256_of(settings.sample.model_dump_json().encode(), *code)[:8]}"
    return kaggle_data_dir(settings, root)


def kaggle_data_dir(settings: DataSettings, root: Path) -> Path:
    """Return the folder of files downloaded from Kaggle, given the project's root."""
    return root / "data" / settings.competition


class MaskSource(Protocol):
    """Training masks by image id."""

    def ids(self) -> list[str]:
        """Return the ids of all images that have a mask, sorted."""

    def mask(self, image_id: str) -> UInt8Array:
        """Return a mask, uint8 of 0 and 1, (1280, 1918); raises CorruptFileError if it is not valid."""

    def ignored(self) -> list[str]:
        """Return the paths of files beside the masks that are not masks, sorted."""

    def fingerprint(self) -> str:
        """Return a digest of all masks."""

    @property
    def path(self) -> Path:
        """The zip, folder or CSV that holds the masks."""


@dataclass(frozen=True)
class RleMasks:
    """Masks from ``train_masks.csv``, which decode a hundred times faster than the equal GIFs."""

    path: Path

    @cached_property
    def _rows(self) -> Mapping[str, str]:
        rows: dict[str, str] = {}
        for number, image_id, text in read_rows(self.path):
            if image_id in rows:
                raise CarvanaError(f"{self.path}, row {number}: duplicate row for image {image_id}. Keep one.")
            rows[image_id] = text
        return rows

    def ids(self) -> list[str]:
        """Return the ids of all rows, sorted."""
        return sorted(self._rows)

    def mask(self, image_id: str) -> UInt8Array:
        """Return a mask, uint8 of 0 and 1, (1280, 1918)."""
        try:
            return rle.decode(self._rows[image_id], HEIGHT, WIDTH)
        except CarvanaError as error:
            raise CorruptFileError(f"Mask of {image_id} in {self.path}: {error}") from error

    def ignored(self) -> list[str]:
        """Return nothing: other files beside the CSV may be of any kind."""
        return []

    def fingerprint(self) -> str:
        """Return a digest of the file's name and content, which is small enough to read at every start."""
        return sha256_of(self.path.name.encode(), self.path.read_bytes())


@dataclass(frozen=True)
class GifMasks:
    """Masks from ``train_masks.zip``, GIFs or converted PNGs; used if there is no ``train_masks.csv``."""

    archive: Archive

    @property
    def path(self) -> Path:
        """The zip or folder."""
        return self.archive.path

    @cached_property
    def files(self) -> Mapping[str, str]:
        """Path of each mask in the archive, by image id."""
        return files_by_id(self.archive, MASK_ENDINGS)

    def ids(self) -> list[str]:
        """Return the ids of all masks, sorted."""
        return sorted(self.files)

    def mask(self, image_id: str) -> UInt8Array:
        """Return a mask, uint8 of 0 and 1, (1280, 1918)."""
        name = self.files.get(image_id, mask_filename(image_id))
        return decode_mask(self.archive.read(name), f"{name} in {self.archive.path}")

    def ignored(self) -> list[str]:
        """Return the paths of all other files in the archive, sorted."""
        return sorted(set(self.archive.paths()).difference(self.files.values()))

    def fingerprint(self) -> str:
        """Return a digest of the archive that holds the masks."""
        return self.archive.fingerprint()


@dataclass(frozen=True)
class ImageSet:
    """Training or test photographs by image id."""

    archive: Archive

    @property
    def path(self) -> Path:
        """The zip or folder."""
        return self.archive.path

    @cached_property
    def files(self) -> Mapping[str, str]:
        """Path of each photograph in the archive, by image id; raises CarvanaError as ``files_by_id`` does."""
        return files_by_id(self.archive, IMAGE_ENDINGS)

    def ids(self) -> list[str]:
        """Return the ids of all photographs, sorted."""
        return sorted(self.files)

    def ignored(self) -> list[str]:
        """Return the paths of all other files in the archive, sorted."""
        return sorted(set(self.archive.paths()).difference(self.files.values()))

    def image(self, image_id: str) -> UInt8Array:
        """Return a photograph as uint8 RGB, (1280, 1918, 3); raises CorruptFileError if it is not valid."""
        return decode_jpeg(self.archive.read(self._file(image_id)), self.location(image_id))

    def check_header(self, image_id: str) -> None:
        """Raise CorruptFileError unless the header is that of a JPEG of 1918 x 1280 pixels; pixels are not decoded."""
        name, location = self._file(image_id), self.location(image_id)
        try:
            check_jpeg_header(self.archive.read(name, limit=1 << 12), location)
        except CorruptFileError:
            # EXIF data, such as a preview image, may push the size beyond the first 4 KiB.
            check_jpeg_header(self.archive.read(name), location)

    def location(self, image_id: str) -> str:
        """Return the file and archive of an image, for messages: ``train/00087a6bd4dc_01.jpg in train.zip``."""
        return f"{self._file(image_id)} in {self.archive.path.name}"

    def _file(self, image_id: str) -> str:
        return self.files.get(image_id, image_filename(image_id))


@dataclass(frozen=True)
class CompetitionData:
    """A folder with the competition's files, zipped or unpacked.

    Properties raise CarvanaError if their file is missing or not valid.
    """

    directory: Path
    hq: bool = False
    """Whether to use the HQ photographs; otherwise they are used only if the standard ones are missing."""

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
        """Training masks, from train_masks.csv if there is one, else from the image files."""
        rows = find_csv(self.directory, "train_masks.csv")
        return RleMasks(rows) if rows else GifMasks(self._any_of("train_masks"))

    @cached_property
    def sample_ids(self) -> list[str] | None:
        """Test image ids in the order of ``sample_submission.csv``, or None if that file is missing."""
        path = find_csv(self.directory, "sample_submission.csv")
        if path is None:
            return None
        return [image_id for _, image_id, _ in read_rows(path)]

    @property
    def truth(self) -> Path | None:
        """CSV of the true test masks, which may be gzipped or zipped, or None if they are unknown."""
        return find_csv(self.directory, "truth.csv")

    def _names(self, part: str) -> list[str]:
        return [f"{part}_hq"] if self.hq else [part, f"{part}_hq"]

    def _any_of(self, *parts: str) -> Archive:
        for part in parts:
            archive = open_archive(self.directory, part)
            if archive is not None:
                return archive
        raise CarvanaError(
            f"{self.directory} has neither {parts[0]}.zip nor a folder {parts[0]}. "
            "Set data.directory to the folder with the competition's files."
        )


@dataclass(frozen=True)
class LabeledImages:
    """Training photographs with their masks, without the ``skipped`` ones."""

    images: ImageSet
    masks: MaskSource
    skipped: Collection[str]

    def ids(self) -> list[str]:
        """Return the ids of all usable images, sorted."""
        return [image_id for image_id in self.images.ids() if image_id not in self.skipped]

    def image(self, image_id: str) -> UInt8Array:
        """Return a photograph, uint8 RGB (1280, 1918, 3)."""
        return self.images.image(image_id)

    def mask(self, image_id: str) -> UInt8Array:
        """Return a mask, uint8 of 0 and 1, (1280, 1918)."""
        return self.masks.mask(image_id)


def open_training(source: CompetitionData, manifest: Mapping[str, Any]) -> LabeledImages:
    """Return the training images and masks; raises CarvanaError if they are not those of ``manifest``."""
    _check_fingerprint(source, manifest, "train", source.train.archive.fingerprint())
    _check_fingerprint(source, manifest, "masks", source.masks.fingerprint())
    return LabeledImages(source.train, source.masks, manifest["unreadable"])


def open_test(source: CompetitionData, manifest: Mapping[str, Any]) -> ImageSet:
    """Return the test images; raises CarvanaError if they are not those of ``manifest``."""
    _check_fingerprint(source, manifest, "test", source.test.archive.fingerprint())
    return source.test


def _check_fingerprint(source: CompetitionData, manifest: Mapping[str, Any], part: str, digest: str) -> None:
    if manifest[part]["digest"] != digest:
        raise CarvanaError(
            f"The {part} files in {source.directory} changed since data/manifest.json was written. "
            "Run 'dvc repro --force download' to use the new ones."
        )


METADATA_FILE = "metadata.csv"


def read_car_makes(directory: Path) -> dict[str, str]:
    """Return the make of each car id in metadata.csv, without cars of unknown make; empty if there is no such file.

    Raises CarvanaError if the file cannot be read or lacks the columns ``id`` or ``make``.
    """
    path = find_csv(directory, METADATA_FILE)
    if path is None:
        return {}
    rows = csv.DictReader(line.decode(errors="replace") for line in read_lines(path))
    if not {"id", "make"} <= set(rows.fieldnames or ()):
        raise CarvanaError(f"{path} lacks the columns 'id' and 'make'. Download it again.")
    return {row["id"]: row["make"].strip() for row in rows if row["id"] and row["make"] and row["make"].strip()}
