"""Bodies of HqmqQuantize and HqmqDequantize as local functions: plain ONNX Runtime runs a qdq file without us.

A runtime that has kernels or plugins for these operators takes those instead.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir

from hqmq_trt import contract
from hqmq_trt.codebooks import HALF_PRIMARIES

from . import bits
from .codec import Codec
from .encode import encode
from .ops import DOUBLE, FLOAT, HALF, INT64, Ops


def attach(model: ir.Model) -> None:
    """Give every HqmqQuantize and HqmqDequantize node of a model its body, as an overload of the function."""
    for node in model.graph:
        if node.domain != contract.DOMAIN or node.op_type not in _BODIES:
            continue
        codec = Codec.of(node)
        node.overload = codec.name
        key = (node.domain, node.op_type, node.overload)
        if key not in model.functions:
            model.functions[key] = _function(node, codec)
            # Opsets 24 and 25 add types to these operators and change nothing else; a function has its model's.
            model.functions[key].opset_imports[""] = model.opset_imports[""]


def _function(node: ir.Node, codec: Codec) -> ir.Function:
    o = Ops()
    inputs, outputs = _BODIES[node.op_type](o, codec)
    assert len(inputs) == len(node.inputs)
    attributes = [ir.Attr(name, attribute.type, None) for name, attribute in node.attributes.items()]
    return ir.Function(
        node.domain, node.op_type, node.overload, graph=o.graph("", inputs, outputs), attributes=attributes
    )


def _codebook(o: Ops, codec: Codec) -> list[ir.Value]:
    return [o.value("secondaries"), o.value("levels")] if codec.packed else []


def _column(o: Ops, x: Any, rank: int) -> Any:
    """[B] to [B, 1, …] of `rank` axes."""
    return o.Unsqueeze(x, list(range(1, rank)))


def _quantize(o: Ops, codec: Codec) -> tuple[list[ir.Value], list[Any]]:
    x, past_length, new_length = (o.value(name) for name in ("x", "past_length", "new_length"))
    codebook = _codebook(o, codec)
    past = [o.value(name) for name in codec.tensors]
    page = codec.page_size
    first = o.to(past_length, INT64)
    end = o.Add(first, o.to(new_length, INT64))
    rows = o.size(x, 2)
    # New tokens as rows [B*T, H, D]; those of sequence b begin at origin[b].
    tokens = o.Reshape(o.Transpose(o.to(x, HALF), perm=[0, 2, 1, 3]), [-1, codec.heads, codec.head_dim])
    origin = o.Mul(o.Range(_zero(), o.Squeeze(o.size(x, 0)), _one()), rows)

    def gather(o: Ops, position: Any, rank: int) -> Any:
        """Tokens at positions int64 [B, …] of `rank` axes, any row where there is none: [B, …, H, D]."""
        row = o.Min(o.Max(o.Sub(position, _column(o, first, rank)), 0), o.Sub(rows, 1))
        return o.Gather(tokens, o.Add(row, _column(o, origin, rank)), axis=0)

    last = o.Sub(_column(o, end, 2), 1)
    slot = np.arange(page, dtype=np.int64)
    newest = o.Sub(last, o.Mod(o.Sub(last, slot[None]), page))  # [B, P]: last token that goes to this slot
    if codec.sink_tokens:
        # Rows P… belong to one token each, whether it is new, held or still to come.
        sink = o.Add(o.Mul(last, 0), np.arange(codec.sink_tokens, dtype=np.int64)[None])
        newest = o.Concat(newest, sink, axis=1)  # [B, P+N]
    is_new = o.And(o.GreaterOrEqual(newest, _column(o, first, 2)), o.LessOrEqual(newest, last))
    moved = o.Transpose(gather(o, newest, 2), perm=[0, 2, 1, 3])
    tail = o.Where(o.Unsqueeze(is_new, [1, 3]), moved, past[-1])

    first_page, end_page = o.Div(first, page), o.Div(end, page)
    filled = o.ReduceMax(o.Sub(end_page, first_page), keepdims=0)
    then, otherwise = o.branch(), o.branch()
    token = then.Add(
        then.Mul(then.Add(_column(then, first_page, 3), _range3(then, filled)), page), slot[None, None]
    )  # [B, K, P]: tokens of the pages that may fill
    held = then.Unsqueeze(then.Less(token, _column(then, first, 3)), [3, 4])
    old = then.Unsqueeze(then.Transpose(_ring(then, past[-1], codec), perm=[0, 2, 1, 3]), [1])
    pages = then.Where(held, old, gather(then, token, 3))  # [B, K, P, H, D]
    pages = then.Reshape(then.Transpose(pages, perm=[3, 0, 1, 2, 4]), [codec.heads, -1, page, codec.head_dim])
    if codec.packed:
        coded = encode(then, pages, codebook[0], codebook[1], codec)
    else:
        coded = [bits.half_to_words(then, pages, codec.head_dim)]
    made = [
        _store(then, new, tensor, (first_page, end_page, filled)) for new, tensor in zip(coded, past[:-1], strict=True)
    ]
    kept = [otherwise.Identity(value) for value in past[:-1]]
    stored = o.If(
        o.Greater(filled, 0),
        then_branch=then.graph("fill", [], made),
        else_branch=otherwise.graph("keep", [], kept),
        outputs=len(made),
    )
    return [x, past_length, new_length, *codebook, *past], [*(stored if len(made) > 1 else [stored]), tail]


def _ring(o: Ops, tail: Any, codec: Codec) -> Any:
    """The rows of a tail [B, H, P+N, D] that hold the last P tokens."""
    return o.Slice(tail, [0], [codec.page_size], [2]) if codec.sink_tokens else tail


def _zero() -> Any:
    return np.array(0, np.int64)


def _one() -> Any:
    return np.array(1, np.int64)


def _range3(o: Ops, count: Any) -> Any:
    """0…count-1 as [1, K, 1]."""
    return o.Unsqueeze(o.Range(_zero(), count, _one()), [0, 2])


def _store(o: Ops, new: Any, past: Any, filling: tuple[Any, Any, Any]) -> Any:
    """Put new pages [H, B*K, rows, F] into a cache tensor [B, H, M*P or M, …] at pages first_page…end_page-1."""
    first_page, end_page, filled = filling
    shape = o.Shape(past)
    paged = o.Reshape(past, o.Concat([0, 0], [-1], o.Slice(o.Shape(new), [2], [4], [0]), axis=0))
    page = o.Unsqueeze(o.Range(_zero(), o.Squeeze(o.size(paged, 2)), _one()), [0])
    place = o.Sub(page, _column(o, first_page, 2))  # [B, M]
    hit = o.And(o.GreaterOrEqual(place, 0), o.Less(page, _column(o, end_page, 2)))
    place = o.Min(o.Max(place, 0), o.Sub(filled, 1))
    sequence = o.Range(_zero(), o.Squeeze(o.size(past, 0)), _one())
    place = o.Add(place, _column(o, o.Mul(sequence, filled), 2))
    moved = o.Transpose(o.Gather(new, place, axis=1), perm=[1, 0, 2, 3, 4])  # [B, H, M, rows, F]
    return o.Reshape(o.Where(o.Unsqueeze(hit, [1, 3, 4]), moved, paged), shape)


def _dequantize(o: Ops, codec: Codec) -> tuple[list[ir.Value], list[Any]]:
    length = o.value("length")
    codebook = _codebook(o, codec)
    cache = dict(zip(codec.tensors, (o.value(name) for name in codec.tensors), strict=True))
    page, size = codec.page_size, codec.head_dim
    if codec.packed:
        x = _decode(o, cache, codebook[0], codebook[1], codec)
    else:
        x = bits.words_to_half(o, cache["codes"], size)
    capacity = o.size(cache["codes"], 2)
    held = o.Unsqueeze(o.to(length, INT64), [1, 2, 3])
    row = o.Unsqueeze(o.Range(_zero(), o.Squeeze(capacity), _one()), [0, 1, 3])
    # Row t of the tail is token t mod P of the page that is not full.
    stored = o.to(cache["tail"], FLOAT)
    tail = o.Expand(o.Unsqueeze(_ring(o, stored, codec), [2]), o.Concat([1, 1], o.Div(capacity, page), [1, 1], axis=0))
    tail = o.Reshape(tail, o.Shape(x))
    full = o.Mul(o.Div(held, page), page)
    if codec.sink_tokens:
        # Row P + t is token t, exactly, of what page 0 codes too; past the N of them, any row.
        place = o.Min(o.Add(o.Range(_zero(), o.Squeeze(capacity), _one()), page), page + codec.sink_tokens - 1)
        sink = o.Gather(stored, place, axis=2)
        x = o.Where(o.Less(row, codec.sink_tokens), sink, x)
    x = o.Where(o.Less(row, full), x, o.Where(o.Less(row, held), tail, 0.0))
    return [length, *codebook, *cache.values()], [x]


def _decode(o: Ops, cache: dict[str, Any], secondaries: Any, levels: Any, codec: Codec) -> Any:
    """All pages to float32 [B, H, M*P, D]: the steps of hqmq_trt.oracle.codec.decode_page."""
    code = bits.unpack(o, cache["codes"], codec)
    index = o.Mod(code, 1 << codec.index_bits)
    level = o.Mod(o.Div(code, 1 << codec.index_bits), 1 << codec.radius_bits)
    minus = o.GreaterOrEqual(code, 1 << (codec.index_bits + codec.radius_bits))
    radius = o.Mul(o.Gather(levels, level), bits.unpack_scales(o, cache["scales"], codec))
    radius = o.Where(minus, o.Neg(radius), radius)
    # An index past the table can only stand in rows that hold nothing.
    heads = np.arange(codec.heads, dtype=np.int64).reshape(1, -1, 1, 1) * (12 * codec.secondaries)
    entry = o.Add(o.Min(index, 12 * codec.secondaries - 1), heads)
    x = o.Mul(o.Gather(_words(o, secondaries), entry, axis=0), o.Unsqueeze(radius, [4]))  # [B, H, R, C, 4]
    if codec.outlier_capacity:
        x = _place_outliers(o, x, cache, codec)
    x = o.Reshape(x, [0, 0, -1, codec.page_size, codec.head_dim])
    if codec.page_mean:
        x = o.Add(x, o.Unsqueeze(o.to(cache["mean"], FLOAT), [3]))
    x = o.Reshape(x, [0, 0, -1, codec.head_dim])
    return o.hadamard(x, codec.head_dim) if codec.hadamard else x


def _words(o: Ops, secondaries: Any) -> Any:
    """The 12*S codewords of every head [H*12*S, 4], in float64 and rounded once."""
    q = [o.to(part, DOUBLE) for part in o.split(secondaries, 4)]  # each [H, S, 1]
    p = [HALF_PRIMARIES[:, i].reshape(1, 1, 12) for i in range(4)]
    products = (
        ((1, 0, 0), (-1, 1, 1), (-1, 2, 2), (-1, 3, 3)),
        ((1, 0, 1), (1, 1, 0), (1, 2, 3), (-1, 3, 2)),
        ((1, 0, 2), (-1, 1, 3), (1, 2, 0), (1, 3, 1)),
        ((1, 0, 3), (1, 1, 2), (-1, 2, 1), (1, 3, 0)),
    )  # (sign, component of p, component of q)
    components = []
    for (_, p0, q0), *rest in products:
        total = o.Mul(q[q0], p[p0])
        for sign, i, j in rest:
            total = (o.Add if sign > 0 else o.Sub)(total, o.Mul(q[j], p[i]))
        components.append(o.Unsqueeze(o.to(total, FLOAT), [3]))
    return o.Reshape(o.Concat(*components, axis=3), [-1, 4])


def _place_outliers(o: Ops, x: Any, cache: dict[str, Any], codec: Codec) -> Any:
    """x [B, H, R, C, 4] with the outliers of Med3x in the place of their chunks."""
    total = codec.page_size * codec.chunks
    words = bits.unsigned(o, o.Slice(cache["outlier_mask"], [0], [codec.mask_words - 1], [3]))
    flags = o.Mod(o.Div(o.Unsqueeze(words, [4]), np.left_shift(1, np.arange(32, dtype=np.int64))), 2)
    flags = o.Slice(o.Reshape(flags, [0, 0, 0, -1]), [0], [total], [3])  # [B, H, M, P*C]
    slot = o.Sub(o.CumSum(flags, np.array(3, np.int64)), 1)
    slot = o.Min(o.Max(slot, 0), codec.outlier_capacity - 1)
    value = o.GatherND(o.to(cache["outlier_value"], FLOAT), o.Unsqueeze(slot, [4]), batch_dims=3)
    shape = o.Shape(x)
    x = o.Reshape(x, o.Concat(o.Shape(flags), [4], axis=0))
    return o.Reshape(o.Where(o.Unsqueeze(o.Equal(flags, 1), [4]), value, x), shape)


_BODIES = {contract.QUANTIZE: _quantize, contract.DEQUANTIZE: _dequantize}
