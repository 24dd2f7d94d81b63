"""RMSNormalization and RotaryEmbedding of opset 23, written out: TensorRT reads them from 10.15 on only.

Cases; other forms stay as they are:
1. RMSNormalization over the last axis, computed in float32;
2. RotaryEmbedding of [B, H, T, D] over all of D, halves apart, cos and sin [B, T, D / 2] given row by row.
"""

from __future__ import annotations

import onnx_ir as ir

from .building import Builder, replace
from .walk import standard


def decompose(graph: ir.Graph) -> None:
    """Write out what is one of the cases."""
    for node in list(graph):
        if standard(node, "RMSNormalization"):
            made = _norm(graph, node)
        elif standard(node, "RotaryEmbedding"):
            made = _rotary(graph, node)
        else:
            continue
        output = node.outputs[0]
        if made is None or output.is_graph_output():
            continue
        made.shape = output.shape
        replace(output, made)
        graph.remove(node, safe=True)


def _norm(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    x, weight = node.inputs
    if x is None or weight is None or x.dtype is None or node.attributes.get_int("axis", -1) != -1:
        return None
    if node.attributes.get_int("stash_type", 1) != int(ir.DataType.FLOAT):
        return None
    single = ir.DataType.FLOAT
    build = Builder(graph, node, str(node.name))
    wide = build.cast(x, single)
    mean = build.op("ReduceMean", build.op("Mul", wide, wide), build.ints(-1), keepdims=1)
    spread = build.op("Sqrt", build.op("Add", mean, build.float(node.attributes.get_float("epsilon", 1e-5), single)))
    return build.op("Mul", build.cast(build.op("Div", wide, spread), x.dtype), weight)


def _rotary(graph: ir.Graph, node: ir.Node) -> ir.Value | None:
    if len([value for value in node.inputs if value is not None]) != 3:
        return None
    x, cos, sin = node.inputs
    if x is None or cos is None or sin is None or x.shape is None or len(x.shape) != 4:
        return None
    dim = x.shape[3]
    partial = node.attributes.get_int("rotary_embedding_dim", 0) not in (0, dim)
    if not isinstance(dim, int) or dim % 2 or partial or node.attributes.get_int("interleaved", 0):
        return None
    build = Builder(graph, node, str(node.name))
    low = build.op("Slice", x, build.ints(0), build.ints(dim // 2), build.ints(3))
    high = build.op("Slice", x, build.ints(dim // 2), build.ints(dim), build.ints(3))
    c, s = (build.op("Unsqueeze", value, build.ints(1)) for value in (cos, sin))
    first = build.op("Sub", build.op("Mul", low, c), build.op("Mul", high, s))
    second = build.op("Add", build.op("Mul", low, s), build.op("Mul", high, c))
    return build.op("Concat", first, second, axis=-1)
