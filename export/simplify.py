"""Nodes that do nothing, taken out of the captured graph, and axes that TensorRT's parser wants written down."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

_END = 2**31 - 1
"""From here on the end of a slice means: to the end (torch writes 2^63-1)."""


def simplify(model: ir.Model) -> None:
    """Remove slices of everything, transpositions that permute nothing and products with one; give Squeeze its axes.

    Each of these costs a kernel, or shape arithmetic, in every run of a TensorRT engine.
    """
    for node in list(model.graph):
        if node.domain:
            continue
        if (node.op_type == "Slice" and _whole_slice(node)) or (node.op_type == "Transpose" and _keeps_order(node)):
            _bypass(model, node, node.inputs[0])
        elif node.op_type == "Mul":
            for kept, factor in (node.inputs, reversed(node.inputs)):
                if _is_one(factor):
                    _bypass(model, node, kept)
                    break
        elif node.op_type == "Squeeze" and len(node.inputs) == 1:
            _write_axes(model, node)


def _bypass(model: ir.Model, node: ir.Node, value: ir.Value | None) -> None:
    output = node.outputs[0]
    if value is None or output.is_graph_output():
        return
    if output.type is not None and value.type is None:
        value.type = output.type
    if output.shape is not None and value.shape is None:
        value.shape = output.shape
    ir.convenience.replace_all_uses_with(output, value)
    model.graph.remove(node, safe=True)


def _constant(value: ir.Value | None) -> Any:
    """The array of a small constant, or None."""
    tensor = ir.convenience.get_const_tensor(value) if value is not None else None
    return None if tensor is None or tensor.size > 16 else tensor.numpy()


def _whole_slice(node: ir.Node) -> bool:
    given = [_constant(value) for value in node.inputs[1:]]
    starts, ends = given[:2]
    if starts is None or ends is None or (len(node.inputs) > 4 and given[3] is None):
        return False
    steps = given[3] if len(given) > 3 else np.ones(1)
    return bool((starts == 0).all() and (ends >= _END).all() and (steps == 1).all())


def _keeps_order(node: ir.Node) -> bool:
    order = list(node.attributes["perm"].as_ints()) if "perm" in node.attributes else []
    return bool(order) and order == sorted(order)


def _is_one(value: ir.Value | None) -> bool:
    """Whether a factor is a scalar one, so that the product has the shape of the other factor."""
    factor = _constant(value)
    return factor is not None and factor.ndim == 0 and bool(factor == 1)


def _write_axes(model: ir.Model, node: ir.Node) -> None:
    """Squeeze of one element [1] to a scalar, as torch.export writes sizes: axis 0."""
    source = node.inputs[0]
    if source is None or source.shape is None or source.shape != ir.Shape([1]):
        return
    name = "squeeze.axes"
    axes = model.graph.initializers.get(name)
    if axes is None:
        tensor = ir.tensor(np.array([0], np.int64), name=name)
        axes = ir.Value(name=name, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
        axes.const_value = tensor
        model.graph.register_initializer(axes)
    node.resize_inputs(2)
    node.replace_input_with(1, axes)
