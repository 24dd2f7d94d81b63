"""What GPU tests share. Host references use a few cores only: their operations are small, more threads would spin."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress

import pytest
import torch

from benchmarks import gpu_paths
from hqmq_trt import cuda, native
from hqmq_trt.errors import HqmqError

THREADS = 2


@pytest.fixture(autouse=True, scope="package")
def _few_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(min(before, THREADS))
    with suppress(HqmqError):  # not built: the tests that need it say so
        native.set_num_threads(int(os.environ.get("HQMQ_NUM_THREADS", THREADS)))
    yield
    torch.set_num_threads(before)
    with suppress(HqmqError):
        native.set_num_threads(0)


@pytest.fixture
def clean_status() -> Iterator[None]:
    """In a test, nothing happens that the kernels count: tokens that are not finite, or find no page."""
    device = torch.device("cuda", 0)
    cuda.clear_status(device)
    yield
    assert cuda.status(device)[:2] == (0, 0)


@pytest.fixture
def batch_invariant() -> Iterator[None]:
    """In a test, the number of sequences changes no bit of theirs."""
    with gpu_paths.batch_invariant():
        yield


@pytest.fixture
def cut_by_count() -> Iterator[None]:
    """In a test, each sequence of a call is cut into as many parts, whatever the lengths."""
    with gpu_paths.cut_by_work(gpu_paths.NEVER):
        yield
