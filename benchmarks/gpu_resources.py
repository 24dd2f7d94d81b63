"""Registers, local memory and static shared memory of every kernel of a library or object, by architecture.

    python -m benchmarks.gpu_resources hqmq_trt/_lib/libhqmq_cuda.so build/*/x.cu.o

Prints a table and fails if a kernel could not be launched or keeps more in local memory than BOUNDS allow. Reads the
compiled code with cuobjdump (of a CUDA toolkit, or of torch's triton package); needs no GPU.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from hqmq_trt.errors import HqmqError

REGISTERS = 65536
"""Of a multiprocessor, and of a block, on sm_80 to sm_120."""
BOUNDS = {
    # Bytes of the stack frame of a thread: spilled registers and arrays.
    r"^DecodeKernel<Compact<SmallCodec16<8, true>>": 256,
    r"^DecodeKernel<Cosets<.*, 256, [48], true>$": 480,
    r"^DecodeKernel<.*, (64|128), [48], (true|false)>$": 176,
    r"^DecodeKernel<.*, 256, [48], true>$": 320,
    r"^EncodeKernel<": 96,
    r"^EncodeGeneralKernel$": 0,
    r"^PrefillKernel<": 96,
    r"^Sm90Kernel<": 0,
    r"^DecodeTilesKernel<": 16,
}
"""Most bytes of a thread's stack frame by kernel, the first pattern that is found in its name."""
_MAX_THREADS = 0x05  # EIATTR_MAX_THREADS of .nv.info
_SIZED = 0x04  # EIFMT_SVAL: a value of so many bytes follows


@dataclass(frozen=True)
class Kernel:
    """What one kernel takes on one architecture."""

    name: str
    """Without namespaces and arguments."""
    architecture: str
    """sm_89 …"""
    threads: int
    """Of a block at most (__launch_bounds__)."""
    registers: int
    """Of a thread."""
    frame: int
    """Bytes of local memory a thread: spills and arrays."""
    shared: int
    """Bytes of static shared memory a block, with the 1 KiB that CUDA keeps; dynamic one is asked for at launch."""


def cuobjdump() -> str:
    """The program.

    Raises:
        HqmqError: there is none.
    """
    folders = [Path(root) / "bin" for root in (os.environ.get("CUDA_HOME"), "/usr/local/cuda") if root]
    spec = find_spec("triton")
    for place in (spec.submodule_search_locations or []) if spec else []:
        folders.append(Path(place) / "backends/nvidia/bin")
    found = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=os.pathsep.join(map(str, folders)))
    if not found:
        raise HqmqError(
            "cuobjdump is missing: it comes with a CUDA toolkit and with triton, which torch for GPUs needs"
        )
    return found


