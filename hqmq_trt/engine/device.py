"""Which GPU this process would build on, asked of the driver itself: TensorRT's builder ends a process without one."""

from __future__ import annotations

from ctypes import CDLL, POINTER, byref, c_char_p, c_int, c_size_t, create_string_buffer
from dataclasses import dataclass

from hqmq_trt.errors import HqmqError

DRIVER = "libcuda.so.1"
_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_{MAJOR,MINOR}


@dataclass(frozen=True)
class Gpu:
    """A GPU: name, compute capability such as ``9.0``, bytes of memory."""

    name: str
    compute_capability: str
    memory: int


def current_gpu(index: int = 0) -> Gpu:
    """The GPU of this number.

    Raises:
        HqmqError: no driver, no such GPU, or the driver's own error.
    """
    try:
        driver = CDLL(DRIVER)
    except OSError:
        raise HqmqError(
            f"no GPU: {DRIVER} cannot be loaded; building an engine needs an NVIDIA GPU and its driver on this machine"
        ) from None
    count, device, number = c_int(), c_int(), c_int()
    _check(driver, driver.cuInit(0))
    _check(driver, driver.cuDeviceGetCount(byref(count)))
    if index >= count.value:
        raise HqmqError(f"no GPU {index}: the driver sees {count.value}; check nvidia-smi and CUDA_VISIBLE_DEVICES")
    _check(driver, driver.cuDeviceGet(byref(device), index))
    name = create_string_buffer(256)
    _check(driver, driver.cuDeviceGetName(name, len(name), device))
    capability = []
    for attribute in (_MAJOR, _MINOR):
        _check(driver, driver.cuDeviceGetAttribute(byref(number), attribute, device))
        capability.append(str(number.value))
    memory = c_size_t()
    _check(driver, driver.cuDeviceTotalMem_v2(byref(memory), device))
    return Gpu(name.value.decode(errors="replace"), ".".join(capability), memory.value)


def _check(driver: CDLL, status: int) -> None:
    if status == 0:
        return
    text = c_char_p()
    driver.cuGetErrorString.argtypes = [c_int, POINTER(c_char_p)]
    driver.cuGetErrorString(status, byref(text))
    reason = text.value.decode() if text.value else f"error {status}"
    raise HqmqError(f"no usable GPU: the NVIDIA driver says '{reason}'; check nvidia-smi and CUDA_VISIBLE_DEVICES")
