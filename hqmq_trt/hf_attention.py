"""The transformers attention implementation ``hqmq``: fused page-causal attention over an HqmqCache.

``model.set_attn_implementation("hqmq")`` (or HqmqCache.for_model) makes every attention layer call
:func:`hqmq_attention`. HqmqCache.update hands new K and V through untouched and ties its layer to them; the
attention function appends them to that layer and attends in one operator, ``hqmq::attention_``.

:func:`attention_parameters` reads scale, window, soft-cap and sinks from what transformers passes; the exporter
uses it too.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hqmq_trt.errors import HqmqError

IMPLEMENTATION = "hqmq"
"""Name under which transformers knows this attention."""

LAYER = "_hqmq_layer"
"""Attribute of a key tensor that leads from it to its cache layer (see :func:`tie`)."""
_WINDOW = "_hqmq_window"
_PADDED = "_hqmq_padded"
_SAMPLED_ROWS = 32
_NO_INPUT = ("position_bias", "head_mask", "indices", "block_indices", "sinks")
"""What some models pass to their attention beyond AttentionParameters: biases, and keys picked by an indexer."""


@dataclass(frozen=True)
class AttentionParameters:
    """What an attention layer adds to q, k and v.

    Attributes:
        scale: factor of the logits.
        window: the query at t sees keys j > t - window; 0: all.
        softcap: logits become softcap * tanh(logit / softcap); 0: unchanged.
        sinks: one logit a query head that only adds to the softmax's denominator, [Hq], or None.
    """

    scale: float
    window: int
    softcap: float
    sinks: Tensor | None


def attention_parameters(
    module: torch.nn.Module, query: Tensor, scaling: float | None, kwargs: dict[str, Any]
) -> AttentionParameters:
    """Scale, window, soft-cap and sinks of a transformers attention call.

    Args:
        module: the attention layer.
        query: [B, Hq, T, D].
        scaling: as passed to the attention function.
        kwargs: the attention function's other keyword arguments.

    Raises:
        HqmqError: the layer asks for something HQMQ attention does not do (bidirectional, position bias, dropout).
    """
    where = f"attention layer {getattr(module, 'layer_idx', '?')} ({type(module).__name__})"
    is_causal = kwargs.get("is_causal")
    if (getattr(module, "is_causal", True) if is_causal is None else is_causal) is False:
        raise HqmqError(f"{where} is not causal; HQMQ caches decoder self-attention only")
    for name in _NO_INPUT:
        if kwargs.get(name) is not None:
            raise HqmqError(f"{where} uses {name}, which attention 'hqmq' has no input for; use attention 'sdpa'")
    if kwargs.get("dropout"):
        raise HqmqError(f"{where} uses dropout; call model.eval() first")
    if kwargs.get("output_attentions"):
        raise HqmqError("attention 'hqmq' forms no attention weights; use attention 'eager' for output_attentions")
    if scaling is None:
        scaling = getattr(module, "scaling", None)
    window = kwargs.get("sliding_window")
    if window is None:
        window = getattr(module, "sliding_window", None)
    return AttentionParameters(
        scale=float(scaling) if scaling is not None else query.shape[-1] ** -0.5,
        window=int(window or 0),
        softcap=float(kwargs.get("softcap") or 0.0),
        sinks=kwargs.get("s_aux"),
    )


def tie(key: Tensor, layer: Any) -> Tensor:
    """An alias of `key` that leads :func:`hqmq_attention` to the cache layer it belongs to."""
    alias = key.view_as(key)
    setattr(alias, LAYER, layer)
    return alias


def hqmq_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] | None = None,
    attention_mask: Tensor | None = None,
    device: torch.device | str = "cpu",
    use_vmap: bool = False,
    **kwargs: Any,
) -> Tensor:
    """Mask function of attention ``hqmq``: the 2-D padding mask [B, kv_length], bool.

    The causal or window pattern is not expanded; it is checked to be one, and its window noted on the tensor.
    """
    window = 0
    if mask_function is not None:
        window = 0 if use_vmap else _window(mask_function, q_length, kv_length, q_offset, kv_offset, device)
        if use_vmap or window < 0:
            raise HqmqError(
                "this model's attention mask is neither causal nor a sliding window (chunks, packed sequences, images "
                "or a custom mask); use attention 'sdpa' with HqmqCache instead of 'hqmq'"
            )
    if attention_mask is None:
        mask = torch.ones(batch_size, kv_length, dtype=torch.bool, device=device)
        padded = False
    else:
        if attention_mask.shape[-1] != kv_length:
            raise HqmqError(
                f"attention_mask covers {attention_mask.shape[-1]} tokens; with {kv_length - q_length} tokens in the "
                f"cache and {q_length} new ones it must cover {kv_length}"
            )
        mask = attention_mask.bool()
        padded = not bool(mask.all())
    mask = mask.view_as(mask)
    setattr(mask, _WINDOW, window)
    setattr(mask, _PADDED, padded)
    return mask


def _window(
    mask_function: Callable[..., Any], q_length: int, kv_length: int, q_offset: int, kv_offset: int, device: Any
) -> int:
    """Window of a mask function: 0 when causal, -1 when it is neither; evaluated on rows spread over the queries."""
    count = min(q_length, _SAMPLED_ROWS)
    rows = torch.linspace(0, q_length - 1, count, device=device).round().long() + q_offset
    columns = torch.arange(kv_length, device=device) + kv_offset
    zero = torch.zeros((), dtype=torch.long, device=device)
    seen = torch.as_tensor(mask_function(zero, zero, rows[:, None], columns[None, :]), device=device)
    seen = seen.expand(count, kv_length)
    width = seen.sum(1)
    expected = (columns <= rows[:, None]) & (columns > rows[:, None] - width[:, None])
    widest = int(width.max())
    if not torch.equal(seen, expected) or not torch.equal(width, (rows + 1).clamp_max(widest)):
        return -1
    return 0 if widest == int(rows.max()) + 1 else widest


def _check_window(mask: Tensor | None, window: int, layer: int | str) -> None:
    """The mask the model made and the window it passed must mean the same."""
    masked = getattr(mask, _WINDOW, None)
    if mask is None or masked is None:
        return
    if masked != window and not (masked == 0 and window >= mask.shape[1]):
        raise HqmqError(
            f"attention layer {layer}: the mask has a window of {masked or 'all'} tokens, the layer passes "
            f"sliding_window={window or None}; use attention 'sdpa' for this model"
        )


def _shift(x: Tensor, start: Tensor) -> Tensor:
    """Rows of x [B, H, T, D] rolled up by start[b], so that row start[b] comes first."""
    rows = torch.arange(x.shape[2], device=x.device)
    index = (rows + start[:, None]) % x.shape[2]
    return x.gather(2, index[:, None, :, None].expand_as(x))


def hqmq_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: output [B, T, Hq, D] in the type of `query`, and no weights.

    Args:
        query: [B, Hq, T, D]. key, value: [B, H, T, D], the new tokens, as HqmqCache.update returned them.
        attention_mask: [B, tokens before + T] or None. The real tokens of a call must lie side by side; padding
            before and after them never enters the cache, and its output rows are 0.
    """
    index = getattr(module, "layer_idx", "?")
    layer = getattr(key, LAYER, None)
    if layer is None:
        raise HqmqError(
            f"attention 'hqmq' of layer {index} found no HqmqCache: call the model with "
            "past_key_values=HqmqCache.for_model(model, scheme) and use_cache=True"
        )
    parameters = attention_parameters(module, query, scaling, kwargs)
    _check_window(attention_mask, parameters.window, index)
    start = count = None
    if attention_mask is not None:
        if attention_mask.dim() != 2:
            raise HqmqError(
                f"attention 'hqmq' takes a padding mask [batch, tokens], not {list(attention_mask.shape)}; "
                "for custom masks use attention 'sdpa'"
            )
        if getattr(attention_mask, _PADDED, True):
            start, count = _real_rows(attention_mask.bool(), query.shape[2], layer)
    if start is None:
        return layer.attend(query, key, value, None, parameters).transpose(1, 2), None
    shifted = (_shift(x, start) for x in (query, key, value))
    y = layer.attend(*shifted, count, parameters)
    return _shift(y, -start).transpose(1, 2), None


def _real_rows(mask: Tensor, rows: int, layer: Any) -> tuple[Tensor | None, Tensor | None]:
    """First real row and number of real rows among the last `rows` of a mask; (None, None) when all are real."""
    new = mask[:, mask.shape[1] - rows :]
    held = mask[:, : mask.shape[1] - rows].sum(1)
    if layer.length is not None and not torch.equal(held.int(), layer.length):
        raise HqmqError(
            f"attention_mask says {held.tolist()} tokens came before, the cache holds {layer.length.tolist()}; "
            "pass the mask of all tokens since the cache was empty"
        )
    if bool(new.all()):
        return None, None
    count = new.sum(1)
    start = new.int().argmax(1)  # the first of equal values
    column = torch.arange(rows, device=mask.device)
    if not torch.equal(new, (column >= start[:, None]) & (column < (start + count)[:, None])):
        raise HqmqError("attention_mask has gaps between the tokens of one call; pad before or after them only")
    return start, count.int()


def register() -> None:
    """Make ``hqmq`` known to transformers (done when this module is imported)."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, hqmq_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, hqmq_mask)


register()
