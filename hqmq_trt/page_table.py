"""Page tables: caches of running sequences whose full pages lie in a pool that they share.

The page tensors of the pool are those of a cache of ``pool`` sequences of one page each
(hqmq_trt.format.paged_cache_tensors): page m of sequence b is ``page_table[b, m]``. Tails belong to the running
sequences. Entries of pages that nobody reads or fills may be anything, such as -1.

The CUDA kernels follow the table themselves. For the host library :func:`gather` makes the contiguous cache and
:func:`scatter` puts the pages that filled back, with copies of both.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from hqmq_trt.errors import HqmqError


def check_table(page_table: Tensor, batch: int, device: torch.device) -> None:
    """Check that a page table is contiguous int32 [batch, M] on `device`.

    Raises:
        HqmqError: it is not.
    """
    if page_table.dtype != torch.int32 or page_table.dim() != 2 or page_table.shape[0] != batch:
        raise HqmqError(
            f"page_table is {page_table.dtype} {list(page_table.shape)}, expected torch.int32 [{batch}, M] with an "
            "entry for each page that a sequence can have"
        )
    if page_table.device != device or not page_table.is_contiguous():
        raise HqmqError(f"page_table is not a contiguous tensor on {device}; call .contiguous().to('{device}') first")


def pages_that_fill(past: Sequence[int], new: Sequence[int], page_size: int) -> list[range]:
    """Pages of each sequence that fill when new[b] tokens join past[b]."""
    return [range(p // page_size, (p + n) // page_size) for p, n in zip(past, new, strict=True)]


def pages_that_are_read(past: Sequence[int], new: Sequence[int], page_size: int, window: int = 0) -> list[range]:
    """Of the full pages of past[b] tokens those that some query of new[b] new tokens sees. window: 0: none."""
    oldest = [max(p - window + 1, 0) if window else 0 for p in past]
    return [
        range(first // page_size, p // page_size) if n else range(0)
        for first, p, n in zip(oldest, past, new, strict=True)
    ]


def check_entries(page_table: Tensor, pool_pages: int, pages: Iterable[range]) -> None:
    """Check that the entries of pages[b] of each sequence b, if it has so many, lie in the pool.

    Raises:
        HqmqError: one does not; names it.
    """
    for b, (entries, own) in enumerate(zip(page_table.tolist(), pages, strict=True)):
        for m in own:
            if m < len(entries) and not 0 <= entries[m] < pool_pages:
                raise HqmqError(
                    f"page_table names page {entries[m]} for page {m} of sequence {b}, and the pool has {pool_pages} "
                    "pages: give the sequence one before it is needed"
                )


def gather(cache: Sequence[Tensor], page_table: Tensor) -> list[Tensor]:
    """The contiguous cache of the sequences of `page_table`: copies of their pages, and the tail itself.

    Args:
        cache: tensors of hqmq_trt.format.paged_cache_tensors; the tail is the last one.
        page_table: int32 [B, M]. Pages with entries outside the pool hold what another page does.
    """
    *pool, tail = cache
    index = page_table.long()
    out = []
    for tensor in pool:
        valid = torch.where((index >= 0) & (index < len(tensor)), index, 0)
        pages = tensor[valid] if len(tensor) else tensor.new_zeros(*index.shape, *tensor.shape[1:])
        out.append(pages.transpose(1, 2).flatten(2, 3).contiguous())
    return [*out, tail]


def scatter(contiguous: Sequence[Tensor], cache: Sequence[Tensor], page_table: Tensor, pages: Iterable[range]) -> None:
    """Copy pages pages[b] of each sequence b of a contiguous cache to where `page_table` says. Tails are left out."""
    table = page_table.tolist()
    for b, own in enumerate(pages):
        for m in own:
            for source, target in zip(contiguous[:-1], cache[:-1], strict=True):
                rows = target.shape[2]
                target[table[b][m]] = source[b, :, m * rows : (m + 1) * rows]


@contextmanager
def contiguous(
    caches: Sequence[Sequence[Tensor]], page_table: Tensor, filled: Sequence[range]
) -> Iterator[list[list[Tensor]]]:
    """The caches of :func:`gather`, of which pages filled[b] are put back in the end, unless an error ends it."""
    gathered = [gather(cache, page_table) for cache in caches]
    yield gathered
    for source, cache in zip(gathered, caches, strict=True):
        scatter(source, cache, page_table, filled)
