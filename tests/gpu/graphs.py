"""CUDA graphs for tests."""

from __future__ import annotations

import os
from collections.abc import Callable

import pytest
import torch
from torch import Tensor


def captured(step: Callable[[], Tensor]) -> tuple[torch.cuda.CUDAGraph, Tensor]:
    """A graph of `step`, which runs once before, and the tensor that replays write.

    Skips the test where torch cannot capture: without its caching allocator, which compute-sanitizer wants off.
    """
    if os.environ.get("PYTORCH_NO_CUDA_MEMORY_CACHING"):
        pytest.skip("PYTORCH_NO_CUDA_MEMORY_CACHING is set: torch captures no CUDA graph without its caching allocator")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = step()
    return graph, y
