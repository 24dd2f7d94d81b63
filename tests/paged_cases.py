"""Caches in pools for the tests of page tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hqmq_trt import page_table as paging
from tests.attention_cases import Attention, bits

SPARE = 7
"""Pages of a pool that no sequence has."""


def garbage(shape: Sequence[int], like: Tensor, generator: torch.Generator) -> Tensor:
    """Random bits, NaN among them, of the dtype of `like`."""
    info = torch.iinfo(torch.int16 if like.element_size() == 2 else torch.int32)
    words = torch.randint(info.min, info.max, tuple(shape), generator=generator, dtype=torch.int64)
    return words.to(torch.int16 if like.element_size() == 2 else torch.int32).view(like.dtype)


@dataclass
class Paged:
    """The caches of a case with their pages in a pool, in random order among pages of garbage.

    Attributes:
        caches: of K and of V, tensors of hqmq_trt.format.paged_cache_tensors.
        table: int32 [B, M].
        page_size: tokens.
    """

    caches: list[list[Tensor]]
    table: Tensor
    page_size: int

    def to(self, device: str) -> Paged:
        """A copy on a device."""
        return Paged(
            [[x.to(device, copy=True) for x in cache] for cache in self.caches], self.table.to(device), self.page_size
        )

    def contiguous(self) -> list[list[Tensor]]:
        """What the caches hold, on the host, in the contiguous form."""
        here = self.to("cpu")
        return [paging.gather(cache, here.table) for cache in here.caches]

    def bits(self) -> list[Tensor]:
        """The page tensors' bits on the host."""
        return [bits(tensor.cpu()) for cache in self.caches for tensor in cache[:-1]]


def paged(case: Attention, caches: Sequence[Sequence[Tensor]], held: Sequence[int], seed: int = 0) -> Paged:
    """`caches` of `held` tokens in a pool. Only full pages are copied, and open ones are garbage."""
    g = torch.Generator().manual_seed(seed)
    page_size, batch = case.scheme.page_size, len(held)
    pages = caches[0][0].shape[2] // page_size
    pool = batch * pages + SPARE
    table = torch.randperm(pool, generator=g)[: batch * pages].reshape(batch, pages).int()
    out = []
    for cache in caches:
        tensors = []
        for tensor in cache[:-1]:
            rows = tensor.shape[2] // pages
            target = garbage((pool, tensor.shape[1], rows, *tensor.shape[3:]), tensor, g)
            tensors.append(target)
        tensors.append(cache[-1].clone())
        paging.scatter(cache, tensors, table, [range(n // page_size) for n in held])
        out.append(tensors)
    return Paged(out, table, page_size)


def assert_same_pages(
    pool: Paged, caches: Sequence[Sequence[Tensor]], held: Sequence[int], sequences: Sequence[int] | None = None
) -> None:
    """Assert that full pages of `held` tokens, and all tails, hold the bytes of contiguous caches."""
    for ours, theirs in zip(pool.contiguous(), caches, strict=True):
        for b in range(len(held)) if sequences is None else sequences:
            assert torch.equal(bits(ours[-1][b]), bits(theirs[-1][b].cpu()))
            for x, y in zip(ours[:-1], theirs[:-1], strict=True):
                rows = x.shape[2] // pool.table.shape[1] * (held[b] // pool.page_size)
                assert torch.equal(bits(x[b, :, :rows]), bits(y[b, :, :rows].cpu()))


def pages_of(table: Tensor, held: Sequence[int], page_size: int) -> list[int]:
    """Pages of the pool that `held` tokens fill."""
    return [p for row, n in zip(table.tolist(), held, strict=True) for p in row[: n // page_size]]


def assert_untouched(before: Sequence[Tensor], after: Sequence[Tensor], filled: Sequence[int]) -> None:
    """Assert that of two :meth:`Paged.bits` only pages `filled` differ."""
    kept = [page for page in range(len(before[0])) if page not in set(filled)]
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[kept], b[kept])
