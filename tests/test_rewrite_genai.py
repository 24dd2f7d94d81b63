"""Decoders of ONNX Runtime GenAI, with an HQMQ cache put in: against themselves and PyTorch."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
from typer.testing import CliRunner

from hqmq_trt.cli import app
from hqmq_trt.errors import HqmqError
from hqmq_trt.export.rewrite import analyse, rewrite_model
from hqmq_trt.export.targets import OPERATORS
from tests import genai_cases as genai
from tests import rewrite_cases as cases

BUILT: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "qwen3": ("qwen3", {}),
    "gemma2": ("gemma2", {}),
    "phi": ("phi", {}),
    "llama-multi-head": ("llama", {"multi_head": True}),
}
WAYS = [*BUILT, *genai.DECODERS]
DIMS = {"phi": 32, "interleaved": 32}
EXPECTED: dict[str, tuple[list[int], float, float]] = {
    "gemma2": ([9, 0], 5.0, 0.25),
    "sinks": ([7, 7], 5.0, 0.3),
    "phi": ([0, 0], 0.0, 32**-0.5),
    "interleaved": ([0, 0], 0.0, 32**-0.5),
}


class Decoders:
    """ONNX files by way, and what running them gives, each made once."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.made: dict[str, Path] = {}
        self._results: dict[tuple[str, str], Any] = {}

    def __call__(self, way: str) -> Path:
        if way not in self.made:
            folder = self.root / way
            folder.mkdir(exist_ok=True)
            if way == "sinks" and genai.OLD_KERNELS:
                pytest.skip("this ONNX Runtime has other windows in GroupQueryAttention")
            if way in genai.DECODERS:
                self.made[way] = folder / "model.onnx"
                onnx.save(genai.make_decoder(**genai.DECODERS[way]), self.made[way])
            else:
                needs_builder()
                name, options = BUILT[way]
                self.made[way] = genai.build(name, folder, **options)
        return self.made[way]

    def once(self, way: str, what: str, make: Callable[[], Any]) -> Any:
        key = way, what
        if key not in self._results:
            self._results[key] = make()
        return self._results[key]

    def lengths(self, way: str) -> Any:
        return genai.SINGLE if way == "llama-multi-head" else cases.LENGTHS

    def original(self, way: str) -> Any:
        """Logits of the file itself."""
        return self.once(way, "original", lambda: genai.run_genai(self(way), self.lengths(way), DIMS.get(way, 16)))

    def written(self, way: str) -> Any:
        """The model without operators of com.microsoft."""
        return self.once(way, "written", lambda: genai.written_out(self(way)))


def needs_builder() -> None:
    if not genai.INSTALLED:
        pytest.skip("onnxruntime-genai is not installed (it has no wheels for Python 3.10)")


@pytest.fixture(scope="module")
def decoders(tmp_path_factory: pytest.TempPathFactory) -> Decoders:
    return Decoders(tmp_path_factory.mktemp("genai"))


@pytest.mark.parametrize("way", WAYS)
def test_recognised(decoders: Decoders, way: str) -> None:
    """Heads, head_dim (which the files leave symbolic), scale, window, soft-cap and sinks are those of the model."""
    found = analyse(decoders(way))
    assert found.problems == []
    windows, softcap, scale = EXPECTED.get(way, ([0, 0], 0.0, 0.25))
    assert [layer.window for layer in found.layers] == windows
    for index, layer in enumerate(found.layers):
        kv_heads = 4 if way == "multi-head" else 2
        assert (layer.num_heads, layer.num_kv_heads, layer.head_dim) == (4, kv_heads, DIMS.get(way, 16))
        assert layer.key.past.name == f"past_key_values.{index}.key"
        assert layer.scale == pytest.approx(scale, rel=1e-6)
        assert layer.softcap == softcap
        assert (layer.sinks is not None) == (way in ("sinks", "outside"))


@pytest.mark.parametrize("way", WAYS)
def test_written_out_is_the_same(decoders: Decoders, way: str) -> None:
    """Without its operators of com.microsoft, the model gives the same logits with its own cache."""
    model = decoders.written(way)
    assert {node.domain for node in model.graph.node} == {""}
    found = cases.run_original(model, decoders.lengths(way), rounded=False)
    assert cases.difference(decoders.original(way), found) < 1e-4


@pytest.mark.parametrize(("way", "mode"), [*((way, "fused") for way in WAYS), ("gemma2", "qdq"), ("sinks", "qdq")])
def test_unpacked_cache_changes_nothing(decoders: Decoders, tmp_path: Path, way: str, mode: str) -> None:
    """Scheme fp16 equals the original, K and V rounded to float16 likewise (see tests/test_rewrite.py). Those of a
    model without com.microsoft are rounded, as K is rotated inside of GroupQueryAttention."""
    rewrite_model(decoders(way), tmp_path / "out", "fp16@p8", mode=mode)
    nodes = onnx.load(tmp_path / "out" / "model.onnx").graph.node
    assert {node.domain for node in nodes} == {"", "com.hqmq"}
    assert {node.op_type for node in nodes if not node.domain} <= OPERATORS["tensorrt-10"]
    found = cases.run_rewritten(tmp_path / "out")
    rounded = decoders.once(way, "rounded", lambda: cases.run_original(decoders.written(way), decoders.lengths(way)))
    assert cases.mean_difference(rounded, found) < 1e-4
    assert cases.difference(rounded, found) < 5e-3
    plain = decoders.original(way)
    assert cases.difference(plain, found) < 2e-2
    assert cases.mean_difference(rounded, found) < 0.3 * cases.mean_difference(plain, found)


