"""Coding pages on a GPU: of a prefill, against its attention, and of decode steps that fill a page.

``python -m benchmarks.gpu_encode --output FOLDER``: microseconds of HqmqQuantize for K and V of one layer's prefill,
all pages full, and of cuDNN's and Flash's causal float16 attention over as many tokens, in one run. Then, of one new
token: HqmqAttention where no page fills and where all do, and HqmqQuantize of K alone (one launch) in both cases.
Writes gpu_encode.json and gpu_encode.md.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import torch
import typer

from benchmarks.gpu_cases import Ours, Shape, append, codebook, int32, prefill_variants, tokens_like_a_model
from benchmarks.gpu_tables import Row, show_sheets, write_sheets
from benchmarks.gpu_timing import Step, free, graph_time
from benchmarks.machine import log, machine
from benchmarks.report_tables import Sheet
from hqmq_trt.format import cache_tensors
from hqmq_trt.library_files import LIBRARY_DIR_VARIABLE
from hqmq_trt.scheme import ROLES, Scheme


def encode_step(shape: Shape, name: str, device: torch.device) -> Step:
    """Codes K and V [B, H, context, D] float16 into empty caches."""
    scheme = Scheme.parse(name)
    page, calls = scheme.page_size, []
    past, new = int32([0] * shape.batch, device), int32([shape.context] * shape.batch, device)
    for role_name in ROLES:
        role = scheme.role(role_name)
        x = tokens_like_a_model(role, shape.heads, shape.context, shape.head_dim, role_name, device)
        x = x.expand(shape.batch, -1, -1, -1)
        pages = -(-shape.context // page)
        specs = cache_tensors(role, page, shape.head_dim, shape.heads, shape.batch, pages)
        cache = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in specs]
        calls.append((x, past, new, role, codebook(role, shape.heads, role_name, device), cache))

    def step() -> None:
        for call in calls:
            append(*call)

    return step


def measure_prefill(shape: Shape, device: torch.device) -> list[Row]:
    """Rows of the float16 attention of a prefill of `context` tokens."""
    rows: list[Row] = []
    for name, steps in prefill_variants(shape, device).items():
        row: Row = {"kind": "fp16", "case": name, **shape.values()}
        try:
            row["us"] = graph_time(steps, device).us
        except RuntimeError as error:
            row["failed"] = str(error).splitlines()[0][:100]
        rows.append(row)
    return rows


def measure_encode(shape: Shape, names: list[str], device: torch.device, half: list[Row]) -> list[Row]:
    """Rows of coding K and V, `share`: of cuDNN's attention, or of the fastest where there is no cuDNN."""
    timed = {row["case"]: row["us"] for row in half if "us" in row}
    base = timed.get("cudnn", min(timed.values(), default=None))
    rows = []
    for name in names:
        found = graph_time([encode_step(shape, name, device)], device)
        tokens = shape.batch * shape.heads * shape.context * len(ROLES)
        share = found.us / base if base else None
        rows.append(
            {"kind": "encode", "case": name, **shape.values(), "us": found.us, "share": share}
            | {"ns_per_token": 1e3 * found.us / tokens}
        )
        free(device)
    return rows


def append_step(shape: Shape, name: str, held: int, device: torch.device) -> Step:
    """Appends one token of K to each of `batch` sequences that hold `held`: one kernel launch."""
    scheme = Scheme.parse(name)
    role = scheme.role("key")
    x = tokens_like_a_model(role, shape.heads, 1, shape.head_dim, "key", device).expand(shape.batch, -1, -1, -1)
    past, new = int32([held] * shape.batch, device), int32([1] * shape.batch, device)
    specs = cache_tensors(role, scheme.page_size, shape.head_dim, shape.heads, shape.batch, 2)
    cache = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in specs]
    cache[-1].normal_(generator=torch.Generator(device=device).manual_seed(5))  # the tail, which fills a page
    book = codebook(role, shape.heads, "key", device)
    return lambda: append(x, past, new, role, book, cache)


