"""Versions that matter when a result is to be repeated."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version

from hqmq_trt import __version__
from hqmq_trt.contract import PLUGIN_VERSION
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import FORMAT_VERSION

_PACKAGES = ("torch", "onnx", "onnxscript", "onnxruntime", "transformers", "polygraphy", "tensorrt")


def versions() -> dict[str, str | None]:
    """Version by name; None for a package that is not installed."""
    found: dict[str, str | None] = {
        "hqmq-trt": __version__,
        "format": str(FORMAT_VERSION),
        "plugin": PLUGIN_VERSION,
        "library": _library(),
        "plugins": _plugins(),
        "python": platform.python_version(),
    }
    for package in _PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = None
    return found


def _library() -> str | None:
    """Version of the ONNX Runtime operator library, or None when it is not built."""
    try:
        from hqmq_trt.ort_library import library_version

        return library_version()
    except (HqmqError, OSError):
        return None


def _plugins() -> str | None:
    """Version of the TensorRT plugin library, or None when it is not built."""
    try:
        from hqmq_trt.engine.plugin_library import plugin_library_version

        return plugin_library_version()
    except (HqmqError, OSError):
        return None
