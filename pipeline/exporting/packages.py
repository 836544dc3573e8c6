"""Packages of the extra ``export``, imported where they are used."""

from importlib import import_module
from typing import Any

from pipeline.errors import CarvanaError


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
