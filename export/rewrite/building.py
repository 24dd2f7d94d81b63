"""Writing nodes into a graph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir


class Builder:
    """Adds nodes of the default domain in front of a node.

    Args:
        graph: to add to.
        before: the node in front of which nodes are put.
        prefix: of the names of nodes and their results.
    """

    def __init__(self, graph: ir.Graph, before: ir.Node, prefix: str) -> None:
        self._graph, self._before, self._prefix = graph, before, prefix
        self._count: dict[str, int] = {}

    def place(self, node: ir.Node) -> ir.Node:
        """Put a node in."""
        self._graph.insert_before(self._before, node)
        return node

    def op(
        self,
        op_type: str,
        *inputs: ir.Value | None,
        dtype: ir.DataType | None = None,
        **attributes: Any,
    ) -> ir.Value:
        """The result of a new node; `dtype`: its type, by default that of the first input."""
        count = self._count[op_type] = self._count.get(op_type, -1) + 1
        name = f"{self._prefix}.{op_type}" + (f"_{count}" if count else "")
        node = ir.node(op_type, list(inputs), attributes=attributes, name=name)
        output = node.outputs[0]
        output.name = f"{name}.out"
        if dtype is not None:
            output.type = ir.TensorType(dtype)
        elif inputs and inputs[0] is not None:
            output.type = inputs[0].type
        self.place(node)
        return output

    def cast(self, value: ir.Value, dtype: ir.DataType) -> ir.Value:
        """`value` as another type; itself if it has that type."""
        return value if value.dtype == dtype else self.op("Cast", value, dtype=dtype, to=int(dtype))

    def ints(self, *numbers: int) -> ir.Value:
        """The int64 constant [len(numbers)]."""
        return constant(self._graph, "ints." + "_".join(map(str, numbers)), np.array(numbers, np.int64))

    def int(self, number: int) -> ir.Value:
        """The int64 constant of no dimensions."""
        return constant(self._graph, f"int.{number}", np.array(number, np.int64))

    def float(self, number: float, dtype: ir.DataType) -> ir.Value:
        """A constant of no dimensions."""
        array = np.array(number, dtype.numpy())
        return constant(self._graph, f"{dtype.name.lower()}.{float(number)!r}", array, dtype)


def constant(graph: ir.Graph, name: str, array: Any, dtype: ir.DataType | None = None) -> ir.Value:
    """The initialiser of that name, made if there is none."""
    name = f"hqmq.{name}"
    found = graph.initializers.get(name)
    return found if found is not None else initialiser(graph, name, ir.tensor(array, dtype=dtype, name=name))


def initialiser(graph: ir.Graph, name: str, tensor: ir.TensorProtocol) -> ir.Value:
    """A new initialiser."""
    value = ir.Value(name=name, shape=ir.Shape(tensor.shape), type=ir.TensorType(tensor.dtype))
    value.const_value = tensor
    graph.register_initializer(value)
    return value


def replace(value: ir.Value, by: ir.Value, keep: Sequence[ir.Node] = ()) -> None:
    """Let every reader of a value read another, but for the nodes in `keep`."""
    for node, position in tuple(value.uses()):
        if not any(node is kept for kept in keep):
            node.replace_input_with(position, by)


def rename_dimensions(graph: ir.Graph, names: Mapping[str, str]) -> None:
    """Name the dimensions of all values by `names`; unknown ones lose their name."""

    def renamed(value: ir.Value) -> None:
        if value.shape is None or value.const_value is not None:
            return
        sizes: list[int | str | None] = []
        for dim in value.shape:
            sizes.append(dim if isinstance(dim, int) else names.get(str(dim.value)))
        value.shape = ir.Shape(sizes)

    for value in (*graph.inputs, *graph.outputs):
        renamed(value)
    for node in graph:
        for value in node.outputs:
            renamed(value)
