"""torch operators ``torch.ops.hqmq.*``: what the exporter captures and what HqmqCache runs.

==============================  ===========================================================================
hqmq::quantize, quantize_       append K or V of shape [B, H, T, D] to a cache; returns it, or writes in place
hqmq::dequantize                a cache to K or V [B, H, M*P, D]
hqmq::attention, attention_     page-causal attention of q [B, Hq, T, D] over a cache that k and v are added to
==============================  ===========================================================================

Arguments are those of hqmq_trt.contract. ``scheme`` is Scheme.name; ``codebook`` is ``[secondaries, levels]`` or
``[]`` for fp16, ``codebooks`` K's followed by V's; a cache is the list of hqmq_trt.format.cache_tensors, key before
value. ``rotate=False``: the Hadamard rotation already sits in the model's weights. ``page_table``, int32 [B, M], of the
operators that write in place and of dequantize: the page tensors are those of a pool (hqmq_trt.page_table); on the CPU
they are copied for the call.

CPU tensors go through the native library, CUDA tensors through the CUDA library (hqmq_trt.cuda); where that is not
built, a call raises HqmqError with the command that builds it. HQMQ_TORCH_CUDA=1 in the environment asks for the slow
plain-torch kernels (hqmq_trt.torch_codec) instead, which also serve every other device. Lengths and values are checked
first, which waits for the GPU; while a CUDA graph is captured they are not, and hqmq_trt.cuda.status counts what is
wrong. Inference only: no gradients.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache as memoize
from types import ModuleType

import torch
from torch import Tensor

from hqmq_trt import cuda, native_attention, operator_checks, torch_attention
from hqmq_trt import page_table as paging
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import cache_tensors
from hqmq_trt.scheme import ROLES, RoleScheme, Scheme

TORCH_CUDA_VARIABLE = "HQMQ_TORCH_CUDA"

_SCHEMAS = {
    "quantize": (
        "(Tensor x, Tensor past_length, Tensor new_length, Tensor[] codebook, Tensor[] past, str scheme, str role, "
        "bool rotate=True) -> Tensor[]"
    ),
    "quantize_": (
        "(Tensor x, Tensor past_length, Tensor new_length, Tensor[] codebook, Tensor(a!)[] cache, str scheme, "
        "str role, bool rotate=True, Tensor? page_table=None) -> ()"
    ),
    "dequantize": (
        "(Tensor length, Tensor[] codebook, Tensor[] cache, str scheme, str role, ScalarType dtype, bool rotate=True, "
        "Tensor? page_table=None) -> Tensor"
    ),
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor past_length, Tensor new_length, Tensor? sinks, Tensor[] codebooks, "
        "Tensor[] past, str scheme, float scale, int window=0, float softcap=0.0, bool rotate_value=True) -> Tensor[]"
    ),
    "attention_": (
        "(Tensor q, Tensor k, Tensor v, Tensor past_length, Tensor new_length, Tensor? sinks, Tensor[] codebooks, "
        "Tensor(a!)[] cache, str scheme, float scale, int window=0, float softcap=0.0, bool rotate_value=True, "
        "Tensor? page_table=None) -> Tensor"
    ),
}


@memoize
def _scheme(name: str, rotate_key: bool, rotate_value: bool) -> Scheme:
    """The scheme as the operator applies it: no rotation where the weights hold it."""
    scheme = Scheme.parse(name)
    return replace(
        scheme,
        key=replace(scheme.key, hadamard=scheme.key.hadamard and rotate_key),
        value=replace(scheme.value, hadamard=scheme.value.hadamard and rotate_value),
    )


def _role(name: str, role: str, rotate: bool) -> tuple[RoleScheme, int]:
    if role not in ROLES:
        raise HqmqError(f"role '{role}' is neither 'key' nor 'value'")
    scheme = _scheme(name, rotate, rotate)
    return scheme.role(role), scheme.page_size


@memoize
def tensor_names(role: RoleScheme) -> tuple[str, ...]:
    """Names of one role's cache tensors in the order of hqmq_trt.format.cache_tensors."""
    return tuple(spec.name for spec in cache_tensors(role, 8, 16, 1, 1, 1))


