"""Folders that appear complete or not at all: what the exporter and the engine builder write."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import KIND, MANIFEST_FILE


def check_output(output: Path, overwrite: bool) -> None:
    """Raise HqmqError unless a folder may be written at `output`.

    Free: nothing there, an empty folder, and with `overwrite` a folder whose manifest.json is ours.
    """
    if not output.exists() and not output.is_symlink():
        return
    if not output.is_dir() or output.is_symlink():
        raise HqmqError(f"{output}: exists and is not a folder; choose another output")
    if not any(output.iterdir()):
        return
    if not overwrite:
        raise HqmqError(f"{output}: is not empty; choose another output or pass --overwrite")
    try:
        ours = json.loads((output / MANIFEST_FILE).read_text(encoding="utf-8"))["kind"] == KIND
    except (OSError, ValueError, KeyError, TypeError):
        ours = False
    if not ours:
        raise HqmqError(f"{output}: is not a folder that hqmq-trt wrote, so it is not overwritten; remove it yourself")


@contextmanager
def new_folder(output: Path) -> Iterator[Path]:
    """A temporary sibling of `output` that takes its place when the block ends without an error."""
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        made = work / "new"
        made.mkdir()
        yield made
        if output.exists():
            output.rename(work / "old")
        made.rename(output)
    finally:
        shutil.rmtree(work, ignore_errors=True)
