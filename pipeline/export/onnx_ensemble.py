"""A whole fold ensemble as one ONNX graph: views of the pixels, every net on each of them, growing, merging.

Written in ONNX itself, around the nets' own graphs: each net's weights are in the file once, whatever the views.
Pictures are resized by two matrices, one a side: onnxruntime's own cubic takes seconds, and its antialiased linear
differs from torch's by 2 % of the range.
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
"""The slope of cubic kernels, in torch as in OpenCV."""


def write_ensemble(nets: Sequence[Path], facts: OnnxMetadata, path: Path) -> None:
    """Write one ONNX file of the ``nets``' own.

    ``pixels`` uint8 (B, C, h, w) and ``size`` int64 (2), the height and width wanted, to ``probability`` float32
    (B, height, width), which is car from ``facts.cut`` on.
    """
    models = [onnx().load(net) for net in nets]
    graph = _Graph()
    pixels = graph.cast("pixels", np.float32)
    views = [TTATransform.parse(name) for name in facts.views]
    scaled = {scale: _scaled(graph, pixels, scale) for scale in dict.fromkeys(view.scale for view in views)}
    grow = {scale: _add_upsampling(graph, sees) for scale, sees in scaled.items()}

    def says(number: int, view: TTATransform) -> str:
        """Add a net that looks at a view, and return its probability at full size."""
        sees = _flipped(graph, scaled[view.scale]) if view.hflip else scaled[view.scale]
        logits = graph.net(models[number], number, sees)
        return _probability(graph, grow[view.scale](_flipped(graph, logits) if view.hflip else logits))

    means = [graph.mean([says(number, view) for view in views]) for number in range(len(models))]
    graph.add("Identity", _merged(graph, means, facts), name="probability")
    save(graph.model(facts.input.channel_count, models[0].ir_version), facts, path)


class _Graph:
    """A graph that is being written; values are known by their names."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def add(self, operator: str, *inputs: str, name: str = "", **attributes: Any) -> str:
        """Add a node, and return the name of what it gives."""
        name = name or f"{operator}_{len(self.nodes)}"
        self.nodes.append(onnx().helper.make_node(operator, list(inputs), [name], name=name, **attributes))
        return name

    def constant(self, values: Any, dtype: type[np.generic] = np.float32) -> str:
        """Return the name of a constant."""
        array = np.asarray(values, dtype)
        name = f"{array.dtype}_{array.ravel().tolist()}_{array.ndim}"
        self.constants[name] = onnx().numpy_helper.from_array(array, name)
        return name

    def cast(self, value: str, dtype: type[np.generic]) -> str:
        """Add a conversion to another type."""
        return self.add("Cast", value, to=onnx().helper.np_dtype_to_tensor_dtype(np.dtype(dtype)))

    def mean(self, values: Sequence[str]) -> str:
        """Add the mean of several values of one shape."""
        return self.add("Mean", *values)

    def net(self, model: Any, number: int, pixels: str) -> str:
        """Add a copy of a net's graph, whose weights it shares with those before it, and return its logits."""
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


def _flipped(graph: _Graph, raster_BCHW: str) -> str:
    numbers = [graph.constant([value], np.int64) for value in (-1, np.iinfo(np.int64).min, 3, -1)]
    return graph.add("Slice", raster_BCHW, *numbers)


def _scaled(graph: _Graph, pixels_BCHW: str, scale: float) -> str:
    """As ``View.apply`` scales: bilinear, antialiased."""
    if scale == 1.0:
        return pixels_BCHW

    def weights(axis: int) -> str:
        side = _side(graph, pixels_BCHW, axis)
        wanted = graph.add("Round", graph.add("Mul", side, graph.constant(scale, np.float64)))
        wanted = graph.add("Max", wanted, graph.constant(1, np.float64))
        ratio = graph.add("Div", side, wanted)
        distance = _distances(graph, side, wanted)
        # Where the picture shrinks, a pixel is the mean of all those below it.
        wide = graph.add("Max", ratio, graph.constant(1, np.float64))
        near = graph.add("Sub", graph.constant(1, np.float64), graph.add("Abs", graph.add("Div", distance, wide)))
        near = graph.add("Max", near, graph.constant(0, np.float64))
        return graph.add("Div", near, graph.add("ReduceSum", near, graph.constant([1], np.int64)))

    return _resized(graph, pixels_BCHW, weights(2), weights(3))


