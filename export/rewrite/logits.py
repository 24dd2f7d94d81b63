"""Logits of the wanted rows only: the rows are taken before the last projection where that can be recognised.

Cases, upwards from the output:
1. factors, soft-cap and biases, then MatMul of hidden states [B, T, F] with a matrix: rows are taken from those;
2. anything else: rows are taken from the logits.
"""

from __future__ import annotations

import onnx_ir as ir

from .building import Builder
from .walk import SAME, factor, standard, users

_ELEMENTWISE = SAME | {"Tanh"}


def rows_of(logits: ir.Value) -> tuple[ir.Value, ir.Node | None]:
    """(value [B, T, F] from which rows are to be taken, the projection that reads it, or None for the logits)."""
    value = logits
    while (node := value.producer()) is not None:
        if value is not logits and len(users(value)) != 1:
            break
        scaled = factor(node)
        if scaled is not None:
            value = scaled[0]
        elif not node.domain and node.op_type in _ELEMENTWISE and node.inputs[0] is not None:
            value = node.inputs[0]
        elif standard(node, "Add") and (other := _beside_vector(node)) is not None:
            value = other
        elif standard(node, "MatMul") and _is_projection(node):
            hidden = node.inputs[0]
            assert hidden is not None
            return hidden, node
        else:
            break
    return logits, None


def _beside_vector(node: ir.Node) -> ir.Value | None:
    for this, other in (node.inputs, node.inputs[::-1]):
        if other is not None and other.const_value is not None and other.shape is not None and len(other.shape) == 1:
            return this
    return None


def _is_projection(node: ir.Node) -> bool:
    hidden, matrix = node.inputs
    if hidden is None or matrix is None or hidden.shape is None or len(hidden.shape) != 3:
        return False
    while standard(maker := matrix.producer(), "Transpose", "Cast", "Identity"):
        assert maker is not None
        assert maker.inputs[0] is not None
        matrix = maker.inputs[0]
    return matrix.const_value is not None and isinstance(hidden.shape[2], int)


def take_rows(graph: ir.Graph, logits: ir.Value, index: ir.Value) -> ir.Value:
    """Let `logits` have the rows of `index` [B, N] only; returns the new output [B, N, V]."""
    hidden, projection = rows_of(logits)
    assert hidden.shape is not None
    features = int(hidden.shape[2])
    if projection is not None:
        build = Builder(graph, projection, "logits")
        taken = _take(build, hidden, index, features)
        projection.replace_input_with(0, taken)
        for node in _below(projection, logits):
            for output in node.outputs:
                output.shape = None
        return logits
    last = logits.producer()
    assert last is not None
    after = ir.node("Identity", [logits], name="logits.rows")
    graph.insert_after(last, after)
    taken = _take(Builder(graph, after, "logits"), logits, index, features)
    after.replace_input_with(0, taken)
    after.outputs[0].type = logits.type
    return after.outputs[0]


def _below(node: ir.Node, last: ir.Value) -> list[ir.Node]:
    found = [node]
    while found[-1] is not last.producer():
        found.append(users(found[-1].outputs[0])[0])
    return found


def _take(build: Builder, source: ir.Value, index: ir.Value, features: int) -> ir.Value:
    """Rows [B, N, F] of source [B, T, F]."""
    sizes = build.op("Shape", index, dtype=ir.DataType.INT64)
    batch, rows = (
        build.op("Squeeze", build.op("Shape", source, dtype=ir.DataType.INT64, start=i, end=i + 1), build.ints(0))
        for i in (0, 1)
    )
    first = build.op("Mul", build.op("Range", build.int(0), batch, build.int(1)), rows)
    place = build.op("Add", index, build.op("Unsqueeze", first, build.ints(1)))
    flat = build.op("Reshape", source, build.ints(-1, features))
    taken = build.op("Gather", flat, build.op("Reshape", place, build.ints(-1)), axis=0, dtype=source.dtype)
    shape = build.op("Concat", sizes, build.ints(features), axis=0)
    return build.op("Reshape", taken, shape)