@pytest.mark.parametrize("way", ["llama", "gemma2", "llama-multi-head"])
def test_packed_cache_is_that_of_torch(decoders: Decoders, tmp_path: Path, way: str) -> None:
    """hq4 equals the PyTorch model with the same HqmqCache, and is not the unpacked one."""
    rewrite_model(decoders(way), tmp_path / "out", "hq4@p8")
    found = cases.run_rewritten(tmp_path / "out")
    model = genai.make_model(BUILT[way][0])
    assert cases.divergence(cases.run_torch(model, "hq4@p8"), found) < 1e-4
    assert cases.divergence(cases.run_torch(model, "fp16@p8"), found) > 1e-4


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_quantised_weights(tmp_path: Path, precision: str) -> None:
    """MatMulNBits: 4 bits stay 4 bits, 8 bits become dense; the same as the original with float32 activations, which
    it computes with int8 ones (accuracy_level 4), as ONNX Runtime does with what 4 bits become."""
    needs_builder()
    path = genai.build("qwen2", tmp_path, precision)
    exact = onnx.load(path)
    for node in exact.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 1
    onnx.save(exact, tmp_path / "exact.onnx")
    rewrite_model(path, tmp_path / "out", "fp16@p8")
    model = onnx.load(tmp_path / "out" / "model.onnx")
    kinds = {tensor.data_type for tensor in model.graph.initializer}
    assert (onnx.TensorProto.INT4 in kinds) == (precision == "int4")
    assert {node.domain for node in model.graph.node} == {"", "com.hqmq"}
    found = cases.run_rewritten(tmp_path / "out")
    if precision == "int8":
        assert cases.difference(genai.run_genai(tmp_path / "exact.onnx"), found) < 2e-2
    assert cases.divergence(genai.run_genai(path), found) < 1e-3


def test_half_precision(tmp_path: Path) -> None:
    """A float16 model, as the builder makes them for GPUs."""
    needs_builder()
    path = genai.build("qwen3", tmp_path, "fp16", provider="cuda")
    manifest = rewrite_model(path, tmp_path / "out", "fp16@p8")
    assert (manifest.dtype, manifest.logits_dtype) == ("float16", "float16")
    single = rewrite_model(genai.build("qwen3", tmp_path / "single"), tmp_path / "out32", "fp16@p8")
    assert single.dtype == "float32"
    wanted, found = (cases.run_rewritten(tmp_path / name) for name in ("out32", "out"))
    assert cases.divergence(wanted, found) < 1e-3


def test_nothing_is_left_over(decoders: Decoders, tmp_path: Path) -> None:
    """Our interface, one operator a layer; a second run has nothing to do. Configurations beside the file are read."""
    manifest = rewrite_model(decoders("sinks"), tmp_path / "out", "hq4@p8")
    assert [(layer.window, layer.softcap, layer.has_sinks) for layer in manifest.layers] == [(7, 5.0, True)] * 2
    model = onnx.load(tmp_path / "out" / "model.onnx")
    assert {opset.domain for opset in model.opset_import} == {"", "com.hqmq"}
    assert [value.name for value in model.graph.input[:4]] == [
        "input_ids", "past_length", "new_length", "logits_index",
    ]  # fmt: skip
    kinds = [node.op_type for node in model.graph.node]
    assert kinds.count("HqmqAttention") == 2
    assert not {"Softmax", "Where", "LessOrEqual", "ReduceSum"} & set(kinds)
    with pytest.raises(HqmqError, match="nothing to do"):
        rewrite_model(tmp_path / "out" / "model.onnx", tmp_path / "again")


def test_configuration_of_genai(decoders: Decoders, tmp_path: Path) -> None:
    manifest = rewrite_model(decoders("llama"), tmp_path / "out", "hq4@p8")
    assert (manifest.eos_token_ids, manifest.pad_token_id, manifest.max_position) == ([2], 0, 256)
    assert manifest.tokenizer_files == ["tokenizer.json", "tokenizer_config.json"]


# What is refused


def test_mixture_of_experts(tmp_path: Path) -> None:
    needs_builder()
    with pytest.raises(HqmqError, match=r"moe/MoE' \(MoE\): the operator MoE of com.microsoft is not known"):
        rewrite_model(genai.build("gptoss", tmp_path), tmp_path / "out")


