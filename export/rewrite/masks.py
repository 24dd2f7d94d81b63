"""What a mask means, by its values: causal or a sliding window, with or without padding from attention_mask."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError

from .evaluate import Case, Part
from .interface import Interface
from .layer import Layer
from .walk import name

REACH = 1 << 17
"""Tokens over which a mask is looked at where the model does not say how many it serves."""
_LOW = -1e4
"""What a mask adds to hide a key: this, or less."""
_BYTES = 256 << 20
"""Bytes of a value up to which looking goes on."""
_MEASURED = (64, 128)
"""Tokens at which the growth of values is measured."""


@dataclass(frozen=True)
class Mask:
    """`window`: tokens a query sees, 0: all. `padding`: attention_mask hides columns. `reach`: tokens looked at.
    `chunks`: there is a mask for several new rows after others; without one, prompts and single rows are looked at."""

    window: int
    padding: bool
    reach: int
    chunks: bool = True


def classify(model: ir.Model, interface: Interface, layer: Layer, reach: int) -> Mask:
    """Evaluate a layer's mask.

    Raises:
        HqmqError: it is neither causal nor a window, depends on anything else, or holds a position bias.
    """
    where = f"{name(layer.node)}, mask " + ", ".join(f"'{term.value.name}'" for term in layer.terms)
    if not layer.terms:
        if not layer.causal:
            raise HqmqError(f"{name(layer.node)}: has no mask and is not causal")
        return Mask(0, False, reach)
    part = Part(model, interface, [term.value for term in layer.terms])
    if interface.ids.name in part.given:
        raise HqmqError(f"{where}: depends on the tokens themselves, not only on how many there are")
    chunks = _takes_chunks(part)
    rows_far = 2 if chunks else 1
    far, reach = _far(part, layer, reach, where, rows_far)
    seen = far[0, 0]
    width = int(seen.sum())
    window = 0 if width == reach - rows_far + 1 else width
    sizes = [(2, 3 if chunks else 1, 5), (1, 1, 9), (3, 12, 0), (2, 1, 1)]
    if window:
        sizes += [(1, 3, max(window - 2, 0)) if chunks else (1, window + 3, 0), (1, 1, window)]
    for batch, rows, past in sizes:
        case = Case(batch, rows, past)
        if not np.array_equal(_visible(part, layer, case, where), expected(case, window)):
            raise HqmqError(f"{where}: is neither causal nor a sliding window, as {past} + {rows} tokens show")
    if not np.array_equal(far, expected(Case(1, rows_far, reach - rows_far), window)):
        raise HqmqError(f"{where}: is neither causal nor a sliding window, as {reach} tokens show")
    return Mask(window, _padding(part, layer, window, where, chunks), reach, chunks)


def _takes_chunks(part: Part) -> bool:
    """Whether the mask can be made for several new rows after others (that of GenAI's MultiHeadAttention cannot)."""
    try:
        part.run(Case(1, 3, 5))
    except HqmqError:
        return False
    return True


def expected(case: Case, window: int, padding: bool = False) -> NDArray[np.bool_]:
    """Keys that queries see, bool [B, T, S]."""
    query = np.arange(case.past, case.past + case.rows)[:, None]
    key = np.arange(case.past + case.rows)[None]
    seen = key <= query
    if window:
        seen &= key > query - window
    full = np.broadcast_to(seen, (case.batch, *seen.shape)).copy()
    return full & (case.mask[:, None] != 0) if padding else full


def _far(part: Part, layer: Layer, reach: int, where: str, rows: int) -> tuple[NDArray[np.bool_], int]:
    """The mask of one or two rows after as many tokens as can be."""
    reach = _affordable(part, reach, rows)
    problem: HqmqError | None = None
    while reach >= 64:
        case = Case(1, rows, reach - rows)
        try:
            return _visible(part, layer, case, where), reach
        except HqmqError as error:  # a table of masks or positions ends somewhere
            problem, reach = error, reach // 2
    raise problem or HqmqError(f"{where}: serves fewer than 64 tokens")


def _affordable(part: Part, reach: int, rows: int) -> int:
    """Tokens, at most `reach`, at which no value of the mask's part grows beyond _BYTES. (Some masks are made from
    tokens x tokens elements.)"""
    small, large = (part.sizes(Case(1, rows, tokens - rows)) for tokens in _MEASURED)
    while reach > _MEASURED[1]:
        times = math.log(reach / _MEASURED[1], _MEASURED[1] / _MEASURED[0])
        if all(b * (b / max(a, 1)) ** times <= _BYTES for a, b in zip(small, large, strict=True)):
            break
        reach //= 2
    return reach


def _visible(part: Part, layer: Layer, case: Case, where: str) -> NDArray[np.bool_]:
    """bool [B, T, S]."""
    shape = (case.batch, layer.num_heads, case.rows, case.past + case.rows)
    seen = np.ones((case.batch, 1, case.rows, case.past + case.rows), bool)
    for term, array in zip(layer.terms, part.run(case), strict=True):
        if term.kind == "add":
            if not ((array == 0) | (array <= _LOW)).all():
                raise HqmqError(f"{where}: holds values other than 0 and very negative ones (a position bias?)")
            keep = array == 0
        else:
            keep = array.astype(bool) if term.kind == "keep" else ~array.astype(bool)
        seen = seen & _fitting(keep, shape, where)
    if not (seen == seen[:, :1]).all():
        raise HqmqError(f"{where}: differs from head to head")
    return np.asarray(np.broadcast_to(seen[:, 0], (shape[0], *shape[2:])))


def _fitting(keep: NDArray[np.bool_], shape: Sequence[int], where: str) -> NDArray[np.bool_]:
    try:
        full = np.broadcast_to(keep, np.broadcast_shapes(keep.shape, tuple(shape)))
    except ValueError:
        full = keep
    if full.shape != tuple(shape):
        raise HqmqError(f"{where}: has shape {list(keep.shape)} where scores have {list(shape)}")
    return keep.reshape((1,) * (4 - keep.ndim) + keep.shape)


def _padding(part: Part, layer: Layer, window: int, where: str, chunks: bool) -> bool:
    """Whether attention_mask hides columns, beside the causal mask, from rows of real tokens."""
    rows = (3, 2) if chunks else (1, 1)
    cases = [
        Case(2, rows[0], 8 - rows[0], ((0, 1), ())),
        Case(2, 6, 0, ((), (4, 5))),
        Case(2, rows[1], 8 - rows[1], ((0,), (3, 4))),
    ]
    answers = []
    for case in cases:
        seen = _visible(part, layer, case, where)
        real = case.mask[:, case.past :, None] != 0
        hidden = np.array_equal(seen & real, expected(case, window, True) & real)
        ignored = np.array_equal(seen & real, expected(case, window) & real)
        if not hidden and not ignored:
            raise HqmqError(f"{where}: does something else with attention_mask than hiding its zeros")
        answers.append(hidden)
    return all(answers)
