"""ONNX files that are refused: one line that names the node or input and the reason, and nothing half-written."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from typer.testing import CliRunner

from hqmq_trt.cli import app
from hqmq_trt.errors import HqmqError
from hqmq_trt.export.rewrite import analyse, rewrite_model
from tests import rewrite_cases as cases
from tests.tiny_decoders import make_model


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("errors") / "model.onnx"
    cases.export_traced(make_model("llama"), path)
    return path


def refuse(path: Path, tmp_path: Path, *words: str) -> None:
    with pytest.raises(HqmqError) as info:
        rewrite_model(path, tmp_path / "out", "hq4@p8")
    message = str(info.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    assert not [p.name for p in tmp_path.iterdir() if "out" in p.name]


def changed(source: Path, tmp_path: Path, change: Callable[[Any], None]) -> Path:
    model = onnx.load(source)
    change(model)
    path = tmp_path / "changed.onnx"
    onnx.save(model, path)
    return path


def softmax(model: Any, count: int = 0) -> Any:
    return [node for node in model.graph.node if node.op_type == "Softmax"][count]


def test_not_onnx(tmp_path: Path) -> None:
    refuse(tmp_path / "absent.onnx", tmp_path, "no such file")
    (tmp_path / "text.onnx").write_text("hello, this is no model")
    refuse(tmp_path / "text.onnx", tmp_path, "not an ONNX file")
    (tmp_path / "empty.onnx").write_bytes(b"")
    refuse(tmp_path / "empty.onnx", tmp_path, "not an ONNX file")


def test_damaged(source: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.onnx").write_bytes(source.read_bytes()[:5000])
    refuse(tmp_path / "cut.onnx", tmp_path, "cut.onnx")


def test_no_decoder(tmp_path: Path) -> None:
    value = onnx.helper.make_tensor_value_info
    image = [value("image", onnx.TensorProto.FLOAT, ["n", 3])]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Relu", ["image"], ["y"])], "g", image, [value("y", onnx.TensorProto.FLOAT, ["n", 3])]
    )
    onnx.save(onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)]), tmp_path / "m.onnx")
    refuse(tmp_path / "m.onnx", tmp_path, "input_ids", "no text decoder")


def test_opsets_and_cycles(source: Path, tmp_path: Path) -> None:
    def old(model: Any) -> None:
        model.opset_import[0].version = 11

    def circle(model: Any) -> None:
        names = [output for node in model.graph.node for output in node.output]
        next(node for node in model.graph.node if node.op_type == "Add").input[0] = names[-1]

    refuse(changed(source, tmp_path, old), tmp_path, "opset 11")
    refuse(changed(source, tmp_path, circle), tmp_path, "invalid or cyclic")


def test_missing_weights(source: Path, tmp_path: Path) -> None:
    model = onnx.load(source)
    path = tmp_path / "m.onnx"
    onnx.save(model, path, save_as_external_data=True, location="w.bin", size_threshold=256)
    whole = (tmp_path / "w.bin").read_bytes()
    (tmp_path / "w.bin").write_bytes(whole[:100])
    refuse(path, tmp_path, "w.bin has 100 bytes")
    (tmp_path / "w.bin").unlink()
    refuse(path, tmp_path, "w.bin does not exist")


def test_linked_weights(source: Path, tmp_path: Path) -> None:
    """Hard-linked weights, and links out of the folder, which ONNX Runtime would not open either."""
    folder = tmp_path / "in"
    folder.mkdir()
    path = folder / "m.onnx"
    onnx.save(onnx.load(source), path, save_as_external_data=True, location="w.bin", size_threshold=256)
    (tmp_path / "other.bin").hardlink_to(folder / "w.bin")
    refuse(path, tmp_path, "w.bin has several hard links", "copy it (cp)")
    (folder / "w.bin").unlink()
    (folder / "w.bin").symlink_to(tmp_path / "other.bin")
    refuse(path, tmp_path, "are a link to", "other.bin", "cp -rL")
    (folder / "w.bin").unlink()
    (tmp_path / "other.bin").rename(folder / "w.bin")
    assert not analyse(path).problems


def test_interface(source: Path, tmp_path: Path) -> None:
    def symbolic(model: Any) -> None:
        dim = next(v for v in model.graph.input if "past" in v.name).type.tensor_type.shape.dim[1]
        dim.Clear()
        dim.dim_param = "heads"

    def fixed(model: Any) -> None:
        next(v for v in model.graph.input if "past" in v.name).type.tensor_type.shape.dim[2].dim_value = 128

    def odd(model: Any) -> None:
        next(v for v in model.graph.input if v.name == "attention_mask").name = "token_kinds"
        for node in model.graph.node:
            node.input[:] = ["token_kinds" if name == "attention_mask" else name for name in node.input]

    def unread(model: Any) -> None:
        kept = [value for value in model.graph.output if value.name != "present.1.value"]
        del model.graph.output[:]
        model.graph.output.extend(kept)

    refuse(changed(source, tmp_path, symbolic), tmp_path, "past_key_values.0.key", "heads is symbolic")
    refuse(changed(source, tmp_path, fixed), tmp_path, "past_key_values.0.key", "fixed")
    refuse(changed(source, tmp_path, odd), tmp_path, "token_kinds")
    refuse(changed(source, tmp_path, unread), tmp_path, "past_key_values.1.value", "no output")


def test_unknown_attention(source: Path, tmp_path: Path) -> None:
    def bias(model: Any) -> None:
        """A position bias beside the mask."""
        node = softmax(model, 1)
        table = np.linspace(0, 1, 4, dtype=np.float32).reshape(1, 4, 1, 1)
        model.graph.initializer.append(onnx.numpy_helper.from_array(table, "slopes"))
        place = list(model.graph.node).index(node)
        model.graph.node.insert(place, onnx.helper.make_node("Add", [node.input[0], "slopes"], ["biased"], "bias"))
        softmax(model, 1).input[0] = "biased"

    def strange(model: Any) -> None:
        node = softmax(model)
        place = list(model.graph.node).index(node)
        model.graph.node.insert(place, onnx.helper.make_node("Sin", [node.input[0]], ["odd"], "odd_node"))
        softmax(model).input[0] = "odd"

    def axis(model: Any) -> None:
        softmax(model).attribute[0].i = 1

    refuse(changed(source, tmp_path, bias), tmp_path, "Softmax", "slopes")
    refuse(changed(source, tmp_path, strange), tmp_path, "odd_node")
    refuse(changed(source, tmp_path, axis), tmp_path, "Softmax", "axis 1")


def test_inspect_explains(source: Path, tmp_path: Path) -> None:
    """One layer is understood, of the other the reason is said; the dry run says the same and writes nothing."""
    path = changed(source, tmp_path, lambda model: setattr(softmax(model).attribute[0], "i", 1))
    found = analyse(path)
    assert [layer.key.past.name for layer in found.layers] == ["past_key_values.1.key"]
    assert any("axis 1" in problem for problem in found.problems)
    for arguments in (["inspect", str(path)], ["export", str(path), "--dry-run"]):
        result = CliRunner().invoke(app, arguments)
        assert result.exit_code == 0
        assert "axis 1" in result.output.replace("\n", " ")
    whole = CliRunner().invoke(app, ["export", str(source), "--dry-run"])
    assert "all 2 layers are recognised" in whole.output
    assert not [p for p in source.parent.iterdir() if p.is_dir()]
