"""Parts of a graph, run with concrete inputs: what a mask, a position or an attention is, is found by its values."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError

from .interface import Interface
from .running import open_session

Array = NDArray[Any]
_WEIGHT_LIMIT = 256 << 20
"""Bytes of an initialiser that may take part in an evaluation: tables of masks and positions, not weights."""


@dataclass(frozen=True)
class Case:
    """Sizes of one evaluation: `batch` sequences, `past` tokens held, `rows` new ones.

    Attributes:
        hidden: columns of attention_mask that are 0, for each sequence.
    """

    batch: int
    rows: int
    past: int
    hidden: tuple[tuple[int, ...], ...] = ()

    @property
    def mask(self) -> NDArray[np.int64]:
        """attention_mask [B, P + T]."""
        mask = np.ones((self.batch, self.past + self.rows), np.int64)
        for sequence, columns in enumerate(self.hidden):
            mask[sequence, list(columns)] = 0
        return mask

    @property
    def positions(self) -> NDArray[np.int64]:
        """position_ids [B, T]: visible tokens before each row."""
        return np.asarray((self.mask.cumsum(1) - 1).clip(0)[:, self.past :])

    @property
    def sizes(self) -> dict[str, int]:
        """Values of the meanings of Interface.symbols."""
        return {"B": self.batch, "T": self.rows, "P": self.past, "S": self.past + self.rows}


class Part:
    """The part of a graph that makes some values.

    Args:
        graph, opsets: of the model.
        interface: its inputs.
        values: what is wanted.
        cut: values that the caller feeds; nothing above them belongs to the part.

    Attributes:
        given: names of model inputs and cut values that the part needs.
        nodes: its nodes.

    Raises:
        HqmqError: a value depends on something that is neither cut nor an input other than token ids.
    """

    def __init__(
        self,
        model: ir.Model,
        interface: Interface,
        values: Sequence[ir.Value],
        cut: Sequence[ir.Value] = (),
    ) -> None:
        self._model, self._interface, self._cut = model, interface, cut
        self._values = list(values)
        self._names: list[str] = []
        self._dims: dict[str, tuple[ir.Value, int, int | None]] = {}
        self.nodes: list[ir.Node] = []
        self.given: list[str] = []
        able = computable(model.graph, interface, cut)
        cuts = {id(value) for value in cut}
        weights: dict[str, ir.Value] = {}
        inputs: dict[str, ir.Value] = {}
        chosen: set[int] = set()
        todo = list(values)
        while todo:
            value = todo.pop()
            node = value.producer()
            if id(value) in cuts:
                inputs[str(value.name)] = value
            elif value.const_value is not None and node is None:
                weights[str(value.name)] = value
            elif node is None:
                inputs[str(value.name)] = value
            elif id(value) not in able:
                raise HqmqError(
                    f"node '{node.name}' ({node.op_type}): '{value.name}' depends on more than lengths and masks"
                )
            elif id(node) not in chosen:
                chosen.add(id(node))
                if self._is_size(node, cuts, able):
                    source = node.inputs[0]
                    start = node.attributes.get_int("start", 0)
                    end = node.attributes.get_int("end", None)
                    self._dims[str(node.outputs[0].name)] = (source, start, end)
                    inputs[str(node.outputs[0].name)] = node.outputs[0]
                else:
                    self.nodes.append(node)
                    todo += [given for given in node.inputs if given is not None]
        order = {id(node): position for position, node in enumerate(model.graph)}
        self.nodes.sort(key=lambda node: order[id(node)])
        self.given = [name for name in inputs if name not in self._dims]
        self._types = {name: value.dtype for name, value in inputs.items()}
        self._session = self._open(model, inputs, weights)

    def _is_size(self, node: ir.Node, cuts: set[int], able: set[int]) -> bool:
        """Whether a Shape node's result is known without its input."""
        if node.op_type != "Shape" or node.domain:
            return False
        source = node.inputs[0]
        if source is None or id(source) in cuts:
            return False
        return any(source is past for past in self._interface.past) or id(source) not in able

    def _open(
        self, model: ir.Model, inputs: Mapping[str, ir.Value], weights: Mapping[str, ir.Value]
    ) -> ort.InferenceSession:
        made = {str(output.name) for node in self.nodes for output in node.outputs}
        extra = []
        for value in self._values:
            name = str(value.name)
            if name not in made:  # an input or weight that is itself wanted
                extra.append(onnx.helper.make_node("Identity", [name], [f"{name}.wanted"]))
                name = f"{name}.wanted"
            self._names.append(name)
        names = list(dict.fromkeys(self._names))
        try:
            return open_session(model, self.nodes, list(inputs.values()), list(weights.values()), names, extra)
        except Exception as error:  # ONNX Runtime raises a type per status code
            raise HqmqError(f"{self._where()} cannot be evaluated: {' '.join(str(error).split())[:240]}") from error

    def _where(self) -> str:
        node = self._values[0].producer()
        return f"node '{node.name}' ({node.op_type})" if node is not None else f"'{self._values[0].name}'"

    def run(self, case: Case, fed: Mapping[str, Array] | None = None) -> list[Array]:
        """The wanted values. `fed`: arrays of cut values, and of cache inputs where their contents matter."""
        feed: dict[str, Array] = {}
        for name in self.given:
            array = (fed or {}).get(name)
            feed[name] = _as(self._default(name, case) if array is None else array, self._types[name])
        for name, (source, start, end) in self._dims.items():
            feed[name] = np.array(dims(source, self._interface, case)[start:end], np.int64)
        try:
            results = self._session.run(self._names, feed)
        except Exception as error:  # see _open
            raise HqmqError(f"{self._where()} cannot be evaluated: {' '.join(str(error).split())[:240]}") from error
        return [np.asarray(result) for result in results]

    def sizes(self, case: Case) -> list[int]:
        """Bytes of every value that the part makes, in a case."""
        values = [output for node in self.nodes for output in node.outputs if output.name]
        whole = Part(self._model, self._interface, values, self._cut)
        return [array.nbytes for array in whole.run(case)]

    def _default(self, name: str, case: Case) -> Array:
        face = self._interface
        if name == face.ids.name:
            return np.ones((case.batch, case.rows), np.int64)
        if face.mask is not None and name == face.mask.name:
            return case.mask
        if face.positions is not None and name == face.positions.name:
            return case.positions
        if face.slots is not None and name == face.slots.name:
            return np.arange(case.past, case.past + case.rows)
        for past in face.past:
            if past.name == name:
                return np.zeros(dims(past, face, case), np.float32)
        raise HqmqError(f"'{name}' has no value that could be tried")


