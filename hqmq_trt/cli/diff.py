"""``hqmq-trt diff``: an exported folder and its engine against the PyTorch model they came from."""

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
    from hqmq_trt.diff import DiffResult, LayerError


class Against(str, Enum):
    """References of the comparison."""

    unpacked = "unpacked"
    same = "same"
    pinned = "pinned"
    all = "all"


class Place(str, Enum):
    """Where PyTorch runs."""

    auto = "auto"
    cpu = "cpu"
    cuda = "cuda"


def diff(
    folder: Annotated[Path, typer.Argument(help="Folder that `hqmq-trt export` wrote.")],
    model: Annotated[str, typer.Option("--model", "-m", help="The model it came from: name or folder.")],
    engine: Annotated[
        Path | None, typer.Option("--engine", "-e", help="Engine that `hqmq-trt build` made of the folder.")
    ] = None,
    ort: Annotated[bool, typer.Option("--ort/--no-ort", help="Whether to run ONNX Runtime.")] = True,
    device: Annotated[
        Place, typer.Option(help="Where PyTorch runs; auto: on a GPU if there is one and the CUDA library.")
    ] = Place.auto,
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
    decode_steps: Annotated[
        int | None, typer.Option(min=0, help="Tokens then read one by one [default: 32, 64 with an engine].")
    ] = None,
    chunk: Annotated[int, typer.Option(min=1, help="Tokens of one chunk.")] = 512,
    greedy: Annotated[
        int, typer.Option(min=0, help="Also generate so many greedy tokens after the first chunk, and compare them.")
    ] = 0,
    max_kl: Annotated[float | None, typer.Option(help="Exit with 1 if a mean KL exceeds this.")] = None,
    min_top1: Annotated[float | None, typer.Option(help="Exit with 1 if a top-1 share is below this (0…1).")] = None,
    report: Annotated[Path | None, typer.Option("--report", "-r", help="Write an HTML report here.")] = None,
    threads: Annotated[int, typer.Option(min=0, help="0: let the runtimes choose.")] = 0,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Compare logits, K and V with the PyTorch model over a text: in ONNX Runtime and, given an engine, TensorRT.

    Exits with 1 if a limit is exceeded, or if a greedy token differs where rounding cannot explain it.
    """
    if decode_steps is None:
        decode_steps = 32 if engine is None else 64
    output = Output(json_mode, quiet, verbose)
    manifest = Manifest.load(folder)
    document = _read(text)

    from hqmq_trt.runtime.tokenizer import Tokenizer

    ids = Tokenizer(folder, manifest).encode(document)
    wanted = tokens + decode_steps
    if len(ids) < wanted:
        raise HqmqError(f"the text has {len(ids)} tokens, {wanted} are needed: give a longer --text, or fewer --tokens")
    import torch

    from hqmq_trt.diff import compare, open_runtimes
    from hqmq_trt.diff import greedy as compare_greedy
    from hqmq_trt.diff.comparison import REFERENCES
    from hqmq_trt.export.source import load

    if threads:
        torch.set_num_threads(threads)
    sessions = open_runtimes(folder, max(wanted, tokens + greedy), chunk, threads, engine, ort)
    place = _place(device)
    references = REFERENCES if against is Against.all else (against.value,)
    checks = {}
    with output.progress() as progress:
        loading = progress.add_task(f"loading {model}", total=None)
        torch_model = load(model, manifest.dtype, gguf_file).model.eval().to(place)
        progress.remove_task(loading)
        free = [name for name in references if name != "pinned"]
        tasks = {name: progress.add_task(name, total=wanted) for name in (*free, *(sessions if free else ()))}
        if "pinned" in references:
            tasks["pinned"] = progress.add_task("pinned", total=(1 + len(sessions)) * wanted)
        result = compare(
            folder,
            torch_model,
            ids[:wanted],
            references,
            decode_steps,
            chunk,
            threads,
            lambda name, count: progress.advance(tasks[name], count),
            engine,
            ort,
        )
        for name, new_session in sessions.items() if greedy else ():
            task = progress.add_task(f"greedy text, {name}", total=None)
            with new_session() as session:
                checks[name] = compare_greedy(torch_model, session, ids[:tokens], greedy)
            progress.remove_task(task)
    facts = [("PyTorch runs on", place), *((f"greedy text, {name}", str(check)) for name, check in checks.items())]
    if report:
        from hqmq_trt.diff.report import write_report

        write_report(result, report, model, versions(), facts)
        output.note(f"report: {report}")
    passed = result.within(max_kl, min_top1)
    explained = all(check.passed for check in checks.values())
    output.result(
        {
            "folder": str(folder),
            "engine": str(engine) if engine else None,
            "model": model,
            "device": place,
            **result.document(),
            "greedy": {name: check.document() for name, check in checks.items()},
            "passed": passed and explained,
        },
        *_tables(result, facts),
    )
    if not passed:
        output.note(f"outside the limits (--max-kl {max_kl}, --min-top1 {min_top1})")
    if not explained:
        output.note("greedy text differs where rounding does not explain it")
    if not (passed and explained):
        raise typer.Exit(1)


def _place(device: Place) -> str:
    """``cpu`` or ``cuda``."""
    import torch

    from hqmq_trt import cuda

    if device is Place.cuda and not torch.cuda.is_available():
        raise HqmqError("--device cuda: PyTorch sees no NVIDIA GPU; check nvidia-smi, or use --device cpu")
    if device is Place.auto:
        return "cuda" if torch.cuda.is_available() and cuda.available() else "cpu"
    return device.value


def _read(text: Path | None) -> str:
    if text is None:
        return resources.files("hqmq_trt").joinpath("data/sample.txt").read_text(encoding="utf-8")
    try:
        return text.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise HqmqError(f"--text {text}: cannot be read as UTF-8 text ({error})") from None


def _tables(result: DiffResult, facts: list[tuple[str, str]]) -> list[Table]:
    from hqmq_trt.diff.report import ROWS, column_names, layer_tables, remarks, show

    logits = Table(
        title=f"{result.manifest.scheme} ({result.manifest.mode}), {result.tokens} + {result.decode_steps} tokens, "
        f"cache {size(sum(result.cache_bytes.values()))}",
        title_justify="left",
    )
    logits.add_column("logits against" if list(result.runtimes) == ["onnxruntime"] else "logits")
    summaries = [found.summary() for _, _, found in result.columns()]
    for name in column_names(result):
        logits.add_column(name, justify="right")
    for key, label in ROWS.items():
        logits.add_row(label, *(show(key, summary[key]) for summary in summaries))
    logits.caption = "\n".join(f"{what}: {value}" for what, value in (*remarks(result), *facts))
    logits.caption_justify = "left"
    return [logits, *(_layer_table(name, errors) for name, errors in layer_tables(result))]


def _layer_table(name: str, errors: list[LayerError]) -> Table:
    table = Table(title=f"{name}: relative MSE by layer (codec alone / in the run)", title_justify="left")
    table.add_column("layer", justify="right")
    roles = ("key", "value")
    for role in roles:
        table.add_column(role, justify="right")
    found = {(error.layer, error.role): error for error in errors}
    for layer in sorted({error.layer for error in errors}):
        cells = (found[layer, role] for role in roles)
        codec = ("-" if cell.codec is None else f"{cell.codec:.2e}" for cell in cells)
        table.add_row(
            str(layer), *(f"{c} / {found[layer, role].in_run:.2e}" for c, role in zip(codec, roles, strict=True))
        )
    return table
