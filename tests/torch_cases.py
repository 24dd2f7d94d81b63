"""Cases and kernels for the tests of the torch operators."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hqmq_trt import codebooks, oracle, torch_attention, torch_ops
from hqmq_trt.scheme import RoleScheme, Scheme

SCHEMES = [
    ("hq4@p32", 64),
    ("hq3@p16", 128),
    ("k=hq3,v=hq:s10_r2@p16", 64),
    ("k=hq4,v=hq3.5@p16", 64),
    ("k=hq4,v=paper:s8_r3@p8", 16),  # sink tokens of K only
    ("hq:s170_r4-sinks@p16", 32),
    ("paper:s8_r3+med3@p8", 16),
    ("k=paper:s5_r2,v=fp16@p16", 24),
    ("fp16@p8", 32),
]
OPS = torch.ops.hqmq


@dataclass
class Case:
    """A scheme with codebooks, room for `pages` pages and helpers to make input."""

    scheme: Scheme
    head_dim: int
    heads: int = 2
    group: int = 2
    batch: int = 2
    pages: int = 6

    def books(self, role: str) -> list[Tensor]:
        codec = self.scheme.role(role)
        if not codec.packed:
            return []
        arrays = (codebooks.secondaries(codec, 3, 1, self.heads, role), codebooks.levels(codec))
        return [torch.from_numpy(array) for array in arrays]

    def empty(self, role: str) -> list[Tensor]:
        codec = self.scheme.role(role)
        cache = oracle.empty_cache(codec, self.scheme.page_size, self.head_dim, self.heads, self.batch, self.pages)
        return list(cache.values())

    def both(self, make: Callable[[str], list[Tensor]]) -> list[Tensor]:
        return make("key") + make("value")

    def x(self, tokens: int, seed: int, heads: int | None = None) -> Tensor:
        """Gaussian with a loud channel and loud tokens, so that means and outliers matter."""
        gen = torch.Generator().manual_seed(seed)
        x = torch.randn(self.batch, heads or self.heads, tokens, self.head_dim, generator=gen)
        x[..., 1] += 3
        x[:, :, ::7, 4:8] *= 9
        return x

    def oracle_books(self, role: str) -> tuple[Tensor, Tensor]:
        books = self.books(role)
        return (books[0], books[1]) if books else (torch.empty(self.heads, 0, 4), torch.empty(0))

    def named(self, role: str, tensors: list[Tensor]) -> dict[str, Tensor]:
        return dict(zip(torch_ops.tensor_names(self.scheme.role(role)), tensors, strict=True))


def lengths(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def make(name: str, head_dim: int, **kwargs: int) -> Case:
    return Case(Scheme.parse(name), head_dim, **kwargs)


def run_native(case: Case, role: str, x: Tensor, past: Tensor, new: Tensor, cache: list[Tensor]) -> None:
    OPS.quantize_(x, past, new, case.books(role), cache, case.scheme.name, role)


def run_torch(case: Case, role: str, x: Tensor, past: Tensor, new: Tensor, cache: list[Tensor]) -> None:
    torch_attention.append(x, past, new, case.scheme.role(role), case.books(role), cache)


def attend_native(case: Case, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    past, new, cache, sinks, scale, window, softcap = args
    books = case.both(case.books)
    return OPS.attention_(q, k, v, past, new, sinks, books, cache, case.scheme.name, scale, window, softcap)


def attend_torch(case: Case, q: Tensor, k: Tensor, v: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    past, new, cache, sinks, scale, window, softcap = args
    split = len(torch_ops.tensor_names(case.scheme.key))
    books = [case.books("key"), case.books("value")]
    caches = [cache[:split], cache[split:]]
    return torch_attention.attend(q, k, v, past, new, sinks, case.scheme, books, caches, scale, window, softcap)


APPEND = pytest.mark.parametrize("append", [run_native, run_torch], ids=["native", "torch"])
ATTEND = pytest.mark.parametrize("attend", [attend_native, attend_torch], ids=["native", "torch"])
EVERY_SCHEME = pytest.mark.parametrize(("name", "head_dim"), SCHEMES)


def assert_same_bytes(actual: list[Tensor], expected: list[Tensor], role: RoleScheme) -> None:
    """Equal tensors; a chunk between two codewords may differ (a near-tie: under one word in 10^4 here)."""
    for name, a, b in zip(torch_ops.tensor_names(role), actual, expected, strict=True):
        different = int(
            (
                a.view(torch.int32 if a.dtype == torch.int32 else torch.int16)
                != (b.view(torch.int32 if b.dtype == torch.int32 else torch.int16))
            ).sum()
        )
        assert different <= (a.numel() // 10_000 if name == "codes" else 0), name
