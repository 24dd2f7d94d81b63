"""From the exporter's ONNX file to a TensorRT network."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest


@dataclass(frozen=True)
class Graph:
    """An ONNX graph as the parser gets it.

    Attributes:
        path: of the ONNX file, beside which its external weights lie.
        content: the file without the bodies of our operators. TensorRT before 10.13 takes a local function for a node
            of that name, whatever its domain, and would never ask for the plugin.
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
    model = onnx.load(path, load_external_data=False)
    del model.functions[:]
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
