"""Attention that shows q, K and V to a listener, and the arithmetic to say what changes of K and V do to it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hqmq_trt.errors import HqmqError
from hqmq_trt.hf_attention import AttentionParameters, attention_parameters

_IMPLEMENTATION = "hqmq_capture"
"""Name under which transformers knows this attention."""
_LOGITS = 1 << 25
"""Attention logits formed at a time."""


@dataclass(frozen=True)
class LayerInput:
    """What the attention of one layer reads: q [1, Hq, T, D], k and v [1, H, T, D] (after RoPE).

    Attributes:
        layer: its number.
        visible: bool [T, T], which keys (columns) each query sees; causal.
        parameters: scale, soft-cap and sinks.
    """

    layer: int
    q: Tensor
    k: Tensor
    v: Tensor
    visible: Tensor
    parameters: AttentionParameters


@contextmanager
def listening(model: Any, listen: Callable[[LayerInput], Tensor]) -> Iterator[None]:
    """Within the block, attention of `model` is listen(its input) → [Hq, T, D]."""

    def attention(
        module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        parameters = attention_parameters(module, query, kwargs.pop("scaling", None), kwargs)
        rows = query.shape[2]
        visible = torch.ones(rows, rows, dtype=torch.bool, device=query.device).tril()
        if attention_mask is not None:
            visible &= attention_mask[0, 0]
        layer = getattr(module, "layer_idx", None)
        if layer is None:
            raise HqmqError(f"{type(module).__name__} does not say which layer it is (layer_idx)")
        out = listen(LayerInput(layer, query, key, value, visible, parameters))
        return out.to(query.dtype).transpose(0, 1)[None], None

    before = model.config._attn_implementation
    ALL_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_IMPLEMENTATION, sdpa_mask)
    try:
        model.set_attn_implementation(_IMPLEMENTATION)
        yield
    finally:
        model.set_attn_implementation(before)


def _blocks(q: Tensor, heads: int) -> Iterator[tuple[int, int, Tensor]]:
    """(first row, end, q [H, Hq/H, rows, D]) of blocks of queries [Hq, T, D]."""
    rows = max(1, _LOGITS // (q.shape[0] * q.shape[1]))
    grouped = q.unflatten(0, (heads, -1))
    for first in range(0, q.shape[1], rows):
        end = min(first + rows, q.shape[1])
        yield first, end, grouped[:, :, first:end]


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, parameters: AttentionParameters) -> Tensor:
    """Attention in float32: q [Hq, T, D], k and v [H, T, D], visible bool [T, T] (causal) → [Hq, T, D]."""
    out = []
    for first, end, part in _blocks(q, len(k)):
        logits = part @ k[:, None, :end].transpose(-1, -2) * parameters.scale
        if parameters.softcap:
            logits = parameters.softcap * torch.tanh(logits / parameters.softcap)
        logits = logits.masked_fill(~visible[first:end, :end], -torch.inf)
        if parameters.sinks is None:
            weights = logits.softmax(-1)
        else:
            sinks = parameters.sinks.float().reshape(len(k), -1, 1, 1).expand(*logits.shape[:-1], 1)
            weights = torch.cat([logits, sinks], -1).softmax(-1)[..., :-1]
        out.append((weights @ v[:, None, :end]).flatten(0, 1))
    return torch.cat(out, 1)


def logit_error(q: Tensor, difference: Tensor, visible: Tensor, scale: float) -> tuple[Tensor, int]:
    """Sum of squares [H] of q·difference·scale over pairs of `visible` bool [T, T], and their number a KV head."""
    total = torch.zeros(len(difference), dtype=torch.float64, device=q.device)
    for first, end, part in _blocks(q, len(difference)):
        logits = part @ difference[:, None, :end].transpose(-1, -2) * scale
        square = logits.square_().masked_fill_(~visible[first:end, :end], 0.0)
        total += square.sum(-1, dtype=torch.float64).sum((1, 2))
    return total, int(visible.sum()) * (len(q) // len(difference))
