"""torch operators ``torch.ops.hqmq.*``: what the exporter captures and what HqmqCache runs.

==============================  ===========================================================================
hqmq::quantize, quantize_       append K or V of shape [B, H, T, D] to a cache; returns it, or writes in place
hqmq::dequantize                a cache to K or V [B, H, M*P, D]
hqmq::attention, attention_     page-causal attention of q [B, Hq, T, D] over a cache that k and v are added to
==============================  ===========================================================================

Arguments are those of hqmq_trt.contract. ``scheme`` is Scheme.name; ``codebook`` is ``[secondaries, levels]`` or
``[]`` for fp16, ``codebooks`` K's followed by V's; a cache is the list of hqmq_trt.format.cache_tensors, key before
value. ``rotate=False``: the Hadamard rotation already sits in the model's weights.

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
from functools import lru_cache
from types import ModuleType

import torch
from torch import Tensor

from hqmq_trt import cuda, native_attention, torch_attention
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import cache_tensors
from hqmq_trt.scheme import ROLES, RoleScheme, Scheme

TORCH_CUDA_VARIABLE = "HQMQ_TORCH_CUDA"
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

_SCHEMAS = {
    "quantize": (
        "(Tensor x, Tensor past_length, Tensor new_length, Tensor[] codebook, Tensor[] past, str scheme, str role, "
        "bool rotate=True) -> Tensor[]"
    ),
    "quantize_": (
        "(Tensor x, Tensor past_length, Tensor new_length, Tensor[] codebook, Tensor(a!)[] cache, str scheme, "
        "str role, bool rotate=True) -> ()"
    ),
    "dequantize": (
        "(Tensor length, Tensor[] codebook, Tensor[] cache, str scheme, str role, ScalarType dtype, bool rotate=True) "
        "-> Tensor"
    ),
    "attention": (
        "(Tensor q, Tensor k, Tensor v, Tensor past_length, Tensor new_length, Tensor? sinks, Tensor[] codebooks, "
        "Tensor[] past, str scheme, float scale, int window=0, float softcap=0.0, bool rotate_value=True) -> Tensor[]"
    ),
    "attention_": (
        "(Tensor q, Tensor k, Tensor v, Tensor past_length, Tensor new_length, Tensor? sinks, Tensor[] codebooks, "
        "Tensor(a!)[] cache, str scheme, float scale, int window=0, float softcap=0.0, bool rotate_value=True) "
        "-> Tensor"
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


@lru_cache(maxsize=256)
def _expected(role: RoleScheme, page_size: int, *sizes: int) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Name, shape and dtype of each cache tensor for (head_dim, heads, batch, pages)."""
    specs = cache_tensors(role, page_size, *sizes)
    return tuple((spec.name, spec.shape, getattr(torch, spec.dtype)) for spec in specs)


def _split(scheme: Scheme, codebooks: Sequence[Tensor], tensors: Sequence[Tensor]) -> tuple[list[list[Tensor]], ...]:
    """Codebooks and cache tensors by role: ([of K, of V], [of K, of V])."""
    books, caches = list(codebooks), list(tensors)
    key_books, key_tensors = 2 * scheme.key.packed, len(tensor_names(scheme.key))
    return [books[:key_books], books[key_books:]], [caches[:key_tensors], caches[key_tensors:]]


def _check_cache(role: RoleScheme, page_size: int, name: str, codebook: list[Tensor], tensors: list[Tensor]) -> None:
    """Counts, dtypes and shapes of one role's cache and codebook."""
    names = tensor_names(role)
    if len(tensors) != len(names):
        raise HqmqError(f"{name} cache of scheme '{role.name}' takes {', '.join(names)}, not {len(tensors)} tensors")
    if len(codebook) != 2 * role.packed:
        raise HqmqError(
            f"{name} codebook of scheme '{role.name}' takes {'secondaries, levels' if role.packed else 'nothing'}, "
            f"not {len(codebook)} tensors"
        )
    codes, tail = tensors[0], tensors[-1]
    tail_rows = page_size + role.sink_tokens
    if tail.dim() != 4 or tail.shape[2] != tail_rows:
        raise HqmqError(f"{name} tail {list(tail.shape)} does not fit [B, H, {tail_rows}, D] of scheme '{role.name}'")
    batch, heads, _, head_dim = tail.shape
    if role.packed:
        role.check_head_dim(head_dim)
    rows = codes.shape[2] if codes.dim() == 4 else -1
    if rows % page_size:
        raise HqmqError(f"{name} codes {list(codes.shape)} do not hold whole pages of {page_size} tokens")
    shapes = _expected(role, page_size, head_dim, heads, batch, rows // page_size)
    for (what, shape, dtype), tensor in zip(shapes, tensors, strict=True):
        if tuple(tensor.shape) != shape or tensor.dtype != dtype:
            raise HqmqError(
                f"{name} {what} is {tensor.dtype} {list(tensor.shape)}, expected {dtype} {list(shape)} for scheme "
                f"'{role.name}'"
            )
        if not tensor.is_contiguous():
            raise HqmqError(f"{name} {what} is not contiguous; pass tensor.contiguous()")
    if role.packed:
        expected = ((heads, role.secondaries, 4), (2**role.radius_bits,))
        for what, tensor, shape in zip(("secondaries", "levels"), codebook, expected, strict=True):
            if tuple(tensor.shape) != shape or tensor.dtype != torch.float32:
                raise HqmqError(
                    f"{name} {what} are {tensor.dtype} {list(tensor.shape)}, expected torch.float32 {list(shape)}; "
                    "make them with hqmq_trt.codebooks"
                )


def _check_lengths(length: Tensor, batch: int, what: str) -> list[int]:
    if length.dtype != torch.int32 or tuple(length.shape) != (batch,):
        raise HqmqError(f"{what} is {length.dtype} {list(length.shape)}, expected torch.int32 [{batch}]")
    if _capturing(length):
        return []
    values: list[int] = length.tolist()
    if any(value < 0 for value in values):
        raise HqmqError(f"{what} {values} holds a negative length")
    return values


def _check_append(x: Tensor, name: str, past_length: Tensor, new_length: Tensor, tensors: list[Tensor]) -> None:
    """dtype, shape and lengths of an append."""
    batch, heads, _, head_dim = tensors[-1].shape
    if x.dtype not in _FLOATS:
        raise HqmqError(f"{name} is {x.dtype}; convert it to float32, float16 or bfloat16")
    if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, head_dim):
        raise HqmqError(f"{name} {list(x.shape)} does not fit its cache: expected [{batch}, {heads}, T, {head_dim}]")
    _check_lengths(past_length, batch, "past_length")
    new = _check_lengths(new_length, batch, "new_length")
    if max(new, default=0) > x.shape[2]:
        raise HqmqError(f"new_length {new} exceeds the {x.shape[2]} rows of {name}")


