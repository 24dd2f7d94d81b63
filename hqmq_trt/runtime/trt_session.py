"""A Session on TensorRT: an engine folder on a GPU, the cache updated in place. Does not need torch."""

from __future__ import annotations

import time
import warnings
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqmq_trt.engine.manifest import EngineManifest
from hqmq_trt.errors import HqmqError
from hqmq_trt.runtime.cache_file import model_digest
from hqmq_trt.runtime.session import Logits, Session
from hqmq_trt.runtime.trt_executor import TrtExecutor


class DeviceLogits:
    """Logits [B, N, V] on the GPU, complete when the call that made them returns, and valid until the next run.

    ``__cuda_array_interface__`` lets torch, pycuda, cupy and numba read them without a copy.

    Attributes:
        shape, dtype, address: of the contiguous array; float32, whatever the model's type.
    """

    dtype = np.dtype(np.float32)

    def __init__(self, executor: TrtExecutor, address: int, shape: tuple[int, ...]) -> None:
        self._executor = executor
        self.address, self.shape = address, shape

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, False),
            "strides": None,
            "stream": None,
            "version": 3,
        }

    def to_host(self) -> Logits:
        """A copy in host memory."""
        return self._executor.download(self.address, self.shape, self.dtype)


class TrtSession(Session):
    """Runs an engine folder (``hqmq-trt build``) on an NVIDIA GPU.

    The cache is one device allocation for `max_batch` x `max_context`; past.* and present.* are bound to the same
    addresses, so that a run writes new tokens only; fewer sequences use the front part of each tensor. A decode step
    is one CUDA graph launch: ids and lengths to the device, the engine, float32 logits and their sums to pinned
    memory. The host looks at the sums alone, as long as they are finite. The first step of each batch size runs the
    engine directly and then captures.

    Tokens may be numpy arrays, lists, pycuda GPUArrays or anything with ``__cuda_array_interface__`` of integers.
    Device arrays are waited for (their stream if they name one, else the device) and read to the host, where they
    are checked against the vocabulary like all others. A session works in the thread that opened it.

    Args:
        folder: what `hqmq-trt build` wrote.
        max_batch, max_context, prefill_chunk: at most the engine's own, which are the default.
        device: index of the GPU.
        cuda_graph: False runs the engine directly at every step.
        verify: compare the plan's sha256 on opening.

    Attributes:
        engine_manifest: engine.json.
        host_seconds, host_steps: time that `decode`, `decode_device` and steps of one token spent on the host, not
            waiting for the GPU, and how many there were, but for those that made a context or a graph.
            `reset_host_time` sets both to 0.

    Raises:
        HqmqError: no GPU, TensorRT or pycuda; an engine of another TensorRT version or GPU; a missing or foreign
            plugin library; a damaged folder; limits beyond the engine's; out of device memory.
    """

    def __init__(
        self,
        folder: str | Path,
        max_batch: int | None = None,
        max_context: int | None = None,
        prefill_chunk: int | None = None,
        device: int = 0,
        cuda_graph: bool = True,
        verify: bool = True,
    ) -> None:
        limits = EngineManifest.load(Path(folder))
        super().__init__(
            folder,
            _within("max_batch", max_batch, limits.max_batch),
            _within("max_context", max_context, limits.max_context),
            _within("prefill_chunk", prefill_chunk, limits.prefill_chunk),
        )
        self.engine_manifest = limits
        self.host_seconds, self.host_steps = 0.0, 0
        self._gpu = TrtExecutor(
            self.folder, limits, self.manifest, self.max_batch, self.num_pages, device, cuda_graph, verify
        )
        self._finalizer = weakref.finalize(self, _close, self._gpu)

    def step(self, input_ids: Any, new_length: NDArray[np.int32], logits_index: NDArray[np.int64]) -> Logits:
        """As Session.step; a run takes at most the engine's prefill_chunk tokens of a sequence, and as many rows."""
        start = self._now()
        logits = super().step(input_ids, new_length, logits_index)
        self._count(start, logits.shape[1] == _width(input_ids) == 1)
        return logits

    def decode(self, tokens: Sequence[int | None]) -> Logits:
        """As Session.decode; the logits are the session's own memory, overwritten by the next run."""
        start = self._now()
        logits = super().decode(tokens)
        self._count(start)
        return logits

    def step_device(
        self, input_ids: Any, new_length: NDArray[np.int32], logits_index: NDArray[np.int64]
    ) -> DeviceLogits:
        """As `step`, with the logits left on the GPU: they are not copied and not checked for NaN."""
        start = self._now()
        ids = self._check_step(input_ids, new_length, logits_index)
        new = np.ascontiguousarray(new_length, np.int32)
        logits = self._on_device(ids, new, np.ascontiguousarray(logits_index, np.int64))
        self._count(start, logits.shape[1] == ids.shape[1] == 1)
        return logits

    def decode_device(self, tokens: Sequence[int | None]) -> DeviceLogits:
        """As `decode`, with the logits [B, 1, V] left on the GPU; rows of None are undefined."""
        start = self._now()
        logits = self._on_device(*self._decode_arrays(tokens))
        self._count(start)
        return logits

    def reset_host_time(self) -> None:
        """Start `host_seconds` and `host_steps` from 0."""
        self.host_seconds, self.host_steps = 0.0, 0

    def cache_nbytes(self) -> dict[str, int]:
        """Bytes of the cache on the device by kind of tensor; `device_nbytes` has what is allocated."""
        total: dict[str, int] = {}
        for name, spec in self._gpu.arena.specs.items():
            kind = name.rsplit(".", 1)[1]
            total[kind] = total.get(kind, 0) + spec.nbytes
        return total

    def device_nbytes(self) -> dict[str, int]:
        """Device memory this session allocated by use: cache, working memory, logits, lengths. TensorRT keeps the
        engine's weights and some memory of each context besides."""
        return self._gpu.device_bytes()

    def cache_arrays(self, layer: int, role: str) -> list[NDArray[Any]]:
        """As Session.cache_arrays."""
        self._open()
        names = [name for name in self._gpu.arena.specs if name.startswith(f"{layer}.{role}.")]
        return [self._gpu.arena.whole(name) for name in names]

    def cache_addresses(self, batch: int) -> dict[str, tuple[int, int]]:
        """Device addresses bound to past.* and present.* by tensor, once a step of `batch` sequences was decoded."""
        self._open()
        return self._gpu.addresses(batch)

    def model_sha256(self) -> str:
        """As Session.model_sha256: what the engine was built from."""
        return model_digest(self.engine_manifest.source_model)

    def close(self) -> None:
        """Free device memory, contexts and engine; a second call does nothing."""
        if self._finalizer.detach():
            self._gpu.close()

    def _run(
        self, input_ids: NDArray[np.int64], new_length: NDArray[np.int32], logits_index: NDArray[np.int64]
    ) -> Logits:
        logits: Any = self._execute(input_ids, new_length, logits_index, to_host=True)
        return logits

    def _finite(self, logits: Logits) -> bool:
        # A row's sum is finite only if all its logits are. One that is not may also be a sum that overflowed.
        return not logits.size or bool(np.isfinite(self._gpu.sums).all()) or super()._finite(logits)

    def _execute(
        self, ids: NDArray[np.int64], new: NDArray[np.int32], index: NDArray[np.int64], to_host: bool
    ) -> NDArray[Any] | tuple[int, tuple[int, ...]]:
        past = self.lengths[: len(new)]
        if ids.shape[1] == 1 and index.shape[1] == 1:
            return self._gpu.decode(ids, past, new, to_host)
        chunk = self.engine_manifest.prefill_chunk
        for name, count in (("tokens of a sequence", ids.shape[1]), ("rows of logits", index.shape[1])):
            if count > chunk:
                raise HqmqError(
                    f"a run of {count} {name} exceeds the engine's prefill_chunk={chunk}; take fewer, use append, or "
                    f"build the engine with --prefill-chunk {count}"
                )
        if index.shape[1] == 0:  # the engine gives at least one row
            self._gpu.prefill(ids, past, new, np.zeros((len(new), 1), np.int64), to_host=False)
            return np.empty((len(new), 0, self.manifest.vocab_size), np.float32) if to_host else (0, (len(new), 0, 0))
        return self._gpu.prefill(ids, past, new, index, to_host)

    def _on_device(self, ids: NDArray[np.int64], new: NDArray[np.int32], index: NDArray[np.int64]) -> DeviceLogits:
        address, shape = self._execute(ids, new, index, to_host=False)
        self.lengths[: len(new)] += new
        return DeviceLogits(self._gpu, address, shape)

    def _decode_batch(self, tokens: Sequence[int | None]) -> int:
        # All sequences given: each batch size costs a context and a graph, an idle row next to nothing.
        return len(tokens) if super()._decode_batch(tokens) else 0

    def _host_array(self, array: Any, name: str) -> NDArray[Any]:
        interface = getattr(array, "__cuda_array_interface__", None)
        if interface is None:
            return super()._host_array(array, name)
        dtype, shape = np.dtype(interface["typestr"]), tuple(interface["shape"])
        if dtype.kind not in "iu":
            raise HqmqError(f"{name} must hold integers (int64), not {dtype}")
        strides, expected = interface.get("strides"), _strides(shape, dtype.itemsize)
        if strides is not None and tuple(strides) != expected and np.prod(shape):
            raise HqmqError(f"{name} on the GPU must be contiguous; copy it first")
        self._open()
        self._gpu.device.wait_for(interface.get("stream"))
        return self._gpu.download(int(interface["data"][0]), shape, dtype)

    def _read_cache(self, name: str, sequence: int, rows: int) -> NDArray[Any]:
        self._open()
        return self._gpu.arena.read(name, sequence, rows)

    def _write_cache(self, name: str, sequence: int, values: NDArray[Any]) -> None:
        self._open()
        self._gpu.arena.write(name, sequence, values)

    def _open(self) -> None:
        if self._gpu.closed:
            raise HqmqError(f"{self.folder}: the session is closed; open it again")

    def _now(self) -> tuple[float, int]:
        """A clock that stands still while this session waits for the GPU, and what was prepared so far."""
        return time.perf_counter() - self._gpu.wait_seconds, self._gpu.prepared

    def _count(self, start: tuple[float, int], decodes: bool = True) -> None:
        now = self._now()
        if decodes and now[1] == start[1]:
            self.host_seconds += now[0] - start[0]
            self.host_steps += 1


def _within(name: str, asked: int | None, limit: int) -> int:
    """What was asked for, or the engine's limit."""
    if asked is None:
        return limit
    if asked > limit:
        option = name.replace("_", "-")
        raise HqmqError(
            f"{name} {asked} exceeds the engine's {limit}; ask for less, or build the engine with --{option} {asked}"
        )
    return asked


def _width(input_ids: Any) -> int:
    shape: tuple[int, ...] = getattr(input_ids, "shape", ())
    return int(shape[1]) if len(shape) == 2 else 0


def _strides(shape: tuple[int, ...], itemsize: int) -> tuple[int, ...]:
    """Strides in bytes of a contiguous array."""
    result: list[int] = []
    for size in reversed(shape):
        result.insert(0, itemsize)
        itemsize *= size
    return tuple(result)


def _close(executor: TrtExecutor) -> None:
    """For sessions that nobody closed."""
    try:
        executor.close()
    except Exception as error:
        warnings.warn(f"a TrtSession could not be freed: {error}", ResourceWarning, stacklevel=1)
