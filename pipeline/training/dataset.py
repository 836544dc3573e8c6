"""Training and validation images: decoded once if they fit in memory, augmented by (seed, epoch, image)."""

import math
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import albumentations as A
import numpy as np
import psutil
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import AugmentSettings, HardwareSettings, InputSettings, TrainSettings
from pipeline.errors import CarvanaError
from pipeline.models.resize import soft_target, to_network_input
from pipeline.utils.arrays import UInt8Array
from pipeline.utils.parallel import available_cpus

os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # its import checks for updates otherwise

_GIGABYTE = 1 << 30

Step = tuple[int, int]
"""Epoch and index of an image."""


class ImageReader(Protocol):
    """Reads images and masks by image id."""

    def image(self, image_id: str) -> UInt8Array:
        """Return an image, uint8 RGB (1280, 1918, 3)."""

    def mask(self, image_id: str) -> UInt8Array:
        """Return a mask, uint8 of 0 and 1, (1280, 1918)."""


@dataclass(frozen=True)
class CachedImages:
    """A net's inputs and soft targets for some images; all in memory if ``cache_gb`` allows."""

    image_ids: Sequence[str]
    reader: ImageReader
    input: InputSettings
    cache: tuple[UInt8Array, UInt8Array] | None = None

    @classmethod
    def load(
        cls, image_ids: Sequence[str], reader: ImageReader, input: InputSettings, cache_gb: float
    ) -> "CachedImages":
        """Return the images, decoded and shrunk at once if they fit into ``cache_gb`` GiB."""
        examples = cls(image_ids, reader, input)
        cached = fits_in_memory(len(image_ids), input, cache_gb)
        return cls(image_ids, reader, input, examples._decode_all()) if cached else examples

    def __len__(self) -> int:
        return len(self.image_ids)

    def __getitem__(self, index: int) -> tuple[UInt8Array, UInt8Array]:
        """Return image (h, w, C) and target (h, w), both uint8."""
        if self.cache is not None:
            return self.cache[0][index], self.cache[1][index]
        return self._decode(index)

    def image(self, index: int) -> UInt8Array:
        """Return an image (h, w, C) without its target, uint8."""
        if self.cache is not None:
            cached: UInt8Array = self.cache[0][index]
            return cached
        return to_network_input(self.reader.image(self.image_ids[index]), self.input)

    def _decode(self, index: int) -> tuple[UInt8Array, UInt8Array]:
        image_id = self.image_ids[index]
        image_hwC = to_network_input(self.reader.image(image_id), self.input)
        return image_hwC, soft_target(self.reader.mask(image_id), self.input)

    def _decode_all(self) -> tuple[UInt8Array, UInt8Array]:
        shape = (len(self), self.input.height, self.input.width)
        images, targets = np.empty((*shape, self.input.channel_count), np.uint8), np.empty(shape, np.uint8)

        def fill(index: int) -> None:
            images[index], targets[index] = self._decode(index)

        # Decoders release the GIL.
        with ThreadPoolExecutor(available_cpus()) as pool:
            list(tqdm(pool.map(fill, range(len(self))), desc="Decoding images", total=len(self), unit="image"))
        return images, targets


def fits_in_memory(images: int, input: InputSettings, cache_gb: float) -> bool:
    """Return whether the inputs and targets of so many images fit into ``cache_gb`` GiB."""
    return images * input.height * input.width * (input.channel_count + 1) <= cache_gb * _GIGABYTE


class TrainingSet(Dataset[dict[str, Tensor]]):
    """Augmented images, by (epoch, index)."""

    def __init__(self, examples: CachedImages, train: TrainSettings, seed: int) -> None:
        self.examples = examples
        self.seed = seed
        self.augment = augmentation(train.augment, train.crop, examples.input.channels == "rgb")

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, step: Step) -> dict[str, Tensor]:
        """Return ``image`` (h, w, C) and ``target`` (1, h, w), uint8, and the ``index`` of the image."""
        epoch, index = step
        image_hwC, target_hw = self.examples[index]
        # From (seed, epoch, image), so that a resumed run equals an uninterrupted one.
        self.augment.set_random_seed(int(_random_generator(self.seed, epoch, index).integers(1 << 31)))
        changed = self.augment(image=image_hwC, mask=target_hw)
        image = torch.from_numpy(np.atleast_3d(changed["image"]))
        return {"image": image, "target": torch.from_numpy(changed["mask"])[None], "index": torch.tensor(index)}


