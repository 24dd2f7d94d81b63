"""``hqmq-trt export``: a Hugging Face model, or an ONNX decoder, to an ONNX folder with an HQMQ cache."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import BarColumn, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.text import Text

from hqmq_trt.cli.decoder import recognised
from hqmq_trt.cli.output import JsonFlag, Output, QuietFlag, VerboseFlag, size
from hqmq_trt.errors import HqmqError
from hqmq_trt.scheme import Scheme

_STAGES = {"load": "loading", "try": "trying", "capture": "capturing the graph", "write": "writing", "hash": "hashing"}


class Mode(str, Enum):
    """How attention is written into the graph."""

    fused = "fused"
    qdq = "qdq"


class Target(str, Enum):
    """Runtime that the graph must be fit for."""

    ort = "ort"
    tensorrt_10 = "tensorrt-10"
    tensorrt_11 = "tensorrt-11"


class DType(str, Enum):
    """Type of weights and activations."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def export(
    model: Annotated[str, typer.Argument(help="Hugging Face name, folder (safetensors), .gguf or .onnx file.")],
    folder: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.")] = None,
    scheme: Annotated[
        str,
        typer.Option("--scheme", "-s", help="hq2.5, hq3, hq3.5, hq4, hq5, fp16, paper:s{S}_r{r}[+med3] or k=…,v=…."),
    ] = "hq4",
    mode: Annotated[
        Mode, typer.Option(help="One fused operator, or Quantize and Dequantize around ordinary attention.")
    ] = Mode.fused,
    seed: Annotated[int, typer.Option(help="Seed of the codebooks.")] = 0,
    dtype: Annotated[DType | None, typer.Option(help="Of weights and activations [default: the model's].")] = None,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file inside the model's folder.")] = None,
    fold: Annotated[bool, typer.Option("--fold/--no-fold", help="Fold V's rotation into the weights.")] = True,
    balance: Annotated[
        bool,
        typer.Option("--balance/--no-balance", help="Scale K in the weights so that our schemes code it better."),
    ] = True,
    bodies: Annotated[
        bool,
        typer.Option(
            "--bodies/--no-bodies", help="ONNX function bodies in a qdq file; other TensorRT tools want none."
        ),
    ] = True,
    target: Annotated[
        Target | None, typer.Option(help="Refuse a graph that this runtime does not import [default: one for all].")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Of an .onnx file: say what is recognised, layer by layer; write nothing.")
    ] = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Export a model to ONNX with a packed KV cache."""
    output = Output(json_mode, quiet, verbose)
    parsed = Scheme.parse(scheme, seed)
    from_onnx = Path(model).suffix == ".onnx"
    if dry_run:
        if not from_onnx:
            raise HqmqError("--dry-run is for .onnx files; `hqmq-trt inspect` shows other models")
        output.result(*recognised(Path(model)))
        return
    if folder is None:
        raise HqmqError("say which folder to write: -o FOLDER")
    if from_onnx and (dtype or gguf_file):
        raise HqmqError("an ONNX file keeps its types: --dtype and --gguf-file are for other models")
    with output.progress(SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn()) as shown:
        task = shown.add_task(_STAGES["load"], total=1.0)

        def progress(stage: str, share: float) -> None:
            shown.update(task, description=_STAGES.get(stage, stage), completed=share)

        common: dict[str, Any] = {
            "mode": mode.value,
            "bodies": bodies,
            "target": target.value if target else None,
            "overwrite": overwrite,
            "progress": progress,
        }
        if from_onnx:
            from hqmq_trt.export.rewrite import rewrite_model

            manifest = rewrite_model(model, folder, parsed, **common)
        else:
            from hqmq_trt.export import export_model

            options: dict[str, Any] = {"dtype": dtype.value if dtype else None, "gguf_file": gguf_file, "fold": fold}
            options |= {"balance": balance, "on_balance": lambda report: output.note(str(report))}
            manifest = export_model(model, folder, parsed, **options, **common)
    total = sum(file.size for file in manifest.files)
    document = {
        "folder": str(folder),
        "architecture": manifest.architecture,
        "scheme": manifest.scheme,
        "mode": manifest.mode,
        "dtype": manifest.dtype,
        "layers": len(manifest.layers),
        "key_balance": manifest.key_balance,
        "files": [{"name": file.name, "bytes": file.size} for file in manifest.files],
        "bytes": total,
    }
    text = (
        f"{folder}: {manifest.architecture}, {len(manifest.layers)} layers, {manifest.scheme} ({manifest.mode}), "
        f"{manifest.dtype}, {size(total)}"
    )
    output.result(document, Text(text))
