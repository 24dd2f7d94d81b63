"""Trying a recognised attention: its nodes run on random q, K and V must give what its parameters say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError

from .evaluate import Case, Part
from .interface import Interface
from .layer import Layer
from .masks import expected
from .walk import name

Array = NDArray[Any]
_TOLERANCE = {ir.DataType.FLOAT16: 1e-2}


def verify(model: ir.Model, interface: Interface, layer: Layer) -> None:
    """Run a layer's nodes and compare with attention of its parameters, in float64.

    Raises:
        HqmqError: they differ, or the nodes depend on something else.
    """
    cut = [layer.q, layer.key.new, layer.value.new]
    part = Part(model, interface, [layer.y], cut)
    if interface.ids.name in part.given:
        raise HqmqError(f"{name(layer.node)}: depends on the tokens themselves beside q, K and V")
    tolerance = _TOLERANCE.get(layer.q.dtype, 2e-4)
    rng = np.random.default_rng(layer.index)
    for case in _cases(layer):
        for strength in (2.0, max(2.0, layer.softcap)):
            fed, arrays = _feed(layer, case, strength, rng)
            (found,) = part.run(case, fed)
            wanted = reference(layer, case, *arrays)
            if found.shape != wanted.shape:
                raise HqmqError(f"{name(layer.node)}: gives {list(found.shape)} where {list(wanted.shape)} is expected")
            off = float(np.abs(found - wanted).max())
            if not off <= tolerance:
                raise HqmqError(
                    f"{name(layer.node)}: is not the attention it looks like (scale {layer.scale:.6g}, window "
                    f"{layer.window}, soft-cap {layer.softcap:.6g}{', sinks' if layer.sinks else ''}): tried, its "
                    f"result differs by {off:.2g}"
                )


def _cases(layer: Layer) -> Sequence[Case]:
    rows = 3 if layer.chunks else 1
    cases = [Case(2, rows, 5), Case(1, 1, 9), Case(3, 7, 0)]
    if 0 < layer.window <= 64:
        cases.append(Case(1, rows, layer.window + 1))
    return cases


def _feed(
    layer: Layer, case: Case, strength: float, rng: np.random.Generator
) -> tuple[dict[str, Array], tuple[Array, Array, Array]]:
    """Arrays by name, and (q, K, V); scores have about the standard deviation `strength`."""
    heads, dim = layer.num_kv_heads, layer.head_dim
    spread = strength / max(abs(layer.scale) * dim**0.5, 1e-12)

    def draw(count: int, rows: int, size: float = 1.0) -> Array:
        half = layer.q.dtype == ir.DataType.FLOAT16
        made = rng.standard_normal((case.batch, count, rows, dim)) * min(size, 1e3)
        return made.astype(np.float16 if half else np.float32).astype(np.float32)

    q = draw(layer.num_heads, case.rows, spread)
    sides = [(draw(heads, case.past), draw(heads, case.rows)) for _ in range(2)]
    fed = {str(layer.q.name): q}
    for join, (past, new) in zip((layer.key, layer.value), sides, strict=True):
        fed[str(join.past.name)], fed[str(join.new.name)] = past, new
    k, v = (np.concatenate(side, 2) for side in sides)
    return fed, (q, k, v)


def reference(layer: Layer, case: Case, q: Array, k: Array, v: Array) -> Array:
    """Attention [B, Hq, T, D] of q [B, Hq, T, D] over k, v [B, H, S, D] with a layer's parameters, in float64."""
    group = layer.num_heads // layer.num_kv_heads
    k, v = (x.astype(np.float64).repeat(group, 1) for x in (k, v))
    scores = q.astype(np.float64) @ k.transpose(0, 1, 3, 2) * layer.scale
    if layer.softcap:
        scores = layer.softcap * np.tanh(scores / layer.softcap)
    scores = np.where(expected(case, layer.window)[:, None], scores, -np.inf)
    if layer.sinks is not None:
        assert layer.sinks.const_value is not None
        sinks = layer.sinks.const_value.numpy().astype(np.float64).reshape(1, -1, 1, 1)
        scores = np.concatenate([scores, np.broadcast_to(sinks, (*scores.shape[:3], 1))], 3)
    weights = np.exp(scores - scores.max(3, keepdims=True))
    weights /= weights.sum(3, keepdims=True)
    return np.asarray(weights[..., : k.shape[2]] @ v)
