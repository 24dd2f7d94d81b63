"""What the fused decode kernel keeps in shared memory, on GPUs that give a block 99, 163 or 227 KB. Needs no GPU."""

from __future__ import annotations

import pytest

from benchmarks.gpu_paths import SHARED_MEMORY, decode_plan
from hqmq_trt import cuda
from hqmq_trt.scheme import Scheme

pytestmark = pytest.mark.skipif(not cuda.available(), reason="libhqmq_cuda.so is not built")

PRESETS = ("hq3", "hq3.5", "hq4", "hq5", "k=hq4,v=hq3.5", "paper:s96_r4", "paper:s96_r4+med3")
CASES = [
    *[(name, head_dim) for name in PRESETS for head_dim in (64, 128, 256)],
    *[("k=hq4,v=hq3", 128), ("k=hq3.5,v=hq3", 128)],
    *[(f"k={key},v=hq2.5", head_dim) for key in ("hq3", "hq3.5") for head_dim in (64, 128)],
]


@pytest.mark.parametrize("limit", SHARED_MEMORY)
@pytest.mark.parametrize("rows", [1, 4, 5, 8])
@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_a_block_of_every_preset_fits(name: str, head_dim: int, rows: int, limit: str) -> None:
    plan, why = decode_plan(Scheme.parse(name), head_dim, rows, SHARED_MEMORY[limit])
    assert why == ""
    assert (plan.head_dim, plan.columns) == (head_dim, 4 if rows <= 4 else 8)
    assert 32768 < plan.shared_bytes <= SHARED_MEMORY[limit]
    assert 1 <= plan.stages <= 4
    assert plan.compact or plan.stages >= 2
    assert all(copies in (1, 2, 4, 8, 16) for copies in plan.copies)
    if limit == "227 KB":
        assert not plan.compact
    if limit == "99 KB":
        assert plan.compact


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_warps_that_take_tiles_do_not_depend_on_the_memory(name: str, head_dim: int) -> None:
    """The order of sums depends on their number."""
    scheme = Scheme.parse(name)
    for rows in (4, 8):
        plans = [decode_plan(scheme, head_dim, rows, limit)[0] for limit in SHARED_MEMORY.values()]
        assert len({plan.rings for plan in plans if plan.stages}) == 1


@pytest.mark.parametrize(("name", "head_dim"), CASES)
@pytest.mark.parametrize("rows", [4, 8])
def test_more_memory_takes_more_or_as_much(name: str, head_dim: int, rows: int) -> None:
    """For any limit: it is kept, and nothing that fits less memory is refused more."""
    scheme, before = Scheme.parse(name), 0
    for limit in range(48 << 10, 232448, 4 << 10):
        plan, why = decode_plan(scheme, head_dim, rows, limit)
        assert plan.shared_bytes <= limit
        assert (plan.stages == 0) == bool(why)
        assert plan.stages or not before
        before = plan.stages


def test_copies_are_halved_before_nothing_fits() -> None:
    scheme = Scheme.parse("hq4")
    copies = [decode_plan(scheme, 128, 4, limit)[0].copies[0] for limit in SHARED_MEMORY.values()]
    assert copies == [2, 4, 8]


@pytest.mark.parametrize(
    ("name", "head_dim", "words"),
    [
        *[("hq4@p8", 128, "fewer than 16 tokens"), ("fp16", 128, "no codes"), ("hq4", 32, "no instance")],
        *[("hq2.5", 64, "no instance"), ("k=hq3,v=hq2.5", 256, "no instance"), ("k=hq3,v=hq:s5_r3", 64, "no instance")],
        *[("paper:s170_r4", 128, "head_dim, gain"), ("paper:s21_r3", 64, "head_dim, gain")],  # codes of hq4 and hq3
    ],
)
def test_the_plan_says_why_the_kernel_takes_no_call(name: str, head_dim: int, words: str) -> None:
    plan, why = decode_plan(Scheme.parse(name), head_dim, 4, SHARED_MEMORY["227 KB"])
    assert plan.shared_bytes == plan.stages == 0
    assert words in why


def test_nothing_runs_without_a_head() -> None:
    plan, why = decode_plan(Scheme.parse("hq4"), 128, 4, SHARED_MEMORY["227 KB"], heads=0)
    assert plan.stages == 0
    assert "no sequence, head or token" in why
