"""Page tables on the CPU: the operators give what they give without one."""

from __future__ import annotations

from ctypes import byref

import pytest
import torch
from torch import Tensor

from hqmq_trt import cuda, native, torch_attention, torch_ops
from hqmq_trt import page_table as paging
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import cache_tensors, paged_cache_tensors
from hqmq_trt.native_attention import AttentionParams, AttentionRole
from hqmq_trt.scheme import ROLES, Scheme
from tests.attention_cases import Attention, assert_same_caches, bits
from tests.codec_cases import lengths
from tests.paged_cases import Paged, assert_same_pages, assert_untouched, paged, pages_of

SCHEMES = [("hq3@p16", 64), ("hq4@p32", 64), ("k=hq4,v=hq3@p16", 64), ("paper:s8_r3+med3@p8", 20), ("fp16@p8", 16)]
OPS = torch.ops.hqmq


def attend(
    case: Attention, inputs: tuple[Tensor, ...], past: Tensor, new: Tensor, caches: list[list[Tensor]],
    table: Tensor | None, window: int = 0,
) -> Tensor:  # fmt: skip
    """hqmq::attention_ in place."""
    books, tensors = [x for role in case.books for x in role], [x for role in caches for x in role]
    y: Tensor = OPS.attention_(
        *inputs, past, new, None, books, tensors, case.name, case.head_dim**-0.5, window, page_table=table
    )
    return y


def assert_steps_agree(case: Attention, pool: Paged, news: list[tuple[int, ...]], window: int = 0) -> None:
    """Run calls with and without the table; the same bytes, and nothing else in the pool touched."""
    plain, held = case.clone(), list(case.past)
    for i, new in enumerate(news):
        inputs = case.inputs(max(new), seed=i)
        before, past = pool.bits(), lengths(*held)
        expected = attend(case, inputs, past, lengths(*new), plain, None, window)
        y = attend(case, inputs, past, lengths(*new), pool.caches, pool.table, window)
        held = [a + b for a, b in zip(held, new, strict=True)]
        assert torch.equal(bits(y), bits(expected))
        assert_same_pages(pool, plain, held)
        assert_untouched(before, pool.bits(), pages_of(pool.table, held, pool.page_size))


@pytest.mark.parametrize(("name", "head_dim"), SCHEMES)
def test_attention_is_that_of_the_contiguous_form(name: str, head_dim: int) -> None:
    case = Attention(name, head_dim, 2, 2, past=(0, 30, 47, 64), capacity=160)
    pool = paged(case, case.caches, case.past)
    assert_steps_agree(case, pool, [(3, 2, 1, 0), (1, 1, 1, 1), (40, 0, 70, 33), *[(1, 1, 1, 1)] * 9])


@pytest.mark.parametrize(("name", "head_dim"), SCHEMES)
@pytest.mark.parametrize("role", ROLES)
def test_quantize_and_dequantize_are_those_of_the_contiguous_form(name: str, head_dim: int, role: str) -> None:
    case = Attention(name, head_dim, 2, 1, past=(0, 30), capacity=96)
    pool, index = paged(case, case.caches, case.past), ROLES.index(role)
    x = case.inputs(40)[1]
    past, new, held = lengths(*case.past), lengths(40, 37), lengths(40, 67)
    plain, book, paged_cache = case.clone()[index], case.books[index], pool.caches[index]
    OPS.quantize_(x, past, new, book, plain, name, role)
    OPS.quantize_(x, past, new, book, paged_cache, name, role, page_table=pool.table)
    dense = [
        OPS.dequantize(held, book, cache, name, role, torch.float16, page_table=table)
        for cache, table in ((plain, None), (paged_cache, pool.table))
    ]
    assert torch.equal(bits(dense[0]), bits(dense[1]))


