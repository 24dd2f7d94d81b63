"""The tables, plot and targets of benchmarks/engine.py."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from hqmq_trt.format import cache_bytes
from hqmq_trt.scheme import Scheme

TORCH = "PyTorch fp16"
FULL_LAYERS = 32
CARD_BYTES, WEIGHT_BYTES = 80e9, 16.06e9
"""A card of 80 GB, and Llama-3-8B's weights in fp16."""

Row = dict[str, Any]


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
    """What is to be reached, and what this run shows; `reached` None: not measured.

    The fp16 scheme is our own operator with an unpacked cache, which only the plain kernels take, so that it is easy to
    beat; PyTorch with cuDNN's attention is the fp16 to be measured by.
    """
    speed = {(r["case"], r["batch"], r["context"]): r for r in rows if "ms" in r}
    found: list[tuple[str, float | None, Callable[[float], bool]]] = []
    for name, key in (("the fp16 scheme", "over_fp16"), (TORCH, "over_torch")):
        focus = speed.get(("hq3", 8, 32768), {}).get(key)
        ratios = [r.get(key) for (case, _, context), r in speed.items() if case == "hq3" and context >= 4096]
        least = min((ratio for ratio in ratios if ratio is not None), default=None)
        found.append((f"hq3 over {name}, batch 8, 32k: at least 1.8", focus, lambda x: x >= 1.8))
        found.append((f"hq3 over {name} from 4k on, the least: at least 1", least, lambda x: x >= 1))
    ours = [r for r in rows if r["case"] != TORCH]
    for key, text in (
        ("host_us", "host work a step, CPU time, median of the worst point: under 50 us"),
        ("host_least_us", "the same, the quickest step of the worst point"),
    ):
        host = [r[key] for r in ours if r.get(key) is not None]
        found.append((text, max(host, default=None), lambda x: x < 50))
    count = {row["scheme"]: row["cache_only"] for row in fits}
    ratio = count["hq3"] / count["fp16"] if {"hq3", "fp16"} <= count.keys() else None
    found.append(("sequences of 32k in 80 GB, hq3 over fp16: at least 4.8", ratio, lambda x: x >= 4.8))
    return [
        {"target": text, "value": value, "reached": None if value is None else test(value)}
        for text, value, test in found
    ]


def comparison(rows: list[Row]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of milliseconds by case, and of each packed scheme over the faster fp16; the best point of the
    first packed scheme comes first, the worst last."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    packed = [case for case in cases if case not in (TORCH, "fp16")]
    points: dict[tuple[int, int], dict[str, float]] = {}
    for row in rows:
        if "ms" in row:
            points.setdefault((row["batch"], row["context"]), {})[row["case"]] = row["ms"]
    made: list[tuple[float, list[str]]] = []
    for (batch, context), ms in points.items():
        base = min((ms[case] for case in (TORCH, "fp16") if case in ms), default=None)
        over = [base / ms[case] if base is not None and case in ms else None for case in packed]
        cells = [f"{ms[case]:.3f}" if case in ms else "" for case in cases]
        cells += ["" if x is None else f"{x:.2f}" for x in over]
        made.append((-(over[0] or 0.0) if over else 0.0, [str(batch), f"{context:,}", *cells]))
    columns = [
        "batch",
        "context",
        *(f"{case} ms" for case in cases),
        *(f"{case} over the faster fp16" for case in packed),
    ]
    return columns, [cells for _, cells in sorted(made, key=lambda item: item[0])]


def table(rows: list[Row], title: str) -> Table:
    """All points; skipped ones with their reason."""
    shown = Table(title=title, title_justify="left")
    columns = (
        "batch",
        "context",
        "case",
        "ms",
        "fill ms",
        "tokens/s",
        "32 layers",
        "host us",
        "launch",
        "least",
        "wall",
    )
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
        fields = {"ms": ".3f", "fill_ms": ".3f", "tokens_per_s": ",.0f", "ms_32_layers": ".2f"}
        fields |= {"host_us": ".0f", "launch_us": ".0f", "host_least_us": ".0f", "host_wall_us": ".0f"}
        fields |= {"over_fp16": ".2f", "over_torch": ".2f"}
        cells = ["" if row.get(key) is None else format(row[key], style) for key, style in fields.items()]
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


NOTE = (
    "fp16: the engine with scheme fp16, that is HqmqAttention with an unpacked fp16 cache, for the plain kernels. "
    f"{TORCH}: static cache, cuDNN attention, one CUDA graph. host us: CPU time of the thread from the call to the "
    "return of the launch and from the end of the wait to the return of the call, median; launch: the part of it "
    "inside the driver's launch of the graph; least: of the quickest step; "
    "wall: the median by the clock, with what else the core did."
)


def tables(title: str, rows: list[Row], fits: list[Row], reached: list[Row]) -> list[Table]:
    """Targets, one line a point, all that was measured, the sequences that fit."""
    target_table = Table("target", "here", "reached", title=title, title_justify="left")
    for target in reached:
        value = "not measured" if target["value"] is None else f"{target['value']:.2f}"
        target_table.add_row(target["target"], value, {None: "-", True: "yes", False: "NO"}[target["reached"]])
    columns, lines = comparison(rows)
    short = Table(
        *columns, title="Decode steps, best first", title_justify="left", caption=NOTE, caption_justify="left"
    )
    for line in lines:
        short.add_row(*line)
    fit_table = Table(
        "scheme", "GB a sequence", "cache only", "beside 16 GB of weights", title="32k sequences in 80 GB"
    )
    for fit in fits:
        each = f"{fit['bytes_per_sequence'] / 1e9:.3f}"
        fit_table.add_row(fit["scheme"], each, str(fit["cache_only"]), str(fit["beside_weights"]))
    return [target_table, short, table(rows, "All points"), fit_table]


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
