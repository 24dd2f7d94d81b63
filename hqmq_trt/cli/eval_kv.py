"""``hqmq-trt eval kv``: what K and V look like, and what codecs do to them."""

from __future__ import annotations

import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hqmq_trt.cli.output import JsonFlag, Output, QuietFlag, VerboseFlag
from hqmq_trt.errors import HqmqError

if TYPE_CHECKING:
    from hqmq_trt.eval.kv_statistics import KvReport, Summary

DEFAULT_SCHEMES = ("hq3", "hq3.5", "hq4", "hq5")
FILE = "kv.json"


def kv(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="Hugging Face folder, .gguf file or hub name.")],
    text: Annotated[Path, typer.Option("--text", "-t", help="UTF-8 text file.", exists=True, dir_okay=False)],
    scheme: Annotated[
        list[str] | None,
        typer.Option("--scheme", "-s", help="Scheme or baseline; repeatable [default: hq3, hq3.5, hq4, hq5]."),
    ] = None,
    windows: Annotated[str, typer.Option("--windows", "-w", help="How many (4), or which (100:104).")] = "4",
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the codebooks.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16 [default: the checkpoint's].")] = None,
    folder: Annotated[
        Path | None, typer.Option("--output", "-o", help=f"Folder for {FILE} and the heat maps (PNG).")
    ] = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Statistics of K and V by layer and KV head, and the errors that codecs make in them and in attention.

    K is taken after RoPE, as the cache holds it. The statistics are those of the model as it is; our schemes' errors
    those with K balanced, as they run (``unbalanced:hq4``: as it is). Errors are those of full pages, all of them read
    decoded."""
    output = Output(json_mode, quiet, verbose)  # before what shows progress bars of its own is imported

    from hqmq_trt.eval.kv_statistics import measure_kv
    from hqmq_trt.eval.perplexity import parse_range, read_windows
    from hqmq_trt.eval.subject import REFERENCE, Codec, TorchSubject, open_subjects

    numbers = parse_range(windows)
    codecs = list(
        {codec.name: codec for codec in (Codec.parse(name, seed) for name in scheme or DEFAULT_SCHEMES)}.values()
    )
    subjects, tokenizer = open_subjects(source, dtype, device, "qdq")
    subject = subjects(Codec(REFERENCE))
    # Codecs with K balanced look at other K: they get passes of their own, after that of the model as it is.
    groups = [[codec for codec in codecs if not codec.balanced]]
    for page in dict.fromkeys(codec.page_size for codec in codecs if codec.balanced):
        groups.append([codec for codec in codecs if codec.balanced and codec.page_size == page])
    if not isinstance(subject, TorchSubject):
        raise HqmqError(f"{source}: K and V can be looked at in a PyTorch model only; give the model's folder")
    cut = read_windows(text, tokenizer, numbers, length)
    total = len(groups) * len(numbers) * subject.model.config.get_text_config(decoder=True).num_hidden_layers
    with output.progress() as progress:
        task = progress.add_task("layers", total=total)
        reports = []
        for group in groups:
            subjects(group[0] if group else Codec(REFERENCE))
            reports.append(measure_kv(subject.model, group, cut.tokens, lambda: progress.advance(task)))
        found = {codec.name: codec for report in reports for codec in report.codecs}
        report = replace(reports[0], codecs=[found[codec.name] for codec in codecs])
    document = {
        "model": subject.model_name,
        "model_sha256": subject.model_sha256,
        "where": subject.where,
        "text_sha256": cut.text_sha256,
        "first_window": cut.numbers[0],
        **report.document(),
        "summary": summary(report),
    }
    if folder is not None:
        write(folder, document, report, subject.model_name)
        output.note(f"{FILE} and heat maps: {folder}")
    title = f"{subject.model_name}: {len(numbers)} windows of {length} tokens ({subject.where})"
    output.result(document, *_tables(title, report))


def summary(report: KvReport) -> dict[str, Any]:
    """Mean and worst over layers and KV heads of all that was measured, for JSON."""
    from hqmq_trt.eval.kv_statistics import Summary

    return {
        "statistics": {
            role: {name: Summary.of(layers).document() for name, layers in found.items()}
            for role, found in report.statistics.items()
        },
        "codecs": {
            codec.name: {name: Summary.of(layers).document() for name, layers in codec.errors.items()}
            for codec in report.codecs
        },
    }


def write(folder: Path, document: dict[str, Any], report: KvReport, model: str) -> None:
    """Write kv.json, ``kv-statistics.png``, and ``kv-<codec>.png`` for each codec."""
    from hqmq_trt.eval.kv_statistics import ERRORS
    from hqmq_trt.eval.plots import heat_maps

    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{FILE}.partial"
    partial.write_text(json.dumps(document, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    os.replace(partial, folder / FILE)
    key, value = report.statistics["key"], report.statistics["value"]
    panels = [
        ("K: outlier share (page)", key["outliers_page"], False),
        ("V: outlier share (page)", value["outliers_page"], False),
        ("K: largest |x| / median", key["max_over_median"], True),
        ("V: largest |x| / median", value["max_over_median"], True),
        ("K: energy of page mean", key["mean_energy"], False),
    ]
    heat_maps(panels, f"{model}: K and V", folder / "kv-statistics.png")
    for codec in report.codecs:
        name = re.sub(r"[^A-Za-z0-9.,=+@#_-]", "_", codec.name)
        errors = [(label, codec.errors[error], True) for error, label in ERRORS.items()]
        heat_maps(errors, f"{model}: {codec.name}, {codec.stored_bits:.3g} bits", folder / f"kv-{name}.png")


def _tables(title: str, report: KvReport) -> list[Table]:
    from hqmq_trt.eval.kv_statistics import ERRORS, SHARES, STATISTICS, Summary

    statistics = Table(title=title, title_justify="left")
    statistics.add_column("")
    for role in ("K", "V"):
        statistics.add_column(f"{role}: mean", justify="right")
        statistics.add_column("worst (layer.head)", justify="right")
    for name, label in STATISTICS.items():
        cells = []
        for found in report.statistics.values():
            item = Summary.of(found[name])
            show = (lambda x: f"{x:.2%}") if name in SHARES else (lambda x: f"{x:.2f}")
            cells += [show(item.mean), f"{show(item.worst)} ({item.layer}.{item.head})"]
        statistics.add_row(label, *cells)
    codecs = Table(title="errors of codecs: mean / worst (layer.head)", title_justify="left")
    for name in ("codec", "stored bits", "paper bits", *ERRORS, "outliers K", "V", "dropped"):
        codecs.add_column(name, justify="left" if name == "codec" else "right")
    codecs.caption = "; ".join(f"{name}: {label}" for name, label in ERRORS.items())
    codecs.caption_justify = "left"
    for codec in report.codecs:
        errors = (_cell(Summary.of(codec.errors[name])) for name in ERRORS)
        shares = [
            f"{Summary.of(codec.outlier_share[role]).mean:.2%}" if role in codec.outlier_share else "-"
            for role in ("key", "value")
        ]
        paper = "-" if codec.paper_bits is None else f"{codec.paper_bits:.2f}"
        dropped = str(codec.dropped) if codec.outlier_share else "-"
        codecs.add_row(codec.name, f"{codec.stored_bits:.3f}", paper, *errors, *shares, dropped)
    return [statistics, codecs]


def _cell(item: Summary) -> str:
    return f"{item.mean:.2e} / {item.worst:.1e} ({item.layer}.{item.head})"
