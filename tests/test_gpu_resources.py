"""benchmarks/gpu_resources.py: reads what was built, and finds kernels beyond their bounds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.gpu_resources import Kernel, bound, cuobjdump, demangle, problems, read, table
from hqmq_trt import cuda
from hqmq_trt.cuda import CUDA_LIBRARY
from hqmq_trt.errors import HqmqError
from hqmq_trt.library_files import library_dir

KERNEL = Kernel("DecodeKernel<Codec12, Codec12, 128, 4, true>", "sm_90a", 512, 128, 64, 1024)


def has_cuobjdump() -> bool:
    """Whether compiled kernels can be read here."""
    try:
        return bool(cuobjdump())
    except HqmqError:
        return False


built = pytest.mark.skipif(not cuda.available(), reason="libhqmq_cuda.so is not built")
readable = pytest.mark.skipif(not has_cuobjdump(), reason="there is no cuobjdump")


@built
@readable
def test_every_kernel_that_was_built_can_be_launched_and_keeps_its_bounds() -> None:
    """Of an unoptimised library only that registers suffice."""
    kernels, optimised = read(library_dir() / CUDA_LIBRARY)
    names = {kernel.name for kernel in kernels}
    assert any(name.startswith("DecodeKernel<") for name in names)
    assert any(name.startswith("EncodeKernel<") for name in names)
    assert {kernel.threads for kernel in kernels if kernel.name.startswith("DecodeKernel<")} == {512}
    assert not problems(kernels, optimised)
    assert len(list(table(kernels))) == len(names) + 2


def test_too_many_registers_and_too_much_local_memory_are_problems() -> None:
    assert not problems([KERNEL])
    assert "512 threads of 136 registers" in problems([replace(KERNEL, registers=136)])[0]
    most = bound(KERNEL.name)
    assert most is not None
    assert not problems([replace(KERNEL, frame=most)])
    assert f"{most + 4} bytes of local memory" in problems([replace(KERNEL, frame=most + 4)])[0]
    assert not problems([replace(KERNEL, frame=most + 4)], optimised=False)
    assert bound("LoadKernel") is None


def test_names_are_those_of_the_source() -> None:
    symbol = "_ZN4hqmq4cuda12DecodeKernelINS0_7CompactINS0_7Codec16ILi8EEEEES5_Li128ELi4ELb1EEEvNS0_9DecodeJobE"
    assert demangle(symbol) == "DecodeKernel<Compact<Codec16<8>>, Compact<Codec16<8>>, 128, 4, true>"
    assert demangle("main") == "main"


def test_an_architecture_without_a_kernel_shows() -> None:
    lines = list(table([KERNEL, replace(KERNEL, architecture="sm_89", registers=8, frame=0)]))
    assert lines[0].endswith("| sm_89 | sm_90a |")
    assert lines[2].endswith("| 512 | 1024 | - | 128/64 |")


@readable
def test_a_file_without_kernels_is_refused(tmp_path: Path) -> None:
    empty = tmp_path / "x.o"
    empty.write_bytes(b"")
    with pytest.raises(HqmqError):
        read(empty)
