"""Ordinary attention over a dense cache, in standard operators (mode ``qdq``); as hqmq_trt.export.capture has it."""

from __future__ import annotations

import onnx_ir as ir

from .building import Builder
from .layer import Layer

_LOW = -3.0e38
"""Score of a hidden key; finite, since a padding row may see no key at all."""


class Lengths:
    """past_length, new_length, present_length (int32 [B]), and masks made from them once.

    Args:
        ids: input_ids [B, T].
    """

    def __init__(self, ids: ir.Value, past: ir.Value, new: ir.Value, present: ir.Value) -> None:
        self.ids, self.past, self.new, self.present = ids, past, new, present
        self._seen: dict[int, ir.Value] = {}
        self._rows: ir.Value | None = None

    def rows(self, build: Builder) -> ir.Value:
        """0 … T-1, int64 [T]."""
        if self._rows is None:
            count = build.op("Shape", self.ids, dtype=ir.DataType.INT64, start=1, end=2)
            self._rows = build.op("Range", build.int(0), build.op("Squeeze", count, build.ints(0)), build.int(1))
        return self._rows

    def valid(self, build: Builder) -> ir.Value:
        """Whether a row is no padding, bool [B, 1, T, 1]."""
        new = build.op("Unsqueeze", build.cast(self.new, ir.DataType.INT64), build.ints(1))
        real = build.op("Less", self.rows(build), new, dtype=ir.DataType.BOOL)
        return build.op("Unsqueeze", real, build.ints(1, 3))

    def seen(self, build: Builder, window: int, keys: ir.Value) -> ir.Value:
        """Keys that queries see, bool [B, 1, T, R]. `keys`: [B, H, R, D]."""
        if window not in self._seen:
            held = build.op("Unsqueeze", build.cast(self.past, ir.DataType.INT64), build.ints(1, 2))
            row = build.op("Unsqueeze", self.rows(build), build.ints(1))
            query = build.op("Add", held, row)  # [B, T, 1]
            count = build.op("Shape", keys, dtype=ir.DataType.INT64, start=2, end=3)
            key = build.op("Range", build.int(0), build.op("Squeeze", count, build.ints(0)), build.int(1))
            total = build.op("Unsqueeze", build.cast(self.present, ir.DataType.INT64), build.ints(1, 2))
            boolean = ir.DataType.BOOL
            seen = build.op("LessOrEqual", key, query, dtype=boolean)
            seen = build.op("And", seen, build.op("Less", key, total, dtype=boolean), dtype=boolean)
            if window:
                first = build.op("Sub", query, build.int(window))
                seen = build.op("And", seen, build.op("Greater", key, first, dtype=boolean), dtype=boolean)
            self._seen[window] = build.op("Unsqueeze", seen, build.ints(1), dtype=boolean)
        return self._seen[window]


def attend(
    build: Builder, layer: Layer, keys: ir.Value, values: ir.Value, sinks: ir.Value | None, lengths: Lengths
) -> ir.Value:
    """Result [B, Hq, T, D], in the type of layer.q, over keys and values float32 [B, H, R, D]. In float32; the query
    heads of a group become rows, so that K and V are not repeated."""
    single, dtype = ir.DataType.FLOAT, layer.q.dtype
    assert dtype is not None
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    q = build.cast(layer.q, single)
    grouped = build.op("Reshape", q, build.ints(0, kv_heads, -1, dim))
    score = build.op("MatMul", grouped, build.op("Transpose", keys, perm=[0, 1, 3, 2]))
    score = build.op("Mul", score, build.float(layer.scale, single))
    rows = build.op("Shape", layer.q, dtype=ir.DataType.INT64, start=2, end=3)
    capacity = build.op("Shape", keys, dtype=ir.DataType.INT64, start=2, end=3)
    batch = build.op("Shape", layer.q, dtype=ir.DataType.INT64, start=0, end=1)
    by_head = build.op("Concat", batch, build.ints(heads), rows, capacity, axis=0)
    score = build.op("Reshape", score, by_head)
    if layer.softcap:
        cap = build.float(layer.softcap, single)
        score = build.op("Mul", build.op("Tanh", build.op("Div", score, cap)), cap)
    seen = lengths.seen(build, layer.window, keys)
    score = build.op("Where", seen, score, build.float(_LOW, single), dtype=single)
    if sinks is not None:
        column = build.op("Reshape", build.cast(sinks, single), build.ints(1, heads, 1, 1))
        shape = build.op("Concat", batch, build.ints(heads), rows, build.ints(1), axis=0)
        score = build.op("Concat", score, build.op("Expand", column, shape), axis=3)
    weight = build.op("Softmax", score, axis=3)
    if sinks is not None:
        weight = build.op("Slice", weight, build.ints(0), capacity, build.ints(3))
    grouped_shape = build.op("Concat", batch, build.ints(kv_heads, -1), capacity, axis=0)
    y = build.op("MatMul", build.op("Reshape", weight, grouped_shape), values)
    y = build.op("Reshape", y, build.op("Concat", batch, build.ints(heads), rows, build.ints(dim), axis=0))
    return build.op("Mul", build.cast(y, dtype), build.cast(lengths.valid(build), dtype))
