"""A predictor on ONNX Runtime; needs no torch."""

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
from pipeline.errors import CarvanaError
from pipeline.inference.base_predictor import BUILTIN_TTA, BasePredictor
from pipeline.models.resize import quantize_logits, quantize_probabilities, upsample_logits
from pipeline.models.tta import TTATransform
from pipeline.utils.arrays import Float32Array, UInt8Array
from pipeline.utils.parallel import available_cpus


def require_onnx() -> None:
    """Raise CarvanaError where a package is missing that writing ONNX files, or checking them, takes."""
    for name in ("onnx", "onnxscript", "onnxruntime"):
        _package(name)


def require_quantization() -> None:
    """Raise CarvanaError where a package is missing that ONNX files in 8-bit integers take."""
    require_onnx()
    quantization()


def onnx() -> Any:
    """Return the package that writes ONNX files; raises CarvanaError where it is not installed."""
    return _package("onnx")


def onnxruntime() -> Any:
    """Return the package that runs ONNX files; raises CarvanaError where it is not installed."""
    return _package("onnxruntime")


def quantization() -> Any:
    """Return onnxruntime's tools for 8-bit integers; raises CarvanaError where a package is not installed."""
    onnx()
    return _package("onnxruntime.quantization")


def _package(name: str) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise CarvanaError(f"{name} is needed, which can't be imported ({error}): pip install '.[export]'.") from error


KEY = "carvana"
"""The one entry of ONNX's ``metadata_props`` that is ours: JSON."""


class OnnxMetadata(StrictModel):
    """What a file is made of, and what it wants."""

    kind: Literal["net", "ensemble"]
    """``net``: float pixels to logits at their size. ``ensemble``: uint8 pixels to probabilities at any size."""

    model: str
    """Name of the model in params.yaml."""

    folds: tuple[int, ...]
    """Whose nets are in it."""

    input: InputSettings
    """What a net wants to see."""

    views: tuple[str, ...] = ("identity",)
    """What an ensemble looks at by itself."""

    merge: str = "mean_probability"
    """How an ensemble merges its nets."""

    threshold: float = 0.5
    """Probability from which on a pixel is car."""

    @property
    def decision_threshold(self) -> float:
        """From which of the file's own probabilities on a pixel is car: those of a vote are shares of nets."""
        return 0.5 if self.merge == "majority_vote" else self.threshold

    def metadata(self) -> dict[str, str]:
        """Return them as ``metadata_props``."""
        return {KEY: self.model_dump_json()}

    @classmethod
    def of(cls, metadata: Mapping[str, str]) -> "OnnxMetadata | None":
        """Return the facts in ``metadata_props``, or None where there are none that can be read."""
        try:
            return cls.model_validate_json(metadata[KEY])
        except (KeyError, ValidationError):
            return None


