"""CUDA as TrtSession needs it: pycuda for memory and streams, libcuda through ctypes for graphs. Does not need torch.

The device's *primary* context is retained, the one that torch and TensorRT use, so that all of them share a process.
It is current only inside ``with device:``; what another library made current comes back afterwards.

Which errors stay. Out of memory, bad arguments and a capture that was refused leave the context as it was. A kernel
that reads outside its memory, traps, or a hardware fault ruins the context: CUDA then answers every later call of
the process with the same error. `Device.failure` tells the two apart, and the message says to restart the process.
"""

from __future__ import annotations

import atexit
import gc
import threading
from collections.abc import Callable
from contextlib import suppress
from ctypes import CDLL, POINTER, byref, c_char_p, c_int, c_uint64, c_void_p
from functools import lru_cache
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError

_NON_BLOCKING = 1  # CU_STREAM_NON_BLOCKING: no implicit order with the legacy stream, which capture forbids
_THREAD_LOCAL = 1  # CU_STREAM_CAPTURE_MODE_THREAD_LOCAL: other threads may allocate meanwhile
_SIGNATURES: dict[str, list[Any]] = {
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuCtxSynchronize": [],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamBeginCapture_v2": [c_void_p, c_int],
    "cuStreamEndCapture": [c_void_p, POINTER(c_void_p)],
    "cuGraphInstantiateWithFlags": [POINTER(c_void_p), c_void_p, c_uint64],
    "cuGraphLaunch": [c_void_p, c_void_p],
    "cuGraphExecDestroy": [c_void_p],
    "cuGraphDestroy": [c_void_p],
}


