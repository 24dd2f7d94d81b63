"""What the exporter refuses: one line that says why, and no half-written folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from hqmq_trt.errors import HqmqError
from hqmq_trt.export import export_model

_BASE: dict[str, Any] = {
    "vocab_size": 32,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}


def llama(**changes: Any) -> Any:
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**_BASE, **changes}))


def refuse(model: Any, output: Path, *words: str, **options: Any) -> None:
    with pytest.raises(HqmqError) as info:
        export_model(model, output, **options)
    message = str(info.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message


def refuse_cleanly(model: Any, tmp_path: Path, *words: str, **options: Any) -> None:
    refuse(model, tmp_path / "out", *words, **options)
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]


def test_options(tmp_path: Path) -> None:
    refuse_cleanly(llama(), tmp_path, "unknown scheme 'hq9'", scheme="hq9")
    refuse_cleanly(llama(), tmp_path, "unknown mode 'other'", mode="other")
    refuse_cleanly("x", tmp_path, "unknown dtype 'int8'", dtype="int8")
    refuse_cleanly(llama(), tmp_path, "model.to(torch.float16)", dtype="float16")


def test_missing_models(tmp_path: Path) -> None:
    refuse_cleanly(str(tmp_path / "absent"), tmp_path, "no such file or folder")
    refuse_cleanly(str(tmp_path / "absent.gguf"), tmp_path, "no such file or folder")
    (tmp_path / "model").mkdir()
    refuse_cleanly(str(tmp_path / "model"), tmp_path, "no config.json")
    refuse_cleanly(str(tmp_path / "model"), tmp_path, "no such GGUF file", gguf_file="a.gguf")
    (tmp_path / "model" / "b.gguf").write_bytes(b"GGUF")
    refuse_cleanly(str(tmp_path / "model"), tmp_path, "b.gguf")
    refuse_cleanly(str(tmp_path / "model" / "b.gguf"), tmp_path, "b.gguf", "cannot load")
    (tmp_path / "model" / "text").write_text("x")
    refuse_cleanly(str(tmp_path / "model" / "text"), tmp_path, "no .gguf")
    (tmp_path / "model" / "config.json").write_text('{"model_type": "no_such_architecture"}')
    refuse_cleanly(str(tmp_path / "model"), tmp_path, "cannot load it as a causal language model")


def test_unsuitable_models(tmp_path: Path) -> None:
    refuse_cleanly(torch.nn.Linear(2, 2), tmp_path, "not a transformers model")
    encoder = transformers.BertConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, intermediate_size=32)
    refuse_cleanly(transformers.BertModel(encoder), tmp_path, "head")
    seq2seq = transformers.T5Config(d_model=32, d_ff=32, num_layers=1, num_heads=2, d_kv=16, vocab_size=32)
    refuse_cleanly(transformers.T5ForConditionalGeneration(seq2seq), tmp_path, "encoder-decoder")


def test_head_dim(tmp_path: Path) -> None:
    refuse_cleanly(llama(head_dim=24), tmp_path, "head_dim", "power of two", scheme="hq4")
    refuse_cleanly(llama(head_dim=10), tmp_path, "head_dim 10", "divisible by 4", scheme="paper:s8_r3")


def test_multi_head_latent_attention(tmp_path: Path) -> None:
    config = transformers.DeepseekV3Config(
        **{**_BASE, "num_hidden_layers": 1},
        kv_lora_rank=16,
        q_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=16,
        v_head_dim=16,
        first_k_dense_replace=1,
    )
    refuse_cleanly(transformers.DeepseekV3ForCausalLM(config), tmp_path, "multi-head latent attention")


def test_hybrid(tmp_path: Path) -> None:
    config = transformers.Lfm2Config(**_BASE, layer_types=["conv", "full_attention"])
    refuse_cleanly(transformers.Lfm2ForCausalLM(config), tmp_path, "not supported")


def test_existing_output(tmp_path: Path) -> None:
    output = tmp_path / "out"
    output.mkdir()
    (output / "mine.txt").write_text("keep me")
    refuse(llama(), output, "not empty", "--overwrite")
    refuse(llama(), output, "not overwritten", overwrite=True)
    (output / "manifest.json").write_text('{"kind": "other"}')
    refuse(llama(), output, "not overwritten", overwrite=True)
    assert (output / "mine.txt").read_text() == "keep me"
    (tmp_path / "link").symlink_to(output)
    refuse(llama(), tmp_path / "link", "not a folder", overwrite=True)
    (tmp_path / "file").write_text("x")
    refuse(llama(), tmp_path / "file", "not a folder", overwrite=True)


def test_a_failure_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever happens while files are written: the old folder stays as it was, and no other is left."""
    output = tmp_path / "out"
    export_model(llama(), output, "fp16")
    before = {path.name: path.read_bytes() for path in output.iterdir()}

    def fail(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr("hqmq_trt.export.compile.record_file", fail)
    with pytest.raises(KeyboardInterrupt):
        export_model(llama(), output, "fp16", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert {path.name: path.read_bytes() for path in output.iterdir()} == before
    monkeypatch.undo()
    stages: list[str] = []
    manifest = export_model(
        llama(), output, "paper:s8_r3", overwrite=True, progress=lambda stage, share: stages.append(stage)
    )
    assert manifest.scheme == "paper:s8_r3"
    assert list(dict.fromkeys(stages)) == ["load", "capture", "write", "hash"]
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
