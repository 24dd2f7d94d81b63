"""Trying the model itself: the rows of a call must not know of each other but through the cache.

The new graph takes sequences of different lengths, padded, and prompts in chunks. That is sound only for a decoder
whose every row depends on its own token, its position and the cache; a node that mixes rows in another way (a
convolution, a norm over tokens, state that is not in the cache) shows here.

Compared are the hidden states before the last projection where that can be recognised, else the logits. The model runs
piece by piece, all calls through one piece before the next: no more than a piece's weights are in memory.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
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
from .walk import standard

_TOKENS, _FIRST = 7, 4
_TOLERANCE = {ir.DataType.FLOAT16: 2e-2}
"""Of the largest element; 1e-3 for other types (bfloat16 is computed as float32)."""
_PIECE = 128 << 20
"""Bytes of weights from which a piece ends."""


def try_rows(
    model: ir.Model, interface: Interface, layers: list[Layer], progress: Callable[[float], None] | None = None
) -> None:
    """Run the model whole, in chunks, and with other neighbours in its batch. `progress`: gets the share done.

    A model that runs for one sequence only is tried with one.

    Raises:
        HqmqError: ONNX Runtime cannot run the model, or rows depend on each other.
    """
    vocabulary = int(interface.logits.shape[2])
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, _TOKENS))
    ids[1, :2] = ids[0, :2]
    chunks = all(layer.chunks for layer in layers)
    trial = _Trial(model, interface, layers)
    try:
        whole, parts, alone = trial.run(_calls(ids, chunks), progress)
    except HqmqError:  # exporters' rotary embeddings without position_ids work for one sequence only
        whole, parts, alone = trial.run(_calls(ids[:1], chunks), progress)
    if not np.isfinite(whole).all():
        raise HqmqError("tried on random tokens it gives numbers that are not finite: its type may be too narrow")
    limit = _TOLERANCE.get(interface.past[0].dtype, 1e-3) * max(float(np.abs(whole).max()), 1e-3)
    for what, off in (
        ("a prompt in two parts gives other logits than in one", np.abs(parts - whole).max()),
        ("a sequence gives other logits alone than in a batch", np.abs(alone - whole[:1]).max()),
    ):
        if not float(off) <= limit:
            raise HqmqError(f"{what} (they differ by {float(off):.2g}): the model keeps state outside its cache")


@dataclass
class _Call:
    """One call of the model.

    Attributes:
        ids: its new tokens [B, T]. after: the call whose cache it takes, or None.
        held: tokens in that cache. values: what is known so far, by name.
    """

    ids: NDArray[np.int64]
    after: _Call | None = None
    held: int = 0
    values: dict[str, Any] = field(default_factory=dict)


def _calls(ids: NDArray[np.int64], chunks: bool) -> list[_Call]:
    """Whole, in parts, and the first sequence alone. `chunks`: whether more than one row may follow a cache."""
    calls = [_Call(ids), _Call(ids[:, :_FIRST])]
    step = _TOKENS if chunks else 1
    for start in range(_FIRST, _TOKENS, step):
        calls.append(_Call(ids[:, start : start + step], calls[-1], start))
    return [*calls, _Call(ids[:1])]


@dataclass
class _Piece:
    """Some nodes in a row, and what they read; `read`: names of which they read more than the shape."""

    nodes: list[ir.Node] = field(default_factory=list)
    read: set[str] = field(default_factory=set)
    inputs: dict[str, ir.Value] = field(default_factory=dict)
    weights: dict[str, ir.Value] = field(default_factory=dict)
    made: dict[str, ir.Value] = field(default_factory=dict)

    def add(self, node: ir.Node) -> None:
        self.nodes.append(node)
        for value in node.inputs:
            if value is not None and str(value.name) not in self.made:
                kept = self.weights if value.const_value is not None else self.inputs
                kept[str(value.name)] = value
                if not standard(node, "Shape"):
                    self.read.add(str(value.name))
        self.made.update({str(value.name): value for value in node.outputs})

    @property
    def nbytes(self) -> int:
        return sum(value.const_value.nbytes for value in self.weights.values())


class _Trial:
    def __init__(self, model: ir.Model, interface: Interface, layers: list[Layer]) -> None:
        self._model, self._face = model, interface
        result, _ = rows_of(interface.logits)
        joins = [join for layer in layers for join in (layer.key, layer.value)]
        self._result = str(result.name)
        self._full = {str(join.past.name): str(join.full.name) for join in joins}
        self._wanted = [self._result, *self._full.values()]
        nodes = _above(model.graph, [result, *(join.full for join in joins)])
        self._pieces = _split(nodes, _PIECE)
        if not self._sound():
            self._pieces = _split(nodes, None)

    def _sound(self) -> bool:
        """Whether what passes between pieces has a known type, and no cache is read before the piece that makes it."""
        made: set[str] = set()
        for piece in self._pieces:
            made |= set(piece.made)
            if any(value.dtype is None for value in piece.inputs.values()):
                return False
            if any(name in self._full and self._full[name] not in made for name in piece.read):
                return False
        return True

    def run(
        self, calls: list[_Call], progress: Callable[[float], None] | None
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
        """Hidden states [B, T, F] or logits [B, T, V] of the first call, those between, and the last."""
        for call in calls:
            call.values.update(self._given(call))
        for place, piece in enumerate(self._pieces):
            later = {name for other in self._pieces[place + 1 :] for name in other.inputs} | set(self._wanted)
            names = [name for name in piece.made if name in later]
            self._run_piece(piece, calls, names)
            for call in calls:
                call.values = {name: array for name, array in call.values.items() if name in later}
            if progress:
                progress((place + 1) / len(self._pieces))
        first, *parts, last = (np.asarray(call.values[self._result], np.float32) for call in calls)
        return first, np.concatenate(parts, 1), last

    def _run_piece(self, piece: _Piece, calls: Sequence[_Call], names: list[str]) -> None:
        inputs, weights = list(piece.inputs.values()), list(piece.weights.values())
        try:
            session = open_session(self._model, piece.nodes, inputs, weights, names, threads=os.cpu_count() or 1)
        except Exception as error:  # ONNX Runtime raises a type per status code
            raise HqmqError(f"ONNX Runtime cannot load it: {' '.join(str(error).split())[:240]}") from error
        for call in calls:
            for past, full in self._full.items():
                if call.after is not None and past in piece.read:
                    call.values[past] = call.after.values[full]  # made by this piece or before it
            try:
                found = session.run(names, {name: call.values[name] for name in piece.inputs})
            except Exception as error:  # see above
                raise HqmqError(f"ONNX Runtime cannot run it: {' '.join(str(error).split())[:240]}") from error
            call.values.update(zip(names, found, strict=True))

    def _given(self, call: _Call) -> dict[str, Any]:
        """The model's inputs, with a blank cache of the right size."""
        face, rows = self._face, call.ids.shape[1]
        case = Case(len(call.ids), rows, call.held)
        slots = np.arange(call.held, call.held + rows)
        given: dict[str, Any] = {str(face.ids.name): _as(call.ids, face.ids.dtype)}
        for value, array in ((face.mask, case.mask), (face.positions, case.positions), (face.slots, slots)):
            if value is not None:
                given[str(value.name)] = _as(array, value.dtype)
        for past in face.past:
            blank = np.zeros((len(call.ids), past.shape[1], call.held, past.shape[3]), np.float32)
            given[str(past.name)] = _as(blank, past.dtype)
        return given


def _above(graph: ir.Graph, values: list[ir.Value]) -> list[ir.Node]:
    """Nodes that make some values, in order."""
    found: set[int] = set()
    todo = list(values)
    while todo:
        value = todo.pop()
        if id(value) not in found:
            found.add(id(value))
            node = value.producer()
            todo += [given for given in node.inputs if given is not None] if node is not None else []
    return [node for node in graph if any(id(output) in found for output in node.outputs)]


def _split(nodes: Sequence[ir.Node], limit: int | None) -> list[_Piece]:
    pieces = [_Piece()]
    for node in nodes:
        if limit is not None and pieces[-1].nbytes >= limit:
            pieces.append(_Piece())
        pieces[-1].add(node)
    return pieces
