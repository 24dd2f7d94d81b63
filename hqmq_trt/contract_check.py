"""Checks nodes against the operators' contract: attributes, and the types and shapes of inputs and outputs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hqmq_trt import contract
from hqmq_trt.contract import Attribute, AttributeSpec, Dim, OperatorSpec, TensorSpec
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import FORMAT_VERSION, mask_words, scale_words, words_per_token
from hqmq_trt.scheme import Gain, RoleScheme, Storage

_FIX = "export the model again with this version of hqmq-trt"


@dataclass(frozen=True)
class NodeTensor:
    """What a graph says of one input or output.

    Attributes:
        dtype: ``float32``, ``int32`` and so on; None if the graph does not say.
        shape: numbers, names of dynamic dimensions, None for unknown ones; None if nothing is said.
    """

    dtype: str | None
    shape: tuple[int | str | None, ...] | None


def check_attributes(op: OperatorSpec, attributes: Mapping[str, Attribute], where: str) -> None:
    """Raise HqmqError unless the attributes are exactly those of the operator, each within its range.

    Args:
        where: how to name the node in messages.
    """
    known = {spec.name for spec in op.attributes}
    if unknown := sorted(set(attributes) - known):
        raise HqmqError(f"{where}: attribute '{unknown[0]}' is unknown; {_FIX}")
    for spec in op.attributes:
        if spec.name not in attributes:
            raise HqmqError(f"{where}: attribute '{spec.name}' is missing; {_FIX}")
        _check_value(spec, attributes[spec.name], where)
    if attributes["format_version"] != FORMAT_VERSION:
        raise HqmqError(
            f"{where}: cache format {attributes['format_version']}, but this hqmq-trt has {FORMAT_VERSION}; {_FIX}"
        )


def _check_value(spec: AttributeSpec, value: Attribute, where: str) -> None:
    if type(value) is not spec.kind:
        raise HqmqError(f"{where}: attribute '{spec.name}' is {value!r}, expected {spec.kind.__name__}; {_FIX}")
    if isinstance(value, str):
        if value != spec.text:
            raise HqmqError(f"{where}: attribute '{spec.name}' is '{value}', expected '{spec.text}'; {_FIX}")
        return
    if not math.isfinite(value) or not spec.low <= value <= spec.high:
        raise HqmqError(f"{where}: attribute '{spec.name}' is {value}, outside {spec.low}…{spec.high}; {_FIX}")
    if spec.power_of_two and isinstance(value, int) and value & (value - 1):
        raise HqmqError(f"{where}: attribute '{spec.name}' is {value}, no power of two; {_FIX}")


def check_node(
    op_type: str,
    attributes: Mapping[str, Attribute],
    inputs: Sequence[NodeTensor],
    outputs: Sequence[NodeTensor],
    name: str = "",
) -> None:
    """Raise HqmqError unless a node of domain ``com.hqmq`` keeps the contract.

    Tensors must be those that the attributes ask for, of the right types and ranks; one symbol stands for one size.
    What a graph does not say is not checked.

    Args:
        op_type: HqmqQuantize, HqmqDequantize or HqmqAttention.
        attributes: of the node, plugin_version and plugin_namespace included.
        inputs, outputs: in order.
        name: of the node, for messages.
    """
    where = f"{op_type} '{name}'" if name else op_type
    try:
        op = contract.operator(op_type)
    except KeyError:
        raise HqmqError(f"{where}: no operator of {contract.DOMAIN}; {_FIX}") from None
    check_attributes(op, attributes, where)
    sizes = _Sizes(op, attributes, where)
    for kind, specs, tensors in (
        ("input", op.present_inputs(attributes), inputs),
        ("output", op.present_outputs(attributes), outputs),
    ):
        if len(specs) != len(tensors):
            raise HqmqError(f"{where}: has {len(tensors)} {kind}s, its attributes ask for {len(specs)}; {_FIX}")
        for spec, tensor in zip(specs, tensors, strict=True):
            sizes.match(spec, tensor, f"{where}: {kind} '{spec.name}'")
    sizes.check()


class _Sizes:
    """Sizes of a node's symbols, gathered from its tensors."""

    def __init__(self, op: OperatorSpec, attributes: Mapping[str, Attribute], where: str) -> None:
        self.attributes, self.where = attributes, where
        self.roles = op.roles
        self.activation: str | None = None
        self.found: dict[str, tuple[int | str, str]] = {}
        for prefix, attribute in op.roles:
            self._set(prefix + "2^r", 2 ** self._int(attribute + "radius_bits"), "radius_bits")
            self._set(prefix + "C", self._int(attribute + "outlier_capacity"), "outlier_capacity")
            rows = self._int("page_size") + self._int(attribute + "sink_tokens")
            self._set(prefix + "P+N", rows, f"page_size and {attribute}sink_tokens")

    def _int(self, name: str) -> int:
        value = self.attributes[name]
        assert isinstance(value, int)
        return value

    def _set(self, symbol: str, size: int | str, source: str) -> None:
        held, owner = self.found.setdefault(symbol, (size, source))
        if isinstance(size, int) and not isinstance(held, int):
            self.found[symbol] = (size, source)
        elif held != size and isinstance(held, int) == isinstance(size, int):
            raise HqmqError(f"{source}: dimension {symbol} is {size}, but {held} of {owner}; {_FIX}")

    def match(self, spec: TensorSpec, tensor: NodeTensor, source: str) -> None:
        """Check one tensor and learn its sizes."""
        self._match_dtype(spec, tensor.dtype, source)
        if tensor.shape is None:
            return
        if len(tensor.shape) != len(spec.shape):
            raise HqmqError(f"{source} has shape {tensor.shape}, expected {list(spec.shape)}; {_FIX}")
        for symbol, size in zip(spec.shape, tensor.shape, strict=True):
            if isinstance(symbol, int):
                if isinstance(size, int) and size != symbol:
                    raise HqmqError(f"{source} has shape {tensor.shape}, expected {list(spec.shape)}; {_FIX}")
            elif size is not None:
                self._set(self._own(symbol, spec), size, source)

    def _match_dtype(self, spec: TensorSpec, dtype: str | None, source: str) -> None:
        if dtype is None:
            return
        allowed = contract.ACTIVATION_DTYPES if spec.dtype == contract.ACTIVATION else (spec.dtype,)
        if spec.dtype == contract.ACTIVATION and self.activation:
            allowed = (self.activation,)
        if dtype not in allowed:
            raise HqmqError(f"{source} is {dtype}, expected {' or '.join(allowed)}; {_FIX}")
        if spec.dtype == contract.ACTIVATION:
            self.activation = dtype

    def _own(self, symbol: Dim, spec: TensorSpec) -> str:
        """Symbols of one role are kept apart by the prefix of its tensors."""
        if symbol not in ("S", "2^r", "W", "U", "Z", "C", "P+N"):
            return str(symbol)
        name = (spec.alias or spec.name) + " "
        return next(prefix for prefix, _ in self.roles if name.startswith(prefix)) + str(symbol)

    def _known(self, symbol: str) -> int | None:
        size = self.found.get(symbol, (None, ""))[0]
        return size if isinstance(size, int) else None

    def check(self) -> None:
        """Check what follows from several sizes."""
        heads, query_heads = self._known("H"), self._known("Hq")
        if heads and query_heads and query_heads % heads:
            raise HqmqError(f"{self.where}: q has {query_heads} heads, no multiple of the cache's {heads}; {_FIX}")
        pages, rows, page = self._known("M"), self._known("M*P"), self._int("page_size")
        if rows is not None and (rows % page or (pages is not None and rows != pages * page)):
            raise HqmqError(f"{self.where}: the cache has {rows} rows and {pages} pages of {page}; {_FIX}")
        head_dim = self._known("D")
        if head_dim is None:
            return
        for prefix, attribute in self.roles:
            self._check_role(prefix, attribute, head_dim, page)

    def _check_role(self, prefix: str, attribute: str, head_dim: int, page: int) -> None:
        chunks = head_dim // 4
        wanted = {"U": mask_words(head_dim, page)}
        packed, secondaries = self._int(attribute + "storage"), self._known(prefix + "S")
        if secondaries or not packed:
            gain = Gain(self._int(attribute + "gain"))
            role = RoleScheme("", Storage(packed), secondaries or 1, self._int(attribute + "radius_bits"), gain=gain)
            wanted |= {"W": words_per_token(role, head_dim), "Z": scale_words(role, page)}
        for symbol, size in wanted.items():
            if (found := self._known(prefix + symbol)) not in (None, size):
                raise HqmqError(f"{self.where}: {prefix}{symbol} is {found}, head_dim {head_dim} needs {size}; {_FIX}")
        if not packed:
            return
        if head_dim % 4:
            raise HqmqError(f"{self.where}: head_dim {head_dim} is not divisible by 4; {_FIX}")
        if self._int(attribute + "hadamard") and head_dim & (head_dim - 1):
            raise HqmqError(f"{self.where}: head_dim {head_dim} is no power of two, which the rotation needs; {_FIX}")
        if self._int(attribute + "outlier_capacity") > page * chunks:
            raise HqmqError(
                f"{self.where}: {attribute}outlier_capacity is more than the {page * chunks} chunks; {_FIX}"
            )


