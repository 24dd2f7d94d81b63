"""What the torch operators (hqmq_trt.torch_ops) check of their arguments."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from hqmq_trt.errors import HqmqError
from hqmq_trt.format import cache_tensors, paged_cache_tensors
from hqmq_trt.page_table import capacity, check_table
from hqmq_trt.scheme import RoleScheme

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@lru_cache(maxsize=256)
def _expected(
    paged: bool, role: RoleScheme, page_size: int, *sizes: int
) -> tuple[tuple[str, tuple[int, ...], torch.dtype], ...]:
    """Name, shape and dtype of each cache tensor for (head_dim, heads, batch, pages)."""
    specs = (paged_cache_tensors if paged else cache_tensors)(role, page_size, *sizes)
    return tuple((spec.name, spec.shape, getattr(torch, spec.dtype)) for spec in specs)


def check_cache(
    role: RoleScheme,
    page_size: int,
    name: str,
    codebook: list[Tensor],
    tensors: list[Tensor],
    page_table: Tensor | None = None,
) -> None:
    """Counts, dtypes and shapes of one role's cache and codebook.

    Raises:
        HqmqError: they do not fit.
    """
    names = [name for name, _, _ in _expected(False, role, 8, 16, 1, 1, 1)]
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
    if page_table is not None:
        check_table(page_table, batch, codes.device)
    pages = rows // page_size if page_table is None else len(codes)
    shapes = _expected(page_table is not None, role, page_size, head_dim, heads, batch, pages)
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


def check_lengths(length: Tensor, batch: int, what: str) -> list[int]:
    """Type and values of lengths [B], which it returns; [] while a CUDA graph is captured.

    Raises:
        HqmqError: they are not lengths.
    """
    if length.dtype != torch.int32 or tuple(length.shape) != (batch,):
        raise HqmqError(f"{what} is {length.dtype} {list(length.shape)}, expected torch.int32 [{batch}]")
    if capturing(length):
        return []
    values: list[int] = length.tolist()
    if any(value < 0 for value in values):
        raise HqmqError(f"{what} {values} holds a negative length")
    return values


def check_append(x: Tensor, name: str, past_length: Tensor, new_length: Tensor, tensors: list[Tensor]) -> None:
    """dtype, shape and lengths of an append.

    Raises:
        HqmqError: they do not fit.
    """
    batch, heads, _, head_dim = tensors[-1].shape
    if x.dtype not in FLOATS:
        raise HqmqError(f"{name} is {x.dtype}; convert it to float32, float16 or bfloat16")
    if x.dim() != 4 or (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, head_dim):
        raise HqmqError(f"{name} {list(x.shape)} does not fit its cache: expected [{batch}, {heads}, T, {head_dim}]")
    check_lengths(past_length, batch, "past_length")
    new = check_lengths(new_length, batch, "new_length")
    if max(new, default=0) > x.shape[2]:
        raise HqmqError(f"new_length {new} exceeds the {x.shape[2]} rows of {name}")


def check_values(
    x: Tensor,
    name: str,
    past_length: Tensor,
    new_length: Tensor,
    tensors: list[Tensor],
    page_table: Tensor | None = None,
) -> None:
    """What the native library checks itself, for other kernels: room in the cache, finite values.

    Raises:
        HqmqError: too few pages, or NaN or infinity. Never while a CUDA graph is captured.
    """
    if capturing(x):
        return
    rows = capacity(tensors[0], page_table)
    past, new = past_length.tolist(), new_length.tolist()
    for b, (before, added) in enumerate(zip(past, new, strict=True)):
        if before + added > rows:
            raise HqmqError(
                f"cache too small: sequence {b} needs {before + added} tokens, the cache holds {rows}; "
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


def capturing(x: Tensor) -> bool:
    """Whether a CUDA graph is being captured: then nothing may wait for the GPU."""
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
