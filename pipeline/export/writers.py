"""Write a net as TorchScript, torch.export program, ONNX or int8 ONNX."""

import copy
import logging
import warnings
import zipfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from pipeline.inference.onnx_predictor import OnnxMetadata, onnx, quantization
from pipeline.models.networks import SegmentationModel
from pipeline.utils.arrays import UInt8Array

OPSET = 18
"""ONNX opset: the first with an antialiased ``Resize``."""


class _AnySize(nn.Module):
    """A net that always pads: tracing would fix the answer of the check whether padding is needed."""

    def __init__(self, net: SegmentationModel) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net.forward_padded(pixels)


def write_torchscript(net: SegmentationModel, path: Path) -> None:
    """Write a net as TorchScript: pixels (B, C, h, w) from 0 to 255, uint8 or float32, to logits (B, 1, h, w)."""
    with quiet(), torch.no_grad():
        script = torch.jit.trace(_AnySize(net).eval(), _pixels(net), check_trace=False)  # type: ignore[no-untyped-call]
        saved = path.with_name(f"{path.name}.debug")
        script.save(saved)
    with zipfile.ZipFile(saved) as source, zipfile.ZipFile(path, "w") as target:
        for member in source.infolist():
            if not member.filename.endswith(".debug_pkl"):  # source locations, with paths of this machine
                target.writestr(member, source.read(member))


def write_program(net: SegmentationModel, path: Path) -> None:
    """Write a net as a torch.export program: float32 pixels (B, C, h, w), both sides above its stride, to logits."""
    # In the plain memory format: with channels_last, torch.export finds sizes that it would have to exclude.
    plain = copy.deepcopy(net).to(memory_format=torch.contiguous_format)
    with quiet():
        program = torch.export.export(
            _AnySize(plain).eval(), (_pixels(plain),), dynamic_shapes=_dynamic_shapes(plain), strict=False
        )
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it contains paths of this machine
        torch.export.save(program, path)


class _GridPool(nn.Module):
    """``AdaptiveAvgPool2d`` as two products with matrices: ONNX has no operator for it at any size."""

    def __init__(self, cells: int | tuple[int, int]) -> None:
        super().__init__()
        self.cells = (cells, cells) if isinstance(cells, int) else cells

    def forward(self, features: Tensor) -> Tensor:
        rows, columns = (_means(*sides) for sides in zip(self.cells, features.shape[-2:], strict=True))
        return rows @ features @ columns.T


def _means(cells: int, side: int) -> Tensor:
    """Return a matrix (cells, side) that averages ``side`` values in ``cells`` groups, which may overlap."""
    cell, place = torch.arange(cells)[:, None], torch.arange(side)
    inside = (place >= cell * side // cells) & (place < ((cell + 1) * side + cells - 1) // cells)
    return inside / inside.sum(dim=1, keepdim=True)


class _PyramidLevel(nn.Module):
    """A level of smp's PSPNet, without the way that smp has for ONNX: it fixes the size."""

    def __init__(self, pool: nn.Module) -> None:
        super().__init__()
        self.pool = pool

    def forward(self, features: Tensor) -> Tensor:
        size = features.shape[-2:]
        return functional.interpolate(self.pool(features), size=size, mode="bilinear", align_corners=True)


def _exportable(net: SegmentationModel) -> SegmentationModel:
    """Return a copy of a net without layers that ONNX knows at one size only."""
    copied = copy.deepcopy(net)
    for name, layer in net.named_modules():
        if type(layer).__name__ == "PSPBlock":
            copied.set_submodule(name, _PyramidLevel(copied.get_submodule(f"{name}.pool")))
        if isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size not in (1, (1, 1)):
            copied.set_submodule(name, _GridPool(layer.output_size))  # type: ignore[arg-type]
    return copied


def write_onnx(net: SegmentationModel, metadata: OnnxMetadata, path: Path) -> None:
    """Write a net as one ONNX file: ``pixels`` float32 (B, C, h, w) from 0 to 255 to ``logits`` (B, 1, h, w)."""
    with quiet():
        program = torch.onnx.export(
            _AnySize(_exportable(net)).eval(),
            (_pixels(net),),
            output_names=["logits"],
            dynamic_shapes=_dynamic_shapes(net),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    save(program.model_proto, metadata, path)


def save(model: Any, metadata: OnnxMetadata, path: Path) -> None:
    """Write an ONNX model with its metadata, without the exporter's debug notes, which contain local paths."""
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    onnx().helper.set_model_props(model, metadata.to_props())
    onnx().save(model, path)


def _dynamic_shapes(net: SegmentationModel) -> Any:
    # A side of one stride would have size 1 at the lowest level, which torch.export treats as a special case.
    least = net.stride + 1
    height, width = (torch.export.Dim(name, min=least) for name in ("height", "width"))
    return ({0: torch.export.Dim("batch"), 2: height, 3: width},)


def _pixels(net: SegmentationModel) -> Tensor:
    # Different sides that need padding, and a batch of 2, so that tracing does not specialize on special sizes.
    return torch.zeros(2, net.mean.shape[1], 2 * net.stride + 3, 3 * net.stride + 5)


@contextmanager
def quiet() -> Iterator[None]:
    """Suppress warnings: torch's tracers warn about every constant."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_OPERATORS = ["Conv", "ConvTranspose", "MaxPool", "Concat", "Relu", "Resize", "Add"]
"""Operators to quantize: the expensive ones, and those between them."""


def write_int8(net: Path, inputs: Iterable[UInt8Array], metadata: OnnxMetadata, path: Path) -> None:
    """Quantize the ONNX file ``net`` to 8-bit weights and activations, calibrated on preprocessed inputs (h, w, C)."""
    tools = quantization()
    last_conv = [node.name for node in onnx().load(net).graph.node if node.op_type == "Conv"][-1]
    with _no_log_warnings():
        tools.quantize_static(
            net,
            path,
            _Calibration(iter(inputs)),
            quant_format=tools.QuantFormat.QDQ,
            op_types_to_quantize=_OPERATORS,
            # The last layer outputs the logits: quantizing it saves nothing and costs accuracy.
            nodes_to_exclude=[last_conv],
            per_channel=True,
            # Signed weights overflow 16 bits on processors with AVX2 only, which cost 0.01 Dice.
            weight_type=tools.QuantType.QUInt8,
            activation_type=tools.QuantType.QUInt8,
        )
    save(onnx().load(path), metadata, path)


class _Calibration:
    """Preprocessed images, in onnxruntime's interface for calibration data."""

    def __init__(self, inputs: Iterator[UInt8Array]) -> None:
        self._inputs = inputs

    def get_next(self) -> dict[str, Any] | None:
        pixels_hwC = next(self._inputs, None)
        return None if pixels_hwC is None else {"pixels": pixels_hwC.transpose(2, 0, 1)[None].astype(np.float32)}


@contextmanager
def _no_log_warnings() -> Iterator[None]:
    # onnxruntime warns on the root logger that the graph should be optimized first; torch's exporter has done that.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
