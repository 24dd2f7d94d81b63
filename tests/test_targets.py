"""``--target``: graphs are refused that a runtime does not import; the tables are what TensorRT's parsers answer."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from hqmq_trt.errors import HqmqError
from hqmq_trt.export import export_model, targets
from tests.tensorrt_versions import UnavailableError, fetch
from tests.tiny_decoders import make_model

_ASK = """
import ctypes, json, os, sys
library = ctypes.CDLL(sys.argv[1])
make = library.createNvOnnxParser_INTERNAL
make.restype, make.argtypes = ctypes.c_void_p, (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
parser = make(None, None, library.getNvOnnxParserVersion())
table = ctypes.cast(parser, ctypes.POINTER(ctypes.POINTER(ctypes.c_void_p)))[0]
supports = ctypes.CFUNCTYPE(ctypes.c_bool, ctypes.c_void_p, ctypes.c_char_p)(table[int(sys.argv[2])])
print(json.dumps([name for name in json.load(sys.stdin) if supports(parser, name.encode())]), flush=True)
os._exit(0)
"""
"""IParser::supportsOperator needs neither a network nor a GPU."""
_SUPPORTS = {"10.6": 4, "10.15": 4, "11.2": 2}
"""Its place among the virtual functions of IParser (NvOnnxParser.h)."""


def model(*operators: tuple[str, str], opset: int = 23) -> ir.Model:
    """A graph of (domain, operator), each in a node of its name."""
    x = ir.val("x")
    nodes = [ir.node(kind, [x], domain=domain, name=f"layers.0.{kind}") for domain, kind in operators]
    return ir.Model(ir.Graph([x], nodes[-1].outputs, nodes=nodes, opset_imports={"": opset}), ir_version=10)


@pytest.mark.parametrize(
    ("version", "target"), [("10.6", "tensorrt-10"), ("10.15", "tensorrt-10"), ("11.2", "tensorrt-11")]
)
def test_tables_are_what_parsers_answer(version: str, target: str) -> None:
    try:
        environment = fetch(version)
    except UnavailableError as error:
        pytest.skip(str(error))
    folder = Path(environment["LD_LIBRARY_PATH"].split(":")[0])
    names = sorted({schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""})
    done = subprocess.run(
        [sys.executable, "-c", _ASK, str(next(folder.glob("libnvonnxparser.so.*"))), str(_SUPPORTS[version])],
        input=json.dumps([*names, "NoSuchOperator"]),
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    found = set(json.loads(done.stdout))
    assert "NoSuchOperator" not in found
    known = targets.OPERATORS[target] & set(names)
    assert len(known) > 140
    if version == "10.15":  # a later 10.x only adds
        assert found - known == {"Attention", "RMSNormalization", "RotaryEmbedding", "TensorScatter"} & set(names)
    assert known <= found if version == "10.15" else known == found


@pytest.mark.parametrize("name", ["tensorrt-10", "tensorrt-11"])
def test_operators_are_refused_by_node(name: str) -> None:
    targets.check_graph(model(("", "Add"), ("com.hqmq", "HqmqAttention")), name)
    for domain, kind in (("", "Unique"), ("com.microsoft", "RotaryEmbedding")):
        with pytest.raises(HqmqError, match=rf"node 'layers.0.{kind}': {name} does not import the operator .*{kind}"):
            targets.check_graph(model(("", "Add"), (domain, kind)), name)
    with pytest.raises(HqmqError, match="the graph has opset 26"):
        targets.check_graph(model(("", "Add"), opset=26), name)


def test_targets_differ() -> None:
    """RMSNormalization and opset 24: TensorRT 11 has them, 10.6 not; without a target nothing is refused."""
    for graph in (model(("", "RMSNormalization")), model(("", "Add"), opset=24)):
        for accepting in ("tensorrt-11", "ort", None):
            targets.check_graph(graph, accepting)
        with pytest.raises(HqmqError, match=r"tensorrt-10"):
            targets.check_graph(graph, "tensorrt-10")


def test_nodes_of_subgraphs_are_looked_at() -> None:
    graph = model(("", "If"))
    body = model(("", "Unique")).graph
    graph.graph[0].attributes["then_branch"] = ir.AttrGraph("then_branch", body)
    with pytest.raises(HqmqError, match=r"layers\.0\.Unique"):
        targets.check_graph(graph, "tensorrt-10")


def test_exports_for_targets(tmp_path: Path) -> None:
    """An exported model passes; bodies are left out for TensorRT 10; what is refused leaves nothing."""
    tiny = make_model("llama")
    for target, bodies in (("tensorrt-10", False), ("ort", True)):
        export_model(tiny, tmp_path / target, "hq4@p8", mode="qdq", target=target)
        assert bool(onnx.load(tmp_path / target / "model.onnx").functions) == bodies
    with pytest.raises(HqmqError, match="use ort, tensorrt-10, tensorrt-11"):
        export_model(tiny, tmp_path / "x", target="tensorrt-9")
    with pytest.raises(HqmqError, match=r"^--target ort: ONNX Runtime cannot load it: .*layers\.0\.input_layernorm"):
        export_model(tiny.bfloat16(), tmp_path / "x", "hq4@p8", target="ort")
    assert not (tmp_path / "x").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ort", "tensorrt-10"]


def test_rewritten_decoders_for_targets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other road checks likewise."""
    from hqmq_trt.export.rewrite import rewrite_model
    from tests import rewrite_cases as cases

    cases.export_traced(make_model("qwen2", "eager"), tmp_path / "decoder.onnx")
    rewrite_model(tmp_path / "decoder.onnx", tmp_path / "out", "hq4@p8", target="tensorrt-10")
    monkeypatch.setitem(targets.OPERATORS, "tensorrt-10", targets.OPERATORS["tensorrt-10"] - {"Softmax", "Sigmoid"})
    with pytest.raises(HqmqError, match=r"node '.*Sigmoid.*': tensorrt-10 does not import the operator Sigmoid"):
        rewrite_model(tmp_path / "decoder.onnx", tmp_path / "refused", "hq4@p8", target="tensorrt-10")
    assert not (tmp_path / "refused").exists()
