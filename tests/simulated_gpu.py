"""A GPU, pycuda and TensorRT simulated on the host, so that TrtSession's own logic is tested without them.

Device memory is host memory, an engine is an ONNX graph in ONNX Runtime (tests/simulated_tensorrt.py), and a CUDA graph
is the list of operations recorded while a stream captured. What the real things forbid fails here too: calls without
a current context, addresses that are not 256-byte aligned, shapes outside the profile, capture of a first run,
memory beyond the device's. It says nothing about kernels or speed.
"""

from __future__ import annotations

import ctypes
import gc
import json
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hqmq_trt.engine.manifest import EngineManifest
from hqmq_trt.engine.network import read_graph
from hqmq_trt.manifest import Manifest, record_file
from tests.simulated_tensorrt import tensorrt_module

ILLEGAL_ADDRESS = 700


class Gpu:
    """State of the simulated device; tests change `capacity`, `refuse_capture`, `broken` and read the rest."""

    def __init__(self) -> None:
        self.capacity = 1 << 30
        self.live: dict[int, int] = {}
        self.depth = self.pinned = self.graphs = self.launches = self.runs = 0
        self.refuse_capture = self.broken = False
        self.recorded: list[Callable[[], None]] | None = None
        self.executables: dict[int, list[Callable[[], None]]] = {}

    def need_context(self) -> None:
        if not self.depth:
            raise LogicError("invalid device context")
        if self.broken:
            raise LaunchError("an illegal memory access was encountered")

    def do(self, operation: Callable[[], None]) -> None:
        """Run an operation of a stream, or record it."""
        self.need_context()
        if self.recorded is None:
            operation()
        else:
            self.recorded.append(operation)


class Error(Exception):
    """As pycuda.driver's exceptions."""


class MemoryError_(Error):
    pass


class LogicError(Error):
    pass


class LaunchError(Error):
    pass


class Allocation:
    def __init__(self, gpu: Gpu, nbytes: int) -> None:
        gpu.need_context()
        if sum(gpu.live.values()) + nbytes > gpu.capacity:
            raise MemoryError_("cuMemAlloc failed: out of memory")
        self._gpu = gpu
        self._raw = np.full(nbytes + 256, 0xA5, np.uint8)  # device memory is not zeroed
        self.address = self._raw.ctypes.data + (-self._raw.ctypes.data % 256)
        gpu.live[self.address] = nbytes

    def __int__(self) -> int:
        return self.address

    def free(self) -> None:
        del self._gpu.live[self.address]
        self._raw = np.empty(0, np.uint8)


class Stream:
    def __init__(self, gpu: Gpu, flags: int = 0) -> None:
        gpu.need_context()
        self._gpu, self.handle = gpu, 77

    def synchronize(self) -> None:
        self._gpu.need_context()
        assert self._gpu.recorded is None, "synchronize while capturing"


class Memcpy2D:
    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu
        self.src_pitch = self.dst_pitch = self.width_in_bytes = self.height = 0
        self._src = self._dst = 0

    def set_src_device(self, address: int) -> None:
        self._src = address

    def set_dst_device(self, address: int) -> None:
        self._dst = address

    def set_src_host(self, array: Any) -> None:
        self._src = array.ctypes.data

    def set_dst_host(self, array: Any) -> None:
        self._dst = array.ctypes.data

    def __call__(self, aligned: bool) -> None:
        self._gpu.need_context()
        for row in range(self.height):
            ctypes.memmove(self._dst + row * self.dst_pitch, self._src + row * self.src_pitch, self.width_in_bytes)


def driver_module(gpu: Gpu) -> Any:
    """What TrtSession uses of pycuda.driver."""

    class Context:
        def push(self) -> None:
            gpu.depth += 1

        @staticmethod
        def pop() -> None:
            gpu.depth -= 1

        @staticmethod
        def synchronize() -> None:
            gpu.need_context()

    class Device:
        def __init__(self, index: int) -> None:
            self.index = index

        @staticmethod
        def count() -> int:
            return 1

        def name(self) -> str:
            return "Simulated GPU"

        def compute_capability(self) -> tuple[int, int]:
            return 9, 0

        def retain_primary_context(self) -> Context:
            return Context()

    def pagelocked_empty(shape: int, dtype: Any) -> Any:
        gpu.need_context()
        gpu.pinned += 1
        return np.empty(shape, dtype)

    def fill(target: int, value: int, count: int) -> None:
        ctypes.memset(target, value, count)

    def copy_in(target: int, source: Any) -> None:
        ctypes.memmove(target, source.ctypes.data, source.nbytes)

    def copy_out(target: Any, source: int) -> None:
        ctypes.memmove(target.ctypes.data, source, target.nbytes)

    def memcpy_dtoh(target: Any, source: int) -> None:
        gpu.need_context()
        copy_out(target, source)

    module: Any = types.ModuleType("pycuda.driver")
    module.Error, module.MemoryError, module.LogicError = Error, MemoryError_, LogicError
    module.Context, module.Device = Context, Device
    module.init = lambda: None
    module.mem_get_info = lambda: (gpu.capacity - sum(gpu.live.values()), gpu.capacity)
    module.mem_alloc = lambda nbytes: Allocation(gpu, nbytes)
    module.Stream = lambda flags=0: Stream(gpu, flags)
    module.Memcpy2D = lambda: Memcpy2D(gpu)
    module.pagelocked_empty = pagelocked_empty
    module.memset_d8_async = lambda p, value, n, stream: gpu.do(lambda: fill(p, value, n))
    module.memcpy_htod_async = lambda p, array, stream: gpu.do(lambda: copy_in(p, array))
    module.memcpy_dtoh_async = lambda array, p, stream: gpu.do(lambda: copy_out(array, p))
    module.memcpy_dtoh = memcpy_dtoh
    return module


