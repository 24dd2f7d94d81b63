"""How the fused decode kernel cuts calls, by its own code on the CPU (tests/cuda_emulation/cut.cu): what blocks take of
batches of equal and of ragged lengths, and how long that should take, by count and by work (plugins/cuda/decode_cut.h).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from ctypes import POINTER, byref, c_int, c_size_t
from dataclasses import dataclass, replace

import pytest
import torch

from benchmarks.gpu_paths import ALWAYS, NEVER, WHERE_FASTER, batch_invariant, cut_by_work
from hqmq_trt import cuda, native
from hqmq_trt.native import RoleParams
from hqmq_trt.native_attention import AttentionParams
from hqmq_trt.scheme import ROLES, Scheme
from tests.codec_cases import lengths
from tests.emulated_cuda import EmulatedGpu

TILE, WARPS, OWN_WARPS = 16, 16, 4
PART = 26 / WARPS
"""What a part costs its block, in tiles of each warp."""
MOST_SPLITS, MOST_BEYOND, PIECES = 63, 5, 128
SIZES = (1, 7, 108, 128, 132, 148)
"""Multiprocessors."""


@dataclass(frozen=True)
class Split:
    """What one block takes of one problem; `own`: 1: with the exact tokens, 2: they have a part of their own."""

    block: int
    problem: int
    split: int
    last: int
    begin: int
    tiles: int
    own: int
    part: int

    @property
    def what(self) -> tuple[int, ...]:
        """All but the block."""
        return (self.problem, self.split, self.last, self.begin, self.tiles, self.own, self.part)

    def rounds(self) -> float:
        """What it takes its block by the times of docs/kernels.md, in tiles of each warp."""
        if self.tiles == self.own == 0:
            return 1  # rows of zeros
        warps = WARPS - OWN_WARPS if self.own == 1 else WARPS
        return -(-self.tiles // warps) + PART * (2 if self.own == 2 else 1)


@dataclass(frozen=True)
class Call:
    """A call of sequences that hold `past` tokens before its new ones."""

    past: Sequence[int]
    new: Sequence[int] = ()
    heads: int = 8
    group: int = 4
    page_size: int = 64
    window: int = 0
    capacity: int = 1 << 18

    @property
    def added(self) -> Sequence[int]:
        return self.new or [1] * len(self.past)

    def row_blocks(self) -> int:
        return -(-self.group * max(self.added) // 8)

    def tiles(self, problem: int) -> tuple[int, int] | None:
        """First coded tile that a problem sees, and the one after the last; None: none of its rows has a token."""
        batch = len(self.past)
        b, block = problem % batch, problem // batch % self.row_blocks()
        rows = min(self.added[b] * self.group - 8 * block, 8)
        if rows <= 0:
            return None
        first, last = (self.past[b] + row // self.group for row in (8 * block, 8 * block + rows - 1))
        end = last // self.page_size * self.page_size // TILE
        begin = max(first - self.window + 1, 0) // TILE if self.window else 0
        return min(begin, end), end


def cut(
    gpu: EmulatedGpu, call: Call, multiprocessors: int = 132, warps: int = 1, either: bool = False
) -> tuple[list[Split], int, int]:
    """The splits of a call, rounds of a piece (0: it is cut by count), and parts in the workspace. warps: of a block
    that looks for its share, 1 or, as the kernel has, 16. either: by the instances that cut either way, also where
    others, by count only, take the call."""
    most = len(call.past) * call.heads * call.row_blocks() * (MOST_SPLITS + 1)
    out = torch.zeros(most, 8, dtype=torch.int32)
    count, piece, parts = (torch.zeros(1, dtype=torch.int64) for _ in range(3))
    sizes = (len(call.past), call.heads, call.group, max(call.added), call.page_size)
    past, new = lengths(*call.past), lengths(*call.added)
    cuda._check(
        gpu.library.hqmq_emulation_cut(
            *sizes, call.capacity // call.page_size, call.window, past.data_ptr(), new.data_ptr(), multiprocessors,
            warps, either, most, out.data_ptr(), count.data_ptr(), piece.data_ptr(), parts.data_ptr(),
        )
    )  # fmt: skip
    assert count.item() <= most
    splits = [Split(*fields) for fields in out[: int(count)].tolist()]
    return sorted(splits, key=lambda split: split.what), int(piece), int(parts)


def makespan(splits: Sequence[Split]) -> float:
    """What the block with the most work takes, in tiles of each warp."""
    of_block: dict[int, float] = defaultdict(float)
    for split in splits:
        of_block[split.block] += split.rounds()
    return max(of_block.values())


def assert_whole(call: Call, splits: Sequence[Split], parts: int) -> None:
    """Assert that the splits of a call are all of its tiles once, and that their parts have places of their own."""
    problems: dict[int, list[Split]] = defaultdict(list)
    for split in splits:
        problems[split.problem].append(split)
    assert sorted(problems) == list(range(len(call.past) * call.heads * call.row_blocks()))
    end_part = 0
    for problem, found in sorted(problems.items()):
        assert [split.split for split in found] == list(range(len(found)))
        assert [split.last for split in found] == [0] * (len(found) - 1) + [1]
        assert len(found) <= MOST_SPLITS
        expected = call.tiles(problem)
        if expected is None:
            assert len(found) == 1
            assert found[0].tiles == found[0].own == 0
            continue
        at, end = expected
        for split in found:
            assert split.begin == at
            assert split.tiles > 0 or len(found) == 1 or split.last
            assert (split.own > 0) == bool(split.last)
            assert split.part - found[0].part == split.split
            at += split.tiles
        assert at == end
        assert found[0].part >= end_part
        end_part = found[-1].part + 3  # one whose outputs are empty, and that of the exact tokens
    assert end_part <= parts


def ragged(kind: str, batch: int, seed: int) -> list[int]:
    """Lengths of `batch` sequences."""
    rng = random.Random(f"{kind} {batch} {seed}")
    if kind == "one long":
        return [131072, *[1024] * (batch - 1)]
    if kind == "uniform":
        return [rng.randrange(32768) for _ in range(batch)]
    if kind == "many empty":
        return [rng.choice((0, 0, 0, 4096 + rng.randrange(4096))) for _ in range(batch)]
    return [int(2 ** rng.uniform(4, 17)) for _ in range(batch)]  # even in the logarithm


KINDS = ("one long", "uniform", "many empty", "powers")
RAGGED = [Call(ragged(kind, batch, 0)) for kind in KINDS for batch in (2, 3, 8, 16, 33, 64, 200)]
OTHERS = [
    *[Call(ragged("powers", 40, 1), heads=heads, group=16 // heads) for heads in (1, 2, 16)],
    Call(ragged("powers", 20, 2), [1, 3, 0, 8, 5] * 4, heads=2, group=7),
    Call(ragged("uniform", 20, 2), [1, 3, 0, 8, 5] * 4, heads=4, group=4, window=5000),
    Call(ragged("powers", 16, 3), page_size=16),
    Call(ragged("powers", 16, 3), page_size=256, window=3),
    Call([0] * 30),
    Call([5] * 1100, [0, 1] * 550, heads=2),
    Call([*[70] * 1500, 100000, *[70] * 1500], heads=1),
]


@pytest.mark.parametrize("when", [NEVER, WHERE_FASTER, ALWAYS])
@pytest.mark.parametrize("index", range(len(RAGGED) + len(OTHERS)))
def test_splits_are_all_of_a_call_on_every_gpu(emulated: EmulatedGpu, index: int, when: int) -> None:
    call = [*RAGGED, *OTHERS][index]
    with cut_by_work(when):
        splits, piece, parts = cut(emulated, call)
        for multiprocessors in SIZES:
            others, same, _ = cut(emulated, call, multiprocessors)
            assert same == piece
            assert [split.what for split in others] == [split.what for split in splits]
            assert {split.block for split in others} <= set(range(multiprocessors))
    assert (piece > 0) == (when == ALWAYS) or when == WHERE_FASTER
    assert_whole(call, splits, parts)


@pytest.mark.parametrize("index", range(len(RAGGED) + len(OTHERS)))
def test_instances_by_count_cut_as_those_that_cut_either_way(emulated: EmulatedGpu, index: int) -> None:
    """Where calls cannot be cut by work: their blocks have the same splits."""
    call = [*RAGGED, *OTHERS][index]
    alone = replace(call, past=call.past[-1:], new=call.added[-1:])
    for multiprocessors in (7, 132):
        with cut_by_work(NEVER):
            assert cut(emulated, call, multiprocessors) == cut(emulated, call, multiprocessors, either=True)
        assert cut(emulated, alone, multiprocessors) == cut(emulated, alone, multiprocessors, either=True)
    with batch_invariant():
        assert cut(emulated, call) == cut(emulated, call, either=True)


@pytest.mark.parametrize("index", range(0, len(RAGGED) + len(OTHERS), 3))
def test_all_warps_of_a_block_find_the_same_share(emulated: EmulatedGpu, index: int) -> None:
    call = [*RAGGED, *OTHERS][index]
    for multiprocessors in (7, 132):
        with cut_by_work(ALWAYS):
            assert cut(emulated, call, multiprocessors, WARPS) == cut(emulated, call, multiprocessors)


@pytest.mark.parametrize("index", range(len(RAGGED) + len(OTHERS)))
def test_no_piece_takes_much_longer_than_its_length(emulated: EmulatedGpu, index: int) -> None:
    """By the times of the rule itself, which are whole rounds: kMostBeyond of decode_cut.h."""
    call = [*RAGGED, *OTHERS][index]
    with cut_by_work(ALWAYS):
        splits, piece, _ = cut(emulated, call)
    of_block: dict[int, int] = defaultdict(int)
    for split in splits:
        rounds = -(-split.tiles // WARPS)
        own = {0: 0, 1: -(-split.tiles // 12) - rounds, 2: 2}[split.own]
        of_block[split.block] += 1 if split.tiles == split.own == 0 else 2 + rounds + own
    assert max(of_block.values()) <= piece + MOST_BEYOND


@pytest.mark.parametrize("heads", [1, 2, 8, 12])
def test_even_lengths_are_cut_by_count(emulated: EmulatedGpu, heads: int) -> None:
    """Up to an eighth shorter than the longest one, or longer than the window."""
    for batch in (2, 3, 5, 8, 11, 16, 17, 18, 24, 32, 33, 48, 64, 100):
        for past in (100, 1 << 10, 5000, 1 << 14, 1 << 17):
            for call in (
                Call([past] * batch, heads=heads),
                Call([*[past] * (batch - 1), past - past // 8], heads=heads),
                Call([past, *[200000] * (batch - 1)], heads=heads, window=past),
            ):
                found, piece, _ = cut(emulated, call)
                with cut_by_work(NEVER):
                    expected, _, _ = cut(emulated, call)
                assert piece == 0
                assert found == expected


@pytest.mark.parametrize("batch", [2, 4, 8, 16, 32, 64])
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_batches_take_what_their_work_takes(emulated: EmulatedGpu, kind: str, batch: int) -> None:
    """Within the parts that cuts make more and the pieces that are not taken on 132 multiprocessors; and no longer
    than by count."""
    for seed in range(3):
        call = Call(ragged(kind, batch, seed))
        found, piece, _ = cut(emulated, call)
        with cut_by_work(NEVER):
            by_count, _, _ = cut(emulated, call)
        work = sum(split.rounds() for split in found)
        before, after = makespan(by_count), makespan(found)
        assert after <= before
        if piece > 0:
            assert after <= max(work / PIECES, 8) * 1.15 + MOST_BEYOND


def test_one_long_sequence_among_many(emulated: EmulatedGpu) -> None:
    """15 of 1k tokens and one of 128k, 8 heads: a block would have all of a head's 128k."""
    call = Call(ragged("one long", 16, 0))
    with cut_by_work(NEVER):
        before = makespan(cut(emulated, call)[0])
    after = makespan(cut(emulated, call)[0])
    assert before > 510
    assert after < before / 12


