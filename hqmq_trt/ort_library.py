"""The ONNX Runtime operator library (plugins/ort): finding it, checking it, making sessions with it.

The library is ``libhqmq_ort.so`` in the folder named by the environment variable HQMQ_LIBRARY_DIR, or else in
``hqmq_trt/_lib``. On a GPU (CUDAExecutionProvider, of the package onnxruntime-gpu) it runs ``libhqmq_cuda.so``, which
it expects beside it.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import re
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnxruntime as ort

from hqmq_trt.errors import HqmqError
from hqmq_trt.format import FORMAT_VERSION
from hqmq_trt.library_files import library_path

ORT_LIBRARY = "libhqmq_ort.so"
CPU = "CPUExecutionProvider"
CUDA = "CUDAExecutionProvider"
TENSORRT = "TensorrtExecutionProvider"

Provider = str | tuple[str, Mapping[str, object]]
"""An execution provider's name, perhaps with its options."""

_REBUILD = "rebuild it with: pip install ."
_GPU_PACKAGE = "install onnxruntime-gpu instead of onnxruntime (the extra hqmq-trt[gpu])"
# float32 models are multiplied in float32, not in TF32, whose products have 10 bits.
_CUDA_OPTIONS = {"device_id": "0", "use_tf32": "0"}


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


def providers(name: str) -> list[Provider]:
    """Execution providers for ``cpu`` or ``cuda``; nodes that CUDA cannot take run on the CPU.

    Raises:
        HqmqError: another name.
    """
    if name == "cpu":
        return [CPU]
    if name == "cuda":
        return [(CUDA, _CUDA_OPTIONS), CPU]
    raise HqmqError(f"provider '{name}' is none of: cpu, cuda")


def check_cuda() -> None:
    """Refuse a machine on which the operators cannot run on the CUDA execution provider.

    Raises:
        HqmqError: an ONNX Runtime without CUDA, or libhqmq_cuda.so is missing or of another version.
    """
    if CUDA not in ort.get_available_providers():
        raise HqmqError(f"ONNX Runtime {ort.__version__} here has no {CUDA}; {_GPU_PACKAGE}")
    library_version()
    problem = ctypes.CDLL(str(library_path(ORT_LIBRARY))).hqmq_ort_cuda_problem
    problem.restype = ctypes.c_char_p
    if why := problem():
        raise HqmqError(why.decode())


def _preload_cuda() -> str:
    """Load CUDA and cuDNN from NVIDIA's packages where there are any; names of libraries not found, or nothing."""
    said = io.StringIO()  # preload_dlls prints
    with contextlib.redirect_stdout(said):
        ort.preload_dlls()
    return ", ".join(re.findall(r"Failed to load (\S+):", said.getvalue()))


def session(
    model: str | Path | bytes,
    providers: Sequence[Provider] = (CPU,),
    threads: int = 0,
    log_severity: int = 3,
    **options: Any,
) -> ort.InferenceSession:
    """An ONNX Runtime session with our operators.

    Args:
        model: path of a model, or its bytes.
        providers: execution providers, by name or as (name, options), in order of preference.
        threads: intra-op threads; 0 leaves it to ONNX Runtime.
        log_severity: 0 verbose … 4 fatal.
        options: further attributes of onnxruntime.SessionOptions, by name.

    Raises:
        HqmqError: a library that does not fit (see :func:`register`), an unknown option, a missing file, a model
            ONNX Runtime refuses, or a provider that is missing or does not start: there is no silent fallback.
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
    names = [provider if isinstance(provider, str) else provider[0] for provider in providers]
    for name in names:
        if name not in ort.get_available_providers():
            raise HqmqError(f"ONNX Runtime {ort.__version__} here has no {name}; {_GPU_PACKAGE}")
    if CUDA in names:
        check_cuda()
    missing = _preload_cuda() if {CUDA, TENSORRT} & set(names) else ""
    try:
        made = ort.InferenceSession(source, chosen, providers=list(providers), enable_fallback=0)
    except Exception as error:  # see register
        where = "the model" if isinstance(model, bytes) else str(model)
        raise HqmqError(f"{where}: ONNX Runtime cannot load it: {' '.join(str(error).split())}") from error
    for name in names:
        if name not in made.get_providers():
            why = f"not found: {missing}" if missing else "its log on stderr says more"
            raise HqmqError(
                f"ONNX Runtime {ort.__version__} could not start {name} ({why}); put CUDA and cuDNN on "
                f"LD_LIBRARY_PATH, or use {CPU}"
            )
    return made
