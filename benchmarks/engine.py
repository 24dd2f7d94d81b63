"""Decode steps of TensorRT engines beside PyTorch, over contexts, batches and schemes, in one run on one card.

``python -m benchmarks.engine --output DIR`` from the root of the repository; it takes about two minutes to export and
build an engine a scheme (kept in --work) and --budget seconds to measure. Writes engine.json, engine.md, engine.png,
anew after every case (PyTorch, a scheme), so that a run that is ended leaves what it has measured. Stage ``kernels``
(--stages) writes kernels.json: which kernels a step launched, ours and others', and how long they took.

The model has Llama-3-8B's layer shapes (hidden 4096, 32 query and 8 KV heads of 128, MLP 14336) and random weights,
--layers of its 32 layers and a vocabulary of --vocab instead of 128,256, so that the cost of a layer is what shows.
"ms" is the whole step as a caller sees it: token ids to the GPU, the engine, logits back, Python included; mean over
the tokens of a page, of which the last codes the page. "32 layers" is ms / layers * 32: a little too much, since it
multiplies what is outside the layers as well. PyTorch is the same model with a static fp16 cache, cuDNN attention and
one CUDA graph. An engine's cache has the capacity of the longest context at every point; PyTorch sees exactly the
tokens. Caches hold the codes of Gaussian tokens (benchmarks/decode_cases.py); nothing is prefilled.

Scheme fp16 is HqmqAttention with an unpacked cache: the same engine but for the cache, whose attention the plain
kernels compute (the fused decode kernel reads codes only). PyTorch's cuDNN attention is the faster fp16.

"host us" is what the host does for a step, by benchmarks/host_time.py: not its wait for the GPU.

A point that does not fit the memory is measured with half the sequences, and half again, and says so; what the budget
does not reach is listed as skipped. --device cpu runs the same code through ONNX Runtime, to try it out.
"""

from __future__ import annotations

import gc
import json
import multiprocessing
import shutil
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

from benchmarks.decode_cases import EngineDecoder, Shape, TorchDecoder, plan_points, random_model
from benchmarks.engine_tables import TORCH, Row, finish, sequences_that_fit, tables, targets, write
from benchmarks.machine import log, machine

STAGES = {"export", "build", "measure", "kernels"}
CONTEXTS = "1024,2048,4096,8192,16384,32768,65536,131072"
KERNEL_POINTS = ((1, 4096), (1, 32768), (8, 32768))
"""Sequences and tokens at which stage ``kernels`` looks."""
TINY = Shape(layers=2, vocab=256, hidden=128, heads=4, kv_heads=2, head_dim=64, intermediate=128)