def test_a_single_sequence_and_batch_invariance_are_cut_by_count(emulated: EmulatedGpu) -> None:
    call = Call(ragged("one long", 16, 0))
    with cut_by_work(ALWAYS):
        assert cut(emulated, Call([131072]))[1] == 0
        with batch_invariant():
            found, piece, _ = cut(emulated, call)
            alone, _, _ = cut(emulated, Call(call.past[:1]))
    assert piece == 0
    of_first = [split for split in found if split.problem == 0]
    assert [(split.begin, split.tiles) for split in of_first] == [
        (split.begin, split.tiles) for split in alone if split.problem == 0
    ]


def test_the_capacity_changes_nothing(emulated: EmulatedGpu) -> None:
    call = Call([5000, 70, 0, 200, 30000, 3000], capacity=32768)
    more = Call(call.past, capacity=1 << 22)
    assert cut(emulated, call) == cut(emulated, more)


@pytest.mark.parametrize("heads", [1, 8, 54, 57, 72])
def test_the_limit_of_the_workspace_serves_fewer_sequences(emulated: EmulatedGpu, heads: int) -> None:
    """Of which each may be cut into more splits than more of them are."""
    library, scheme = emulated.library, Scheme.parse("hq3")
    roles = [native.role_params(scheme.role(name), 64, scheme.page_size) for name in ROLES]
    kind: list[object] = [POINTER(AttentionParams), *[POINTER(RoleParams)] * 2, POINTER(c_size_t)]
    native.declare(library, {"hqmq_cuda_attention_workspace_limit": (c_int, kind)})

    def asked(batch: int, limit: bool) -> int:
        params, size = AttentionParams(batch, heads, 1, 1, 64, 0, 0.125, 0.0), c_size_t()
        name = "hqmq_cuda_attention_workspace" + ("_limit" if limit else "")
        cuda._check(getattr(library, name)(byref(params), *map(byref, roles), byref(size)))
        return size.value

    most = 0
    for batch in range(1, 41):
        for when in (NEVER, ALWAYS):
            with cut_by_work(when):
                most = max(most, asked(batch, False))
        with batch_invariant():
            most = max(most, asked(batch, False))
        assert asked(batch, True) >= most
