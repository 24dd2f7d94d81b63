"""``hqmq-trt eval``: what a model keeps under a compressed cache."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from hqmq_trt.cli.eval_kv import kv
from hqmq_trt.cli.eval_report import report
from hqmq_trt.cli.eval_tasks import tasks
from hqmq_trt.cli.output import JsonFlag, Output, QuietFlag, VerboseFlag
from hqmq_trt.errors import HqmqError

DEFAULT_SCHEMES = ("hq3", "hq3.5", "hq4", "hq5")

eval_app = typer.Typer(
    name="eval",
    help="Measure what a model keeps under a compressed cache (docs/fidelity.md).",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@eval_app.command()
def ppl(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face folder, .gguf file, hub name, export or engine.")
    ],
    text: Annotated[Path, typer.Option("--text", "-t", help="UTF-8 text file.", exists=True, dir_okay=False)],
    scheme: Annotated[
        list[str] | None,
        typer.Option("--scheme", "-s", help="Scheme or baseline; repeatable [default: hq3, hq3.5, hq4, hq5]."),
    ] = None,
    windows: Annotated[str, typer.Option("--windows", "-w", help="How many (20), or which (100:120).")] = "20",
    length: Annotated[int, typer.Option(min=2, help="Tokens of a window.")] = 2048,
    mode: Annotated[
        str, typer.Option(help="fused: page-causal, as in decoding; qdq: every full page coded.")
    ] = "fused",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the codebooks.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16 [default: the checkpoint's].")] = None,
    store: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder that keeps each window's result; a run goes on there.")
    ] = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Perplexity over windows of a text, beside the model with its own cache.

    Everything runs through the packed cache. For an exported folder or an engine the scheme is its own, and there is
    no reference beside it."""
    import tempfile

    output = Output(json_mode, quiet, verbose)  # before what shows progress bars of its own is imported

    from hqmq_trt.eval.perplexity import measure, parse_range, read_windows, summaries
    from hqmq_trt.eval.store import Store
    from hqmq_trt.eval.subject import REFERENCE, Codec

    numbers = parse_range(windows)
    subjects, tokenizer, fixed = open_source(output, source, dtype, device, mode, scheme, length)
    codecs = (
        [Codec(fixed)] if fixed else [Codec.parse(name, seed) for name in (REFERENCE, *(scheme or DEFAULT_SCHEMES))]
    )
    cut = read_windows(text, tokenizer, numbers, length)
    with tempfile.TemporaryDirectory() as scratch, output.progress() as progress:
        kept = Store(store or scratch)
        task = progress.add_task("windows", total=len(codecs) * len(numbers))
        for codec in codecs:
            progress.update(task, description=codec.name)
            subject = subjects(codec)
            measure(subject, cut, kept, about(), lambda: progress.advance(task))
        found = summaries(kept, subject, cut)
    wanted = {(codec.name) for codec in codecs}
    found = [item for item in found if item.codec in wanted and item.mode in ("", subject.mode, mode)]
    document = {
        "model": subject.model_name,
        "model_sha256": subject.model_sha256,
        "where": subject.where,
        "text_sha256": cut.text_sha256,
        "windows": [cut.numbers[0], cut.numbers[-1] + 1],
        "length": length,
        "codecs": [item.document for item in found],
    }
    title = f"{subject.model_name}: {len(numbers)} windows of {length} tokens ({subject.where})"
    output.result(document, _table(title, found))


def open_source(
    output: Output, source: str, dtype: str | None, device: str, mode: str, scheme: list[str] | None, length: int
) -> tuple[Any, Any, str]:
    """Function from codec to subject, tokenizer, and the scheme of an exported folder (else empty)."""
    from hqmq_trt.manifest import MANIFEST_FILE

    folder = Path(source)
    if (folder / MANIFEST_FILE).exists():
        from hqmq_trt.eval.session_subject import SessionSubject

        if scheme or dtype:
            raise HqmqError(f"{source} is an export with a scheme and type of its own; leave out --scheme and --dtype")
        made = SessionSubject(folder, length)
        return (lambda _: made), made.tokenizer, made.codec
    from hqmq_trt.eval.subject import open_subjects

    return (*open_subjects(source, dtype, device, mode, output.note), "")


def about() -> dict[str, str]:
    """The circumstances a record keeps: versions and machine."""
    import torch

    from hqmq_trt import __version__

    return {"hqmq_trt": __version__, "torch": torch.__version__, "machine": platform.machine()}


def _table(title: str, found: list[Any]) -> Table:
    table = Table(title=title)
    for name in ("codec", "mode", "stored bits", "paper bits", "tail tokens", "perplexity", "change", "± error"):
        table.add_column(name, justify="left" if name in ("codec", "mode") else "right")
    for item in found:
        change = item.change
        table.add_row(
            item.codec,
            item.mode or "-",
            f"{item.stored_bits:.3f}",
            "-" if item.paper_bits is None else f"{item.paper_bits:.2f}",
            str(item.tail),
            f"{item.perplexity:.4f}",
            "-" if change is None else f"{change.mean:+.2%}",
            "-" if change is None or change.count < 2 else f"{change.error:.2%}",
        )
    return table


for _command in (tasks, kv, report):
    eval_app.command()(_command)
