"""``python -m hqmq_trt.engine.polygraphy_arguments MODEL``: the shapes of a model as `polygraphy run` wants them.

A model has dozens of cache tensors; nobody types their shapes. Prints ``--trt-min-shapes … --trt-opt-shapes …
--trt-max-shapes … --input-shapes …`` in one line, for ``$(…)`` in a shell. docs/tensorrt.md shows the command.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from hqmq_trt.engine.network import read_graph
from hqmq_trt.engine.profiles import Limits, profile_shapes
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest


def arguments(folder: Path, max_batch: int = 1, max_context: int = 512, prefill_chunk: int = 64) -> list[str]:
    """Arguments of `polygraphy run` for the prefill profile of an exported folder, and its largest shapes as inputs.

    Raises:
        HqmqError: no exported folder, or limits that do not fit.
    """
    manifest = Manifest.load(folder)
    limits = Limits.of(manifest, max_batch, max_context, prefill_chunk)
    shapes = profile_shapes(read_graph(folder, manifest).inputs, limits.dimensions(decode=False))

    def listed(which: int) -> list[str]:
        return [f"{name}:{_text(ranges[which])}" for name, ranges in shapes.items()]

    result = []
    for option, which in (("min", 0), ("opt", 1), ("max", 2)):
        result += [f"--trt-{option}-shapes", *listed(which)]
    return [*result, "--input-shapes", *listed(1)]


def _text(shape: Sequence[int]) -> str:
    return "[" + ",".join(map(str, shape)) + "]"


def _main(
    model: Annotated[Path, typer.Argument(help="Folder that `hqmq-trt export` wrote.")],
    max_batch: int = 1,
    max_context: int = 512,
    prefill_chunk: int = 64,
) -> None:
    print(" ".join(arguments(model, max_batch, max_context, prefill_chunk)))


if __name__ == "__main__":
    try:
        typer.run(_main)
    except HqmqError as error:
        sys.exit(f"error: {error}")
