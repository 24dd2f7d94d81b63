"""Quantised weights of ONNX Runtime, written out in standard operators.

Cases:
1. MatMulNBits, 4 bits, blocks that fit, all zero points 8: int4 weights, DequantizeLinear by blocks, MatMul. ONNX
   Runtime makes its own kernel of these again, and TensorRT 10 reads them;
2. any other MatMulNBits of 4 or 8 bits: the weights it stands for, dense, and MatMul;
3. GatherBlockQuantized of rows: the table it stands for, dense, and Gather.
Weights are made one at a time when the file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError

from .building import Builder, initialiser
from .interface import FLOATS
from .microsoft_nodes import Context, Rule, Trial, draw, given, need
from .walk import standard

Array = NDArray[Any]
_BLOCKED_OPSET = 21
"""Opset from which DequantizeLinear takes blocks."""


def unpack(array: Array, bits: int, count: int) -> Array:
    """uint8 [..., bytes] → uint8 [..., count]: the numbers of `bits` bits (4 or 8) along the last axis."""
    if bits == 8:
        return array[..., :count]
    both = np.stack([array & 15, array >> 4], -1)
    return both.reshape(*array.shape[:-1], -1)[..., :count]


class _Blocks:
    """The quantised matrix [N, K] of a node: codes, scales and zero points by blocks along K."""

    def __init__(
        self, size: tuple[int, int], bits: int, block: int, codes: Any, scales: Any, zeros: Any | None
    ) -> None:
        self.rows, self.columns, self.bits, self.block = *size, bits, block
        self.blocks = -(-self.columns // block)
        self._codes, self._scales, self._zeros = codes, scales, zeros

    def codes(self) -> Array:
        """uint8 [N, K]."""
        packed = self._codes.numpy().reshape(self.rows, -1).view(np.uint8)
        return unpack(packed, self.bits, self.blocks * self.block)[:, : self.columns]

    def scales(self) -> Array:
        """[N, blocks], in their own type."""
        return np.asarray(self._scales.numpy()).reshape(self.rows, self.blocks)

    def zeros(self) -> Array:
        """Zero points, float32 [N, blocks]."""
        if self._zeros is None:
            return np.full((self.rows, self.blocks), 1 << (self.bits - 1), np.float32)
        array = np.asarray(self._zeros.numpy())
        if array.dtype == np.uint8:
            array = unpack(array.reshape(self.rows, -1), self.bits, self.blocks)
        return array.reshape(self.rows, self.blocks).astype(np.float32)

    def dense(self) -> Array:
        """float32 [N, K]."""
        wide = [
            np.repeat(x.astype(np.float32), self.block, 1)[:, : self.columns] for x in (self.zeros(), self.scales())
        ]
        return np.asarray((self.codes().astype(np.float32) - wide[0]) * wide[1])


def _lazy(context: Context, name: str, shape: Sequence[int], dtype: ir.DataType, make: Callable[[], Array]) -> ir.Value:
    """An initialiser that is computed when it is needed."""

    def tensor() -> ir.Tensor:
        return ir.tensor(np.ascontiguousarray(make()).astype(dtype.numpy()), dtype=dtype, name=name)

    found = context.graph.initializers.get(name)
    if found is not None:
        return found
    return initialiser(context.graph, name, ir.LazyTensor(tensor, dtype, ir.Shape(shape), name=name))


def _constant(node: ir.Node, place: int, what: str, needed: bool = True) -> Any:
    value = given(node, place)
    if value is None and not needed:
        return None
    tensor = None if value is None else value.const_value
    if tensor is None:
        raise HqmqError(f"its {what} is no constant")
    return tensor


def _matrix(node: ir.Node) -> _Blocks:
    rows, columns, block = (node.attributes.get_int(name, 0) for name in ("N", "K", "block_size"))
    bits = node.attributes.get_int("bits", 4)
    codes, scales = _constant(node, 1, "weights"), _constant(node, 2, "scales")
    zeros = _constant(node, 3, "zero points", needed=False)
    if given(node, 4) is not None:
        raise HqmqError("g_idx is not supported")
    if min(rows, columns, block) <= 0:
        raise HqmqError(f"N {rows}, K {columns} and block_size {block} make no matrix")
    blocks = -(-columns // block)
    if codes.size != rows * blocks * block * bits // 8 or scales.size != rows * blocks:
        raise HqmqError(f"its weights {list(codes.shape)} and scales {list(scales.shape)} do not fit N, K and bits")
    if scales.dtype not in FLOATS:
        raise HqmqError(f"its scales are of type {scales.dtype}")
    return _Blocks((rows, columns), bits, block, codes, scales, zeros)


def _multiply(context: Context, node: ir.Node) -> Sequence[ir.Value | None]:
    matrix = _matrix(node)
    x, scales = need(node, 0, "A"), need(node, 2, "scales")
    dtype = scales.const_value.dtype
    build = Builder(context.graph, node, str(node.name))
    x.type = x.type or ir.TensorType(dtype)
    name = str(need(node, 1, "B").name)
    whole = matrix.columns % matrix.block == 0 and matrix.bits == 4 and (matrix.zeros() == 8).all()
    shape = (matrix.columns, matrix.rows)
    if whole and context.graph.opset_imports.get("", 0) >= _BLOCKED_OPSET:
        codes = _lazy(context, f"{name}.int4", shape, ir.DataType.INT4, lambda: (matrix.codes().astype(np.int8) - 8).T)
        parts = _lazy(context, f"{scales.name}.blocks", (matrix.blocks, matrix.rows), dtype, lambda: matrix.scales().T)
        dense = build.op("DequantizeLinear", codes, parts, dtype=dtype, axis=0, block_size=matrix.block)
        dense.shape = ir.Shape(shape)
    else:
        dense = _lazy(context, f"{name}.dense", shape, dtype, lambda: matrix.dense().T)
    y = build.op("MatMul", x, dense)
    if (bias := given(node, 5)) is not None:
        y = build.op("Add", y, bias)
    return [y]


def _multiply_trials(node: ir.Node, rng: np.random.Generator) -> Sequence[Trial]:
    x = need(node, 0, "A")
    rank = 3 if x.shape is None else len(x.shape)
    matrix = _matrix(node)
    # Near one, so that sums of many products stay within float16.
    size = min(1.0, 8 / matrix.columns**0.5)
    shape = (*(1, 1, 2, 3)[-rank + 1 :], matrix.columns)
    return [Trial({0: draw(rng, *shape) * size, 5: draw(rng, matrix.rows)})]


def reshape_tables(graph: ir.Graph) -> None:
    """Reshape the constant tables of GatherBlockQuantized beforehand (they share the weights of MatMulNBits)."""
    for node in graph:
        table = given(node, 0) if node.op_type == "GatherBlockQuantized" else None
        maker = None if table is None else table.producer()
        if table is None or maker is None or not standard(maker, "Reshape"):
            continue
        source, shape = (value.const_value if value is not None else None for value in maker.inputs[:2])
        if source is None or shape is None:
            continue
        sizes = [int(size) for size in shape.numpy()]
        if -1 in sizes:
            sizes[sizes.index(-1)] = -source.size // int(np.prod(sizes))
        if 0 in sizes or int(np.prod(sizes)) != source.size:
            continue
        name = f"{maker.name}.table"
        lazy = ir.LazyTensor(partial(_reshaped, source, tuple(sizes), name), source.dtype, ir.Shape(sizes), name=name)
        node.replace_input_with(0, initialiser(graph, name, lazy))


def _reshaped(source: ir.TensorProtocol, shape: tuple[int, ...], name: str) -> ir.Tensor:
    return ir.tensor(source.numpy().reshape(shape), name=name)


def _gather(context: Context, node: ir.Node) -> Sequence[ir.Value | None]:
    matrix, indices, scales = _table(node), need(node, 1, "indices"), need(node, 2, "scales")
    dtype = scales.const_value.dtype
    build = Builder(context.graph, node, str(node.name))
    name = f"{need(node, 0, 'data').name}.table"
    table = _lazy(context, name, (matrix.rows, matrix.columns), dtype, matrix.dense)
    return [build.op("Gather", table, indices, dtype=dtype, axis=0)]


def _table(node: ir.Node) -> _Blocks:
    data, scales = _constant(node, 0, "table"), _constant(node, 2, "scales")
    zeros = _constant(node, 3, "zero points", needed=False)
    bits, block = node.attributes.get_int("bits", 4), node.attributes.get_int("block_size", 128)
    if len(data.shape) != 2 or data.dtype != ir.DataType.UINT8 or node.attributes.get_int("gather_axis", 0) != 0:
        raise HqmqError(f"its table is {data.dtype} {list(data.shape)}: only rows of packed uint8 are supported")
    if node.attributes.get_int("quantize_axis", 1) not in (1, -1):
        raise HqmqError("its table is not quantised along its rows")
    rows, columns = int(data.shape[0]), int(data.shape[1]) * 8 // bits
    if columns % block or scales.size != rows * columns // block or scales.dtype not in FLOATS:
        raise HqmqError(f"its scales {list(scales.shape)} do not fit its table {list(data.shape)}")
    return _Blocks((rows, columns), bits, block, data, scales, zeros)


def _gather_trials(node: ir.Node, rng: np.random.Generator) -> Sequence[Trial]:
    return [Trial({1: rng.integers(0, _table(node).rows, (2, 3))})]


WEIGHTS = {
    "MatMulNBits": Rule(
        _multiply,
        _multiply_trials,
        {
            "N": None,
            "K": None,
            "bits": (4, 8),
            "block_size": None,
            "accuracy_level": None,
            "weight_prepacked": (0,),
        },
        6,
        inexact=("accuracy_level",),
    ),
    "GatherBlockQuantized": Rule(
        _gather,
        _gather_trials,
        {"bits": (4, 8), "block_size": None, "gather_axis": None, "quantize_axis": None},
        4,
    ),
}
