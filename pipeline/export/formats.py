"""The export formats: how to write each, and how to load it for verification."""

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
    """An export format."""

    file: str
    """File name in the model's export folder."""
    description: str
    """For the model card."""
    write: Callable[[ExportContext, Path], None]
    open: Callable[[Path], LoadedExport]
    exact: bool = True
    """Whether it computes in floating point, like PyTorch."""
    ensemble: bool = False
    """Whether it contains the nets of all folds."""
    require: Callable[[], None] = lambda: None
    """Raises CarvanaError if a required package is missing."""


def _write_hub(context: ExportContext, path: Path) -> None:
    path.mkdir()
    shutil.copyfile(context.job.folders[context.job.fold] / workspace.CONFIG, path / workspace.CONFIG)
    shutil.copyfile(context.weights, path / workspace.WEIGHTS["last"])


def _write_onnx(context: ExportContext, path: Path) -> None:
    shutil.copyfile(context.onnx(context.job.fold), path)


def _write_int8(context: ExportContext, path: Path) -> None:
    if not context.job.calibration:
        raise CarvanaError(
            "int8 needs training images for calibration. Add --images 32, or choose a floating-point format."
        )
    fold = context.job.fold
    write_int8(context.onnx(fold), context.calibration(), context.metadata(fold), path)


def _write_ensemble(context: ExportContext, path: Path) -> None:
    write_ensemble([context.onnx(fold) for fold in context.job.ensemble], context.metadata(), path)


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
    return LoadedExport(
        lambda pixels_hwC: predictor.probability([pixels_hwC], HEIGHT, WIDTH)[0], lambda probability_HW: probability_HW
    )


def _batch(pixels_hwC: UInt8Array) -> Any:
    return np.ascontiguousarray(pixels_hwC.transpose(2, 0, 1)[None], np.float32)


FORMATS = {
    "hub": ExportFormat("hub", "safetensors and config, in the layout of the Hugging Face Hub", _write_hub, _open_hub),
    "torchscript": ExportFormat(
        "model.torchscript.pt",
        "TorchScript, for PyTorch without this project, and C++",
        lambda context, path: write_torchscript(context.net, path),
        _open_torchscript,
    ),
    "torch-export": ExportFormat(
        "model.pt2",
        "a torch.export program, for PyTorch without this project, and its compilers",
        lambda context, path: write_program(context.net, path),
        _open_program,
    ),
    "onnx": ExportFormat(
        "model.onnx",
        "ONNX, for any batch size and image size",
        _write_onnx,
        _open_onnx,
        require=require_onnx,
    ),
    "int8": ExportFormat(
        "model.int8.onnx",
        "ONNX with 8-bit integers, calibrated on training images",
        _write_int8,
        _open_onnx,
        exact=False,
        require=require_quantization,
    ),
    "ensemble": ExportFormat(
        "ensemble.onnx",
        "ONNX: the nets of all folds with TTA and merging; returns probabilities at any size",
        _write_ensemble,
        _open_ensemble,
        ensemble=True,
        require=require_onnx,
    ),
}
"""Formats by their name in ``carvana export --format``."""