def _check_values(x: Tensor, name: str, past_length: Tensor, new_length: Tensor, tensors: list[Tensor]) -> None:
    """What the native library checks itself, for other kernels: room in the cache, finite values."""
    if _capturing(x):
        return
    past, new = past_length.tolist(), new_length.tolist()
    for b, (before, added) in enumerate(zip(past, new, strict=True)):
        if before + added > tensors[0].shape[2]:
            raise HqmqError(
                f"cache too small: sequence {b} needs {before + added} tokens, the cache holds {tensors[0].shape[2]}; "
                "make it with more pages (max_length)"
            )
    row = torch.arange(x.shape[2], device=x.device)
    # fp16 is what a page starts from: a value beyond its range would become Inf there.
    bad = (~x.half().isfinite()).any(3).any(1) & (row < new_length[:, None])
    if bad.any():
        b, t = (int(i) for i in bad.nonzero()[0])
        raise HqmqError(
            f"{name} of sequence {b}, token {past[b] + t} holds NaN, Inf or a value beyond float16's 65504; "
            "check the model's weights and dtype"
        )


def _capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: then nothing may wait for the GPU."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()


def _kernels(x: Tensor) -> ModuleType:
    """The module whose append, load and attend serve the device of `x`."""
    if x.device.type == "cpu":
        return native_attention
    return cuda if x.is_cuda and os.environ.get(TORCH_CUDA_VARIABLE) != "1" else torch_attention


def _quantize_(
    x: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    codebook: list[Tensor],
    cache: list[Tensor],
    scheme: str,
    role: str,
    rotate: bool = True,
) -> None:
    codec, page_size = _role(scheme, role, rotate)
    _check_cache(codec, page_size, role, codebook, cache)
    _check_append(x, role, past_length, new_length, cache)
    kernels = _kernels(x)
    if kernels is native_attention:
        native_attention.append(x, past_length, new_length, codec, codebook, cache, name=role)
    else:
        _check_values(x, role, past_length, new_length, cache)
        kernels.append(x, past_length, new_length, codec, codebook, cache)


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
) -> Tensor:
    codec, page_size = _role(scheme, role, rotate)
    _check_cache(codec, page_size, role, codebook, cache)
    if dtype not in _FLOATS:
        raise HqmqError(f"dtype {dtype}: dequantize to float32, float16 or bfloat16")
    held = _check_lengths(length, cache[-1].shape[0], "length")
    if max(held, default=0) > cache[0].shape[2]:
        raise HqmqError(f"length {held} exceeds the {cache[0].shape[2]} tokens of the {role} cache")
    out: Tensor = _kernels(cache[0]).load(length, codec, codebook, cache, dtype)
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
) -> Tensor:
    codec = _scheme(scheme, True, rotate_value)
    books, caches = _split(codec, codebooks, cache)
    for name, x, book, tensors in zip(ROLES, (k, v), books, caches, strict=True):
        _check_cache(codec.role(name), codec.page_size, name, book, tensors)
        _check_append(x, name, past_length, new_length, tensors)
    if k.shape[:3] != v.shape[:3] or k.dtype != v.dtype:
        raise HqmqError(f"k {k.dtype} {list(k.shape)} and v {v.dtype} {list(v.shape)} do not belong together")
    if caches[0][0].shape[2] != caches[1][0].shape[2]:
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
            _check_values(x, name, past_length, new_length, tensors)
    out: Tensor = kernels.attend(q, k, v, past_length, new_length, sinks, codec, books, caches, scale, window, softcap)
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
) -> Tensor:
    _role(scheme, role, rotate)
    codes, tail = cache[0], cache[-1]
    return tail.new_empty((tail.shape[0], tail.shape[1], codes.shape[2], tail.shape[3]), dtype=dtype)


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
