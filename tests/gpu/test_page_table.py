"""Page tables on the GPU: every kernel gives the same bytes with its pages in a pool, and touches no others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache

import pytest
import torch
from torch import Tensor

import hqmq_trt.torch_ops  # noqa: F401  (registers torch.ops.hqmq)
from benchmarks.gpu_paths import DECODE, PREFILL, attention_path, use_kernels
from hqmq_trt import cuda
from hqmq_trt.errors import HqmqError
from hqmq_trt.scheme import ROLES
from tests.attention_cases import Attention, bits, relative_error
from tests.codec_cases import lengths
from tests.gpu.graphs import captured
from tests.gpu.requirements import KERNEL_TESTS
from tests.paged_cases import Paged, assert_same_pages, assert_untouched, paged, pages_of

pytestmark = KERNEL_TESTS

DEVICE = "cuda"
FUSED = ("hq3", "hq4", "k=hq4,v=hq3", "paper:s96_r4+med3", "hq3@p16", "hq5@p32", "k=hq3,v=hq2.5")
"""Schemes here that the fused decode kernel takes."""
SCHEMES = [
    *[("hq3", 128), ("hq4", 128), ("k=hq4,v=hq3", 128), ("paper:s96_r4+med3", 128), ("fp16", 64), ("hq3@p16", 64)],
    *[("hq5@p32", 256), ("paper:s24_r3+med3@p8", 20), ("k=hq3,v=hq2.5", 64)],
]
EVERY_SCHEME = pytest.mark.parametrize(("name", "head_dim"), SCHEMES)
FEW_SCHEMES = pytest.mark.parametrize(("name", "head_dim"), [SCHEMES[i] for i in (0, 1, 3, 4, 5)])
PAST = (60, 0, 130, 63, 700, 64)
CAPACITY = 1024
FASTEST, PLAIN, NO_WARPGROUPS = 0, 1, 2
"""use_kernels: those that a call gets, the plain ones, prefill without sm_90's."""
OUTSIDE = (-1, 1 << 30, -(1 << 31))
"""Entries outside every pool."""


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    cuda.clear_status(DEVICE)
    yield
    torch.cuda.synchronize()
    use_kernels(FASTEST)


def attend(
    case: Attention, inputs: Sequence[Tensor], past: Sequence[int], new: Sequence[int], caches: list[list[Tensor]],
    table: Tensor | None = None, window: int = 0,
) -> Tensor:  # fmt: skip
    """cuda.attend of inputs on the host; y on the host."""
    q, k, v = (x.to(DEVICE) for x in inputs)
    books = [[book.to(DEVICE) for book in role] for role in case.books]
    return cuda.attend(
        q, k, v, lengths(*past).to(DEVICE), lengths(*new).to(DEVICE), None, case.scheme, books, caches,
        case.head_dim**-0.5, window, page_table=table,
    ).cpu()  # fmt: skip


@lru_cache(maxsize=4)
def made(name: str, head_dim: int, past: tuple[int, ...], capacity: int, dtype: torch.dtype) -> Attention:
    """A case; tests leave it as it is. Four query heads of a KV head: few rows of a problem."""
    return Attention(name, head_dim, 2, 4, past=past, capacity=capacity, dtype=dtype)


def layer(
    name: str, head_dim: int, past: tuple[int, ...] = PAST, capacity: int = CAPACITY, dtype: torch.dtype = torch.float16
) -> tuple[Attention, list[list[Tensor]], Paged]:
    """A case with its caches on the GPU in both forms."""
    case = made(name, head_dim, past, capacity, dtype)
    plain = [[tensor.to(DEVICE) for tensor in cache] for cache in case.clone()]
    return case, plain, paged(case, case.caches, past).to(DEVICE)


def outside(table: Tensor, pages: Sequence[int]) -> None:
    """Entries from pages[b] of each sequence b on are outside the pool."""
    for b, first in enumerate(pages):
        table[b, first:] = OUTSIDE[b % len(OUTSIDE)]


