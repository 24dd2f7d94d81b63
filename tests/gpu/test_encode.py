"""HqmqQuantize of the CUDA library against the host's bytes: all ways to cut pages, and values where scores tie."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hqmq_trt import cuda, native
from hqmq_trt.scheme import ROLES, Scheme
from tests.attention_cases import bits
from tests.codec_cases import lengths
from tests.encode_cases import VALUES, Caches, inputs
from tests.gpu.requirements import KERNEL_TESTS

pytestmark = KERNEL_TESTS

# By rows in registers (docs/kernels.md), by a block a page; with and without the filter.
FAST = [
    *[(name, head_dim) for name in ("hq3", "hq3.5", "hq4", "hq5", "paper:s96_r4") for head_dim in (64, 128, 256)],
    *[("hq4@p16", 64), ("hq3@p16", 128), ("hq4@p128", 256), ("hq3@p256", 256), ("hq4@p256", 128)],
    *[("paper:s24_r3", 64), ("paper:s1_r1", 128), ("paper:s47_r2@p32", 128), ("paper:s48_r2@p32", 128)],
    *[("paper:s1024_r8", 64), ("paper:s500_r1@p8", 256)],
]
GENERAL = [
    ("paper:s96_r4", 80),
    ("hq:s21_r3+med3", 128),
    ("hq3@p8", 64),
    ("hq3@p512", 128),
    ("paper:s96_r4+med3", 128),
    ("paper:s3_r8+med3@p16", 20),
]
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def gpu(tensor: Tensor) -> Tensor:
    """A copy on the GPU."""
    return tensor.cuda()


@DTYPES
@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("role_name", ROLES)
@pytest.mark.parametrize(("name", "head_dim"), [*FAST, *GENERAL])
def test_bytes_of_ragged_prefills(name: str, head_dim: int, role_name: str, values: str, dtype: torch.dtype) -> None:
    page = Scheme.parse(name).page_size
    count = [3 * page - 1, page, page + 5, page - 1]
    caches = Caches(name, role_name, head_dim, 2, len(count), 6 * page)
    x = inputs(values, len(count), 2, 6 * page, head_dim).to(dtype)
    caches.append(x[:, :, : 3 * page], [0] * len(count), count)
    caches.append(x[:, :, 3 * page :], count, [2 * page + 2, 1, page, 0])


@DTYPES
@pytest.mark.parametrize("batch", [1, 3, 16, 40])
@pytest.mark.parametrize("role_name", ROLES)
@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("hq3", 128), ("hq4", 128), ("hq4", 64), ("hq3", 256), ("hq4@p256", 256), ("paper:s96_r4", 80)],
)
def test_bytes_where_single_tokens_fill_pages(
    name: str, head_dim: int, role_name: str, batch: int, dtype: torch.dtype
) -> None:
    """All sequences at once, some, one, none: each cuts pages in another way."""
    page, heads = Scheme.parse(name).page_size, 8
    for filling in {batch, -(-batch // 2), 1, 0}:
        caches = Caches(name, role_name, head_dim, heads, batch, 2 * page)
        x = inputs("model", batch, heads, page + 1, head_dim).to(dtype)
        past = [page - 1 if b >= batch - filling else page - 3 for b in range(batch)]
        caches.append(x[:, :, :page], [0] * batch, past)
        caches.append(x[:, :, page - 1 : page], past, [1] * batch)
        caches.append(x[:, :, page:], [t + 1 for t in past], [b % 2 for b in range(batch)])


@DTYPES
@pytest.mark.parametrize("sinks", [0, 1, 4, 8])
@pytest.mark.parametrize(
    ("name", "head_dim"), [("hq4", 128), ("hq3", 64), ("hq5@p16", 256), ("hq3@p8", 64), ("paper:s24_r3+med3", 80)]
)
def test_the_first_tokens_are_kept_however_calls_cut_them(
    name: str, head_dim: int, sinks: int, dtype: torch.dtype
) -> None:
    """Sequences of 0 to 10 tokens get single ones, several, more than a page at once (whose own rows are then lost)."""
    page, batch = Scheme.parse(name).page_size, 11
    steps = [list(range(batch)), [1] * batch, [b % 3 for b in range(batch)], [2 * page + 5] * batch, [1] * batch]
    longest = [max(step) for step in steps]
    x = inputs("model", batch, 2, sum(longest), head_dim).to(dtype)
    caches = Caches(name, "key", head_dim, 2, batch, sum(longest), sinks)
    held = [0] * batch
    for step, tokens in zip(steps, longest, strict=True):
        caches.append(torch.stack([x[b, :, at : at + tokens] for b, at in enumerate(held)]), held, step)
        held = [at + count for at, count in zip(held, step, strict=True)]
        rows = caches.device[-1][:, :, page:].cpu()
        assert rows.shape[2] == sinks
        for b, count in enumerate(held):
            first = min(count, sinks)
            assert torch.equal(bits(rows[b, :, :first]), bits(x[b, :, :first].half()))


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize(("name", "head_dim"), [("hq3", 128), ("hq4", 128), ("hq4", 64), ("hq5", 256)])
def test_the_first_of_equal_secondaries_wins(name: str, head_dim: int, values: str) -> None:
    caches = Caches(name, "key", head_dim, 2, 1, 256)
    secondaries = caches.book[0]
    count = secondaries.shape[1]
    secondaries[:, count // 2 :] = secondaries[:, : count - count // 2].clone()
    for index, turned in ((1, (1.0, 0, 0, 0)), (-1, (0.5, 0.5, -0.5, 0.5)), (-2, (0, 0, 1.0, 0))):
        secondaries[:, index] = torch.tensor(turned)
    caches.append(inputs(values, 1, 2, 256, head_dim).half(), [0], [256])


@pytest.mark.parametrize("factor", [0.5, 1.25, 1e-3, 40.0])
def test_secondaries_of_any_length(factor: float) -> None:
    """The filter's bound is for unit quaternions: others take the long way, or gaps that are none."""
    caches = Caches("hq4", "key", 128, 2, 1, 192)
    caches.book[0] *= factor
    caches.append(inputs("model", 1, 2, 192, 128).half(), [0], [192])


@pytest.mark.parametrize("name", ["hq3", "hq3.5", "hq4"])
def test_bytes_of_two_million_chunks(name: str) -> None:
    caches = Caches(name, "value", 128, 8, 1, 8192)
    x = torch.randn(1, 8, 8192, 128, generator=torch.Generator().manual_seed(len(name))).half()
    caches.append(x, [0], [8192])


def test_rows_that_cannot_be_loaded_four_elements_at_a_time() -> None:
    caches = Caches("hq4", "key", 128, 2, 1, 192)
    x = inputs("model", 1, 2, 192, 129)[..., 1:].half()
    native.append(x.contiguous(), lengths(0), lengths(192), caches.role, caches.book, caches.host)
    wide = gpu(torch.cat([x[..., :1], x], -1))[..., 1:]
    book = [gpu(tensor) for tensor in caches.book]
    cuda.append(wide, gpu(lengths(0)), gpu(lengths(192)), caches.role, book, caches.device)
    for ours, theirs in zip(caches.device, caches.host, strict=True):
        assert torch.equal(bits(ours.cpu()), bits(theirs))
