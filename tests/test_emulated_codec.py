"""HqmqQuantize and HqmqDequantize of the CUDA library, on the CPU: the host library's bytes and values."""

from __future__ import annotations

import pytest
import torch

from hqmq_trt import cuda, native, native_attention, oracle
from hqmq_trt.scheme import ROLES, Scheme
from tests.attention_cases import Attention, bits
from tests.codec_cases import activations, codebook, lengths
from tests.emulated_cuda import EmulatedGpu
from tests.encode_cases import VALUES, Caches, inputs
from tests.paged_cases import assert_same_pages, assert_untouched, paged, pages_of

# By rows in registers (docs/kernels.md), with the filter and without; by a block a page.
FAST = [("hq3", 64), ("hq4", 128), ("hq4@p16", 64), ("hq3.5@p32", 256), ("hq5@p16", 64), ("paper:s96_r4@p16", 128)]
GENERAL = [("hq3@p8", 64), ("paper:s96_r4+med3@p16", 128), ("paper:s3_r8+med3@p16", 20), ("fp16@p16", 64)]
EVERY = pytest.mark.parametrize(("name", "head_dim"), [*FAST, *GENERAL])


@pytest.mark.parametrize("role_name", ROLES)
@EVERY
def test_bytes_of_ragged_prefills(emulated: EmulatedGpu, name: str, head_dim: int, role_name: str) -> None:
    page = Scheme.parse(name).page_size
    count = [page + 1, page, page - 1]
    for seed, values in enumerate(VALUES):
        emulated.use(seed, multiprocessors=(3, 1, 40)[seed])
        caches = Caches(name, role_name, head_dim, 1, len(count), 4 * page, device="cpu")
        x = inputs(values, len(count), 1, 4 * page, head_dim).half()
        caches.append(x[:, :, : page + 1], [0] * len(count), count)
        caches.append(x[:, :, page + 1 :], count, [2 * page + 2, 1, page])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "head_dim"), [("hq4@p16", 128), ("paper:s96_r4+med3@p16", 64), ("paper:s24_r3@p16", 80)]
)
def test_bytes_of_other_activations(emulated: EmulatedGpu, name: str, head_dim: int, dtype: torch.dtype) -> None:
    caches = Caches(name, "key", head_dim, 2, 2, 64, device="cpu")
    caches.append(inputs("model", 2, 2, 40, head_dim).to(dtype), [0, 0], [40, 17])


@pytest.mark.parametrize(("name", "head_dim"), [("hq3", 64), ("hq4@p16", 128), ("paper:s96_r4+med3@p16", 64)])
def test_bytes_where_single_tokens_fill_pages(emulated: EmulatedGpu, name: str, head_dim: int) -> None:
    """All sequences at once, some, one, none: each cuts pages in another way."""
    page, heads, batch = Scheme.parse(name).page_size, 2, 5
    for filling in (batch, 2, 1, 0):
        emulated.use(filling)
        caches = Caches(name, "key", head_dim, heads, batch, 2 * page, device="cpu")
        x = inputs("model", batch, heads, page + 1, head_dim).half()
        past = [page - 1 if b >= batch - filling else page - 3 for b in range(batch)]
        caches.append(x[:, :, :page], [0] * batch, past)
        caches.append(x[:, :, page - 1 : page], past, [1] * batch)
        caches.append(x[:, :, page:], [t + 1 for t in past], [b % 2 for b in range(batch)])


@pytest.mark.parametrize(("name", "head_dim"), [("hq4@p16", 128), ("hq3@p8", 64), ("paper:s24_r3+med3@p16", 80)])
def test_the_first_tokens_are_kept_however_calls_cut_them(emulated: EmulatedGpu, name: str, head_dim: int) -> None:
    page, batch = Scheme.parse(name).page_size, 7
    steps = [list(range(batch)), [1] * batch, [b % 3 for b in range(batch)], [2 * page + 5] * batch, [1] * batch]
    longest = [max(step) for step in steps]
    x = inputs("model", batch, 1, sum(longest), head_dim).half()
    for sinks in (1, 8):
        emulated.use(sinks)
        caches, held = Caches(name, "key", head_dim, 1, batch, sum(longest), sinks, device="cpu"), [0] * batch
        for step, tokens in zip(steps, longest, strict=True):
            caches.append(torch.stack([x[b, :, at : at + tokens] for b, at in enumerate(held)]), held, step)
            held = [at + count for at, count in zip(held, step, strict=True)]
            for b, count in enumerate(held):
                first = min(count, sinks)
                assert torch.equal(bits(caches.device[-1][b, :, page : page + first]), bits(x[b, :, :first]))


