"""Inputs and outputs of a decoder with a key-value cache, recognised by name, type and rank."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from hqmq_trt.errors import HqmqError

INTEGERS = (ir.DataType.INT64, ir.DataType.INT32)
FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)

_NAMES = {
    "ids": ("input_ids", "tokens", "ids"),
    "mask": ("attention_mask", "mask"),
    "positions": ("position_ids", "positions"),
    "slots": ("cache_position",),
}


@dataclass(frozen=True)
class Interface:
    """What a decoder takes and gives.

    Attributes:
        ids: token ids [B, T].
        mask: attention_mask [B, P + T], or None. positions: position_ids [B, T], or None. slots: cache_position [T],
            or None.
        past: cache inputs [B, H, P, D], in the order of the graph.
        logits: output [B, T, V].
        present: the other outputs.
        symbols: what a named dimension is: ``B``, ``T``, ``P`` or ``S`` (P + T).
        known: shapes of q, new rows and results of recognised layers, in these names and numbers, by id.
    """

    ids: ir.Value
    mask: ir.Value | None
    positions: ir.Value | None
    slots: ir.Value | None
    past: tuple[ir.Value, ...]
    logits: ir.Value
    present: tuple[ir.Value, ...]
    symbols: Mapping[str, str] = field(default_factory=dict)
    known: dict[int, tuple[int | str, ...]] = field(default_factory=dict)

    @property
    def removed(self) -> list[ir.Value]:
        """Inputs that the new graph has no use for."""
        return [value for value in (self.mask, self.positions, self.slots) if value is not None] + list(self.past)


def find_interface(graph: ir.Graph) -> Interface:
    """Recognise inputs and outputs.

    Raises:
        HqmqError: not a decoder with a cache, or an input whose meaning is unknown.
    """
    found: dict[str, ir.Value] = {}
    past, unknown = [], []
    inputs = [value for value in graph.inputs if value.name not in graph.initializers]
    for value in inputs:
        kind = next((kind for kind, names in _NAMES.items() if value.name in names), None)
        rank = None if value.shape is None else len(value.shape)
        if kind:
            found[kind] = value
        elif value.dtype in FLOATS and rank == 4:
            past.append(value)
        elif value.uses() or rank == 5:
            unknown.append(value)
    names = ", ".join(str(value.name) for value in inputs[:8])
    if "ids" not in found:
        raise HqmqError(f"no input of token ids (input_ids) among: {names}; this is no text decoder")
    if not past:
        raise HqmqError(
            f"no cache inputs (float, [batch, heads, tokens, head_dim]) among: {names}; export the decoder with past "
            "key values"
        )
    if unknown:
        raise HqmqError(f"input '{unknown[0].name}' {_shape(unknown[0])} has no place in the new graph's interface")
    _check(found)
    for value in past:
        _check_past(value)
    symbols = _symbols(found, past)
    logits = _logits(graph, symbols)
    present = tuple(value for value in graph.outputs if value is not logits)
    return Interface(
        found["ids"],
        found.get("mask"),
        found.get("positions"),
        found.get("slots"),
        tuple(past),
        logits,
        present,
        symbols,
    )


def _check(found: Mapping[str, ir.Value]) -> None:
    ranks = {"ids": 2, "mask": 2, "positions": 2, "slots": 1}
    for kind, value in found.items():
        if value.shape is None or len(value.shape) != ranks[kind]:
            raise HqmqError(f"input '{value.name}' is {_shape(value)}, not of {ranks[kind]} dimensions")
        if kind != "mask" and value.dtype not in INTEGERS:
            raise HqmqError(f"input '{value.name}' is {value.dtype}, not of integers")
        if kind == "mask" and value.dtype not in (*INTEGERS, *FLOATS, ir.DataType.BOOL):
            raise HqmqError(f"input '{value.name}' is {value.dtype}, which no attention mask is")
    for axis, name in enumerate(("batch", "sequence")):
        if isinstance(found["ids"].shape[axis], int):
            raise HqmqError(f"input '{found['ids'].name}' {_shape(found['ids'])} has a fixed {name}; export it dynamic")


def _check_past(value: ir.Value) -> None:
    for axis, what in ((1, "heads"), (3, "head_dim")):
        if not isinstance(value.shape[axis], int):
            raise HqmqError(
                f"cache input '{value.name}' {_shape(value)}: the number of {what} is symbolic; export with a fixed one"
            )
    for axis, what in ((0, "batch"), (2, "tokens")):
        if isinstance(value.shape[axis], int):
            raise HqmqError(
                f"cache input '{value.name}' {_shape(value)}: axis {axis} ({what}) is fixed; caches of fixed size and "
                "other layouts are not supported"
            )


def _logits(graph: ir.Graph, symbols: Mapping[str, str]) -> ir.Value:
    named = [value for value in graph.outputs if value.name == "logits"]
    found = named or [v for v in graph.outputs if v.dtype in FLOATS and v.shape is not None and len(v.shape) == 3]
    if len(found) != 1:
        names = ", ".join(str(value.name) for value in graph.outputs[:6])
        raise HqmqError(f"no single output of logits [batch, sequence, vocabulary] among: {names}; this is no decoder")
    shape = found[0].shape
    if shape is None or len(shape) != 3 or not isinstance(shape[2], int):
        raise HqmqError(f"output '{found[0].name}' is {_shape(found[0])}, not logits [batch, sequence, vocabulary]")
    if isinstance(shape[1], int) or symbols.get(shape[1].value or "") != "T":
        raise HqmqError(
            f"output '{found[0].name}' {_shape(found[0])} is not known to have one row a token; export the decoder "
            "with logits of all tokens"
        )
    return found[0]


def _symbols(found: Mapping[str, ir.Value], past: list[ir.Value]) -> dict[str, str]:
    meanings = {"ids": "BT", "mask": "BS", "positions": "BT", "slots": "T"}
    said: dict[str, set[str]] = {}
    pairs = [(value, meanings[kind]) for kind, value in found.items()] + [(value, "B?P?") for value in past]
    for value, dims in pairs:
        for dim, meaning in zip(value.shape, dims, strict=True):
            if isinstance(dim, ir.SymbolicDim) and dim.value is not None and meaning != "?":
                said.setdefault(dim.value, set()).add(meaning)
    return {name: meanings.pop() for name, meanings in said.items() if len(meanings) == 1}


def _shape(value: ir.Value) -> str:
    return str(value.shape) if value.shape is not None else "(of unknown shape)"
