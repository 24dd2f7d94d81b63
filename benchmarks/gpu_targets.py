"""What the fast kernels are to reach on one H100, and what rows of benchmarks/gpu_attention.py say about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Row = dict[str, Any]
OUTLIER_SCHEME = "paper:s96_r4+med3"


@dataclass(frozen=True)
class Point:
    """A decode point of the table: 8 KV heads, groups of 4, head_dim 128."""

    scheme: str
    batch: int
    context: int
    least: float
    prototype: str


POINTS = (
    Point("hq3", 1, 131072, 4.2, "3.4"),
    Point("hq3", 16, 32768, 4.5, "3.95"),
    Point("hq3", 1, 32768, 3.2, "2.5"),
    Point("hq3", 1, 4096, 1.4, "0.9"),
    Point("hq4", 1, 131072, 3.2, ""),
    Point("hq4", 16, 32768, 3.2, ""),
    Point(OUTLIER_SCHEME, 16, 32768, 2.0, ""),
)
FP8_LEAST = 2.0
PREFILL_LEAST = 0.8
PREFILLS = ((8192, 32768), (32768, 32768))
"""(new tokens, tokens in all)."""
ENCODE_MOST = {"hq3": 0.05, "hq4": 0.15}
FROM_CONTEXT = 4096
"""From here on, no preset may be slower than fp16."""


def label(batch: int, context: int) -> str:
    """As in "B1 128k"."""
    return f"B{batch} {context // 1024}k"


def find_all(rows: Sequence[Row], **wanted: object) -> list[Row]:
    """Rows with these values and a time."""
    return [row for row in rows if "us" in row and all(row.get(key) == value for key, value in wanted.items())]


def find(rows: Sequence[Row], **wanted: object) -> Row | None:
    """The first of them."""
    return next(iter(find_all(rows, **wanted)), None)


def _us(row: Row) -> float:
    return float(row["us"])


def _target(text: str, value: float | None, bound: float, above: bool = True, **more: Any) -> Row:
    reached = None if value is None else (value >= bound if above else value <= bound)
    return {"target": text, "bound": bound, "value": value, "reached": reached, **more}


def targets(rows: Sequence[Row], fp8_bytes_per_second: float) -> list[Row]:
    """A row for each target; `value` and `reached` are None for what was not measured.

    `warm_value`: of launches that find in L2 what fits there, as the prototype was measured.
    """
    usual = {"heads": 8, "group": 4, "head_dim": 128}
    found: list[Row] = []
    for point in POINTS:
        row = (
            find(rows, kind="ours", case=point.scheme, batch=point.batch, context=point.context, tokens=1, **usual)
            or {}
        )
        text = f"{point.scheme}, {label(point.batch, point.context)}, times the best fp16"
        extra: dict[str, Any] = {
            "prototype": point.prototype,
            "warm_value": row.get("warm_x_fp16"),
            "limit": row.get("limit_x"),
        }
        found.append(_target(text, row.get("x_fp16"), point.least, **extra))
    ours = find(rows, kind="ours", case="hq3", batch=16, context=32768, tokens=1, **usual)
    fp8 = min(find_all(rows, kind="fp8", batch=16, context=32768, tokens=1, **usual), key=_us, default=None)
    if ours:
        half = 16 * 32768 * 8 * 128 * 2  # bytes of K and V in fp8
        other = fp8["us"] if fp8 else 1e6 * half / fp8_bytes_per_second
        text = "hq3, B16 32k, times " + ("FlashInfer fp8" if fp8 else "the fp8 byte limit (FlashInfer is not there)")
        found.append(_target(text, other / ours["us"], FP8_LEAST))
    else:
        found.append(_target("hq3, B16 32k, times fp8", None, FP8_LEAST))
    for name, most in ENCODE_MOST.items():
        row = find(rows, kind="encode", case=name, context=32768) or {}
        found.append(
            _target(
                f"encoding a 32k prefill, {name}, share of its attention, at most", row.get("share"), most, above=False
            )
        )
    for tokens, context in PREFILLS:
        row = find(rows, kind="prefill", case="hq3", tokens=tokens, context=context) or {}
        past = context - tokens
        text = (
            f"prefill of {tokens // 1024}k" + (f" over {past // 1024}k" if past else "") + ", hq3, times the best fp16"
        )
        found.append(_target(text, row.get("x_fp16"), PREFILL_LEAST))
    slowest = worst_first(rows)
    value = slowest[0]["x_fp16"] if slowest else None
    found.append(_target("the least of all points from 4k on, times the best fp16", value, 1.0))
    return found


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """Decode points of ours from 4k on, the lowest ratio to fp16 first."""
    chosen = [
        row
        for row in rows
        if row["kind"] == "ours" and row["context"] >= FROM_CONTEXT and row.get("x_fp16") is not None
    ]
    return sorted(chosen, key=lambda row: float(row["x_fp16"]))


def growth(rows: Sequence[Row]) -> list[Row]:
    """For each case: microseconds per 1,024 tokens between the two longest contexts, over that of all before.

    1 is linear growth; more is worse than linear.
    """
    series: dict[tuple[Any, ...], list[Row]] = {}
    keys = ("case", "batch", "group", "head_dim", "heads", "tokens")
    for row in rows:
        if row["kind"] == "ours" and "us" in row:
            series.setdefault(tuple(row[key] for key in keys), []).append(row)
    found = []
    for key, points in series.items():
        points = sorted(points, key=lambda row: int(row["context"]))
        if len(points) < 3:
            continue
        *_, before, last = points
        step = (last["us"] - before["us"]) / (last["context"] - before["context"])
        mean = before["us"] / before["context"]
        found.append({**dict(zip(keys, key, strict=True)), "growth": step / mean, "longest": last["context"]})
    return sorted(found, key=lambda row: -float(row["growth"]))
