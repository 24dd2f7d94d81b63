"""The CUDA kernels on the CPU (tests/cuda_emulation): built when a test first asks for them, and used by
hqmq_trt.cuda as if tensors on the CPU were on a GPU."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from ctypes import CDLL, c_char_p, c_int, c_int32, c_uint64, c_void_p
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch
from filelock import FileLock
from torch import Tensor

from benchmarks.gpu_paths import SHARED_MEMORY, attention_path
from hqmq_trt import cuda, native
from hqmq_trt.errors import HqmqError
from tests.attention_cases import Attention, assert_same_caches, bits, relative_error
from tests.codec_cases import lengths
from tests.paged_cases import assert_same_pages, assert_untouched, paged

ROOT = Path(__file__).parent.parent
BUILD = ROOT / "build" / "emulation"
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "hqmq_emulation_gpu": (None, [c_uint64, c_int32, c_int32, c_int32]),
    "hqmq_emulation_cut": (c_int, [*[c_int32] * 7, c_void_p, c_void_p, *[c_int32] * 4, *[c_void_p] * 4]),
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
        major: of its compute capability. Prefill takes the kernel of sm_80, or with 9 that of sm_90.
    """

    library: CDLL
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    major: int = 8

    def use(self, seed: int = 0, multiprocessors: int = 3, shared_limit: int = SHARED_MEMORY["227 KB"]) -> None:
        """From now on, calls find such a GPU.

        seed: of the order in which threads, blocks and copies run, which is another in each launch.
        """
        self.library.hqmq_emulation_gpu(seed, multiprocessors, shared_limit, self.major)

    def run_kernel(self, name: str, given: Tensor) -> Tensor:
        """What a kernel of tests/cuda_emulation/faults.cu, 64 threads, makes of int32 [256]: int32 [64].

        Raises:
            HqmqError: what the emulation found.
        """
        out = torch.zeros(64, dtype=torch.int32)
        if self.library.hqmq_emulation_fault(name.encode(), given.data_ptr(), out.data_ptr()):
            raise HqmqError(self.library.hqmq_cuda_last_error().decode())
        return out


def attend(
    case: Attention, inputs: Sequence[Tensor], new: Sequence[int], caches: list[list[Tensor]],
    table: Tensor | None = None, sinks: Tensor | None = None, window: int = 0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """cuda.attend of new tokens after those that a case holds."""
    q, k, v = inputs
    return cuda.attend(
        q, k, v, lengths(*case.past), lengths(*new), sinks, case.scheme, case.books, caches, case.head_dim**-0.5,
        window, softcap, table,
    )  # fmt: skip


def assert_right(
    case: Attention, new: Sequence[int], path: int, limit: float, sinks: Tensor | None = None, window: int = 0,
    softcap: float = 0.0, seed: int = 0,
) -> Tensor:  # fmt: skip
    """Assert that a call takes kernels `path` (enum hqmq_cuda_path), and gives the oracle's y but for a relative error
    of `limit`, and its bytes; and with a page table the same bits. Returns y."""
    inputs = case.inputs(max(new), seed)
    pages = case.caches[0][0].shape[2] // case.scheme.page_size
    found, why = attention_path(inputs[0], inputs[1], pages, case.scheme, window, softcap)
    assert found == path, why
    caches = case.clone()
    y = attend(case, inputs, new, caches, None, sinks, window, softcap)
    expected, present = case.oracle(*inputs, lengths(*new), case.head_dim**-0.5, window, softcap, sinks)
    assert_same_caches(caches, present)
    for b, count in enumerate(new):
        assert not y[b, :, count:].any()
        assert not count or relative_error(y[b, :, :count], expected[b, :, :count]) < limit, f"sequence {b}"
    held = [a + b for a, b in zip(case.past, new, strict=True)]
    pool = paged(case, case.caches, case.past, seed)
    for b, end in enumerate(held):  # what no query sees, and what does not fill
        pool.table[b, end // pool.page_size :] = -1 - b
        if window:
            pool.table[b, : max(case.past[b] - window + 1, 0) // pool.page_size] = 1 << 30
    before = pool.bits()
    by_table = attend(case, inputs, new, pool.caches, pool.table, sinks, window, softcap)
    assert torch.equal(bits(by_table), bits(y))
    filled = [
        int(pool.table[b, m])
        for b, (past, end) in enumerate(zip(case.past, held, strict=True))
        for m in range(past // pool.page_size, end // pool.page_size)
    ]
    assert_untouched(before, pool.bits(), filled)
    pool.table[:] = pool.table.clamp(0, len(before[0]) - 1)
    full = [0 if window else end for end in held]
    assert_same_pages(pool, caches, full)
    return y


@contextmanager
def emulated_gpu() -> Iterator[EmulatedGpu]:
    """While inside, hqmq_trt.cuda of this process takes tensors on the CPU and runs the emulation."""
    gpu = EmulatedGpu(library())
    gpu.use()
    with (
        mock.patch.object(cuda, "library", return_value=gpu.library),
        mock.patch.object(cuda, "_stream", return_value=0),
    ):
        cuda.clear_status(gpu.device)
        yield gpu
