"""Existing ONNX decoders, exported as others do it, with an HQMQ cache put in: against themselves and PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnx
import pytest

from hqmq_trt.errors import HqmqError
from hqmq_trt.export.rewrite import analyse, rewrite_model
from hqmq_trt.export.targets import OPERATORS
from hqmq_trt.manifest import Manifest
from tests import rewrite_cases as cases
from tests.tiny_decoders import make_model

WAYS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "dynamo18": ("mistral", "sdpa", {"opset": 18}),
    "dynamo18-capped": ("gemma2", "eager", {"opset": 18}),
    "dynamo18-no-positions": ("llama", "eager", {"opset": 18, "positions": False}),
    "dynamo23": ("llama", "sdpa", {"opset": 23}),
    "dynamo23-bias": ("qwen2", "sdpa", {"opset": 23, "positions": False, "mask": False}),
    "dynamo24": ("llama", "sdpa", {"opset": 24}),
    "dynamo25": ("qwen2", "sdpa", {"opset": 25}),
    "traced": ("qwen2", "eager", {}),
    "traced-window": ("mistral", "sdpa", {}),
    "cache-operator": ("llama", "sdpa", {"opset": 23}),
}
EXPECTED: dict[str, tuple[str, list[int], float]] = {
    "dynamo18": ("decomposed", [7, 7], 0.0),
    "dynamo18-capped": ("decomposed", [9, 0], 5.0),
    "dynamo18-no-positions": ("decomposed", [0, 0], 0.0),
    "dynamo23": ("Attention", [0, 0], 0.0),
    "dynamo23-bias": ("Attention", [0, 0], 0.0),
    "dynamo24": ("Attention", [0, 0], 0.0),
    "dynamo25": ("Attention", [0, 0], 0.0),
    "traced": ("decomposed", [0, 0], 0.0),
    "traced-window": ("decomposed", [7, 7], 0.0),
    "cache-operator": ("Attention with cache", [0, 0], 0.0),
}


def with_cache_operator(model: onnx.ModelProto) -> onnx.ModelProto:
    """Attention with cache inputs and outputs, in the place of Concat and an Attention that repeats heads itself."""
    graph = model.graph
    made = {name: node for node in graph.node for name in node.output}
    dropped = []
    for node in graph.node:
        if node.op_type != "Attention":
            continue
        joins = []
        for place in (1, 2):
            join = made[node.input[place]]
            while join.op_type != "Concat":
                join = made[join.input[0]]
            joins.append(join)
        node.input[1], node.input[2] = (join.input[1] for join in joins)
        node.input.extend(join.input[0] for join in joins)
        node.output.extend(join.output[0] for join in joins)
        dropped += joins
    kept = [node for node in graph.node if not any(node is join for join in dropped)]
    needed = {value.name for value in graph.output}
    for node in reversed(kept):
        if needed & set(node.output):
            needed.update(node.input)
    kept = [node for node in kept if needed & set(node.output)]
    del graph.node[:]
    graph.node.extend(kept)
    return model


class Exports:
    """ONNX files by way, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, Path] = {}

    def __call__(self, way: str) -> Path:
        if way not in self.made:
            name, attention, options = WAYS[way]
            folder = self.root / way
            folder.mkdir()
            path = folder / "model.onnx"
            if way == "cache-operator":
                onnx.save(with_cache_operator(onnx.load(self("dynamo23"))), path)
            elif way.startswith("traced"):
                cases.export_traced(make_model(name, attention), path)
            else:
                cases.export_dynamo(make_model(name, attention), path, **options)
            self.made[way] = path
        return self.made[way]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("decoders"))


@pytest.mark.parametrize("way", WAYS)
def test_recognised(exports: Exports, way: str) -> None:
    """Heads, scale, window and soft-cap are those of the model."""
    found = analyse(exports(way))
    assert found.problems == []
    form, windows, softcap = EXPECTED[way]
    assert [layer.window for layer in found.layers] == windows
    for index, layer in enumerate(found.layers):
        assert layer.index == index
        assert layer.form == form
        assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (4, 2, 16)
        assert layer.scale == pytest.approx(0.25, rel=1e-6)
        assert layer.softcap == softcap
        assert layer.padding == (way != "dynamo23-bias")
        assert f"past_key_values.{index}.key" == layer.key.past.name


