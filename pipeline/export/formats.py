"""The formats there are: how each is written, and how it is run to be checked."""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipeline import workspace
from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.errors import CarvanaError
from pipeline.export.onnx_ensemble import write_ensemble
from pipeline.export.verification import ExportContext, LoadedExport, full_size_probability
from pipeline.export.writers import quiet, write_int8, write_program, write_torchscript
from pipeline.inference.onnx_predictor import OnnxPredictor, require_onnx, require_quantization
from pipeline.models import networks
from pipeline.utils.arrays import UInt8Array


@dataclass(frozen=True)
class ExportFormat:
    """A form in which nets leave."""

    file: str
    """Its name in the model's folder of exports."""
    words: str
    """What it is, for the card."""
    write: Callable[[ExportContext, Path], None]
    open: Callable[[Path], LoadedExport]
    exact: bool = True
    """Whether it computes in floats as PyTorch does."""
    ensemble: bool = False
    """Whether it holds all folds."""
    needs: Callable[[], None] = lambda: None
    """Raises CarvanaError where a package is missing."""


def _write_hub(material: ExportContext, path: Path) -> None:
    path.mkdir()
    shutil.copyfile(material.job.folders[material.job.fold] / workspace.CONFIG, path / workspace.CONFIG)
    shutil.copyfile(material.weights, path / workspace.WEIGHTS["last"])


def _write_onnx(material: ExportContext, path: Path) -> None:
    shutil.copyfile(material.onnx(material.job.fold), path)


def _write_int8(material: ExportContext, path: Path) -> None:
    if not material.job.calibration:
        raise CarvanaError(
            "int8 needs photographs to be calibrated on, of those that its net learned from: give it some with "
            "--images 32, or take a float format."
        )
    fold = material.job.fold
    write_int8(material.onnx(fold), material.calibration(), material.facts(fold), path)


def _write_ensemble(material: ExportContext, path: Path) -> None:
    write_ensemble([material.onnx(fold) for fold in material.job.ensemble], material.facts(), path)


def _open_hub(path: Path) -> LoadedExport:
    return _torch(networks.load_model(path)[0])


def _open_torchscript(path: Path) -> LoadedExport:
    with quiet():
        return _torch(torch.jit.load(path))  # type: ignore[no-untyped-call]


def _open_program(path: Path) -> LoadedExport:
    with quiet():
        return _torch(torch.export.load(path).module())


def _torch(net: Callable[[torch.Tensor], torch.Tensor]) -> LoadedExport:
    @torch.inference_mode()
    def run(pixels_hwC: UInt8Array) -> Any:
        return net(torch.from_numpy(_batch(pixels_hwC)))[0, 0].numpy()

    return LoadedExport(run, full_size_probability)


def _open_onnx(path: Path) -> LoadedExport:
    predictor = OnnxPredictor(path)
    return LoadedExport(lambda pixels_hwC: predictor.logits(_batch(pixels_hwC))[0, 0], full_size_probability)


def _open_ensemble(path: Path) -> LoadedExport:
    predictor = OnnxPredictor(path)
    return LoadedExport(lambda pixels_hwC: predictor.probability([pixels_hwC], HEIGHT, WIDTH)[0], lambda said: said)


def _batch(pixels_hwC: UInt8Array) -> Any:
    return np.ascontiguousarray(pixels_hwC.transpose(2, 0, 1)[None], np.float32)


FORMATS = {
    "hub": ExportFormat("hub", "safetensors and config, as the Hugging Face hub lays them out", _write_hub, _open_hub),
    "torchscript": ExportFormat(
        "model.torchscript.pt",
        "TorchScript, for PyTorch without this project, C++ and older phones",
        lambda material, path: write_torchscript(material.net, path),
        _open_torchscript,
    ),
    "torch-export": ExportFormat(
        "model.pt2",
        "a program of torch.export, for PyTorch without this project and its compilers",
        lambda material, path: write_program(material.net, path),
        _open_program,
    ),
    "onnx": ExportFormat(
        "model.onnx",
        "ONNX, for any batch and image size",
        _write_onnx,
        _open_onnx,
        needs=require_onnx,
    ),
    "int8": ExportFormat(
        "model.int8.onnx",
        "ONNX in 8-bit integers, calibrated on photographs",
        _write_int8,
        _open_onnx,
        exact=False,
        needs=require_quantization,
    ),
    "ensemble": ExportFormat(
        "ensemble.onnx",
        "ONNX: the nets of all folds, with views and merge, to the probability at any size",
        _write_ensemble,
        _open_ensemble,
        ensemble=True,
        needs=require_onnx,
    ),
}
"""By the name that ``carvana export --format`` takes."""
