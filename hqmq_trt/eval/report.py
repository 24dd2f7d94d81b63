"""Tables and pictures of kept results: ``hqmq-trt eval report``."""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, PackageLoader

from hqmq_trt.eval import plots
from hqmq_trt.eval.document import document_tables, marked
from hqmq_trt.eval.envelope import NOTHING, WITHIN, Comparison, Point, family
from hqmq_trt.eval.perplexity import Perplexity
from hqmq_trt.eval.report_settings import Settings
from hqmq_trt.eval.results import BUDGETS, Run, Text
from hqmq_trt.eval.statistics import Estimate
from hqmq_trt.eval.subject import REFERENCE
from hqmq_trt.eval.table import Table, markdown_table


@dataclass(frozen=True)
class Section:
    """A heading with a line of text, tables and pictures (caption, PNG file)."""

    title: str
    note: str
    tables: tuple[Table, ...]
    pictures: tuple[tuple[str, Path], ...]


def perplexity_tables(text: Text) -> list[Table]:
    """A table a mode; the reference stands in each."""
    modes = list(dict.fromkeys(item.mode for item in text.found if item.mode)) or [""]
    columns = (
        "codec",
        "family",
        "stored bits",
        "paper bits",
        "tail tokens",
        "perplexity",
        "change",
        "± s.e.",
        "windows",
    )
    tables = []
    for mode in modes:
        chosen = [item for item in text.found if item.mode in ("", mode)]
        counts = sorted({item.windows for item in chosen})
        note = "" if len(counts) == 1 else "Not every codec has seen all windows; changes are paired by window."
        tables.append(Table(f"{text.title}{f', {mode}' if mode else ''}", columns, tuple(map(_row, chosen)), note))
    return tables