def test_sequences_share_the_pages_of_a_prefix() -> None:
    """The second sequence goes on from the first 64 tokens of the first; pages of both stay theirs."""
    case = Attention("hq4@p16", 64, 2, 2, past=(64, 64), capacity=160)
    for cache in case.caches:
        for tensor in cache:
            tensor[1] = tensor[0]
    pool = paged(case, case.caches, case.past)
    pool.table[1, :4] = pool.table[0, :4]
    assert_steps_agree(case, pool, [(5, 11), (1, 1), (30, 9), (20, 50)])
    assert len({*pool.table.flatten().tolist()}) == pool.table.numel() - 4


def test_entries_that_nobody_needs_may_be_anything() -> None:
    window = 20
    case = Attention("hq3@p16", 64, 2, 2, past=(64, 70, 33), capacity=160)
    pool = paged(case, case.caches, case.past)
    pool.table[0, :2] = -1  # out of the window: key 45 is the first that token 64 sees
    pool.table[1, :3], pool.table[1, 4:] = -1, 1000  # page 3 has the keys 51 … 63 that token 70 sees
    pool.table[2] = -7  # no new token
    plain = case.clone()
    inputs = case.inputs(5)
    past, new = lengths(*case.past), lengths(5, 2, 0)
    y = attend(case, inputs, past, new, pool.caches, pool.table, window)
    assert torch.equal(bits(y), bits(attend(case, inputs, past, new, plain, None, window)))


@pytest.mark.parametrize("entry", [-1, 1000])
@pytest.mark.parametrize(("page", "what"), [(2, "read"), (4, "filled")])
def test_a_needed_entry_outside_the_pool_is_refused_and_nothing_changes(entry: int, page: int, what: str) -> None:
    case = Attention("hq4@p16", 64, 2, 2, past=(10, 70), capacity=160)
    pool = paged(case, case.caches, case.past)
    pool.table[1, page] = entry
    before, tails = pool.bits(), [cache[-1].clone() for cache in pool.caches]
    with pytest.raises(HqmqError, match=f"names page {entry} for page {page} of sequence 1"):
        attend(case, case.inputs(20), lengths(10, 70), lengths(20, 20), pool.caches, pool.table)
    if what == "filled":
        x = case.inputs(20)[1]
        with pytest.raises(HqmqError, match=f"for page {page} of sequence 1"):
            OPS.quantize_(
                x, lengths(10, 70), lengths(20, 20), case.books[0], pool.caches[0], case.name, "key",
                page_table=pool.table,
            )  # fmt: skip
    else:
        with pytest.raises(HqmqError, match=f"for page {page} of sequence 1"):
            OPS.dequantize(
                lengths(10, 70), case.books[0], pool.caches[0], case.name, "key", torch.float32, page_table=pool.table
            )
    assert_untouched(before, pool.bits(), [])
    assert all(torch.equal(bits(a), bits(cache[-1])) for a, cache in zip(tails, pool.caches, strict=True))


def test_errors_leave_the_pool_as_it_was() -> None:
    case = Attention("hq4@p16", 64, 2, 2, past=(10, 70), capacity=96)
    pool = paged(case, case.caches, case.past)
    before = pool.bits()
    q, k, v = case.inputs(30)
    with pytest.raises(HqmqError, match="sequence 1 needs 7 pages"):
        attend(case, (q, k, v), lengths(10, 70), lengths(20, 30), pool.caches, pool.table)
    v[1, 0, 3, 3] = torch.nan
    with pytest.raises(HqmqError, match="sequence 1, head 0, token 73"):
        attend(case, (q, k, v), lengths(10, 70), lengths(20, 20), pool.caches, pool.table)
    assert_untouched(before, pool.bits(), [])


