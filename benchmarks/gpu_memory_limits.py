"""What less shared memory costs the fused decode kernel: a decode step as on GPUs with 227, 163 and 99 KB a block.

``python -m benchmarks.gpu_memory_limits`` on a GPU with 227 KB: microseconds of one layer, and whether y is the same.
Shows the effect of fewer copies of the words and fewer stages, not the speed of those GPUs, whose memory is slower,
too. Needs torch and a libhqmq_cuda.so built with -DHQMQ_DECODE_COMPACT=ON.
"""

from __future__ import annotations

from typing import Annotated

import torch
import typer
from rich.console import Console

from benchmarks.gpu_cases import Ours, Shape
from benchmarks.gpu_paths import DECODE, SHARED_MEMORY, attention_path, decode_plan, shared_memory
from benchmarks.gpu_timing import free, graph_time
from benchmarks.report_tables import Sheet

SHAPES = {"1 x 4k": Shape(1, 4096), "16 x 32k": Shape(16, 32768)}
LIMITS = dict(reversed(SHARED_MEMORY.items()))


def measure(what: str, shape: Shape, name: str, device: torch.device) -> list[str]:
    """Cells of a row."""
    case = Ours(shape, name, device, Ours.copies_for(shape, name, device), False)
    steps, cells, expected, same = case.steps(), [what, name], None, True
    q, k = case.q[: shape.batch], case.k
    for label, limit in LIMITS.items():
        plan, why = decode_plan(case.scheme, shape.head_dim, q.shape[1] // k.shape[1], limit, k.shape[1], shape.batch)
        with shared_memory(limit):
            path, why_not = attention_path(q, k, case.caches[0][0].shape[2] // case.scheme.page_size, case.scheme)
            if path != DECODE:
                cells.append(why or why_not)
                continue
            y = steps[0]()
            assert isinstance(y, torch.Tensor)
            expected = y.clone() if expected is None else expected
            same = same and torch.equal(y, expected)
            time = graph_time(steps, device).us
        cells.append(f"{time:.1f} ({plan.copies[0]}, {plan.copies[1]} copies, {plan.stages} stages, {label})")
    del steps, case
    free(device)
    return [*cells, "yes" if same else "NO"]


def main(
    schemes: Annotated[str, typer.Option(help="Schemes, separated by spaces.")] = "hq3 hq3.5 hq4 hq5",
) -> None:
    """Print the table."""
    device = torch.device("cuda")
    rows = [measure(what, shape, name, device) for name in schemes.split() for what, shape in SHAPES.items()]
    columns = ["shape", "scheme", *[f"{label}, us" for label in LIMITS], "same y"]
    Console(width=160).print(
        Sheet(f"Shared memory of a block, {torch.cuda.get_device_name(device)}", columns, rows).markdown(), markup=False
    )


if __name__ == "__main__":
    typer.run(main)
