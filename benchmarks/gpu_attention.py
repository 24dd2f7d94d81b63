"""Decode attention on a GPU: HqmqAttention against fp16 attention and the limit of memory, in one run on one card.

``python -m benchmarks.gpu_attention --output FOLDER --quick`` measures the points of the table of targets in less than
a minute; ``--grid`` measures presets x head_dim x group x batch x context; without either, the contexts and batches
given. Needs torch and libhqmq_cuda.so (``--library FOLDER``), no compiler and no TensorRT. Writes gpu_attention.json,
gpu_attention.md and gpu_attention.png, after every shape. Baselines: cuDNN and Flash of PyTorch; with Triton 4-bit
codes; with FlashInfer (``pip install flashinfer-python``, nvcc, ninja) float16 and float8 KV.

Columns: "us" is one launch (a decode step of one layer, the append of its token included) that finds nothing in L2, as
between the layers of a model; "warm" the same memory again and again, so that L2 holds it where it fits; "fill" a step
whose token fills a page, which is coded; "limit" is bytes that must be moved / bandwidth of a copy in the same run.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks import gpu_flashinfer, gpu_targets
from benchmarks.gpu_cases import Half, Ours, Shape, prefill_variants
from benchmarks.gpu_encode import measure_encode, measure_prefill
from benchmarks.gpu_encode import sheet as encode_sheet
from benchmarks.gpu_paths import plain_attention
from benchmarks.gpu_tables import attention_sheet, failures, grid_sheet, plot, prefill_sheet, targets_sheet
from benchmarks.gpu_timing import Step, copies_for, copy_bandwidth, free, graph_time, l2_bytes
from benchmarks.machine import log, machine, version_of
from hqmq_trt.errors import HqmqError
from hqmq_trt.library_files import LIBRARY_DIR_VARIABLE
from hqmq_trt.scheme import Scheme

Row = dict[str, Any]
SCHEMES = ("hq3", "hq3.5", "hq4", "hq5")
"""Presets that the fused decode kernel takes for K and V alike."""


class Run:
    """Rows of one run, written to `output` as they come."""

    def __init__(self, output: Path, device: torch.device, budget: float, commit: str | None) -> None:
        self.output, self.device = output, device
        self.deadline = time.monotonic() + budget
        self.old, self.rivals = False, True
        self.without: list[str] = []
        self.rows: list[Row] = []
        self.notes: list[str] = []
        self.machine = machine(commit)
        self.bandwidth = copy_bandwidth(device)
        free(device)
        log(f"copy: {self.bandwidth / 1e12:.3f} TB/s")

    def out_of_time(self, what: str) -> bool:
        """Whether the budget is spent; notes what is left out."""
        if time.monotonic() < self.deadline:
            return False
        self.notes.append(f"not measured, the time was up: {what}")
        return True

    def time(
        self, kind: str, case: str, shape: Shape, steps: list[Step] | Callable[[], list[Step]], **more: Any
    ) -> Row:
        """A row: cold, and warm where there are several copies; or why it failed."""
        row: Row = {"kind": kind, "case": case, **shape.values(), **more}
        try:
            made = steps() if callable(steps) else steps
            cold = graph_time(made, self.device)
            warm = graph_time(made[:1], self.device) if len(made) > 1 else cold
        except (RuntimeError, HqmqError) as error:
            row["failed"] = str(error).splitlines()[0][:120]
        else:
            row |= {"us": cold.us, "us_least": cold.least, "us_most": cold.most, "warm_us": warm.us}
            row |= {"launches": cold.launches, "copies": len(made)}
            if "bytes" in row:
                row["tb_s"] = row["bytes"] / cold.us / 1e6
                row["limit_us"] = 1e6 * row["bytes"] / self.bandwidth
        self.rows.append(row)
        return row

    def half(self, shape: Shape) -> dict[str, float | str] | None:
        """Time the baselines of a shape; the fastest, cold and warm."""
        same = [row for row in self.rows if row["kind"] in ("fp16", "fp8", "int4") and _same(row, shape)]
        if not same:
            try:
                case = Half(shape, self.device, copies_for(shape.half_bytes, self.device))
            except torch.OutOfMemoryError:
                self.notes.append(f"fp16 of {shape} does not fit the memory")
                return None
            for name, steps in case.variants().items():
                self.time("fp16", name, shape, steps, bytes=shape.half_bytes)
            del case
            free(self.device)
            if shape.tokens > 1:
                self._note("FlashInfer's and Triton's decode are timed with one new token a sequence only")
            elif self.rivals:
                self._flashinfer(shape)
                if self.device.type == "cuda" and version_of("triton") != "missing":
                    self._triton(shape)
            same = [row for row in self.rows if row["kind"] == "fp16" and _same(row, shape)]
        timed = [row for row in same if row["kind"] == "fp16" and "us" in row]
        if not timed:
            return None
        best = min(timed, key=lambda row: float(row["us"]))
        return {"name": best["case"], "us": best["us"], "warm_us": min(row["warm_us"] for row in timed)}

    def _flashinfer(self, shape: Shape) -> None:
        """FlashInfer in its fastest settings; where it is missing, rows that say so."""
        why = gpu_flashinfer.missing(self.device)
        for kind, dtype in gpu_flashinfer.DTYPES.items():
            end = "" if kind == "fp16" else f"_{kind}"
            if why:
                self.rows.append({"kind": kind, "case": f"flashinfer{end}", **shape.values(), "missing": why})
                continue
            try:
                decode = gpu_flashinfer.Decode(shape, self.device, dtype)
            except torch.OutOfMemoryError:
                self._note(f"FlashInfer's {kind} of {shape} does not fit the memory")
                continue
            for case in gpu_flashinfer.CASES:
                settings = gpu_flashinfer.kernels(case, kind, self.without)
                if settings:
                    self._fastest(decode, kind, case + end, settings)
                else:
                    self.rows.append({"kind": kind, "case": case + end, **shape.values(), "missing": "left out"})
            del decode
            free(self.device)

    def _fastest(
        self, decode: gpu_flashinfer.Decode, kind: str, case: str, settings: list[gpu_flashinfer.Setting]
    ) -> None:
        """A row of the fastest of FlashInfer's settings, or of why each failed."""
        found = decode.fastest(settings, lambda steps: graph_time(steps, self.device, 3).us)
        for setting, result in found.tried.items():
            if isinstance(result, str):
                self._note(f"{case}, {setting}: {result}")
        if found.setting is None:
            reasons = "; ".join(str(result) for result in found.tried.values())
            self.rows.append({"kind": kind, "case": case, **decode.shape.values(), "failed": reasons})
            return
        nbytes = decode.bytes_read(found.setting.page_size)
        more = {"settings": str(found.setting), "tried": found.tried, "error": found.error}
        self.time(kind, case, decode.shape, found.steps, bytes=nbytes, **more)

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes.append(text)

    def _triton(self, shape: Shape) -> None:
        """4-bit codes in Triton, in its fastest configuration; benchmarks/triton_int4.py says what is left out."""
        from benchmarks.triton_int4 import ROWS, random_caches

        if shape.group > ROWS:
            return
        try:
            cases = random_caches(shape, self.device)
            count = torch.cuda.get_device_properties(self.device).multi_processor_count
            best = cases[0].fastest(lambda step: graph_time([step], self.device, 3).us, count)
        except (RuntimeError, torch.OutOfMemoryError) as error:
            self.notes.append(f"Triton's 4 bits, {shape}: {str(error).splitlines()[0][:120]}")
            return
        steps: list[Step] = [partial(case.launch, **best) for case in cases]
        self.time("int4", "triton_int4", shape, steps, bytes=cases[0].nbytes + shape.rows_bytes, configuration=best)
        del cases, steps
        free(self.device)

    def ours(self, shape: Shape, scheme: str, best: dict[str, Any] | None, check: bool, fill: bool) -> None:
        """Time a scheme and compare it with the baselines; with `old` also on the plain kernels."""
        for old in (False, True) if self.old else (False,):
            with plain_attention(old):
                self._ours(shape, scheme, best, check, fill, "ours_plain" if old else "ours")

    def _ours(self, shape: Shape, scheme: str, best: dict[str, Any] | None, check: bool, fill: bool, kind: str) -> None:
        try:
            Scheme.parse(scheme).key.check_head_dim(shape.head_dim)
            case = Ours(shape, scheme, self.device, Ours.copies_for(shape, scheme, self.device))
        except torch.OutOfMemoryError:
            self.notes.append(f"{scheme} of {shape} does not fit the memory")
            return
        nbytes = case.bytes_read()
        row = self.time(kind, scheme, shape, case.steps, bytes=nbytes, limit_x=shape.half_bytes / nbytes)
        if "us" not in row:
            return
        row |= {"outlier_share": case.outlier_share(), "path": case.path()}
        if best:
            row |= {"best_fp16": best["name"], "x_fp16": best["us"] / row["us"]}
            row["warm_x_fp16"] = best["warm_us"] / row["warm_us"]
        if fill:
            row["fill_us"] = graph_time(case.steps(fill=True), self.device).us
        if check:
            row["error"] = case.error()
        del case
        free(self.device)

    def point(self, shape: Shape, schemes: list[str], check: bool = True, fill: bool = True) -> None:
        """Baselines and schemes of one shape."""
        if self.out_of_time(f"{shape}"):
            return
        best = self.half(shape)
        for scheme in schemes:
            if not self.out_of_time(f"{scheme} of {shape}"):
                self.ours(shape, scheme, best, check, fill)
        self.write()

    def prefill(self, tokens: int, context: int, schemes: list[str]) -> None:
        """A prefill of `tokens` over the rest of `context` as codes."""
        shape = Shape(1, context, tokens=tokens)
        if self.out_of_time(f"prefill {shape}"):
            return
        timed: list[Row] = []
        for name, steps in prefill_variants(shape, self.device).items():
            timed.append(self.time("prefill_fp16", name, shape, steps))
            del steps
        free(self.device)
        timed.append(self._flashinfer_prefill(shape))
        free(self.device)
        best = min((row for row in timed if "us" in row), key=lambda row: float(row["us"]), default=None)
        for scheme in schemes:
            row = self.time("prefill", scheme, shape, Ours(shape, scheme, self.device, prefill=True).steps)
            if best and "us" in row:
                row |= {"best_fp16": best["case"], "x_fp16": best["us"] / row["us"]}
            free(self.device)
        self.write()

    def _flashinfer_prefill(self, shape: Shape) -> Row:
        row: Row = {"kind": "prefill_fp16", "case": "flashinfer", **shape.values()}
        why = "left out" if "prefill" in self.without else gpu_flashinfer.missing(self.device)
        if why:
            self.rows.append(row | {"missing": why})
            return self.rows[-1]
        try:
            step = gpu_flashinfer.prefill_step(shape, self.device)
        except Exception as error:  # FlashInfer raises what its compilers, bindings and checks raise
            self.rows.append(row | {"failed": (str(error).splitlines() or [type(error).__name__])[0][:120]})
            return self.rows[-1]
        return self.time("prefill_fp16", "flashinfer", shape, [step])

    def encode(self, context: int, schemes: list[str]) -> None:
        """Coding a prefill against its attention."""
        if self.out_of_time(f"encoding {context}"):
            return
        shape = Shape(1, context, tokens=context)
        known = [row for row in self.rows if row["kind"] == "prefill_fp16" and _same(row, shape)]
        half = known or measure_prefill(shape, self.device)
        self.rows += [] if known else [row | {"kind": "prefill_fp16"} for row in half]
        self.rows += measure_encode(shape, schemes, self.device, half)
        self.write()

    def write(self) -> None:
        """All results so far."""
        self.output.mkdir(parents=True, exist_ok=True)
        document = {
            "machine": self.machine,
            "copy_bytes_per_second": self.bandwidth,
            "l2_bytes": l2_bytes(self.device),
            "flashinfer": version_of("flashinfer"),
            "rows": self.rows,
            "targets": gpu_targets.targets(self.rows, self.bandwidth),
            "growth": gpu_targets.growth(self.rows),
            "notes": self.notes,
        }
        path = self.output / "gpu_attention.json"
        path.with_suffix(".part").write_text(json.dumps(document, indent=1) + "\n")
        path.with_suffix(".part").replace(path)

    def finish(self, grid: bool) -> None:
        """Tables and plot."""
        self.write()
        where = self.machine
        if not self.rivals:  # their kernels are compiled and tuned anew for every shape
            self.notes.append("FlashInfer and Triton are not timed in a grid")
        elif version_of("triton") == "missing":
            self.notes.append("Triton is not installed: no row of it")
        if self.without:
            self.notes.append(f"left out of FlashInfer: {', '.join(self.without)}")
        self.notes += failures(self.rows)
        sheets = [attention_sheet(self.rows), prefill_sheet(self.rows), encode_sheet(self.rows)]
        sheets += [grid_sheet(self.rows)] if grid else []
        sheets += [targets_sheet(gpu_targets.targets(self.rows, self.bandwidth))]
        head = (
            f"{where['card']}, driver {where['driver']}, torch {where['torch']}, {where['date']}, commit "
            f"{where['commit']}. Copy bandwidth {self.bandwidth / 1e12:.2f} TB/s, L2 {l2_bytes(self.device) >> 20} MiB."
        )
        shown = [sheet for sheet in sheets if sheet.rows]
        notes = "".join(f"- {note}\n" for note in self.notes)
        text = "\n".join([head, "", *[sheet.markdown() for sheet in shown], notes])
        (self.output / "gpu_attention.md").write_text(text)
        plot(self.rows, head.split(". ")[0], self.output / "gpu_attention.png")
        console = Console(width=180)
        for sheet in shown:
            console.print(sheet.rich())
        print(head, *self.notes, sep="\n")