def test_tables_and_tensors_that_do_not_fit_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Attention("hq4@p16", 64, 2, 2, past=(10, 70), capacity=96)
    pool = paged(case, case.caches, case.past)
    run = (case, case.inputs(2), lengths(10, 70), lengths(2, 2))
    with pytest.raises(HqmqError, match=r"page_table is torch\.int64 \[2, 6\]"):
        attend(*run, pool.caches, pool.table.long())
    with pytest.raises(HqmqError, match=r"\[1, 6\], expected torch\.int32 \[2, M\]"):
        attend(*run, pool.caches, pool.table[:1])
    with pytest.raises(HqmqError, match="page_table is not a contiguous tensor on cpu"):
        attend(*run, pool.caches, pool.table.t().contiguous().t())
    with pytest.raises(HqmqError, match=r"key codes is .* expected torch\.int32 \[2, 2, 16, 8\]"):
        attend(*run, case.clone(), pool.table)
    smaller = [*[x[:-1].clone() for x in pool.caches[1][:-1]], pool.caches[1][-1]]
    with pytest.raises(HqmqError, match="differ in capacity"):
        attend(*run, [pool.caches[0], smaller], pool.table)
    with pytest.raises(HqmqError, match=r"page_table is torch\.int64"):
        native.role_cache(case.scheme.key, pool.caches[0], native.CPU, pool.table.long())
    monkeypatch.setattr(torch_ops, "_kernels", lambda x: torch_attention)
    with pytest.raises(HqmqError, match="plain-torch kernels on cpu take no page_table"):
        attend(*run, pool.caches, pool.table)


def test_gather_and_scatter_are_inverse() -> None:
    case = Attention("paper:s8_r3+med3@p8", 20, 3, 1, past=(40, 24), capacity=64)
    pool = paged(case, case.caches, case.past)
    assert_same_pages(pool, case.caches, case.past)
    pages = pool.table.shape[1]
    for cache in pool.caches:
        for tensor in cache[:-1]:
            tensor.zero_()
    for whole, cache in zip(case.caches, pool.caches, strict=True):
        paging.scatter(whole, cache, pool.table, [range(pages)] * 2)
    assert_same_caches(pool.contiguous(), case.caches)
    assert paging.gather([torch.zeros(0, 1, 8, 2), torch.zeros(1)], torch.full((2, 3), -1))[0].shape == (2, 1, 24, 2)


@pytest.mark.parametrize(("name", "head_dim"), SCHEMES)
def test_tensors_of_a_pool_hold_as_much_as_those_of_sequences(name: str, head_dim: int) -> None:
    scheme = Scheme.parse(name)
    for role in (scheme.key, scheme.value):
        sizes = (role, scheme.page_size, head_dim, 3)
        whole, pool = cache_tensors(*sizes, 2, 5), paged_cache_tensors(*sizes, 2, 10)
        assert [(t.name, t.dtype, t.nbytes) for t in whole] == [(t.name, t.dtype, t.nbytes) for t in pool]
        assert {t.shape[0] for t in pool[:-1]} == {10}
        assert pool[-1] == whole[-1]


def test_pages_that_a_call_needs() -> None:
    assert paging.pages_that_fill([0, 15, 31], [16, 0, 40], 16) == [range(0, 1), range(0), range(1, 4)]
    assert paging.pages_that_are_read([64, 64, 70], [1, 0, 3], 16) == [range(4), range(0), range(4)]
    assert paging.pages_that_are_read([64, 63, 70], [1, 1, 3], 16, 17) == [range(3, 4), range(2, 3), range(3, 4)]


def test_the_allocator_gives_shares_and_takes_back() -> None:
    pages = paging.PageAllocator(3, 4, 6, 16)
    pages.reserve(0, 47)
    pages.reserve(0, 48)
    assert (pages.free_pages, pages.table[0].tolist()) == (3, [0, 1, 2, -1])
    pages.fork(0, 1, 40)
    pages.reserve(1, 64)
    assert (pages.free_pages, pages.table[1].tolist()) == (1, [0, 1, 3, 4])
    with pytest.raises(HqmqError, match="needs 5 pages for 80 tokens, the table has 4"):
        pages.reserve(1, 80)
    with pytest.raises(HqmqError, match="needs 2 more pages, 1 of the pool are free"):
        pages.reserve(2, 32)
    with pytest.raises(HqmqError, match="has no 4 pages"):
        pages.fork(0, 2, 64)
    with pytest.raises(HqmqError, match="cannot go on from itself"):
        pages.fork(0, 0, 16)
    with pytest.raises(HqmqError, match="has no 3 pages"):
        pages.fork(2, 1, 48)
    assert pages.table[1].tolist() == [0, 1, 3, 4]
    pages.fork(0, 2, 48)
    pages.fork(1, 2, 16)
    assert (pages.free_pages, pages.table[2].tolist()) == (1, [0, -1, -1, -1])
    pages.release(2)
    pages.release(0)
    assert (pages.free_pages, pages.table[0].tolist()) == (2, [-1] * 4)  # page 2 alone was its own
    pages.release(1)
    assert pages.free_pages == 6


