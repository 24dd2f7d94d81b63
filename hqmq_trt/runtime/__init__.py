"""Runtimes: an exported folder or an engine folder as a Session, and generation on top of it."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqmq_trt.engine.manifest import EngineManifest
from hqmq_trt.runtime.generate import Completion, Generation, Request, Timing, generate
from hqmq_trt.runtime.sampling import Sampler, Sampling
from hqmq_trt.runtime.session import DEFAULT_CONTEXT, DEFAULT_PREFILL_CHUNK, Session

if TYPE_CHECKING:
    from hqmq_trt.runtime.ort_session import OrtSession
    from hqmq_trt.runtime.trt_session import TrtSession

__all__ = [
    "DEFAULT_PREFILL_CHUNK",
    "Completion",
    "Generation",
    "OrtSession",
    "Request",
    "Sampler",
    "Sampling",
    "Session",
    "Timing",
    "TrtSession",
    "generate",
    "open_session",
]


def open_session(
    folder: str | Path,
    max_batch: int | None = None,
    max_context: int | None = None,
    prefill_chunk: int | None = None,
    threads: int = 0,
) -> Session:
    """A session on what the folder holds: OrtSession for an exported model, TrtSession for an engine.

    Args:
        folder: what `hqmq-trt export` or `hqmq-trt build` wrote.
        max_batch, max_context, prefill_chunk: see Session; by default the engine's limits, or OrtSession's defaults.
        threads: of ONNX Runtime; an engine has no use for it.

    Raises:
        HqmqError: as the session's own constructor.
    """
    if EngineManifest.is_engine(folder):
        from hqmq_trt.runtime.trt_session import TrtSession

        return TrtSession(folder, max_batch, max_context, prefill_chunk)
    from hqmq_trt.runtime.ort_session import OrtSession

    return OrtSession(
        folder,
        1 if max_batch is None else max_batch,
        DEFAULT_CONTEXT if max_context is None else max_context,
        DEFAULT_PREFILL_CHUNK if prefill_chunk is None else prefill_chunk,
        threads,
    )


def __getattr__(name: str) -> Any:
    # A runtime's package is imported only when that runtime is used.
    if name == "OrtSession":
        from hqmq_trt.runtime.ort_session import OrtSession

        return OrtSession
    if name == "TrtSession":
        from hqmq_trt.runtime.trt_session import TrtSession

        return TrtSession
    raise AttributeError(name)
