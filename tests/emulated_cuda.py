"""The CUDA kernels on the CPU (tests/cuda_emulation): built when a test first asks for them, and used by
hqmq_trt.cuda as if tensors on the CPU were on a GPU."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from ctypes import CDLL, c_char_p, c_int, c_int32, c_uint64, c_void_p
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch
from filelock import FileLock
from torch import Tensor

from hqmq_trt import cuda, native
from hqmq_trt.errors import HqmqError

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "emulation"
SM80, SM90 = 8, 9
"""Major compute capabilities."""
SHARED_LIMIT = {SM80: 163 * 1024, SM90: 227 * 1024}
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "hqmq_emulation_gpu": (None, [c_uint64, c_int32, c_int32, c_int32]),
    "hqmq_emulation_fault": (c_int, [c_char_p, c_void_p, c_void_p]),
}


def _run(*command: str) -> None:
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")


@lru_cache(maxsize=1)
def library() -> CDLL:
    """The emulation, built if sources have changed, and loaded.

    Raises:
        RuntimeError: it cannot be built, with the compiler's words.
    """
    cmake = shutil.which("cmake")
    if cmake is None:
        raise RuntimeError("cmake is needed to build the emulation: it is among the development packages")
    BUILD.mkdir(parents=True, exist_ok=True)
    with FileLock(BUILD / "test.lock"):
        if not (BUILD / "build.ninja").is_file():
            _run(cmake, "--preset", "emulation")
        _run(cmake, "--build", "--preset", "emulation")
    path = BUILD / "tests" / "cuda_emulation" / cuda.CUDA_LIBRARY
    loaded = native.load_library(path, prefix="hqmq_cuda", signatures=cuda._SIGNATURES)
    native.declare(loaded, _SIGNATURES)
    return loaded


@dataclass
class EmulatedGpu:
    """An emulated GPU.

    Attributes:
        library: of the C interface, and of hqmq_emulation_*.
        device: where its tensors lie.
    """

    library: CDLL
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    def use(self, seed: int = 0, multiprocessors: int = 3, major: int = SM80) -> None:
        """From now on, calls find such a GPU. `seed`: of the order in which threads and blocks run."""
        self.library.hqmq_emulation_gpu(seed, multiprocessors, SHARED_LIMIT[major], major)

    def run_kernel(self, name: str, given: Tensor) -> Tensor:
        """What a kernel of tests/cuda_emulation/faults.cu, 64 threads, makes of int32 [256]: int32 [64].

        Raises:
            HqmqError: what the emulation found.
        """
        out = torch.zeros(64, dtype=torch.int32)
        if self.library.hqmq_emulation_fault(name.encode(), given.data_ptr(), out.data_ptr()):
            raise HqmqError(self.library.hqmq_cuda_last_error().decode())
        return out


@contextmanager
def emulated_gpu() -> Iterator[EmulatedGpu]:
    """While inside, hqmq_trt.cuda of this process takes tensors on the CPU and runs the emulation."""
    gpu = EmulatedGpu(library())
    gpu.use()
    with (
        mock.patch.object(cuda, "library", lambda: gpu.library),
        mock.patch.object(cuda, "_stream", lambda device: 0),
    ):
        cuda.clear_status(gpu.device)
        yield gpu
