"""Batches that the fused decode kernel cuts by the work of their lengths (plugins/cuda/decode_cut.h)."""

from __future__ import annotations

from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_paths import ALWAYS, NEVER, batch_invariant, cut_by_work, shared_memory
from hqmq_trt import cuda
from tests.attention_cases import LIMITS, Attention, assert_close, attention_of, bits, with_sinks
from tests.codec_cases import lengths
from tests.gpu.decode_layer import DEVICE, HEADS, MED3, PRESETS, fast, held, layer
from tests.gpu.graphs import captured
from tests.gpu.requirements import KERNEL_TESTS

pytestmark = [*KERNEL_TESTS, pytest.mark.usefixtures("clean_status")]

CASES = [
    *[(name, 128, 4, 1) for name in (*PRESETS, "k=hq4,v=hq3.5", MED3)],
    *[(name, head_dim, 8, 1) for name in ("hq3", "hq4", MED3) for head_dim in (64, 256)],
    *[("hq3", 128, 2, 5), ("hq4", 128, 4, 8), (MED3, 128, 7, 2), ("hq4@p16", 64, 3, 1)],
]
"""Scheme, head_dim, query heads of a KV head, new tokens; up to four row blocks."""
MANY_HEADS = 8
LONGEST = 4352
PAST = (4300, 0, 63, 64, 1203, 700, 130, 2500, 255, 1, 1023, 4095, 3, 510, 3000, 15)
"""Tokens that sequences of MANY_HEADS heads hold: as long as three pieces, of a page or less, and empty."""


@lru_cache(maxsize=1)
def case_of(name: str, head_dim: int, group: int, batch: int) -> tuple[Attention, list[list[Tensor]]]:
    """A layer of MANY_HEADS heads, and its codebooks on the GPU."""
    case = attention_of(name)(
        name, head_dim, MANY_HEADS, group, past=PAST[:batch], capacity=LONGEST, dtype=torch.float16, seed=batch
    )
    with_sinks(case, (4, 4) if case.scheme.key.optimised else (0, 0))
    case.caches = [[tensor.to(DEVICE) for tensor in role] for role in case.caches]
    return case, [[book.to(DEVICE) for book in role] for role in case.books]


@pytest.mark.parametrize("window", [0, 1500])
@pytest.mark.parametrize(("name", "head_dim", "group", "tokens"), CASES)
def test_answers_of_the_reference(name: str, head_dim: int, group: int, tokens: int, window: int) -> None:
    """Sequences of 1 to 4,097 tokens in pieces of 2,048: the same bits every time, and with less shared memory if the
    library has kernels for it."""
    case = layer(name, head_dim)
    past, new = held(tokens)
    q, k, v = case.inputs(tokens, torch.float16)
    q = case.of_group(q, group)
    assert fast(q, k, case.scheme)
    sinks = torch.linspace(-1, 2, HEADS * group, device=DEVICE)
    expected = case.attend((q, k, v), past, new, case.clone(), sinks, window, reference=True)
    with cut_by_work(ALWAYS):
        y = case.attend((q, k, v), past, new, case.clone(), sinks, window)
        assert_close(y, expected, new, LIMITS[torch.float16])
        for _ in range(10):
            assert torch.equal(bits(case.attend((q, k, v), past, new, case.clone(), sinks, window)), bits(y))
        with shared_memory(99 * 1024):
            if fast(q, k, case.scheme):
                assert torch.equal(bits(case.attend((q, k, v), past, new, case.clone(), sinks, window)), bits(y))


@pytest.mark.parametrize("name", ["hq3", "hq4", MED3])
def test_a_ragged_batch_is_cut_by_work(name: str) -> None:
    """Without being told to, unless batch invariance is on; a call where a problem is one split by count."""
    case, books = case_of(name, 128, 4, 16)
    q, k, v = (x.to(DEVICE) for x in case.inputs(1))
    new = lengths(*[1] * 16).to(DEVICE)

    def attend(past: tuple[int, ...]) -> Tensor:
        rest = (lengths(*past).to(DEVICE), new, None, case.scheme, books, case.clone(), 128**-0.5)
        return cuda.attend(q, k, v, *rest)

    y, equal = attend(PAST), attend((1000,) * 16)
    with cut_by_work(ALWAYS):
        assert torch.equal(bits(attend(PAST)), bits(y))
    with cut_by_work(NEVER):
        by_count = attend(PAST)
        assert not torch.equal(bits(by_count), bits(y))
        assert_close(y, by_count.float(), new, 2 * LIMITS[torch.float16])
        assert torch.equal(bits(attend((1000,) * 16)), bits(equal))
    with batch_invariant():
        invariant = attend(PAST)
        assert torch.equal(bits(attend((*PAST[:8], *[0] * 8))[:8]), bits(invariant[:8]))


@pytest.mark.parametrize(("name", "head_dim", "group", "tokens"), [case for case in CASES if case[1] <= 128])
def test_calls_that_cannot_be_cut_by_work_have_the_same_bits(name: str, head_dim: int, group: int, tokens: int) -> None:
    """Instances that only cut by count take them, those that cut either way the same lengths otherwise."""
    case, books = case_of(name, head_dim, group, 4)
    q, k, v = (x.to(DEVICE) for x in case.inputs(tokens))
    new = lengths(*[tokens] * 4).to(DEVICE)
    for length in (0, 70, 1000, 4300):
        rest = (lengths(*[length] * 4).to(DEVICE), new, None, case.scheme, books)
        y = cuda.attend(q, k, v, *rest, case.clone(), head_dim**-0.5)
        with cut_by_work(NEVER):
            for _ in range(3):
                assert torch.equal(bits(cuda.attend(q, k, v, *rest, case.clone(), head_dim**-0.5)), bits(y))


@pytest.mark.parametrize("name", ["hq3", MED3])
@pytest.mark.parametrize("batch", [2, 16])
def test_a_captured_graph_serves_both_cuts(name: str, batch: int) -> None:
    """Lengths change between replays, and with them how the call is cut."""
    case, books = case_of(name, 128, 4, batch)
    q, k, v = (x.to(DEVICE) for x in case.inputs(1))
    past, new, caches = lengths(*PAST[:batch]).to(DEVICE), lengths(*[1] * batch).to(DEVICE), case.clone()

    def step() -> Tensor:
        return cuda.attend(q, k, v, past, new, None, case.scheme, books, caches, 128**-0.5)

    graph, y = captured(step)
    for held_before in (PAST[:batch], (70,) * batch, (0,) * batch, PAST[:batch][::-1], (4300,) * batch, PAST[:batch]):
        past.copy_(lengths(*held_before))
        for target, source in zip(caches, case.caches, strict=True):
            for tensor, other in zip(target, source, strict=True):
                tensor.copy_(other)
        graph.replay()
        torch.cuda.synchronize()
        rest = (lengths(*held_before).to(DEVICE), new, None, case.scheme, books, case.clone(), 128**-0.5)
        assert torch.equal(bits(y), bits(cuda.attend(q, k, v, *rest)))