def expect_path(case: Attention, tokens: int, plain: bool) -> None:
    """Assert that a call of so many tokens takes the kernels that the test is about."""
    x = torch.empty(len(case.past), case.heads, tokens, case.head_dim, dtype=case.dtype)
    q = torch.empty(len(case.past), case.heads * case.group, tokens, case.head_dim, dtype=case.dtype)
    path, why = attention_path(q, x, case.caches[0][0].shape[2] // case.scheme.page_size, case.scheme)
    if plain:
        assert path == 0
    elif tokens > 8:
        assert path == PREFILL, why
    elif case.name in FUSED:
        assert path == DECODE, why


def assert_steps_agree(
    case: Attention, plain: list[list[Tensor]], pool: Paged, news: Sequence[Sequence[int]], window: int = 0,
    check_every: int = 10,
) -> None:  # fmt: skip
    """Run calls in both forms: the same y each time, the same pages and tails, and no other page touched."""
    held, before = list(case.past), pool.bits()
    for i, new in enumerate(news):
        inputs = case.inputs(max(new), seed=i)
        expected = attend(case, inputs, held, new, plain, window=window)
        y = attend(case, inputs, held, new, pool.caches, pool.table, window)
        assert torch.equal(bits(y), bits(expected)), f"call {i}"
        held = [a + b for a, b in zip(held, new, strict=True)]
        if i % check_every == 0 or i == len(news) - 1:
            assert_same_pages(pool, plain, held)
    filled = pages_of(pool.table, held, pool.page_size)
    assert len(filled) > len(pages_of(pool.table, case.past, pool.page_size))
    assert_untouched(before, pool.bits(), filled)
    assert cuda.status(DEVICE)[:2] == (0, 0)


@pytest.mark.parametrize("kernels", [FASTEST, PLAIN])
@pytest.mark.parametrize("tokens", [1, 3, 8])
@EVERY_SCHEME
def test_decode_fills_and_reads_pages_of_the_pool(name: str, head_dim: int, tokens: int, kernels: int) -> None:
    """Pages fill at different steps; entries of pages that never fill are outside the pool."""
    case, plain, pool = layer(name, head_dim)
    use_kernels(kernels)
    expect_path(case, tokens, kernels == PLAIN)
    steps = 70 if tokens == 1 else 24
    news = [[tokens, tokens, tokens * (i % 2), tokens - (i % 3 == 0), tokens, tokens] for i in range(steps)]
    ends = [past + sum(new[b] for new in news) for b, past in enumerate(PAST)]
    outside(pool.table, [end // pool.page_size for end in ends])
    assert_steps_agree(case, plain, pool, news)


@pytest.mark.parametrize("kernels", [FASTEST, PLAIN, NO_WARPGROUPS])
@EVERY_SCHEME
def test_prefill_fills_and_reads_pages_of_the_pool(name: str, head_dim: int, kernels: int) -> None:
    """A long call, then chunks of it, then a token: pages that fill in a call are read in the same one."""
    case, plain, pool = layer(name, head_dim)
    use_kernels(kernels)
    expect_path(case, 100, kernels == PLAIN)
    news = [(290, 299, 1, 65, 150, 0), (64, 9, 64, 20, 64, 64), (9, 9, 9, 9, 9, 9), (1, 1, 1, 1, 1, 1)]
    outside(pool.table, [(past + sum(new[b] for new in news)) // pool.page_size for b, past in enumerate(PAST)])
    assert_steps_agree(case, plain, pool, news, check_every=1)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@FEW_SCHEMES
def test_other_activations(name: str, head_dim: int, dtype: torch.dtype) -> None:
    case, plain, pool = layer(name, head_dim, dtype=dtype)
    assert_steps_agree(case, plain, pool, [(1,) * 6, (4,) * 6, (100, 3, 0, 100, 9, 70), (1,) * 6], check_every=1)


@pytest.mark.parametrize("kernels", [FASTEST, PLAIN, NO_WARPGROUPS])
@pytest.mark.parametrize("tokens", [1, 5, 40])
@FEW_SCHEMES
def test_pages_out_of_the_window_need_no_entry(name: str, head_dim: int, tokens: int, kernels: int) -> None:
    window, past = 90, (700, 64, 153, 154, 20)
    case, plain, pool = layer(name, head_dim, past)
    use_kernels(kernels)
    for b, length in enumerate(past):
        pool.table[b, : max(length - window + 1, 0) // pool.page_size] = OUTSIDE[b % 3]
    inputs, new = case.inputs(tokens), (tokens,) * len(past)
    expected = attend(case, inputs, past, new, plain, window=window)
    assert expected.isfinite().all()
    assert torch.equal(bits(attend(case, inputs, past, new, pool.caches, pool.table, window)), bits(expected))


@EVERY_SCHEME
@pytest.mark.parametrize("index", [0, 1], ids=ROLES)
def test_append_and_load(name: str, head_dim: int, index: int) -> None:
    case, plain, pool = layer(name, head_dim)
    role, book = case.scheme.role(ROLES[index]), [x.to(DEVICE) for x in case.books[index]]
    held, before = list(PAST), pool.bits()
    for i, new in enumerate([(1,) * 6, (3, 0, 8, 1, 2, 1), (200, 64, 1, 0, 65, 130), *[(1,) * 6] * 9]):
        x = case.inputs(max(new), seed=i)[1].to(DEVICE)
        for caches, table in ((plain, None), (pool.caches, pool.table)):
            past, added = lengths(*held).to(DEVICE), lengths(*new).to(DEVICE)
            cuda.append(x, past, added, role, book, caches[index], page_table=table)
        held = [a + b for a, b in zip(held, new, strict=True)]
    changed = paged(case, case.caches, PAST).to(DEVICE)
    changed.caches[index] = pool.caches[index]
    whole = [plain[0] if index == 0 else changed.contiguous()[0], plain[1] if index == 1 else changed.contiguous()[1]]
    assert_same_pages(changed, whole, held)
    assert_untouched(before, pool.bits(), pages_of(pool.table, held, pool.page_size))
    outside(pool.table, [n // pool.page_size for n in held])
    for dtype in (torch.float16, torch.float32):
        length = lengths(*held).to(DEVICE)
        dense = [
            cuda.load(length, role, book, caches[index], dtype, table).cpu()
            for caches, table in ((plain, None), (pool.caches, pool.table))
        ]
        assert torch.equal(bits(dense[0]), bits(dense[1]))


@pytest.mark.parametrize("tokens", [1, 4, 100])
@FEW_SCHEMES
def test_sequences_share_the_pages_of_a_prefix(name: str, head_dim: int, tokens: int) -> None:
    """Three sequences of the same 200 tokens have one copy of their full pages, and go on apart."""
    case = Attention(name, head_dim, 2, 4, past=(200, 200, 200), capacity=CAPACITY, dtype=torch.float16)
    for cache in case.caches:
        for tensor in cache:
            tensor[1:] = tensor[0]
    plain = [[tensor.to(DEVICE) for tensor in cache] for cache in case.clone()]
    pool = paged(case, case.caches, case.past).to(DEVICE)
    pool.table[1:, : 200 // pool.page_size] = pool.table[0, : 200 // pool.page_size]
    steps = max(3, 70 // tokens)
    assert_steps_agree(case, plain, pool, [(tokens, tokens, max(tokens - 1, i % 2)) for i in range(steps)])


@FEW_SCHEMES
def test_a_captured_graph_follows_the_table(name: str, head_dim: int) -> None:
    """Between replays pages move to other places of the pool, and the table with them."""
    case, plain, pool = layer(name, head_dim)
    outside(pool.table, [(past + 70) // pool.page_size for past in PAST])
    q, k, v = (x.to(DEVICE) for x in case.inputs(1))
    past, new = lengths(*PAST).to(DEVICE), lengths(*[0] * 6).to(DEVICE)
    cache, books = [*pool.caches[0], *pool.caches[1]], [x.to(DEVICE) for role in case.books for x in role]

    def step() -> Tensor:
        y: Tensor = torch.ops.hqmq.attention_(
            q, k, v, past, new, None, books, cache, name, head_dim**-0.5, page_table=pool.table
        )
        return y

    graph, y = captured(step)
    pages, g = len(cache[0]), torch.Generator().manual_seed(5)
    held = list(PAST)
    for i in range(70):
        count = (1, 1, i % 2, 1, 1, 1)
        inputs = case.inputs(1, seed=i)
        for target, source in zip((q, k, v, new), (*inputs, lengths(*count)), strict=True):
            target.copy_(source)
        if i % 3 == 1:
            order = torch.randperm(pages, generator=g).to(DEVICE)  # page p moves to order[p]
            for tensor in (x for role in pool.caches for x in role[:-1]):
                moved = torch.empty_like(tensor)
                moved[order] = tensor
                tensor.copy_(moved)
            named = (pool.table >= 0) & (pool.table < pages)
            pool.table.copy_(torch.where(named, order[torch.where(named, pool.table, 0).long()].int(), pool.table))
        graph.replay()
        assert torch.equal(bits(y.cpu()), bits(attend(case, inputs, held, count, plain))), f"step {i}"
        past += new
        held = [a + b for a, b in zip(held, count, strict=True)]
    assert_same_pages(pool, plain, held)
    assert cuda.status(DEVICE)[:2] == (0, 0)


@pytest.mark.parametrize(
    ("tokens", "kernels"), [(1, FASTEST), (8, FASTEST), (1, PLAIN), (70, FASTEST), (70, NO_WARPGROUPS), (70, PLAIN)]
)
@FEW_SCHEMES
def test_reading_a_page_that_is_not_there_gives_nan(name: str, head_dim: int, tokens: int, kernels: int) -> None:
    case, plain, pool = layer(name, head_dim)
    use_kernels(kernels)
    pool.table[4, 1], pool.table[2, 0], pool.table[2, 1] = OUTSIDE
    inputs, new = case.inputs(tokens), (tokens,) * 6
    before, others = pool.bits(), [0, 1, 3, 5]
    expected = attend(case, inputs, PAST, new, plain)
    y = attend(case, inputs, PAST, new, pool.caches, pool.table)
    assert y[[2, 4]].isnan().all()
    assert torch.equal(bits(y[others]), bits(expected[others]))
    held = [past + tokens for past in PAST]
    assert_same_pages(pool, plain, held, others)
    assert_untouched(before, pool.bits(), pages_of(pool.table, held, pool.page_size))
    assert cuda.status(DEVICE)[:2] == (0, 0)  # counted where they fill


@pytest.mark.parametrize("kernels", [FASTEST, PLAIN])
@pytest.mark.parametrize("name", ["hq3", "hq4", "paper:s96_r4+med3"])
def test_only_rows_that_see_the_page_are_nan(name: str, kernels: int) -> None:
    """Window 72: tokens 196 … 198 see keys of page 1, tokens 199 … 203 do not."""
    case, plain, pool = layer(name, 128, (196, 130))
    use_kernels(kernels)
    pool.table[0, 1] = -1
    inputs, new = case.inputs(8), (8, 8)
    expected = attend(case, inputs, (196, 130), new, plain, window=72)
    y = attend(case, inputs, (196, 130), new, pool.caches, pool.table, 72)
    assert y[0, :, :3].isnan().all()
    assert relative_error(y[0, :, 3:], expected[0, :, 3:]) < 2e-3
    assert torch.equal(bits(y[1]), bits(expected[1]))


@pytest.mark.parametrize(("tokens", "entry"), zip((1, 8, 40), OUTSIDE, strict=True))
@FEW_SCHEMES
def test_a_page_that_fills_without_a_place_is_counted_and_not_written(
    name: str, head_dim: int, tokens: int, entry: int
) -> None:
    case, plain, pool = layer(name, head_dim)
    page = pool.page_size
    at = PAST[3] // page  # the page of token 63, which fills
    pool.table[3, at] = entry
    inputs, new = case.inputs(tokens), (tokens,) * 6
    before, others = pool.bits(), [0, 1, 2, 4, 5]
    expected = attend(case, inputs, PAST, new, plain)
    y = attend(case, inputs, PAST, new, pool.caches, pool.table)
    assert cuda.status(DEVICE)[:2] == (0, page)
    held = [past + tokens for past in PAST]
    seen = (at + 1) * page - PAST[3]  # new tokens up to the end of the page: they see it exactly
    assert relative_error(y[3, :, :seen], expected[3, :, :seen]) < 2e-3
    assert y[3, :, seen:].isnan().all()
    if tokens == 1:
        assert torch.equal(bits(y), bits(expected))
    assert torch.equal(bits(y[others]), bits(expected[others]))
    assert_same_pages(pool, plain, held, others)
    for ours, theirs in zip(pool.caches, plain, strict=True):
        assert torch.equal(bits(ours[-1].cpu()), bits(theirs[-1].cpu()))
    assert_untouched(before, pool.bits(), pages_of(pool.table, held, page))
    inputs, new = case.inputs(1, seed=9), (0, 0, 0, 1, 0, 0)
    y = attend(case, inputs, held, new, pool.caches, pool.table)
    assert y[3].isnan().all()
    assert not y[others].any()


@pytest.mark.parametrize("tokens", [1, 30])
@FEW_SCHEMES
def test_append_and_load_of_a_page_that_is_not_there(name: str, head_dim: int, tokens: int) -> None:
    case, plain, pool = layer(name, head_dim)
    page, role, book = pool.page_size, case.scheme.key, [x.to(DEVICE) for x in case.books[0]]
    at = PAST[3] // page
    pool.table[3, at] = -1
    x = case.inputs(tokens)[1].to(DEVICE)
    past, new = lengths(*PAST).to(DEVICE), lengths(*[tokens] * 6).to(DEVICE)
    for caches, table in ((plain, None), (pool.caches, pool.table)):
        cuda.append(x, past, new, role, book, caches[0], page_table=table)
    assert cuda.status(DEVICE)[:2] == (0, page)
    held = past + new
    expected, dense = (
        cuda.load(held, role, book, caches[0], torch.float16, table).cpu()
        for caches, table in ((plain, None), (pool.caches, pool.table))
    )
    missing = slice(max(at * page, role.sink_tokens), (at + 1) * page)
    assert dense[3, :, missing].isnan().all()
    expected[3, :, missing] = dense[3, :, missing]
    assert torch.equal(bits(dense), bits(expected))


def test_operators_take_a_table_and_check_its_entries() -> None:
    case, plain, pool = layer("hq4", 64)
    inputs = [x.to(DEVICE) for x in case.inputs(9)]
    books = [x.to(DEVICE) for role in case.books for x in role]
    rest = (lengths(*PAST).to(DEVICE), lengths(*[9] * 6).to(DEVICE), None, books)
    cache = [*pool.caches[0], *pool.caches[1]]
    expected = torch.ops.hqmq.attention_(*inputs, *rest, [*plain[0], *plain[1]], "hq4", 0.125)
    y = torch.ops.hqmq.attention_(*inputs, *rest, cache, "hq4", 0.125, page_table=pool.table)
    assert torch.equal(bits(y.cpu()), bits(expected.cpu()))
    pool.table[4, 3] = 1 << 20
    with pytest.raises(HqmqError, match="names page 1048576 for page 3 of sequence 4"):
        torch.ops.hqmq.attention_(*inputs, *rest, cache, "hq4", 0.125, page_table=pool.table)
    empty = [tensor[:0] for tensor in pool.caches[0][:-1]]
    with pytest.raises(HqmqError, match="the pool has no pages"):
        cuda.load(
            rest[0], case.scheme.key, books[:2], [*empty, pool.caches[0][-1]], torch.float16, pool.table
        )  # fmt: skip
