"""Body of the encoder: the steps of hqmq_trt.oracle.codec.encode_page, in its order, on many pages at once.

Layout: H heads first, then N pages: [H, N, P, …].
"""

from __future__ import annotations

from typing import Any

import numpy as np

from hqmq_trt.format import LARGEST_SHORT_SCALE, SHORT_NAN
from hqmq_trt.scheme import OUTLIER_FACTOR

from .bits import (
    half_to_words,
    pack,
    pack_bytes,
    short_scale_bounds,
    short_scales,
    signed,
)
from .codec import Codec
from .ops import DOUBLE, FLOAT, HALF, INT32, INT64, Ops

_BLOCK = 16
"""Secondaries looked at together: bounds the memory of the search to 4 * 16 float32 a chunk and copy."""
_HALF_MAX = np.array(65504.0, np.float32)
_INFINITY = np.array(np.inf, np.float32)


def encode(o: Ops, pages: Any, secondaries: Any, levels: Any, codec: Codec) -> list[Any]:
    """Code full pages float16 [H, N, P, D]: codes [H, N, P, W], scales [H, N, 1, Z], then mean [H, N, 1, D],
    outlier_mask [H, N, 1, words] and outlier_value [H, N, cap, 4] as the codec has them."""
    chunk_count, tokens = codec.chunks, codec.page_size
    x = o.to(pages, FLOAT)
    if codec.hadamard:
        x = o.hadamard(x, codec.head_dim)
    results = []
    if codec.page_mean:
        mean = o.to(o.Mul(o.tree_sum(x, tokens, 2), np.array(1.0 / tokens, np.float32)), HALF)
        x = o.Sub(x, o.to(mean, FLOAT))
        results.append(mean)
    parts = [o.Squeeze(part, [4]) for part in o.split(o.Reshape(x, [0, 0, 0, chunk_count, 4]), 4)]
    s0, s1, s2, s3 = (o.Mul(part, part) for part in parts)
    norm2 = o.Add(o.Add(s0, s1), o.Add(s2, s3))
    finite = o.to(o.ReduceMin(o.to(o.Less(norm2, _INFINITY), INT32), [3], keepdims=1), 9)
    norm2 = o.Where(finite, norm2, 0.0)
    kept, coded = norm2, finite
    if codec.outlier_capacity:
        outlier, mask, value = _outliers(o, norm2, parts, codec)
        results += [mask, value]
        kept = o.Where(outlier, 0.0, norm2)
        coded = o.And(finite, o.Not(outlier))
    if codec.rms:
        number = np.array(chunk_count, np.float32)
        if codec.outlier_capacity:
            number = o.Max(o.ReduceSum(o.to(o.Not(outlier), FLOAT), [3], keepdims=1), 1.0)
        raw = o.Sqrt(o.Div(o.tree_sum(kept, chunk_count, 3), o.Mul(number, 4.0)))
    else:
        raw = o.Div(o.Sqrt(o.ReduceMax(kept, [3], keepdims=1)), float(2**codec.radius_bits - 1))
    raw = o.to(o.to(o.Min(raw, _HALF_MAX), HALF), FLOAT)
    flat = [o.Reshape(o.Where(finite, part, 0.0), [codec.heads, -1, 1]) for part in parts]
    shape = o.Shape(norm2)
    word, negative, projection = (o.Reshape(found, shape) for found in _nearest(o, flat, secondaries, codec))
    if codec.rms:
        counted = o.Not(outlier) if codec.outlier_capacity else None
        short, level = _best_scale(o, raw, projection, counted, levels, codec)
        coded = o.And(coded, o.Greater(short, 0))
        scales = pack_bytes(o, o.Where(finite, short, SHORT_NAN), tokens)
    else:
        coded = o.And(coded, o.Greater(raw, 0.0))
        ratio = o.Min(o.Round(o.Div(o.Sqrt(norm2), raw)), float(2**codec.radius_bits - 1))
        level = o.to(o.Where(coded, ratio, 0.0), INT64)
        halves = o.Where(finite, raw, np.array(np.nan, np.float32))
        scales = half_to_words(o, o.Reshape(halves, [0, 0, 1, tokens]), tokens)
    code = o.Add(word, o.Mul(level, 1 << codec.index_bits))
    code = o.Add(code, o.Mul(negative, 1 << (codec.index_bits + codec.radius_bits)))
    codes = pack(o, o.Where(coded, code, 0), codec)
    return [codes, scales, *results]


