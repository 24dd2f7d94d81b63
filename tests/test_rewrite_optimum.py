"""A decoder exported by optimum-onnx itself, with an HQMQ cache put in.

optimum-onnx 0.1.0 needs an older transformers than this project, so it runs in an interpreter of its own:
``HQMQ_TEST_OPTIMUM`` names the python of an environment that has it. Without it, this one is tried.
"""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import onnx
import pytest

from hqmq_trt.export.rewrite import analyse, rewrite_model
from tests import rewrite_cases as cases
from tests.tiny_decoders import make_model

VARIABLE = "HQMQ_TEST_OPTIMUM"
_EXPORT = """
import sys
from optimum.exporters.onnx import main_export
main_export(sys.argv[1], output=sys.argv[2], task="text-generation-with-past", do_validation=False)
"""


def python_with_optimum() -> str | None:
    if os.environ.get(VARIABLE):
        return os.environ[VARIABLE]
    try:
        return sys.executable if importlib.util.find_spec("optimum.exporters.onnx") else None
    except ImportError:
        return None


PYTHON = python_with_optimum()

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        PYTHON is None, reason=f"optimum-onnx is not installed here, and {VARIABLE} names no python that has it"
    ),
]


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("optimum")
    make_model("llama").save_pretrained(folder / "torch")
    command = [str(PYTHON), "-c", _EXPORT, str(folder / "torch"), str(folder / "onnx")]
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(command, capture_output=True, text=True, env=kept)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "onnx" / "model.onnx"


def test_recognised(decoder: Path) -> None:
    found = analyse(decoder)
    assert found.problems == []
    assert [(layer.num_heads, layer.num_kv_heads, layer.head_dim) for layer in found.layers] == [(4, 2, 16)] * 2
    assert [layer.window for layer in found.layers] == [0, 0]


@pytest.mark.parametrize("mode", ["fused", "qdq"])
def test_unpacked_cache_changes_nothing(decoder: Path, tmp_path: Path, mode: str) -> None:
    """Scheme fp16 equals optimum's file over the same cache (tests/test_rewrite.py says how that is compared)."""
    manifest = rewrite_model(decoder, tmp_path / "out", "fp16@p8", mode=mode)
    assert (manifest.architecture, manifest.eos_token_ids) == ("LlamaForCausalLM", [2])
    kept: list[cases.Held] = []
    found = cases.run_rewritten(tmp_path / "out", kept=kept)
    wanted, steps = cases.run_held(onnx.load(decoder), kept)
    assert cases.difference(wanted, found) < 1e-4
    assert 0.5 < steps < 1.1


def test_packed_cache_is_that_of_torch(decoder: Path, tmp_path: Path) -> None:
    rewrite_model(decoder, tmp_path / "out", "hq4@p8")
    found = cases.run_rewritten(tmp_path / "out")
    assert cases.divergence(cases.run_torch(make_model("llama"), "hq4@p8"), found) < 1e-4
