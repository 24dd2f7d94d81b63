"""``hqmq-trt eval report``: tables and pictures of kept results."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hqmq_trt.cli.output import JsonFlag, Output, QuietFlag, VerboseFlag

if TYPE_CHECKING:
    from hqmq_trt.eval.envelope import Comparison, Point
    from hqmq_trt.eval.results import Run
    from hqmq_trt.eval.table import Table as ReportTable


def report(
    folders: Annotated[list[Path], typer.Argument(metavar="DIR...", help="Folders that `eval … --output` wrote.")],
    folder: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for fidelity.md, fidelity.html, tables.md and pictures."),
    ] = None,
    windows: Annotated[
        str | None,
        typer.Option(
            "--windows", "-w", help="Only these windows of the text (20, 100:120); tasks stay [default: all]."
        ),
    ] = None,
    settings: Annotated[
        Path | None,
        typer.Option(
            help="JSON: names and head sizes of models, schemes of the summary, targets (docs/fidelity.json is one).",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    into: Annotated[
        Path | None,
        typer.Option(
            help="Document whose places between '<!-- table NAME -->' and '<!-- end -->' are written anew.",
            exists=True,
            dir_okay=False,
        ),
    ] = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Tables and pictures of kept results, and whether our schemes lie below the baselines at every budget of bits.

    Exits with 0 whatever the results are."""
    from hqmq_trt.eval.document import document_tables, fill
    from hqmq_trt.eval.perplexity import parse_range
    from hqmq_trt.eval.report import run_tables, write_report
    from hqmq_trt.eval.report_settings import Settings, read_settings
    from hqmq_trt.eval.results import read_records, runs

    output = Output(json_mode, quiet, verbose)
    numbers = None if windows is None else parse_range(windows)
    chosen = Settings() if settings is None else read_settings(settings)
    found = runs(read_records(folders), numbers)
    tables = document_tables(found, chosen)
    if into is not None:
        into.write_text(fill(into.read_text(encoding="utf-8"), tables), encoding="utf-8")
        output.note(f"tables written into {into}")
    files = write_report(found, folder, chosen) if folder is not None else []
    if files:
        output.note(f"report: {', '.join(map(str, files[:3]))} and {len(files) - 3} pictures")
    document = {
        "windows": None if numbers is None else [numbers.start, numbers.stop],
        "tables": {name: {"columns": table.columns, "rows": table.rows} for name, table in tables.items()},
        "runs": [_document(run) for run in found],
        "files": [str(file) for file in files],
    }
    joint = [table for name, table in tables.items() if not name.startswith("model ")]
    shown = [*joint, *(table for run in found for table in run_tables(run))]
    output.result(document, *map(_table, shown))


def _document(run: Run) -> dict[str, Any]:
    return {
        "model": run.model,
        "model_sha256": run.sha256,
        "where": run.where,
        "about": list(run.about),
        "texts": [
            {
                "title": text.title,
                "codecs": [item.document for item in text.found],
                "other_windows": text.apart,
                "envelopes": {mode: [_comparison(item) for item in text.envelopes(mode)] for mode in text.points},
            }
            for text in run.texts
        ],
        "tasks": [dataclasses.asdict(task) for task in run.tasks],
    }


def _comparison(item: Comparison) -> dict[str, Any]:
    return {
        "budget": item.budget,
        "until": item.until,
        "baseline": _point(item.baseline),
        "ours": None if item.ours is None else _point(item.ours),
        "excess_percent": item.excess,
        "standard_error": item.error,
    }


def _point(point: Point) -> dict[str, Any]:
    return {"codec": point.codec, "stored_bits": point.bits, "change_percent": point.change}


def _table(table: ReportTable) -> Table:
    shown = Table(title=table.title, title_justify="left", caption=table.note or None, caption_justify="left")
    for number, name in enumerate(table.columns):
        shown.add_column(name, justify="left" if number < table.text_columns else "right")
    for row in table.rows:
        shown.add_row(*row)
    return shown