def _run(*arguments: str, cwd: str | None = None) -> str:
    done = subprocess.run(arguments, capture_output=True, text=True, cwd=cwd)
    if done.returncode:
        raise HqmqError(f"{' '.join(arguments)}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def _demangler() -> ctypes.CDLL:
    library = ctypes.CDLL("libstdc++.so.6")
    library.__cxa_demangle.restype = ctypes.c_void_p
    library.__cxa_demangle.argtypes = [ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p]
    return library


def demangle(symbol: str) -> str:
    """`DecodeKernel<Codec12, Codec12, 128, 4>` of a mangled function; other symbols as they are."""
    library = _demangler()
    found = library.__cxa_demangle(symbol.encode(), None, None, None)
    if not found:
        return symbol
    name = (ctypes.string_at(found) or b"").decode()
    ctypes.CDLL(None).free(ctypes.c_void_p(found))
    name = name.replace("(anonymous namespace)::", "").removeprefix("void ")
    name = re.sub(r"_GLOBAL__N_\w+::|\w+_INTERNAL_\w+::", "", name)
    depth, end = 0, len(name)
    for i, letter in enumerate(name):
        depth += (letter == "<") - (letter == ">")
        if letter == "(" and depth == 0:
            end = i
            break
    name = re.sub(r"\(\w+\)(?=\d|true|false)", "", name[:end])  # (int)128, (bool)1
    return name.replace("hqmq::cuda::", "").replace("hqmq::", "").replace("> >", ">>")


def _threads(cubin: bytes) -> Iterator[tuple[str, int]]:
    """Symbols of a cubin's kernels and the most threads of a block."""
    (sections_at,) = struct.unpack_from("<Q", cubin, 40)
    count, names = struct.unpack_from("<HH", cubin, 60)
    sections = [struct.unpack_from("<IIQQQQ", cubin, sections_at + 64 * i) for i in range(count)]
    for section in sections:
        start = sections[names][4] + section[0]
        name = cubin[start : cubin.index(b"\0", start)].decode()
        if not name.startswith(".nv.info."):
            continue
        at, end = section[4], section[4] + section[5]
        while at < end:
            kind, attribute, size = struct.unpack_from("<BBH", cubin, at)
            if attribute == _MAX_THREADS:
                x, y, z = struct.unpack_from("<III", cubin, at + 4)
                yield name.removeprefix(".nv.info."), x * y * z
            at += 4 + (size if kind == _SIZED else 0)


def read(path: Path) -> tuple[list[Kernel], bool]:
    """Kernels of a library or object, and whether they were optimised.

    Raises:
        HqmqError: cuobjdump is missing or finds no device code.
    """
    tool, threads = cuobjdump(), dict[tuple[str, str], int]()
    with tempfile.TemporaryDirectory() as folder:
        _run(tool, "-xelf", "all", str(path.resolve()), cwd=folder)
        for cubin in Path(folder).iterdir():
            architecture = next(part for part in cubin.name.split(".") if part.startswith("sm_"))
            threads |= {(architecture, symbol): most for symbol, most in _threads(cubin.read_bytes())}
    kernels, architecture, symbol, optimised = [], "", "", True
    for line in _run(tool, "--dump-resource-usage", str(path)).splitlines():
        if line.startswith("arch = "):
            architecture = line.removeprefix("arch = ").strip()
        elif line.startswith(" Function "):
            symbol = line.removeprefix(" Function ").rstrip(":")
            optimised = optimised and "4hqmq4cuda3ptx" not in symbol  # one-line functions that are always inlined
        elif "CONSTANT[0]" in line:  # kernels have their arguments there
            size = {key: int(value) for key, value in re.findall(r"(\w+(?:\[\d\])?):(\d+)", line)}
            most = threads.get((architecture, symbol), 1024)
            name = demangle(symbol)
            kernels.append(Kernel(name, architecture, most, size["REG"], size["STACK"], size["SHARED"]))
    if not kernels:
        raise HqmqError(f"{path} holds no kernels")
    return kernels, optimised


def bound(name: str) -> int | None:
    """Most bytes of the stack frame of a kernel, None: any."""
    return next((most for pattern, most in BOUNDS.items() if re.search(pattern, name)), None)


def problems(kernels: Sequence[Kernel], optimised: bool = True) -> list[str]:
    """Kernels that cannot be launched with all their threads and, if optimised, those beyond their bounds."""
    found = []
    for kernel in kernels:
        where = f"{kernel.name} on {kernel.architecture}"
        warps, of_warp = -(-kernel.threads // 32), -(-kernel.registers * 32 // 256) * 256  # given out in units of 256
        if warps * of_warp > REGISTERS:
            found.append(f"{where}: {kernel.threads} threads of {kernel.registers} registers are more than {REGISTERS}")
        most = bound(kernel.name)
        if optimised and most is not None and kernel.frame > most:
            found.append(f"{where}: {kernel.frame} bytes of local memory a thread, more than {most}")
    return found


def table(kernels: Sequence[Kernel]) -> Iterator[str]:
    """Lines of a table, a kernel each: `registers/frame` by architecture, `-`: compiled to nothing there."""
    architectures = sorted({kernel.architecture for kernel in kernels}, key=lambda x: int(re.sub(r"\D", "", x)))
    yield f"| kernel | threads | static shared | {' | '.join(architectures)} |"
    yield "|---|" + "---|" * (len(architectures) + 2)
    for name in dict.fromkeys(kernel.name for kernel in kernels):
        of = {kernel.architecture: kernel for kernel in kernels if kernel.name == name}
        cells = []
        for architecture in architectures:
            kernel = of.get(architecture)
            cells.append(f"{kernel.registers}/{kernel.frame}" if kernel and kernel.registers > 16 else "-")
        some = max(of.values(), key=lambda kernel: kernel.registers)
        yield f"| {name} | {some.threads} | {some.shared} | {' | '.join(cells)} |"


def main(files: Annotated[list[Path], typer.Argument(help="Libraries or objects.")]) -> None:
    """Print the table; exit code 1 if a bound is broken."""
    kernels: list[Kernel] = []
    optimised = True
    for path in files:
        try:
            found, fast = read(path)
        except HqmqError as error:
            typer.echo(error, err=True)
            raise typer.Exit(1) from None
        kernels += found
        optimised = optimised and fast
    typer.echo("\n".join(table(kernels)))
    if not optimised:
        typer.echo("not optimised: bounds of local memory do not count")
    found_problems = problems(kernels, optimised)
    for problem in found_problems:
        typer.echo(problem, err=True)
    raise typer.Exit(int(bool(found_problems)))


if __name__ == "__main__":
    typer.run(main)
