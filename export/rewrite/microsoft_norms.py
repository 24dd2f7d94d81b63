"""Norms and activations of ONNX Runtime, written out in standard operators.

Cases:
1. SimplifiedLayerNormalization (which ONNX Runtime keeps in the default domain) over the last axis;
2. SkipSimplifiedLayerNormalization, SkipLayerNormalization: a sum, read or not, and its norm;
3. Gelu, FastGelu, BiasGelu, QuickGelu.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir

from hqmq_trt.errors import HqmqError

from .building import Builder
from .microsoft_nodes import Context, Rule, Trial, draw, given, need, typed, unread, wanted, width

_FLOAT = ir.DataType.FLOAT


def rms(build: Builder, x: ir.Value, weight: ir.Value, epsilon: float) -> ir.Value:
    """x / sqrt(mean(x²) + epsilon) * weight over the last axis, in float32; the type is that of `weight`."""
    dtype = typed(weight, x)
    wide = build.cast(x, _FLOAT)
    mean = build.op("ReduceMean", build.op("Mul", wide, wide), build.ints(-1), keepdims=1)
    spread = build.op("Sqrt", build.op("Add", mean, build.float(epsilon, _FLOAT)))
    scaled = build.op("Mul", build.op("Div", wide, spread), build.cast(weight, _FLOAT))
    return build.cast(scaled, dtype)


def _simplified(context: Context, node: ir.Node) -> Sequence[ir.Value | None]:
    x, weight = need(node, 0, "input"), need(node, 1, "scale")
    axis = node.attributes.get_int("axis", -1)
    rank = None if x.shape is None else len(x.shape)
    if axis != -1 and (rank is None or axis != rank - 1):
        raise HqmqError(f"is over axis {axis}, not the last")
    unread(node, inv_std_var=1)
    build = Builder(context.graph, node, str(node.name))
    typed(x, weight)
    return [rms(build, x, weight, node.attributes.get_float("epsilon", 1e-5))]


def _skip(context: Context, node: ir.Node) -> Sequence[ir.Value | None]:
    simple = node.op_type == "SkipSimplifiedLayerNormalization"
    x, skip, weight = need(node, 0, "input"), need(node, 1, "skip"), need(node, 2, "gamma")
    beta, bias = (None, given(node, 3)) if simple else (given(node, 3), given(node, 4))
    unread(node, mean=1, inv_std_var=2)
    build = Builder(context.graph, node, str(node.name))
    typed(x, skip, weight)
    total = build.op("Add", x, skip)
    if bias is not None:
        total = build.op("Add", total, bias)
    epsilon = node.attributes.get_float("epsilon", 1e-5 if simple else 1e-12)
    if simple:
        y = rms(build, total, weight, epsilon)
    else:
        rest = [] if beta is None else [beta]
        y = build.op("LayerNormalization", total, weight, *rest, axis=-1, epsilon=epsilon)
    return [y, None, None, total if wanted(node, 3) else None]


def _norm_trials(node: ir.Node, rng: np.random.Generator) -> Sequence[Trial]:
    features = width(given(node, 1 if node.op_type == "SimplifiedLayerNormalization" else 2))
    if features is None:
        raise HqmqError("its weights are of unknown size")
    first = node.inputs[0]
    rank = 3 if first is None or first.shape is None else len(first.shape)
    trials = []
    for strength in (1.0, 1e-3, 30.0):
        shape = (*(2, 3, 5, 2, 2)[: rank - 1], features)
        feed = {
            position: draw(rng, *(shape if _activation(node, position) else (features,))) * strength
            for position in range(len(node.inputs))
            if given(node, position) is not None
        }
        trials.append(Trial(feed))
    return trials


def _activation(node: ir.Node, position: int) -> bool:
    return position == 0 or (position == 1 and node.op_type.startswith("Skip"))


def _gelu(context: Context, node: ir.Node) -> Sequence[ir.Value | None]:
    x = need(node, 0, "input")
    bias = given(node, 1)
    build = Builder(context.graph, node, str(node.name))
    dtype = typed(x) if bias is None else typed(x, bias)
    if bias is not None:
        x = build.op("Add", x, bias)
    if node.op_type == "QuickGelu":
        alpha = build.float(node.attributes.get_float("alpha", 1.702), dtype)
        return [build.op("Mul", x, build.op("Sigmoid", build.op("Mul", x, alpha)))]
    if node.op_type == "FastGelu":
        cube = build.op("Mul", build.op("Mul", x, x), build.float(0.035677408136300125, dtype))
        inner = build.op("Mul", x, build.op("Add", cube, build.float(0.7978845608028654, dtype)))
        inner = build.op("Tanh", inner)
    else:
        inner = build.op("Erf", build.op("Mul", x, build.float(0.5**0.5, dtype)))
    half = build.op("Mul", x, build.float(0.5, dtype))
    return [build.op("Mul", half, build.op("Add", inner, build.float(1.0, dtype)))]


def _gelu_trials(node: ir.Node, rng: np.random.Generator) -> Sequence[Trial]:
    features = width(given(node, 1)) or width(given(node, 0)) or 8
    feed = {0: draw(rng, 2, 3, features) * 3}
    if given(node, 1) is not None:
        feed[1] = draw(rng, features)
    return [Trial(feed)]


_EPSILON = {"epsilon": None}
NORMS = {
    "SimplifiedLayerNormalization": Rule(_simplified, _norm_trials, {**_EPSILON, "axis": None, "stash_type": (1,)}, 2),
    "SkipSimplifiedLayerNormalization": Rule(_skip, _norm_trials, _EPSILON, 4),
    "SkipLayerNormalization": Rule(_skip, _norm_trials, _EPSILON, 5),
    "Gelu": Rule(_gelu, _gelu_trials, {}, 1),
    "FastGelu": Rule(_gelu, _gelu_trials, {}, 2),
    "BiasGelu": Rule(_gelu, _gelu_trials, {}, 2),
    "QuickGelu": Rule(_gelu, _gelu_trials, {"alpha": None}, 1),
}
