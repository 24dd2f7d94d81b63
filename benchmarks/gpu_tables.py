"""Tables and plot of benchmarks/gpu_attention.py."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.gpu_targets import growth, worst_first
from benchmarks.report_tables import Sheet

Row = dict[str, Any]
COLUMNS = (
    *("B", "context", "D", "G", "case", "us", "warm us", "fill us", "TB/s", "limit us", "x fp16", "warm x", "limit x"),
    *("error", "outliers", "path"),
)


def _number(value: Any, style: str) -> str:
    return "" if value is None else format(value, style)


def attention_sheet(rows: Sequence[Row]) -> Sheet:
    """Every decode point and its baselines."""
    order = {"fp16": 0, "fp8": 1, "int4": 2, "ours": 3, "ours_plain": 4}
    chosen = [row for row in rows if row["kind"] in order]
    keys = ("batch", "context", "head_dim", "group")
    chosen.sort(key=lambda row: ([row[key] for key in keys], order[row["kind"]]))
    return Sheet("Decode attention, one layer", COLUMNS, [_cells(row) for row in chosen])


def _cells(row: Row) -> list[str]:
    case = row["case"] + {"fp16": " fp16", "ours_plain": ", plain kernels"}.get(row["kind"], "")
    if "settings" in row:
        case += f" ({row['settings']})"
    start = [str(row["batch"]), f"{row['context']:,}", str(row["head_dim"]), str(row["group"]), case]
    if "us" not in row:
        return [*start, row.get("missing", "failed"), *[""] * (len(COLUMNS) - 6)]
    styles = {"us": ".1f", "warm_us": ".1f", "fill_us": ".1f", "tb_s": ".2f", "limit_us": ".1f"}
    styles |= {
        "x_fp16": ".2f",
        "warm_x_fp16": ".2f",
        "limit_x": ".2f",
        "error": ".1e",
        "outlier_share": ".1%",
        "path": "d",
    }
    return [*start, *[_number(row.get(key), style) for key, style in styles.items()]]


def grid_sheet(rows: Sequence[Row], most: int = 40) -> Sheet:
    """The points from 4k on that gain least over fp16, worst first; and whether time grows linearly."""
    worst = worst_first(rows)
    slower = sum(row["x_fp16"] < 1 for row in worst)
    steep = growth(rows)[:3]
    note = f"{slower} of {len(worst)} points are slower than the best fp16."
    for row in steep:
        where = f"{row['case']} B{row['batch']} D{row['head_dim']} G{row['group']}"
        note += f" Steepest growth up to {row['longest']:,} tokens, 1 = linear: {where} {row['growth']:.2f}."
    return Sheet("Worst first", COLUMNS, [_cells(row) for row in worst[:most]], note)


def prefill_sheet(rows: Sequence[Row]) -> Sheet:
    """Prefill over coded pages, and without past."""
    cells = []
    for row in rows:
        if row["kind"] not in ("prefill", "prefill_fp16"):
            continue
        time = f"{row['us'] / 1e3:.2f}" if "us" in row else row.get("missing", "failed")
        past = row["context"] - row["tokens"]
        case = row["case"] + (" fp16" if row["kind"] == "prefill_fp16" else "")
        cells.append((f"{row['tokens']:,}", f"{past:,}", case, time, _number(row.get("x_fp16"), ".2f")))
    return Sheet("Prefill, one layer", ("new tokens", "past", "case", "ms", "x fp16"), cells)


def failures(rows: Sequence[Row]) -> list[str]:
    """Why cases failed, each reason once with how often."""
    found: dict[tuple[str, str], int] = {}
    for row in rows:
        if "failed" in row:
            key = (row["case"], row["failed"])
            found[key] = found.get(key, 0) + 1
    return [f"{case} failed {count} times: {reason}" for (case, reason), count in found.items()]


def targets_sheet(found: Sequence[Row]) -> Sheet:
    """What was to be reached."""
    cells = []
    for row in found:
        reached = "not measured" if row["reached"] is None else "yes" if row["reached"] else "no"
        limit, warm = _number(row.get("limit"), ".2f"), _number(row.get("warm_value"), ".2f")
        numbers = (f"{row['bound']:.2f}", _number(row["value"], ".3f"), warm, limit, row.get("prototype", ""))
        cells.append((row["target"], *numbers, reached))
    columns = ("target", "bound", "value", "warm", "limit", "prototype", "reached")
    return Sheet("Targets", columns, cells, "value: nothing in L2; warm: as the prototype was measured.")


def write_sheets(output: Path, name: str, where: dict[str, Any], rows: Sequence[Row], sheets: Sequence[Sheet]) -> None:
    """Write {name}.json and {name}.md into `output`. where: benchmarks.machine.machine()."""
    (output / f"{name}.json").write_text(json.dumps({"machine": where, "rows": list(rows)}, indent=1) + "\n")
    text = f"{where['card']}, {where['date']}, commit {where['commit']}, torch {where['torch']}\n\n"
    (output / f"{name}.md").write_text(text + "\n".join(sheet.markdown() for sheet in sheets))


def show_sheets(sheets: Sequence[Sheet]) -> None:
    """Print tables on the terminal."""
    for sheet in sheets:
        Console(width=160).print(sheet.rich())


def plot(rows: Sequence[Row], title: str, path: Path) -> None:
    """Microseconds over context: a panel for each batch of the usual shape, or of the first one measured.

    Ours in colours, baselines in grey; those of other memory layouts (`…_packed`) are in the table only.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    kinds = ("fp16", "fp8", "int4", "ours")
    timed = [r for r in rows if r["kind"] in kinds and "us" in r and not r["case"].endswith("_packed")]
    if not timed:
        return
    shapes = {(row["head_dim"], row["group"]) for row in timed}
    shape = (128, 4) if (128, 4) in shapes else min(shapes)
    timed = [row for row in timed if (row["head_dim"], row["group"]) == shape]
    batches = sorted({row["batch"] for row in timed})
    figure, axes = pyplot.subplots(
        1, len(batches), figsize=(6 * len(batches), 4.5), layout="constrained", squeeze=False
    )
    cases = list(dict.fromkeys((row["kind"], row["case"]) for row in timed))
    others = [case for case in cases if case[0] != "ours"]
    for axis, batch in zip(axes[0], batches, strict=True):
        for kind, name in cases:
            points = sorted(
                (r["context"], r["us"]) for r in timed if (r["kind"], r["case"], r["batch"]) == (kind, name, batch)
            )
            if not points:
                continue
            look: dict[str, Any] = {"marker": "o", "linewidth": 2}
            if kind != "ours":
                at = others.index((kind, name))
                look = {"marker": "sv^DPX*<>p"[at % 10], "linestyle": "--", "linewidth": 1}
                look["color"] = str(0.1 + 0.6 * at / len(others))
            label = name if kind in ("ours", "int4") or kind in name else f"{name} {kind}"
            axis.plot(*zip(*points, strict=True), markersize=5, label=label, **look)
        axis.set(yscale="log", xlabel="tokens in the cache", ylabel="us", title=f"batch {batch}")
        axis.set_xscale("log", base=2)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    figure.suptitle(f"Decode attention, head_dim {shape[0]}, groups of {shape[1]}: {title}", fontsize=9)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)