class Libcuda:
    """The graph functions of libcuda; names as there."""

    def __init__(self, gpu: Gpu) -> None:
        self._gpu = gpu

    def cuGetErrorName(self, code: int, out: Any) -> int:
        out._obj.value = {901: b"CUDA_ERROR_STREAM_CAPTURE_INVALIDATED", 700: b"CUDA_ERROR_ILLEGAL_ADDRESS"}.get(code)
        return 0

    def cuGetErrorString(self, code: int, out: Any) -> int:
        out._obj.value = b"simulated"
        return 0

    def cuCtxSynchronize(self) -> int:
        return ILLEGAL_ADDRESS if self._gpu.broken else 0

    def cuStreamSynchronize(self, stream: int) -> int:
        return self.cuCtxSynchronize()

    def cuStreamBeginCapture_v2(self, stream: int, mode: int) -> int:
        assert self._gpu.depth
        assert mode == 1
        assert self._gpu.recorded is None
        self._gpu.recorded = []
        return 0

    def cuStreamEndCapture(self, stream: int, graph: Any) -> int:
        recorded, self._gpu.recorded = self._gpu.recorded, None
        assert recorded is not None
        if self._gpu.refuse_capture:
            return 901
        key = 1 + max(self._gpu.executables, default=0)
        self._gpu.executables[key] = recorded
        graph._obj.value = key
        return 0

    def cuGraphInstantiateWithFlags(self, executable: Any, graph: Any, flags: int) -> int:
        executable._obj.value = graph.value
        self._gpu.graphs += 1
        return 0

    def cuGraphLaunch(self, executable: Any, stream: int) -> int:
        self._gpu.launches += 1
        for operation in self._gpu.executables[executable.value]:
            operation()
        return 0

    def cuGraphExecDestroy(self, executable: Any) -> int:
        del self._gpu.executables[executable.value]
        self._gpu.graphs -= 1
        return 0

    def cuGraphDestroy(self, graph: Any) -> int:
        return 0


def simulate(monkeypatch: pytest.MonkeyPatch) -> Gpu:
    """Put the simulation in the place of pycuda, libcuda, TensorRT and the plugin library."""
    from hqmq_trt.engine import plugin_library
    from hqmq_trt.runtime import cuda_driver, trt_engine

    gpu = Gpu()
    package: Any = types.ModuleType("pycuda")
    package.driver = driver_module(gpu)
    monkeypatch.setitem(sys.modules, "pycuda", package)
    monkeypatch.setitem(sys.modules, "pycuda.driver", package.driver)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt_module(gpu))
    library = Libcuda(gpu)
    monkeypatch.setattr(cuda_driver, "libcuda", lambda: library)
    monkeypatch.setattr(cuda_driver.Device, "_opened", {})
    monkeypatch.setattr(plugin_library, "load_plugin_library", lambda log: Path())
    trt_engine.trt_log.cache_clear()
    return gpu


def simulation(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    """For fixtures: a simulated GPU that must be empty, and whose context must not be current, at the end."""
    from hqmq_trt.runtime import trt_engine

    gpu = simulate(monkeypatch)
    yield gpu
    trt_engine.trt_log.cache_clear()
    gc.collect()
    assert (gpu.depth, gpu.live, gpu.graphs) == (0, {}, 0)


def make_engine(export: Path, folder: Path, max_batch: int, max_context: int, prefill_chunk: int) -> Path:
    """An engine folder for the simulation."""
    manifest = Manifest.load(export)
    folder.mkdir()
    model = onnx.ModelProto.FromString(read_graph(export, manifest).content)
    onnx.load_external_data_for_model(model, str(export))
    onnx.save(model, folder.with_suffix(".onnx"))
    plan = {
        "model": str(folder.with_suffix(".onnx")),
        "max_batch": max_batch,
        "prefill_chunk": prefill_chunk,
        "vocab_size": manifest.vocab_size,
    }
    (folder / "engine.plan").write_text(json.dumps(plan))
    for name in manifest.tokenizer_files:
        (folder / name).write_bytes((export / name).read_bytes())
    record = record_file(folder, "engine.plan", "engine")
    kept = [file for file in manifest.files if file.purpose == "tokenizer"]
    manifest.model_copy(update={"files": [record, *kept]}).save(folder)
    EngineManifest(
        hqmq_trt_version="0",
        tensorrt_version="10.6.0",
        gpu_name="Simulated GPU",
        compute_capability="9.0",
        max_batch=max_batch,
        max_context=max_context,
        prefill_chunk=prefill_chunk,
        page_size=manifest.page_size,
        build_seconds=0.0,
        device_memory_bytes=[4096, 4096],
        plan_size=record.size,
        plan_sha256=record.sha256,
        source_model=[file for file in manifest.files if file.purpose in ("model", "weights")],
    ).save(folder)
    return folder