def pycuda_driver() -> Any:
    """The module pycuda.driver, initialised.

    Raises:
        HqmqError: pycuda is not installed, or there is no driver or GPU.
    """
    try:
        import pycuda.driver as driver
    except ModuleNotFoundError as error:
        raise HqmqError(
            f"TensorRT engines run through pycuda, which is not installed ({error}); pip install 'hqmq-trt[pycuda]'"
        ) from None
    except ImportError as error:
        raise HqmqError(f"pycuda cannot reach the NVIDIA driver ({_one_line(error)}); install the driver") from None
    try:
        driver.init()
        count = driver.Device.count()
    except driver.Error as error:
        raise HqmqError(f"no usable NVIDIA GPU ({_one_line(error)}); check nvidia-smi") from None
    if not count:
        raise HqmqError("no NVIDIA GPU is visible; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    return driver


@lru_cache(maxsize=1)
def libcuda() -> Any:
    """The driver library with typed functions, for what pycuda does not wrap.

    Raises:
        HqmqError: it is missing, or older than CUDA 11.4.
    """
    try:
        library = CDLL("libcuda.so.1")
        for name, arguments in _SIGNATURES.items():
            function = getattr(library, name)
            function.argtypes, function.restype = arguments, c_int
    except (OSError, AttributeError) as error:
        raise HqmqError(f"the NVIDIA driver cannot be used ({error}); install one of CUDA 11.4 or later") from None
    return library


def error_text(code: int) -> str:
    """Name and meaning of a CUresult."""
    name, meaning = c_char_p(), c_char_p()
    libcuda().cuGetErrorName(code, byref(name))
    libcuda().cuGetErrorString(code, byref(meaning))
    return f"{(name.value or b'unknown').decode()} {code}: {(meaning.value or b'unknown').decode()}"


def check(code: int, action: str) -> None:
    """Raise HqmqError if a CUresult is not success; `action` says what was tried."""
    if code:
        raise HqmqError(f"CUDA could not {action} ({error_text(code)})")


class Device:
    """One GPU, used from the thread that asked for it.

    Attributes:
        index, name: number among the visible GPUs, and product name.
        compute_capability: such as ``9.0``.
    """

    _opened: ClassVar[dict[tuple[int, int], Device]] = {}

    def __init__(self, index: int) -> None:
        self.driver = pycuda_driver()
        count = self.driver.Device.count()
        if not 0 <= index < count:
            raise HqmqError(f"there is no GPU {index}; {count} are visible (0…{count - 1})")
        handle = self.driver.Device(index)
        self.index, self.name = index, str(handle.name())
        self.compute_capability = "{}.{}".format(*handle.compute_capability())
        self._thread = threading.get_ident()
        try:
            self._context = handle.retain_primary_context()
        except self.driver.Error as error:
            raise HqmqError(f"GPU {index} ({self.name}) cannot be used ({_one_line(error)})") from None

    @staticmethod
    def get(index: int = 0) -> Device:
        """The device of this thread; its context is retained once and until the process ends."""
        key = (threading.get_ident(), index)
        if key not in Device._opened:
            Device._opened[key] = Device(index)
        return Device._opened[key]

    def __enter__(self) -> Device:
        if threading.get_ident() != self._thread:
            raise HqmqError("a session works in the thread that opened it; open one in each thread")
        self._context.push()
        return self

    def __exit__(self, *_: object) -> None:
        self._context.pop()

    def memory(self) -> tuple[int, int]:
        """Free and total bytes of the device."""
        with self:
            free, total = self.driver.mem_get_info()
        return int(free), int(total)

    def allocate(self, nbytes: int, what: str) -> Any:
        """Device memory (pycuda's DeviceAllocation: ``int()`` is its address, ``free()`` gives it back), at least
        256-byte aligned; `what` is named if it does not fit.

        Raises:
            HqmqError: out of device memory.
        """
        with self:
            try:
                return self.driver.mem_alloc(max(nbytes, 256))
            except self.driver.MemoryError:
                raise HqmqError(self.out_of_memory(what, nbytes)) from None

    def out_of_memory(self, what: str, nbytes: int) -> str:
        """The message for `what` of `nbytes` that does not fit."""
        free, total = self.memory()
        return (
            f"out of device memory: {what} needs {nbytes:,} bytes, {free:,} of {total:,} are free on {self.name}; "
            "lower --max-batch or --max-context, or free memory on that GPU"
        )

    def pinned(self, nbytes: int) -> NDArray[np.uint8]:
        """Zeroed page-locked host memory [nbytes] as uint8."""
        with self:
            try:
                array: NDArray[np.uint8] = self.driver.pagelocked_empty(max(nbytes, 1), np.uint8)
            except self.driver.Error as error:
                raise HqmqError(f"{nbytes:,} bytes of host memory cannot be page-locked ({_one_line(error)})") from None
        array[:] = 0
        return array

    def stream(self) -> Any:
        """A new stream (pycuda's Stream) without implicit order with the legacy stream."""
        with self:
            return self.driver.Stream(_NON_BLOCKING)

    def wait_for(self, stream: int | None) -> None:
        """Wait for the work of a foreign stream (its handle; 1 legacy, 2 per thread), or of the whole device."""
        with self:
            code = libcuda().cuCtxSynchronize() if stream is None else libcuda().cuStreamSynchronize(stream)
        check(code, "wait for the stream of a device array")

    def failure(self, error: Exception) -> str:
        """`error` in one line, and whether CUDA can still be used by this process."""
        with self:
            code = libcuda().cuCtxSynchronize()
        state = f"; CUDA answers {error_text(code)} from now on: restart the process" if code else ""
        return _one_line(error) + state


class Graph:
    """What `enqueue` puts on `stream`, captured once (nothing runs) and launched many times.

    Raises:
        HqmqError: CUDA refused the capture. Errors of `enqueue` go through. The stream can be used afterwards.
    """

    def __init__(self, device: Device, stream: Any, enqueue: Callable[[], None]) -> None:
        self._device, self._stream = device, int(stream.handle)
        self._executable = c_void_p()
        cuda, graph = libcuda(), c_void_p()
        collecting = gc.isenabled()
        gc.disable()  # memory that the collector frees would end the capture
        try:
            with device:
                check(cuda.cuStreamBeginCapture_v2(self._stream, _THREAD_LOCAL), "begin the capture of a graph")
                try:
                    enqueue()
                finally:
                    ended = cuda.cuStreamEndCapture(self._stream, byref(graph))
                check(ended, "capture a graph of this engine; open the session with cuda_graph=False")
                code = cuda.cuGraphInstantiateWithFlags(byref(self._executable), graph, 0)
                check(code, "instantiate a graph of this engine; open the session with cuda_graph=False")
        finally:
            if graph.value:
                with device:
                    cuda.cuGraphDestroy(graph)
            if collecting:
                gc.enable()
        self._launch = cuda.cuGraphLaunch

    def launch(self) -> None:
        """Run it on its stream; the device must be current (``with device``)."""
        if code := self._launch(self._executable, self._stream):
            check(code, "launch a graph")

    def close(self) -> None:
        """Free it; a second call does nothing."""
        if self._executable.value:
            with self._device:
                libcuda().cuGraphExecDestroy(self._executable)
            self._executable = c_void_p()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


@atexit.register
def _release_contexts() -> None:
    # Here and not by pycuda's destructor, which takes a primary context for one that it made, and complains.
    for device in Device._opened.values():
        with suppress(Exception):
            device._context.detach()
    Device._opened.clear()
