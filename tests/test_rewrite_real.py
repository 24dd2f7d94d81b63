"""Real models: the road from Hugging Face and the road from ONNX give the same logits and text, in bounded memory.

``HQMQ_TEST_MODELS`` names them: folders that transformers loads, or .gguf files, with colons between. Each is exported
to an ordinary ONNX decoder first, in float32.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from hqmq_trt.export import export_model
from hqmq_trt.export.source import load
from hqmq_trt.runtime import OrtSession
from tests import rewrite_cases as cases

VARIABLE = "HQMQ_TEST_MODELS"
NAMED = [Path(name) for name in os.environ.get(VARIABLE, "").split(os.pathsep) if name]
PROMPT = "The key-value cache is the memory of a language model. " * 12 + "In short, the key-value cache"
NEW = 64
_MEASURED = """
import sys
from hqmq_trt.export.rewrite import rewrite_model
from tests.memory_probe import peak
start = peak()
rewrite_model(*sys.argv[1:4])
print(peak() - start)
"""

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not NAMED, reason=f"{VARIABLE} names no model (folders or .gguf files, colons between)"),
]


@pytest.fixture(scope="module", params=NAMED, ids=[path.name for path in NAMED])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Any, Path]]:
    """A loaded model with its tokenizer, and its ordinary ONNX decoder with weights beside it."""
    source = load(str(request.param), "float32")
    folder = tmp_path_factory.mktemp("decoder")
    cases.export_dynamo(source.model, folder / "decoder.onnx", 18)
    if len(list(folder.iterdir())) == 1:  # torch.onnx puts weights beside a file from 2 GB on
        whole = onnx.load(folder / "decoder.onnx")
        onnx.save(whole, folder / "decoder.onnx", save_as_external_data=True, location="decoder.onnx.data")
    yield source, folder / "decoder.onnx"
    for file in folder.iterdir():
        file.unlink()


def greedy(folder: Path, ids: list[int]) -> tuple[list[int], np.ndarray]:
    """Tokens that follow, and the logits [NEW, V] that chose them."""
    tokens: list[int] = []
    rows = []
    with OrtSession(folder, max_context=1024) as session:
        logits = session.append([ids])
        for _ in range(NEW):
            rows.append(np.array(logits[0]))
            tokens.append(int(rows[-1].argmax()))
            logits = session.decode([tokens[-1]])
    return tokens, np.stack(rows)


@pytest.mark.parametrize("scheme", ["fp16", "hq4"])
def test_both_roads(model: tuple[Any, Path], tmp_path: Path, scheme: str) -> None:
    """The same text, and the same logits to float32 rounding: V is rotated in the operator on both roads (fold=False),
    else values near the border between two codes fall differently; nor is K balanced, as the ONNX road does not."""
    source, decoder = model
    ids = source.tokenizer(PROMPT)["input_ids"]
    options: dict[str, Any] = {"fold": False, "balance": False, "tokenizer": source.tokenizer}
    export_model(source.model, tmp_path / "hf", scheme, **options)
    wanted, logits = greedy(tmp_path / "hf", ids)
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(decoder), str(tmp_path / "onnx"), scheme],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    found, ours = greedy(tmp_path / "onnx", ids)
    assert source.tokenizer.decode(found) == source.tokenizer.decode(wanted)
    assert len(set(found)) > 8
    p, q = (torch.from_numpy(x).double().log_softmax(1) for x in (logits, ours))
    assert float((p.exp() * (p - q)).sum(1).mean()) < 1e-4
    weights = sum(file.stat().st_size for file in decoder.parent.iterdir())
    assert weights > 100 << 20
    assert int(done.stdout) < 0.5 * weights + (256 << 20)  # one piece of the model at a time


def test_weights_inside_the_file(model: tuple[Any, Path], tmp_path: Path) -> None:
    """A file with its weights inside, where protobuf allows that, is rewritten in as little memory."""
    _, decoder = model
    weights = sum(file.stat().st_size for file in decoder.parent.iterdir())
    if weights > 1 << 30:
        pytest.skip(f"weights of {weights} bytes do not fit a protobuf file")
    onnx.save(onnx.load(decoder), tmp_path / "whole.onnx")
    done = subprocess.run(
        [sys.executable, "-c", _MEASURED, str(tmp_path / "whole.onnx"), str(tmp_path / "out"), "hq4"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert int(done.stdout) < 0.5 * weights + (256 << 20)