def _row(item: Perplexity) -> tuple[str, ...]:
    change = item.change if item.codec != REFERENCE else None
    return (
        item.codec,
        "-" if item.codec == REFERENCE else family(item.codec),
        f"{item.stored_bits:.3f}",
        "-" if item.paper_bits is None else f"{item.paper_bits:.2f}",
        str(item.tail),
        _number(item.perplexity),
        "-" if change is None else _percent(100 * change.mean),
        "-" if change is None or not math.isfinite(change.error) else f"{_number(100 * change.error)}%",
        str(item.windows),
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if abs(value) < 1000 else f"{value:,.0f}"


def _percent(value: float) -> str:
    return f"{value:+.2f}%" if abs(value) < 1000 else f"{value:+,.0f}%"


def envelope_table(text: Text, mode: str) -> Table:
    """The best of ours beside the best baseline for every budget; a note counts where ours is worse."""
    found = text.envelopes(mode)
    worse = [item for item in found if item.excess > 0]
    rows = tuple(
        (
            f"{item.budget:.3f}…{item.until:.3f}",
            f"{item.baseline.codec} ({_percent(item.baseline.change)})",
            "none so small" if item.ours is None else f"{item.ours.codec} ({_percent(item.ours.change)})",
            "-" if item.ours is None else f"{item.excess:+.2f}",
            f"{item.error:.2f}" if math.isfinite(item.error) else "-",
            _verdict(item),
        )
        for item in found
    )
    low, high = BUDGETS
    note = f"No baseline stores {high:g} bits or less." if not found else "Ours is nowhere above the baselines."
    if worse:
        note = f"Ours is above the baselines in {len(worse)} of {len(found)} stretches of {low:g}…{high:g} bits."
    apart = text.apart.get(mode, ())
    note += f" Not compared, as they saw other windows than most: {', '.join(apart)}." if apart else ""
    return Table(
        f"Best within a budget: {text.title}, {mode}",
        ("budget (stored bits)", "best baseline", "best of ours", "ours minus baseline (points)", "± s.e.", "verdict"),
        rows,
        note,
    )


def _verdict(item: Comparison) -> str:
    if item.verdict == NOTHING:
        return "ours: none"
    return ("ours worse" if item.excess > 0 else "ours better" if item.excess < 0 else "equal") + (
        f", {WITHIN}" if item.verdict == WITHIN and item.excess else ""
    )


def task_table(run: Run) -> Table | None:
    """All tasks of a run; None if it has none."""
    rows = []
    for task in run.tasks:
        for item in task.scores:
            name = task.task if task.context is None else f"{task.task}, {task.context} tokens"
            low, high = item.interval
            interval = f"{100 * low:.1f}…{100 * high:.1f}" if math.isfinite(low + high) else "-"
            rows.append(
                (
                    name,
                    item.codec,
                    item.mode or "-",
                    f"{item.stored_bits:.3f}",
                    f"{100 * item.score:.1f}",
                    interval,
                    _estimate(item.difference, 100, 1),
                    _estimate(item.nll_difference, 1, 3),
                    f"{item.coded_tokens:.0f}",
                    str(item.items),
                )
            )
    columns = (
        "task", "codec", "mode", "stored bits", "score", "95 %", "change ± s.e.", "change of -log p ± s.e.",
        "coded tokens", "items",
    )  # fmt: skip
    note = "Scores in percent. Coded tokens: how many of a prompt's the answer reads from codes, on average."
    return Table(f"Tasks: {run.model}", columns, tuple(rows), note) if rows else None


def _estimate(value: Estimate | None, factor: float, digits: int) -> str:
    if value is None:
        return "-"
    error = f" ± {factor * value.error:.{digits}f}" if math.isfinite(value.error) else ""
    return f"{factor * value.mean:+.{digits}f}{error}"


def run_tables(run: Run) -> list[Table]:
    """All tables of a run: perplexities, envelopes, tasks."""
    tables = [table for text in run.texts for table in perplexity_tables(text)]
    tables += [envelope_table(text, mode) for text in run.texts for mode in text.points]
    return tables + [table for table in [task_table(run)] if table]


def write_report(found: Sequence[Run], output: Path, settings: Settings | None = None) -> list[Path]:
    """Write fidelity.md, fidelity.html (self-contained), tables.md and the pictures into `output`; returns the files.

    tables.md has the marked tables that hqmq_trt.eval.document.fill writes into a document; those that are not of one
    model alone stand at the head of the report, too.
    """
    output.mkdir(parents=True, exist_ok=True)
    tables = document_tables(found, settings or Settings())
    marks = output / "tables.md"
    text = "\n\n".join(f"### {table.title}\n\n{marked(name, table)}" for name, table in tables.items())
    marks.write_text(text + "\n", encoding="utf-8")
    joint = tuple(table for name, table in tables.items() if not name.startswith("model "))
    sections = [Section("All models", "", joint, ())] if joint else []
    sections += [*_overview(found, output), *(section for run in found for section in _sections(run, output))]
    markdown, page = output / "fidelity.md", output / "fidelity.html"
    markdown.write_text(_markdown(sections), encoding="utf-8")
    pictures = {file: base64.b64encode(file.read_bytes()).decode() for part in sections for _, file in part.pictures}
    environment = Environment(loader=PackageLoader("hqmq_trt.eval", "."), autoescape=True, trim_blocks=True)
    text = environment.get_template("report.html.j2").render(sections=sections, pictures=pictures)
    page.write_text(text, encoding="utf-8")
    return [markdown, page, marks, *pictures]


def _overview(found: Sequence[Run], output: Path) -> Iterable[Section]:
    """Bits against loss, a picture a mode with a panel a model."""
    pictures = []
    modes = dict.fromkeys(mode for owner in found for text in owner.texts for mode in text.points)
    several = len({owner.where for owner in found}) > 1
    for mode in modes:
        panels: dict[str, list[Point]] = {}
        hidden: set[str] = set()
        for run, text in [(owner, text) for owner in found for text in owner.texts if mode in text.points]:
            title = text.title + (f"\n{run.where}" if several else "")
            title += f" ({run.sha256[:8]})" if title in panels else ""
            panels[title] = text.points[mode]
            drawn = {point.codec for point in text.points[mode] if point.bits <= plots.MAX_BITS}
            hidden |= {item.codec for item in text.found if item.mode == mode} - drawn
        caption = f"Bits against loss, {mode}. Bars: one standard error. Lines: the best within a budget."
        if hidden:
            reasons = "large, another codebook seed, other windows, or no reference"
            caption += f" Not drawn ({reasons}): {', '.join(sorted(hidden))}."
        pictures.append((caption, plots.bits_loss(panels, output / f"bits-loss-{mode}.png")))
    if pictures:
        yield Section("Bits against loss", "", (), tuple(pictures))


def _sections(run: Run, output: Path) -> Iterable[Section]:
    name = "".join(letter if letter.isalnum() else "-" for letter in f"{run.model}-{run.where}")
    pictures = []
    for task, codecs in run.recall.items():
        path = output / f"{task}-{name}-{run.sha256[:8]}.png"
        plots.recall_maps(codecs, f"{run.model}: {task}", path, "mean score")
        pictures.append((f"{task}: mean score in percent by context and depth.", path))
    note = f"Measured with {', '.join(run.about)}." if run.about else ""
    digest = f", sha256 {run.sha256[:12]}" if run.sha256 else ""
    yield Section(f"{run.model} ({run.where}{digest})", note, tuple(run_tables(run)), tuple(pictures))


def _markdown(sections: Sequence[Section]) -> str:
    lines = ["# Fidelity of compressed KV caches", ""]
    for section in sections:
        lines += [f"## {section.title}", "", *([section.note, ""] if section.note else [])]
        for table in section.tables:
            lines += [f"### {table.title}", "", markdown_table(table), ""]
        for caption, file in section.pictures:
            lines += [f"![{caption}]({file.name})", "", caption, ""]
    return "\n".join(lines).rstrip() + "\n"