def _best_scale(o: Ops, raw: Any, projection: Any, counted: Any | None, levels: Any, codec: Codec) -> tuple[Any, Any]:
    """Of the short scale nearest to raw [H, N, P, 1] and the two beside it the one that leaves the least error, int64
    (0 if the nearest is 0), and its levels, int64 [H, N, P, C]. counted: chunks that are not outliers; None: all."""
    nearest = _count(o, raw, short_scale_bounds(), 8, o.GreaterOrEqual)
    lower = o.Slice(levels, [0], [-1], [0])
    upper = o.Slice(levels, [1], [1 << 30], [0])
    middle = o.Mul(o.Add(upper, lower), 0.5)
    twice = o.Add(projection, projection)
    best_error: Any = _INFINITY
    best_short: Any = np.zeros((1, 1, 1, 1), np.int64)
    best_level: Any = np.zeros((1, 1, 1, 1), np.int64)
    for step in (0, -1, 1):
        short = o.Add(nearest, step) if step else nearest
        allowed = o.And(o.Greater(short, 0), o.LessOrEqual(short, LARGEST_SHORT_SCALE))
        if step > 0:
            allowed = o.And(allowed, o.Greater(nearest, 0))
        scale = o.Gather(short_scales(), o.Min(o.Max(short, 1), LARGEST_SHORT_SCALE))
        level = _count(o, o.Div(projection, scale), middle, codec.radius_bits, o.Greater)
        radius = o.Mul(o.Gather(levels, level), scale)
        error = o.Mul(radius, o.Sub(radius, twice))
        if counted is not None:
            error = o.Where(counted, error, 0.0)
        error = o.Where(allowed, o.tree_sum(error, codec.chunks, 3), _INFINITY)
        better = o.Less(error, best_error)
        best_error = o.Where(better, error, best_error)
        best_short = o.Where(better, short, best_short)
        best_level = o.Where(better, level, best_level)
    return best_short, best_level


def _count(o: Ops, x: Any, bounds: Any, bits: int, past: Any) -> Any:
    """How many of the 2^bits - 1 ascending bounds x is past (`past`: Greater, GreaterOrEqual): a binary search."""
    found: Any = np.zeros((1, 1, 1, 1), np.int64)
    for bit in reversed(range(bits)):
        higher = o.Add(found, 1 << bit)
        found = o.Where(past(x, o.Gather(bounds, o.Sub(higher, 1))), higher, found)
    return found


def _outliers(o: Ops, norm2: Any, parts: list[Any], codec: Codec) -> tuple[Any, Any, Any]:
    """Med3x: (outlier bool [H, N, P, C], mask int32 [H, N, 1, words], value float16 [H, N, cap, 4])."""
    total, slots = codec.page_size * codec.chunks, codec.outlier_capacity
    flat = o.Reshape(norm2, [0, 0, total])
    rank = (total - 1) // 2
    smallest, _ = o.TopK(flat, [rank + 1], axis=2, largest=0, outputs=2)
    median = o.Slice(smallest, [rank], [rank + 1], [2])
    above = o.Greater(flat, o.Mul(median, float(OUTLIER_FACTOR * OUTLIER_FACTOR)))
    largest, place = o.TopK(o.Where(above, flat, -1.0), [slots], axis=2, outputs=2)
    taken = o.GreaterOrEqual(largest, 0.0)
    chosen = o.ScatterElements(o.Mul(o.to(above, INT64), 0), place, o.to(taken, INT64), axis=2)
    dropped = o.Max(o.Sub(o.ReduceSum(o.to(above, INT64), [2], keepdims=1), slots), 0)

    words = codec.mask_words - 1
    padded = o.Pad(chosen, [0, 32 * words - total], 0, [2]) if 32 * words > total else chosen
    bits = o.Mul(o.Reshape(padded, [0, 0, words, 32]), np.left_shift(1, np.arange(32, dtype=np.int64)))
    mask = o.Concat(signed(o, o.ReduceSum(bits, [3], keepdims=0)), o.to(dropped, INT32), axis=2)

    # Slots in the order of the bits: the chosen positions, ascending; unused slots hold 0.
    order, _ = o.TopK(o.Where(taken, place, total), [slots], axis=2, largest=0, outputs=2)
    used, order = o.Less(order, total), o.Min(order, total - 1)
    columns = []
    for part in parts:
        value = o.GatherElements(o.Reshape(part, [0, 0, total]), order, axis=2)
        value = o.Where(used, o.Max(o.Min(value, _HALF_MAX), -_HALF_MAX), 0.0)
        columns.append(o.Unsqueeze(o.to(value, HALF), [3]))
    outlier = o.to(o.Reshape(chosen, [0, 0, codec.page_size, codec.chunks]), 9)
    return outlier, o.Unsqueeze(mask, [2]), o.Concat(*columns, axis=3)


def _columns(parts: list[Any], negate: Any) -> list[list[Any]]:
    """Coefficients of x in each component of x * conj(q), q = (a, b, c, d)."""
    a, b, c, d = parts
    nb, nc, nd = (negate(part) for part in (b, c, d))
    return [[a, b, c, d], [nb, a, nd, c], [nc, d, a, nb], [nd, nc, b, a]]


