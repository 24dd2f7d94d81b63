"""A session's cache in a file: safetensors, the same for every runtime. numpy only.

Tensor ``{sequence}.{layer}.{role}.{name}`` holds [H, rows, …] of one sequence: of ``tail`` all rows, of the others
the full pages. The metadata names the model, the format and the lengths, and carries a sha256 of all tensors, as
safetensors has no checksum of its own.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from hqmq_trt.errors import HqmqError
from hqmq_trt.format import FORMAT_VERSION
from hqmq_trt.manifest import ModelFile
from hqmq_trt.runtime.session import Session

KIND = "hqmq_trt.cache"
CACHE_FILE_VERSION = 1
_NUMPY_TYPE = {"int32": np.dtype(np.int32), "float16": np.dtype(np.float16)}


def model_digest(files: Sequence[ModelFile]) -> str:
    """One digest of an exported model: of its ONNX file and its weights."""
    parts = sorted((file.name, file.sha256) for file in files if file.purpose in ("model", "weights"))
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def save_cache(session: Session, path: Path) -> None:
    """Write the sequences of a session; the file appears complete or not at all.

    Raises:
        HqmqError: the file cannot be written.
    """
    lengths = _held(session)
    arrays = {
        f"{b}.{name}": session._read_cache(name, b, shape[1])
        for b, length in enumerate(lengths)
        for name, (_, shape) in _layout(session, length).items()
    }
    metadata = {**_identity(session), "lengths": json.dumps(lengths), "sha256": _digest(arrays)}
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        save_file(arrays, temporary, metadata)
        os.replace(temporary, path)
    except (OSError, SafetensorError) as error:
        raise HqmqError(f"{path}: the cache cannot be written ({_one_line(error)})") from error
    finally:
        with suppress(OSError):
            temporary.unlink()


def load_cache(session: Session, path: Path) -> None:
    """Replace the sequences of a session by those of a file. Everything is checked before anything is changed.

    Raises:
        HqmqError: no such file, damage, or what differs from the session.
    """
    try:
        with safe_open(path, "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a mapping
    except FileNotFoundError:
        raise HqmqError(f"{path}: no such file; save_cache writes one") from None
    except Exception as error:  # safetensors and numpy raise types of their own on damage
        raise HqmqError(f"{path}: cannot be read as a cache ({_one_line(error)}); save it again") from None
    _compare(session, path, metadata)
    lengths = _lengths(session, path, metadata)
    expected = {
        f"{b}.{name}": layout for b, length in enumerate(lengths) for name, layout in _layout(session, length).items()
    }
    for name in sorted(expected.keys() ^ arrays.keys()):
        raise HqmqError(f"{path}: tensor '{name}' is {'missing' if name in expected else 'unknown'}; save it again")
    for name, (dtype, shape) in expected.items():
        if arrays[name].shape != shape or arrays[name].dtype != _NUMPY_TYPE[dtype]:
            found = f"{arrays[name].dtype} {list(arrays[name].shape)}"
            raise HqmqError(f"{path}: tensor '{name}' is {found}, not {dtype} {list(shape)}; save it again")
    if _digest(arrays) != metadata.get("sha256"):
        raise HqmqError(f"{path}: its sha256 differs: the file is damaged; save the cache again")
    session.reset()
    for b, length in enumerate(lengths):
        for name in _layout(session, length):
            session._write_cache(name, b, arrays[f"{b}.{name}"])
    session.lengths[: len(lengths)] = lengths


def _held(session: Session) -> list[int]:
    """Lengths up to the last sequence that holds tokens."""
    lengths: list[int] = session.lengths.tolist()
    while lengths and not lengths[-1]:
        lengths.pop()
    return lengths


def _layout(session: Session, length: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """dtype and shape [H, rows, …] of what a sequence of `length` tokens needs of every cache tensor."""
    if not length:
        return {}
    page_size = session.manifest.page_size
    pages = length // page_size
    result = {}
    for name, spec in session.manifest.cache(1, pages):
        result[name] = (spec.dtype, spec.shape[1:])
    return result


def _identity(session: Session) -> dict[str, str]:
    """What a cache belongs to. Values are compared as they stand."""
    manifest = session.manifest
    layers = [[layer.num_kv_heads, layer.head_dim] for layer in manifest.layers]
    books = [
        [role, digest.secondaries, digest.levels]
        for layer in manifest.layers
        for role, digest in sorted(layer.codebooks.items())
    ]
    return {
        "kind": KIND,
        "cache_file_version": str(CACHE_FILE_VERSION),
        "format_version": str(FORMAT_VERSION),
        "scheme": manifest.scheme,
        "seed": str(manifest.seed),
        "page_size": str(manifest.page_size),
        "layers": json.dumps(layers),
        "codebooks": hashlib.sha256(json.dumps(books).encode()).hexdigest(),
        "model": session.model_sha256(),
    }


def _compare(session: Session, path: Path, metadata: Mapping[str, str]) -> None:
    if metadata.get("kind") != KIND:
        raise HqmqError(f"{path}: is not a cache that save_cache wrote")
    for name, ours in _identity(session).items():
        theirs = metadata.get(name)
        if theirs != ours:
            raise HqmqError(
                f"{path}: holds a cache of another {name}: {_short(theirs)} instead of {_short(ours)}; load it into a "
                "session of the model it was saved from"
            )


def _lengths(session: Session, path: Path, metadata: Mapping[str, str]) -> list[int]:
    try:
        lengths = json.loads(metadata.get("lengths", ""))
    except ValueError:
        lengths = None
    if not isinstance(lengths, list) or not all(type(n) is int and n >= 0 for n in lengths):
        raise HqmqError(f"{path}: states no lengths; save the cache again")
    if len(lengths) > session.max_batch:
        raise HqmqError(
            f"{path}: holds {len(lengths)} sequences, the session max_batch={session.max_batch}; raise max_batch"
        )
    session.check_capacity(lengths)
    return lengths


def _digest(arrays: Mapping[str, NDArray[Any]]) -> str:
    state = hashlib.sha256()
    for name in sorted(arrays):
        state.update(name.encode())
        state.update(np.ascontiguousarray(arrays[name]).data)
    return state.hexdigest()


def _short(text: str | None) -> str:
    return "none" if text is None else f"'{text if len(text) <= 32 else text[:12] + '…'}'"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]
