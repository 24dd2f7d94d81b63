"""TensorRT of several versions for tests on machines without a GPU: libraries and Python bindings, in a cache folder.

The libraries come from the Maven artifact org.bytedeco:tensorrt, the bindings from pip, both through their ordinary
clients. The folder is ``$HQMQ_TEST_CACHE`` or ``~/.cache/hqmq-trt``. Builder resources are left out: without a GPU
nothing can be built, but libraries of plugins load and their creators run.

``python tests/tensorrt_versions.py [VERSION …]`` fetches and prints the folders.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

_LIBRARIES = ("libnvinfer.so", "libnvinfer_plugin.so", "libnvonnxparser.so")
_MODULE = "from tensorrt_bindings import *\nfrom tensorrt_bindings import __version__\n"
_TIMEOUT = 1200


class UnavailableError(Exception):
    """This version cannot be had here; the message says why in one line."""


@dataclass(frozen=True)
class TensorRT:
    """One version: of the Maven artifact, and the package of the bindings."""

    version: str
    artifact: str
    bindings: str


VERSIONS = {
    "10.6": TensorRT("10.6.0", "10.6-1.5.11", "tensorrt-cu12-bindings==10.6.0"),
    "10.15": TensorRT("10.15.1", "10.15-1.5.13", "tensorrt-cu13-bindings==10.15.1.29"),
    "11.2": TensorRT("11.2.1", "11.2-1.5.14", "tensorrt-cu13-bindings==11.2.1.2"),
}


def _run(*command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT, check=False)
    except subprocess.TimeoutExpired:
        raise UnavailableError(f"{command[0]} took more than {_TIMEOUT} s") from None
    if done.returncode:
        lines = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise UnavailableError(f"{' '.join(command[:3])} failed: {lines[-1] if lines else done.returncode}")


def _fetch_libraries(artifact: str, folder: Path) -> None:
    maven = shutil.which("mvn")
    if not maven:
        raise UnavailableError("mvn is missing (apt-get install maven), which fetches TensorRT's libraries")
    coordinates = f"org.bytedeco:tensorrt:{artifact}:jar:linux-x86_64-redist"
    with tempfile.TemporaryDirectory(dir=folder.parent) as jars:
        _run(maven, "-q", "-B", "dependency:get", "-Dtransitive=false", f"-Dartifact={coordinates}")
        _run(maven, "-q", "-B", "dependency:copy", f"-Dartifact={coordinates}", f"-DoutputDirectory={jars}")
        with zipfile.ZipFile(next(Path(jars).glob("*.jar"))) as jar:
            for member in jar.infolist():
                name = member.filename.rpartition("/")[2]
                if name.startswith(tuple(f"{library}." for library in _LIBRARIES)):
                    with jar.open(member) as source, (folder / name).open("wb") as target:
                        shutil.copyfileobj(source, target, 1 << 24)
    if len(list(folder.iterdir())) != len(_LIBRARIES):
        raise UnavailableError(f"{coordinates} does not hold {', '.join(_LIBRARIES)}")


def _fetch_bindings(requirement: str, folder: Path) -> None:
    options = ("--quiet", "--no-deps", "--only-binary", ":all:", "--target", str(folder), requirement)
    if uv := shutil.which("uv"):
        _run(uv, "pip", "install", "--python", sys.executable, *options)
    else:
        _run(sys.executable, "-m", "pip", "install", *options)
    # The package tensorrt would load NVIDIA's library packages; here LD_LIBRARY_PATH names the libraries.
    (folder / "tensorrt").mkdir()
    (folder / "tensorrt" / "__init__.py").write_text(_MODULE, encoding="utf-8")


def fetch(name: str) -> dict[str, str]:
    """Environment in which ``import tensorrt`` is version `name`, fetched if it is not in the cache.

    Raises:
        UnavailableError: no mvn, no network, or no bindings for this Python or machine.
    """
    if (sys.platform, os.uname().machine) != ("linux", "x86_64"):
        raise UnavailableError("the libraries are for Linux on x86-64")
    wanted = VERSIONS[name]
    cache = Path(os.environ.get("HQMQ_TEST_CACHE") or Path.home() / ".cache" / "hqmq-trt")
    libraries = cache / f"tensorrt-{wanted.artifact}"
    python = f"cp{sys.version_info.major}{sys.version_info.minor}"
    site = cache / f"{wanted.bindings.replace('==', '-')}-{python}"
    cache.mkdir(parents=True, exist_ok=True)
    for folder, make, source in (
        (libraries, _fetch_libraries, wanted.artifact),
        (site, _fetch_bindings, wanted.bindings),
    ):
        with FileLock(cache / ".lock"):  # of two test processes, one fetches
            if folder.is_dir():
                continue
            partial = Path(tempfile.mkdtemp(prefix=".partial-", dir=cache))
            try:
                make(source, partial)
                partial.rename(folder)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    paths = {"LD_LIBRARY_PATH": [libraries], "PYTHONPATH": [site, Path(__file__).parent.parent]}
    return {key: ":".join([*map(str, own), *filter(None, [os.environ.get(key)])]) for key, own in paths.items()}


if __name__ == "__main__":
    for chosen in sys.argv[1:] or VERSIONS:
        print(chosen, fetch(chosen))
