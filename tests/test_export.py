"""The exporter: tiny random models through ONNX Runtime, against PyTorch with an HqmqCache of the same semantics."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import transformers
from torch import Tensor

from hqmq_trt import ort_library, schemas
from hqmq_trt.cache import HqmqCache
from hqmq_trt.export import export_model
from hqmq_trt.manifest import Manifest
from tests.tiny_decoders import make_model

PAGES = 12
LENGTHS = ([19, 11, 3], [6, 1, 0], [1, 1, 1], [1, 1, 1])
"""Tokens that each of three sequences gets in each step: prefill, a chunk, two single tokens."""


class Exported:
    """An exported folder in ONNX Runtime, with our library or with nothing but what the file holds."""

    def __init__(self, folder: Path, library: bool = True) -> None:
        self.manifest = Manifest.load(folder, hashes=True)
        path = folder / self.manifest.model_file
        if library:
            self.session = ort_library.session(path, threads=2)
        else:
            self.session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        self.names = [value.name for value in self.session.get_outputs()]
        batch = len(LENGTHS[0])
        self.length = np.zeros(batch, np.int32)
        self.cache = {
            f"past.{name}": np.zeros(spec.shape, spec.dtype) for name, spec in self.manifest.cache(batch, PAGES)
        }

    def step(self, ids: np.ndarray, new: list[int]) -> np.ndarray:
        """Logits [B, T, V] of right-padded ids [B, T]."""
        batch, rows = ids.shape
        feed = {
            "input_ids": ids,
            "past_length": self.length,
            "new_length": np.array(new, np.int32),
            "logits_index": np.tile(np.arange(rows), (batch, 1)),
            **self.cache,
        }
        results = dict(zip(self.names, self.session.run(None, feed), strict=True))
        self.length = results.pop("present_length")
        logits: np.ndarray = results.pop("logits")
        self.cache = {name.replace("present", "past", 1): value for name, value in results.items()}
        return logits

    def run(self, ids: np.ndarray, lengths: Sequence[Sequence[int]]) -> list[Tensor]:
        """Logits [tokens, V] of each sequence of ids [B, most tokens], in one batch that is right-padded in every step;
        `lengths`: tokens that each sequence gets, by step."""
        rows: list[list[Tensor]] = [[] for _ in ids]
        done = np.zeros(len(ids), int)
        for new in lengths:
            padded = np.zeros((len(ids), max(new)), np.int64)
            for b, count in enumerate(new):
                padded[b, :count] = ids[b, done[b] : done[b] + count]
            logits = self.step(padded, list(new))
            for b, count in enumerate(new):
                rows[b].append(torch.from_numpy(logits[b, :count]))
            done += new
        assert np.array_equal(self.length, done)
        return [torch.cat(parts) for parts in rows]


def tokens() -> np.ndarray:
    total = np.sum(LENGTHS, 0).max()
    return np.random.default_rng(5).integers(3, 97, (len(LENGTHS[0]), total))


def run_exported(exported: Exported) -> list[Tensor]:
    """Logits [tokens, V] of each sequence, in steps of LENGTHS."""
    return exported.run(tokens(), LENGTHS)


def run_torch(model: Any, cache_of: Callable[[], Any]) -> list[Tensor]:
    """The same, each sequence on its own through PyTorch."""
    ids, rows = tokens(), []
    for b in range(len(LENGTHS[0])):
        cache, parts, done = cache_of(), [], 0
        for new in LENGTHS:
            if new[b]:
                piece = torch.from_numpy(ids[b : b + 1, done : done + new[b]])
                with torch.no_grad():
                    parts.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0])
                done += new[b]
        rows.append(torch.cat(parts))
    return rows


def divergence(reference: list[Tensor], found: list[Tensor]) -> float:
    """Mean KL(reference || found) over all tokens, in nats."""
    p, q = (torch.cat(rows).double().log_softmax(1) for rows in (reference, found))
    return float((p.exp() * (p - q)).sum(1).mean())


def check(folder: Path) -> onnx.ModelProto:
    model = onnx.load(folder / "model.onnx")
    assert onnx.defs.has("HqmqAttention", "com.hqmq"), schemas.__name__
    onnx.checker.check_model(model, full_check=True)
    return model


class Exports:
    """Exports by (model, scheme, mode, fold), each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[tuple[str, str, str, bool], tuple[Any, Path]] = {}

    def __call__(self, name: str, scheme: str, mode: str = "fused", fold: bool = True) -> tuple[Any, Path]:
        """(the model, the folder)."""
        key = (name, scheme, mode, fold)
        if key not in self.made:
            model, folder = make_model(name), self.root / str(len(self.made))
            before = {name: value.clone() for name, value in model.state_dict().items()}
            export_model(model, folder, scheme, mode=mode, fold=fold)
            assert model.config._attn_implementation == "eager"
            assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
            self.made[key] = model, folder
        model, folder = self.made[key]
        model.set_attn_implementation("eager")
        return model, folder


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Exports:
    return Exports(tmp_path_factory.mktemp("exports"))


