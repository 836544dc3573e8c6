"""An ONNX net in 8-bit integers, calibrated on photographs."""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.exporting.facts import OnnxMetadata
from pipeline.exporting.graphs import save
from pipeline.exporting.packages import onnx, quantization
from pipeline.learning.rasters import UInt8Array

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