@dataclass(frozen=True)
class Point:
    """What was asked for, and the sequences it is measured with."""

    asked: int
    batch: int
    context: int


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that device or host memory ran out."""
    if isinstance(error, MemoryError):
        return True
    return type(error).__name__ == "OutOfMemoryError" or "out of device memory" in str(error)


def measure(
    name: str, opener: Callable[[int, int], Any], points: list[Point], deadline: float, seconds: float, rows: list[Row]
) -> None:
    """Append a row for every point: measured, or skipped with its reason. `opener(batch, context)` makes a decoder."""
    if not points:
        return
    batch, context = max(p.batch for p in points), max(p.context for p in points)
    if time.monotonic() > deadline:
        rows += [_row(name, point, skipped="the time was up") for point in points]
        return
    log(f"{name}: opening {batch} x {context:,} tokens")
    decoder, reason = _open(opener, batch, context)
    if decoder is None and reason:
        log(f"{name}: {reason}")
        rows += [_row(name, point, skipped=f"failed: {reason}") for point in points]
        return
    if decoder is None:
        log(f"{name}: {batch} x {context:,} does not fit")
        if batch == 1 and all(p.context == context for p in points):
            rows += [_row(name, point, skipped="out of memory with one sequence") for point in points]
            return
        fewer = [Point(p.asked, max(p.batch // 2, 1), p.context) for p in points if p.context > context // 2]
        measure(name, opener, [p for p in points if p.context <= context // 2], deadline, seconds, rows)
        measure(name, opener, fewer, deadline, seconds, rows)
        return
    try:
        for position, point in enumerate(points):
            if position and time.monotonic() > deadline:
                rows.append(_row(name, point, skipped="the time was up"))
                continue
            try:
                found = decoder.measure(point.batch, point.context, seconds)
            except Exception as error:
                log(f"{name}: {point}: {error}")
                rows.append(_row(name, point, skipped=f"failed: {error}"))
                continue
            rows.append(_row(name, point, **found))
            log(f"{name}: batch {point.batch}, {point.context:,} tokens: {found['ms']:.3f} ms")
    finally:
        decoder.close()


def _open(opener: Callable[[int, int], Any], batch: int, context: int) -> tuple[Any, str]:
    """(decoder, ""), or (None, reason); the reason is empty if the memory ran out."""
    try:
        return opener(batch, context), ""
    except Exception as error:
        reason = "" if out_of_memory(error) else f"{type(error).__name__}: {error}"
    # Only now is the error gone, and with it the frames that hold what was allocated.
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return None, reason


def _row(name: str, point: Point, **values: Any) -> Row:
    return {"case": name, "batch_asked": point.asked, "batch": point.batch, "context": point.context, **values}


def export(scheme: str, shape: Shape, work: str, device: str) -> float:
    """Export the model with a scheme, unless it or its engine is there; seconds. Runs in its own process."""
    from hqmq_trt.export import export_model

    started = time.monotonic()
    folder = Path(work, f"{scheme}.onnx")
    if not ((folder / "manifest.json").is_file() or Path(work, f"{scheme}.engine", "engine.json").is_file()):
        # The same weights as PyTorch's, which come from the GPU's generator.
        model = random_model(shape, device, _dtype(device)).cpu()
        if device == "cuda":
            torch.cuda.empty_cache()  # the builder wants the memory
        export_model(model, folder, scheme)
    return time.monotonic() - started


def build(scheme: str, work: str, batch: int, context: int) -> float:
    """Build the engine of an export, unless it is there; seconds. All share a timing cache: with the same kernels for
    what they have in common, schemes differ by their cache alone."""
    from hqmq_trt.engine.builder import build_engine

    started = time.monotonic()
    source, folder = Path(work, f"{scheme}.onnx"), Path(work, f"{scheme}.engine")
    if not (folder / "engine.json").is_file():
        limits: dict[str, Any] = {"max_batch": batch, "max_context": context, "prefill_chunk": 16}
        build_engine(source, folder, **limits, timing_cache=Path(work, "timing.cache"))
        shutil.rmtree(source)  # as large as the engine
    return time.monotonic() - started


def _dtype(device: str) -> torch.dtype:
    return torch.float16 if device == "cuda" else torch.float32


def _numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main(
    output: Annotated[Path, typer.Option(help="Folder for engine.json, engine.md and engine.png.")],
    work: Annotated[Path | None, typer.Option(help="Keep exports and engines here [default: a temporary one].")] = None,
    layers: Annotated[int, typer.Option(min=1, help="Layers of the model.")] = 8,
    vocab: Annotated[int, typer.Option(min=8, help="Size of the vocabulary (Llama-3: 128256).")] = 8192,
    contexts: Annotated[str, typer.Option(help="Tokens in the cache.")] = CONTEXTS,
    batches: Annotated[str, typer.Option(help="Sequences.")] = "1,8",
    schemes: Annotated[str, typer.Option(help="In the order of measuring; fp16 is the base of the ratios.")] = (
        "hq3,fp16,hq4"
    ),
    stages: Annotated[str, typer.Option(help="export, build, measure, kernels.")] = "export,build,measure",
    budget: Annotated[float, typer.Option(help="Seconds for measuring, all cases together.")] = 240.0,
    point_seconds: Annotated[float, typer.Option(help="Seconds of one point.")] = 1.0,
    jobs: Annotated[int, typer.Option(min=1, help="Exports and builds at a time.")] = 3,
    device: Annotated[str, typer.Option(help="cuda, or cpu to try the program out.")] = "cuda",
    tiny: Annotated[bool, typer.Option("--tiny", help="A toy model instead of Llama's shapes.")] = False,
    commit: Annotated[str | None, typer.Option(help="Where git cannot tell.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Print the plan and exit.")] = False,
) -> None:
    """Time decode steps of engines and of PyTorch."""
    names, sizes, counts, wanted = schemes.split(","), _numbers(contexts), _numbers(batches), set(stages.split(","))
    shape = TINY if tiny else Shape(layers=layers, vocab=vocab)
    points = [Point(batch, batch, context) for batch, context in plan_points(sizes, counts)]
    if unknown := wanted - STAGES:
        raise typer.BadParameter(f"unknown stage {sorted(unknown)[0]}: use {', '.join(sorted(STAGES))}")
    if list_only:
        print(f"{shape}\ncases, in this order: {TORCH}, {', '.join(names)}; {budget:.0f} s")
        print("\n".join(f"  batch {point.batch}, {point.context:,} tokens" for point in points))
        return
    output.mkdir(parents=True, exist_ok=True)
    folder = work or Path(tempfile.mkdtemp(prefix="hqmq-engine-"))
    failed = False
    if "export" in wanted:
        failed |= not _prepare(names, jobs, "exported", export, shape, str(folder), device)
    if "build" in wanted and device == "cuda":
        failed |= not _prepare(names, jobs, "built", build, str(folder), max(counts), max(sizes))
    if "measure" in wanted:
        failed |= not _measure(names, shape, folder, points, device, budget, point_seconds, commit, output)
    if "kernels" in wanted and device == "cuda":
        failed |= not _kernels(names, shape, folder, output)
    raise typer.Exit(int(failed))


def _prepare(names: list[str], jobs: int, what: str, work: Callable[..., float], *arguments: Any) -> bool:
    """Run `work` for every scheme in processes, the first one alone where it builds; whether all went well."""
    done = True
    with ProcessPoolExecutor(min(jobs, len(names)), multiprocessing.get_context("spawn")) as pool:
        for group in [names[:1], names[1:]] if work is build else [names]:
            running = {name: pool.submit(work, name, *arguments) for name in group}
            for name, future in running.items():
                try:
                    log(f"{name}: {what}, {future.result():.0f} s")
                except Exception as error:
                    log(f"{name}: FAILED: {error}")
                    done = False
    return done


def _measure(
    names: list[str], shape: Shape, folder: Path, points: list[Point], device: str, budget: float, seconds: float,
    commit: str | None, output: Path,
) -> bool:  # fmt: skip
    def torch_opener(batch: int, context: int) -> TorchDecoder:
        return TorchDecoder(random_model(shape, device, _dtype(device)), shape, batch, context)

    def opener(name: str) -> Callable[[int, int], Any]:
        kind = "engine" if device == "cuda" else "onnx"
        return lambda batch, context: EngineDecoder(folder / f"{name}.{kind}", batch, context)

    openers: dict[str, Callable[[int, int], Any]] = {TORCH: torch_opener, **{name: opener(name) for name in names}}
    rows: list[Row] = []
    fits, where = sequences_that_fit(names), machine(commit)
    what = "a toy model" if shape.hidden == TINY.hidden else "Llama-3-8B's shapes"
    title = f"{shape.layers} layers of {what}, vocabulary {shape.vocab:,}, {where['card']}, {where['date']}"
    started = time.monotonic()
    for position, (name, make) in enumerate(openers.items()):
        left = budget - (time.monotonic() - started)
        measure(name, make, points, time.monotonic() + left / (len(openers) - position), seconds, rows)
        finish(rows, shape.layers)
        reached = targets(rows, fits)
        document = {"title": title, "machine": where, "shape": asdict(shape), "cases": list(openers), "rows": rows}
        write(document | {"sequences_in_80_GB": fits, "targets": reached}, output)
    for shown in tables(title, rows, fits, reached):
        Console(width=140).print(shown)
    errors = [row for row in rows if str(row.get("skipped", "")).startswith("failed")]
    return not errors and any("ms" in row for row in rows)


def _kernels(names: list[str], shape: Shape, folder: Path, output: Path) -> bool:
    """Which kernels a step launches and what they take, into kernels.json. In a process of its own: the profiler stays
    loaded, and would slow down what is timed after it."""
    from benchmarks.gpu_kernels import ATTENTION, OURS, by_short_name, decode_kernels, kernels

    openers: dict[str, Callable[[int, int], Any]] = {
        TORCH: lambda batch, context: TorchDecoder(random_model(shape, "cuda"), shape, batch, context),
        **{name: partial(EngineDecoder, folder / f"{name}.engine") for name in names},
    }
    rows: list[Row] = []
    done, batches, contexts = True, *zip(*KERNEL_POINTS, strict=True)
    for name, make in openers.items():
        decoder, reason = _open(make, max(batches), max(contexts))
        if decoder is None:
            rows.append({"case": name, "unseen": reason or "out of memory"})
            done = False
            continue
        for batch, context in KERNEL_POINTS:
            row: Row = {"case": name, "batch": batch, "context": context}
            try:
                decoder.step(batch, context - 20)()  # captures the graph
                found = kernels(decoder.step(batch, context - 20))
                attention = by_short_name(found, ATTENTION)
                row |= {"gpu_us": sum(seen.us for seen in found.values())}
                row |= {"attention_us": sum(seen.us for seen in attention.values())}
                row |= {"ours_us": sum(seen.us for seen in by_short_name(found, OURS).values())}
                row["attention"] = {key: asdict(seen) for key, seen in attention.items()}
                if name != TORCH:
                    session = decoder.session
                    step = decoder.step(batch, context - 20)
                    row |= decode_kernels(step, session.manifest, batch, session.num_pages)
                    done &= row.get("as_said") is not False
            except Exception as error:
                row["unseen"], done = f"{type(error).__name__}: {error}"[:300], False
            rows.append(row)
            print(json.dumps(row), flush=True)
        decoder.close()
    (output / "kernels.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return done


if __name__ == "__main__":
    typer.run(main)
