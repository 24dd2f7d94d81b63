"""The decode side of the native host library: HqmqDequantize and HqmqAttention on CPU tensors.

With :func:`hqmq_trt.native.append` these are the CPU kernels of the torch operators.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64, c_void_p
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from hqmq_trt import native
from hqmq_trt.errors import HqmqError
from hqmq_trt.native import RoleCache, RoleParams, Rows, append
from hqmq_trt.scheme import ROLES, RoleScheme, Scheme

__all__ = ["WordTable", "append", "attend", "load"]

_MAX_TABLES = 1024


class AttentionRole(Structure):
    """hqmq_attention_role of plugins/host/hqmq_host_attention.h."""

    _fields_ = [
        ("role", RoleParams),
        ("x", Rows),
        ("secondaries", c_void_p),
        ("levels", c_void_p),
        ("table", c_void_p),
        ("cache", RoleCache),
    ]


class AttentionParams(Structure):
    """hqmq_attention_params."""

    _fields_ = [
        *[(name, c_int32) for name in ("batch", "heads", "group", "tokens", "num_pages", "window")],
        ("scale", c_float),
        ("softcap", c_float),
    ]


@lru_cache(maxsize=1)
def _library() -> ctypes.CDLL:
    lib = native.library()
    tables: list[object] = [POINTER(RoleParams), c_int32, c_void_p, c_void_p, POINTER(c_void_p)]
    load_arguments: list[object] = [POINTER(RoleParams), *[c_int32] * 3, c_void_p, c_void_p, POINTER(RoleCache)]
    attention: list[object] = [POINTER(AttentionParams), POINTER(Rows), *[POINTER(AttentionRole)] * 2]
    native.declare(
        lib,
        {
            "hqmq_table_create": (c_int, tables),
            "hqmq_table_destroy": (None, [c_void_p]),
            "hqmq_load": (c_int, [*load_arguments, POINTER(Rows), c_void_p, c_void_p]),
            "hqmq_attention": (
                c_int,
                [*attention, *[c_void_p] * 3, POINTER(Rows), POINTER(c_int64), c_void_p, c_void_p],
            ),
        },
    )
    return lib


class WordTable:
    """The multiplied-out codewords of one role's codebook (hqmq_table); freed with this object."""

    def __init__(self, role: RoleScheme, codebook: Sequence[Tensor], heads: int) -> None:
        """codebook: secondaries float32 [heads, S, 4] and levels float32 [2^r]; empty for fp16."""
        books, self._source = native.codebook_pointers(role, codebook, heads)
        self._source = [tensor.clone() for tensor in self._source]
        self.handle = c_void_p()
        self._destroy = _library().hqmq_table_destroy
        # The table holds codewords only: head_dim and page size do not matter.
        params = native.role_params(role, 8, 64)
        native.check(_library().hqmq_table_create(byref(params), heads, *books, byref(self.handle)))

    def __del__(self) -> None:
        if getattr(self, "handle", None):
            self._destroy(self.handle)

    def fits(self, codebook: Sequence[Tensor]) -> bool:
        """Whether it was made from these values."""
        return len(codebook) == len(self._source) and all(
            torch.equal(a, b) for a, b in zip(codebook, self._source, strict=True)
        )


_tables: OrderedDict[tuple[object, ...], WordTable] = OrderedDict()
_lock = Lock()


def table(role: RoleScheme, codebook: Sequence[Tensor], heads: int) -> WordTable:
    """The table of a codebook, from a cache by address and content."""
    key = (role, heads, *(tensor.data_ptr() for tensor in codebook))
    with _lock:
        found = _tables.get(key)
        if found is not None and found.fits(codebook):
            _tables.move_to_end(key)
            return found
    made = WordTable(role, codebook, heads)
    with _lock:
        _tables[key] = made
        if len(_tables) > _MAX_TABLES:
            _tables.popitem(last=False)
    return made


def load(
    length: Tensor, role: RoleScheme, codebook: Sequence[Tensor], cache: Sequence[Tensor], dtype: torch.dtype
) -> Tensor:
    """HqmqDequantize: what a cache of length[b] tokens holds, [B, H, M*P, D] of `dtype`, zero past the length.

    Args:
        length: int32 [B].
        codebook: secondaries float32 [H, S, 4] and levels float32 [2^r]; empty for fp16.
        cache: tensors in the order of hqmq_trt.format.cache_tensors.
        dtype: float32, float16 or bfloat16.

    Raises:
        HqmqError: tensors that do not fit the scheme, or a length beyond the cache.
    """
    pointers, params, num_pages = native.role_cache(role, cache)
    batch, heads, _, head_dim = cache[-1].shape
    out = torch.empty(batch, heads, num_pages * params.page_size, head_dim, dtype=dtype)
    target, out = native.rows(out, "x")
    held = native.tensor(length, torch.int32, (batch,), "length")
    words = table(role, codebook, heads)
    native.check(
        _library().hqmq_load(
            byref(params),
            batch,
            heads,
            num_pages,
            held.data_ptr(),
            words.handle,
            byref(pointers),
            byref(target),
            None,
            None,
        )
    )
    return out


