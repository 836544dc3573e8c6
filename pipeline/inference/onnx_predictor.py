"""Run ONNX exports with ONNX Runtime; needs no torch."""

import copy
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from pipeline.competition.image_ids import HEIGHT, WIDTH
from pipeline.config import InputSettings, StrictModel
from pipeline.errors import CarvanaError, is_out_of_memory
from pipeline.inference.base_predictor import BUILTIN_TTA, BasePredictor
from pipeline.models.resize import quantize_probabilities, upsample_and_quantize
from pipeline.models.tta import TTATransform
from pipeline.utils.arrays import Float32Array, UInt8Array
from pipeline.utils.parallel import available_cpus


def require_onnx() -> None:
    """Raise CarvanaError if a package that writes, checks or runs ONNX files is not installed."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _package(name)


def require_quantization() -> None:
    """Raise CarvanaError if a package that quantizes ONNX files to 8-bit integers is not installed."""
    require_onnx()
    quantization()


def onnx() -> Any:
    """Return the package ``onnx``, which writes ONNX files; raises CarvanaError if it is not installed."""
    return _package("onnx")


def onnxruntime() -> Any:
    """Return the package ``onnxruntime``, which runs ONNX files; raises CarvanaError if it is not installed."""
    return _package("onnxruntime")


def quantization() -> Any:
    """Return ``onnxruntime.quantization``; raises CarvanaError if it or ``onnx`` is not installed."""
    onnx()
    return _package("onnxruntime.quantization")


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise CarvanaError(f"{name} can't be imported ({error}). Run pip install '.[export]'.") from error


METADATA_KEY = "carvana"
"""Key in ONNX's ``metadata_props`` whose value is ``OnnxMetadata`` as JSON."""


class OnnxMetadata(StrictModel):
    """Contents of an ONNX export and the form of its input."""

    kind: Literal["net", "ensemble"]
    """``net``: float pixels to logits at their size. ``ensemble``: uint8 pixels to probabilities at any size."""

    model: str
    """Name of the model in params.yaml."""

    folds: tuple[int, ...]
    """Folds whose nets are in the file."""

    input: InputSettings
    """Size and channels of the nets' input."""

    views: tuple[str, ...] = ("identity",)
    """TTA views that an ensemble applies itself."""

    merge: str = "mean_probability"
    """How an ensemble merges its nets."""

    threshold: float = 0.5
    """Probability from which a pixel is foreground."""

    @property
    def decision_threshold(self) -> float:
        """Threshold on the file's output; a majority vote outputs the share of nets, whose threshold is 0.5."""
        return 0.5 if self.merge == "majority_vote" else self.threshold

    def to_props(self) -> dict[str, str]:
        """Return an entry for ``metadata_props``."""
        return {METADATA_KEY: self.model_dump_json()}

    @classmethod
    def from_props(cls, props: Mapping[str, str]) -> "OnnxMetadata | None":
        """Return the metadata in ``metadata_props``, or None if it is missing or not valid."""
        try:
            return cls.model_validate_json(props[METADATA_KEY])
        except (KeyError, ValidationError):
            return None


