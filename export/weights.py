"""Weights of the captured graph: stored once, stored transposed where the graph transposes them, rotated for V.

Nothing here copies a weight: replaced tensors are computed one at a time when the file is written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from hqmq_trt.oracle import hadamard

from .layers import AttentionLayer

MODEL_PREFIX = "model."
"""What CaptureModule puts before the names of the model's own weights."""
_MAKE = "hqmq.make"


def share_tied(model: ir.Model) -> None:
    """Let initialisers that are one tensor in torch (tied embeddings) be one initialiser."""
    first: dict[Any, ir.Value] = {}
    for name, value in list(model.graph.initializers.items()):
        tensor = getattr(value.const_value, "raw", None)
        if not isinstance(tensor, Tensor) or tensor.numel() == 0:
            continue
        kept = first.setdefault((tensor.data_ptr(), tuple(tensor.shape), tensor.stride(), tensor.dtype), value)
        if kept is not value:
            ir.convenience.replace_all_uses_with(value, kept)
            del model.graph.initializers[name]


def fold_value_rotation(model: ir.Model, layers: Sequence[AttentionLayer]) -> None:
    """Rotate the output of each layer's V projection, and the input of its output projection, by Hadamard matrices.

    V comes out rotated head by head, so does the attention's output, and the output projection undoes it: H is its
    own inverse. Only layers whose rotate_value is False are touched. Rotated in float32, rounded to the weight's type.
    """
    for layer in layers:
        if layer.rotate_value:
            continue
        size = layer.head_dim
        made, used = (f"{MODEL_PREFIX}{name}" for name in (layer.value_projection, layer.output_projection))
        _change(model, f"{made}.weight", partial(_rotate_rows, head_dim=size))
        if f"{made}.bias" in model.graph.initializers:
            _change(model, f"{made}.bias", partial(_rotate, head_dim=size))
        _change(model, f"{used}.weight", partial(_rotate, head_dim=size))


def store_transposed(model: ir.Model) -> None:
    """Drop the Transpose nodes of weights that nothing else reads; those weights are stored transposed."""
    for name, value in list(model.graph.initializers.items()):
        users = [user for user, _ in value.uses()]
        if not users or value.shape is None or len(value.shape) < 2:
            continue
        if any(user.op_type != "Transpose" or user.domain or user.graph is not model.graph for user in users):
            continue
        orders = {_order(user, len(value.shape)) for user in users}
        if len(orders) > 1:
            continue
        _change(model, name, partial(torch.permute, dims=orders.pop()))
        value.shape = ir.Shape(tuple(value.const_value.shape))
        for user in users:
            ir.convenience.replace_all_uses_with(user.outputs[0], value)
            model.graph.remove(user, safe=True)


def _order(transpose: ir.Node, rank: int) -> tuple[int, ...]:
    """Order of the axes that a Transpose node makes."""
    given = transpose.attributes.get("perm")
    return tuple(given.as_ints()) if given is not None else tuple(range(rank))[::-1]


def strip_prefix(model: ir.Model) -> None:
    """Give the weights the names they have in the model."""
    for name, value in list(model.graph.initializers.items()):
        if name.startswith(MODEL_PREFIX):
            value.name = name[len(MODEL_PREFIX) :]


def _rotate(x: Tensor, head_dim: int) -> Tensor:
    """Hadamard rotation of the last axis in blocks of `head_dim`."""
    rotated = hadamard(x.detach().float().reshape(*x.shape[:-1], -1, head_dim)).reshape(x.shape)
    return rotated.to(x.dtype)


def _rotate_rows(weight: Tensor, head_dim: int) -> Tensor:
    return _rotate(weight.T, head_dim).T


def _change(model: ir.Model, name: str, function: Callable[[Tensor], Tensor]) -> None:
    """Replace an initialiser by `function` of it, computed when the file is written."""
    value = model.graph.initializers[name]
    held = value.const_value
    make = value.meta.get(_MAKE) or (lambda: torch.from_dlpack(held) if not hasattr(held, "raw") else held.raw)

    def changed() -> Tensor:
        return function(make())

    shape = function(torch.empty(tuple(held.shape), device="meta")).shape
    value.meta[_MAKE] = changed
    value.const_value = ir.LazyTensor(
        lambda: TorchTensor(changed().contiguous(), name),
        held.dtype,
        ir.Shape(shape),
        name=name,
    )