def check_model(model: Any) -> int:
    """Check every node of domain ``com.hqmq`` of an onnx ModelProto whose shapes are inferred; return their number.

    Raises:
        HqmqError: a node breaks the contract, or the model has no such node.
    """
    import onnx

    graph = model.graph
    known: dict[str, NodeTensor] = {}
    for value in (*graph.input, *graph.output, *graph.value_info):
        tensor = value.type.tensor_type
        dims = tuple(
            dim.dim_value if dim.HasField("dim_value") else (dim.dim_param or None) for dim in tensor.shape.dim
        )
        known[value.name] = NodeTensor(_dtype(tensor.elem_type), dims if tensor.HasField("shape") else None)
    for initializer in graph.initializer:
        known[initializer.name] = NodeTensor(_dtype(initializer.data_type), tuple(initializer.dims))
    nodes = [node for node in graph.node if node.domain == contract.DOMAIN]
    if not nodes:
        raise HqmqError(f"the model has no node of domain {contract.DOMAIN}; export it with hqmq-trt")
    for node in nodes:
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        attributes = {key: value.decode() if isinstance(value, bytes) else value for key, value in attributes.items()}
        unsaid = NodeTensor(None, None)
        check_node(
            node.op_type,
            attributes,
            [known.get(tensor, unsaid) for tensor in node.input],
            [known.get(tensor, unsaid) for tensor in node.output],
            node.name,
        )
    return len(nodes)


def _dtype(element: int) -> str | None:
    import onnx

    if element == onnx.TensorProto.UNDEFINED:
        return None
    return {"float": "float32"}.get(name := onnx.TensorProto.DataType.Name(element).lower(), name)
