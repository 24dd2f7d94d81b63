"""Which kernel of libhqmq_cuda attends, for benchmarks and tests: ask, force the plain ones, or take memory away."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int32
from typing import Any

from torch import Tensor

from hqmq_trt import cuda, native
from hqmq_trt.errors import HqmqError
from hqmq_trt.native import RoleParams
from hqmq_trt.native_attention import AttentionParams
from hqmq_trt.scheme import ROLES, Scheme

PLAIN, DECODE, PREFILL = 0, 1, 2
"""enum hqmq_cuda_path of plugins/cuda/hqmq_cuda.h."""
NEVER, WHERE_FASTER, ALWAYS = 0, 1, 2
"""When the fused decode kernel cuts by work (hqmq_cuda_cut_by_work)."""
SHARED_MEMORY = {"99 KB": 101376, "163 KB": 166912, "227 KB": 232448}
"""Bytes that a block may have: of sm_86, 89 and 120; of sm_80 and 87; of sm_90 and 100."""


class DecodeMemory(Structure):
    """hqmq_cuda_decode_memory of plugins/cuda/hqmq_cuda.h: what a block of the fused decode kernel keeps."""

    head_dim: int
    columns: int
    compact: int
    built: int
    rings: int
    stages: int
    stage_tiles: int
    shared_states: int
    shared_bytes: int
    _fields_ = [
        *[(name, c_int32) for name in ("head_dim", "columns")],
        ("code_bits", c_int32 * 2),
        *[(name, c_int32) for name in ("compact", "built")],
        ("copies", c_int32 * 2),
        *[(name, c_int32) for name in ("rings", "stages", "stage_tiles", "shared_states", "shared_bytes")],
    ]


_ROLES = [POINTER(RoleParams)] * 2
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "hqmq_cuda_attention_path": (
        c_int,
        [POINTER(AttentionParams), *_ROLES, c_int32, POINTER(c_int32), POINTER(c_char_p)],
    ),
    "hqmq_cuda_use_plain_attention": (None, [c_int32]),
    "hqmq_cuda_limit_shared_memory": (None, [c_int32]),
    "hqmq_cuda_cut_by_work": (None, [c_int32]),
    "hqmq_cuda_decode_plan": (
        c_int,
        [POINTER(AttentionParams), *_ROLES, c_int32, POINTER(DecodeMemory), POINTER(c_char_p)],
    ),
}


def _function(name: str) -> Any:
    library = cuda.library()
    if not hasattr(library, name):
        raise HqmqError(f"libhqmq_cuda.so has no {name}: it is from before the fused kernels; {cuda.BUILD}")
    native.declare(library, {name: _SIGNATURES[name]})
    return getattr(library, name)


def attention_path(
    q: Tensor, k: Tensor, num_pages: int, scheme: Scheme, window: int = 0, softcap: float = 0.0
) -> tuple[int, str]:
    """The path of a call with q [B, Hq, T, D] and k [B, H, T, D], enum hqmq_cuda_path (0: plain); why not a faster."""
    batch, heads, tokens, dim = k.shape
    params = AttentionParams(batch, heads, q.shape[1] // heads, tokens, num_pages, window, dim**-0.5, softcap)
    roles = [native.role_params(scheme.role(name), dim, scheme.page_size) for name in ROLES]
    path, why = c_int32(), c_char_p()
    arguments = (byref(params), byref(roles[0]), byref(roles[1]), native.DTYPES[q.dtype], byref(path), byref(why))
    if _function("hqmq_cuda_attention_path")(*arguments):
        raise HqmqError(cuda.library().hqmq_cuda_last_error().decode())
    return path.value, (why.value or b"").decode()


def use_kernels(which: int) -> None:
    """From now on, calls of this process use 0 the fastest kernels, 1 the plain ones, 2 prefill without sm_90's."""
    _function("hqmq_cuda_use_plain_attention")(which)


@contextmanager
def plain_attention(on: bool = True) -> Iterator[None]:
    """While inside, calls of this process use the plain kernels; nothing if not `on`."""
    if not on:
        yield
        return
    use_kernels(1)
    try:
        yield
    finally:
        use_kernels(0)


def decode_plan(
    scheme: Scheme, head_dim: int, rows: int, shared_limit: int, heads: int = 8, batch: int = 1
) -> tuple[DecodeMemory, str]:
    """What the fused decode kernel would keep in a block's shared memory; needs no GPU.

    Args:
        scheme: of the cache.
        head_dim: of K and V.
        rows: query heads of a KV head, of one new token.
        shared_limit: bytes of shared memory that the GPU gives a block, see SHARED_MEMORY.
        heads: KV heads.
        batch: sequences.

    Returns:
        The plan, and why there is none (its `stages` are 0 then).
    """
    params = AttentionParams(batch, heads, rows, 1, 64, 0, head_dim**-0.5, 0.0)
    roles = [native.role_params(scheme.role(name), head_dim, scheme.page_size) for name in ROLES]
    plan, why = DecodeMemory(), c_char_p()
    arguments = (byref(params), byref(roles[0]), byref(roles[1]), shared_limit, byref(plan), byref(why))
    if _function("hqmq_cuda_decode_plan")(*arguments):
        raise HqmqError(cuda.library().hqmq_cuda_last_error().decode())
    return plan, (why.value or b"").decode()


@contextmanager
def cut_by_work(when: int) -> Iterator[None]:
    """While inside, the fused decode kernel cuts calls of several sequences by the work that their lengths make NEVER,
    WHERE_FASTER or ALWAYS, else each sequence into as many parts; WHERE_FASTER afterwards."""
    _function("hqmq_cuda_cut_by_work")(when)
    try:
        yield
    finally:
        _function("hqmq_cuda_cut_by_work")(WHERE_FASTER)


@contextmanager
def batch_invariant() -> Iterator[None]:
    """While inside, neither the number nor the lengths of the sequences in a call change a bit of others."""
    cuda.batch_invariant(True)
    try:
        yield
    finally:
        cuda.batch_invariant(False)


@contextmanager
def shared_memory(limit: int) -> Iterator[None]:
    """While inside, the fused decode kernel takes at most `limit` bytes of shared memory a block; 0: what there is."""
    _function("hqmq_cuda_limit_shared_memory")(limit)
    try:
        yield
    finally:
        _function("hqmq_cuda_limit_shared_memory")(0)
