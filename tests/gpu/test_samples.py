"""The samples on an engine: the C++ program's tokens equal those of `hqmq-trt run`, and the chat remembers.

The C++ program is built by CMake, or named by HQMQ_SAMPLE_DECODE where it was built before.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from hqmq_trt.manifest import Manifest
from hqmq_trt.runtime.tokenizer import Tokenizer
from tests.gpu.requirements import QUICK, missing

SAMPLES = Path(__file__).parents[2] / "samples"
PROMPT = "".join(chr(97 + (i * i * 7 + i * 3) % 26) for i in range(150))  # the tiny model repeats itself after prose
NEW, CHUNK, CONTEXT = 60, 48, 512


_MISSING = missing("tensorrt", "pycuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_MISSING), reason=_MISSING)]


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """hqmq_decode."""
    if named := os.environ.get("HQMQ_SAMPLE_DECODE"):
        return Path(named)
    if shutil.which("cmake") is None:
        pytest.skip("no cmake, and HQMQ_SAMPLE_DECODE names no program")
    from hqmq_trt.runtime.trt_engine import tensorrt_library

    folder = tmp_path_factory.mktemp("sample")
    options = ["-DHQMQ_WERROR=ON", f"-DTensorRT_LIBRARY={tensorrt_library()}"]
    for command in (["-S", str(SAMPLES / "cpp"), "-B", str(folder), *options], ["--build", str(folder)]):
        done = subprocess.run(["cmake", *command], capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
    return folder / "hqmq_decode"


@pytest.fixture(scope="module", params=["float32", "float16", "bfloat16"])
def engine(
    request: pytest.FixtureRequest, tiny_model: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    from hqmq_trt.engine.builder import build_engine
    from hqmq_trt.export import export_model

    folder = tmp_path_factory.mktemp("samples")
    export_model(str(tiny_model("llama")), folder / "model", "hq4@p16", dtype=request.param)
    limits: dict[str, Any] = {"max_batch": 2, "max_context": CONTEXT, "prefill_chunk": CHUNK}
    build_engine(folder / "model", folder / "engine", **limits, optimization_level=QUICK)
    return folder / "engine"


def decode(program: Path, engine: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the C++ program."""
    from hqmq_trt.engine.plugin_library import find_plugin_library

    command = [str(program), str(engine), str(find_plugin_library()), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_decode_equals_run(program: Path, engine: Path, tmp_path: Path) -> None:
    run = [sys.executable, "-m", "hqmq_trt.cli", "run", str(engine), "--raw", "-p", PROMPT, "-n", str(NEW), "--json"]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    wanted = json.loads(done.stdout)["completions"][0]["tokens"]
    assert len(set(wanted)) > 1
    manifest = Manifest.load(engine)
    ids = Tokenizer(engine, manifest).encode(PROMPT)
    assert len(ids) > 3 * CHUNK  # four runs of prefill, the last one shorter
    stop = [part for token in manifest.eos_token_ids for part in ("--stop", str(token))]
    (tmp_path / "ids").write_text("\n".join(map(str, ids)))
    for options in (
        ["--tokens", ",".join(map(str, ids))],
        ["--tokens-file", str(tmp_path / "ids"), "--max-context", str(len(ids) + NEW - 1)],
    ):
        found = decode(program, engine, *options, "-n", str(NEW), *stop)
        assert found.returncode == 0, found.stderr
        assert [int(token) for token in found.stdout.split()] == wanted
        assert re.search(rf"{len(ids)} prompt tokens at \d+/s, {len(wanted)} new at [\d.]+/s", found.stderr)
    stopped = decode(program, engine, *options, "-n", str(NEW), "--stop", str(wanted[5]))
    assert [int(token) for token in stopped.stdout.split()] == wanted[: wanted.index(wanted[5])]


def test_decode_mistakes(program: Path, engine: Path, tmp_path: Path) -> None:
    for options, words in (
        (["--tokens", "1,2", "-n", "9999"], "the cache holds 512"),
        (["--tokens", "1,2", "--max-context", "9999"], "exceeds the engine's 512"),
        (["--tokens", "1,99999"], "outside the vocabulary of 260"),
        (["--tokens", "1,-2"], "not a whole number"),
        (["--tokens-file", str(tmp_path / "none")], "cannot be read"),
    ):
        found = decode(program, engine, *options)
        assert found.returncode == 2
        assert found.stdout == ""
        assert found.stderr.startswith("error: ")
        assert words in found.stderr
    damaged = Path(shutil.copytree(engine, tmp_path / "damaged"))
    (damaged / "engine.plan").write_bytes(b"x" * 1000)
    found = decode(program, damaged, "--tokens", "1,2")
    assert (found.returncode, found.stdout) == (2, "")
    assert "refuses it" in found.stderr


def test_chat(engine: Path) -> None:
    command = [sys.executable, str(SAMPLES / "chat.py"), str(engine), "-n", "12"]
    done = subprocess.run(command, input="Hello\n/reset\nHello\n", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    turns = re.findall(r"read (\d+) tokens, (\d+) held", done.stderr)
    assert len(turns) == 2
    assert turns[0] == turns[1]
    half = len(done.stdout) // 2
    assert done.stdout[:half] == done.stdout[half:] != ""
