"""The operators' contract: what is made from its tables, and the nodes of exported graphs against it."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
import transformers

from hqmq_trt import contract, contract_text, schemas
from hqmq_trt.contract import ATTENTION, DEQUANTIZE, QUANTIZE, Attribute, TensorSpec
from hqmq_trt.contract_check import NodeTensor, check_model, check_node
from hqmq_trt.errors import HqmqError
from hqmq_trt.export import export_model
from hqmq_trt.format import FORMAT_VERSION, cache_tensors, mask_words, scale_words, words_per_token
from hqmq_trt.manifest import Manifest
from hqmq_trt.scheme import Scheme

ROOT = Path(__file__).parent.parent
SCHEMES = (
    *("fp16", "hq3", "hq3.5", "hq4", "hq5", "hq:s21_r3-sinks", "paper:s96_r4+med3"),
    *("k=hq4,v=fp16@p128", "k=fp16,v=paper:s5_r2+med3", "k=hq3,v=hq2.5"),
)
HEADS, HEAD_DIM, PAGES = 2, 32, 3


@pytest.mark.parametrize(
    ("path", "make", "option"),
    [
        ("docs/contract.md", contract_text.markdown, "--markdown"),
        ("plugins/trt/contract_table.h", contract_text.header, "--header"),
    ],
)
def test_committed_texts_are_what_is_made(path: str, make: Any, option: str) -> None:
    assert (ROOT / path).read_text(encoding="utf-8") == make(), f"run python -m hqmq_trt.contract {option} > {path}"


def attributes_of(op_type: str, scheme: Scheme, role: str = "key", **options: Any) -> dict[str, Attribute]:
    if op_type == ATTENTION:
        return contract.attention_attributes(scheme, HEAD_DIM, 0.25, **options)
    return {
        **contract.role_attributes(scheme.role(role), HEAD_DIM, scheme.page_size),
        **contract.common_attributes(scheme.page_size),
    }


def sizes(scheme: Scheme, role: str) -> dict[str, int]:
    codec, page = scheme.role(role), scheme.page_size
    return {
        **{"B": 3, "H": HEADS, "Hq": 4, "T": 5, "D": HEAD_DIM, "M": PAGES, "M*P": PAGES * page},
        "P+N": page + codec.sink_tokens,
        "S": codec.secondaries,
        "2^r": 2**codec.radius_bits,
        "W": words_per_token(codec, HEAD_DIM),
        "U": mask_words(HEAD_DIM, page),
        "Z": scale_words(codec, page),
        "C": codec.outlier_capacity(HEAD_DIM, page),
    }


def tensors_of(specs: tuple[TensorSpec, ...], scheme: Scheme, role: str, activation: str) -> list[NodeTensor]:
    """Each tensor as the contract wants it; in HqmqAttention its name says the role."""
    result = []
    for spec in specs:
        own = "value" if "value_" in spec.name.replace("outlier_value", "") else role
        known = sizes(scheme, own)
        shape = tuple(dim if isinstance(dim, int) else known[dim] for dim in spec.shape)
        result.append(NodeTensor(activation if spec.dtype == contract.ACTIVATION else spec.dtype, shape))
    return result


@dataclasses.dataclass
class Node:
    op_type: str
    attributes: dict[str, Attribute]
    inputs: list[NodeTensor]
    outputs: list[NodeTensor]

    def check(self) -> None:
        check_node(self.op_type, self.attributes, self.inputs, self.outputs, "layer")


def node(op_type: str, name: str, role: str = "key", activation: str = "float16", **options: Any) -> Node:
    scheme = Scheme.parse(name)
    attributes = attributes_of(op_type, scheme, role, **options)
    op = contract.operator(op_type)
    inputs, outputs = op.present_inputs(attributes), op.present_outputs(attributes)
    return Node(
        op_type,
        attributes,
        tensors_of(inputs, scheme, role, activation),
        tensors_of(outputs, scheme, role, activation),
    )


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("role", ["key", "value"])
def test_cache_tensors_are_those_of_the_format(name: str, role: str) -> None:
    """contract.py says with symbols what format.py says with numbers."""
    scheme = Scheme.parse(name)
    wanted = [(t.name, t.dtype, t.shape) for t in cache_tensors(scheme.role(role), scheme.page_size, HEAD_DIM, 2, 3, 3)]
    for op_type, prefix in ((QUANTIZE, ""), (DEQUANTIZE, ""), (ATTENTION, f"{role}_")):
        attributes = attributes_of(op_type, scheme, role)
        op = contract.operator(op_type)
        lists = [op.present_inputs(attributes)]
        if op_type != DEQUANTIZE:
            lists.append(op.present_outputs(attributes))
        for specs in lists:
            tensors = tensors_of(specs, scheme, role, "float16")
            names = [(spec.alias or spec.name).removeprefix(prefix) for spec in specs]
            held = {t[0] for t in wanted}
            found = [(n, t.dtype, t.shape) for n, t in zip(names, tensors, strict=True) if n in held]
            assert found == wanted


@pytest.mark.parametrize("op", contract.OPERATORS, ids=lambda op: op.name)
def test_tables_are_sound(op: contract.OperatorSpec) -> None:
    names = [spec.name for spec in op.attributes]
    assert len(set(names)) == len(names)
    inputs = {spec.name: spec for spec in op.inputs}
    assert len(inputs) == len(op.inputs)
    assert set(names) == set(attributes_of(op.name, Scheme.parse("hq4")))
    for spec in op.outputs:
        if spec.alias:
            source = inputs[spec.alias]
            assert (spec.dtype, spec.shape, spec.when) == (source.dtype, source.shape, source.when)
    for spec in (*op.inputs, *op.outputs):
        assert set(spec.when) <= set(names)


def test_ranges_are_those_of_schemes() -> None:
    page = next(spec for spec in contract.operator(QUANTIZE).attributes if spec.name == "page_size")
    for size in (int(page.low), int(page.high)):
        assert Scheme.parse(f"hq4@p{size}").page_size == size
    for size in (int(page.low) // 2, int(page.high) * 2, 24):
        with pytest.raises(HqmqError, match="page size"):
            Scheme.parse(f"hq4@p{size}")


@pytest.mark.parametrize("op", contract.OPERATORS, ids=lambda op: op.name)
def test_schemas_are_registered(op: contract.OperatorSpec) -> None:
    assert schemas.schemas()
    schema = onnx.defs.get_schema(op.name, domain=contract.DOMAIN)
    assert set(schema.attributes) == {spec.name for spec in op.attributes}
    assert all(attribute.required for attribute in schema.attributes.values())
    assert schema.max_input > 64
    assert schema.min_input == sum(not spec.when for spec in op.inputs)
    assert schema.min_output == sum(not spec.when for spec in op.outputs)


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("activation", contract.ACTIVATION_DTYPES)
def test_nodes_as_they_should_be(name: str, activation: str) -> None:
    for role in ("key", "value"):
        node(QUANTIZE, name, role, activation).check()
        node(DEQUANTIZE, name, role).check()
    node(ATTENTION, name, activation=activation, has_sinks=True, window=7, softcap=30.0).check()
    plain = node(ATTENTION, name, activation=activation)
    plain.check()
    plain.inputs = [NodeTensor(None, None)] * len(plain.inputs)  # a graph may say nothing
    plain.check()


WRONG_ATTRIBUTES: list[tuple[dict[str, Any], str]] = [
    ({"k_gain": None}, "attribute 'k_gain' is missing"),
    ({"gain": 1}, "attribute 'gain' is unknown"),
    ({"window": 1.0}, "attribute 'window' is 1.0, expected int"),
    ({"window": True}, "attribute 'window' is True, expected int"),
    ({"scale": 1}, "attribute 'scale' is 1, expected float"),
    ({"scale": float("nan")}, "attribute 'scale' is nan, outside"),
    ({"softcap": -1.0}, "attribute 'softcap' is -1.0, outside"),
    ({"v_radius_bits": 9}, "attribute 'v_radius_bits' is 9, outside 1…8"),
    ({"page_size": 48}, "attribute 'page_size' is 48, no power of two"),
    ({"plugin_version": "2"}, "attribute 'plugin_version' is '2', expected '1'"),
    ({"plugin_namespace": 1}, "attribute 'plugin_namespace' is 1, expected str"),
    ({"format_version": 1}, f"cache format 1, but this hqmq-trt has {FORMAT_VERSION}"),
    ({"has_sinks": 1}, "inputs, its attributes ask for"),
    ({"k_outlier_capacity": 7}, "inputs, its attributes ask for"),
    ({"k_sink_tokens": None}, "attribute 'k_sink_tokens' is missing"),
    ({"v_sink_tokens": 9}, "attribute 'v_sink_tokens' is 9, outside 0…8"),
    ({"v_sink_tokens": 0}, "value_tail': dimension value_P\\+N is 68, but 64 of page_size and v_sink_tokens"),
]


@pytest.mark.parametrize(("change", "message"), WRONG_ATTRIBUTES)
def test_wrong_attributes(change: dict[str, Any], message: str) -> None:
    wrong = node(ATTENTION, "hq4")
    wrong.attributes = {k: v for k, v in {**wrong.attributes, **change}.items() if v is not None}
    with pytest.raises(HqmqError, match=message) as info:
        wrong.check()
    assert "HqmqAttention 'layer'" in str(info.value)


WRONG_TENSORS: list[tuple[str, str, NodeTensor, str]] = [
    ("inputs", "k", NodeTensor("float32", None), "input 'k' is float32, expected float16"),
    ("inputs", "past_length", NodeTensor("int64", None), "input 'past_length' is int64, expected int32"),
    ("outputs", "present_value_tail", NodeTensor("float32", None), "'present_value_tail' is float32"),
    ("inputs", "k", NodeTensor(None, (3, 2, 5)), "input 'k' has shape"),
    ("inputs", "v", NodeTensor(None, (3, 3, 5, 32)), "dimension H is 3, but 2 of"),
    ("inputs", "q", NodeTensor(None, (3, 5, 5, 32)), "q has 5 heads"),
    ("inputs", "key_scales", NodeTensor(None, (3, 2, 192)), "input 'key_scales' has shape"),
    ("inputs", "value_scales", NodeTensor(None, (3, 2, 3, 32)), "value_Z is 32"),
    ("inputs", "key_scales", NodeTensor(None, (3, 2, 3, 17)), "key_Z is 17, head_dim 32 needs 16"),
    ("inputs", "key_levels", NodeTensor(None, (8,)), "dimension key_2\\^r is 8, but 16 of radius_bits"),
    ("inputs", "value_codes", NodeTensor(None, (3, 2, 192, 5)), "W is 5"),
    ("inputs", "key_tail", NodeTensor(None, (3, 2, 64, 32)), "key_P\\+N is 64, but 68 of page_size and k_sink_tokens"),
    ("inputs", "key_mean", NodeTensor(None, (3, 2, 4, 32)), "dimension M is 4, but 3 of"),
]


@pytest.mark.parametrize(("kind", "name", "tensor", "message"), WRONG_TENSORS)
def test_wrong_tensors(kind: str, name: str, tensor: NodeTensor, message: str) -> None:
    wrong = node(ATTENTION, "hq4")
    op = contract.operator(ATTENTION)
    specs = op.present_inputs(wrong.attributes) if kind == "inputs" else op.present_outputs(wrong.attributes)
    at = [spec.name for spec in specs].index(name)
    held: list[NodeTensor] = getattr(wrong, kind)
    held[at] = NodeTensor(tensor.dtype or held[at].dtype, tensor.shape or held[at].shape)
    same = [spec.name for spec in op.present_outputs(wrong.attributes)]
    if kind == "inputs" and (other := {"q": "y"}.get(name, f"present_{name}")) in same:
        wrong.outputs[same.index(other)] = held[at]
    with pytest.raises(HqmqError, match=message):
        wrong.check()


def test_pages_that_are_not_the_rows() -> None:
    wrong = node(QUANTIZE, "hq4")
    names = [spec.name for spec in contract.operator(QUANTIZE).present_inputs(wrong.attributes)]
    at = names.index("codes")
    shape = wrong.inputs[at].shape
    assert shape is not None
    wrong.inputs[at] = wrong.outputs[0] = NodeTensor("int32", (3, 2, 256, *shape[3:]))
    with pytest.raises(HqmqError, match="256 rows and 3 pages of 64"):
        wrong.check()


def test_unknown_operator() -> None:
    with pytest.raises(HqmqError, match="HqmqOther"):
        check_node("HqmqOther", {}, [], [])


def tiny_model(**changes: Any) -> Any:
    torch.manual_seed(0)
    base: dict[str, Any] = {
        "vocab_size": 32,
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**base, **changes})).eval()


@pytest.mark.parametrize("mode", ["qdq", "fused"])
@pytest.mark.parametrize("scheme", ["fp16", "hq4", "paper:s96_r4+med3", "k=hq3,v=fp16@p128"])
def test_exported_nodes_keep_the_contract(tmp_path: Path, mode: str, scheme: str) -> None:
    export_model(tiny_model(), tmp_path / "out", scheme=scheme, mode=mode)
    manifest = Manifest.load(tmp_path / "out")
    model = onnx.load(tmp_path / "out" / manifest.model_file, load_external_data=False)
    assert check_model(model) == {"qdq": 8, "fused": 2}[mode]
    held = next(n for n in model.graph.node if n.domain == contract.DOMAIN)
    next(a for a in held.attribute if a.name == "format_version").i += 1
    with pytest.raises(HqmqError, match="cache format") as info:
        check_model(model)
    assert held.name in str(info.value)
    del model.graph.node[:]
    with pytest.raises(HqmqError, match="no node"):
        check_model(model)