def _add_upsampling(graph: _Graph, sees_BCHW: str) -> Callable[[str], str]:
    """As ``rasters.grow_raster``: return what grows logits of the size of ``sees`` to the size that is wanted."""

    def weights(axis: int) -> str:
        side = _side(graph, sees_BCHW, axis)
        wanted = graph.add("Gather", "size", graph.constant(axis - 2, np.int64))
        distance = _distances(graph, side, graph.cast(wanted, np.float64), margin=2)
        return _cubic(graph, graph.add("Abs", distance))

    rows, columns = weights(2), weights(3)
    margin = graph.constant([0, 0, 2, 2, 0, 0, 2, 2], np.int64)

    def grow(logits_B1hw: str) -> str:
        clamped = graph.add("Clip", logits_B1hw, graph.constant(-LOGIT_CLAMP), graph.constant(LOGIT_CLAMP))
        grown = _resized(graph, graph.add("Pad", clamped, margin, mode="edge"), rows, columns)
        return graph.add("Squeeze", grown, graph.constant([1], np.int64))

    return grow


def _cubic(graph: _Graph, x: str) -> str:
    """The kernel of cubic interpolation, at distances ``x`` of 0 and more."""

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


def _side(graph: _Graph, raster_BCHW: str, axis: int) -> str:
    side = graph.add("Shape", raster_BCHW, start=axis, end=axis + 1)
    return graph.cast(graph.add("Squeeze", side), np.float64)


def _distances(graph: _Graph, side: str, wanted: str, margin: int = 0) -> str:
    """How far each of ``wanted`` pixels is from each of ``side`` and those of a margin: (wanted, side), in the latter.

    In float64: at the far end of a picture, float32 would be off by a thousandth of a pixel.
    """
    zero, one, half = (graph.constant(value, np.float64) for value in (0, 1, 0.5))
    to = graph.add("Mul", graph.add("Add", graph.add("Range", zero, wanted, one), half), graph.add("Div", side, wanted))
    until = graph.add("Add", side, graph.constant(margin, np.float64))
    fro = graph.add("Add", graph.add("Range", graph.constant(-margin, np.float64), until, one), half)
    return graph.add("Sub", graph.add("Unsqueeze", to, graph.constant([1], np.int64)), fro)


def _resized(graph: _Graph, raster_BCHW: str, rows: str, columns: str) -> str:
    tall = graph.add("MatMul", graph.cast(rows, np.float32), raster_BCHW)
    return graph.add("MatMul", tall, graph.add("Transpose", graph.cast(columns, np.float32), perm=[1, 0]))


def _probability(graph: _Graph, logits: str) -> str:
    """As ``rasters.probability``."""
    half, stretch = graph.constant(0.5), graph.constant(0.5 / np.tanh(LOGIT_CLAMP / 2))
    stretched = graph.add("Mul", graph.add("Tanh", graph.add("Mul", logits, half)), stretch)
    return graph.add("Clip", graph.add("Add", stretched, half), graph.constant(0), graph.constant(1))


def _merged(graph: _Graph, means: Sequence[str], facts: OnnxMetadata) -> str:
    """As ``ensemble.Merge``, in floats: the mean of nets that all count as much."""
    if facts.merge == "majority_vote":
        threshold = graph.constant(facts.threshold)
        return graph.mean([graph.cast(graph.add("GreaterOrEqual", p, threshold), np.float32) for p in means])
    if facts.merge == "mean_logit" and len(means) > 1:
        least = 0.5 / (MAX_LEVEL * len(facts.views))  # what rounds to certain is half a level from it
        bounds = graph.constant(least), graph.constant(1 - least)
        logits = [_logit(graph, graph.add("Clip", p, *bounds)) for p in means]
        return graph.add("Sigmoid", graph.mean(logits))
    return graph.mean(means)


def _logit(graph: _Graph, p: str) -> str:
    return graph.add("Sub", graph.add("Log", p), graph.add("Log", graph.add("Sub", graph.constant(1), p)))
