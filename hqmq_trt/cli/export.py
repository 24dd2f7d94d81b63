"""``hqmq-trt export``: a Hugging Face model to an ONNX folder with an HQMQ cache."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from hqmq_trt.cli.output import JsonFlag, Output, QuietFlag, VerboseFlag, size
from hqmq_trt.scheme import Scheme


class Mode(str, Enum):
    """How attention is written into the graph."""

    fused = "fused"
    qdq = "qdq"


class DType(str, Enum):
    """Type of weights and activations."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


def export(
    model: Annotated[str, typer.Argument(help="Hugging Face name or folder (safetensors or GGUF).")],
    folder: Annotated[Path, typer.Option("--output", "-o", help="Folder to write.")],
    scheme: Annotated[str, typer.Option("--scheme", "-s", help="hq3, hq3.5, hq4, hq5, fp16, paper:s{S}_r{r}[+med3]…")] = "hq4",
    mode: Annotated[Mode, typer.Option(help="One fused operator, or Quantize and Dequantize around attention.")] = Mode.fused,
    seed: Annotated[int, typer.Option(help="Seed of the codebooks.")] = 0,
    dtype: Annotated[DType, typer.Option(help="Weights and activations.")] = DType.float32,
    gguf_file: Annotated[str | None, typer.Option(help="GGUF file inside the model's folder.")] = None,
    fold: Annotated[bool, typer.Option("--fold/--no-fold", help="Fold V's rotation into the weights.")] = True,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier export.")] = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Export a model to ONNX with a packed KV cache."""
    output = Output(json_mode, quiet, verbose)
    parsed = Scheme.parse(scheme, seed)
