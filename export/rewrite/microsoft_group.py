"""GroupQueryAttention of ONNX Runtime, written out as the decomposed form that attention.py recognises.

Cases, all with a cache: separate or packed q, K and V; rotary embedding and norms of q and k inside; window, soft-cap,
sinks, smooth softmax, attention_bias. A window-sized cache (sliding_window_cache) becomes a whole one: a row sees the
same keys. Which positions and keys `seqlens_k` stands for is looked at in microsoft.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from hqmq_trt.errors import HqmqError

from .building import Builder, constant
from .interface import FLOATS
from .microsoft_nodes import Case, Context, Feed, Rule, Trial, draw, given, need, unread, wanted, width
from .microsoft_norms import rms
from .microsoft_rotary import Rotation, rotate
from .microsoft_scores import Scores, bias_shape, join_heads, split_heads

_INT64 = ir.DataType.INT64


def group_sizes(node: ir.Node) -> tuple[int, int, int]:
    """(query heads, cache heads, head_dim) of GroupQueryAttention."""
    heads, kv_heads = (node.attributes.get_int(name, 0) for name in ("num_heads", "kv_num_heads"))
    if heads <= 0 or kv_heads <= 0 or heads % kv_heads:
        raise HqmqError(f"{heads} query heads are no multiple of {kv_heads} cache heads")
    past = need(node, 3, "past_key: only attention with a cache is supported")
    fixed = past.shape[3] if past.shape is not None and len(past.shape) == 4 else None
    if isinstance(fixed, int):
        return heads, kv_heads, fixed
    features, all_heads = width(given(node, 0)), heads if given(node, 1) is not None else heads + 2 * kv_heads
    if features is None or features % all_heads:
        raise HqmqError("head_dim is symbolic, and the width of its queries does not tell it")
    return heads, kv_heads, features // all_heads


def _group(context: Context, node: ir.Node) -> Sequence[ir.Value | None]:
    heads, kv_heads, dim = group_sizes(node)
    _check_group(node)
    past = [need(node, 3, "past_key"), need(node, 4, "past_value")]
    dtype = past[0].dtype
    if dtype is None or dtype not in FLOATS:
        raise HqmqError(f"its cache '{past[0].name}' is quantised ({dtype}); export the model with a plain one")
    build = Builder(context.graph, node, str(node.name))
    x = need(node, 0, "query")
    x.type = x.type or ir.TensorType(dtype)
    if given(node, 1) is None:
        both = split_heads(build, x, heads + 2 * kv_heads, dim)
        ends = (heads, heads + kv_heads, heads + 2 * kv_heads)
        q, k, v = (
            build.op("Slice", both, build.ints(first), build.ints(end), build.ints(1))
            for first, end in zip((0, *ends[:2]), ends, strict=True)
        )
    else:
        key, value = need(node, 1, "key"), need(node, 2, "value (while it has a key)")
        key.type, value.type = key.type or x.type, value.type or x.type
        q, k, v = (
            split_heads(build, x, heads, dim),
            split_heads(build, key, kv_heads, dim),
            split_heads(build, value, kv_heads, dim),
        )
    if given(node, 14) is not None:
        common = node.attributes.get_float("qk_norm_epsilon", 1e-6)
        for place, name in ((14, "q_norm_epsilon"), (15, "k_norm_epsilon")):
            epsilon = node.attributes.get_float(name, common)
            normed = rms(build, (q, k)[place - 14], need(node, place, name.replace("epsilon", "weight")), epsilon)
            q, k = (normed, k) if place == 14 else (q, normed)
    if node.attributes.get_int("do_rotary", 0):
        positions = given(node, 9) or _positions(context, build, need(node, 5, "seqlens_k"))
        turn = Rotation(need(node, 7, "cos_cache"), need(node, 8, "sin_cache"), positions, dim)
        turn.interleaved = bool(node.attributes.get_int("rotary_interleaved", 0))
        q, k = rotate(context, build, q, turn), rotate(context, build, k, turn)
    keys, values = (build.op("Concat", held, new, axis=2) for held, new in zip(past, (k, v), strict=True))
    scale = node.attributes.get_float("scale", 0.0) or dim**-0.5
    window = max(node.attributes.get_int("local_window_size", -1), 0)
    seen = context.seen(build, past[0], window)
    sinks = given(node, 11)
    if sinks is None and node.attributes.get_int("smooth_softmax", 0) == 1:
        sinks = constant(context.graph, f"zeros.{heads}.{dtype.name}", np.zeros(heads, dtype.numpy()), dtype)
    scores = Scores(build, q, _repeat(build, keys, heads, kv_heads, dim), scale, _softcap(node))
    if (bias := given(node, 10)) is not None:
        scores.add(bias)
    scores.keep(seen)
    y = join_heads(build, scores.weigh(_repeat(build, values, heads, kv_heads, dim), sinks, heads), heads * dim)
    return [y, keys, values, None]


def _softcap(node: ir.Node) -> float:
    return max(node.attributes.get_float("softcap", 0.0), 0.0)


def _check_group(node: ir.Node) -> None:
    for place, what in ((12, "k_scale"), (13, "v_scale")):
        if given(node, place) is not None:
            raise HqmqError(f"its cache is quantised ({what}); export the model with a plain one")
    for name in ("k_quant_type", "v_quant_type"):
        if node.attributes.get_string(name, "NONE") != "NONE":
            raise HqmqError(f"its cache is quantised ({name}); export the model with a plain one")
    if node.attributes.get_int("kv_cache_bit_width", 0):
        raise HqmqError("its cache is quantised (kv_cache_bit_width); export the model with a plain one")
    if given(node, 16) is not None:
        raise HqmqError("query_seqlens is not supported")
    if node.attributes.get_int("sliding_window_cache", 0) and node.attributes.get_int("local_window_size", -1) <= 0:
        raise HqmqError("has a window-sized cache, but no window")
    unread(node, output_qk=3)
    for place in (1, 2):
        if not wanted(node, place):
            raise HqmqError("its cache with the new rows is not read")


def _positions(context: Context, build: Builder, seqlens: ir.Value) -> ir.Value:
    """Positions [B, T] of new rows: seqlens_k is the position of the last."""

    def make() -> ir.Value:
        last = build.op("Reshape", build.cast(seqlens, _INT64), build.ints(-1, 1))
        first = build.op("Sub", build.op("Add", last, build.int(1)), context.new_rows(build))
        return build.op("Add", first, context.row(build))

    return context.once(("positions", id(seqlens)), make)


def _repeat(build: Builder, x: ir.Value, heads: int, kv_heads: int, dim: int) -> ir.Value:
    """[B, kv_heads, S, D] → [B, heads, S, D]."""
    if heads == kv_heads:
        return x
    wide = build.op("Expand", build.op("Unsqueeze", x, build.ints(2)), build.ints(1, 1, heads // kv_heads, 1, 1))
    return build.op("Reshape", wide, build.ints(0, heads, -1, dim))


_CASES = (Case(1, 3, 5), Case(2, 1, 9), Case(2, 7, 0))
"""GroupQueryAttention takes several sequences with several new rows and a cache only where query_seqlens is given."""


def _group_trials(node: ir.Node, rng: np.random.Generator) -> Sequence[Trial]:
    heads, kv_heads, dim = group_sizes(node)
    window = max(node.attributes.get_int("local_window_size", -1), 0)
    scale = node.attributes.get_float("scale", 0.0) or dim**-0.5
    cases = list(_CASES)
    if window:
        cases += [Case(1, 3, window + 1), Case(2, 1, max(window - 1, 0)), Case(2, 1, window)]
    tables = [given(node, place) for place in (7, 8)]
    reach = min((int(t.shape[0]) for t in tables if t is not None and isinstance(t.shape[0], int)), default=1 << 30)
    spread = max(2.0, _softcap(node)) / (abs(scale) * dim**0.5)
    packed = given(node, 1) is None
    trials = []
    for case in cases:
        if case.total > reach:
            continue
        batch, rows = case.batch, case.rows
        q, k, v = (draw(rng, batch, rows, count * dim) for count in (heads, kv_heads, kv_heads))
        q = q * min(spread, 1e3)
        feed: Feed = {0: np.concatenate([q, k, v], 2)} if packed else {0: q, 1: k, 2: v}
        feed[3], feed[4] = (draw(rng, batch, kv_heads, case.past, dim) for _ in range(2))
        feed[5] = np.full(batch, case.total - 1)
        feed[6] = np.array(case.total)
        feed[9] = np.tile(np.arange(case.past, case.total), (batch, 1))
        feed[10] = draw(rng, *bias_shape(given(node, 10), batch, heads, case))
        feed[11] = draw(rng, heads)
        theirs = dict(feed)
        if node.attributes.get_int("sliding_window_cache", 0):
            room = max(window, case.total)
            for place in (3, 4):
                theirs[place] = np.zeros((batch, kv_heads, room, dim), np.float32)
                theirs[place][:, :, : case.past] = feed[place]
        trials.append(Trial(theirs, feed, (batch, rows), {1: case.total, 2: case.total}))
    if not trials:
        raise HqmqError(f"its cos_cache has {reach} rows, too few to try it")
    return trials


def _group_stand_in(context: Context, node: ir.Node) -> bool:
    """Norms of q and k outside: the documented meaning of q_norm_weight, which CPU kernels refuse."""
    weights = [given(node, place) for place in (14, 15)]
    if weights[0] is None or weights[1] is None or given(node, 1) is None:
        return False
    _, _, dim = group_sizes(node)
    build = Builder(context.graph, node, "stand_in")
    common = node.attributes.get_float("qk_norm_epsilon", 1e-6)
    for place, name, weight in zip((0, 1), ("q_norm_epsilon", "k_norm_epsilon"), weights, strict=True):
        x = node.inputs[place]
        assert x is not None
        features = width(x)
        if features is None:
            return False
        parts = build.op("Reshape", x, build.ints(0, 0, -1, dim))
        epsilon = node.attributes.get_float(name, common)
        normed = build.op("SimplifiedLayerNormalization", parts, weight, axis=-1, epsilon=epsilon, stash_type=1)
        node.replace_input_with(place, build.op("Reshape", normed, build.ints(0, 0, features)))
        node.replace_input_with(14 + place, None)
    for name in ("qk_norm_epsilon", "q_norm_epsilon", "k_norm_epsilon"):
        node.attributes.pop(name, None)
    return True


GROUP = {
    "GroupQueryAttention": Rule(
        _group,
        _group_trials,
        {
            "num_heads": None,
            "kv_num_heads": None,
            "scale": None,
            "softcap": None,
            "local_window_size": None,
            "do_rotary": (0, 1),
            "rotary_interleaved": (0, 1),
            "smooth_softmax": (-1, 0, 1),
            "sliding_window_cache": (0, 1),
            "causal": (1,),
            "qk_output": (0,),
            "qk_norm_epsilon": None,
            "q_norm_epsilon": None,
            "k_norm_epsilon": None,
            "k_quant_type": None,
            "v_quant_type": None,
            "kv_cache_bit_width": None,
        },
        17,
        stand_in=_group_stand_in,
    ),
}
