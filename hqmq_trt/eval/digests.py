"""Digests that tell which model and text a figure belongs to."""

from __future__ import annotations

import hashlib
from pathlib import Path

from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import file_digest


def model_digest(source: str | Path) -> str:
    """sha256 of a weights file, or of the digests of all weights files of a folder; empty for a hub name."""
    path = Path(source)
    if path.is_file():
        return file_digest(path)
    if not path.is_dir():
        return ""
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".bin", ".gguf"))
    if not files:
        raise HqmqError(f"{path}: holds no weights (*.safetensors, *.bin, *.gguf)")
    return hashlib.sha256("\n".join(f"{file.name} {file_digest(file)}" for file in files).encode()).hexdigest()


def text_digest(text: str) -> str:
    """sha256 of a text as UTF-8."""
    return hashlib.sha256(text.encode()).hexdigest()
