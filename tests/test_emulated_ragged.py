"""The fused decode kernel on batches that are cut by the work of their lengths, on the CPU (tests/cuda_emulation): the
oracle's answers, and the same bits in every order and on every GPU. tests/test_decode_cut.py has the cuts."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_paths import ALWAYS, DECODE, NEVER, batch_invariant, cut_by_work
from tests.attention_cases import Attention, attention_of, bits, with_sinks
from tests.emulated_cuda import EmulatedGpu, assert_right, attend

LIMIT = 2e-3  # of fp16 activations
MED3 = "paper:s96_r4+med3"
PAST = (3, 2100, 0, 63, 64, 1203, 700, 0, 1100, 510)
"""Within the first page, at its end, and as long as most of a piece of eight rounds (2,048 tokens) or more than it."""


def case_of(name: str, head_dim: int, heads: int, group: int, past: tuple[int, ...] = PAST, seed: int = 0) -> Attention:
    """A layer with as many sinks of K and V as kernels take."""
    capacity = -(-(max(past) + 16) // 64) * 64
    case = attention_of(name)(
        name, head_dim, heads, group, past=past, capacity=capacity, dtype=torch.float16, seed=seed
    )
    with_sinks(case, (4, 4) if case.scheme.key.optimised else (0, 0))
    return case


def assert_same_on_all(gpu: EmulatedGpu, case: Attention, new: tuple[int, ...], y: Tensor, window: int = 0) -> None:
    """Assert that other orders and GPUs give the bits of y."""
    inputs = case.inputs(max(new))
    for seed, multiprocessors in enumerate((1, 7, 132)):
        gpu.use(seed, multiprocessors)
        assert torch.equal(bits(attend(case, inputs, new, case.clone(), window=window)), bits(y))


@pytest.mark.parametrize(
    ("name", "head_dim", "group", "tokens"),
    [
        *[("hq3", 64, 4, 1), ("hq4", 128, 4, 1), ("hq4", 128, 2, 3), ("hq3.5", 64, 8, 1), ("hq5", 64, 1, 1)],
        *[(MED3, 64, 4, 1), (MED3, 256, 3, 1), ("k=hq4,v=hq3.5", 64, 2, 1), ("hq4@p16", 128, 3, 1)],
    ],
)
def test_answers_of_the_oracle(emulated: EmulatedGpu, name: str, head_dim: int, group: int, tokens: int) -> None:
    """With and without page tables; sequences without a token, or with fewer than others. By count it is another kernel
    where the emulation has one (HQMQ_EMULATED_COUNT)."""
    case = case_of(name, head_dim, 1, group)
    new = tuple(min(tokens, 1 + b % 3) if b != 4 else 0 for b in range(len(PAST)))
    with cut_by_work(ALWAYS):
        y = assert_right(case, new, DECODE, LIMIT)
        assert_same_on_all(emulated, case, new, y)
    with cut_by_work(NEVER):
        assert not torch.equal(bits(assert_right(case, new, DECODE, LIMIT)), bits(y))


@pytest.mark.parametrize("when", [NEVER, ALWAYS])
@pytest.mark.parametrize("window", [70, 1500])
@pytest.mark.parametrize(("name", "head_dim", "group"), [("hq4", 128, 3), (MED3, 64, 2)])
def test_windows_caps_and_sinks(
    emulated: EmulatedGpu, name: str, head_dim: int, group: int, window: int, when: int
) -> None:
    """Twelve rows and more are problems of two row blocks, the second of which may have no token."""
    case = case_of(name, head_dim, 1, group, (2500, 5, 1000, 62, 150))
    logits = torch.linspace(-1, 2, group)
    with cut_by_work(when):
        assert_right(case, (4, 3, 4, 1, 2), DECODE, LIMIT, logits, window, softcap=5.0)


@pytest.mark.parametrize(("name", "head_dim"), [("hq3", 64), ("hq4", 128), ("hq5", 64)])
def test_less_shared_memory_changes_no_bit(emulated: EmulatedGpu, name: str, head_dim: int) -> None:
    case = case_of(name, head_dim, 1, 4)
    new = (1,) * len(PAST)
    with cut_by_work(ALWAYS):
        y = assert_right(case, new, DECODE, LIMIT)
        emulated.use(1, shared_limit=99 * 1024)
        assert torch.equal(bits(assert_right(case, new, DECODE, LIMIT)), bits(y))


@dataclass
class Rising(Attention):
    """K and V grow from tile to tile (of 16 tokens) for 16 tiles, V by twice, and then begin anew."""

    def inputs(self, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v for `tokens` new rows."""
        q, k, v = super().inputs(tokens, seed)
        tile = (torch.arange(tokens) // 16 % 16)[:, None].to(k.dtype)
        return q, k * (1 + tile / 8), v * 2 ** (tile - 8)


@pytest.mark.parametrize(
    ("name", "compact"), [("hq3", True), ("k=hq3,v=hq2.5", True), ("hq3.5", False), ("k=hq4,v=hq3.5", False)]
)
def test_tiles_that_need_another_maximum(emulated: EmulatedGpu, name: str, compact: bool) -> None:
    """Weights of two tiles are made together, but not of these. Compact instances, as far as they are emulated, take
    one tile at a time and give the same bits."""
    case = Rising(name, 64, 1, 4, past=(2100, 1203, 517), capacity=2112, dtype=torch.float16)
    with cut_by_work(ALWAYS):
        y = assert_right(case, (1, 1, 1), DECODE, LIMIT)
        if compact:
            emulated.use(1, shared_limit=99 * 1024)
            assert torch.equal(bits(assert_right(case, (1, 1, 1), DECODE, LIMIT)), bits(y))


def test_a_ragged_batch_is_cut_by_work(emulated: EmulatedGpu) -> None:
    """Without being told to: 72 problems, 12 of which are long."""
    case = case_of("hq3", 64, 12, 1, (40, 4200, 300, 0, 70, 5))
    new = (1,) * 6
    inputs = case.inputs(1)
    y = assert_right(case, new, DECODE, LIMIT)
    assert_same_on_all(emulated, case, new, y)
    emulated.use(5)
    with cut_by_work(ALWAYS):
        assert torch.equal(bits(attend(case, inputs, new, case.clone())), bits(y))
    with cut_by_work(NEVER):
        assert not torch.equal(bits(attend(case, inputs, new, case.clone())), bits(y))


@pytest.mark.parametrize(
    ("name", "head_dim", "group", "tokens"),
    [
        *[("hq3", 64, 2, 1), ("hq3", 64, 3, 3), ("hq4", 128, 2, 1), ("hq4", 128, 4, 2), (MED3, 64, 4, 1)],
        ("hq5", 64, 2, 1),
    ],
)
def test_equal_lengths_have_the_bits_of_a_cut_by_count(
    emulated: EmulatedGpu, name: str, head_dim: int, group: int, tokens: int
) -> None:
    """The latter by kernels that only cut by count, but for hq5, of which the emulation has none."""
    case = case_of(name, head_dim, 4, group, (900,) * 6)
    inputs, new = case.inputs(tokens), (tokens,) * 6
    y = attend(case, inputs, new, case.clone())
    with cut_by_work(NEVER):
        assert_same_on_all(emulated, case, new, y)
    with cut_by_work(ALWAYS):
        assert not torch.equal(bits(attend(case, inputs, new, case.clone())), bits(y))


@pytest.mark.parametrize(("name", "head_dim", "group", "tokens"), [("hq3", 64, 3, 3), ("hq4", 128, 2, 1)])
def test_problems_of_one_split_have_the_bits_of_a_cut_by_count(
    emulated: EmulatedGpu, name: str, head_dim: int, group: int, tokens: int
) -> None:
    """As many as an H100 has multiprocessors, or twice as many."""
    case = case_of(name, head_dim, 4, group, (200,) * 33)
    new = (tokens,) * 33
    y = attend(case, case.inputs(tokens), new, case.clone())
    with cut_by_work(NEVER):
        assert_same_on_all(emulated, case, new, y)


def test_sequences_before_another_one_keep_their_bits(emulated: EmulatedGpu) -> None:
    """As long as pieces have the same length, which is the least one here; and what it holds changes nobody."""
    past = (300, 1900, 0, 70, 2300, 1000)
    case = case_of("hq4", 128, 1, 2, past)
    inputs, new = case.inputs(1), (1,) * len(past)
    with cut_by_work(ALWAYS):
        y = attend(case, inputs, new, case.clone())
        case.past = (*past[:5], 100)
        assert torch.equal(bits(attend(case, inputs, new, case.clone())[:5]), bits(y[:5]))
        case.past = past
        caches = case.clone()
        caches[1][1][4] = -1  # scales of V: NaN
        changed = attend(case, inputs, new, caches)
    others = torch.arange(len(past)) != 4
    assert torch.equal(bits(changed[others]), bits(y[others]))
    assert changed[4].isnan().any()


def test_batch_invariance_is_kept(emulated: EmulatedGpu) -> None:
    case = case_of("hq3", 64, 4, 1, (2100, 5, 300, 0, 700))
    inputs = case.inputs(1)
    with cut_by_work(ALWAYS), batch_invariant():
        together = attend(case, inputs, (1,) * 5, case.clone())
        for b in range(5):
            alone = case_of("hq3", 64, 4, 1, case.past)
            alone.past = case.past[b : b + 1]
            alone.caches = [[x[b : b + 1].clone() for x in role] for role in case.caches]
            q, k, v = (x[b : b + 1].contiguous() for x in inputs)
            assert torch.equal(bits(attend(alone, (q, k, v), (1,), alone.caches)), bits(together[b : b + 1]))


def test_more_sequences_than_a_warp_reads_at_once(emulated: EmulatedGpu) -> None:
    past = tuple((37 * b * b) % 400 if b != 50 else 3000 for b in range(70))
    case = case_of("hq3", 64, 1, 2, past)
    new = tuple(int(b % 5 != 3) for b in range(70))
    with cut_by_work(ALWAYS):
        y = assert_right(case, new, DECODE, LIMIT)
        assert_same_on_all(emulated, case, new, y)


def test_empty_sequences_only(emulated: EmulatedGpu) -> None:
    case = case_of("hq3", 64, 3, 2, (0, 0, 200))
    with cut_by_work(ALWAYS):
        assert_right(case, (1, 0, 0), DECODE, LIMIT)
        y = attend(case, case.inputs(1), (0, 0, 0), case.clone())
    assert not y.any()
