"""The TensorRT plugin library (plugins/trt): finding it, checking it, loading it into TensorRT's registry."""

from __future__ import annotations

import ctypes
from functools import lru_cache
from pathlib import Path
from typing import Any

from hqmq_trt import __version__
from hqmq_trt.contract import ATTENTION, DEQUANTIZE, DOMAIN, PLUGIN_VERSION, QUANTIZE
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import FORMAT_VERSION
from hqmq_trt.library_files import LIBRARY_DIR_VARIABLE, library_path

TRT_LIBRARY = "libhqmq_trt.so"
_SOURCE_TREE = "0+unknown"
"""Version of a package that was not installed; then only the format tells whether the library fits."""
_REBUILD = f"rebuild it (docs/tensorrt.md), or set {LIBRARY_DIR_VARIABLE} to the folder of a fitting one"


def find_plugin_library() -> Path:
    """Path of the plugin library.

    Raises:
        HqmqError: there is none in the folder named by HQMQ_LIBRARY_DIR, or else in hqmq_trt/_lib.
    """
    try:
        return library_path(TRT_LIBRARY)
    except HqmqError as error:
        where = str(error).split(" is missing")[0].removeprefix("native library ")
        raise HqmqError(f"TensorRT plugin library {where} is missing; {_REBUILD}") from None


@lru_cache(maxsize=4)
def _checked(path: Path, expected_format: int, expected_version: str) -> tuple[str, str]:
    """(its version, version of the TensorRT headers it was compiled with)."""
    try:
        library = ctypes.CDLL(str(path))
        library.hqmq_trt_format_version.restype = ctypes.c_int32
        for name in ("hqmq_trt_version", "hqmq_trt_tensorrt_headers"):
            getattr(library, name).restype = ctypes.c_char_p
        found = int(library.hqmq_trt_format_version())
        version = library.hqmq_trt_version().decode()
        headers = library.hqmq_trt_tensorrt_headers().decode()
    except (OSError, AttributeError, UnicodeDecodeError) as error:
        raise HqmqError(f"{path}: is not a plugin library of hqmq-trt ({error}); {_REBUILD}") from None
    if found != expected_format:
        raise HqmqError(
            f"{path}: is built for format version {found}, this package needs {expected_format}; {_REBUILD}"
        )
    if expected_version not in (version, _SOURCE_TREE):
        raise HqmqError(f"{path}: is of hqmq-trt {version}, this package is {expected_version}; {_REBUILD}")
    return version, headers


def plugin_library_version() -> str:
    """Version of the plugin library and of its TensorRT headers, such as ``0.1.0 (TensorRT 10.14.1 headers)``.

    Raises:
        HqmqError: missing, foreign, or of another format or package version.
    """
    version, headers = _checked(find_plugin_library(), FORMAT_VERSION, __version__)
    return f"{version} (TensorRT {headers} headers)"


def load_plugin_library(trt_logger: Any) -> Path:
    """Load the plugin library into TensorRT's registry, once a process, and return its path.

    Args:
        trt_logger: the process's tensorrt.ILogger; what the registry says goes to it.

    Raises:
        HqmqError: the library is missing, foreign, or of another format or package version, or TensorRT refuses it.
    """
    import tensorrt as trt

    path = find_plugin_library()
    _checked(path, FORMAT_VERSION, __version__)
    registry = trt.get_plugin_registry()
    if _missing(registry):
        try:
            handle = registry.load_library(str(path))
        except Exception as error:  # pybind gives TensorRT's exceptions as it likes
            handle, reason = None, " ".join(str(error).split())
        else:
            reason = "see the log with --verbose"
        if handle is None or _missing(registry):
            trt_logger.log(trt.ILogger.Severity.ERROR, f"the plugin registry did not take {path}")
            raise HqmqError(f"TensorRT {trt.__version__} refuses the plugin library {path} ({reason}); {_REBUILD}")
    return path


def _missing(registry: Any) -> list[str]:
    """Our operators that the registry has no plugin for."""
    return [
        name for name in (QUANTIZE, DEQUANTIZE, ATTENTION) if registry.get_creator(name, PLUGIN_VERSION, DOMAIN) is None
    ]
