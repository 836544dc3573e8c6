"""Write a net as TorchScript, torch.export program, ONNX or int8 ONNX."""

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

from pipeline.inference.onnx_predictor import OnnxMetadata, onnx, quantization
from pipeline.models.networks import SegmentationModel
from pipeline.utils.arrays import UInt8Array

OPSET = 18
"""Of ONNX: the first in which ``Resize`` is antialiased."""


class _AnySize(nn.Module):
    """A net without its question whether there is anything to pad, which would freeze the answer in a graph."""

    def __init__(self, net: SegmentationModel) -> None:
        super().__init__()
        self.net = net

    def forward(self, pixels: Tensor) -> Tensor:
        return self.net.forward_padded(pixels)


def write_torchscript(net: SegmentationModel, path: Path) -> None:
    """Write a net as TorchScript: pixels (B, C, h, w) from 0 to 255, uint8 or float32, to logits (B, 1, h, w)."""
    with quiet(), torch.no_grad():
        script = torch.jit.trace(_AnySize(net).eval(), _pixels(net), check_trace=False)  # type: ignore[no-untyped-call]
        noted = path.with_name(f"{path.name}.noted")
        script.save(noted)
    with zipfile.ZipFile(noted) as old, zipfile.ZipFile(path, "w") as new:
        for member in old.infolist():
            if not member.filename.endswith(".debug_pkl"):  # which code each step comes from: paths of this machine
                new.writestr(member, old.read(member))


def write_program(net: SegmentationModel, path: Path) -> None:
    """Write a net as torch.export's program: float32 pixels (B, C, h, w), both sides above its stride, to logits."""
    with quiet():
        program = torch.export.export(_AnySize(net).eval(), (_pixels(net),), dynamic_shapes=_free(net), strict=False)
        for node in program.graph.nodes:
            node.meta.pop("stack_trace", None)  # it names paths of this machine
        torch.export.save(program, path)


def write_onnx(net: SegmentationModel, facts: OnnxMetadata, path: Path) -> None:
    """Write a net as one ONNX file: ``pixels`` float32 (B, C, h, w) from 0 to 255 to ``logits`` (B, 1, h, w)."""
    with quiet():
        program = torch.onnx.export(
            _AnySize(net).eval(),
            (_pixels(net),),
            output_names=["logits"],
            dynamic_shapes=_free(net),
            opset_version=OPSET,
            dynamo=True,
            verbose=False,
        )
    assert program is not None
    save(program.model_proto, facts, path)


def save(model: Any, facts: OnnxMetadata, path: Path) -> None:
    """Write an ONNX model as one file that explains itself, without what its exporter noted: paths of this machine."""
    for part in (model.graph, *model.graph.node, *model.graph.value_info, *model.graph.input, *model.graph.output):
        del part.metadata_props[:]
        part.ClearField("doc_string")
    onnx().helper.set_model_props(model, facts.metadata())
    onnx().save(model, path)


def _free(net: SegmentationModel) -> Any:
    # A side of one stride would be 1 at the body's lowest level, which torch.export takes for another case.
    least = net.stride + 1
    height, width = (torch.export.Dim(name, min=least) for name in ("height", "width"))
    return ({0: torch.export.Dim("batch"), 2: height, 3: width},)


def _pixels(net: SegmentationModel) -> Tensor:
    # Sides that differ and have to be padded, more than one picture: nothing that a graph could take for a rule.
    return torch.zeros(2, net.mean.shape[1], 2 * net.stride + 3, 3 * net.stride + 5)


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch's warnings back: its tracers warn of every number they keep, and of each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


_OPERATORS = ["Conv", "ConvTranspose", "MaxPool", "Concat", "Relu", "Resize", "Add"]
"""What takes the time, and what lies between."""


def write_int8(net: Path, inputs: Iterable[UInt8Array], facts: OnnxMetadata, path: Path) -> None:
    """Write the ONNX file ``net`` with weights and activations in 8 bits, in the ranges that prepared inputs give."""
    tools = quantization()
    head = [node.name for node in onnx().load(net).graph.node if node.op_type == "Conv"][-1]
    with _quiet():
        tools.quantize_static(
            net,
            path,
            _Calibration(iter(inputs)),
            quant_format=tools.QuantFormat.QDQ,
            op_types_to_quantize=_OPERATORS,
            # It gives logits, one a pixel: what 8 bits save there is nothing, what they lose is seen.
            nodes_to_exclude=[head],
            per_channel=True,
            # Signed weights overflow 16 bits on processors with AVX2 alone: 0.01 of Dice was lost to that.
            weight_type=tools.QuantType.QUInt8,
            activation_type=tools.QuantType.QUInt8,
        )
    save(onnx().load(path), facts, path)


class _Calibration:
    """Prepared pictures, as onnxruntime asks for them."""

    def __init__(self, inputs: Iterator[UInt8Array]) -> None:
        self._inputs = inputs

    def get_next(self) -> dict[str, Any] | None:
        pixels_hwC = next(self._inputs, None)
        return None if pixels_hwC is None else {"pixels": pixels_hwC.transpose(2, 0, 1)[None].astype(np.float32)}


@contextmanager
def _quiet() -> Iterator[None]:
    # It warns, by the root logger, that graphs could be optimised first: torch's exporter did.
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(level)