def _same(row: Row, shape: Shape) -> bool:
    return all(row[key] == value for key, value in shape.values().items())


def quick(run: Run, schemes: list[str] | None, tail: bool) -> None:
    """The points of the table of targets; `tail`: prefill and encoding too."""
    points: dict[tuple[int, int], list[str]] = {}
    for point in gpu_targets.POINTS:
        if schemes is None or point.scheme in schemes:
            points.setdefault((point.batch, point.context), []).append(point.scheme)
    for (batch, context), names in sorted(points.items(), key=lambda item: item[0][0] * item[0][1]):
        run.point(Shape(batch, context), names)
        log(f"{gpu_targets.label(batch, context)}: done")
    if not tail:
        return
    chosen = [name for name in ("hq3", "hq4") if schemes is None or name in schemes]
    for tokens, context in gpu_targets.PREFILLS:
        run.prefill(tokens, context, chosen[:1])
        log(f"prefill of {tokens:,} of {context:,}: done")
    run.encode(32768, chosen)
    log("encoding: done")


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(
    output: Annotated[Path, typer.Option(help="Folder for the results.")],
    library: Annotated[Path | None, typer.Option(help="Folder of libhqmq_cuda.so [default: the package's].")] = None,
    quick_run: Annotated[bool, typer.Option("--quick", help="The points of the table of targets.")] = False,
    tail: Annotated[bool, typer.Option(help="With --quick: prefill and encoding too.")] = True,
    grid: Annotated[
        bool, typer.Option("--grid", help="All head_dims, groups, batches, contexts; worst first.")
    ] = False,
    schemes: Annotated[
        str | None, typer.Option("--scheme", help="Schemes, separated by spaces [default: hq3 hq3.5 hq4 hq5].")
    ] = None,
    contexts: Annotated[str, typer.Option(help="Tokens in the cache.")] = "4096,32768,131072",
    batches: Annotated[str, typer.Option(help="Sequences.")] = "1,16",
    groups: Annotated[str, typer.Option(help="Query heads of a KV head; --grid: 1,2,3,4,6,7,8 unless given.")] = "",
    head_dims: Annotated[str, typer.Option(help="Elements of a head; --grid: 64,128,256 unless given.")] = "",
    heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    tokens: Annotated[int, typer.Option(help="Queries of a sequence; baselines see all keys with each.")] = 1,
    old: Annotated[bool, typer.Option("--old", help="Time the plain kernels too.")] = False,
    without: Annotated[
        str, typer.Option("--flashinfer-without", help=f"Of FlashInfer, leave out: {', '.join(gpu_flashinfer.PARTS)}.")
    ] = "",
    check: Annotated[bool, typer.Option(help="Compare with float32 attention over the same bytes.")] = True,
    budget: Annotated[float, typer.Option(help="Seconds; what is left then is listed.")] = 540.0,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the program out.")] = "cuda",
    commit: Annotated[str | None, typer.Option(help="Where git cannot tell.")] = None,
) -> None:
    """Time decode attention over HQMQ codes and over fp16."""
    if library:
        os.environ[LIBRARY_DIR_VARIABLE] = str(library)
    on = torch.device(device, 0) if device == "cuda" else torch.device(device)
    names = schemes.split() if schemes else None
    left_out = without.split(",") if without else []
    if unknown := set(left_out) - set(gpu_flashinfer.PARTS):
        raise typer.BadParameter(f"FlashInfer has no {', '.join(sorted(unknown))}: {', '.join(gpu_flashinfer.PARTS)}")
    run = Run(output, on, budget, commit)
    run.without = left_out
    run.old, run.rivals = old, not grid
    if quick_run:
        quick(run, names, tail)
    else:
        presets = names or list(SCHEMES)
        dims = _numbers(head_dims or ("64,128,256" if grid else "128"))
        group_sizes = _numbers(groups or ("1,2,3,4,6,7,8" if grid else "4"))
        sizes = itertools.product(_numbers(contexts), dims, _numbers(batches), group_sizes)
        for context, dim, batch, group in sizes:
            shape = Shape(batch, context, group, dim, heads, tokens)
            run.point(shape, presets, check, fill=not grid)
        log("points: done")
    run.finish(grid)


if __name__ == "__main__":
    typer.run(main)
