"""One layer for the tests of the fused decode kernel: its caches, its inputs, and what the kernel's answer is held to.

The reference is hqmq_trt.torch_attention on the GPU, which other tests compare with the oracle; a query head's answer
does not depend on its group, so that one reference of the largest group serves all groups.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from unittest import mock

import torch
from torch import Tensor

from benchmarks.gpu_paths import DECODE, attention_path
from hqmq_trt import cuda, torch_attention
from hqmq_trt.scheme import Scheme
from tests.attention_cases import attention_of
from tests.codec_cases import lengths

DEVICE = "cuda"
LENGTHS = (1, 63, 64, 65, 4097, 130, 1000, 2377, 129)
"""Tokens a sequence holds after the call."""
SINKS = 4
"""First tokens that the presets keep exact."""
CAPACITY = 4352
HEADS = 2
GROUPS = (1, 2, 3, 4, 6, 7, 8, 16)
TOKENS = (1, 2, 5, 8)
PRESETS = ("hq3", "hq3.5", "hq4", "hq5")
"""Of K and V alike."""
TEN_BIT = ("k=hq3,v=hq2.5", "k=hq3.5,v=hq2.5")
MED3 = "paper:s96_r4+med3"


class Layer:
    """One layer on the GPU: caches that hold the longest of `ends` in every sequence, and inputs of GROUPS[-1].

    K and V keep `sinks` first tokens exact (None: SINKS for our schemes, 0 for the paper's), as values of their own,
    so that it shows whether codes or exact rows are read, and which.
    """

    def __init__(self, name: str, head_dim: int, ends: tuple[int, ...] = LENGTHS, sinks: int | None = None) -> None:
        scheme, self.head_dim, self.ends = Scheme.parse(name), head_dim, ends
        if sinks is None:
            sinks = SINKS if scheme.key.optimised else 0
        key, value = (replace(role, sink_tokens=sinks) for role in (scheme.key, scheme.value))
        self.scheme = replace(scheme, key=key, value=value)
        past = (max(ends),) * len(ends)
        case = attention_of(name)(name, head_dim, HEADS, GROUPS[-1], past=past, capacity=CAPACITY)
        self.books = [[book.to(DEVICE) for book in role] for role in case.books]
        g = torch.Generator().manual_seed(1)
        for cache in case.caches:
            tail = cache[-1]
            exact = 2 * torch.randn(*tail.shape[:2], sinks, head_dim, generator=g)
            cache[-1] = torch.cat([tail[:, :, : scheme.page_size], exact.half()], 2)
        self.caches = [[tensor.to(DEVICE) for tensor in role] for role in case.caches]
        self.q, self.k, self.v = (x.to(DEVICE) for x in case.inputs(max(TOKENS)))

    def inputs(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q of the largest group, k and v."""
        q, k, v = (x[:, :, :tokens].to(dtype).contiguous() for x in (self.q, self.k, self.v))
        return q, k, v

    def clone(self) -> list[list[Tensor]]:
        """Caches that a call may change."""
        return [[tensor.clone() for tensor in role] for role in self.caches]

    def of_group(self, x: Tensor, group: int) -> Tensor:
        """The first `group` query heads of each KV head of [B, HEADS * GROUPS[-1], T, D]."""
        return x.unflatten(1, (HEADS, -1))[:, :, :group].flatten(1, 2).contiguous()

    def attend(
        self, inputs: tuple[Tensor, Tensor, Tensor], past: Tensor, new: Tensor, caches: list[list[Tensor]],
        sinks: Tensor | None = None, window: int = 0, softcap: float = 0.0, reference: bool = False,
    ) -> Tensor:  # fmt: skip
        """y of the kernels, or of float32 torch; both code pages that fill with the library, so that bytes agree."""
        q, k, v = (x.float() for x in inputs) if reference else inputs
        rest = (past, new, sinks, self.scheme, self.books, caches, self.head_dim**-0.5, window, softcap)
        if not reference:
            return cuda.attend(q, k, v, *rest)
        with mock.patch.object(torch_attention, "append", cuda.append):
            return torch_attention.attend(q, k, v, *rest)


@lru_cache(maxsize=2)
def layer(name: str, head_dim: int, ends: tuple[int, ...] = LENGTHS, sinks: int | None = None) -> Layer:
    """Made once for the tests that follow one another."""
    return Layer(name, head_dim, ends, sinks)


def held(tokens: int, ends: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """past_length and new_length of a call after which sequences hold `ends`."""
    new = [min(tokens, length) for length in ends]
    past = [length - count for length, count in zip(ends, new, strict=True)]
    return lengths(*past).to(DEVICE), lengths(*new).to(DEVICE)


def sink_ends(page: int) -> tuple[int, ...]:
    """Tokens after a call, around the first ones, around the first pages and far from both."""
    first = (*range(1, 6), 8, 9, 12)
    return *first, *range(page - 1, page + 10), 2 * page - 1, 2 * page, 2 * page + 1, 2 * page + 5, 12 * page + 3


def fast(q: Tensor, k: Tensor, scheme: Scheme) -> bool:
    """Whether the fused decode kernel takes a call with these q and k."""
    path, why = attention_path(q, k, CAPACITY // scheme.page_size, scheme)
    assert path or why
    return path == DECODE
