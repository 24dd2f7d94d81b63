"""Lengths and positions: what the rest of the graph takes from removed inputs is taken from the new ones.

Found by value, from the outputs upwards. Cases of a value that depends on removed inputs:
1. it equals past + row in every case tried, shape [B, T] or [1, T], dimensions of 1 in between: our positions;
2. it equals the number of sequences or of new rows: the size of input_ids;
3. it is the same in every case, and for a very long sequence: a constant;
anything else is looked for above it, up to the removed input itself, which is an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError

from .building import Builder, constant, replace
from .evaluate import Case, Part, computable
from .interface import INTEGERS, Interface
from .walk import name, standard, users

_CASES = (Case(2, 3, 5), Case(3, 4, 7), Case(2, 5, 0), Case(5, 1, 11))
_FAR = Case(1, 1, 1 << 18)
"""Longer than what a model may ask a length for: some choose their rotary frequencies by it (longrope)."""
_CONSTANT = 64
"""Elements of a value that may become a constant."""
_ROWWISE = frozenset(
    {"Cast", "Mul", "Add", "Sub", "Div", "Neg", "MatMul", "Cos", "Sin", "Identity", "Expand", "Min", "Max", "Where"}
)
_SHIFTABLE = frozenset({"Unsqueeze", "Squeeze", "Concat", "Transpose", "Gather", "Slice", "Split"})
_MEETS = frozenset({"Mul", "Add", "Sub", "RotaryEmbedding"})
"""Operators in which positions that were shared by all sequences may meet what belongs to one."""


@dataclass(frozen=True)
class Redirection:
    """`value` is to be read as `meaning` (``positions``, ``B``, ``T`` or ``constant``)."""

    value: ir.Value
    meaning: str
    shape: tuple[str, ...] = ()
    array: NDArray[Any] | None = None


def find(
    model: ir.Model, interface: Interface, outputs: Sequence[ir.Value], replaced: Sequence[ir.Value]
) -> list[Redirection]:
    """What must be redirected so that `outputs` no longer depend on the interface's removed inputs. `replaced`:
    values that will come from elsewhere.

    Raises:
        HqmqError: a value that depends on them in another way.
    """
    tainted = _tainted(model.graph, interface.removed, replaced)
    meanings = _meanings(model, interface, tainted, outputs)
    found: dict[int, Redirection] = {}
    seen: set[int] = set()
    todo: list[tuple[ir.Value, ir.Node | None]] = [(value, None) for value in outputs]
    while todo:
        value, reader = todo.pop()
        if id(value) in seen or id(value) not in tainted:
            continue
        seen.add(id(value))
        if id(value) in meanings:
            found[id(value)] = meanings[id(value)]
            continue
        node = value.producer()
        if node is None:
            where = name(reader) if reader is not None else "an output"
            raise HqmqError(f"{where} still needs the input '{value.name}', and not for attention, positions or sizes")
        todo += [(given, node) for given in node.inputs if given is not None]
    for redirection in found.values():
        if redirection.meaning == "positions" and redirection.shape[0] == "1":
            _check_shared(redirection.value)
    return list(found.values())


def apply(graph: ir.Graph, redirections: Sequence[Redirection], ids: ir.Value, past: ir.Value, total: ir.Value) -> None:
    """Carry them out. `ids`: input_ids; `past`: past_length; `total`: present_length."""
    if not redirections:
        return
    build = Builder(graph, graph[0], "positions")
    positions: ir.Value | None = None
    for redirection in redirections:
        old, meaning = redirection.value, redirection.meaning
        if meaning == "positions":
            if positions is None:
                positions = _positions(build, ids, past, total)
            new = _shaped(build, positions, redirection.shape, old.dtype)
        elif meaning == "constant":
            assert redirection.array is not None
            new = constant(graph, f"was.{old.name}", redirection.array, old.dtype)
        else:
            axis = "BT".index(meaning)
            new = build.op("Shape", ids, dtype=ir.DataType.INT64, start=axis, end=axis + 1)
            if not redirection.shape:
                new = build.op("Squeeze", new, build.ints(0))
            new = build.cast(new, old.dtype or ir.DataType.INT64)
        replace(old, new)


def _positions(build: Builder, ids: ir.Value, past: ir.Value, total: ir.Value) -> ir.Value:
    """int64 [B, T]; padding rows repeat the last position, so as not to run past a table of positions."""
    rows = build.op("Shape", ids, dtype=ir.DataType.INT64, start=1, end=2)
    row = build.op("Range", build.int(0), build.op("Squeeze", rows, build.ints(0)), build.int(1))
    held = build.op("Unsqueeze", build.cast(past, ir.DataType.INT64), build.ints(1))
    last = build.op("Sub", build.cast(total, ir.DataType.INT64), build.int(1))
    last = build.op("Unsqueeze", build.op("Max", last, build.int(0)), build.ints(1))
    return build.op("Min", build.op("Add", held, row), last)


def _shaped(build: Builder, positions: ir.Value, shape: tuple[str, ...], dtype: ir.DataType | None) -> ir.Value:
    axes = [axis for axis in range(1, len(shape)) if shape[axis] != "T"]
    value = build.op("Unsqueeze", positions, build.ints(*axes)) if axes else positions
    return build.cast(value, dtype or ir.DataType.INT64)


def _tainted(graph: ir.Graph, removed: Sequence[ir.Value], replaced: Sequence[ir.Value]) -> set[int]:
    """ids of values that depend on removed inputs."""
    tainted, clean = {id(value) for value in removed}, {id(value) for value in replaced}
    for node in graph:
        if any(value is not None and id(value) in tainted for value in node.inputs):
            tainted.update(id(value) for value in node.outputs if id(value) not in clean)
    return tainted


def _meanings(
    model: ir.Model, interface: Interface, tainted: set[int], outputs: Sequence[ir.Value]
) -> dict[int, Redirection]:
    """By id: what each value means that follows from lengths alone."""
    able = computable(model.graph, interface)
    wanted: list[ir.Value] = []
    seen: set[int] = set()
    todo = list(outputs)
    while todo:
        value = todo.pop()
        if id(value) in seen or id(value) not in tainted:
            continue
        seen.add(id(value))
        if id(value) in able and not any(value is past for past in interface.past):
            wanted.append(value)
        node = value.producer()
        if node is not None:
            todo += [given for given in node.inputs if given is not None]
    if not wanted:
        return {}
    found = {}
    for value, arrays in zip(wanted, _evaluate(model, interface, wanted), strict=True):
        meaning = _meaning(value, arrays) if arrays else None
        if meaning is not None:
            found[id(value)] = meaning
    _check_constants(model, interface, [each for each in found.values() if each.meaning == "constant"])
    return found


def _check_constants(model: ir.Model, interface: Interface, constants: Sequence[Redirection]) -> None:
    """Whether they are what they were for a very long sequence too.

    Raises:
        HqmqError: one is not.
    """
    if not constants:
        return
    arrays = Part(model, interface, [each.value for each in constants]).run(_FAR)
    for each, far in zip(constants, arrays, strict=True):
        assert each.array is not None
        if far.shape != each.array.shape or not np.array_equal(far, each.array):
            node = each.value.producer()
            where = name(node) if node is not None else str(each.value.name)
            raise HqmqError(
                f"{where}: '{each.value.name}' depends on how long a sequence is (as frequencies of longrope do); "
                "this is not supported in ONNX files: export the model from its Hugging Face folder"
            )


def _evaluate(model: ir.Model, interface: Interface, values: Sequence[ir.Value]) -> list[list[NDArray[Any]]]:
    """Arrays of each value in the cases; none for a value that cannot be evaluated."""
    try:
        part = Part(model, interface, values)
        runs = [part.run(case) for case in _CASES]
        return [list(arrays) for arrays in zip(*runs, strict=True)]
    except HqmqError:
        if len(values) == 1:
            return [[]]
        half = len(values) // 2
        return _evaluate(model, interface, values[:half]) + _evaluate(model, interface, values[half:])


def _meaning(value: ir.Value, arrays: Sequence[NDArray[Any]]) -> Redirection | None:
    first = arrays[0]
    same = all(array.shape == first.shape and np.array_equal(array, first) for array in arrays)
    if same and first.size <= _CONSTANT:
        return Redirection(value, "constant", array=first)
    if value.dtype in INTEGERS and first.shape in ((), (1,)):
        for size in "BT":
            if all(int(a.reshape(())) == case.sizes[size] for a, case in zip(arrays, _CASES, strict=True)):
                return Redirection(value, size, ("1",) * first.ndim)
    shape = _shape_of_positions(arrays)
    return None if shape is None else Redirection(value, "positions", shape)


def _shape_of_positions(arrays: Sequence[NDArray[Any]]) -> tuple[str, ...] | None:
    """``("B" or "1", … "T" …)`` if the arrays are positions; None if not."""
    rank = arrays[0].ndim
    for lead in ("B", "1"):
        for axis in range(1, rank):
            shape = (lead, *("T" if i == axis else "1" for i in range(1, rank)))
            if all(_are_positions(array, shape, case) for array, case in zip(arrays, _CASES, strict=True)):
                return shape
    return None


def _are_positions(array: NDArray[Any], shape: tuple[str, ...], case: Case) -> bool:
    sizes = tuple(1 if dim == "1" else case.sizes[dim] for dim in shape)
    if array.shape != sizes:
        return False
    row = np.arange(case.past, case.past + case.rows).reshape([case.rows if dim == "T" else 1 for dim in shape])
    return bool(np.array_equal(array, np.broadcast_to(row, sizes)))


def _check_shared(value: ir.Value) -> None:
    """Positions [1, T] that become [B, T]: everything made from them must keep its first axis, up to where it meets
    what belongs to a sequence."""
    todo, seen = [value], set()
    while todo:
        current = todo.pop()
        for node in users(current):
            if id(node) in seen:
                continue
            seen.add(id(node))
            outputs = [output for output in node.outputs if output.shape is not None]
            leads = [output.shape[0] if len(output.shape) else None for output in outputs]
            batched = any(lead != 1 for lead in leads)
            if standard(node, *_MEETS) and batched:
                continue
            keeps = standard(node, *_ROWWISE, *_SHIFTABLE) and (leads == [1] * len(node.outputs) or not leads)
            if node.op_type == "Gather" and node.inputs[1] is current:
                keeps = node.attributes.get_int("axis", 0) == 0
            elif node.op_type in _SHIFTABLE:
                keeps = keeps and _off_first_axis(node)
            if not keeps:
                raise HqmqError(
                    f"{name(node)}: positions that all sequences share reach it, and it cannot take them one by one; "
                    "export the decoder with the input position_ids"
                )
            todo += list(node.outputs)


def _off_first_axis(node: ir.Node) -> bool:
    """Whether a node leaves the first axis alone."""
    if node.op_type in ("Concat", "Gather", "Split"):
        return node.attributes.get_int("axis", 0) != 0
    if node.op_type == "Transpose":
        return next(iter(node.attributes["perm"].as_ints())) == 0
    position = 3 if node.op_type == "Slice" else 1
    axes = node.inputs[position] if len(node.inputs) > position else None
    return axes is not None and axes.const_value is not None and bool((axes.const_value.numpy() != 0).all())
