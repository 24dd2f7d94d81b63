"""One HqmqAttention step over a large cache that holds few tokens: does anything touch the rest of the cache?

``python -m benchmarks.report_traffic CAPACITY [--profile]`` builds (or, with HQMQ_TEST_PLANS, loads) a one-node engine,
binds past and present to one address, captures a CUDA graph of a step, and prints JSON: bytes of the cache and the
median microseconds of a launch. With --profile it launches once between cudaProfilerStart and Stop, for ``ncu
--graph-profiling graph --profile-from-start off``, which then counts the DRAM traffic of the whole graph, copies too.
"""

from __future__ import annotations

import json
import statistics
import sys

import torch

from tests.codec_cases import lengths
from tests.gpu.trt_networks import Engine, Node, Run, Sizes

BATCH, HELD, LARGEST = 4, 1000, 131072
NODE = Node("hq4", 128, heads=8, group=4)


def run(capacity: int) -> Run:
    """The step of an engine for LARGEST tokens with a cache of `capacity`, which holds HELD tokens a sequence."""
    engine = Engine((NODE,), torch.float16, Sizes(BATCH, 1, LARGEST))
    sizes = Sizes(BATCH, 1, capacity)
    generator = torch.Generator().manual_seed(0)
    inputs = {"past_length": lengths(*[HELD] * BATCH), "new_length": lengths(*[1] * BATCH)}
    for name, (dtype, shape) in NODE.inputs(sizes, torch.float16).items():
        # An empty cache of zeros is a valid one: code 0 with scale 0.
        value = torch.zeros(shape, dtype=dtype)
        inputs[name] = value if ".past." in name else torch.randn(shape, generator=generator).to(dtype)
    return Run(engine, sizes, inputs)


def main() -> None:
    """Print one JSON line."""
    capacity = int(sys.argv[1])
    step = run(capacity)
    past = [tensor for name, tensor in step.inputs.items() if ".past." in name]
    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=step.stream):
        step.enqueue()
    with torch.cuda.stream(step.stream):
        graph.replay()
        step.stream.synchronize()
        if "--profile" in sys.argv:
            torch.cuda.profiler.start()
            graph.replay()
            step.stream.synchronize()
            torch.cuda.profiler.stop()
        times = []
        for _ in range(30):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(1e3 * begin.elapsed_time(end))
    cache = sum(tensor.nbytes for tensor in past)
    print(json.dumps({"capacity": capacity, "cache_bytes": cache, "step_us": statistics.median(times)}))


if __name__ == "__main__":
    main()
