"""Trying the model itself: the rows of a call must not know of each other but through the cache.

The new graph takes sequences of different lengths, padded, and prompts in chunks. That is sound only for a decoder
whose every row depends on its own token, its position and the cache; a node that mixes rows in another way (a
convolution, a norm over tokens, state that is not in the cache) shows here.

Compared are the hidden states before the last projection where that can be recognised, else the logits. The weights
stay in their file and are mapped from there.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError

from .evaluate import Case, _as
from .interface import Interface
from .layer import Layer
from .logits import rows_of
from .running import open_session

_TOKENS, _FIRST = 7, 4
_TOLERANCE = {ir.DataType.FLOAT16: 2e-2}
"""Of the largest element; 1e-3 for other types (bfloat16 is computed as float32)."""


def try_rows(model: ir.Model, interface: Interface, layers: list[Layer]) -> None:
    """Run the model whole, in chunks, and with other neighbours in its batch.

    A model that runs for one sequence only is tried with one.

    Raises:
        HqmqError: ONNX Runtime cannot run the model, or rows depend on each other.
    """
    run = _Model(model, interface, layers)
    vocabulary = int(interface.logits.shape[2])
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, _TOKENS))
    ids[1, :2] = ids[0, :2]
    try:
        whole, _ = run(ids, {})
    except HqmqError:  # exporters' rotary embeddings without position_ids work for one sequence only
        ids = ids[:1]
        whole, _ = run(ids, {})
    if not np.isfinite(whole).all():
        raise HqmqError("tried on random tokens it gives numbers that are not finite: its type may be too narrow")
    limit = _TOLERANCE.get(interface.past[0].dtype, 1e-3) * max(float(np.abs(whole).max()), 1e-3)
    first, cache = run(ids[:, :_FIRST], {})
    parts = [first]
    step = _TOKENS if all(layer.chunks for layer in layers) else 1
    for start in range(_FIRST, _TOKENS, step):
        rest, cache = run(ids[:, start : start + step], cache)
        parts.append(rest)
    alone, _ = run(ids[:1], {})
    for what, off in (
        ("a prompt in two parts gives other logits than in one", np.abs(np.concatenate(parts, 1) - whole).max()),
        ("a sequence gives other logits alone than in a batch", np.abs(alone - whole[:1]).max()),
    ):
        if not float(off) <= limit:
            raise HqmqError(f"{what} (they differ by {float(off):.2g}): the model keeps state outside its cache")


class _Model:
    def __init__(self, model: ir.Model, interface: Interface, layers: list[Layer]) -> None:
        self._interface = interface
        result, _ = rows_of(interface.logits)
        joins = [join for layer in layers for join in (layer.key, layer.value)]
        self._past = [str(join.past.name) for join in joins]
        self._names = [str(value.name) for value in (result, *(join.full for join in joins))]
        nodes, inputs, weights = _above(model.graph, [result, *(join.full for join in joins)])
        self._given = {value.name for value in inputs}
        try:
            names = list(dict.fromkeys(self._names))
            self._session = open_session(model, nodes, inputs, weights, names, threads=os.cpu_count() or 1)
        except Exception as error:  # ONNX Runtime raises a type per status code
            raise HqmqError(f"ONNX Runtime cannot load it: {' '.join(str(error).split())[:240]}") from error

    def __call__(self, ids: NDArray[Any], cache: dict[str, Any]) -> tuple[NDArray[Any], dict[str, Any]]:
        """Hidden states [B, T, F] or logits [B, T, V], and the cache after a call."""
        face = self._interface
        held = next(iter(cache.values())).shape[2] if cache else 0
        case = Case(len(ids), ids.shape[1], held)
        slots = np.arange(held, held + ids.shape[1])
        feed: dict[str, Any] = {str(face.ids.name): _as(ids, face.ids.dtype)}
        for value, array in ((face.mask, case.mask), (face.positions, case.positions), (face.slots, slots)):
            if value is not None:
                feed[str(value.name)] = _as(array, value.dtype)
        for past in face.past:
            empty = np.zeros((len(ids), past.shape[1], 0, past.shape[3]), np.float32)
            feed[str(past.name)] = cache.get(str(past.name), _as(empty, past.dtype))
        feed = {name: array for name, array in feed.items() if name in self._given}
        try:
            found, *present = self._session.run(self._names, feed)
        except Exception as error:  # see __init__
            raise HqmqError(f"ONNX Runtime cannot run it: {' '.join(str(error).split())[:240]}") from error
        return np.asarray(found, np.float32), dict(zip(self._past, present, strict=True))


def _above(graph: ir.Graph, values: list[ir.Value]) -> tuple[list[ir.Node], list[ir.Value], list[ir.Value]]:
    """Nodes that make some values, in order, and the inputs and weights that they read."""
    found: dict[int, ir.Value] = {}
    todo = list(values)
    while todo:
        value = todo.pop()
        if id(value) not in found:
            found[id(value)] = value
            node = value.producer()
            todo += [given for given in node.inputs if given is not None] if node is not None else []
    nodes = [node for node in graph if any(id(output) in found for output in node.outputs)]
    roots = [value for value in found.values() if value.producer() is None]
    weights = [value for value in roots if value.const_value is not None]
    return nodes, [value for value in roots if value.const_value is None], weights
