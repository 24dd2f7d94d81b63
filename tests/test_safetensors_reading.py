"""A checkpoint is converted to another type without lying in memory beside the model."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers

from hqmq_trt.export.source import load

_MEASURED = """
import sys
from transformers import LlamaForCausalLM
from hqmq_trt.export.source import load
from tests.memory_probe import peak
start = peak()
load(sys.argv[1], "float32")
print(peak() - start)
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bare float16 model of 168 MB, its largest tensor 4 MB."""
    config = transformers.LlamaConfig(
        vocab_size=1000, hidden_size=1024, intermediate_size=2048, num_hidden_layers=8, num_attention_heads=16,
        num_key_value_heads=16, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("checkpoint")
    transformers.LlamaForCausalLM(config).half().save_pretrained(folder)
    return folder


def test_memory(checkpoint: Path) -> None:
    weights = (checkpoint / "model.safetensors").stat().st_size
    assert weights > 150 << 20
    command = [sys.executable, "-c", _MEASURED, str(checkpoint)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert 1.9 * weights < int(done.stdout) < 2.5 * weights  # 3 times with the file mapped


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_values(checkpoint: Path, dtype: str) -> None:
    """Weights are the checkpoint's, and transformers is as it was."""
    opened = transformers.modeling_utils.safe_open
    model = load(str(checkpoint), dtype).model
    assert transformers.modeling_utils.safe_open is opened
    plain = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=getattr(torch, dtype))
    assert model.dtype == plain.dtype == getattr(torch, dtype)
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
