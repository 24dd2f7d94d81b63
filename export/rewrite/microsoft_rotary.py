"""Rotary embedding of ONNX Runtime, written out: RotaryEmbedding of com.microsoft, and the one inside
GroupQueryAttention.

Cases: halves apart or interleaved; over all of a head or its first elements; input [B, T, heads * D] or [B, heads, T,
D]; positions [B, T], or one number from which all sequences count.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from hqmq_trt.errors import HqmqError

from .building import Builder
from .microsoft_nodes import Context, Rule, Trial, draw, need, typed, width


@dataclass
class Rotation:
    """Tables cos and sin [positions, D_rotary / 2], positions [B, T], and how they apply to heads of `dim` elements."""

    cos: ir.Value
    sin: ir.Value
    positions: ir.Value
    dim: int
    interleaved: bool = False

    @property
    def turned(self) -> int:
        """Elements of a head that are rotated."""
        half = self.cos.shape[1] if self.cos.shape is not None and len(self.cos.shape) == 2 else None
        if not isinstance(half, int) or not 0 < 2 * half <= self.dim:
            raise HqmqError(f"its cos_cache '{self.cos.name}' {self.cos.shape} does not fit head_dim {self.dim}")
        return 2 * half


def rotate(context: Context, build: Builder, x: ir.Value, turn: Rotation, axis: int = 1) -> ir.Value:
    """Rotate x [B, heads, T, D]; `axis`: where the heads are (1 or 2)."""
    turned = turn.turned

    def table(side: ir.Value) -> ir.Value:
        def make() -> ir.Value:
            rows = build.op("Gather", side, turn.positions, axis=0)
            return build.op("Unsqueeze", rows, build.ints(axis))

        return context.once(("rotary", id(side), id(turn.positions), axis), make)

    def piece(value: ir.Value, first: int, end: int, step: int = 1) -> ir.Value:
        return build.op("Slice", value, build.ints(first), build.ints(end), build.ints(3), build.ints(step))

    cos, sin = table(turn.cos), table(turn.sin)
    if turn.interleaved:
        low, high = piece(x, 0, turned, 2), piece(x, 1, turned, 2)
    else:
        low, high = piece(x, 0, turned // 2), piece(x, turned // 2, turned)
    first = build.op("Sub", build.op("Mul", low, cos), build.op("Mul", high, sin))
    second = build.op("Add", build.op("Mul", low, sin), build.op("Mul", high, cos))
    if turn.interleaved:
        first, second = (build.op("Unsqueeze", part, build.ints(4)) for part in (first, second))
        pairs = build.op("Concat", first, second, axis=4)
        rotated = build.op("Reshape", pairs, build.ints(0, 0, 0, turned))
    else:
        rotated = build.op("Concat", first, second, axis=3)
    if turned == turn.dim:
        return rotated
    return build.op("Concat", rotated, piece(x, turned, turn.dim), axis=3)


def _sizes(node: ir.Node) -> tuple[int, int, int]:
    """(rank of the input, heads, head_dim)."""
    x, cos = need(node, 0, "input"), need(node, 2, "cos_cache")
    partial, heads = (node.attributes.get_int(name, 0) for name in ("rotary_embedding_dim", "num_heads"))
    half = cos.shape[1] if cos.shape is not None and len(cos.shape) == 2 else None
    if not isinstance(half, int):
        raise HqmqError(f"its cos_cache '{cos.name}' is of unknown size")
    if partial and partial != 2 * half:
        raise HqmqError(f"its rotary_embedding_dim {partial} does not fit its cos_cache '{cos.name}' {cos.shape}")
    features, rank = width(x), 3 if x.shape is None else len(x.shape)
    if features is None or rank not in (3, 4):
        raise HqmqError(f"its input '{x.name}' is of unknown size")
    if rank == 4:
        count = x.shape[1] if x.shape is not None else None
        return 4, count if isinstance(count, int) else heads or 2, features
    if partial and not heads:
        raise HqmqError("rotary_embedding_dim without num_heads does not tell the size of a head")
    dim = features // heads if partial else 2 * half
    if features % dim:
        raise HqmqError(f"{features} elements of its input are not heads of {dim}")
    return 3, features // dim, dim


def _rotary(context: Context, node: ir.Node) -> Sequence[ir.Value | None]:
    rank, heads, dim = _sizes(node)
    x, cos = need(node, 0, "input"), need(node, 2, "cos_cache")
    typed(x, cos)
    build = Builder(context.graph, node, str(node.name))
    positions = need(node, 1, "position_ids")
    if positions.shape is None or len(positions.shape) not in (1, 2):
        raise HqmqError(f"its position_ids '{positions.name}' are of unknown shape")
    if len(positions.shape) == 1:
        start = build.op("Reshape", positions, build.ints(1, 1))
        positions = build.op("Add", start, context.row(build))
    turn = Rotation(cos, need(node, 3, "sin_cache"), positions, dim, bool(node.attributes.get_int("interleaved", 0)))
    if rank == 4:
        return [rotate(context, build, x, turn)]
    y = rotate(context, build, build.op("Reshape", x, build.ints(0, 0, heads, dim)), turn, axis=2)
    return [build.op("Reshape", y, build.ints(0, 0, heads * dim))]


def _trials(node: ir.Node, rng: np.random.Generator) -> Sequence[Trial]:
    rank, heads, dim = _sizes(node)
    cos, positions = need(node, 2, "cos_cache"), need(node, 1, "position_ids")
    reach = int(cos.shape[0]) if cos.shape is not None and isinstance(cos.shape[0], int) else 64
    single = positions.shape is not None and len(positions.shape) == 1
    trials = []
    for batch, rows, past in ((2, 3, 5), (3, 1, 9), (1, 7, 0)):
        if past + rows > reach:
            continue
        x = draw(rng, *((batch, rows, heads * dim) if rank == 3 else (batch, heads, rows, dim)))
        where = np.array([past]) if single else np.tile(np.arange(past, past + rows), (batch, 1))
        half = (reach, dim // 2)
        trials.append(Trial({0: x, 1: where, 2: draw(rng, *half), 3: draw(rng, *half)}, tokens=(batch, rows)))
    if not trials:
        raise HqmqError(f"its cos_cache has {reach} rows, too few to try it")
    return trials


ROTARY = {
    "RotaryEmbedding": Rule(
        _rotary,
        _trials,
        {
            "interleaved": (0, 1),
            "num_heads": None,
            "rotary_embedding_dim": None,
            "scale": (1.0,),
            "is_packed_batching": (0,),
        },
        4,
    )
}
