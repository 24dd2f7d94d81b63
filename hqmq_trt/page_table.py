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


def capacity(codes: Tensor, page_table: Tensor | None) -> int:
    """Tokens that a sequence can have. codes: [B, H, M*P, W], or with a page table [pool, H, P, W]."""
    return codes.shape[2] if page_table is None else codes.shape[2] * page_table.shape[1]


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


class PageAllocator:
    """Gives the pages of a pool to sequences and takes them back when no sequence has them any more.

    On the host: copy :attr:`table` to the GPU before calls that need new entries. One serves all layers, each of which
    has page tensors of its own.

    Attributes:
        table: the page table, int32 [batch, num_pages] on the CPU; -1: no page.
    """

    def __init__(self, batch: int, num_pages: int, pool_pages: int, page_size: int) -> None:
        """num_pages: the most that a sequence can have; page_size: in tokens."""
        self.table = torch.full((batch, num_pages), -1, dtype=torch.int32)
        self.page_size = page_size
        self._owners = [0] * pool_pages
        self._free = list(range(pool_pages))[::-1]

    @property
    def free_pages(self) -> int:
        """Pages that no sequence has."""
        return len(self._free)

    def reserve(self, b: int, tokens: int) -> None:
        """Give sequence b the pages that it needs to hold `tokens` tokens: those that are then full.

        Raises:
            HqmqError: more than a sequence can have or than are free; nothing has changed.
        """
        count = tokens // self.page_size
        if count > self.table.shape[1]:
            raise HqmqError(
                f"sequence {b} needs {count} pages for {tokens} tokens, the table has {self.table.shape[1]}"
            )
        missing = [m for m in range(count) if self.table[b, m] < 0]
        if len(missing) > len(self._free):
            raise HqmqError(f"sequence {b} needs {len(missing)} more pages, {len(self._free)} of the pool are free")
        for m in missing:
            page = self._free.pop()
            self._owners[page] = 1
            self.table[b, m] = page

    def fork(self, source: int, target: int, tokens: int) -> None:
        """Let sequence `target` begin with the first `tokens` tokens of `source`: they share the full pages of these.

        The caller copies the tail of each layer and role (``cache[-1][target] = cache[-1][source]``), which must hold
        the rest: `tokens` is a multiple of the page size or lies within the page that `source` has open. `target`
        gives its own pages back.

        Raises:
            HqmqError: `source` is `target` or has too few pages; nothing has changed.
        """
        if source == target:
            raise HqmqError(f"sequence {source} cannot go on from itself")
        count = tokens // self.page_size
        pages = self.table[source, :count].clone()
        if len(pages) < count or (pages < 0).any():
            raise HqmqError(f"sequence {source} has no {count} pages: reserve them first")
        for page in pages.tolist():
            self._owners[page] += 1
        self.release(target)
        self.table[target, :count] = pages

    def release(self, b: int) -> None:
        """Take all pages of sequence b back; those that no other sequence has are free."""
        for page in self.table[b].tolist():
            if page >= 0:
                self._owners[page] -= 1
                if self._owners[page] == 0:
                    self._free.append(page)
        self.table[b] = -1
