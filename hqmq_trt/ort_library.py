"""The ONNX Runtime operator library (plugins/ort): finding it, checking it, making sessions with it.

The library is ``libhqmq_ort.so`` in the folder named by the environment variable HQMQ_LIBRARY_DIR, or else in
``hqmq_trt/_lib``.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnxruntime as ort

from hqmq_trt.errors import HqmqError
from hqmq_trt.format import FORMAT_VERSION
from hqmq_trt.library_files import library_path

ORT_LIBRARY = "libhqmq_ort.so"
_REBUILD = "rebuild it with: pip install ."


@lru_cache(maxsize=4)
def _checked(path: Path, expected_format: int) -> str:
    try:
        lib = ctypes.CDLL(str(path))
        lib.hqmq_ort_version.restype = ctypes.c_char_p
        lib.hqmq_ort_format_version.restype = ctypes.c_int32
        found, version = lib.hqmq_ort_format_version(), lib.hqmq_ort_version().decode()
    except (OSError, AttributeError) as error:
        raise HqmqError(f"cannot load ONNX Runtime library {path} ({error}); {_REBUILD}") from None
    if found != expected_format:
        raise HqmqError(
            f"ONNX Runtime library {path} is built for format version {found}, this package needs {expected_format}; "
            f"{_REBUILD}"
        )
    return str(version)


def library_version() -> str:
    """Version of the operator library.

    Raises:
        HqmqError: missing, foreign, or built for another format version.
    """
    return _checked(library_path(ORT_LIBRARY), FORMAT_VERSION)


def register(options: ort.SessionOptions) -> None:
    """Register the operators of domain com.hqmq with the options of a session.

    Raises:
        HqmqError: the library is missing, foreign or built for another format version, or ONNX Runtime refuses it.
    """
    library_version()
    path = library_path(ORT_LIBRARY)
    try:
        options.register_custom_ops_library(str(path))
    except Exception as error:  # ONNX Runtime raises a type per status code, with no base of their own
        raise HqmqError(f"ONNX Runtime {ort.__version__} refuses {path}: {' '.join(str(error).split())}") from error


def session(
    model: str | Path | bytes,
    providers: Sequence[str] = ("CPUExecutionProvider",),
    threads: int = 0,
    log_severity: int = 3,
    **options: Any,
) -> ort.InferenceSession:
    """An ONNX Runtime session with our operators.

    Args:
        model: path of a model, or its bytes.
        providers: execution providers, by name.
        threads: intra-op threads; 0 leaves it to ONNX Runtime.
        log_severity: 0 verbose … 4 fatal.
        options: further attributes of onnxruntime.SessionOptions, by name.

    Raises:
        HqmqError: a library that does not fit (see :func:`register`), an unknown option, a missing file, or a model
            ONNX Runtime refuses.
    """
    if threads < 0:
        raise HqmqError(f"threads {threads} is negative; 0 lets ONNX Runtime choose")
    chosen = ort.SessionOptions()
    chosen.intra_op_num_threads = threads
    chosen.log_severity_level = log_severity
    for name, value in options.items():
        if not hasattr(chosen, name):
            raise HqmqError(f"onnxruntime.SessionOptions has no option '{name}'")
        setattr(chosen, name, value)
    register(chosen)
    if not isinstance(model, bytes) and not Path(model).is_file():
        raise HqmqError(f"model {model} does not exist")
    source = model if isinstance(model, bytes) else str(model)
    try:
        return ort.InferenceSession(source, chosen, providers=list(providers))
    except Exception as error:  # see register
        where = "the model" if isinstance(model, bytes) else str(model)
        raise HqmqError(f"{where}: ONNX Runtime cannot load it: {' '.join(str(error).split())}") from error
