"""Walking a graph: through nodes that move elements about, and through factors that are plain numbers."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

MOVES = frozenset({"Reshape", "Transpose", "Unsqueeze", "Squeeze", "Expand", "Tile", "Identity", "Cast", "Flatten"})
"""Operators whose result holds nothing but elements of their first input."""
SAME = frozenset({"Identity", "Cast", "Dropout"})
"""Those that keep the place of every element, too."""


def standard(node: ir.Node | None, *names: str) -> bool:
    """Whether a node is one of these operators of the default domain."""
    return node is not None and not node.domain and node.op_type in names


def number(value: ir.Value | None) -> float | None:
    """The number a constant of one element holds; None for anything else."""
    tensor = None if value is None else value.const_value
    if tensor is None or tensor.size != 1:
        return None
    return float(tensor.numpy().reshape(()))


def factor(node: ir.Node | None) -> tuple[ir.Value, float] | None:
    """(other input, factor) of a node that multiplies or divides by a number."""
    if not standard(node, "Mul", "Div"):
        return None
    assert node is not None
    first, second = node.inputs
    if (by := number(second)) is not None and first is not None and (node.op_type == "Mul" or by != 0):
        return first, by if node.op_type == "Mul" else 1 / by
    if node.op_type == "Mul" and (by := number(first)) is not None and second is not None:
        return second, by
    return None


def climb(value: ir.Value, stop: set[int]) -> tuple[ir.Value, float]:
    """Up through moves and factors, at most to a value of `stop`: (where it ends, product of the factors)."""
    product = 1.0
    while id(value) not in stop:
        node = value.producer()
        scaled = factor(node)
        if scaled is not None:
            value, product = scaled[0], product * scaled[1]
        elif node is not None and not node.domain and node.op_type in MOVES and node.inputs[0] is not None:
            value = node.inputs[0]
        else:
            break
    return value, product


def users(value: ir.Value) -> list[ir.Node]:
    """Nodes that read a value, each once."""
    return list(dict.fromkeys(node for node, _ in value.uses()))


def reaches(value: ir.Value, names: tuple[str, ...], through: frozenset[str], depth: int = 12) -> bool:
    """Whether an operator of `names` lies above `value` with nothing but operators of `through` between."""
    node = value.producer()
    if standard(node, *names):
        return True
    if node is None or node.domain or node.op_type not in through or depth == 0:
        return False
    return any(given is not None and reaches(given, names, through, depth - 1) for given in node.inputs)


def producers(value: ir.Value) -> Iterator[ir.Node]:
    """Nodes above a value along first inputs."""
    while (node := value.producer()) is not None:
        yield node
        if not node.inputs or node.inputs[0] is None:
            return
        value = node.inputs[0]


def name(node: ir.Node) -> str:
    """How messages call a node."""
    return f"node '{node.name}' ({node.op_type})"
