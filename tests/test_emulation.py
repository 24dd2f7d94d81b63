"""What the emulation of CUDA (tests/cuda_emulation) finds in kernels, by tiny ones that are right and wrong."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hqmq_trt import cuda
from hqmq_trt.errors import HqmqError
from tests.attention_cases import Attention
from tests.codec_cases import lengths
from tests.emulated_cuda import EmulatedGpu

SEEDS = range(12)
RIGHT = {"exchange": 33, "copy": 0, "bulk copy": 0, "product": 0}
"""Kernels and how many elements further a thread's result lies."""
WRONG = {
    "divergent shuffle": r"its warp diverges: it is at (a shuffle|__syncwarp), faults\.cu:\d+, and thread \d+ at",
    "shuffle by half a warp": "its warp diverges: .* at (its end|a shuffle)",
    "barrier that one warp left": r"no thread can go on: 32 .* at __syncthreads, .*; 32 .* at its end",
    "two barriers": r"at __syncthreads, faults\.cu:\d+, and thread \d+ at another",
    "copy, one group awaited": "where a copy has not been waited for",
    "bulk copy, other bytes expected": "no thread can go on: .* waiting for a phase of a barrier",
    "bulk copy over unfenced stores": "a bulk copy to where a thread stored without a fence",
    "product of unfenced stores": "a product of what a thread stored without a fence",
    "named barrier of one warp": "no thread can go on: 32 .* waiting for a barrier of some threads",
    "store behind": "reaches beyond the block: 4 bytes at 2048 of 2048 bytes",
    "load behind by pointer": "reads or writes 2048 bytes from the beginning of 2048 bytes of shared memory",
    "store before by pointer": "wrote 4 bytes before the shared memory",
    "misaligned": "is not aligned: 8 bytes",
    "null pointer": "thread 5: it reads or writes memory that is not there",
}
"""Kernels that fail in every order of threads, and words of the reason."""
RACES = {
    "exchange without a barrier": 33,
    "copy without a barrier": 0,
    "bulk copy, not awaited": 0,
    "product without a barrier": 0,
}
"""Kernels that fail or are wrong in some orders, and right in others."""


def given() -> Tensor:
    """What kernels read: int32 [256]."""
    return torch.arange(1000, 1256, dtype=torch.int32)


def expected(further: int) -> Tensor:
    """What kernels write: int32 [64]."""
    return given()[:64].roll(-further)


@pytest.mark.parametrize("name", RIGHT)
def test_right_kernels_are_right_in_every_order(emulated: EmulatedGpu, name: str) -> None:
    for seed in SEEDS:
        emulated.use(seed)
        assert torch.equal(emulated.run_kernel(name, given()), expected(RIGHT[name]))


@pytest.mark.parametrize("name", WRONG)
def test_wrong_kernels_raise_in_every_order(emulated: EmulatedGpu, name: str) -> None:
    for seed in SEEDS:
        emulated.use(seed)
        with pytest.raises(HqmqError, match=WRONG[name]):
            emulated.run_kernel(name, given())
    assert torch.equal(emulated.run_kernel("exchange", given()), expected(33))  # nothing of it is left


@pytest.mark.parametrize("name", RACES)
def test_races_show_in_some_order(emulated: EmulatedGpu, name: str) -> None:
    found = 0
    for seed in SEEDS:
        emulated.use(seed)
        try:
            found += not torch.equal(emulated.run_kernel(name, given()), expected(RACES[name]))
        except HqmqError as error:
            assert "where a copy has not been waited for" in str(error)  # noqa: PT017
            found += 1
    assert found >= len(SEEDS) // 4


def test_kernels_that_are_not_emulated_say_so(emulated: EmulatedGpu) -> None:
    case = Attention("hq4", 256, 1, 1, past=(5,), dtype=torch.float16)
    with pytest.raises(HqmqError, match="this decode kernel is not emulated"):
        cuda.attend(
            *case.inputs(1), lengths(5), lengths(1), None, case.scheme, case.books, case.clone(), 256**-0.5
        )  # fmt: skip
