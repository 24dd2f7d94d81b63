"""MultiHeadAttention of ONNX Runtime, written out as the decomposed form that attention.py recognises.

Cases: three-dimensional q, K and V, packed KV or packed QKV; with a cache of its own or over joined caches;
key_padding_mask by columns or by rows and columns, attention_bias, unidirectional.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from hqmq_trt.errors import HqmqError

from .building import Builder
from .microsoft_nodes import Case, Context, Feed, Rule, Trial, draw, given, need, typed, unread, width
from .microsoft_scores import Scores, bias_shape, join_heads, low, split_heads


def multi_sizes(node: ir.Node) -> tuple[int, int]:
    """(heads, head_dim) of MultiHeadAttention."""
    heads = node.attributes.get_int("num_heads", 0)
    q = need(node, 0, "query")
    if q.shape is not None and len(q.shape) == 5:
        features = q.shape[4] if isinstance(q.shape[4], int) else None
    else:
        features = width(q)
        features = None if features is None or heads <= 0 or features % heads else features // heads
    past = given(node, 6)
    if features is None and past is not None and past.shape is not None and isinstance(past.shape[3], int):
        features = int(past.shape[3])
    if features is None:
        raise HqmqError("head_dim is symbolic, and the width of its queries does not tell it")
    return heads, features


def _multi(context: Context, node: ir.Node) -> Sequence[ir.Value | None]:
    heads, dim = multi_sizes(node)
    for place, what in ((8, "past_sequence_length"), (9, "cache_indirection")):
        if given(node, place) is not None:
            raise HqmqError(f"{what} (a cache of fixed size) is not supported")
    unread(node, qk=3)
    build = Builder(context.graph, node, str(node.name))
    q, k, v = _split(build, node, heads, dim)
    past = [given(node, 6), given(node, 7)]
    keys, values = k, v
    if past[0] is not None and past[1] is not None:
        keys, values = build.op("Concat", past[0], k, axis=2), build.op("Concat", past[1], v, axis=2)
    elif past != [None, None]:
        raise HqmqError("has only one of past_key and past_value")
    assert q.dtype is not None
    scores = Scores(build, q, keys, node.attributes.get_float("scale", 0.0) or dim**-0.5)
    if (bias := given(node, 5)) is not None:
        scores.add(bias)
    if (mask := given(node, 4)) is not None:
        scores.add(_padding(build, node, mask, q.dtype))
    if node.attributes.get_int("unidirectional", 0):
        if past[0] is None:
            raise HqmqError("is unidirectional, but its cache is joined outside: not supported")
        scores.keep(context.seen(build, past[0], 0))
    y = join_heads(build, scores.weigh(values, None, heads), heads * dim)
    return [y, keys, values, None]


def _split(build: Builder, node: ir.Node, heads: int, dim: int) -> tuple[ir.Value, ir.Value, ir.Value]:
    """q, K and V [B, heads, T, D] of MultiHeadAttention, its bias added."""
    form = _form(node)
    x = need(node, 0, "query")
    past = given(node, 6)
    typed(x) if past is None else typed(x, past)

    def part(value: ir.Value, place: int) -> ir.Value:
        """[B, T, heads, parts, D] → [B, heads, T, D]."""
        chosen = build.op("Gather", value, build.int(place), axis=3)
        return build.op("Transpose", chosen, perm=[0, 2, 1, 3])

    if form == "qkv":
        parts = [part(x, place) for place in range(3)]
    elif form == "kv":
        kv = need(node, 1, "key")
        typed(kv, x)
        parts = [split_heads(build, x, heads, dim), part(kv, 0), part(kv, 1)]
    else:
        given_parts = [x, need(node, 1, "key"), need(node, 2, "value")]
        typed(*given_parts)
        parts = [split_heads(build, value, heads, dim) for value in given_parts]
    if (bias := given(node, 3)) is not None:
        features = heads * dim
        for place in range(3):
            piece = build.op(
                "Slice", bias, build.ints(place * features), build.ints((place + 1) * features), build.ints(0)
            )
            parts[place] = build.op("Add", parts[place], build.op("Reshape", piece, build.ints(1, heads, 1, dim)))
    return parts[0], parts[1], parts[2]


def _form(node: ir.Node) -> str:
    """``separate``, ``kv`` or ``qkv``."""
    ranks = [None if (v := given(node, p)) is None else None if v.shape is None else len(v.shape) for p in range(3)]
    if given(node, 1) is None:
        if ranks[0] != 5:
            raise HqmqError("has no key, and its query is not packed QKV [batch, tokens, heads, 3, head_dim]")
        return "qkv"
    if given(node, 2) is None:
        if ranks[1] != 5:
            raise HqmqError("has no value, and its key is not packed KV [batch, tokens, heads, 2, head_dim]")
        return "kv"
    if 4 in ranks:
        raise HqmqError("its key and value are of four dimensions (cross attention), which is not supported")
    return "separate"


def _padding(build: Builder, node: ir.Node, mask: ir.Value, dtype: ir.DataType) -> ir.Value:
    """What key_padding_mask [B, S] or [B, T, S] adds to scores."""
    rank = None if mask.shape is None else len(mask.shape)
    if rank not in (2, 3):
        raise HqmqError(f"its key_padding_mask '{mask.name}' is not of shape [batch, tokens] or [batch, rows, tokens]")
    wide = build.op("Unsqueeze", mask, build.ints(1, 2) if rank == 2 else build.ints(1))
    shown = build.op("Greater", build.cast(wide, ir.DataType.INT64), build.int(0), dtype=ir.DataType.BOOL)
    hidden = build.float(max(node.attributes.get_float("mask_filter_value", -10000.0), low(dtype)), dtype)
    return build.op("Where", shown, build.float(0.0, dtype), hidden, dtype=dtype)


def _multi_trials(node: ir.Node, rng: np.random.Generator) -> Sequence[Trial]:
    heads, dim = multi_sizes(node)
    scale = node.attributes.get_float("scale", 0.0) or dim**-0.5
    spread = min(2.0 / (abs(scale) * dim**0.5), 1e3)
    form, own = _form(node), given(node, 6) is not None
    mask = given(node, 4)
    trials = []
    for case in (Case(1, 3, 5), Case(2, 3, 5), Case(2, 1, 9), Case(2, 7, 0)):
        batch, rows = case.batch, case.rows
        keys = rows if own or form == "qkv" else case.total
        if form == "qkv":
            feed: Feed = {0: draw(rng, batch, rows, heads, 3, dim)}
        elif form == "kv":
            feed = {0: draw(rng, batch, rows, heads * dim) * spread, 1: draw(rng, batch, keys, heads, 2, dim)}
        else:
            feed = {p: draw(rng, batch, keys if p else rows, heads * dim) * (1 if p else spread) for p in range(3)}
        total = case.total if own else keys
        feed[3] = draw(rng, 3 * heads * dim)
        shape = (batch, total) if mask is None or mask.shape is None or len(mask.shape) == 2 else (batch, rows, total)
        feed[4] = rng.integers(0, 4, shape) > 0
        feed[4][..., 0] = True
        feed[5] = draw(rng, *bias_shape(given(node, 5), batch, heads, Case(batch, rows, total - rows)))
        feed[6], feed[7] = (draw(rng, batch, heads, case.past, dim) for _ in range(2))
        trials.append(Trial(feed, tokens=(batch, rows)))
    return trials


def _multi_stand_in(context: Context, node: ir.Node) -> bool:
    """q, K and V apart: what packed ones hold by their documented layout, which CPU kernels do not take."""
    form = _form(node)
    if form == "separate":
        return False
    heads, dim = multi_sizes(node)
    build = Builder(context.graph, node, "stand_in")
    packed = need(node, 0 if form == "qkv" else 1, "query")
    if len(node.inputs) < 3:
        node.resize_inputs(3)
    for part, place in enumerate(range(3) if form == "qkv" else (1, 2)):
        chosen = build.op("Gather", packed, build.int(part), axis=3)
        node.replace_input_with(place, build.op("Reshape", chosen, build.ints(0, 0, heads * dim)))
    return True


MULTI = {
    "MultiHeadAttention": Rule(
        _multi,
        _multi_trials,
        {"num_heads": None, "scale": None, "unidirectional": (0, 1), "mask_filter_value": None},
        10,
        stand_in=_multi_stand_in,
    ),
}
