"""Opening an engine folder: what is checked before TensorRT gets to see a plan, and TensorRT's own log."""

from __future__ import annotations

import hashlib
import logging
import mmap
from collections import deque
from functools import lru_cache
from pathlib import Path
from typing import Any

from hqmq_trt.engine.manifest import PLAN_FILE, EngineManifest
from hqmq_trt.errors import HqmqError
from hqmq_trt.runtime.cuda_driver import Device

_LOG = logging.getLogger("hqmq_trt.tensorrt")


def tensorrt() -> Any:
    """The module tensorrt.

    Raises:
        HqmqError: it is not installed, or its libraries are missing.
    """
    try:
        import tensorrt as trt
    except ModuleNotFoundError as error:
        raise HqmqError(f"TensorRT is not installed ({error}); pip install 'hqmq-trt[tensorrt]'") from None
    except (ImportError, OSError) as error:
        text = " ".join(str(error).split())
        raise HqmqError(f"TensorRT's libraries cannot be loaded ({text}); check LD_LIBRARY_PATH") from None
    return trt


def tensorrt_library() -> Path:
    """The libnvinfer that `tensorrt` has loaded: what other programs link to run this machine's engines.

    Raises:
        HqmqError: as `tensorrt`; or no such file is mapped.
    """
    tensorrt()
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        path = Path(line.split(maxsplit=5)[-1])
        if path.name.startswith("libnvinfer.so"):
            return path
    raise HqmqError("TensorRT is loaded, but no file libnvinfer.so is mapped")


@lru_cache(maxsize=1)
def trt_log() -> Any:
    """TensorRT's logger, one a process, as TensorRT keeps the first it gets. Errors are kept for `take_errors`;
    everything goes to the Python logger ``hqmq_trt.tensorrt``."""
    trt = tensorrt()
    levels = {
        trt.ILogger.Severity.INTERNAL_ERROR: logging.DEBUG,  # errors become exceptions of ours
        trt.ILogger.Severity.ERROR: logging.DEBUG,
        trt.ILogger.Severity.WARNING: logging.INFO,
        trt.ILogger.Severity.INFO: logging.DEBUG,
        trt.ILogger.Severity.VERBOSE: logging.DEBUG,
    }
    worst = (trt.ILogger.Severity.INTERNAL_ERROR, trt.ILogger.Severity.ERROR)

    class Log(trt.ILogger):  # type: ignore[name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.errors: deque[str] = deque(maxlen=16)

        def log(self, severity: Any, message: str) -> None:
            if severity in worst:
                self.errors.append(" ".join(message.split()))
            _LOG.log(levels.get(severity, logging.DEBUG), "%s", message)

    return Log()


def take_errors() -> str:
    """TensorRT's first errors since the last call, in one line."""
    errors: deque[str] = trt_log().errors
    text = "; ".join(list(errors)[:2]) or "TensorRT gave no reason"
    errors.clear()
    return text[:500]


def load_engine(folder: Path, manifest: EngineManifest, device: Device, verify: bool) -> tuple[Any, Any]:
    """(runtime, engine) of an engine folder. The runtime must outlive the engine.

    Args:
        verify: compare the sha256 of the plan; TensorRT itself does not notice damaged weights.

    Raises:
        HqmqError: another TensorRT version or GPU, a missing or foreign plugin library, a damaged plan, or too
            little device memory.
    """
    from hqmq_trt.engine.plugin_library import load_plugin_library
    from hqmq_trt.engine.refit import refit_engine

    trt = tensorrt()
    manifest.check_runtime(str(trt.__version__), device.compute_capability)
    with device:
        log = trt_log()
        log.errors.clear()
        load_plugin_library(log)
        path = folder / PLAN_FILE
        with _mapped(path) as plan:
            _check_plan(path, plan, manifest, verify)
            runtime = trt.Runtime(log)
            if manifest.lean_runtime:
                runtime.engine_host_code_allowed = True  # the plan brings code of its own
            try:
                engine = runtime.deserialize_cuda_engine(plan)
            except Exception as error:  # a binding raises TypeError and its own types
                raise HqmqError(f"{path}: TensorRT cannot read it ({error}); build the engine again") from error
        if engine is None:
            reason = take_errors()
            if "outofmemory" in reason.lower().replace(" ", ""):
                raise HqmqError(device.out_of_memory(f"the engine {path}", path.stat().st_size))
            raise HqmqError(f"{path}: TensorRT refuses it ({reason}); build the engine again with `hqmq-trt build`")
        if manifest.weight_stripped:
            refit_engine(engine, folder, manifest)
    return runtime, engine


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except (OSError, ValueError) as error:
        raise HqmqError(f"{path}: cannot be read ({error}); build the engine again with `hqmq-trt build`") from None


def _check_plan(path: Path, plan: mmap.mmap, manifest: EngineManifest, verify: bool) -> None:
    if len(plan) != manifest.plan_size:
        raise HqmqError(
            f"{path}: has {len(plan)} bytes, engine.json says {manifest.plan_size}: it was cut off or exchanged; "
            "build the engine again with `hqmq-trt build`"
        )
    if verify and hashlib.sha256(plan).hexdigest() != manifest.plan_sha256:
        raise HqmqError(f"{path}: sha256 differs from engine.json: it is damaged; build the engine again")