def _role(
    role: RoleScheme,
    x: Tensor,
    name: str,
    codebook: Sequence[Tensor],
    cache: Sequence[Tensor],
    device: torch.device,
    page_table: Tensor | None,
) -> tuple[AttentionRole, int, list[object]]:
    pointers, params, num_pages = native.role_cache(role, cache, device, page_table)
    batch, heads, _, head_dim = cache[-1].shape
    source, x = native.rows(x, name, device)
    if (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, head_dim):
        raise HqmqError(f"{name} {list(x.shape)} does not fit its cache: expected [{batch}, {heads}, T, {head_dim}]")
    books, keep = native.codebook_pointers(role, codebook, heads, device)
    return AttentionRole(params, source, *books, None, pointers), num_pages, [x, *keep]


class AttentionCall:
    """Checked arguments of hqmq_attention; keeps what they point to alive. `y` is the output, not yet written."""

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        past_length: Tensor,
        new_length: Tensor,
        sinks: Tensor | None,
        scheme: Scheme,
        codebooks: Sequence[Sequence[Tensor]],
        caches: Sequence[Sequence[Tensor]],
        scale: float,
        window: int,
        softcap: float,
        device: torch.device,
        page_table: Tensor | None = None,
    ) -> None:
        self.key, key_pages, keep_key = _role(scheme.key, k, "k", codebooks[0], caches[0], device, page_table)
        self.value, value_pages, keep_value = _role(scheme.value, v, "v", codebooks[1], caches[1], device, page_table)
        if page_table is not None and len(caches[0][0]) != len(caches[1][0]):
            raise HqmqError("the pools of the key and the value cache differ in pages")
        batch, heads, tokens, head_dim = k.shape
        if key_pages != value_pages or v.shape != k.shape:
            raise HqmqError(f"k {list(k.shape)} and v {list(v.shape)}, or the sizes of their caches, differ")
        if (q.shape[0], *q.shape[2:]) != (batch, tokens, head_dim) or q.shape[1] % heads or not q.shape[1]:
            raise HqmqError(f"q {list(q.shape)} does not fit k {list(k.shape)}: expected [{batch}, n*{heads}, T, D]")
        past = native.tensor(past_length, torch.int32, (batch,), "past_length", device)
        new = native.tensor(new_length, torch.int32, (batch,), "new_length", device)
        sink = None
        if sinks is not None:
            sink = sinks.detach().to(device, torch.float32).contiguous()
            if sink.numel() != q.shape[1]:
                raise HqmqError(f"sinks {list(sinks.shape)} do not hold one value for each of {q.shape[1]} query heads")
        source, q = native.rows(q, "q", device)
        self.y = torch.empty(q.shape, dtype=q.dtype, device=device)
        target, _ = native.rows(self.y, "y", device)
        self.params = AttentionParams(batch, heads, q.shape[1] // heads, tokens, key_pages, window, scale, softcap)
        self._keep = (keep_key, keep_value, q, past, new, sink)
        self._inputs = (source, past.data_ptr(), new.data_ptr(), None if sink is None else sink.data_ptr(), target)

    def arguments(self) -> list[Any]:
        """From params to y."""
        source, past, new, sink, target = self._inputs
        roles = (byref(self.key), byref(self.value))
        return [byref(self.params), byref(source), *roles, past, new, sink, byref(target)]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    sinks: Tensor | None,
    scheme: Scheme,
    codebooks: Sequence[Sequence[Tensor]],
    caches: Sequence[Sequence[Tensor]],
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
) -> Tensor:
    """HqmqAttention in place: append k and v to the caches, then page-causal attention; y [B, Hq, T, D].

    Args:
        q: [B, Hq, T, D]; k, v: [B, H, T, D]; float32, float16 or bfloat16, any strides.
        past_length, new_length: int32 [B].
        sinks: [Hq] or None.
        codebooks: of K and of V, each secondaries float32 [H, S, 4] and levels float32 [2^r], or empty for fp16.
        caches: of K and of V, tensors in the order of hqmq_trt.format.cache_tensors; written in place.
        window: keys j > t - window are seen; 0: all. softcap: 0: none.

    Raises:
        HqmqError: NaN or infinity in k or v, a cache with too few pages, tensors that do not fit. The caches are then
            as they were.
    """
    call = AttentionCall(
        q, k, v, past_length, new_length, sinks, scheme, codebooks, caches, scale, window, softcap, native.CPU
    )
    tables = [table(scheme.role(name), book, k.shape[1]) for name, book in zip(ROLES, codebooks, strict=True)]
    call.key.table, call.value.table = (each.handle for each in tables)
    native.check(_library().hqmq_attention(*call.arguments(), None, None, None))
    return call.y
