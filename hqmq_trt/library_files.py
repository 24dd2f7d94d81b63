"""Where the compiled libraries lie. Free of torch, so that the ONNX Runtime side runs without it.

The folder is the one named by the environment variable HQMQ_LIBRARY_DIR, or else ``hqmq_trt/_lib``.
"""

from __future__ import annotations

import os
from pathlib import Path

from hqmq_trt.errors import HqmqError

LIBRARY_DIR_VARIABLE = "HQMQ_LIBRARY_DIR"
REBUILD = "rebuild it with: pip install . (or cmake --preset dev, --build and --install build/dev --prefix .)"


def library_dir() -> Path:
    """Folder of the compiled libraries."""
    chosen = os.environ.get(LIBRARY_DIR_VARIABLE)
    return Path(chosen) if chosen else Path(__file__).parent / "_lib"


def library_path(name: str) -> Path:
    """Path of a compiled library by file name.

    Raises:
        HqmqError: there is none in :func:`library_dir`.
    """
    path = library_dir() / name
    if not path.is_file():
        raise HqmqError(f"native library {path} is missing; {REBUILD}, or set {LIBRARY_DIR_VARIABLE} to its folder")
    return path