def _split(scheme: Scheme, codebooks: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[list[list[Tensor]], ...]:
    """Codebooks and cache tensors by role: ([of K, of V], [of K, of V])."""
    books, caches = list(codebooks), list(tensors)
    key_books, key_tensors = 2 * scheme.key.packed, len(tensor_names(scheme.key))
    return [books[:key_books], books[key_books:]], [caches[:key_tensors], caches[key_tensors:]]


def _kernels(x: Tensor) -> ModuleType:
    """The module whose append, load and attend serve the device of `x`."""
    if x.device.type == "cpu":
        return native_attention
    return cuda if x.is_cuda and os.environ.get(TORCH_CUDA_VARIABLE) != "1" else torch_attention


def _check_takes_pages(kernels: ModuleType, page_table: Tensor) -> None:
    if kernels is torch_attention:
        raise HqmqError(
            f"the plain-torch kernels on {page_table.device} take no page_table; the CPU and the CUDA library do"
        )


def _quantize_(
    x: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    codebook: list[Tensor],
    cache: list[Tensor],
    scheme: str,
    role: str,
    rotate: bool = True,
    page_table: Tensor | None = None,
) -> None:
    codec, page_size = _role(scheme, role, rotate)
    operator_checks.check_cache(codec, page_size, role, codebook, cache, page_table)
    operator_checks.check_append(x, role, past_length, new_length, cache)
    kernels = _kernels(x)
    if kernels is not native_attention:
        operator_checks.check_values(x, role, past_length, new_length, cache, page_table)
    filled: list[range] = []
    if page_table is not None:
        _check_takes_pages(kernels, page_table)
        if not operator_checks.capturing(x):
            filled = paging.pages_that_fill(past_length.tolist(), new_length.tolist(), page_size)
            paging.check_entries(page_table, len(cache[0]), filled)
    if kernels is cuda:
        cuda.append(x, past_length, new_length, codec, codebook, cache, page_table=page_table)
    elif kernels is torch_attention:
        torch_attention.append(x, past_length, new_length, codec, codebook, cache)
    elif page_table is None:
        native_attention.append(x, past_length, new_length, codec, codebook, cache, name=role)
    else:
        with paging.contiguous([cache], page_table, filled) as (held,):
            native_attention.append(x, past_length, new_length, codec, codebook, held, name=role)


def _quantize(
    x: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    codebook: list[Tensor],
    past: list[Tensor],
    scheme: str,
    role: str,
    rotate: bool = True,
) -> list[Tensor]:
    present = [tensor.clone(memory_format=torch.contiguous_format) for tensor in past]
    _quantize_(x, past_length, new_length, codebook, present, scheme, role, rotate)
    return present


def _dequantize(
    length: Tensor,
    codebook: list[Tensor],
    cache: list[Tensor],
    scheme: str,
    role: str,
    dtype: torch.dtype,
    rotate: bool = True,
    page_table: Tensor | None = None,
) -> Tensor:
    codec, page_size = _role(scheme, role, rotate)
    operator_checks.check_cache(codec, page_size, role, codebook, cache, page_table)
    if dtype not in operator_checks.FLOATS:
        raise HqmqError(f"dtype {dtype}: dequantize to float32, float16 or bfloat16")
    held = operator_checks.check_lengths(length, cache[-1].shape[0], "length")
    tokens = paging.capacity(cache[0], page_table)
    if max(held, default=0) > tokens:
        raise HqmqError(f"length {held} exceeds the {tokens} tokens of the {role} cache")
    kernels = _kernels(cache[0])
    if page_table is not None:
        _check_takes_pages(kernels, page_table)
        if held:
            full = [range(n // page_size) for n in held]
            paging.check_entries(page_table, len(cache[0]), full)
        if kernels is cuda:
            return cuda.load(length, codec, codebook, cache, dtype, page_table)
        cache = paging.gather(cache, page_table)
    out: Tensor = kernels.load(length, codec, codebook, cache, dtype)
    return out


def _attention_(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    sinks: Tensor | None,
    codebooks: list[Tensor],
    cache: list[Tensor],
    scheme: str,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    rotate_value: bool = True,
    page_table: Tensor | None = None,
) -> Tensor:
    codec = _scheme(scheme, True, rotate_value)
    books, caches = _split(codec, codebooks, cache)
    for name, x, book, tensors in zip(ROLES, (k, v), books, caches, strict=True):
        operator_checks.check_cache(codec.role(name), codec.page_size, name, book, tensors, page_table)
        operator_checks.check_append(x, name, past_length, new_length, tensors)
    if k.shape[:3] != v.shape[:3] or k.dtype != v.dtype:
        raise HqmqError(f"k {k.dtype} {list(k.shape)} and v {v.dtype} {list(v.shape)} do not belong together")
    if caches[0][0].shape[0] != caches[1][0].shape[0] or caches[0][0].shape[2] != caches[1][0].shape[2]:
        raise HqmqError("key and value cache differ in capacity")
    if q.dim() != 4 or (q.shape[0], *q.shape[2:]) != (k.shape[0], *k.shape[2:]) or q.shape[1] % k.shape[1]:
        raise HqmqError(f"q {list(q.shape)} does not fit k {list(k.shape)}: expected [B, n*H, T, D]")
    if q.dtype != k.dtype:
        raise HqmqError(f"q is {q.dtype} and k is {k.dtype}; convert them to one type")
    if sinks is not None and sinks.numel() != q.shape[1]:
        raise HqmqError(f"sinks {list(sinks.shape)} do not hold one value for each of {q.shape[1]} query heads")
    if window < 0 or softcap < 0:
        raise HqmqError(f"window {window} and softcap {softcap} must not be negative (0 switches them off)")
    kernels = _kernels(q)
    if kernels is not native_attention:
        for name, x, tensors in zip(ROLES, (k, v), caches, strict=True):
            operator_checks.check_values(x, name, past_length, new_length, tensors, page_table)
    filled: list[range] = []
    if page_table is not None:
        _check_takes_pages(kernels, page_table)
        if not operator_checks.capturing(q):
            past, new = past_length.tolist(), new_length.tolist()
            filled = paging.pages_that_fill(past, new, codec.page_size)
            for pages in (filled, paging.pages_that_are_read(past, new, codec.page_size, window)):
                paging.check_entries(page_table, len(caches[0][0]), pages)
    inputs = (q, k, v, past_length, new_length, sinks, codec, books)
    if kernels is cuda:
        return cuda.attend(*inputs, caches, scale, window, softcap, page_table)
    if page_table is not None:
        with paging.contiguous(caches, page_table, filled) as held:
            return native_attention.attend(*inputs, held, scale, window, softcap)
    out: Tensor = kernels.attend(*inputs, caches, scale, window, softcap)
    return out


def _attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    sinks: Tensor | None,
    codebooks: list[Tensor],
    past: list[Tensor],
    scheme: str,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    rotate_value: bool = True,
) -> list[Tensor]:
    present = [tensor.clone(memory_format=torch.contiguous_format) for tensor in past]
    y = _attention_(
        q, k, v, past_length, new_length, sinks, codebooks, present, scheme, scale, window, softcap, rotate_value
    )
    return [y, *present]


# Meta kernels: shapes only, and none of them compares sizes, so that every dimension may be symbolic.


def _fake_present(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor, memory_format=torch.contiguous_format) for tensor in tensors]


def _fake_quantize(
    x: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    codebook: list[Tensor],
    past: list[Tensor],
    scheme: str,
    role: str,
    rotate: bool = True,
) -> list[Tensor]:
    _role(scheme, role, rotate)
    return _fake_present(past)


def _fake_dequantize(
    length: Tensor,
    codebook: list[Tensor],
    cache: list[Tensor],
    scheme: str,
    role: str,
    dtype: torch.dtype,
    rotate: bool = True,
    page_table: Tensor | None = None,
) -> Tensor:
    _role(scheme, role, rotate)
    codes, tail = cache[0], cache[-1]
    rows = paging.capacity(codes, page_table)
    return tail.new_empty((tail.shape[0], tail.shape[1], rows, tail.shape[3]), dtype=dtype)


def _fake_attention_(
    q: Tensor, k: Tensor, v: Tensor, past_length: Tensor, new_length: Tensor, *args: object, **kwargs: object
) -> Tensor:
    return q.new_empty((q.shape[0], q.shape[1], q.shape[2], v.shape[3]))


def _fake_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    sinks: Tensor | None,
    codebooks: list[Tensor],
    past: list[Tensor],
    *args: object,
    **kwargs: object,
) -> list[Tensor]:
    return [_fake_attention_(q, k, v, past_length, new_length), *_fake_present(past)]


def _register() -> None:
    kernels: dict[str, tuple[Callable[..., object], Callable[..., object]]] = {
        "quantize": (_quantize, _fake_quantize),
        "quantize_": (_quantize_, lambda *args, **kwargs: None),
        "dequantize": (_dequantize, _fake_dequantize),
        "attention": (_attention, _fake_attention),
        "attention_": (_attention_, _fake_attention_),
    }
    for name, (kernel, fake) in kernels.items():
        torch.library.define(f"hqmq::{name}", _SCHEMAS[name], tags=(torch.Tag.pt2_compliant_tag,))
        torch.library.impl(f"hqmq::{name}", "CompositeExplicitAutograd", kernel)
        torch.library.register_fake(f"hqmq::{name}", fake)


_register()
