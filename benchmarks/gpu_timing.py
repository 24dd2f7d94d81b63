"""Timing on a GPU: CUDA graphs of many launches, medians of replays, and the bandwidth of a copy.

Between two launches of the same step, the GPU's L2 cache may still hold what the step reads. :func:`graph_time` takes
several steps that read different memory and launches them in turn: with :func:`copies_for` of them, none finds its
bytes in L2 ("cold", as between the layers of a model); with one, all do that fit ("warm").
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

Step = Callable[[], object]

COLD = 3
"""Times the L2 cache that steps in turn read before the first runs again."""
MOST_COPIES = 96
GRAPH_SECONDS = 2e-3
"""A graph holds at least as many launches as take this long, so that its own start does not count."""
LEAST_LAUNCHES, MOST_LAUNCHES = 64, 192
AHEAD_CYCLES = 400_000
"""The GPU idles for so long before a replay, so that the host has enqueued all of it when the clock starts."""


@dataclass(frozen=True)
class Time:
    """Microseconds of one launch: median, least and most of `replays` replays of `launches` launches each."""

    us: float
    least: float
    most: float
    launches: int
    replays: int


def l2_bytes(device: torch.device) -> int:
    """Size of the L2 cache; 0 for a CPU."""
    if device.type != "cuda":
        return 0
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def copies_for(nbytes: int, device: torch.device) -> int:
    """Copies of what a step reads, so that launches in turn find nothing in L2."""
    wanted = -(-COLD * l2_bytes(device) // max(nbytes, 1))
    return max(1, min(wanted, MOST_COPIES))


def graph_time(steps: Sequence[Step], device: torch.device, replays: int = 9) -> Time:
    """Time a launch of `steps`, which run in turn: captured in one CUDA graph, or on a CPU one after another.

    Steps allocate from torch only, never wait for the GPU, and may be run any number of times.
    """
    if device.type != "cuda":
        return _cpu_time(steps, replays)
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        once = 0.0
        for step in [*steps[:2], steps[0], steps[0]]:  # the last counts; launch by launch: more than in a graph
            begin = time.perf_counter()
            step()
            stream.synchronize()
            once = time.perf_counter() - begin
            if once > 0.3:
                break
    if once > 0.05:
        launches, replays = 1, min(replays, 3 if once < 1 else 1)
    else:
        launches = max(len(steps), min(MOST_LAUNCHES, int(GRAPH_SECONDS / once) + 1))
        launches = max(launches, LEAST_LAUNCHES if once < 1e-3 else 1)
        launches = -(-launches // len(steps)) * len(steps)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):  # torch.cuda.graph would empty torch's memory pool first, each time
        graph.capture_begin()
        try:
            for i in range(launches):
                steps[i % len(steps)]()
        finally:
            graph.capture_end()
    found = []
    with torch.cuda.stream(stream):
        if once < 1:
            graph.replay()
        for _ in range(replays):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            torch.cuda._sleep(AHEAD_CYCLES)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            found.append(1e3 * start.elapsed_time(end) / launches)
    graph.reset()
    return Time(statistics.median(found), min(found), max(found), launches, replays)


def _cpu_time(steps: Sequence[Step], replays: int) -> Time:
    steps[0]()
    found = []
    for i in range(min(replays, 3)):
        begin = time.perf_counter()
        steps[i % len(steps)]()
        found.append(1e6 * (time.perf_counter() - begin))
    return Time(statistics.median(found), min(found), max(found), 1, len(found))


def copy_bandwidth(device: torch.device) -> float:
    """Bytes a second, read and written, of copying 1 GiB on the device (64 MiB on a CPU)."""
    size = 1 << (30 if device.type == "cuda" else 26)
    source = torch.empty(size, dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    found = graph_time([lambda: target.copy_(source)], device)
    return 2 * size / (1e-6 * found.us)


def free(device: torch.device) -> None:
    """Give memory of dropped tensors and graphs back, so that the next case gets it."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
