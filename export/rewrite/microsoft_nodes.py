"""What the rules for operators of ONNX Runtime share: their form, values made once for a graph, small helpers."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError

from .building import Builder, replace
from .walk import standard

REFUSED = "hqmq_trt.refused"
"""Key of a node's metadata: why it was left as it is."""
Array = NDArray[Any]
Feed = dict[int, Array]
"""Arrays by position of a node's inputs."""


@dataclass(frozen=True)
class Case:
    """Sizes of one trial: `batch` sequences with `past` tokens held and `rows` new ones."""

    batch: int
    rows: int
    past: int

    @property
    def total(self) -> int:
        return self.past + self.rows


@dataclass(frozen=True)
class Trial:
    """Inputs of one trial: of the node as it is, and of what it is written out to (by default the same).

    Attributes:
        tokens: sequences and new tokens, where there are such.
        rows: by output, how many rows of axis 2 are compared; all of the others.
    """

    given: Feed
    ours: Feed | None = None
    tokens: tuple[int, int] = (1, 1)
    rows: Mapping[int, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Rule:
    """How an operator is written out.

    Attributes:
        write: adds nodes in front of a node; gives its outputs anew (None: an output that nothing reads).
        trials: inputs to try it with.
        attributes: values that each attribute may have; None: any.
        inputs: most inputs of the operator.
        inexact: attributes that let kernels compute less exactly; a node is tried without them.
        stand_in: changes a node that ONNX Runtime's CPU kernels refuse into nodes that are documented to do the same.
    """

    write: Callable[[Context, ir.Node], Sequence[ir.Value | None]]
    trials: Callable[[ir.Node, np.random.Generator], Sequence[Trial]]
    attributes: Mapping[str, Collection[Any] | None]
    inputs: int
    inexact: tuple[str, ...] = ()
    stand_in: Callable[[Context, ir.Node], bool] | None = None


class Context:
    """A graph in which operators are written out.

    Args:
        ids: input_ids [B, T], or whatever has these two sizes first.
    """

    def __init__(self, graph: ir.Graph, ids: ir.Value) -> None:
        self.graph, self.ids = graph, ids
        self._made: dict[tuple[Any, ...], ir.Value] = {}

    def once(self, key: tuple[Any, ...], make: Callable[[], ir.Value]) -> ir.Value:
        """A value that all nodes share: made in front of the first that needs it."""
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]

    def new_rows(self, build: Builder) -> ir.Value:
        """T, int64 [1]."""
        return self.once(("T",), lambda: build.op("Shape", self.ids, dtype=ir.DataType.INT64, start=1, end=2))

    def row(self, build: Builder) -> ir.Value:
        """0 … T-1, int64 [T]."""

        def make() -> ir.Value:
            count = build.op("Squeeze", self.new_rows(build), build.ints(0))
            return build.op("Range", build.int(0), count, build.int(1))

        return self.once(("rows",), make)

    def seen(self, build: Builder, past: ir.Value, window: int) -> ir.Value:
        """Keys that new rows see, bool [T, P + T]. `past`: a cache [B, H, P, D]; `window`: 0: all before."""

        def make() -> ir.Value:
            held = build.op("Shape", past, dtype=ir.DataType.INT64, start=2, end=3)
            total = build.op("Squeeze", build.op("Add", held, self.new_rows(build)), build.ints(0))
            key = build.op("Range", build.int(0), total, build.int(1))
            query = build.op("Unsqueeze", build.op("Add", self.row(build), held), build.ints(1))
            boolean = ir.DataType.BOOL
            keep = build.op("LessOrEqual", key, query, dtype=boolean)
            if window:
                first = build.op("Sub", query, build.int(window))
                keep = build.op("And", keep, build.op("Greater", key, first, dtype=boolean), dtype=boolean)
            return keep

        return self.once(("seen", window), make)


def given(node: ir.Node, position: int) -> ir.Value | None:
    """An input of a node; None if it is left out."""
    value = node.inputs[position] if position < len(node.inputs) else None
    return None if value is None or value.name == "" else value


def need(node: ir.Node, position: int, what: str) -> ir.Value:
    """An input that must be there."""
    value = given(node, position)
    if value is None:
        raise HqmqError(f"has no {what}")
    return value


def typed(*values: ir.Value) -> ir.DataType:
    """The type of the first value, given to those that have none.

    Raises:
        HqmqError: none of the values has one.
    """
    known = next((value.dtype for value in values if value.dtype is not None), None)
    if known is None:
        raise HqmqError(f"'{values[0].name}' is of unknown type")
    for value in values:
        value.type = value.type or ir.TensorType(known)
    assert values[0].dtype is not None
    return values[0].dtype


def wanted(node: ir.Node, position: int) -> bool:
    """Whether something reads an output."""
    if position >= len(node.outputs):
        return False
    value = node.outputs[position]
    return bool(value.uses()) or value.is_graph_output()


def unread(node: ir.Node, **outputs: int) -> None:
    """Outputs that we do not give must not be read."""
    for what, position in outputs.items():
        if wanted(node, position):
            raise HqmqError(f"its output '{node.outputs[position].name}' ({what}) is read, which is not supported")


def width(value: ir.Value | None, depth: int = 8) -> int | None:
    """Elements of the last axis; None if that is not known."""
    if value is None:
        return None
    if value.shape is not None and len(value.shape) and isinstance(value.shape[-1], int):
        return int(value.shape[-1])
    if value.const_value is not None and len(value.const_value.shape):
        return int(value.const_value.shape[-1])
    node = value.producer()
    if node is None or depth == 0:
        return None
    if node.op_type == "MatMulNBits":
        return node.attributes.get_int("N", 0) or None
    if standard(node, "MatMul"):
        return width(node.inputs[1], depth - 1)
    if standard(node, "Split"):
        sizes = None if len(node.inputs) < 2 or node.inputs[1] is None else node.inputs[1].const_value
        place = next(i for i, output in enumerate(node.outputs) if output is value)
        return None if sizes is None else int(sizes.numpy().reshape(-1)[place])
    if standard(node, "Add", "Mul"):
        return next((w for w in (width(v, depth - 1) for v in node.inputs) if w and w > 1), None)
    if node.op_type in ("RotaryEmbedding", "Cast", "Identity", "SimplifiedLayerNormalization"):
        return width(node.inputs[0], depth - 1)
    return None


def shape_of(value: ir.Value) -> ir.Shape | None:
    """The shape of a value, where the file does not say it: that above a Cast; hidden states of a known width."""
    if value.shape is not None:
        return value.shape
    node = value.producer()
    if standard(node, "Cast", "Identity") and node is not None and node.inputs[0] is not None:
        return shape_of(node.inputs[0])
    features = width(value)
    return None if features is None else ir.Shape([None, None, features])


def draw(rng: np.random.Generator, *shape: int) -> Array:
    """Random numbers, normally distributed, which float16 can hold."""
    return rng.standard_normal(shape).astype(np.float16).astype(np.float32)


def take_over(graph: ir.Graph, old: ir.Value, new: ir.Value) -> None:
    """Let `new` be read, and be an output of the graph, in the place of `old`."""
    if new.shape is None:
        new.shape = old.shape
    if new.dtype is None:
        new.type = old.type
    replace(old, new)
    for place, value in enumerate(graph.outputs):
        if value is old:
            graph.outputs[place] = new
            new.name, old.name = old.name, f"{old.name}.old"
            new.shape = old.shape