class ValidationSet(Dataset[dict[str, Tensor]]):
    """Images without augmentation, with true masks at full size, where Kaggle scores."""

    def __init__(self, examples: CachedImages) -> None:
        self.examples = examples

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``image`` (h, w, C) and ``mask`` (1280, 1918) of 0 and 1, uint8."""
        image_hwC = self.examples.image(index)
        mask_HW = self.examples.reader.mask(self.examples.image_ids[index])
        return {"image": torch.from_numpy(image_hwC), "mask": torch.from_numpy(mask_HW)}


class EpochSampler(Sampler[Step]):
    """Yields (epoch, index) in an order drawn from (seed, epoch), equally many in each process."""

    def __init__(self, size: int, seed: int, rank: int = 0, processes: int = 1) -> None:
        self.size, self.seed, self.rank, self.processes = size, seed, rank, processes
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Set the epoch; the trainer calls this before each."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.size // self.processes

    def __iter__(self) -> Iterator[Step]:
        order = _random_generator(self.seed, self.epoch).permutation(self.size)
        return ((self.epoch, int(index)) for index in order[self.rank : len(self) * self.processes : self.processes])


class DistributedEvalSampler(Sampler[int]):
    """Yields each index once, in one of several processes; none is repeated to make shares equal."""

    def __init__(self, size: int, rank: int = 0, processes: int = 1) -> None:
        self.indices = range(rank, size, processes)

    def __len__(self) -> int:
        return len(self.indices)

    def __iter__(self) -> Iterator[int]:
        return iter(self.indices)


def augmentation(settings: AugmentSettings, crop: tuple[int, int] | None, color: bool) -> Any:
    """Return albumentations' pipeline of ``settings`` for uint8 images and soft masks."""
    steps: list[Any] = [A.RandomCrop(*crop)] if crop else []
    steps.append(A.HorizontalFlip(p=settings.hflip))
    if settings.shift or settings.scale or settings.rotate:
        # Soft masks are interpolated like the image; beyond the border the studio is reflected.
        steps.append(
            A.Affine(
                scale=(1 - settings.scale, 1 + settings.scale),
                translate_percent=(-settings.shift, settings.shift),
                rotate=(-settings.rotate, settings.rotate),
                interpolation=1,
                mask_interpolation=1,
                border_mode=2,
                p=0.8,
            )
        )
    if settings.brightness:
        steps.append(A.RandomBrightnessContrast(settings.brightness, settings.brightness, p=0.5))
    if settings.hue and color:
        hue, saturation = round(180 * settings.hue), round(255 * settings.hue)
        steps.append(A.HueSaturationValue(hue, saturation, 0, p=0.5))
    return A.Compose(steps)


@dataclass(frozen=True)
class LoaderOptions:
    """Processes that load images, at most one per CPU."""

    wanted: int
    gpu: bool
    """Whether they feed a GPU."""

    def loader_kwargs(self, cached: bool) -> dict[str, Any]:
        """Return the options of a DataLoader, for images that are in memory (``cached``) or not."""
        # Augmenting an image in memory is faster than passing it between processes, unless a GPU waits.
        count = 0 if cached and not self.gpu else min(self.wanted, available_cpus())
        if not count:
            return {"num_workers": 0}
        return {
            "num_workers": count,
            "persistent_workers": True,
            "pin_memory": self.gpu,
            "worker_init_fn": _limit_threads,
            # Forked, so that they share the images in memory; elsewhere than on Linux, a fork may hang.
            "multiprocessing_context": "fork" if sys.platform == "linux" else None,
        }


