"""The fused decode kernel of the CUDA library, on the CPU: the oracle's answers for the instances that are emulated
(tests/cuda_emulation/CMakeLists.txt), with and without page tables."""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_paths import DECODE, batch_invariant
from tests.attention_cases import attention_of, bits, with_sinks
from tests.emulated_cuda import EmulatedGpu, assert_right, attend

LIMIT = 2e-3  # of fp16 activations
PAST = (0, 3, 60, 63, 64, 130, 200)
MED3 = "paper:s96_r4+med3"
TEN = ("k=hq3,v=hq2.5", 64)
CASES = [
    *[("hq3", 64), ("hq3.5", 64), ("hq4", 128), ("hq5", 64), ("k=hq4,v=hq3.5", 64), (MED3, 64)],
    *[("hq4@p16", 128), (MED3 + "@p16", 64), ("hq3@p128", 64)],
    *[("k=hq3,v=hq2.5", 64), ("k=hq3.5,v=hq2.5", 128), ("k=hq3,v=hq2.5@p16", 64)],
]
"""hq3 is compiled as for sm_80, which copies tiles by lanes, the others as for sm_90, in bulk."""
EVERY = pytest.mark.parametrize(("name", "head_dim"), CASES)


@pytest.mark.parametrize("new", [(1,) * 7, (4, 5, 5, 1, 0, 5, 2)], ids=["one token", "several tokens"])
@EVERY
def test_answers_of_the_oracle(emulated: EmulatedGpu, name: str, head_dim: int, new: tuple[int, ...]) -> None:
    case = attention_of(name)(name, head_dim, 1, 4, past=PAST, dtype=torch.float16)
    with_sinks(case, (4, 4) if case.scheme.key.optimised else (0, 0))
    assert_right(case, new, DECODE, LIMIT)


@pytest.mark.parametrize(
    ("name", "head_dim", "group", "new"),
    [
        *[("hq4", 256, 8, (1, 1, 1)), ("k=hq4,v=hq3", 128, 2, (2, 1, 2)), ("paper:s96_r4", 64, 4, (1, 1, 1))],
        *[(MED3, 128, 2, (4, 3, 4)), (MED3, 256, 3, (1, 1, 1)), ("k=hq3,v=hq2.5", 64, 3, (2, 1, 2))],
    ],
)
def test_other_shapes(emulated: EmulatedGpu, name: str, head_dim: int, group: int, new: tuple[int, ...]) -> None:
    case = attention_of(name)(name, head_dim, 1, group, past=(62, 130, 200), dtype=torch.float16)
    with_sinks(case, (4, 4) if case.scheme.key.optimised else (0, 0))
    assert_right(case, new, DECODE, LIMIT)


@pytest.mark.parametrize("window", [70, 0])
@pytest.mark.parametrize(("name", "head_dim", "group"), [("hq3", 64, 2), ("hq4", 128, 3), (MED3, 64, 8)])
def test_windows_caps_and_sinks(emulated: EmulatedGpu, name: str, head_dim: int, group: int, window: int) -> None:
    case = attention_of(name)(name, head_dim, 2, group, past=(5, 62, 150), dtype=torch.float16)
    with_sinks(case, (3, 3))
    logits = torch.linspace(-1, 2, 2 * group)
    assert_right(case, (3, 3, 1), DECODE, LIMIT, logits, window, softcap=5.0)


@pytest.mark.parametrize(("name", "head_dim"), [("hq3", 64), ("hq4", 128), ("k=hq4,v=hq3.5", 64), (MED3, 64), TEN])
def test_no_order_and_no_gpu_changes_a_bit(emulated: EmulatedGpu, name: str, head_dim: int) -> None:
    """Threads and blocks in other orders, a single block or more of them."""
    case = attention_of(name)(name, head_dim, 2, 2, past=(600, 63, 300), capacity=640, dtype=torch.float16)
    y = assert_right(case, (1, 1, 1), DECODE, LIMIT)
    inputs = case.inputs(1)
    for seed, multiprocessors in enumerate((1, 5, 40)):
        emulated.use(seed, multiprocessors)
        assert torch.equal(bits(attend(case, inputs, (1, 1, 1), case.clone())), bits(y))