@pytest.mark.parametrize("mode", ["fused", "qdq"])
@pytest.mark.parametrize("way", WAYS)
def test_unpacked_cache_changes_nothing(exports: Exports, tmp_path: Path, way: str, mode: str) -> None:
    """Scheme fp16 equals the original, whose cache rounds K and V to float16 likewise.

    K and V of three sequences at once and of one differ in their last bit here and there, and then may be rounded to
    the other neighbour. So the original reads what our cache holds: its logits must be ours, and what it would have
    held itself, unrounded, must be no farther than the rounding.
    """
    path = exports(way)
    manifest = rewrite_model(path, tmp_path / "out", "fp16@p8", mode=mode)
    assert (manifest.mode, manifest.vocab_size, manifest.hidden_size) == (mode, 97, 64)
    operators = {node.op_type for node in onnx.load(tmp_path / "out" / "model.onnx").graph.node if not node.domain}
    assert operators <= OPERATORS["tensorrt-10"]
    original = onnx.load(path)
    kept: list[cases.Held] = []
    found = cases.run_rewritten(tmp_path / "out", kept=kept)
    wanted, steps = cases.run_held(original, kept)
    assert cases.difference(wanted, found) < 1e-4
    assert 0.5 < steps < 1.1
    rounded, plain = cases.run_original(original), cases.run_original(original, rounded=False)
    assert cases.mean_difference(rounded, found) < 1e-4
    assert cases.mean_difference(rounded, found) < 0.3 * cases.mean_difference(plain, found)


@pytest.mark.parametrize("way", ["dynamo18-capped", "dynamo23", "traced-window"])
def test_packed_cache_is_that_of_torch(exports: Exports, tmp_path: Path, way: str) -> None:
    """hq4 equals the PyTorch model with the same HqmqCache, and is not the unpacked one."""
    rewrite_model(exports(way), tmp_path / "out", "hq4@p8")
    found = cases.run_rewritten(tmp_path / "out")
    model = make_model(WAYS[way][0])
    assert cases.divergence(cases.run_torch(model, "hq4@p8"), found) < 1e-4
    assert cases.divergence(cases.run_torch(model, "fp16@p8"), found) > 1e-4


def test_nothing_is_left_over(exports: Exports, tmp_path: Path) -> None:
    """The graph has our interface, one operator a layer, and no mask; a second run has nothing to do."""
    rewrite_model(exports("dynamo18"), tmp_path / "out", "hq4@p8")
    graph = onnx.load(tmp_path / "out" / "model.onnx").graph
    assert [value.name for value in graph.input[:4]] == ["input_ids", "past_length", "new_length", "logits_index"]
    assert all(value.name.startswith("past.") for value in graph.input[4:])
    assert [value.name for value in graph.output[:2]] == ["logits", "present_length"]
    kinds = [node.op_type for node in graph.node]
    assert kinds.count("HqmqAttention") == 2
    assert not {"Softmax", "Where", "GatherND", "LessOrEqual", "IsNaN"} & set(kinds)
    with pytest.raises(HqmqError, match="nothing to do"):
        rewrite_model(tmp_path / "out" / "model.onnx", tmp_path / "again")


@pytest.mark.parametrize("external", [False, True])
def test_files_beside_the_model(
    exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, external: bool
) -> None:
    """Tokenizer files come along; ends of text and the longest context come from configurations; weights may be
    external."""
    model = onnx.load(exports("traced"))
    folder = tmp_path / "in"
    folder.mkdir()
    onnx.save(model, folder / "decoder.onnx", save_as_external_data=True, location="w.bin", size_threshold=256)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["Qwen2ForCausalLM"], "max_position_embeddings": 200, "eos_token_id": 2})
    )
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 3], "pad_token_id": 0}))
    if external:
        monkeypatch.setattr("hqmq_trt.export.compile._EXTERNAL_ABOVE", 0)
        monkeypatch.setattr("hqmq_trt.export.compile._EXTERNAL_TENSOR", 1000)
    manifest = rewrite_model(folder / "decoder.onnx", tmp_path / "out", "fp16@p8")
    (folder / "w.bin").unlink()
    assert [file.purpose for file in manifest.files].count("weights") == external
    assert manifest == Manifest.load(tmp_path / "out", hashes=True)
    assert manifest.tokenizer_files == ["tokenizer.json"]
    assert (manifest.architecture, manifest.source) == ("Qwen2ForCausalLM", "decoder.onnx")
    assert (manifest.eos_token_ids, manifest.pad_token_id, manifest.max_position) == ([2, 3], 0, 200)
    model = onnx.load(exports("traced"))  # onnx.save moved the weights of the other
    assert cases.mean_difference(cases.run_original(model), cases.run_rewritten(tmp_path / "out")) < 1e-4
