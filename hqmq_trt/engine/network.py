"""From the exporter's ONNX file to a TensorRT network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from hqmq_trt.engine.manifest import LOGITS_SUM
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest

LOGITS = "logits"
_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


@dataclass(frozen=True)
class Graph:
    """An ONNX graph as the parser gets it.

    Attributes:
        path: of the ONNX file, beside which its external weights lie.
        content: what `engine_model` makes of the file.
        inputs: dimensions of every input, by name; named dimensions are strings.
    """

    path: Path
    content: bytes
    inputs: dict[str, tuple[int | str, ...]]


def read_graph(folder: Path, manifest: Manifest) -> Graph:
    """The ONNX file of an exported folder.

    Raises:
        HqmqError: it is damaged, or not the graph that the manifest describes.
    """
    path = folder / manifest.model_file
    manifest.verify_codebooks(path)
    model = engine_model(path)
    inputs = {
        value.name: tuple(dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim)
        for value in model.graph.input
    }
    expected = {"input_ids", "past_length", "new_length", "logits_index"}
    expected |= {f"past.{name}" for name, _ in manifest.cache(1, 1)}
    if set(inputs) != expected:
        differing = sorted(set(inputs) ^ expected)[:3]
        raise HqmqError(
            f"{path}: its inputs are not those of the manifest ({', '.join(differing)}); export the model again"
        )
    return Graph(path, model.SerializeToString(), inputs)


def engine_model(path: Path) -> onnx.ModelProto:
    """The exporter's ONNX file as TensorRT gets it, for a build and for a refit, so that nodes and weights have the
    same names in both. Two things differ from the file, whose external weights stay where they are:

    - The bodies of our operators are gone. TensorRT before 10.13 takes a local function for a node of that name,
      whatever its domain, and would never ask for the plugin.
    - ``logits`` are float32 whatever the model's type, and there is ``logits_sum`` float32 [batch, num_logits], the sum
      of each row of logits: the host need not convert, nor look at every logit to find one that is not finite. A row
      with an infinity or a NaN has a sum that is not finite, in whatever order it is added up; a finite sum therefore
      says that all logits are. (Finite logits beyond 1e33 may have a sum that is not: whoever finds such a sum looks
      at the logits.)

    Raises:
        HqmqError: the graph has no logits of a known type.
    """
    model = onnx.load(path, load_external_data=False)
    del model.functions[:]
    _add_logits_sum(model.graph, path)
    return model


def _add_logits_sum(graph: onnx.GraphProto, path: Path) -> None:
    logits = next((value for value in graph.output if value.name == LOGITS), None)
    shape = [] if logits is None else [dim.dim_param or dim.dim_value for dim in logits.type.tensor_type.shape.dim]
    if logits is None or len(shape) != 3 or logits.type.tensor_type.elem_type not in _FLOATS:
        raise HqmqError(f"{path}: has no output {LOGITS} [batch, num_logits, vocabulary]; export the model again")
    if logits.type.tensor_type.elem_type != TensorProto.FLOAT:
        inner = f"{LOGITS}_of_the_model"
        for node in graph.node:
            for names in (node.input, node.output):
                names[:] = [inner if name == LOGITS else name for name in names]
        graph.node.append(helper.make_node("Cast", [inner], [LOGITS], f"{LOGITS}_float32", to=TensorProto.FLOAT))
        logits.type.tensor_type.elem_type = TensorProto.FLOAT
    axes = f"{LOGITS_SUM}_axes"
    graph.initializer.append(numpy_helper.from_array(np.array([2], np.int64), axes))
    graph.node.append(helper.make_node("ReduceSum", [LOGITS, axes], [LOGITS_SUM], LOGITS_SUM, keepdims=0))
    graph.output.append(helper.make_tensor_value_info(LOGITS_SUM, TensorProto.FLOAT, shape[:2]))


def parse(trt: Any, builder: Any, log: Any, graph: Graph) -> tuple[Any, Any]:
    """(network, parser): a strongly typed network. The parser owns the weights and must outlive the build.

    Raises:
        HqmqError: TensorRT cannot parse the graph; the message names the node.
    """
    # TensorRT 11 knows strong typing only, and may drop the flag.
    strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
    network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
    parser = trt.OnnxParser(network, log)
    if not parser.parse(graph.content, str(graph.path.resolve())):
        raise HqmqError(f"{graph.path}: TensorRT {trt.__version__} cannot parse it: {_parser_errors(parser)}")
    names = {network.get_input(i).name for i in range(network.num_inputs)}
    if names != set(graph.inputs):
        lost = sorted(set(graph.inputs) - names)[:3]
        raise HqmqError(f"{graph.path}: TensorRT dropped the inputs {', '.join(lost)}; report this as a bug")
    return network, parser


def _parser_errors(parser: Any) -> str:
    """The parser's errors in one line, with the nodes they are about."""
    found = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        text = " ".join(str(error.desc()).split())
        node = f"node '{error.node_name()}' ({error.node_operator()}): " if error.node_name() else ""
        found.append(f"{node}{text}")
    return "; ".join(found[:3])[:1000] or "it gave no reason; see the log with --verbose"