FUSED = [
    ("llama", "hq4@p8"),
    ("llama64", "hq3@p8"),
    ("llama64", "k=hq3,v=hq2.5@p8"),
    ("qwen2", "k=hq4,v=hq5@p8"),
    ("qwen3", "paper:s96_r4+med3@p8"),
    ("mistral", "hq4@p8"),
    ("gemma2", "hq5@p8"),
]


@pytest.mark.parametrize(("name", "scheme"), FUSED)
def test_fused_is_torch_with_the_same_cache(exports: Exports, name: str, scheme: str) -> None:
    """Prefill, a chunk and single tokens of an uneven batch."""
    model, folder = exports(name, scheme)
    proto = check(folder)
    assert [node.name for node in proto.graph.node if node.domain] == ["layers.0.attention", "layers.1.attention"]
    found = run_exported(Exported(folder))
    reference = run_torch(model, lambda: HqmqCache.for_model(model, scheme))
    assert torch.cat(reference).std() > 0.3  # a flat distribution would hide every mistake
    assert divergence(reference, found) < 1e-4


@pytest.mark.parametrize(("name", "scheme"), [("llama", "hq4@p8"), ("gemma2", "paper:s8_r3+med3@p8")])
def test_qdq_with_library_and_with_function_bodies(exports: Exports, name: str, scheme: str) -> None:
    """HqmqQuantize, HqmqDequantize, ordinary attention: our kernels, plain ONNX Runtime and PyTorch agree."""
    if onnxruntime.__version__.startswith("1.23."):
        pytest.skip("ONNX Runtime 1.23 binds a node to the wrong overload of a local function (docs/export.md)")
    model, folder = exports(name, scheme, "qdq")
    proto = check(folder)
    kinds = [node.op_type for node in proto.graph.node if node.domain]
    assert kinds == ["HqmqQuantize", "HqmqDequantize"] * 4
    assert {(f.name, f.overload) for f in proto.functions} == {
        (node.op_type, node.overload) for node in proto.graph.node if node.domain
    }
    reference = run_torch(model, lambda: HqmqCache(model.config, scheme))
    with_library, plain = (Exported(folder, library) for library in (True, False))
    assert divergence(reference, run_exported(with_library)) < 1e-4
    assert divergence(reference, run_exported(plain)) < 1e-4
    for key, value in with_library.cache.items():
        assert np.mean(value == plain.cache[key]) > 0.98, key


@pytest.mark.parametrize(("name", "mode"), [("llama", "fused"), ("qwen2", "qdq"), ("mistral", "qdq")])
def test_fp16_scheme_is_the_model(exports: Exports, name: str, mode: str) -> None:
    """Nothing compressed: PyTorch with an fp16 cache to 1e-3 of a logit, and the model itself to what fp16 loses."""
    model, folder = exports(name, "fp16@p8", mode)
    check(folder)
    found = run_exported(Exported(folder))
    same = run_torch(model, lambda: HqmqCache(model.config, "fp16@p8"))
    original = run_torch(model, lambda: transformers.DynamicCache(config=model.config))
    assert torch.cat(original).std() > 0.3
    assert max(float((a - b).abs().max()) for a, b in zip(same, found, strict=True)) < 1e-3
    assert divergence(original, found) < 1e-6


