"""What a page table costs: HqmqAttention with and without one, over the same bytes, in one run on one GPU.

``python -m benchmarks.gpu_pages``: microseconds of a decode step and of a prefill call of one layer; "in order": page m
of sequence b is page b*M + m of the pool, "random": pages lie in random order. Contiguous caches hold a head's pages
side by side, pools those of all heads of a page, so that even in order reads are cut at pages. Also checks that y is
the same. Needs torch and libhqmq_cuda.so.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.gpu_cases import Ours, Shape, int32
from benchmarks.gpu_timing import Step, free, graph_time
from benchmarks.report_tables import Sheet
from hqmq_trt import cuda

SHAPES = {
    "decode, 1 x 4k": Shape(1, 4096),
    "decode, 1 x 32k": Shape(1, 32768),
    "decode, 16 x 32k": Shape(16, 32768),
    "prefill, 2k over 30k": Shape(1, 32768, tokens=2048),
}


def pooled(case: Ours, in_order: bool) -> tuple[list[Step], torch.Tensor]:
    """Steps of a case with its pages in a pool, and y of the first one."""
    page, device = case.scheme.page_size, case.device
    sequences, pages = case.caches[0][-1].shape[0], case.caches[0][0].shape[2] // page
    count = sequences * pages
    g = torch.Generator(device=device).manual_seed(1)
    order = torch.arange(count, device=device) if in_order else torch.randperm(count, generator=g, device=device)
    table = order.int().reshape(sequences, pages)
    pools = []
    for cache in case.caches:
        pool = []
        for tensor in cache[:-1]:
            by_page = tensor.unflatten(2, (pages, -1)).transpose(1, 2).flatten(0, 1)
            pool.append(torch.empty(by_page.shape, dtype=tensor.dtype, device=device))
            pool[-1][order] = by_page
        pools.append([*pool, cache[-1].clone()])
    past = int32([case.past] * case.shape.batch, device)

    def step_of(copy: int) -> Step:
        rows = slice(copy * case.shape.batch, (copy + 1) * case.shape.batch)
        caches = [[*pool[:-1], pool[-1][rows]] for pool in pools]
        inputs = (case.q[rows], case.k, case.v, past, case.new, None, case.scheme, case.books)
        return lambda: cuda.attend(*inputs, caches, case.shape.scale, page_table=table[rows])

    steps = [step_of(copy) for copy in range(case.copies)]
    y = steps[0]()
    assert isinstance(y, torch.Tensor)
    return steps, y


def measure(what: str, shape: Shape, name: str, device: torch.device) -> list[str]:
    """Cells of a row."""
    prefill = shape.tokens > 1
    copies = 1 if prefill else Ours.copies_for(shape, name, device)
    case = Ours(shape, name, device, copies, prefill)
    plain = case.steps()
    expected = plain[0]()
    assert isinstance(expected, torch.Tensor)
    before = graph_time(plain, device).us
    cells, same = [what, name, f"{before:.1f}"], True
    for in_order in (True, False):
        steps, y = pooled(case, in_order)
        same = same and torch.equal(y, expected)
        time = graph_time(steps, device).us
        cells.append(f"{time:.1f} ({100 * (time / before - 1):+.1f}%)")
        del steps, y
        free(device)
    return [*cells, "yes" if same else "NO"]


def main(
    schemes: Annotated[str, typer.Option(help="Schemes, separated by spaces.")] = "hq3 hq4 paper:s96_r4+med3",
) -> None:
    """Print the table."""
    device = torch.device("cuda")
    rows = [measure(what, shape, name, device) for name in schemes.split() for what, shape in SHAPES.items()]
    columns = ["shape", "scheme", "no table, us", "in order, us", "random, us", "same y"]
    Console(width=120).print(
        Sheet(f"Page tables, {torch.cuda.get_device_name(device)}", columns, rows).markdown(), markup=False
    )


if __name__ == "__main__":
    typer.run(main)
