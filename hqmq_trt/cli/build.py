"""``hqmq-trt build``: an exported folder to a TensorRT engine folder."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, MofNCompleteColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from hqmq_trt.cli.output import JsonFlag, Output, QuietFlag, VerboseFlag, size


def build(
    model: Annotated[Path, typer.Argument(help="Folder that `hqmq-trt export` wrote.")],
    folder: Annotated[Path, typer.Option("--output", "-o", help="Engine folder to write.")],
    max_batch: Annotated[int, typer.Option(help="Sequences at most.")] = 1,
    max_context: Annotated[int, typer.Option(help="Tokens a sequence at most, rounded up to whole pages.")] = 4096,
    prefill_chunk: Annotated[int, typer.Option(help="Tokens of a sequence in one prefill run at most.")] = 512,
    timing_cache: Annotated[
        Path | None, typer.Option(help="File of the timing cache [default: ~/.cache/hqmq-trt/timing-….cache].")
    ] = None,
    strip_weights: Annotated[
        bool, typer.Option("--strip-weights", help="Leave the weights in the ONNX file; loading reads them there.")
    ] = False,
    version_compatible: Annotated[
        bool, typer.Option("--version-compatible", help="Let later TensorRT releases of this major version run it.")
    ] = False,
    lean_runtime: Annotated[
        bool, typer.Option("--lean-runtime", help="With --version-compatible: put the lean runtime into the plan.")
    ] = False,
    workspace: Annotated[float | None, typer.Option(help="GB of scratch memory a layer may use.")] = None,
    optimization_level: Annotated[
        int | None, typer.Option(help="0 (fast build) … 5 (longest search) [default: TensorRT's].")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier engine.")] = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Build a TensorRT engine, on this machine's GPU."""
    output = Output(json_mode, quiet, verbose)
    from hqmq_trt.engine import build_engine
    from hqmq_trt.engine.progress import RichBuildProgress

    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with output.progress(*columns, TimeElapsedColumn()) as shown:
        engine = build_engine(
            model,
            folder,
            max_batch=max_batch,
            max_context=max_context,
            prefill_chunk=prefill_chunk,
            timing_cache=timing_cache,
            overwrite=overwrite,
            strip_weights=strip_weights,
            version_compatible=version_compatible,
            lean_runtime=lean_runtime,
            workspace_limit=None if workspace is None else int(workspace * 1e9),
            optimization_level=optimization_level,
            progress=RichBuildProgress(shown),
            note=output.note,
        )
    document = {"folder": str(folder), **engine.model_dump()}
    output.result(document, engine_table(folder, engine))


def engine_table(folder: Path, engine: Any) -> Table:
    """engine.json for people."""
    kinds = [
        name
        for name, true in (
            ("weights stripped", engine.weight_stripped),
            ("version-compatible", engine.version_compatible),
            ("with lean runtime", engine.lean_runtime),
        )
        if true
    ]
    rows = {
        "TensorRT": engine.tensorrt_version + (f" ({', '.join(kinds)})" if kinds else ""),
        "GPU": f"{engine.gpu_name}, compute capability {engine.compute_capability}",
        "sequences, tokens each": f"{engine.max_batch}, {engine.max_context:,} in pages of {engine.page_size}",
        "prefill chunk": f"{engine.prefill_chunk} tokens",
        "plan": f"{size(engine.plan_size)}, built in {engine.build_seconds:.1f} s",
        "scratch memory": "decode {}, prefill {}".format(*map(size, engine.device_memory_bytes)),
        "model": ", ".join(f"{file.name} ({size(file.size)})" for file in engine.source_model),
    }
    table = Table(title=f"{folder}: TensorRT engine", title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table