@pytest.mark.parametrize("role_name", ROLES)
@EVERY
def test_load_gives_the_values_of_the_host(emulated: EmulatedGpu, name: str, head_dim: int, role_name: str) -> None:
    scheme, held = Scheme.parse(name), lengths(1, 63, 64, 90)
    role, page = scheme.role(role_name), scheme.page_size
    book = codebook(role, 2, role_name)
    cache = list(oracle.empty_cache(role, page, head_dim, 2, 4, 128 // page).values())
    native.append(activations(4, 2, 90, head_dim), lengths(0, 0, 0, 0), held, role, book, cache)
    for dtype in (torch.float16, torch.float32):
        dense = cuda.load(held, role, book, cache, dtype)
        assert torch.equal(bits(dense), bits(native_attention.load(held, role, book, cache, dtype)))


@pytest.mark.parametrize(("name", "head_dim"), [("hq3@p16", 64), ("hq4", 128), ("paper:s24_r3+med3@p8", 20)])
@pytest.mark.parametrize("index", [0, 1], ids=ROLES)
def test_pages_of_a_pool(emulated: EmulatedGpu, name: str, head_dim: int, index: int) -> None:
    """The same bytes and values with a page table; no page is touched but those that fill."""
    case = Attention(name, head_dim, 2, 1, past=(20, 0, 63), capacity=192)
    pool, plain = paged(case, case.caches, case.past), case.clone()
    role, book = case.scheme.role(ROLES[index]), case.books[index]
    held, before = list(case.past), pool.bits()
    for i, new in enumerate([(1, 1, 1), (3, 0, 8), (70, 64, 1), (1, 1, 1)]):
        x = case.inputs(max(new), seed=i)[1]
        for caches, table in ((plain, None), (pool.caches, pool.table)):
            cuda.append(x, lengths(*held), lengths(*new), role, book, caches[index], page_table=table)
        held = [a + b for a, b in zip(held, new, strict=True)]
    assert_untouched(before, pool.bits(), pages_of(pool.table, held, pool.page_size))
    whole = [plain[i] if i == index else pool.contiguous()[i] for i in (0, 1)]
    assert_same_pages(pool, whole, held)
    for b, n in enumerate(held):
        pool.table[b, n // pool.page_size :] = (-1, 1 << 30, -(1 << 31))[b]
    dense = [
        cuda.load(lengths(*held), role, book, caches[index], torch.float16, table)
        for caches, table in ((plain, None), (pool.caches, pool.table))
    ]
    assert torch.equal(bits(dense[0]), bits(dense[1]))
    assert cuda.status(emulated.device)[:2] == (0, 0)


def test_what_kernels_cannot_raise_is_counted(emulated: EmulatedGpu) -> None:
    case = Attention("hq3@p16", 64, 2, 1, past=(10, 3), capacity=32)
    x = case.inputs(30)[1]
    x[0, 1, 4, 3], x[1, 0, 29, 0] = torch.nan, 1e6
    role = case.scheme.key
    cuda.append(x, lengths(10, 3), lengths(30, 30), role, case.books[0], case.caches[0])
    assert cuda.status(emulated.device) == (2, 9, 0)
    assert (case.caches[0][1][0, 1, 0] == -1).all()  # short scales that are NaN
    pool = paged(case, case.clone(), (0, 0))
    pool.table[0, 0] = 99
    cuda.clear_status(emulated.device)
    cuda.append(
        case.inputs(20)[1], lengths(0, 0), lengths(20, 20), role, case.books[0], pool.caches[0], page_table=pool.table
    )
    assert cuda.status(emulated.device) == (0, 16, 0)
