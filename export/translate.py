"""Translation of the torch operators ``hqmq::*`` to ONNX nodes of the domain ``com.hqmq``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import onnx_ir as ir
import onnxscript
import torch

from hqmq_trt import contract, schemas, torch_ops
from hqmq_trt.scheme import RoleScheme, Scheme


def _node(op_type: str, inputs: Sequence[Any], attributes: dict[str, contract.Attribute], outputs: int) -> Any:
    """Record a node with variadic inputs and outputs, which the tracer of torch.onnx cannot make from a schema."""
    node = ir.Node(
        contract.DOMAIN,
        op_type,
        inputs,
        ir.convenience.convert_attributes(attributes),
        num_outputs=outputs,
        version=contract.OPSET_VERSION,
    )
    onnxscript.evaluator.default().nodes.append(node)
    return node.outputs


def _role(scheme: str, role: str, rotate: bool) -> tuple[RoleScheme, int]:
    parsed = Scheme.parse(scheme)
    codec = parsed.role(role)
    return replace(codec, hadamard=codec.hadamard and rotate), parsed.page_size


def _head_dim(tail: Any) -> int:
    return int(tail.shape[3])


def _attributes(codec: RoleScheme, tail: Any, page_size: int) -> dict[str, contract.Attribute]:
    return {
        **contract.role_attributes(codec, _head_dim(tail), page_size),
        **contract.common_attributes(page_size),
    }


def quantize(
    x: Any,
    past_length: Any,
    new_length: Any,
    codebook: Sequence[Any],
    past: Sequence[Any],
    scheme: str,
    role: str,
    rotate: bool = True,
) -> Any:
    """hqmq::quantize → HqmqQuantize."""
    codec, page_size = _role(scheme, role, rotate)
    return _node(
        contract.QUANTIZE,
        [x, past_length, new_length, *codebook, *past],
        _attributes(codec, past[-1], page_size),
        len(past),
    )


def dequantize(
    length: Any,
    codebook: Sequence[Any],
    cache: Sequence[Any],
    scheme: str,
    role: str,
    dtype: int,
    rotate: bool = True,
) -> Any:
    """hqmq::dequantize → HqmqDequantize."""
    codec, page_size = _role(scheme, role, rotate)
    inputs = [length, *codebook, *cache]
    (dense,) = _node(contract.DEQUANTIZE, inputs, _attributes(codec, cache[-1], page_size), 1)
    # No input tells the node its type, so it gives float32; the cache holds float16 at most.
    return dense if dtype == ir.DataType.FLOAT else onnxscript.opset23.Cast(dense, to=dtype)


def attention(
    q: Any,
    k: Any,
    v: Any,
    past_length: Any,
    new_length: Any,
    sinks: Any,
    codebooks: Sequence[Any],
    past: Sequence[Any],
    scheme: str,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    rotate_value: bool = True,
) -> Any:
    """hqmq::attention → HqmqAttention."""
    attributes = contract.attention_attributes(
        Scheme.parse(scheme), _head_dim(past[-1]), scale, window, softcap, sinks is not None, rotate_value
    )
    given = [] if sinks is None else [sinks]
    inputs = [q, k, v, past_length, new_length, *given, *codebooks, *past]
    return _node(contract.ATTENTION, inputs, attributes, 1 + len(past))


schemas.register()  # onnxscript finds operators through their schemas
assert torch_ops is not None  # importing it defines torch.ops.hqmq
TABLE: dict[Callable[..., Any], Callable[..., Any]] = {
    torch.ops.hqmq.quantize.default: quantize,
    torch.ops.hqmq.dequantize.default: dequantize,
    torch.ops.hqmq.attention.default: attention,
}
