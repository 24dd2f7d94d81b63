"""The HTML report of a comparison: one self-contained file, plots as inline SVG."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from jinja2 import Environment, PackageLoader

from hqmq_trt.diff.measures import LayerError
from hqmq_trt.diff.result import DiffResult
from hqmq_trt.scheme import ROLES

REFERENCE_NAMES = {
    "unpacked": "PyTorch, unpacked cache",
    "same": "PyTorch, HqmqCache of its own",
    "pinned": "PyTorch, same HqmqCache bytes",
    "onnxruntime": "ONNX Runtime, cache of its own",
}
RUNTIME_NAMES = {"onnxruntime": "ONNX Runtime", "tensorrt": "TensorRT"}
ROWS = {
    "mean_kl": "mean KL (nats)",
    "median_kl": "median KL",
    "p99_kl": "99% of positions below",
    "max_kl": "largest KL",
    "top1": "top-1 agreement",
    "perplexity_reference": "perplexity of the reference",
    "perplexity": "perplexity",
    "positions": "positions",
}
"""Rows of the tables, by key of LogitComparison.summary."""

_FLOOR = 1e-12


def show(name: str, value: float) -> str:
    """One number of LogitComparison.summary for people."""
    if name == "positions":
        return str(value)
    if name == "top1":
        return f"{100 * value:.2f}%"
    return f"{value:.3f}" if name.startswith("perplexity") else f"{value:.2e}"


def column_names(result: DiffResult) -> list[str]:
    """A heading for each of result.columns(); the runtime is named where there are several."""
    alone = list(result.runtimes) == ["onnxruntime"]
    return [
        REFERENCE_NAMES[reference] if alone else f"{RUNTIME_NAMES[runtime]} against {REFERENCE_NAMES[reference]}"
        for runtime, reference, _ in result.columns()
    ]


def layer_tables(result: DiffResult) -> Iterator[tuple[str, list[LayerError]]]:
    """(heading, errors) of each table of K and V."""
    for name, found in result.runtimes.items():
        if found.layers:
            yield RUNTIME_NAMES[name], found.layers
    if result.direct and result.direct.layers:
        yield "TensorRT against ONNX Runtime", result.direct.layers


def remarks(result: DiffResult) -> list[tuple[str, str]]:
    """(what, value) of the counts beside the tables."""
    alone = len(result.runtimes) == 1
    rows = []
    for name, found in result.runtimes.items():
        by = "" if alone else f" by {RUNTIME_NAMES[name]}"
        rows += [
            (f"chunks of {role} coded{by} otherwise than by PyTorch", f"{x:.2e}") for role, x in found.changed.items()
        ]
    if check := result.stateless:
        codes = ", ".join(f"{role} {check.changed[role]} of {check.chunks[role]}" for role in ROLES)
        rows += [
            (f"Polygraphy's TrtRunner, {check.tokens} tokens: chunks coded otherwise than by ONNX Runtime", codes),
            ("its logits", f"mean KL {check.logits.mean_kl:.2e}, largest difference {check.max_difference:.2e}"),
        ]
    return rows


def write_report(
    result: DiffResult,
    path: Path,
    source: str,
    versions: dict[str, str | None],
    facts: Sequence[tuple[str, str]] = (),
) -> None:
    """Write the report of `result` to `path`; `source` names the PyTorch model, `facts` are further (what, value)."""
    summaries = [found.summary() for _, _, found in result.columns()]
    environment = Environment(loader=PackageLoader("hqmq_trt.diff", "."), autoescape=True, trim_blocks=False)
    page = environment.get_template("report.html.j2").render(
        title=f"{result.manifest.scheme} ({result.manifest.mode}) against {source}",
        facts=[
            ("tokens read in chunks", result.tokens),
            ("tokens read one by one", result.decode_steps),
            ("scheme, seed", f"{result.manifest.scheme}, {result.manifest.seed}"),
            ("bytes of the cache", f"{sum(result.cache_bytes.values()):,}"),
            *remarks(result),
            *facts,
        ],
        logits=column_names(result),
        rows=[(label, [show(key, summary[key]) for summary in summaries]) for key, label in ROWS.items()],
        figures=_figures(result),
        tables=list(layer_tables(result)),
        footer=", ".join(f"{name} {version}" for name, version in versions.items() if version),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(page, encoding="utf-8")


def _figures(result: DiffResult) -> list[tuple[str, str]]:
    figures = [
        ("KL by position; the dotted line is where tokens are read one by one.", _positions(result)),
        ("How KL is distributed over positions.", _histogram(result)),
    ]
    for name, errors in layer_tables(result):
        figures.append(
            (f"{name}: relative mean squared error of K and V in the running cache, by layer.", _layers(errors))
        )
    return figures


def _positions(result: DiffResult) -> str:
    figure, axes = _axes()
    for name, (_, _, found) in zip(column_names(result), result.columns(), strict=True):
        axes.semilogy(np.maximum(found.kl, _FLOOR), ".", markersize=3, label=name)
    axes.axvline(result.tokens, color="gray", linestyle=":")
    axes.set_xlabel("position")
    axes.set_ylabel("KL (nats)")
    return _svg(figure, axes)


def _histogram(result: DiffResult) -> str:
    figure, axes = _axes()
    logs = [np.log10(np.maximum(found.kl, _FLOOR)) for _, _, found in result.columns()]
    low = min(values.min() for values in logs)
    high = max(values.max() for values in logs)
    bins = np.linspace(low, high if high > low else low + 1, 50)
    for name, values in zip(column_names(result), logs, strict=True):
        axes.hist(values, bins=bins, alpha=0.6, label=name)
    axes.set_xlabel("log10 KL")
    axes.set_ylabel("positions")
    return _svg(figure, axes)


def _layers(found: list[LayerError]) -> str:
    figure, axes = _axes()
    for offset, role in zip((-0.2, 0.2), ROLES, strict=True):
        errors = [error for error in found if error.role == role]
        axes.bar([error.layer + offset for error in errors], [error.in_run for error in errors], 0.4, label=role)
        coded = [(error.layer + offset, error.codec) for error in errors if error.codec is not None]
        if coded:
            label = "codec alone" if role == ROLES[0] else None
            axes.plot(*zip(*coded, strict=True), "k_", markersize=5, label=label)
    axes.set_xlabel("layer")
    axes.set_ylabel("relative MSE")
    return _svg(figure, axes)


def _axes() -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    return figure, figure.subplots()


def _svg(figure: Any, axes: Any) -> str:
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    text = io.StringIO()
    # A fixed salt and no date: equal results give equal files.
    with matplotlib.rc_context({"svg.hashsalt": "hqmq-trt"}):
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