@pytest.mark.parametrize("name", ["hq3", MED3])
def test_problems_of_one_split(emulated: EmulatedGpu, name: str) -> None:
    """As many as an H100 has multiprocessors: long ones (1,536 coded tokens and more) have a part of its own for the
    exact tokens. In the batch-invariant mode a sequence has the bits that it has alone."""
    case = attention_of(name)(name, 64, 44, 1, past=(1700, 200, 1600), capacity=1728, dtype=torch.float16)
    emulated.use(0, multiprocessors=5)
    y = assert_right(case, (1, 1, 1), DECODE, LIMIT)
    inputs = case.inputs(1)
    emulated.use(1, multiprocessors=40)
    assert torch.equal(bits(attend(case, inputs, (1, 1, 1), case.clone())), bits(y))
    with batch_invariant():
        together = attend(case, inputs, (1, 1, 1), case.clone())
        case.past, case.caches = case.past[:1], [[x[:1].contiguous() for x in role] for role in case.caches]
        q, k, v = (x[:1].contiguous() for x in inputs)
        alone = attend(case, (q, k, v), (1,), case.caches)
    assert torch.equal(bits(alone), bits(together[:1]))
    assert not torch.equal(bits(together), bits(y))  # as it is cut in another way


@pytest.mark.parametrize("limit", [163, 99])
@pytest.mark.parametrize(
    ("name", "head_dim"), [("hq3", 64), ("hq4", 128), ("hq5", 64), (MED3, 64), TEN, ("k=hq3.5,v=hq2.5", 128)]
)
def test_less_shared_memory_changes_no_bit(emulated: EmulatedGpu, name: str, head_dim: int, limit: int) -> None:
    """KiB of sm_80, and of sm_86, 89 and 120: tables of fewer copies, stages of one tile, states in the workspace."""
    case = attention_of(name)(name, head_dim, 2, 2, past=(600, 63, 300), capacity=640, dtype=torch.float16)
    with_sinks(case, (4, 4) if case.scheme.key.optimised else (0, 0))
    y = assert_right(case, (1, 2, 1), DECODE, LIMIT, window=500)
    emulated.use(limit, shared_limit=limit * 1024)
    assert torch.equal(bits(assert_right(case, (1, 2, 1), DECODE, LIMIT, window=500)), bits(y))


@pytest.mark.parametrize(
    ("name", "limit"), [("hq3", 152), ("hq3", 176), ("hq3", 200), ("hq3", 227), ("hq3.5", 220), (TEN[0], 220)]
)
def test_rings_of_all_sizes(emulated: EmulatedGpu, name: str, limit: int) -> None:
    """GPUs with fewer KiB of shared memory for a block have rings of fewer stages: of two at least."""
    case = attention_of(name)(name, 64, 1, 2, past=(600, 5), capacity=640, dtype=torch.float16)
    emulated.use(limit, shared_limit=limit * 1024)
    assert_right(case, (1, 1), DECODE, LIMIT)


@pytest.mark.parametrize("name", ["hq4", MED3])
def test_nan_reaches_those_who_see_it(emulated: EmulatedGpu, name: str) -> None:
    """A page of NaN, an entry outside the pool; tokens without a page."""
    head_dim = 128 if name == "hq4" else 64
    case = attention_of(name)(name, head_dim, 2, 2, past=(200, 200), capacity=256, dtype=torch.float16)
    inputs = case.inputs(1)
    clean = attend(case, inputs, (1, 1), case.clone())
    caches = case.clone()
    caches[1][1][1, 1, 1] = -1  # scales of V: sequence 1, head 1, page 1; NaN as fp16 and as short ones
    y = attend(case, inputs, (1, 1), caches)
    assert torch.equal(bits(y[0]), bits(clean[0]))
    assert torch.equal(bits(y[1, :2]), bits(clean[1, :2]))
    assert y[1, 2:].isnan().any(-1).all()


@pytest.mark.parametrize("limit", [227, 99])
@pytest.mark.parametrize(("name", "head_dim", "last"), [("hq3", 64, 251), (*TEN, 128 + 119)])
def test_codes_beyond_the_codebook_are_its_last_word(
    emulated: EmulatedGpu, name: str, head_dim: int, last: int, limit: int
) -> None:
    """Of a damaged cache, all bytes of V's codes; 128: bit 0 of the level of a 10-bit code."""
    case = attention_of(name)(name, head_dim, 1, 2, past=(200,), capacity=256, dtype=torch.float16)
    inputs = case.inputs(1)
    emulated.use(limit, shared_limit=limit * 1024)
    found = []
    for byte in (last + 1, last, 0):
        caches = case.clone()
        caches[1][0].view(torch.uint8)[..., : head_dim // 4] = byte
        found.append(bits(attend(case, inputs, (1,), caches)))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
