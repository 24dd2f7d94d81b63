"""The plain attention kernels and prefill on tensor cores of the CUDA library, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu_paths import PLAIN, PREFILL, use_kernels
from tests.attention_cases import Attention, attention_of, bits, relative_error, with_sinks
from tests.emulated_cuda import EmulatedGpu, assert_right, attend

PAST = (0, 3, 62, 64, 130)
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3}


@pytest.fixture
def plain(emulated: EmulatedGpu) -> Iterator[EmulatedGpu]:
    """An emulated GPU that attends with the plain kernels."""
    use_kernels(1)
    yield emulated
    use_kernels(0)


@pytest.fixture(params=[8, 9], ids=["mma.sync", "wgmma"])
def prefill(emulated: EmulatedGpu, request: pytest.FixtureRequest) -> EmulatedGpu:
    """An emulated GPU of sm_80, and one of sm_90."""
    emulated.major = request.param
    emulated.use()
    return emulated


@pytest.mark.parametrize("new", [(1,) * 5, (3, 3, 2, 0, 1), (20, 70, 1, 0, 9)], ids=["one", "few", "many"])
@pytest.mark.parametrize(
    ("name", "head_dim", "group"),
    [
        ("hq3", 64, 4),
        ("hq4", 128, 3),
        ("paper:s24_r3+med3@p8", 80, 2),
        ("k=fp16,v=hq3@p32", 64, 1),
        ("hq3@p16", 256, 1),
    ],
)
def test_plain_answers_of_the_oracle(
    plain: EmulatedGpu, name: str, head_dim: int, group: int, new: tuple[int, ...]
) -> None:
    case = attention_of(name)(name, head_dim, 1, group, past=PAST, dtype=torch.float32)
    with_sinks(case, (4 * case.scheme.key.optimised, 3))
    assert_right(case, new, PLAIN, LIMITS[torch.float32])


@pytest.mark.parametrize("window", [40, 0])
def test_plain_windows_caps_and_sinks(plain: EmulatedGpu, window: int) -> None:
    case = Attention("hq4@p16", 64, 2, 3, past=(5, 62, 600), capacity=640)
    assert_right(case, (3, 20, 4), PLAIN, LIMITS[torch.float32], torch.linspace(-1, 2, 6), window, softcap=5.0)


def test_plain_blocks_walk_through_parts_where_there_are_many(plain: EmulatedGpu) -> None:
    """1024 blocks walk through what few blocks share and another kernel joins: the same bits."""
    case = Attention("hq3@p16", 64, 1, 2, past=(0, 5, 40, 63), capacity=64)
    inputs, new = case.inputs(1), (1, 1, 1, 1)
    y = attend(case, inputs, new, case.clone())
    times = 1024 // len(new)
    case.past *= times
    many = [[tensor.repeat(times, *[1] * (tensor.dim() - 1)) for tensor in cache] for cache in case.caches]
    walked = attend(case, [x.repeat(times, 1, 1, 1) for x in inputs], new * times, many)
    assert torch.equal(bits(walked), bits(y.repeat(times, 1, 1, 1)))


@pytest.mark.parametrize(
    ("name", "head_dim", "group"),
    [
        *[("hq3", 64, 2), ("hq4", 128, 3), ("hq3.5@p16", 64, 4), ("hq5@p128", 256, 1), ("fp16", 64, 2)],
        *[("paper:s96_r4+med3@p32", 80, 2), ("k=fp16,v=hq3@p8", 128, 1)],
    ],
)
def test_prefill_answers_of_the_oracle(prefill: EmulatedGpu, name: str, head_dim: int, group: int) -> None:
    case = attention_of(name)(name, head_dim, 1, group, past=PAST, dtype=torch.float16)
    with_sinks(case, (4 * case.scheme.key.optimised, 4 * case.scheme.value.packed))
    assert_right(case, (70, 20, 1, 0, 33), PREFILL, LIMITS[torch.float16])


@pytest.mark.parametrize("window", [40, 0])
@pytest.mark.parametrize(("name", "head_dim"), [("hq4", 64), ("hq3@p16", 128)])
def test_prefill_windows_caps_and_sinks(prefill: EmulatedGpu, name: str, head_dim: int, window: int) -> None:
    case = Attention(name, head_dim, 2, 2, past=(5, 150), dtype=torch.float16)
    assert_right(case, (9, 80), PREFILL, LIMITS[torch.float16], torch.linspace(-1, 2, 4), window, softcap=5.0)


def test_prefill_splits_a_long_context(prefill: EmulatedGpu) -> None:
    """Few rows and many keys: blocks share them, and a kernel joins their parts. No order changes a bit."""
    case = Attention("hq3", 64, 1, 1, past=(900,), capacity=1024, dtype=torch.float16)
    y = assert_right(case, (12,), PREFILL, LIMITS[torch.float16])
    for seed in (1, 2):
        prefill.use(seed, multiprocessors=seed)
        assert torch.equal(bits(attend(case, case.inputs(12), (12,), case.clone())), bits(y))


def test_prefill_splits_of_odd_tiles(emulated: EmulatedGpu) -> None:
    """Two splits of seven tiles: wgmma's fourth round of the first has one tile, and the next is of the other split."""
    case = Attention("hq3", 64, 132, 1, past=(870,), capacity=896, dtype=torch.float16)
    answers = []
    for emulated.major in (8, 9):
        emulated.use()
        answers.append(attend(case, case.inputs(9), (9,), case.clone()))
    assert relative_error(answers[1], answers[0]) < LIMITS[torch.float16]
    assert not torch.equal(bits(answers[1]), bits(answers[0]))  # two kernels


@pytest.mark.parametrize("window", [0, 70])
def test_values_that_are_not_finite_reach_those_who_see_them(prefill: EmulatedGpu, window: int) -> None:
    """In a coded tile that some rows do not see, and in one that all see: the same numbers as the plain kernels."""
    case = Attention("fp16@p16", 64, 1, 2, past=(0,), capacity=256, dtype=torch.float16)
    q, k, v = case.inputs(230)
    y = attend(case, (q, k, v), (230,), case.clone(), window=window)
    v = v.clone()
    v[0, 0, 20, 3], v[0, 0, 150, 5] = torch.inf, torch.nan
    for seed in range(3):
        prefill.use(seed)
        found = attend(case, (q, k, v), (230,), case.clone(), window=window)
        use_kernels(1)
        expected = attend(case, (q, k, v), (230,), case.clone(), window=window)
        use_kernels(0)
        assert not expected.isfinite().all()
        assert torch.equal(found.isfinite(), expected.isfinite())
        finite = expected.isfinite()
        assert torch.equal(bits(found[finite]), bits(y[finite]))


def test_nan_of_a_new_token_reaches_those_who_see_it(prefill: EmulatedGpu) -> None:
    """0 times NaN is NaN: the tile is cleaned for rows before it."""
    case = Attention("hq4", 64, 1, 2, past=(10,), dtype=torch.float16)
    q, k, v = case.inputs(50)
    clean = attend(case, (q, k, v), (50,), case.clone())
    v = v.clone()
    v[0, 0, 20, 3] = torch.nan
    y = attend(case, (q, k, v), (50,), case.clone())
    assert torch.equal(bits(y[:, :, :20]), bits(clean[:, :, :20]))
    assert y[:, :, 20:, 3].isnan().all()
    others = torch.arange(64) != 3
    assert torch.equal(bits(y[..., others]), bits(clean[..., others]))
