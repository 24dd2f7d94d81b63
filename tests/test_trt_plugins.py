"""The TensorRT plugin library without a GPU: against the operators' contract, and in TensorRT of three versions."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from hqmq_trt import __version__, contract
from hqmq_trt.engine.plugin_library import TRT_LIBRARY
from hqmq_trt.library_files import library_dir
from tests.tensorrt_versions import VERSIONS, UnavailableError, fetch
from tests.trt_cases import nodes, write_cases

ROOT = Path(__file__).parent.parent
PROGRAM = Path(
    os.environ.get("HQMQ_TRT_CONTRACT_TEST") or ROOT / "build" / "trt" / "tests" / "cpp" / "trt_contract_test"
)


@pytest.fixture(scope="module")
def library() -> Path:
    path = library_dir() / TRT_LIBRARY
    if not path.is_file():
        pytest.skip(f"{path} is not built: make test, or cmake --preset trt")
    return path


@pytest.fixture(scope="module")
def program(library: Path) -> Path:
    if not PROGRAM.is_file():
        pytest.skip(f"{PROGRAM} is not built: make test, or cmake --preset trt, or set HQMQ_TRT_CONTRACT_TEST")
    return PROGRAM


def run(program: Path, library: Path, cases: Path) -> tuple[int, str]:
    """(exit code, output) of the contract test."""
    command = [str(program), str(library), str(cases), __version__]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    return done.returncode, done.stdout + done.stderr


def test_library_keeps_the_contract(program: Path, library: Path, tmp_path: Path) -> None:
    write_cases(tmp_path / "cases.txt")
    code, output = run(program, library, tmp_path / "cases.txt")
    assert code == 0, output
    found = re.search(r"^(\d+) checks, 0 failed$", output, re.MULTILINE)
    assert found, output
    assert int(found[1]) > 100_000


def _replaced(pattern: str, replacement: str) -> Callable[[str], str]:
    return lambda line: re.sub(pattern, replacement, line)


WRONG_CASES = {
    "an output of another type": _replaced(r"^output present_key_mean float16", "output present_key_mean float32"),
    "an output of another shape": _replaced(r"^(output y T -1 3\? )6", r"\g<1>7"),
    "an output that is not dynamic": _replaced(r"^(output x .*)256\?", r"\g<1>256"),
    "an input of another type": _replaced(r"^input levels float32", "input levels float16"),
    "an input of another shape": _replaced(r"^(input key_tail .* )64$", r"\g<1>32"),
    "another alias": _replaced(r"^(output present_codes int32) \d+", r"\1 0"),
    "no alias": _replaced(r"^(output present_value_tail float16) \d+", r"\1 -1"),
    "an output less": _replaced(r"^output present_mean .*", ""),
    "another attribute": _replaced(r"^attribute softcap float 30.0", "attribute softcap float -30.0"),
    "an attribute of another name": _replaced(r"^attribute gain ", "attribute gains "),
}


@pytest.mark.parametrize("what", WRONG_CASES)
def test_contract_test_can_fail(program: Path, library: Path, tmp_path: Path, what: str) -> None:
    """Where library and contract differ the program says so: here the contract is the wrong one."""
    lines = write_cases(tmp_path / "cases.txt")
    changed = [new for line in lines if (new := WRONG_CASES[what](line))]
    assert changed != lines
    (tmp_path / "wrong.txt").write_text("\n".join(changed) + "\n", encoding="utf-8")
    code, output = run(program, library, tmp_path / "wrong.txt")
    assert code in (1, 2), output
    assert "FAILED" in output


def test_contract_test_refuses_another_version(program: Path, library: Path, tmp_path: Path) -> None:
    write_cases(tmp_path / "cases.txt")
    done = subprocess.run(
        [str(program), str(library), str(tmp_path / "cases.txt"), "9.9.9"],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 1
    assert "FAILED library: version" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("name", VERSIONS)
def test_library_in_tensorrt(library: Path, tmp_path: Path, name: str) -> None:
    try:
        environment = fetch(name)
    except UnavailableError as error:
        pytest.skip(f"TensorRT {name}: {error}")
    cases = [
        (op, {key: value for key, value in attributes.items() if not isinstance(value, str)})
        for _, op, attributes in nodes()
    ]
    (tmp_path / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "trt_load_probe.py"), str(tmp_path / "cases.json")],
        env={**os.environ, **environment, "HQMQ_LIBRARY_DIR": str(library.parent)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["version"].startswith(VERSIONS[name].version)
    wanted = [[op.name, contract.PLUGIN_VERSION, [spec.name for spec in op.numbers]] for op in contract.OPERATORS]
    assert sorted(found["creators"]) == sorted(wanted)
    assert found["plugins"] == [[True, True]] * (2 * len(cases))
    errors = [text for text in [*found["log"], *done.stderr.splitlines()] if "'page_size' is 48" in text]
    assert len(errors) == 2 * len(cases), done.stderr