@dataclass(frozen=True)
class LoadingResources:
    """What images are loaded with: the settings of ``hardware``, with numbers in place of ``auto``."""

    workers: int
    """Processes that load images, for each process that trains."""

    cache_gb: float
    """GiB for decoded images, of all processes together."""

    @classmethod
    def resolve(cls, hardware: HardwareSettings, batch: int, processes: int = 1) -> "LoadingResources":
        """Return the numbers for this machine, for batches of so many bytes and so many processes that train."""
        workers = _auto_workers(batch, processes) if hardware.workers == "auto" else hardware.workers
        cache_gb = _auto_cache_gb() if hardware.cache_gb == "auto" else hardware.cache_gb
        return cls(workers, cache_gb)


def _auto_workers(batch: int, processes: int) -> int:
    cpus = available_cpus()
    workers = max(1, max(min(2, cpus), cpus - 2) // processes)
    while workers > 1 and processes * prepared_batches(workers) * batch > free_shared_memory():
        workers -= 1
    return workers


def _auto_cache_gb() -> float:
    half = available_memory() / 2 / _GIGABYTE
    # Elsewhere than on Linux, loader processes are not forked, so that each copies the images.
    return half if sys.platform == "linux" else min(half, 2.0)


def prepared_batches(workers: int) -> int:
    """Return the number of batches in shared memory: each loader process prepares two, and one is in use."""
    return 2 * workers + 1 if workers else 0


def available_memory(cgroup: Path = Path("/sys/fs/cgroup")) -> int:
    """Return the bytes of memory that this process may still take, given the limit of its container."""
    free = int(psutil.virtual_memory().available)
    try:
        limit, used = (int((cgroup / name).read_text(encoding="ascii")) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text(encoding="ascii").splitlines())
        # Files that were read stay in memory until it is needed.
        return max(0, min(free, limit - used + int(statistics["inactive_file"])))
    except (OSError, ValueError, KeyError):  # no limit, or "max"
        return free


def batch_bytes(input: InputSettings, train: TrainSettings, predict_batch: int) -> int:
    """Return the bytes of the largest batch, of training or of validation images."""
    height, width = train.crop or (input.height, input.width)
    training = train.batch_size * height * width * (input.channel_count + 1)
    validation = predict_batch * (input.height * input.width * input.channel_count + HEIGHT * WIDTH)
    return max(training, validation)


_SHARED_MEMORY = Path("/dev/shm")


def free_shared_memory(folder: Path = _SHARED_MEMORY) -> float:
    """Return the free bytes of the memory that processes share; infinity where it has no folder."""
    return shutil.disk_usage(folder).free if folder.is_dir() else math.inf


def check_shared_memory(needed: int, folder: Path = _SHARED_MEMORY) -> None:
    """Raise CarvanaError if the bytes ``needed`` do not fit into the memory that processes share.

    Docker gives a container 64 MB unless told otherwise.
    """
    free = free_shared_memory(folder)
    if needed > free:
        raise CarvanaError(
            f"{folder} has {free / 1e6:.0f} MB free, but the processes of this training share about "
            f"{needed / 1e6:.0f} MB. Start the container with --shm-size=2g, or lower hardware.workers, "
            "train.batch_size or train.devices."
        )


def training_loader(
    examples: CachedImages, train: TrainSettings, workers: LoaderOptions, seed: int, rank: int, processes: int
) -> DataLoader[Any]:
    """Return shuffled batches; an incomplete last one is dropped, unless it is the only one."""
    sampler = EpochSampler(len(examples), seed, rank, processes)
    return DataLoader(
        TrainingSet(examples, train, seed),
        batch_size=train.batch_size,
        sampler=sampler,
        drop_last=len(sampler) >= train.batch_size,
        **workers.loader_kwargs(examples.cache is not None),
    )


def validation_loader(
    examples: CachedImages, batch_size: int, workers: LoaderOptions, rank: int, processes: int
) -> DataLoader[Any]:
    """Return every image once; the last batch may be smaller."""
    sampler = DistributedEvalSampler(len(examples), rank, processes)
    options = workers.loader_kwargs(examples.cache is not None)
    return DataLoader(ValidationSet(examples), batch_size, sampler=sampler, **options)


def _limit_threads(worker: int) -> None:
    import cv2

    cv2.setNumThreads(0)
    torch.set_num_threads(1)


def _random_generator(*key: int) -> np.random.Generator:
    return np.random.default_rng(key)