@pytest.mark.parametrize(("mode", "scheme"), [("fused", "k=hq4,v=hq5@p8"), ("qdq", "hq5@p8")])
def test_folding_changes_nothing(exports: Exports, mode: str, scheme: str) -> None:
    """V's rotation in the weights (with a bias) or in the operator: one result, but for rounding of V to fp16."""
    results = []
    for fold in (True, False):
        _, folder = exports("qwen2", scheme, mode, fold)
        manifest = Manifest.load(folder)
        assert [layer.value_rotation_folded for layer in manifest.layers] == [fold, fold]
        attribute = "v_hadamard" if mode == "fused" else "hadamard"
        nodes = [n for n in check(folder).graph.node if n.name.endswith(("attention", "value.quantize"))]
        assert {a.i for n in nodes for a in n.attribute if a.name == attribute} == {int(not fold)}
        results.append(run_exported(Exported(folder)))
    assert divergence(*results) < 1e-4


def test_tied_weights_are_stored_once(exports: Exports) -> None:
    """One embedding for both ends, and names as in the model."""
    proto = onnx.load(exports("llama64", "hq3@p8")[1] / "model.onnx")
    shapes = {t.name: list(t.dims) for t in proto.graph.initializer}
    assert [shape for shape in shapes.values() if 97 in shape] == [[97, 64]]
    assert "model.layers.1.mlp.up_proj.weight" in shapes


def test_external_weights(exports: Exports, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large models keep weights beside the graph; the result is the same."""
    model, folder = exports("llama", "hq4@p8")
    monkeypatch.setattr("hqmq_trt.export.compile._EXTERNAL_ABOVE", 0)
    monkeypatch.setattr("hqmq_trt.export.compile._EXTERNAL_TENSOR", 1000)
    manifest = export_model(model, tmp_path / "m", "hq4@p8")
    assert [file.purpose for file in manifest.files] == ["model", "weights"]
    one, two = (run_exported(Exported(path)) for path in (folder, tmp_path / "m"))
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_models(tmp_path: Path, dtype: str) -> None:
    """fp16 and bf16 weights: types in the graph and the manifest (ONNX Runtime's CPU kernels run fp16 only)."""
    model = make_model("llama").to(getattr(torch, dtype))
    manifest = export_model(model, tmp_path / "m", "hq4@p8")
    assert (manifest.dtype, manifest.logits_dtype) == (dtype, dtype)
    proto = check(tmp_path / "m")
    assert {onnx.TensorProto.DataType.Name(t.data_type) for t in proto.graph.initializer if "proj" in t.name} == {
        dtype.upper()
    }
    if dtype == "float16":
        reference = run_torch(model, lambda: HqmqCache.for_model(model, "hq4@p8"))
        assert divergence(reference, run_exported(Exported(tmp_path / "m"))) < 1e-2


def test_scores_of_half_precision_models_are_float32(tmp_path: Path) -> None:
    """qdq mode: float16 cannot hold the products of Qwen2.5's queries and keys (ONNX Runtime's CPU kernels would not
    show it: they compute in float32)."""
    export_model(make_model("qwen2").to(torch.float16), tmp_path / "m", "hq4@p8", mode="qdq")
    graph = onnx.shape_inference.infer_shapes(check(tmp_path / "m"), strict_mode=True).graph
    types = {v.name: v.type.tensor_type.elem_type for v in [*graph.value_info, *graph.output]}
    weights = {tensor.name for tensor in graph.initializer}
    products = [node for node in graph.node if node.op_type == "MatMul" and not weights & set(node.input)]
    assert len(products) == 4  # scores and values of two layers
    assert {types[name] for node in products for name in [*node.input, *node.output]} == {onnx.TensorProto.FLOAT}
