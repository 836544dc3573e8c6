"""What an export must prove before it gets its name: that it says what the net says."""

import platform
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median

import numpy as np
from numpy.typing import NDArray

from pipeline.competition.layout import HEIGHT, WIDTH
from pipeline.competition.metric import confusion_counts
from pipeline.cores import available_cpus
from pipeline.errors import CarvanaError
from pipeline.learning.rasters import Float32Array, UInt8Array, clamped_sigmoid, upsample_logits

MAX_DIFFERENCE = 1e-3
"""In probability, of any pixel at full size: more than this, and a float format is refused."""

MAX_DICE_DROP = 0.003
"""Dice, at full size and on average: an export that is further from the net, either way, is refused."""

CHECK_IMAGES = 16
"""Images that exports are checked on."""

BoolArray = NDArray[np.bool_]


@dataclass(frozen=True)
class LoadedExport:
    """A file at work."""

    run: Callable[[UInt8Array], NDArray[np.float32]]
    """From a prepared picture (h, w, C) to what the file says: logits (h, w), or a probability at full size."""
    probability: Callable[[NDArray[np.float32]], NDArray[np.float32]]
    """From what the file says to the probability (1280, 1918)."""


@dataclass(frozen=True)
class ReferencePrediction:
    """An image, and what PyTorch says of it."""

    input: UInt8Array
    """As the net sees it, (h, w, C)."""
    probability_HW: NDArray[np.float32]
    true_HW: BoolArray
    dice: float
    """Of PyTorch's mask."""
    ambiguous_HW: BoolArray | None = None
    """Where a rounding error may turn a vote, so that probabilities can't be compared."""


@dataclass(frozen=True)
class ExportReport:
    """How an export compares with PyTorch."""

    bytes: int
    difference: float
    """Greatest, in probability at full size, over all images and pixels."""
    dice: float
    """Mean over the images, at full size."""
    dice_drop: float
    """What PyTorch has more, on the same images."""
    images: int
    images_per_second: float
    """One image at a time, warm, the file's own work alone."""
    machine: str


def benchmark_export(
    path: Path, exported: LoadedExport, proofs: Sequence[ReferencePrediction], cut: float
) -> ExportReport:
    """Run an export on every image; ``cut`` is the probability from which on a pixel is car."""
    differences, dices, seconds = [], [], []
    exported.run(proofs[0].input)  # to be warm
    for proof in proofs:
        begun = time.perf_counter()
        said = exported.run(proof.input)
        seconds.append(time.perf_counter() - begun)
        said_HW = exported.probability(said)
        differences.append(_difference(said_HW, proof))
        dices.append(confusion_counts(said_HW >= cut, proof.true_HW).dice)
    return ExportReport(
        bytes=size_of(path),
        difference=max(differences),
        dice=mean(dices),
        dice_drop=mean(proof.dice for proof in proofs) - mean(dices),
        images=len(proofs),
        images_per_second=1 / median(seconds),
        machine=machine_name(),
    )


def assert_close(name: str, measured: ExportReport, *, exact: bool) -> None:
    """Raise CarvanaError if an export is too far from the net; ``exact`` where it computes in floats as that does."""
    on = f"on {measured.images} images"
    if exact and not measured.difference < MAX_DIFFERENCE:
        raise CarvanaError(
            f"{name} is not kept: {on}, its probability differs from PyTorch's by {measured.difference:.2g} at worst, "
            f"where {MAX_DIFFERENCE:g} is allowed. Another version of torch or onnxruntime may do better."
        )
    if not abs(measured.dice_drop) <= MAX_DICE_DROP:
        change = "loses" if measured.dice_drop > 0 else "gains, by chance,"
        raise CarvanaError(
            f"{name} is not kept: {on}, it {change} {abs(measured.dice_drop):.4f} of Dice against PyTorch, "
            f"where {MAX_DICE_DROP:g} is allowed."
            + ("" if exact else " Calibrate it on more photographs (--images), or take a float format.")
        )


def full_size_probability(logits_hw: Float32Array) -> NDArray[np.float32]:
    """Return the probability (1280, 1918) that a net's logits mean."""
    return clamped_sigmoid(upsample_logits(logits_hw, HEIGHT, WIDTH))


def _difference(said_HW: NDArray[np.float32], proof: ReferencePrediction) -> float:
    apart_HW = np.nan_to_num(np.abs(said_HW - proof.probability_HW), nan=1.0)  # no number is as far as can be
    if proof.ambiguous_HW is not None:
        apart_HW[proof.ambiguous_HW] = 0
    return float(apart_HW.max())


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    files: Iterable[Path] = path.rglob("*") if path.is_dir() else (path,)
    return sum(file.stat().st_size for file in files)


def machine_name() -> str:
    """Return words for the machine that runs this."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    except OSError:
        names = []
    name = next(iter(names), platform.processor() or platform.machine())
    number = available_cpus()
    return f"{number} core{'' if number == 1 else 's'} of {name}, {platform.system()}"
