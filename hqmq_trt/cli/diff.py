"""``hqmq-trt diff``: an exported folder against the PyTorch model it came from."""

from __future__ import annotations

from enum import Enum
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.table import Table

from hqmq_trt.cli.output import JsonFlag, Output, QuietFlag, VerboseFlag, size
from hqmq_trt.cli.versions import versions
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest

if TYPE_CHECKING:
    from hqmq_trt.diff import DiffResult


class Against(str, Enum):
    """References of the comparison."""

    unpacked = "unpacked"
    same = "same"
    pinned = "pinned"
    all = "all"


def diff(
    folder: Annotated[Path, typer.Argument(help="Folder that `hqmq-trt export` wrote.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model it came from: name or folder.")],
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file inside the model's folder.")] = None,
    against: Annotated[
        Against,
        typer.Option(
            help="PyTorch with an unpacked cache, with an HqmqCache it writes itself (same), or with the HqmqCache "
            "whose bytes the folder takes over before each page (pinned)."
        ),
    ] = Against.all,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text to read [default: a sample of ours].")] = None,
    tokens: Annotated[int, typer.Option(min=1, help="Tokens read in chunks.")] = 512,
    decode_steps: Annotated[int, typer.Option(min=0, help="Tokens then read one by one.")] = 32,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of one chunk.")] = 512,
    max_kl: Annotated[float | None, typer.Option(help="Exit with 1 if a mean KL exceeds this.")] = None,
    min_top1: Annotated[float | None, typer.Option(help="Exit with 1 if a top-1 share is below this (0…1).")] = None,
    report: Annotated[Path | None, typer.Option("--report", "-r", help="Write an HTML report here.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="0: let the runtimes choose.")] = 0,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Compare logits, K and V with the PyTorch model over a text."""
    output = Output(json_mode, quiet, verbose)
    manifest = Manifest.load(folder)
    document = _read(text)

    from hqmq_trt.runtime.tokenizer import Tokenizer

    ids = Tokenizer(folder, manifest).encode(document)
    wanted = tokens + decode_steps
    if len(ids) < wanted:
        raise HqmqError(f"the text has {len(ids)} tokens, {wanted} are needed: give a longer --text, or fewer --tokens")
    import torch

    from hqmq_trt.diff import compare
    from hqmq_trt.diff.comparison import REFERENCES
    from hqmq_trt.export.source import load

    if threads:
        torch.set_num_threads(threads)
    references = REFERENCES if against is Against.all else (against.value,)
    with output.progress() as progress:
        loading = progress.add_task(f"loading {model}", total=None)
        torch_model = load(model, manifest.dtype, gguf_file).model.eval()
        progress.remove_task(loading)
        free = [name for name in references if name != "pinned"]
        tasks = {name: progress.add_task(name, total=wanted) for name in (*free, *["onnxruntime"] * bool(free))}
        if "pinned" in references:
            tasks["pinned"] = progress.add_task("pinned", total=2 * wanted)
        result = compare(
            folder,
            torch_model,
            ids[:wanted],
            references,
            decode_steps,
            chunk,
            threads,
            lambda name, count: progress.advance(tasks[name], count),
        )
    if report:
        from hqmq_trt.diff.report import write_report

        write_report(result, report, model, versions())
        output.note(f"report: {report}")
    passed = result.within(max_kl, min_top1)
    output.result({"folder": str(folder), "model": model, **result.document(), "passed": passed}, *_tables(result))
    if not passed:
        output.note(f"outside the limits (--max-kl {max_kl}, --min-top1 {min_top1})")
        raise typer.Exit(1)


def _read(text: Path | None) -> str:
    if text is None:
        return resources.files("hqmq_trt").joinpath("data/sample.txt").read_text(encoding="utf-8")
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HqmqError(f"--text {text}: cannot be read as UTF-8 text ({error})") from None


def _tables(result: DiffResult) -> list[Table]:
    from hqmq_trt.diff.report import REFERENCE_NAMES, ROWS, show

    logits = Table(
        title=f"{result.manifest.scheme} ({result.manifest.mode}), {result.tokens} + {result.decode_steps} tokens, "
        f"cache {size(sum(result.cache_bytes.values()))}",
        title_justify="left",
    )
    logits.add_column("logits against")
    summaries = [found.summary() for found in result.logits.values()]
    for name in result.logits:
        logits.add_column(REFERENCE_NAMES[name], justify="right")
    for key, label in ROWS.items():
        logits.add_row(label, *(show(key, summary[key]) for summary in summaries))
    if result.changed:
        shares = ", ".join(f"{role} {share:.1e}" for role, share in result.changed.items())
        logits.caption = f"chunks coded otherwise than by PyTorch, from inputs that differ by rounding: {shares}"
        logits.caption_justify = "left"
    if not result.layers:
        return [logits]
    layers = Table(title="relative MSE by layer (codec alone / in the run)", title_justify="left")
    layers.add_column("layer", justify="right")
    roles = ("key", "value")
    for role in roles:
        layers.add_column(role, justify="right")
    found = {(error.layer, error.role): error for error in result.layers}
    for layer in sorted({error.layer for error in result.layers}):
        cells = (found[layer, role] for role in roles)
        layers.add_row(str(layer), *(f"{cell.codec:.2e} / {cell.in_run:.2e}" for cell in cells))
    return [logits, layers]