def _scores(o: Ops, v: list[Any]) -> tuple[Any, Any]:
    """Scores of the best axis unit and the best half unit for rotated chunks v."""
    s = [o.Abs(part) for part in v]
    axis = o.Max(o.Max(s[0], s[1]), o.Max(s[2], s[3]))
    half = o.Mul(o.Add(o.Add(s[0], s[1]), o.Add(s[2], s[3])), 0.5)
    return axis, half


def _candidates(o: Ops, x: list[Any], secondaries: Any, codec: Codec) -> Any:
    """The two secondaries with the best scores, int64 [H, n, 2], by float32 matrix products over blocks.

    A matrix product rounds otherwise than the oracle's chain of fused multiply-adds: two candidates leave the
    decision to exact arithmetic.
    """
    blocks = -(-codec.secondaries // _BLOCK)
    padded = o.Pad(secondaries, [0, blocks * _BLOCK - codec.secondaries], 0.0, [1])  # zeros score 0: never best
    columns = [
        o.Reshape(o.Concat(*column, axis=2), [codec.heads, blocks, _BLOCK, 4])
        for column in _columns(o.split(padded, 4), o.Neg)
    ]
    matrices = o.Transpose(o.Concat(*columns, axis=2), perm=[1, 0, 3, 2])  # [blocks, H, 4, 4 * BLOCK]
    chunks = o.Concat(*x, axis=2)
    two = o.Concat([codec.heads], o.size(chunks, 1), [2], axis=0)
    start_score = o.Expand(np.full((1, 1, 1), -1.0, np.float32), two)
    start_index = o.Expand(np.zeros((1, 1, 1), np.int64), two)

    body = o.branch()
    block, going, score, index = (body.value(hint) for hint in ("block", "going", "score", "index"))
    v = body.split(body.MatMul(chunks, body.Gather(matrices, block, axis=0)), 4)
    best, place = body.TopK(body.Max(*_scores(body, v)), [2], axis=2, outputs=2)
    scores = body.Concat(score, best, axis=2)
    indices = body.Concat(index, body.Add(place, body.Mul(block, _BLOCK)), axis=2)
    best, place = body.TopK(scores, [2], axis=2, outputs=2)
    outputs = [body.Identity(going), best, body.GatherElements(indices, place, axis=2)]
    for value, dtype, rank in ((block, INT64, 0), (going, 9, 0), (score, FLOAT, 3), (index, INT64, 3)):
        body.declare(value, dtype, rank)
    for value, dtype, rank in zip(outputs, (9, FLOAT, INT64), (0, 3, 3), strict=True):
        body.declare(value, dtype, rank)
    graph = body.graph("secondaries", [block, going, score, index], outputs)
    _, found = o.Loop([blocks], None, start_score, start_index, body=graph, outputs=2)
    return o.Min(found, codec.secondaries - 1)


def _nearest(o: Ops, x: list[Any], secondaries: Any, codec: Codec) -> tuple[Any, Any, Any]:
    """(word int64, negative int64 0 or 1, projection float32), each [H, n, 1], of chunks x: 4 times [H, n, 1]."""
    found = _candidates(o, x, secondaries, codec)
    heads = np.arange(codec.heads, dtype=np.int64).reshape(-1, 1, 1) * codec.secondaries
    quaternion = [
        o.Gather(o.Reshape(part, [-1]), o.Add(found, heads)) for part in o.split(secondaries, 4)
    ]  # each [H, n, 2]
    wide = [o.to(part, DOUBLE) for part in x]
    v = []
    for column in _columns(quaternion, o.Neg):
        total = o.Mul(x[0], column[0])
        for i in (1, 2, 3):
            total = o.fma(wide[i], o.to(column[i], DOUBLE), total)
        v.append(total)
    axis, half = _scores(o, v)
    score = o.Max(axis, half)
    (score0, score1), (index0, index1) = o.split(score, 2), o.split(found, 2)
    second = o.Or(o.Greater(score1, score0), o.And(o.Equal(score1, score0), o.Less(index1, index0)))
    pick = o.to(second, INT64)
    v = [o.GatherElements(part, pick, axis=2) for part in v]
    axis, half, score, index = (o.GatherElements(part, pick, axis=2) for part in (axis, half, score, found))

    minus = [o.to(o.Less(part, 0.0), INT64) for part in v]
    longest = o.ArgMax(o.Concat(*(o.Abs(part) for part in v), axis=2), axis=2, keepdims=1)
    flips = [o.Mod(o.Add(part, minus[0]), 2) for part in minus[1:]]
    half_unit = o.Add(o.Add(flips[0], o.Mul(flips[1], 2)), o.Add(o.Mul(flips[2], 4), 4))
    is_axis = o.GreaterOrEqual(axis, half)
    word = o.Add(o.Mul(index, 12), o.Where(is_axis, longest, half_unit))
    axis_minus = o.GatherElements(o.Concat(*minus, axis=2), longest, axis=2)
    return word, o.Where(is_axis, axis_minus, minus[0]), score