def measure_steps(shape: Shape, names: list[str], device: torch.device) -> list[Row]:
    """Rows of decode steps: `ordinary` and `fill` of HqmqAttention, `append` and `append_fill` of K alone, in us."""
    rows: list[Row] = []
    for name in names:
        page = Scheme.parse(name).page_size
        ours = Ours(shape, name, device)
        row: Row = {"kind": "step", "case": name, **shape.values()}
        row["ordinary"] = graph_time(ours.steps(), device).us
        row["fill"] = graph_time(ours.steps(fill=True), device).us
        row["append"] = graph_time([append_step(shape, name, page // 2, device)], device).us
        row["append_fill"] = graph_time([append_step(shape, name, page - 1, device)], device).us
        rows.append(row)
        del ours
        free(device)
    return rows


def step_sheet(rows: list[Row]) -> Sheet:
    """The table of decode steps."""
    cells = []
    for row in rows:
        if row["kind"] == "step":
            times = (row["ordinary"], row["fill"], row["fill"] - row["ordinary"], row["append"], row["append_fill"])
            cells.append((str(row["batch"]), row["case"], *(f"{us:.1f}" for us in times)))
    columns = ("batch", "case", "step", "pages fill", "difference", "append of K", "pages fill")
    return Sheet("A new token in each sequence, us", columns, cells)


def sheet(rows: list[Row]) -> Sheet:
    """The table of prefills."""
    cells = []
    for row in rows:
        if row["kind"] == "encode":
            share = "" if row["share"] is None else f"{100 * row['share']:.1f}%"
            cells.append((f"{row['context']:,}", row["case"], f"{row['us']:.0f}", f"{row['ns_per_token']:.2f}", share))
        elif row["kind"] == "fp16" and row["tokens"] == row["context"]:
            cells.append(
                (f"{row['context']:,}", f"{row['case']} fp16", f"{row['us']:.0f}" if "us" in row else "failed", "", "")
            )
    columns = ("tokens", "case", "us", "ns a token and head", "of cuDNN's attention")
    return Sheet("Coding K and V of a prefill, one layer", columns, cells)


def main(
    output: Annotated[Path, typer.Option(help="Folder for gpu_encode.json and gpu_encode.md.")],
    library: Annotated[Path | None, typer.Option(help="Folder of libhqmq_cuda.so.")] = None,
    schemes: Annotated[str, typer.Option("--scheme", help="Schemes, separated by spaces.")] = "hq3 hq3.5 hq4 hq5",
    contexts: Annotated[str, typer.Option(help="Tokens of the prefill, separated by commas.")] = "32768",
    head_dim: Annotated[int, typer.Option(help="Elements of a head.")] = 128,
    batches: Annotated[str, typer.Option(help="Sequences of a decode step, separated by commas.")] = "1,4,16",
    step_context: Annotated[int, typer.Option(help="Tokens that a decode step sees.")] = 4096,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the program out.")] = "cuda",
    commit: Annotated[str | None, typer.Option(help="Where git cannot tell.")] = None,
) -> None:
    """Time the coding of pages."""
    if library:
        os.environ[LIBRARY_DIR_VARIABLE] = str(library)
    on, rows = torch.device(device), list[Row]()
    for context in map(int, contexts.split(",")):
        shape = Shape(1, context, head_dim=head_dim, tokens=context)
        half = measure_prefill(shape, on)
        free(on)
        rows += half + measure_encode(shape, schemes.split(), on, half)
        log(f"{context:,} tokens: done")
    for batch in map(int, batches.split(",")):
        rows += measure_steps(Shape(batch, step_context, head_dim=head_dim), schemes.split(), on)
        log(f"steps of {batch} sequences: done")
    output.mkdir(parents=True, exist_ok=True)
    sheets = [sheet(rows), step_sheet(rows)]
    write_sheets(output, "gpu_encode", machine(commit), rows, sheets)
    show_sheets(sheets)


if __name__ == "__main__":
    typer.run(main)
