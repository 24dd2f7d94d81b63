"""The fused decode kernel and the first tokens of a sequence, which caches keep exact (sink tokens)."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_paths import plain_attention
from hqmq_trt import cuda
from hqmq_trt.scheme import Scheme
from tests.attention_cases import LIMITS, Attention, assert_close, assert_same_caches, bits
from tests.codec_cases import lengths
from tests.gpu.decode_layer import (
    DEVICE,
    MED3,
    PRESETS,
    SINKS,
    TEN_BIT,
    fast,
    held,
    layer,
    sink_ends,
)
from tests.gpu.requirements import KERNEL_TESTS

pytestmark = [*KERNEL_TESTS, pytest.mark.usefixtures("clean_status")]

SINK_CASES = [
    *[("hq3", 128, 4), ("hq4", 128, 4), ("hq3.5", 64, 4), ("hq5", 64, 4), ("hq4", 256, 4), ("k=hq4,v=hq3", 128, 4)],
    *[("k=hq4,v=hq3.5", 128, 4), ("k=hq4,v=hq3.5", 256, 4), (MED3, 128, 4), (MED3, 64, 0), (TEN_BIT[0], 64, 4)],
    *[("hq4@p16", 64, 8), ("hq3@p16", 128, 1), ("hq5@p128", 128, 8), ("hq3.5@p32", 256, 3), ("hq3", 128, 0)],
]
"""Schemes, head_dim and how many first tokens are exact."""


@pytest.mark.parametrize(("name", "head_dim", "sinks"), SINK_CASES)
def test_the_first_tokens_are_exact(name: str, head_dim: int, sinks: int) -> None:
    """Sequences of fewer tokens, calls that go from page 0 to page 1, windows that hide some of these tokens."""
    page = Scheme.parse(name).page_size
    ends = sink_ends(page)
    case = layer(name, head_dim, ends, sinks)
    for tokens in range(1, 9):
        past, new = held(tokens, ends)
        ragged = (new - torch.arange(len(ends), device=DEVICE) % tokens).clamp(min=0).int()
        q, k, v = case.inputs(tokens, torch.float16)
        for window, count in ((0, new), (0, ragged), (1, new), (5, new), (page, ragged), (page + 2, new)):
            present = case.clone()
            expected = case.attend((q, k, v), past, count, present, window=window, reference=True)
            for group in (1, 4, 7):
                rows, caches = case.of_group(q, group), case.clone()
                assert fast(rows, k, case.scheme)
                y = case.attend((rows, k, v), past, count, caches, window=window)
                assert_close(y, case.of_group(expected, group), count, LIMITS[torch.float16])
                assert_same_caches(caches, present)
            with plain_attention():
                plain = case.attend((rows, k, v), past, count, case.clone(), window=window)
            assert_close(y, plain.float(), count, LIMITS[torch.float16])


@pytest.mark.parametrize("window", [0, 3, 18])
@pytest.mark.parametrize(("name", "head_dim"), [("hq4@p16", 64), ("hq3@p16", 128)])
def test_the_first_tokens_are_those_of_the_oracle(name: str, head_dim: int, window: int) -> None:
    past = (0, 1, 3, 4, 5, 8, 11, 15, 16, 17, 31, 32, 100)
    case = Attention(name, head_dim, 1, 4, past=past, dtype=torch.float16)
    g = torch.Generator().manual_seed(1)
    for cache in case.caches:
        cache[-1][:, :, 16:] = 2 * torch.randn(cache[-1][:, :, 16:].shape, generator=g)
    q, k, v = case.inputs(8)
    new = lengths(*[8 - b % 5 for b in range(len(past))])
    expected, _ = case.oracle(q, k, v, new, head_dim**-0.5, window)
    books, caches = ([[x.to(DEVICE) for x in role] for role in part] for part in (case.books, case.caches))
    assert fast(q, k, case.scheme)
    q, k, v, held_, count = (x.to(DEVICE) for x in (q, k, v, lengths(*past), new))
    y = cuda.attend(q, k, v, held_, count, None, case.scheme, books, caches, head_dim**-0.5, window)
    assert_close(y.cpu(), expected, new, LIMITS[torch.float16])


@pytest.mark.parametrize("name", PRESETS)
def test_codes_of_the_first_tokens_are_not_read_from_later_pages(name: str) -> None:
    ends = tuple(length for length in sink_ends(64) if length >= 72)
    case = layer(name, 128, ends)
    spoiled = case.clone()
    for codes, scales, *_ in spoiled:
        codes[:, :, :SINKS] = -1
        scales.view(torch.uint8)[:, :, 0, :SINKS] = 255  # short scales that are NaN
    for tokens, window in ((1, 0), (5, 0), (8, 70)):
        past, new = held(tokens, ends)
        q, k, v = case.inputs(tokens, torch.float16)
        q = case.of_group(q, 4)
        y = case.attend((q, k, v), past, new, case.clone(), window=window)
        caches = [[tensor.clone() for tensor in role] for role in spoiled]
        assert torch.equal(bits(case.attend((q, k, v), past, new, caches, window=window)), bits(y))


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("tokens", [1, 5])
def test_nan_in_an_exact_row_reaches_the_queries_that_see_it(tokens: int, window: int) -> None:
    case = layer("hq3", 128)
    past, new = held(tokens)
    q, k, v = case.inputs(tokens, torch.float16)
    q = case.of_group(q, 4)
    i = torch.arange(tokens, device=DEVICE)
    time, page = past[:, None] + i, case.scheme.page_size
    sees = (i < new[:, None]) & (time >= page)
    if window:
        sees &= time - window < 2
    assert sees.any()
    for role in (0, 1):
        caches = case.clone()
        caches[role][-1][:, :, page + 2, 3] = torch.nan
        y = case.attend((q, k, v), past, new, caches, window=window)
        assert torch.equal(y[..., 3].isnan(), sees[:, None].expand(y.shape[:3]))
        others = y[..., [0, 127]].isnan().any(-1)
        assert torch.equal(others, sees[:, None].expand(y.shape[:3]) if role == 0 else torch.zeros_like(others))
