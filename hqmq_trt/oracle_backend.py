"""Interim: operators through the oracle until the native library lands."""

from __future__ import annotations

import torch
from torch import Tensor

from hqmq_trt import oracle
from hqmq_trt.format import cache_tensors
from hqmq_trt.scheme import RoleScheme, Scheme


def _named(role: RoleScheme, tensors: list[Tensor]) -> dict[str, Tensor]:
    return dict(zip([s.name for s in cache_tensors(role, 8, 16, 1, 1, 1)], tensors, strict=True))


def _book(codebook: list[Tensor]) -> tuple[Tensor, Tensor]:
    return (codebook[0], codebook[1]) if codebook else (torch.empty(64, 0, 4), torch.empty(0))


def append(x, past_length, new_length, role, codebook, cache) -> None:  # type: ignore[no-untyped-def]
    past = _named(role, cache)
    present = oracle.quantize(x, past_length, new_length, role, *_book(codebook), past)
    for name, tensor in past.items():
        tensor.copy_(present[name])


def load(length, role, codebook, cache, dtype) -> Tensor:  # type: ignore[no-untyped-def]
    return oracle.dequantize(_named(role, cache), length, role, *_book(codebook)).to(dtype)


def attend(  # type: ignore[no-untyped-def]
    q, k, v, past_length, new_length, sinks, scheme: Scheme, books, caches, scale, window, softcap
) -> Tensor:
    (kb, kl), (vb, vl) = map(_book, books)
    past = (_named(scheme.key, caches[0]), _named(scheme.value, caches[1]))
    y, present = oracle.attention(
        q, k, v, past_length, new_length, scheme, (kb, vb), (kl, vl), past, scale, window, softcap, sinks
    )
    for old, new in zip(past, present, strict=True):
        for name, tensor in old.items():
            tensor.copy_(new[name])
    return y.to(q.dtype)