class OnnxPredictor(BasePredictor):
    """An ONNX export, which contains the form of its input as metadata.

    Raises CarvanaError if the file does not exist, if it is not an export of this pipeline, or if onnxruntime is not
    installed.
    """

    def __init__(self, path: Path, *, views: Sequence[str] = ("identity",), threads: int | None = None) -> None:
        self.path = path
        self._session = _session(path, threads or available_cpus())
        metadata = OnnxMetadata.from_props(self._session.get_modelmeta().custom_metadata_map)
        if metadata is None:
            raise CarvanaError(f"{path} has no valid metadata of this pipeline. Export it with 'carvana export'.")
        self.metadata = metadata
        self.input = metadata.input
        if metadata.kind == "ensemble":
            self.views, self._views = [BUILTIN_TTA], list[TTATransform]()
            self.default_threshold = metadata.decision_threshold
        else:
            self.views, self._views = list(views), [TTATransform.parse(name) for name in views]

    def with_tta(self, views: Sequence[str]) -> Self:
        """Return the same export, without loading it again, with other views; an ensemble keeps its own."""
        other = copy.copy(self)
        if self.metadata.kind != "ensemble":
            other.views, other._views = list(views), [TTATransform.parse(name) for name in views]
        return other

    def predict_u8(self, inputs: list[UInt8Array], height: int, width: int) -> UInt8Array:
        """Return probabilities as ``BasePredictor.predict_u8`` says; an ensemble has one view."""
        return np.stack(self.predict_u8_at_sizes(inputs, [(height, width)] * len(inputs)))

    def predict_u8_at_sizes(self, inputs: list[UInt8Array], sizes: Sequence[tuple[int, int]]) -> list[UInt8Array]:
        """Return probabilities as ``BasePredictor.predict_u8_at_sizes`` says; an ensemble has one view."""
        if self.metadata.kind == "ensemble":
            # One by one: full-size probabilities are large, and the images may differ in size.
            return [
                quantize_probabilities(self.probability([pixels], *size))
                for pixels, size in zip(inputs, sizes, strict=True)
            ]
        logits_VBhw = [self._predict_float(view, _batch(inputs).astype(np.float32)) for view in self._views]
        return [
            np.stack([upsample_and_quantize(logits_Bhw[number], *size) for logits_Bhw in logits_VBhw])
            for number, size in enumerate(sizes)
        ]

    def logits(self, pixels_BCHW: NDArray[np.float32]) -> Float32Array:
        """Return the logits of a net, float32 (B, 1, H, W), for floating pixels (B, C, H, W) from 0 to 255."""
        return self._run({"pixels": pixels_BCHW})

    def probability(self, inputs: list[UInt8Array], height: int, width: int) -> NDArray[np.float32]:
        """Return the probabilities of an ensemble, float32 (B, height, width), for preprocessed images of one size."""
        feeds = {"pixels": _batch(inputs), "size": np.asarray([height, width], np.int64)}
        return self._run(feeds, free_memory=height * width > HEIGHT * WIDTH)

    def _predict_float(self, view: TTATransform, pixels_BCHW: NDArray[np.float32]) -> Float32Array:
        """Return logits (B, H, W) of a view at its own size, with its flip undone."""
        logits_BHW = self.logits(_apply_view(view, pixels_BCHW))[:, 0]
        return np.ascontiguousarray(logits_BHW[..., ::-1]) if view.hflip else logits_BHW

    def _run(self, feeds: dict[str, Any], *, free_memory: bool = False) -> NDArray[np.float32]:
        """Run the session; ``free_memory`` releases its memory afterwards, which onnxruntime otherwise keeps."""
        options = onnxruntime().RunOptions()
        if free_memory:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        output: NDArray[np.float32] = self._session.run(None, feeds, options)[0]
        if not np.isfinite(output).all():
            raise CarvanaError(f"The output of {self.path} is NaN or infinite. Export it again with 'carvana export'.")
        return output


def _session(path: Path, threads: int) -> Any:
    runtime = onnxruntime()
    if not path.is_file():
        raise CarvanaError(f"{path} not found. Create it with 'carvana export'.")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # leaves idle cores to other programs
    options.log_severity_level = 3  # errors only: users can't act on the warnings
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no common base class
        if is_out_of_memory(error):
            raise
        raise CarvanaError(f"{path} can't be run as ONNX ({' '.join(str(error).split())[:300]}).") from error


def _batch(inputs: list[UInt8Array]) -> UInt8Array:
    return np.ascontiguousarray(np.stack(inputs).transpose(0, 3, 1, 2))


def _apply_view(view: TTATransform, pixels_BCHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return transformed pixels, the same as ``TTATransform.augment`` in NumPy."""
    height, width = pixels_BCHW.shape[-2:]
    if view.scale != 1.0:
        view_height, view_width = view.size(height, width)
        rows, columns = _bilinear_matrix(height, view_height), _bilinear_matrix(width, view_width)
        pixels_BCHW = np.asarray(rows @ pixels_BCHW @ columns.T, np.float32)
    return np.ascontiguousarray(pixels_BCHW[..., ::-1]) if view.hflip else pixels_BCHW


def _bilinear_matrix(side: int, new_side: int) -> NDArray[np.float32]:
    """Return the matrix (new_side, side) that resizes ``side`` pixels: bilinear, antialiased."""
    ratio = side / new_side
    distance = (np.arange(new_side)[:, None] + 0.5) * ratio - (np.arange(side) + 0.5)
    weights = np.maximum(0, 1 - np.abs(distance / max(ratio, 1)))
    return np.asarray(weights / weights.sum(axis=1, keepdims=True), np.float32)
