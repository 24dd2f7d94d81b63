"""Decode steps of TensorRT engines beside PyTorch, over contexts, batches and schemes, in one run on one card.

``python -m benchmarks.engine --output DIR`` from the root of the repository; it takes about two minutes to export and
build an engine a scheme (kept in --work) and --budget seconds to measure. Writes engine.json, engine.md, engine.png,
anew after every case (PyTorch, a scheme), so that a run that is ended leaves what it has measured.

The model has Llama-3-8B's layer shapes (hidden 4096, 32 query and 8 KV heads of 128, MLP 14336) and random weights,
--layers of its 32 layers and a vocabulary of --vocab instead of 128,256, so that the cost of a layer is what shows.
"ms" is the whole step as a caller sees it: token ids to the GPU, the engine, logits back, Python included; mean over
the tokens of a page, of which the last codes the page. "32 layers" is ms / layers * 32: a little too much, since it
multiplies what is outside the layers as well. PyTorch is the same model with a static fp16 cache, cuDNN attention and
one CUDA graph. An engine's cache has the capacity of the longest context at every point; PyTorch sees exactly the
tokens. Caches hold the codes of Gaussian tokens (benchmarks/decode_cases.py); nothing is prefilled.

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
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Table

from benchmarks.decode_cases import EngineDecoder, Shape, TorchDecoder, plan_points, random_model
from benchmarks.machine import log, machine
from hqmq_trt.format import cache_bytes
from hqmq_trt.scheme import Scheme

TORCH = "PyTorch fp16"
CONTEXTS = "1024,2048,4096,8192,16384,32768,65536,131072"
FULL_LAYERS = 32
CARD_BYTES, WEIGHT_BYTES = 80e9, 16.06e9
"""A card of 80 GB, and Llama-3-8B's weights in fp16."""
TINY = Shape(layers=2, vocab=256, hidden=128, heads=4, kv_heads=2, head_dim=64, intermediate=128)

Row = dict[str, Any]


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


def prepare(scheme: str, shape: Shape, work: str, batch: int, context: int, device: str) -> float:
    """Export the model with a scheme and build its engine, unless they are there; seconds. Runs in its own process."""
    from hqmq_trt.export import export_model

    started = time.monotonic()
    model_folder, engine_folder = Path(work, f"{scheme}.onnx"), Path(work, f"{scheme}.engine")
    if (engine_folder / "engine.json").is_file():
        return 0.0
    if not (model_folder / "manifest.json").is_file():
        # The same weights as PyTorch's, which come from the GPU's generator.
        model = random_model(shape, device, _dtype(device)).cpu()
        if device == "cuda":
            torch.cuda.empty_cache()  # the builder wants the memory
        export_model(model, model_folder, scheme)
        del model
        log(f"{scheme}: exported after {time.monotonic() - started:.0f} s")
    if device == "cuda":
        from hqmq_trt.engine.builder import build_engine

        build_engine(model_folder, engine_folder, max_batch=batch, max_context=context, prefill_chunk=16)
        shutil.rmtree(model_folder)  # as large as the engine
        log(f"{scheme}: built after {time.monotonic() - started:.0f} s")
    return time.monotonic() - started


def _dtype(device: str) -> torch.dtype:
    return torch.float16 if device == "cuda" else torch.float32


def finish(rows: list[Row], layers: int) -> None:
    """Add tokens/s, milliseconds of a layer and of 32, and the ratios to PyTorch and the fp16 scheme."""
    by_key = {(row["case"], row["batch"], row["context"]): row for row in rows if "ms" in row}
    for row in by_key.values():
        row["tokens_per_s"] = 1e3 * row["batch"] / row["ms"]
        row["ms_per_layer"] = row["ms"] / layers
        row["ms_32_layers"] = row["ms_per_layer"] * FULL_LAYERS
        for key, other in (("over_fp16", "fp16"), ("over_torch", TORCH)):
            base = by_key.get((other, row["batch"], row["context"]))
            row[key] = base["ms"] / row["ms"] if base else None


