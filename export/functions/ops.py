"""A recorder of ONNX nodes for function bodies: ``o.Add(x, 1)`` makes a node and gives its output."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from itertools import count
from typing import Any

import numpy as np
import onnx_ir as ir

INT64, INT32, FLOAT, HALF, DOUBLE = (
    int(kind)
    for kind in (
        ir.DataType.INT64,
        ir.DataType.INT32,
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.DOUBLE,
    )
)


class Ops:
    """Nodes of one graph. A branch (`branch`) sees the values of the graph around it and shares its names.

    Inputs are values, numpy arrays, or Python numbers and lists of them: ints become int64, floats float32. Keyword
    arguments are attributes, but for `outputs`, the number of outputs (a list of values if it is not 1).
    """

    def __init__(self, outer: Ops | None = None) -> None:
        self.nodes: list[ir.Node] = []
        self._names: Iterator[int] = outer._names if outer else count()
        self._constants: dict[Any, ir.Value] = dict(outer._constants) if outer else {}

    def branch(self) -> Ops:
        """A recorder for a subgraph of this graph."""
        return Ops(self)

    def value(self, hint: str) -> ir.Value:
        """A value that no node makes: an input."""
        return ir.Value(name=f"{hint}_{next(self._names)}")

    def __getattr__(self, op_type: str) -> Callable[..., Any]:
        if not op_type[0].isupper():
            raise AttributeError(op_type)

        def record(*inputs: Any, outputs: int = 1, **attributes: Any) -> Any:
            made = self._node(op_type, [self._input(x) for x in inputs], attributes, outputs)
            return made[0] if outputs == 1 else list(made)

        return record

    def _node(
        self, op_type: str, inputs: Sequence[ir.Value | None], attributes: dict[str, Any], outputs: int
    ) -> Sequence[ir.Value]:
        node = ir.Node("", op_type, inputs, ir.convenience.convert_attributes(attributes), num_outputs=outputs)
        for output in node.outputs:
            output.name = f"{op_type}_{next(self._names)}"
        node.name = node.outputs[0].name
        self.nodes.append(node)
        return node.outputs

    def _input(self, x: Any) -> ir.Value | None:
        if x is None or isinstance(x, ir.Value):
            return x
        array = np.asarray(x)
        if not isinstance(x, np.ndarray):
            array = array.astype(np.float32 if array.dtype.kind == "f" else np.int64)
        key = (array.dtype, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self._node("Constant", [], {"value": ir.tensor(array)}, 1)[0]
        return self._constants[key]

    def declare(self, value: ir.Value, dtype: int, rank: int) -> None:
        """Give an input or output of a subgraph its type and rank."""
        value.type = ir.TensorType(ir.DataType(dtype))
        value.shape = ir.Shape([None] * rank)

    def graph(self, name: str, inputs: Sequence[ir.Value], outputs: Sequence[ir.Value]) -> ir.Graph:
        """The recorded nodes as a graph."""
        return ir.Graph(inputs, outputs, nodes=self.nodes, name=name, opset_imports={"": 23})

    def to(self, x: Any, dtype: int) -> Any:
        """Cast."""
        return self.Cast(x, to=dtype)

    def size(self, x: ir.Value, axis: int) -> Any:
        """One dimension, int64 [1]."""
        return self.Shape(x, start=axis, end=axis + 1)

    def split(self, x: ir.Value, parts: int, axis: int = -1) -> Any:
        """Equal parts along an axis."""
        return self.Split(x, axis=axis, num_outputs=parts, outputs=parts)

    def tree_sum(self, x: ir.Value, size: int, axis: int) -> Any:
        """Sum by halves along an axis of `size` elements (hqmq_trt.oracle.codec.tree_sum); the axis stays, size 1."""
        padded = 1 << max(size - 1, 0).bit_length()
        if padded > size:
            x = self.Pad(x, [0, padded - size], 0.0, [axis])
        while padded > 1:
            padded //= 2
            low, high = self.split(x, 2, axis)
            x = self.Add(low, high)
        return x

    def hadamard(self, x: ir.Value, size: int) -> Any:
        """Orthonormal Walsh-Hadamard transform of the last of four axes, additions as in the oracle."""
        stride = 1
        while stride < size:
            pairs = self.Reshape(x, [0, 0, 0, size // (2 * stride), 2, stride])
            low, high = self.split(pairs, 2, 4)
            x = self.Reshape(self.Concat(self.Add(low, high), self.Sub(low, high), axis=4), [0, 0, 0, size])
            stride *= 2
        return self.Mul(x, 1.0 / math.sqrt(size))

    def fma(self, a: Any, b: Any, c: Any) -> Any:
        """a*b + c in float32, rounded once: a and b come as float64, c as float32."""
        return self.to(self.Add(self.Mul(a, b), self.to(c, DOUBLE)), FLOAT)
