"""Prefill attention on a GPU: HqmqAttention over a packed past against float16 attention, in one run on one card.

``python -m benchmarks.gpu_prefill --output FOLDER``: microseconds of one layer's call with `tokens` new tokens over the
rest of `context` as codes (coding of the pages that fill included), by kernel: as usual, that of sm_80, the plain ones
(``--plain``); cuDNN and Flash on float16 beside them. Writes gpu_prefill.json and gpu_prefill.md.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.gpu_cases import Ours, Shape, prefill_variants
from benchmarks.gpu_paths import use_kernels
from benchmarks.gpu_tables import Row, show_sheets, write_sheets
from benchmarks.gpu_timing import Step, free, graph_time
from benchmarks.machine import log, machine
from benchmarks.report_tables import Sheet
from hqmq_trt.library_files import LIBRARY_DIR_VARIABLE

KERNELS = {"usual": 0, "sm_80": 2, "plain": 1}
"""Names and values of hqmq_cuda_use_plain_attention."""


@contextmanager
def kernels(name: str) -> Iterator[None]:
    """While inside, calls take these kernels; on a CPU there is one."""
    if not torch.cuda.is_available():
        yield
        return
    use_kernels(KERNELS[name])
    try:
        yield
    finally:
        use_kernels(KERNELS["usual"])


def flops(shape: Shape) -> float:
    """Multiplications and additions of causal attention of the last `tokens` of `context`."""
    keys = shape.context - shape.tokens + (shape.tokens + 1) / 2
    return 4.0 * shape.batch * shape.query_heads * shape.head_dim * shape.tokens * keys


def timed(row: Row, steps: list[Step], shape: Shape, device: torch.device) -> Row:
    """The row with its time, or why there is none."""
    try:
        row["us"] = graph_time(steps, device, replays=5).us
    except RuntimeError as error:
        return row | {"failed": str(error).splitlines()[0][:100]}
    return row | {"tflops": flops(shape) / row["us"] / 1e6}


def measure(shape: Shape, schemes: list[str], names: list[str], check: bool, device: torch.device) -> list[Row]:
    """Rows of a shape: float16 attention, then each scheme by each of the kernels."""
    rows: list[Row] = []
    for name, steps in prefill_variants(shape, device).items():
        rows.append(timed({"kind": "fp16", "case": name, **shape.values()}, steps, shape, device))
    free(device)
    best = min((row["us"] for row in rows if "us" in row), default=None)
    for scheme in schemes:
        for name in names:
            case = Ours(shape, scheme, device, prefill=True)
            with kernels(name):
                row = timed({"kind": name, "case": scheme, **shape.values()}, case.steps(), shape, device)
                row["path"] = case.path()
                if best and "us" in row:
                    row["x_fp16"] = best / row["us"]
                if check:
                    row["error"] = case.error()
            rows.append(row)
            del case
            free(device)
    return rows


def sheet(rows: list[Row]) -> Sheet:
    """The table."""
    cells = []
    for row in rows:
        found = [f"{row[key]:{form}}" if row.get(key) is not None else "" for key, form in COLUMNS]
        what = f"{row['case']} {row['kind']}"
        cells.append((f"{row['tokens']:,}", f"{row['context']:,}", str(row["batch"]), what, *found))
    names = ("new tokens", "of", "batch", "case", "us", "TFLOP/s", "x best fp16", "kernel", "relative error")
    return Sheet("Prefill attention of one layer", names, cells)


COLUMNS = (("us", ".0f"), ("tflops", ".0f"), ("x_fp16", ".2f"), ("path", "d"), ("error", ".1e"))


def main(
    output: Annotated[Path, typer.Option(help="Folder for gpu_prefill.json and gpu_prefill.md.")],
    library: Annotated[Path | None, typer.Option(help="Folder of libhqmq_cuda.so.")] = None,
    schemes: Annotated[str, typer.Option("--scheme", help="Schemes, separated by spaces.")] = "hq3",
    points: Annotated[
        str, typer.Option(help="new tokens:context, separated by commas.")
    ] = "16:32768,128:32768,512:8192,2048:32768,8192:32768,8192:8192,32768:32768",
    batch: Annotated[int, typer.Option(help="Sequences.")] = 1,
    group: Annotated[int, typer.Option(help="Query heads of a KV head.")] = 4,
    heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    head_dim: Annotated[int, typer.Option(help="Elements of a head.")] = 128,
    plain: Annotated[bool, typer.Option("--plain", help="Time the plain kernels too (slow).")] = False,
    check: Annotated[bool, typer.Option(help="Compare with float32 attention over the same bytes.")] = True,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the program out.")] = "cuda",
    commit: Annotated[str | None, typer.Option(help="Where git cannot tell.")] = None,
) -> None:
    """Time prefill attention."""
    if library:
        os.environ[LIBRARY_DIR_VARIABLE] = str(library)
    on = torch.device(device, 0) if device == "cuda" else torch.device(device)
    names = (["usual", "sm_80", *(["plain"] if plain else [])]) if device == "cuda" else ["usual"]
    output.mkdir(parents=True, exist_ok=True)
    where, rows = machine(commit), list[Row]()
    for point in points.split(","):
        tokens, context = map(int, point.split(":"))
        shape = Shape(batch, context, group, head_dim, heads, tokens)
        rows += measure(shape, schemes.split(), names, check, on)
        log(f"{tokens:,} of {context:,}: done")
        write_sheets(output, "gpu_prefill", where, rows, [sheet(rows)])
    show_sheets([sheet(rows)])


if __name__ == "__main__":
    typer.run(main)
