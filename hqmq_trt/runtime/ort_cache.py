"""Cache tensors of an OrtSession: memory of ours that ONNX Runtime is bound to, on the host or on a GPU."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import TensorProto

from hqmq_trt.errors import HqmqError
from hqmq_trt.format import CacheTensor

_ALIGNMENT = 64
ONNX_TYPE = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "bfloat16": TensorProto.BFLOAT16,
    "int32": TensorProto.INT32,
}
NUMPY_TYPE = {"float32": np.float32, "float16": np.float16, "bfloat16": np.uint16, "int32": np.int32}

Place = tuple[str, int, int, tuple[int, ...], int]
"""Arguments of IOBinding.bind_input and bind_output: device, its number, ONNX type, shape, address."""


class HostTensor:
    """Zeros in host memory at an aligned address; the kernel hands out memory only where the cache is written."""

    def __init__(self, spec: CacheTensor) -> None:
        dtype = np.dtype(NUMPY_TYPE[spec.dtype])
        self.nbytes = int(np.prod(spec.shape)) * dtype.itemsize
        raw = np.zeros(self.nbytes + _ALIGNMENT, np.uint8)
        start = -raw.ctypes.data % _ALIGNMENT
        self.array: NDArray[Any] = raw[start : start + self.nbytes].view(dtype).reshape(spec.shape)

    @property
    def pointer(self) -> int:
        """Address of the first byte."""
        return int(self.array.ctypes.data)

    def place(self, spec: CacheTensor) -> Place:
        """Where the front part of the tensor lies that has the shape of `spec`."""
        return ("cpu", 0, ONNX_TYPE[spec.dtype], spec.shape, self.pointer)

    def read(self, sequence: int, rows: int) -> NDArray[Any]:
        """Copy [H, rows, …] of the first rows (dim 2) of a sequence."""
        return self.array[sequence, :, :rows].copy()

    def write(self, sequence: int, values: NDArray[Any]) -> None:
        """Overwrite these rows with values [H, rows, …]."""
        self.array[sequence, :, : values.shape[1]] = values


class DeviceTensor:
    """Zeros on CUDA device 0. Reading and writing move the whole tensor; runs never do.

    Raises:
        HqmqError: out of device memory.
    """

    def __init__(self, spec: CacheTensor) -> None:
        zeros = np.zeros(spec.shape, NUMPY_TYPE[spec.dtype])
        self.nbytes = zeros.nbytes
        try:
            self._value = ort.OrtValue.ortvalue_from_numpy(zeros, "cuda", 0)
        except Exception as error:  # ONNX Runtime raises a type per status code, with no base of their own
            raise HqmqError(
                f"no room on the GPU for {zeros.nbytes} bytes of cache (lower max_batch or max_context): "
                f"{' '.join(str(error).split())}"
            ) from error

    @property
    def pointer(self) -> int:
        """Device address of the first byte."""
        return int(self._value.data_ptr())

    def place(self, spec: CacheTensor) -> Place:
        """As HostTensor.place."""
        return ("cuda", 0, ONNX_TYPE[spec.dtype], spec.shape, self.pointer)

    def read(self, sequence: int, rows: int) -> NDArray[Any]:
        """As HostTensor.read."""
        return np.ascontiguousarray(self._value.numpy()[sequence, :, :rows])

    def write(self, sequence: int, values: NDArray[Any]) -> None:
        """As HostTensor.write."""
        whole = np.array(self._value.numpy())
        whole[sequence, :, : values.shape[1]] = values
        self._value.update_inplace(whole)
