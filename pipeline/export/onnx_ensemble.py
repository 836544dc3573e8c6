"""A fold ensemble as one ONNX graph: TTA, all nets, upsampling and merging.

Built from ONNX nodes around the nets' own graphs, so that each net's weights are stored once, whatever the number of
views. Images are resized by two matrix products, one per side: onnxruntime's cubic resize takes seconds, and its
antialiased linear resize differs from torch's by 2 % of the range.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.export.writers import OPSET, save
from pipeline.inference.onnx_predictor import OnnxMetadata, onnx
from pipeline.inference.probability_map import MAX_LEVEL
from pipeline.models.resize import LOGIT_CLAMP
from pipeline.models.tta import TTATransform

_CUBIC = -0.75
"""Parameter ``a`` of the cubic kernel, as in torch and OpenCV."""


def write_ensemble(nets: Sequence[Path], metadata: OnnxMetadata, path: Path) -> None:
    """Merge the ONNX files ``nets`` into one.

    Inputs: ``pixels`` uint8 (B, C, h, w), and ``size`` int64 (2,), the output's height and width. Output:
    ``probability`` float32 (B, height, width), foreground at ``metadata.decision_threshold`` or more.
    """
    models = [onnx().load(net) for net in nets]
    graph = _Graph()
    pixels = graph.cast("pixels", np.float32)
    views = [TTATransform.parse(name) for name in metadata.views]
    scaled = {scale: _scaled(graph, pixels, scale) for scale in dict.fromkeys(view.scale for view in views)}
    upsample = {scale: _add_upsampling(graph, pixels) for scale, pixels in scaled.items()}

    def predict(number: int, view: TTATransform) -> str:
        """Add a net on one view; return the name of its probability at full size."""
        view_pixels = _flipped(graph, scaled[view.scale]) if view.hflip else scaled[view.scale]
        logits = graph.net(models[number], number, view_pixels)
        return _probability(graph, upsample[view.scale](_flipped(graph, logits) if view.hflip else logits))

    means = [graph.mean([predict(number, view) for view in views]) for number in range(len(models))]
    graph.add("Identity", _merged(graph, means, metadata), name="probability")
    save(graph.model(metadata.input.channel_count, models[0].ir_version), metadata, path)


class _Graph:
    """An ONNX graph under construction; values are identified by name."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node; return the name of its output."""
        name = name or f"{operator}_{len(self.nodes)}"
        self.nodes.append(onnx().helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, values: Any, dtype: type[np.generic] = np.float32) -> str:
        """Add a constant; return its name."""
        array = np.asarray(values, dtype)
        name = f"{array.dtype}_{array.ravel().tolist()}_{array.ndim}"
        self.constants[name] = onnx().numpy_helper.from_array(array, name)
        return name

    def cast(self, value: str, dtype: type[np.generic]) -> str:
        """Add a conversion to another dtype; return its name."""
        return self.add("Cast", value, to=onnx().helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def mean(self, values: Sequence[str]) -> str:
        """Add the mean of values of the same shape; return its name."""
        return self.add("Mean", *values)

    def net(self, model: Any, number: int, pixels: str) -> str:
        """Add a copy of a net's graph that shares weights with earlier copies; return the name of its logits."""
        prefix = f"{len(self.nodes)}."
        names = {"": "", "pixels": pixels}
        for tensor in model.graph.initializer:
            names[tensor.name] = f"net{number}.{tensor.name}"
            if names[tensor.name] not in self.constants:
                self.constants[names[tensor.name]] = _renamed(tensor, names[tensor.name])
        for node in model.graph.node:
            copy = _renamed(node, prefix + node.name)
            copy.input[:] = [names.get(name, prefix + name) for name in node.input]
            copy.output[:] = [names.get(name, prefix + name) for name in node.output]
            self.nodes.append(copy)
        return prefix + str(model.graph.output[0].name)

    def model(self, channels: int, ir_version: int) -> Any:
        """Return the finished model."""
        helper, types = onnx().helper, onnx().TensorProto
        inputs = [
            helper.make_tensor_value_info("pixels", types.UINT8, ["batch", channels, "height", "width"]),
            helper.make_tensor_value_info("size", types.INT64, [2]),
        ]
        outputs = [helper.make_tensor_value_info("probability", types.FLOAT, ["batch", "full_height", "full_width"])]
        graph = helper.make_graph(self.nodes, "ensemble", inputs, outputs, list(self.constants.values()))
        opset = helper.make_opsetid("", OPSET)
        model = helper.make_model(graph, opset_imports=[opset], ir_version=ir_version, producer_name="carvana")
        onnx().checker.check_model(model)
        return model


def _renamed(part: Any, name: str) -> Any:
    copy = type(part)()
    copy.CopyFrom(part)
    copy.name = name
    return copy


def _flipped(graph: _Graph, image_BCHW: str) -> str:
    numbers = [graph.constant([value], np.int64) for value in (-1, np.iinfo(np.int64).min, 3, -1)]
    return graph.add("Slice", image_BCHW, *numbers)


def _scaled(graph: _Graph, pixels_BCHW: str, scale: float) -> str:
    """Add scaling like `TTATransform.augment`: bilinear, antialiased."""
    if scale == 1.0:
        return pixels_BCHW

    def weights(axis: int) -> str:
        side = _side(graph, pixels_BCHW, axis)
        wanted = graph.add("Round", graph.add("Mul", side, graph.constant(scale, np.float64)))
        wanted = graph.add("Max", wanted, graph.constant(1, np.float64))
        ratio = graph.add("Div", side, wanted)
        distance = _distances(graph, side, wanted)
        # When shrinking, each output pixel averages all input pixels that it covers.
        wide = graph.add("Max", ratio, graph.constant(1, np.float64))
        near = graph.add("Sub", graph.constant(1, np.float64), graph.add("Abs", graph.add("Div", distance, wide)))
        near = graph.add("Max", near, graph.constant(0, np.float64))
        return graph.add("Div", near, graph.add("ReduceSum", near, graph.constant([1], np.int64)))

    return _resized(graph, pixels_BCHW, weights(2), weights(3))


def _add_upsampling(graph: _Graph, pixels_BCHW: str) -> Callable[[str], str]:
    """Return a function that adds upsampling like `upsample_logits`, from the size of ``pixels`` to the output size."""

    def weights(axis: int) -> str:
        side = _side(graph, pixels_BCHW, axis)
        wanted = graph.add("Gather", "size", graph.constant(axis - 2, np.int64))
        distance = _distances(graph, side, graph.cast(wanted, np.float64), margin=2)
        return _cubic(graph, graph.add("Abs", distance))

    rows, columns = weights(2), weights(3)
    margin = graph.constant([0, 0, 2, 2, 0, 0, 2, 2], np.int64)

    def upsample(logits_B1hw: str) -> str:
        clamped = graph.add("Clip", logits_B1hw, graph.constant(-LOGIT_CLAMP), graph.constant(LOGIT_CLAMP))
        resized = _resized(graph, graph.add("Pad", clamped, margin, mode="edge"), rows, columns)
        return graph.add("Squeeze", resized, graph.constant([1], np.int64))

    return upsample


def _cubic(graph: _Graph, x: str) -> str:
    """Add the cubic interpolation kernel at distances ``x`` >= 0."""

    def polynomial(*coefficients: float) -> str:
        def step(value: str, coefficient: float) -> str:
            return graph.add("Add", graph.add("Mul", value, x), graph.constant(coefficient, np.float64))

        return reduce(step, coefficients[1:], graph.constant(coefficients[0], np.float64))

    a = _CUBIC
    inner, outer = polynomial(a + 2, -(a + 3), 0, 1), polynomial(a, -5 * a, 8 * a, -4 * a)
    beyond = graph.add("Where", _below(graph, x, 2), outer, graph.constant(0, np.float64))
    return graph.add("Where", _below(graph, x, 1), inner, beyond)


def _below(graph: _Graph, x: str, limit: float) -> str:
    return graph.add("Less", x, graph.constant(limit, np.float64))


def _side(graph: _Graph, image_BCHW: str, axis: int) -> str:
    side = graph.add("Shape", image_BCHW, start=axis, end=axis + 1)
    return graph.cast(graph.add("Squeeze", side), np.float64)


def _distances(graph: _Graph, side: str, wanted: str, margin: int = 0) -> str:
    """Add the distances (wanted, side + 2 * margin) between output and input pixels, in input pixels.

    In float64: float32 would be off by a thousandth of a pixel at the far end of an image.
    """
    zero, one, half = (graph.constant(value, np.float64) for value in (0, 1, 0.5))
    outputs = graph.add(
        "Mul", graph.add("Add", graph.add("Range", zero, wanted, one), half), graph.add("Div", side, wanted)
    )
    end = graph.add("Add", side, graph.constant(margin, np.float64))
    inputs = graph.add("Add", graph.add("Range", graph.constant(-margin, np.float64), end, one), half)
    return graph.add("Sub", graph.add("Unsqueeze", outputs, graph.constant([1], np.int64)), inputs)


def _resized(graph: _Graph, image_BCHW: str, rows: str, columns: str) -> str:
    resized_rows = graph.add("MatMul", graph.cast(rows, np.float32), image_BCHW)
    return graph.add("MatMul", resized_rows, graph.add("Transpose", graph.cast(columns, np.float32), perm=[1, 0]))


def _probability(graph: _Graph, logits: str) -> str:
    """Add `clamped_sigmoid`."""
    half, stretch = graph.constant(0.5), graph.constant(0.5 / np.tanh(LOGIT_CLAMP / 2))
    stretched = graph.add("Mul", graph.add("Tanh", graph.add("Mul", logits, half)), stretch)
    return graph.add("Clip", graph.add("Add", stretched, half), graph.constant(0), graph.constant(1))


def _merged(graph: _Graph, means: Sequence[str], metadata: OnnxMetadata) -> str:
    """Add the merge rule, in floating point, with equal weights; same as `MergeRule`."""
    if metadata.merge == "majority_vote":
        threshold = graph.constant(metadata.threshold)
        return graph.mean([graph.cast(graph.add("GreaterOrEqual", p, threshold), np.float32) for p in means])
    if metadata.merge == "mean_logit" and len(means) > 1:
        least = 0.5 / (MAX_LEVEL * len(metadata.views))  # half a quantization step, as in `MergeRule`
        bounds = graph.constant(least), graph.constant(1 - least)
        logits = [_logit(graph, graph.add("Clip", p, *bounds)) for p in means]
        return graph.add("Sigmoid", graph.mean(logits))
    return graph.mean(means)


def _logit(graph: _Graph, p: str) -> str:
    return graph.add("Sub", graph.add("Log", p), graph.add("Log", graph.add("Sub", graph.constant(1), p)))