class OnnxPredictor(BasePredictor):
    """An ONNX export, loaded once.

    What it wants to see stands in the file's own metadata. Raises CarvanaError if there is no such file, if it is no
    export of this pipeline, or if onnxruntime is not installed.
    """

    def __init__(self, path: Path, *, views: Sequence[str] = ("identity",), threads: int | None = None) -> None:
        self.path = path
        self._session = _session(path, threads or available_cpus())
        facts = OnnxMetadata.of(self._session.get_modelmeta().custom_metadata_map)
        if facts is None:
            raise CarvanaError(f"{path} does not say what it wants to see: make it with 'carvana export'.")
        self.facts = facts
        self.input = facts.input
        if facts.kind == "ensemble":
            self.views, self._views, self.default_threshold = (
                [BUILTIN_TTA],
                list[TTATransform](),
                facts.decision_threshold,
            )
        else:
            self.views, self._views = list(views), [TTATransform.parse(name) for name in views]

    def with_tta(self, views: Sequence[str]) -> Self:
        """Return the same export, without loading it again, that looks at other views; an ensemble's own stay."""
        other = copy.copy(self)
        if self.facts.kind != "ensemble":
            other.views, other._views = list(views), [TTATransform.parse(name) for name in views]
        return other

    def predict_u8(self, inputs: list[UInt8Array], height: int, width: int) -> UInt8Array:
        """Return what ``Speaker.levels`` does; an ensemble's file has one view."""
        return np.stack(self.predict_u8_at_sizes(inputs, [(height, width)] * len(inputs)))

    def predict_u8_at_sizes(self, inputs: list[UInt8Array], sizes: Sequence[tuple[int, int]]) -> list[UInt8Array]:
        """Return what ``Speaker.levels_at`` does."""
        if self.facts.kind == "ensemble":
            # One by one: a raster of probabilities is large, and pictures may differ in size.
            return [
                quantize_probabilities(self.probability([pixels], *size))
                for pixels, size in zip(inputs, sizes, strict=True)
            ]
        logits_VBhw = [self._predict_float(view, _batch(inputs).astype(np.float32)) for view in self._views]
        return [
            np.stack([quantize_logits(upsample_logits(logits_Bhw[number], *size)) for logits_Bhw in logits_VBhw])
            for number, size in enumerate(sizes)
        ]

    def logits(self, pixels_BCHW: NDArray[np.float32]) -> Float32Array:
        """Return what a net's file says of floating pixels from 0 to 255: float32 (B, 1, H, W)."""
        return self._run({"pixels": pixels_BCHW})

    def probability(self, inputs: list[UInt8Array], height: int, width: int) -> NDArray[np.float32]:
        """Return what an ensemble's file says of prepared pictures of one size: float32 (B, height, width)."""
        wanted = {"pixels": _batch(inputs), "size": np.asarray([height, width], np.int64)}
        return self._run(wanted, sparing=height * width > HEIGHT * WIDTH)

    def _predict_float(self, view: TTATransform, pixels_BCHW: NDArray[np.float32]) -> Float32Array:
        """Return logits (B, H, W) of a view, the right way round and at its size."""
        logits_BHW = self.logits(_apply_view(view, pixels_BCHW))[:, 0]
        return np.ascontiguousarray(logits_BHW[..., ::-1]) if view.hflip else logits_BHW

    def _run(self, inputs: dict[str, Any], *, sparing: bool = False) -> NDArray[np.float32]:
        """Run the file; ``sparing`` gives back what rasters took, which onnxruntime else keeps for the next ones."""
        options = onnxruntime().RunOptions()
        if sparing:
            options.add_run_config_entry("memory.enable_memory_arena_shrinkage", "cpu:0")
        said: NDArray[np.float32] = self._session.run(None, inputs, options)[0]
        if not np.isfinite(said).all():
            raise CarvanaError(f"{self.path} gives no finite numbers: export it again with 'carvana export'.")
        return said


def _session(path: Path, threads: int) -> Any:
    runtime = onnxruntime()
    if not path.is_file():
        raise CarvanaError(f"There is no {path}: make it with 'carvana export'.")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # other programs may want the cores
    options.log_severity_level = 3  # of warnings, none is for who runs a file
    try:
        return runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors are of many types, with nothing else in common
        raise CarvanaError(f"{path} can't be run as ONNX ({' '.join(str(error).split())[:300]}).") from error


def _batch(inputs: list[UInt8Array]) -> UInt8Array:
    return np.ascontiguousarray(np.stack(inputs).transpose(0, 3, 1, 2))


def _apply_view(view: TTATransform, pixels_BCHW: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return pixels as a view sees them, as ``View.apply`` does."""
    height, width = pixels_BCHW.shape[-2:]
    if view.scale != 1.0:
        tall, wide = view.size(height, width)
        pixels_BCHW = np.asarray(_bilinear(height, tall) @ pixels_BCHW @ _bilinear(width, wide).T, np.float32)
    return np.ascontiguousarray(pixels_BCHW[..., ::-1]) if view.hflip else pixels_BCHW


def _bilinear(side: int, wanted: int) -> NDArray[np.float32]:
    """Return how much each of ``side`` pixels counts in each of those wanted, (wanted, side): antialiased."""
    ratio = side / wanted
    distance = (np.arange(wanted)[:, None] + 0.5) * ratio - (np.arange(side) + 0.5)
    near = np.maximum(0, 1 - np.abs(distance / max(ratio, 1)))
    return np.asarray(near / near.sum(axis=1, keepdims=True), np.float32)
