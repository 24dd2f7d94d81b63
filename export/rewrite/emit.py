"""Putting HQMQ in: the operators of each layer, their caches as inputs and outputs, their codebooks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir

from hqmq_trt import codebooks, contract
from hqmq_trt.format import CacheTensor, cache_tensors
from hqmq_trt.manifest import codebook_name
from hqmq_trt.scheme import ROLES, Scheme

from .building import Builder, initialiser, replace
from .layer import Layer
from .ordinary import Lengths, attend


class Emitter:
    """Replaces the attention of layers.

    Args:
        graph: to change.
        scheme, mode: see hqmq_trt.export.export_model.
        lengths: past_length, new_length, present_length and what follows from them.

    Attributes:
        past, present: cache inputs and outputs, in the order of the new interface.
    """

    def __init__(self, graph: ir.Graph, scheme: Scheme, mode: str, lengths: Lengths) -> None:
        self._graph, self._scheme, self._mode, self._lengths = graph, scheme, mode, lengths
        self.past: list[ir.Value] = []
        self.present: list[ir.Value] = []

    def layer(self, layer: Layer) -> None:
        """Replace one layer."""
        node = layer.y.producer()
        assert node is not None
        assert layer.q.dtype is not None
        build = Builder(self._graph, node, f"layers.{layer.index}")
        dtype = layer.q.dtype
        k, v = (build.cast(join.new, dtype) for join in (layer.key, layer.value))
        # ONNX Runtime takes the sizes of y from those of q, and unnamed ones for -1.
        layer.q.shape = ir.Shape(["batch", layer.num_heads, "sequence", layer.head_dim])
        k.shape = v.shape = ir.Shape(["batch", layer.num_kv_heads, "sequence", layer.head_dim])
        past = {role: self._inputs(layer, role) for role in ROLES}
        books = {role: self._codebooks(layer, role) for role in ROLES}
        run = self._fused if self._mode == "fused" else self._qdq
        y = run(build, layer, k, v, past, books)
        if layer.y.dtype is not None:
            y = build.cast(y, layer.y.dtype)
        replace(layer.y, y)

    def _fused(self, build: Builder, layer: Layer, k: ir.Value, v: ir.Value, past: Any, books: Any) -> ir.Value:
        attributes = contract.attention_attributes(
            self._scheme, layer.head_dim, layer.scale, layer.window, layer.softcap, layer.sinks is not None
        )
        sinks = [] if layer.sinks is None else [self._sinks(layer)]
        held = [*past["key"], *past["value"]]
        lengths = [self._lengths.past, self._lengths.new]
        inputs = [layer.q, k, v, *lengths, *sinks, *books["key"], *books["value"], *held]
        y, *present = self._node(
            build, contract.ATTENTION, inputs, attributes, 1 + len(held), f"layers.{layer.index}.attention"
        )
        y.name, y.type = f"layers.{layer.index}.attention.out", layer.q.type
        y.shape = ir.Shape(["batch", layer.num_heads, "sequence", layer.head_dim])
        self._outputs(held, present)
        return y

    def _qdq(self, build: Builder, layer: Layer, k: ir.Value, v: ir.Value, past: Any, books: Any) -> ir.Value:
        dense = []
        for role, x in zip(ROLES, (k, v), strict=True):
            codec, page = self._scheme.role(role), self._scheme.page_size
            attributes = {
                **contract.role_attributes(codec, layer.head_dim, page),
                **contract.common_attributes(page),
            }
            lengths = [self._lengths.past, self._lengths.new]
            name = f"layers.{layer.index}.{role}"
            inputs = [x, *lengths, *books[role], *past[role]]
            present = self._node(build, contract.QUANTIZE, inputs, attributes, len(past[role]), f"{name}.quantize")
            self._outputs(past[role], present)
            inputs = [self._lengths.present, *books[role], *present]
            (whole,) = self._node(build, contract.DEQUANTIZE, inputs, attributes, 1, f"{name}.dequantize")
            whole.name, whole.type = f"{name}.dequantize.out", ir.TensorType(ir.DataType.FLOAT)
            dense.append(whole)
        sinks = None if layer.sinks is None else self._sinks(layer)
        return attend(build, layer, dense[0], dense[1], sinks, self._lengths)

    def _node(
        self, build: Builder, op_type: str, inputs: Sequence[ir.Value], attributes: Any, outputs: int, name: str
    ) -> Sequence[ir.Value]:
        node = ir.Node(
            contract.DOMAIN,
            op_type,
            inputs,
            ir.convenience.convert_attributes(attributes),
            num_outputs=outputs,
            version=contract.OPSET_VERSION,
            name=name,
        )
        return build.place(node).outputs

    def _inputs(self, layer: Layer, role: str) -> list[ir.Value]:
        found = []
        codec = self._scheme.role(role)
        for spec in cache_tensors(codec, self._scheme.page_size, layer.head_dim, layer.num_kv_heads, 1, 1):
            dtype = getattr(ir.DataType, {"int32": "INT32", "float16": "FLOAT16"}[spec.dtype])
            name = f"past.{layer.index}.{role}.{spec.name}"
            found.append(ir.Value(name=name, shape=ir.Shape(_dims(spec)), type=ir.TensorType(dtype)))
        self.past += found
        return found

    def _outputs(self, past: Sequence[ir.Value], present: Sequence[ir.Value]) -> None:
        for old, new in zip(past, present, strict=True):
            new.name = str(old.name).replace("past.", "present.", 1)
            new.type, new.shape = old.type, old.shape
        self.present += present

    def _codebooks(self, layer: Layer, role: str) -> list[ir.Value]:
        codec = self._scheme.role(role)
        if not codec.packed:
            return []
        secondaries = codebooks.secondaries(codec, self._scheme.seed, layer.index, layer.num_kv_heads, role)
        made = []
        for part, array in (("secondaries", secondaries), ("levels", codebooks.levels(codec))):
            name = codebook_name(layer.index, role, part)
            made.append(initialiser(self._graph, name, ir.tensor(array, name=name)))
        return made

    def _sinks(self, layer: Layer) -> ir.Value:
        """One score a query head, [Hq], in the type of the queries."""
        assert layer.sinks is not None
        assert layer.sinks.const_value is not None
        assert layer.q.dtype is not None
        array = layer.sinks.const_value.numpy().reshape(-1).astype(layer.q.dtype.numpy())
        name = f"layers.{layer.index}.sinks"
        return initialiser(self._graph, name, ir.tensor(array, dtype=layer.q.dtype, name=name))


def _dims(spec: CacheTensor) -> list[int | str]:
    sizes: list[int | str] = ["batch", *spec.shape[1:]]
    if spec.name != "tail":
        sizes[2] = "capacity" if spec.name == "codes" else "pages"
    return sizes