def test_a_forked_sequence_goes_on_as_its_source_would() -> None:
    """Sequence 1 begins where sequence 0 is after 39 tokens, with two of its pages and a copy of its tail."""
    case = Attention("hq4@p16", 64, 2, 2, past=(0, 0), capacity=80)
    pages = paging.PageAllocator(2, 5, 9, 16)
    pool, plain = paged(case, case.caches, case.past), case.clone()
    prompt, rest = case.inputs(39), case.inputs(30, seed=1)
    pages.reserve(0, 39)
    attend(case, prompt, lengths(0, 0), lengths(39, 0), pool.caches, pages.table)
    pages.fork(0, 1, 39)
    for cache in pool.caches:
        cache[-1][1] = cache[-1][0]
    for b, count in enumerate((30, 11)):
        pages.reserve(b, 39 + count)
    y = attend(case, rest, lengths(39, 39), lengths(30, 11), pool.caches, pages.table)
    prompts = tuple(x[:1].expand(2, -1, -1, -1) for x in prompt)
    attend(case, prompts, lengths(0, 0), lengths(39, 39), plain, None)
    assert torch.equal(bits(y), bits(attend(case, rest, lengths(39, 39), lengths(30, 11), plain, None)))
    assert pages.table[0, :2].tolist() == pages.table[1, :2].tolist()
    assert pages.table[0, 2] != pages.table[1, 2]


@pytest.mark.skipif(not cuda.available(), reason="libhqmq_cuda.so is not built")
@pytest.mark.parametrize(
    ("table", "pool_pages", "message"),
    [
        (None, 4, "the page table is missing"),
        (2, 4, "multiple of 4 bytes"),
        (64, 0, "the pool has no pages"),
        (64, -1, "pool_pages is negative"),
        (64, 1 << 30, "beyond what one launch can count"),
    ],
)
def test_the_cuda_library_checks_the_table(table: int | None, pool_pages: int, message: str) -> None:
    """Before it asks for a GPU or reads any of these pointers."""
    role = Scheme.parse("hq4@p16").key
    params, rows = native.role_params(role, 64, 16), native.Rows(64, 1, 0, 0, 0, b"x")
    cache = native.RoleCache(*[64] * 6)
    lib, pages = cuda.library(), cuda.Pages(table, pool_pages)
    code = lib.hqmq_cuda_load_paged(byref(pages), byref(params), 1, 2, 3, 64, 64, 64, byref(cache), byref(rows), None)
    assert code == 1
    assert message in lib.hqmq_cuda_last_error().decode()
    sizes = (1, 2, 1, 3)
    code = lib.hqmq_cuda_append_paged(
        byref(pages), byref(params), *sizes, byref(rows), 64, 64, 64, 64, byref(cache), None, None, 0, None
    )
    assert code == 1
    assert message in lib.hqmq_cuda_last_error().decode()
    attention = AttentionParams(1, 2, 1, 1, 3, 0, 1.0, 0.0)
    each = AttentionRole(params, rows, 64, 64, None, cache)
    code = lib.hqmq_cuda_attention_paged(
        byref(pages), byref(attention), byref(rows), byref(each), byref(each), 64, 64, None, byref(rows), None, None, 0,
        None,
    )  # fmt: skip
    assert code == 1
    assert message in lib.hqmq_cuda_last_error().decode()
