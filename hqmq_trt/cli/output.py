"""What every command shares: --json, -q, -v, progress on stderr, results on stdout."""

from __future__ import annotations

import json
import logging
import math
import os
import sys
import warnings
from typing import Annotated, Any

import typer
from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, ProgressColumn, SpinnerColumn, TextColumn
from rich.progress import TimeElapsedColumn as Elapsed

JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON document on stdout and nothing else there.")]
QuietFlag = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no notes; results only.")]
VerboseFlag = Annotated[bool, typer.Option("--verbose", "-v", help="Log what happens; show tracebacks.")]


class Output:
    """Where a command writes: results on stdout (tables, or one JSON document), all else on stderr."""

    verbose = False
    """Whether the running command was asked for tracebacks; set by every new Output."""

    def __init__(self, json_mode: bool = False, quiet: bool = False, verbose: bool = False) -> None:
        self.json_mode, self.quiet = json_mode, quiet
        self.out = Console(highlight=False)
        self.err = Console(stderr=True, highlight=False)
        Output.verbose = verbose
        logging.basicConfig(stream=sys.stderr, format="%(levelname)s %(name)s: %(message)s", force=True)
        logging.getLogger("hqmq_trt").setLevel(logging.DEBUG if verbose else logging.WARNING)
        if not verbose:
            warnings.filterwarnings("ignore")
            logging.getLogger().setLevel(logging.ERROR)
            os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("TQDM_DISABLE", "1")

    def note(self, text: str) -> None:
        """One line on stderr, unless quiet."""
        if not self.quiet:
            self.err.print(text, markup=False)

    def result(self, document: dict[str, Any], *renderables: RenderableType) -> None:
        """The command's result: `document` as JSON, or `renderables` for people."""
        if self.json_mode:
            json.dump(_finite(document), sys.stdout, indent=2, allow_nan=False)
            sys.stdout.write("\n")
            return
        for renderable in renderables:
            self.out.print(renderable)

    def progress(self, *columns: ProgressColumn | str) -> Progress:
        """A progress display on stderr that disappears when done; silent without a terminal, with -q and --json."""
        shown = columns or (
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            Elapsed(),
        )
        hidden = self.quiet or self.json_mode or not self.err.is_terminal
        return Progress(*shown, console=self.err, transient=True, disable=hidden)


def _finite(value: Any) -> Any:
    """`value` with NaN and infinities as None (JSON has neither)."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def size(nbytes: float) -> str:
    """Bytes for people, in decimal units: ``42.9 GB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(nbytes) < 999.5:
            return f"{nbytes:.0f} B" if unit == "B" else f"{nbytes:#.3g}".rstrip(".") + f" {unit}"
        nbytes /= 1000
    return f"{nbytes:#.4g} TB"
