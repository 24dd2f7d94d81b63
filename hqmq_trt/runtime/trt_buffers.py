"""Device memory of a TrtSession: one arena for the cache, and blocks for a run's inputs and outputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqmq_trt.engine.manifest import LOGITS_SUM
from hqmq_trt.format import CacheTensor
from hqmq_trt.runtime.cuda_driver import Device

ALIGNMENT = 256  # what TensorRT asks of every address
NUMPY_TYPE: dict[str, np.dtype[Any]] = {"int32": np.dtype(np.int32), "float16": np.dtype(np.float16)}


def aligned(nbytes: int) -> int:
    """Bytes rounded up to ALIGNMENT."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class CacheArena:
    """Every tensor of the cache in one zeroed allocation.

    Attributes:
        address: device address by tensor name (``0.key.codes``).
        specs: shape and dtype by tensor name.
        nbytes: bytes allocated.
    """

    def __init__(self, device: Device, stream: Any, tensors: Iterable[tuple[str, CacheTensor]]) -> None:
        self.specs = dict(tensors)
        self.nbytes = sum(aligned(spec.nbytes) for spec in self.specs.values())
        self._device, self._stream = device, stream
        self._memory = device.allocate(self.nbytes, "the cache")
        self.address: dict[str, int] = {}
        place = int(self._memory)
        for name, spec in self.specs.items():
            self.address[name] = place
            place += aligned(spec.nbytes)
        with device:
            device.driver.memset_d8_async(int(self._memory), 0, self.nbytes, stream)
            stream.synchronize()

    def read(self, name: str, sequence: int, rows: int) -> NDArray[Any]:
        """Host copy [H, rows, …] of the first rows (dim 2) of one sequence."""
        spec = self.specs[name]
        out = np.empty((spec.shape[1], rows, *spec.shape[3:]), NUMPY_TYPE[spec.dtype])
        self._copy(name, sequence, out, to_host=True)
        return out

    def write(self, name: str, sequence: int, values: NDArray[Any]) -> None:
        """Overwrite the first rows (dim 2) of one sequence with values [H, rows, …]."""
        self._copy(name, sequence, np.ascontiguousarray(values), to_host=False)

    def whole(self, name: str) -> NDArray[Any]:
        """Host copy of a tensor."""
        spec = self.specs[name]
        out = np.empty(spec.shape, NUMPY_TYPE[spec.dtype])
        with self._device:
            self._stream.synchronize()
            self._device.driver.memcpy_dtoh(out, self.address[name])
        return out

    def free(self) -> None:
        """Give the memory back; a second call does nothing."""
        if self._memory is not None:
            self._memory.free()
            self._memory = None

    def _copy(self, name: str, sequence: int, host: NDArray[Any], to_host: bool) -> None:
        spec = self.specs[name]
        if not host.size:
            return
        pitch = spec.nbytes // (spec.shape[0] * spec.shape[1])  # bytes of a head
        place = self.address[name] + sequence * spec.shape[1] * pitch
        with self._device:
            self._stream.synchronize()
            copy = self._device.driver.Memcpy2D()
            if to_host:
                copy.set_src_device(place)
                copy.set_dst_host(host)
                copy.src_pitch, copy.dst_pitch = pitch, host.nbytes // host.shape[0]
            else:
                copy.set_src_host(host)
                copy.set_dst_device(place)
                copy.src_pitch, copy.dst_pitch = host.nbytes // host.shape[0], pitch
            copy.width_in_bytes, copy.height = host.nbytes // host.shape[0], host.shape[0]
            copy(False)
            self._device.driver.Context.synchronize()


class StepInputs:
    """Inputs of a run, on the device and mirrored in pinned memory, uploaded in one copy.

    The block holds input_ids int64 [B, T], past_length and new_length int32 [B], logits_index int64 [B, N] for up to
    `max_batch`, `max_tokens` and `max_rows`; smaller shapes use the front of each part.
    """

    def __init__(self, device: Device, max_batch: int, max_tokens: int, max_rows: int) -> None:
        parts: dict[str, tuple[np.dtype[Any], int]] = {
            "input_ids": (np.dtype(np.int64), max_batch * max_tokens),
            "past_length": (np.dtype(np.int32), max_batch),
            "new_length": (np.dtype(np.int32), max_batch),
            "logits_index": (np.dtype(np.int64), max_batch * max_rows),
        }
        offsets, self._nbytes = {}, 0
        for name, (dtype, count) in parts.items():
            offsets[name] = self._nbytes
            self._nbytes += aligned(dtype.itemsize * count)
        self._device = device
        self._ids_bytes = offsets["past_length"]
        self._host = device.pinned(self._nbytes)
        self._memory = device.allocate(self._nbytes, "the inputs of a run")
        self.address = {name: int(self._memory) + offset for name, offset in offsets.items()}
        self.host: dict[str, NDArray[Any]] = {
            name: self._host[offsets[name] : offsets[name] + dtype.itemsize * count].view(dtype)
            for name, (dtype, count) in parts.items()
        }

    def upload(self, stream: Any, ids: bool = True) -> None:
        """Copy the block to the device; without `ids`, all but input_ids. The device must be current."""
        start = 0 if ids else self._ids_bytes
        self._device.driver.memcpy_htod_async(int(self._memory) + start, self._host[start:], stream)

    def free(self) -> None:
        """Give device and pinned memory back; a second call does nothing."""
        if self._memory is not None:
            self._memory.free()
            self._memory = None
            self._host = np.empty(0, np.uint8)
            self.host = {}


class StepOutputs:
    """Logits of a run of at most `rows` rows, on the device: logits_sum float32 [rows], then logits float32 [rows, V].

    Attributes:
        rows, nbytes: capacity, and bytes of device memory.
        address: device address of each.
        sums, logits: float32 [rows] and [rows, V] in pinned memory that `download` fills; None unless `pinned`.
    """

    def __init__(self, device: Device, rows: int, vocabulary: int, what: str, pinned: bool) -> None:
        self._start, self._row_nbytes = aligned(4 * rows), 4 * vocabulary
        self.rows, self.nbytes = rows, self._start + rows * self._row_nbytes
        self._device = device
        self._memory = device.allocate(self.nbytes, what)
        self.address = {LOGITS_SUM: int(self._memory), "logits": int(self._memory) + self._start}
        self._host: NDArray[np.uint8] | None = None
        self.sums: NDArray[np.float32] | None = None
        self.logits: NDArray[np.float32] | None = None
        if pinned:
            self._host = device.pinned(self.nbytes)
            self.sums = self._host[: 4 * rows].view(np.float32)
            self.logits = self._host[self._start :].view(np.float32).reshape(rows, vocabulary)

    def download(self, stream: Any, rows: int) -> None:
        """Copy the sums and the logits of the first rows to pinned memory, in one copy. The device must be current."""
        assert self._host is not None
        host = self._host[: self._start + rows * self._row_nbytes]
        self._device.driver.memcpy_dtoh_async(host, int(self._memory), stream)

    def download_to(self, stream: Any, sums: NDArray[np.float32], logits: NDArray[np.float32]) -> None:
        """Copy the first rows to arrays of the caller's. The device must be current."""
        for name, host in ((LOGITS_SUM, sums), ("logits", logits)):
            self._device.driver.memcpy_dtoh_async(host, self.address[name], stream)

    def free(self) -> None:
        """Give device and pinned memory back; a second call does nothing."""
        if self._memory is not None:
            self._memory.free()
            self._memory = self._host = self.sums = self.logits = None