def sequences_that_fit(schemes: list[str], context: int = 32768) -> list[Row]:
    """Sequences of `context` tokens of Llama-3-8B's cache in 80 GB, without and with its weights in fp16."""
    rows = []
    for name in schemes:
        each = sum(cache_bytes(Scheme.parse(name), FULL_LAYERS, 8, 128, context).values())
        rows.append(
            {
                "scheme": name,
                "bytes_per_sequence": each,
                "cache_only": int(CARD_BYTES // each),
                "beside_weights": int((CARD_BYTES - WEIGHT_BYTES) // each),
            }
        )
    return rows


def targets(rows: list[Row], fits: list[Row]) -> list[Row]:
    """What is to be reached once the fast kernels are in, and what this run shows; `reached` None: not measured."""
    speed = {(r["case"], r["batch"], r["context"]): r for r in rows if r.get("over_fp16")}
    focus = speed.get(("hq3", 8, 32768), {}).get("over_fp16")
    longer = [r["over_fp16"] for (case, _, context), r in speed.items() if case == "hq3" and context >= 4096]
    host = [r["host_us"] for r in rows if r.get("host_us") is not None and r["case"] != TORCH]
    count = {row["scheme"]: row["cache_only"] for row in fits}
    ratio = count["hq3"] / count["fp16"] if {"hq3", "fp16"} <= count.keys() else None
    found: list[tuple[str, float | None, Callable[[float], bool]]] = [
        ("hq3 over fp16, batch 8, 32k: at least 1.8", focus, lambda x: x >= 1.8),
        ("hq3 over fp16 from 4k on, the least: at least 1", min(longer, default=None), lambda x: x >= 1),
        ("host work a step, the most: under 50 us", max(host, default=None), lambda x: x < 50),
        ("sequences of 32k in 80 GB, hq3 over fp16: at least 4.8", ratio, lambda x: x >= 4.8),
    ]
    return [
        {"target": text, "value": value, "reached": None if value is None else test(value)}
        for text, value, test in found
    ]


def table(rows: list[Row], title: str) -> Table:
    """All points; skipped ones with their reason."""
    shown = Table(title=title, title_justify="left")
    columns = ("batch", "context", "case", "ms", "fill ms", "tokens/s", "ms a layer", "32 layers", "host us")
    for name in (*columns, "x fp16", "x PyTorch", "n"):
        shown.add_column(name, justify="left" if name == "case" else "right")
    previous: tuple[int, int] | None = None
    for row in sorted(rows, key=lambda r: (r["batch_asked"], r["context"], r["case"])):
        key = (row["batch_asked"], row["context"])
        if previous not in (None, key):
            shown.add_section()
        previous = key
        batch = f"{row['batch']}" if row["batch"] == row["batch_asked"] else f"{row['batch']} of {row['batch_asked']}"
        start = (batch, f"{row['context']:,}", row["case"])
        if "ms" not in row:
            shown.add_row(*start, f"[skipped: {row['skipped'][:60]}]".replace("[", "(").replace("]", ")"))
            continue
        fields = {"ms": ".3f", "fill_ms": ".3f", "tokens_per_s": ",.0f", "ms_per_layer": ".4f", "ms_32_layers": ".2f"}
        fields |= {"host_us": ".0f", "over_fp16": ".2f", "over_torch": ".2f"}
        cells = ["" if row[key] is None else format(row[key], style) for key, style in fields.items()]
        shown.add_row(*start, *cells, str(row["repeats"]))
    return shown


def plot(rows: list[Row], batches: list[int], title: str, path: Path) -> None:
    """Milliseconds over context, a panel for each batch, a line for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(batches), figsize=(5.5 * len(batches), 4.5), layout="constrained")
    for axis, batch in zip([axes] if len(batches) == 1 else axes, batches, strict=True):
        for name in dict.fromkeys(row["case"] for row in rows):
            points = sorted(
                (r["context"], r["ms"]) for r in rows if r["case"] == name and r["batch"] == batch and "ms" in r
            )
            if points:
                axis.plot(*zip(*points, strict=True), marker="o", linestyle="--" if name == TORCH else "-", label=name)
        axis.set(yscale="log", xlabel="tokens in the cache", ylabel="one decode step, ms", title=f"batch {batch}")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend()
    figure.suptitle(title, fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


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
    stages: Annotated[str, typer.Option(help="prepare (export, build) and measure.")] = "prepare,measure",
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
    if unknown := wanted - {"prepare", "measure"}:
        raise typer.BadParameter(f"unknown stage {sorted(unknown)[0]}: use prepare, measure")
    if list_only:
        print(f"{shape}\ncases, in this order: {TORCH}, {', '.join(names)}; {budget:.0f} s")
        print("\n".join(f"  batch {point.batch}, {point.context:,} tokens" for point in points))
        return
    output.mkdir(parents=True, exist_ok=True)
    folder = work or Path(tempfile.mkdtemp(prefix="hqmq-engine-"))
    failed = False
    if "prepare" in wanted:
        failed |= not _prepare(names, shape, folder, max(counts), max(sizes), device, jobs)
    if "measure" in wanted:
        failed |= not _measure(names, shape, folder, points, device, budget, point_seconds, commit, output)
    raise typer.Exit(int(failed))


def _prepare(names: list[str], shape: Shape, folder: Path, batch: int, context: int, device: str, jobs: int) -> bool:
    log(f"exporting {', '.join(names)} into {folder}" + (" and building engines" if device == "cuda" else ""))
    done = True
    with ProcessPoolExecutor(min(jobs, len(names)), multiprocessing.get_context("spawn")) as pool:
        running = {name: pool.submit(prepare, name, shape, str(folder), batch, context, device) for name in names}
        for name, future in running.items():
            try:
                log(f"{name}: ready, {future.result():.0f} s")
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

    openers = {TORCH: torch_opener, **{name: opener(name) for name in names}}
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


def tables(title: str, rows: list[Row], fits: list[Row], reached: list[Row]) -> list[Table]:
    """All points, the sequences that fit, the targets."""
    fit_table = Table(
        "scheme", "GB a sequence", "cache only", "beside 16 GB of weights", title="32k sequences in 80 GB"
    )
    for fit in fits:
        each = f"{fit['bytes_per_sequence'] / 1e9:.3f}"
        fit_table.add_row(fit["scheme"], each, str(fit["cache_only"]), str(fit["beside_weights"]))
    target_table = Table("to reach with the fast kernels", "here", "reached")
    for target in reached:
        value = "not measured" if target["value"] is None else f"{target['value']:.2f}"
        target_table.add_row(target["target"], value, {None: "-", True: "yes", False: "no"}[target["reached"]])
    return [table(rows, title), fit_table, target_table]


def write(document: dict[str, Any], output: Path) -> None:
    """Write engine.json, engine.md and engine.png; each file is complete at any time."""
    rows, title = document["rows"], document["title"]
    shown = tables(title, rows, document["sequences_in_80_GB"], document["targets"])
    with (output / "part.md").open("w", encoding="utf-8") as file:
        console = Console(file=file, width=140)
        for each in shown:
            console.print(each)
    (output / "part.json").write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    plot(rows, sorted({row["batch_asked"] for row in rows}), title, output / "part.png")
    for kind in ("json", "md", "png"):
        (output / f"part.{kind}").replace(output / f"engine.{kind}")


if __name__ == "__main__":
    typer.run(main)
