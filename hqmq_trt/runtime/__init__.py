"""Runtimes: an exported folder as a Session, and generation on top of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from hqmq_trt.runtime.generate import Completion, Generation, Request, Timing, generate
from hqmq_trt.runtime.sampling import Sampler, Sampling
from hqmq_trt.runtime.session import DEFAULT_PREFILL_CHUNK, Session

if TYPE_CHECKING:
    from hqmq_trt.runtime.ort_session import OrtSession

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
    "generate",
]


def __getattr__(name: str) -> Any:
    # A runtime's package is imported only when that runtime is used.
    if name == "OrtSession":
        from hqmq_trt.runtime.ort_session import OrtSession

        return OrtSession
    raise AttributeError(name)
