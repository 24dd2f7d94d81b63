"""Which kernel of libhqmq_cuda attends, for benchmarks and tests: ask, or force the plain ones."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import POINTER, byref, c_char_p, c_int, c_int32
from typing import Any

from torch import Tensor

from hqmq_trt import cuda, native
from hqmq_trt.errors import HqmqError
from hqmq_trt.native import RoleParams
from hqmq_trt.native_attention import AttentionParams
from hqmq_trt.scheme import ROLES, Scheme

DECODE = 1
"""enum hqmq_cuda_path: the fused decode kernel."""
_ROLES = [POINTER(RoleParams)] * 2
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "hqmq_cuda_attention_path": (
        c_int,
        [POINTER(AttentionParams), *_ROLES, c_int32, POINTER(c_int32), POINTER(c_char_p)],
    ),
    "hqmq_cuda_use_plain_attention": (None, [c_int32]),
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