def refuse(change: Callable[[Any], None], tmp_path: Path, *words: str, **options: Any) -> None:
    model = genai.make_decoder(**options)
    change(model)
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    with pytest.raises(HqmqError) as info:
        rewrite_model(path, tmp_path / "out", "hq4@p8")
    message = str(info.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert not [p.name for p in tmp_path.iterdir() if "out" in p.name]


def node(model: Any, kind: str, count: int = 0) -> Any:
    return [node for node in model.graph.node if node.op_type == kind][count]


def put(kind: str, count: int = 0, **attributes: Any) -> Callable[[Any], None]:
    """Set attributes of a node."""

    def change(model: Any) -> None:
        found = node(model, kind, count)
        for name, value in attributes.items():
            kept = [attribute for attribute in found.attribute if attribute.name != name]
            del found.attribute[:]
            found.attribute.extend([*kept, onnx.helper.make_attribute(name, value)])

    return change


def feed(kind: str, place: int, name: str) -> Callable[[Any], None]:
    """Let an input of a node be another value."""

    def change(model: Any) -> None:
        inputs = node(model, kind).input
        inputs.extend([""] * (place + 1 - len(inputs)))
        inputs[place] = name

    return change


GROUP, MULTI = "GroupQueryAttention", "MultiHeadAttention"
MULTI_OPTIONS = {key: value for key, value in genai.DECODERS["multi-head"].items() if key != "opset"}
REFUSED: dict[str, tuple[Callable[[Any], None], list[str], dict[str, Any]]] = {
    "unknown-attribute": (put(GROUP, 1, tilt=3), [GROUP, "attribute tilt is not known"], {}),
    "bidirectional": (put(GROUP, causal=0), [GROUP, "causal = 0"], {}),
    "scores": (put(GROUP, qk_output=1), [GROUP, "qk_output = 1"], {}),
    "quantised-type": (put(GROUP, k_quant_type="PER_TENSOR"), [GROUP, "quantised (k_quant_type)"], {}),
    "quantised-scale": (feed(GROUP, 12, "cos_cache"), [GROUP, "quantised (k_scale)"], {}),
    "no-cos-cache": (feed(GROUP, 7, ""), [GROUP, "has no cos_cache"], {}),
    "no-past": (feed(GROUP, 3, ""), [GROUP, "only attention with a cache"], {}),
    "ragged": (feed(GROUP, 16, "Cast.2:0"), [GROUP, "query_seqlens"], {}),
    "lengths": (feed(GROUP, 5, "Cast.5:0"), [GROUP, "seqlens_k"], {}),
    "short-tables": (put(GROUP, num_heads=3), [GROUP, "no multiple"], {}),
    "interleaved-lie": (put(GROUP, num_heads=8), [GROUP], {}),
    "operator": (lambda m: setattr(node(m, "FastGelu"), "op_type", "Wavy"), ["Wavy", "is not known"], {}),
    "norm": (put("SimplifiedLayerNormalization", axis=1), ["SimplifiedLayerNormalization", "axis 1"], {}),
    "norm-attribute": (put("SkipSimplifiedLayerNormalization", 1, tilt=1), ["Skip", "tilt"], {}),
    "mask-of-scores": (feed(MULTI, 8, "Cast.0:0"), [MULTI, "past_sequence_length"], MULTI_OPTIONS),
    "half-a-cache": (feed(MULTI, 7, ""), ["past_key_values.0.value"], MULTI_OPTIONS),
    "not-causal": (put(MULTI, unidirectional=0), ["neither causal nor"], MULTI_OPTIONS),
    "rotary-scale": (put("RotaryEmbedding", scale=2.0), ["RotaryEmbedding", "scale = 2.0"], MULTI_OPTIONS),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, tmp_path: Path) -> None:
    change, words, options = REFUSED[case]
    refuse(change, tmp_path, *words, **options)


def test_quantised_cache(tmp_path: Path) -> None:
    """A cache of int8, known by its type."""

    def change(model: Any) -> None:
        for value in (*model.graph.input, *model.graph.output):
            if value.name.split(".")[0] in ("past_key_values", "present"):
                value.type.tensor_type.elem_type = onnx.TensorProto.INT8

    refuse(change, tmp_path, GROUP, "past_key_values.0.key", "quantised")


def test_symbolic_heads(tmp_path: Path) -> None:
    """head_dim is symbolic everywhere, and nothing tells the width of the queries."""

    def change(model: Any) -> None:
        weight = node(model, "MatMul").input[1]
        kept = [tensor for tensor in model.graph.initializer if tensor.name != weight]
        given = onnx.helper.make_tensor_value_info(weight, onnx.TensorProto.FLOAT, [64, "wide"])
        del model.graph.initializer[:]
        model.graph.initializer.extend(kept)
        model.graph.input.append(given)

    refuse(change, tmp_path, GROUP, "head_dim is symbolic")


def test_inspect_explains(tmp_path: Path) -> None:
    """One layer is understood, of the other the reason is said with the node's name."""
    model = genai.make_decoder()
    put(GROUP, 0, tilt=3)(model)
    path = tmp_path / "model.onnx"
    onnx.save(model, path)
    found = analyse(path)
    assert [layer.key.past.name for layer in found.layers] == ["past_key_values.1.key"]
    for arguments in (["inspect", str(path)], ["export", str(path), "--dry-run"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0
        assert "attribute tilt is not known" in " ".join(result.output.split())
