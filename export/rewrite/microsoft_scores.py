"""Attention written out as the decomposed form that attention.py recognises: scores, their masks, weights."""

from __future__ import annotations

import onnx_ir as ir

from .building import Builder
from .microsoft_nodes import Case

_INT64 = ir.DataType.INT64
_LOW = {ir.DataType.FLOAT16: -6.0e4}
"""Score of a hidden key, by type; otherwise -3e38."""


def low(dtype: ir.DataType) -> float:
    """Score of a hidden key."""
    return _LOW.get(dtype, -3.0e38)


def split_heads(build: Builder, x: ir.Value, heads: int, dim: int) -> ir.Value:
    """[B, T, heads * dim] → [B, heads, T, dim]."""
    return build.op("Transpose", build.op("Reshape", x, build.ints(0, 0, heads, dim)), perm=[0, 2, 1, 3])


def join_heads(build: Builder, y: ir.Value, features: int) -> ir.Value:
    """[B, heads, T, dim] → [B, T, features]."""
    return build.op("Reshape", build.op("Transpose", y, perm=[0, 2, 1, 3]), build.ints(0, 0, features))


class Scores:
    """q over keys, step by step: factors and soft-cap, biases, masks, sinks, weights."""

    def __init__(self, build: Builder, q: ir.Value, keys: ir.Value, scale: float, softcap: float = 0.0) -> None:
        assert q.dtype is not None
        self._build, self._q, self._dtype = build, q, q.dtype
        score = build.op("MatMul", q, build.op("Transpose", keys, perm=[0, 1, 3, 2]))
        score = build.op("Mul", score, build.float(scale / (softcap or 1.0), q.dtype))
        if softcap:
            score = build.op("Mul", build.op("Tanh", score), build.float(softcap, q.dtype))
        self.value = score

    def add(self, bias: ir.Value) -> None:
        self.value = self._build.op("Add", self.value, bias)

    def keep(self, seen: ir.Value) -> None:
        hidden = self._build.float(low(self._dtype), self._dtype)
        self.value = self._build.op("Where", seen, self.value, hidden, dtype=self._dtype)

    def weigh(self, values: ir.Value, sinks: ir.Value | None, heads: int) -> ir.Value:
        """[B, heads, T, D]."""
        build, score = self._build, self.value
        if sinks is not None:
            batch, rows = (build.op("Shape", self._q, dtype=_INT64, start=i, end=i + 1) for i in (0, 2))
            shape = build.op("Concat", batch, build.ints(heads), rows, build.ints(1), axis=0)
            column = build.op("Reshape", sinks, build.ints(1, heads, 1, 1))
            score = build.op("Concat", score, build.op("Expand", column, shape), axis=3)
        weight = build.op("Softmax", score, axis=3)
        if sinks is not None:
            weight = build.op("Slice", weight, build.ints(0), build.ints(-1), build.ints(3))
        return build.op("MatMul", weight, values)


def bias_shape(bias: ir.Value | None, batch: int, heads: int, case: Case) -> tuple[int, ...]:
    first = [1, 1]
    if bias is not None and bias.shape is not None and len(bias.shape) == 4:
        first = [1 if bias.shape[axis] == 1 else size for axis, size in enumerate((batch, heads))]
    return (*first, case.rows, case.total)