def computable(graph: ir.Graph, interface: Interface, cut: Sequence[ir.Value] = ()) -> set[int]:
    """ids of the values that follow from cut values, sizes, and inputs other than token ids."""
    able = {id(value) for value in (*cut, *graph.inputs) if value is not interface.ids}
    for value in graph.initializers.values():
        if value.const_value is not None and value.const_value.nbytes <= _WEIGHT_LIMIT:
            able.add(id(value))
    for node in graph:
        sized = node.op_type == "Shape" and not node.domain
        if sized or all(value is None or id(value) in able for value in node.inputs):
            able.update(id(value) for value in node.outputs)
    return able


def dims(value: ir.Value, interface: Interface, case: Case) -> list[int]:
    """Sizes of a value in a case, from its symbolic shape.

    Raises:
        HqmqError: a dimension whose meaning is unknown.
    """
    node = value.producer()
    where = f"node '{node.name}' ({node.op_type})" if node is not None else f"input '{value.name}'"
    if id(value) in interface.known:
        return [dim if isinstance(dim, int) else case.sizes[dim] for dim in interface.known[id(value)]]
    if value.shape is None:
        raise HqmqError(f"{where}: the shape of '{value.name}' is unknown")
    if any(value is past for past in interface.past):
        return [case.batch, int(value.shape[1]), case.past, int(value.shape[3])]
    found = []
    for dim in value.shape:
        if isinstance(dim, int):
            found.append(dim)
            continue
        terms = (dim.value or "?").replace("(", "").replace(")", "").split("+")
        sizes = [_term(term.strip(), interface, case) for term in terms]
        if None in sizes:
            raise HqmqError(f"{where}: dimension '{dim.value}' of '{value.name}' is unknown")
        found.append(sum(size for size in sizes if size is not None))
    return found


def _term(text: str, interface: Interface, case: Case) -> int | None:
    if text.isdigit():
        return int(text)
    return case.sizes.get(interface.symbols.get(text, ""))


def _as(array: Array, dtype: ir.DataType | None) -> Array:
    if dtype is None or dtype == ir.DataType.BFLOAT16:
        return array.astype(np.float32)
    return np.ascontiguousarray(array.astype(dtype.numpy(), copy=False))
