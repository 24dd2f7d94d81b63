"""TensorRT's timing cache in a file: what was measured once need not be measured again."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hqmq_trt.errors import HqmqError


def default_path(tensorrt_version: str, gpu_name: str) -> Path:
    """``~/.cache/hqmq-trt/timing-{TensorRT version}-{GPU}.cache`` (under XDG_CACHE_HOME where that is set)."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    gpu = re.sub(r"[^A-Za-z0-9.-]+", "_", gpu_name).strip("_")
    return Path(root) / "hqmq-trt" / f"timing-{tensorrt_version}-{gpu}.cache"


def read(path: Path) -> bytes:
    """The file's content; empty when there is no file.

    Raises:
        HqmqError: it exists but cannot be read.
    """
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise HqmqError(f"{path}: the timing cache cannot be read ({error.strerror}); choose another") from None


def write(path: Path, content: Any) -> None:
    """Put `content` (a buffer) in the place of the file in one step.

    Raises:
        HqmqError: the folder or the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
            os.replace(name, path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise HqmqError(f"{path}: the timing cache cannot be written ({error.strerror}); choose another") from None


def attach(config: Any, path: Path, note: Callable[[str], None]) -> Any:
    """Give a builder config the timing cache of a file, or an empty one; return the cache.

    A file that TensorRT does not take (damaged, or of another version or GPU) is said in a note and replaced by `save`.
    """
    content = read(path)
    if content:
        try:
            cache = config.create_timing_cache(content)
            kept = cache is not None and not _is_dropped(config, cache, content)
            if kept and config.set_timing_cache(cache, ignore_mismatch=False):
                return cache
        except Exception:  # pybind gives TensorRT's exceptions as it likes
            pass
        note(f"{path}: TensorRT does not take this timing cache (damaged, or of another version or GPU); replacing it")
    cache = config.create_timing_cache(b"")
    config.set_timing_cache(cache, ignore_mismatch=False)
    return cache


def _is_dropped(config: Any, cache: Any, content: bytes) -> bool:
    """Whether TensorRT made a cache without anything of `content`: 10.6 takes a damaged one without a word."""
    kept, empty = (bytes(memoryview(made.serialize())) for made in (cache, config.create_timing_cache(b"")))
    return len(kept) <= len(empty) and kept != content


def save(config: Any, path: Path) -> None:
    """Write the timing cache of a builder config to its file."""
    cache = config.get_timing_cache()
    if cache is not None:
        write(path, memoryview(cache.serialize()))
