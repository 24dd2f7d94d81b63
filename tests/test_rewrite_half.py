"""ONNX decoders in float16 and bfloat16: the rewritten graph, computed in float32, equals the original so computed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
import torch

from hqmq_trt import ort_library
from hqmq_trt.export.rewrite import analyse, rewrite_model
from tests import rewrite_cases as cases
from tests.tiny_decoders import make_model

HALVES = {"float16": onnx.TensorProto.FLOAT16, "bfloat16": onnx.TensorProto.BFLOAT16}
WAYS = ["traced", "dynamo18", "dynamo23"]


@pytest.fixture(scope="module", params=[(way, dtype) for way in WAYS for dtype in HALVES], ids="-".join)
def decoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    way, dtype = request.param
    path = tmp_path_factory.mktemp("half") / "model.onnx"
    model = make_model("qwen2" if way == "traced" else "llama", "eager" if way == "traced" else "sdpa")
    model.to(getattr(torch, dtype))
    if way == "traced":
        cases.export_traced(model, path)
    else:
        cases.export_dynamo(model, path, int(way[-2:]))
    return path, dtype


def widened(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same graph in float32, all but the caches of our operators."""
    kinds = set(HALVES.values())
    kept = {value.name for value in model.graph.input if value.name.endswith((".tail", ".mean"))}
    kept |= {value.name for value in model.graph.output if value.name.endswith((".tail", ".mean"))}
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    graph = copy.graph
    del graph.value_info[:]
    for value in (*graph.input, *graph.output):
        if value.type.tensor_type.elem_type in kinds and value.name not in kept:
            value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    for tensor in graph.initializer:
        if tensor.data_type in kinds:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float32)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for node in graph.node:
        for attribute in node.attribute:
            if attribute.name == "to" and attribute.i in kinds:
                attribute.i = onnx.TensorProto.FLOAT
            if attribute.name == "value" and attribute.t.data_type in kinds:
                array = onnx.numpy_helper.to_array(attribute.t).astype(np.float32)
                attribute.t.CopyFrom(onnx.numpy_helper.from_array(array))
    return copy


@pytest.mark.parametrize("mode", ["fused", "qdq"])
def test_same_graph(decoder: tuple[Path, str], tmp_path: Path, mode: str) -> None:
    path, dtype = decoder
    assert analyse(path).problems == []
    manifest = rewrite_model(path, tmp_path / "out", "fp16@p8", mode=mode)
    assert (manifest.dtype, manifest.logits_dtype) == (dtype, dtype)
    file = tmp_path / "out" / "model.onnx"
    weights = [t for t in onnx.load(file).graph.initializer if len(t.dims) == 2 and t.dims[0] > 8]
    assert {tensor.data_type for tensor in weights} == {HALVES[dtype]}
    onnx.save(widened(onnx.load(file)), tmp_path / "wide.onnx")
    kept: list[cases.Held] = []
    found = cases.run_rewritten(tmp_path / "out", kept=kept, graph=tmp_path / "wide.onnx")
    wanted, steps = cases.run_held(widened(onnx.load(path)), kept)
    assert cases.difference(wanted, found) < 1e-4
    assert 0.5 < steps < 1.1


@pytest.mark.parametrize("scheme", ["fp16@p8", "hq4@p8"])
def test_float16_runs(decoder: tuple[Path, str], tmp_path: Path, scheme: str) -> None:
    """As it is, in ONNX Runtime: float16 gives what float32 gives of the same weights, but for its rounding."""
    path, dtype = decoder
    rewrite_model(path, tmp_path / "out", scheme)
    file = tmp_path / "out" / "model.onnx"
    if dtype == "bfloat16":
        with pytest.raises(Exception, match=r"bfloat16|NOT_IMPLEMENTED|Could not find an implementation"):
            ort_library.session(file)
        return
    found = cases.run_rewritten(tmp_path / "out")
    onnx.save(widened(onnx.load(file)), tmp_path / "wide.onnx")
    wide = cases.run_rewritten(tmp_path / "out", graph=tmp_path / "wide.onnx")
    assert cases.divergence(wide, found) < 5e-3
