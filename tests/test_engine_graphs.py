"""Exported graphs, as the engine builder hands them to TensorRT, hold nothing that TensorRT 10.6 cannot parse, or would
read otherwise in a strongly typed network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import TensorProto

from hqmq_trt import contract
from hqmq_trt.engine.network import engine_model
from hqmq_trt.export import export_model
from hqmq_trt.export.targets import OPERATORS
from tests.tiny_decoders import make_model

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16}
_NUMBERS = _FLOATS | {TensorProto.INT32, TensorProto.INT64}
_BOOL = {TensorProto.BOOL}
_ANY = _NUMBERS | _BOOL
_TYPES: dict[str, set[int]] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Min", "Max", "Clip", "Neg", "Abs"), _NUMBERS),
    **dict.fromkeys(("Less", "LessOrEqual", "Greater", "GreaterOrEqual", "Equal"), _NUMBERS),
    **dict.fromkeys(("Pow", "Sqrt", "Reciprocal", "Cos", "Sin", "Tanh", "Sigmoid", "Exp", "Erf", "Gelu"), _FLOATS),
    **dict.fromkeys(("MatMul", "Gemm", "Softmax", "ReduceMean", "ReduceSum"), _FLOATS),
    **dict.fromkeys(("LayerNormalization", "Relu", "TopK"), _FLOATS),
    **dict.fromkeys(("And", "Or", "Not", "Where"), _BOOL),
    **dict.fromkeys(("Cast", "Concat", "Expand", "Gather", "GatherND", "Reshape", "Shape", "Slice", "Split"), _ANY),
    **dict.fromkeys(("Squeeze", "Unsqueeze", "Transpose", "Identity"), _ANY),
    "Range": {TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64},
}
"""Types of the first input that docs/operators.md of onnx-tensorrt 10.6 lists (Clip: integers too, as its importer does
them by minimum and maximum), for the operators that our graphs have; which operators it knows: export/targets.py."""
_ONE_TYPE = ("Add", "Sub", "Mul", "Div", "Min", "Max", "Pow", "Less", "LessOrEqual", "Greater", "And", "MatMul", "Gemm")
_CONSTANT_INPUTS = {
    "Squeeze": (1,),
    "Unsqueeze": (1,),
    "ReduceMean": (1,),
    "ReduceSum": (1,),
    "Slice": (3, 4),
    "TopK": (1,),
}

CASES = [
    ("llama", "fused", "float16", "hq4"),
    ("llama", "qdq", "float16", "paper:s96_r4+med3"),
    ("qwen2", "qdq", "float32", "fp16"),
    ("qwen3", "fused", "bfloat16", "hq3"),
    ("gemma2", "qdq", "float16", "hq4"),
]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: "-".join(case).replace(":", "_"))
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    name, mode, dtype, scheme = request.param
    folder: Path = tmp_path_factory.mktemp("graphs") / "m"
    export_model(make_model(name).to(getattr(torch, dtype)), folder, scheme, mode=mode)
    made = engine_model(folder / "model.onnx")
    onnx.load_external_data_for_model(made, str(folder))
    return onnx.shape_inference.infer_shapes(made, check_type=True, strict_mode=False)


def types(model: Any) -> dict[str, int]:
    """Element type of every value of the main graph."""
    graph = model.graph
    found = {value.name: value.type.tensor_type.elem_type for value in (*graph.input, *graph.value_info, *graph.output)}
    return {**found, **{tensor.name: tensor.data_type for tensor in graph.initializer}}


def test_every_operator_is_parsed_with_its_types(model: Any) -> None:
    known = types(model)
    for node in model.graph.node:
        if node.domain:
            assert node.domain == contract.DOMAIN
            continue
        assert node.op_type in OPERATORS["tensorrt-10"], f"{node.name}: TensorRT 10.6 does not parse {node.op_type}"
        assert known[node.input[0]] in _TYPES[node.op_type], (
            f"{node.name}: {node.op_type} of type {known[node.input[0]]}"
        )


def test_logits_are_float32_with_their_sums(model: Any) -> None:
    onnx.checker.check_model(model, full_check=False)
    found = {}
    for value in model.graph.output:
        dims = [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
        found[value.name] = (value.type.tensor_type.elem_type, dims)
    kind, dims = found["logits"]
    assert kind == TensorProto.FLOAT
    assert dims[:2] == ["batch", "num_logits"]
    assert isinstance(dims[2], int)
    assert found["logits_sum"] == (TensorProto.FLOAT, dims[:2])
    nodes = [node.name for node in model.graph.node]
    assert all(nodes)
    assert len(set(nodes)) == len(nodes)


def test_no_two_types_meet_in_a_node(model: Any) -> None:
    """A strongly typed network casts nothing by itself."""
    known = types(model)
    for node in model.graph.node:
        if node.op_type in _ONE_TYPE:
            assert len({known[name] for name in node.input}) == 1, node.name
        if node.op_type == "Where":
            assert known[node.input[1]] == known[node.input[2]], node.name


def test_what_must_be_constant_is(model: Any) -> None:
    constants = {tensor.name for tensor in model.graph.initializer}
    for node in model.graph.node:
        for position in _CONSTANT_INPUTS.get(node.op_type, ()):
            assert len(node.input) > position, f"{node.name}: {node.op_type} without axes"
            assert node.input[position] in constants, node.name


def test_no_values_that_tensorrt_narrows(model: Any) -> None:
    """No float64, which the parser turns into float32, and no 8-bit or unsigned integers."""
    assert set(types(model).values()) <= _ANY
    assert not [node for node in model.graph.node if any(a.type == onnx.AttributeProto.GRAPH for a in node.attribute)]


def test_nothing_idle_is_left(model: Any) -> None:
    """No slice of everything, no transposition that keeps the order, no product with one."""
    arrays = {t.name: onnx.numpy_helper.to_array(t) for t in model.graph.initializer if len(t.dims) < 2}
    for node in model.graph.node:
        if node.op_type == "Slice" and all(name in arrays for name in node.input[1:]):
            starts, ends = (arrays[name] for name in node.input[1:3])
            steps = arrays[node.input[4]] if len(node.input) > 4 else np.ones(1)
            assert (starts != 0).any() or (ends < 2**31 - 1).any() or (steps != 1).any(), node.name
        if node.op_type == "Transpose":
            order = list(node.attribute[0].ints)
            assert order != sorted(order), node.name
        if node.op_type == "Mul":
            assert not any(name in arrays and arrays[name].ndim == 0 and arrays[name] == 1 for name in node.input)


def test_plugins_are_found_by_their_attributes(model: Any) -> None:
    """The parser asks the registry for type, plugin_version and plugin_namespace; attributes become int or float."""
    nodes = [node for node in model.graph.node if node.domain]
    assert nodes
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        assert attributes["plugin_version"] == contract.PLUGIN_VERSION.encode()
        assert attributes["plugin_namespace"] == contract.DOMAIN.encode()
        assert all(node.input)
        kinds = {a.type for a in node.attribute if not a.name.startswith("plugin_")}
        assert kinds <= {onnx.AttributeProto.INT, onnx.AttributeProto.FLOAT}
