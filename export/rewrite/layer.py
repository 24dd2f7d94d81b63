"""What the recogniser finds of one attention layer."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir


@dataclass(frozen=True)
class Join:
    """Where a cache input meets new rows.

    Attributes:
        past: cache input [B, H, P, D]. new: new rows [B, H, T, D]. full: both, [B, H, P + T, D]; for an Attention
            with cache inputs, its output.
        node: the node that joins them.
    """

    past: ir.Value
    new: ir.Value
    full: ir.Value
    node: ir.Node


@dataclass(frozen=True)
class Term:
    """One part of a mask: ``add`` (0 or very negative, added to scores), ``keep`` or ``drop`` (bool)."""

    kind: str
    value: ir.Value


@dataclass(frozen=True)
class Layer:
    """One attention layer, as its nodes say; hqmq_trt.export.rewrite.verify tries whether they keep their word.

    Attributes:
        index: position of its cache.
        form: which case of hqmq_trt.export.rewrite.attention it is.
        node: its softmax or Attention node, by which messages name it.
        key, value: its caches.
        q: queries [B, Hq, T, D], before any constant factor. y: result [B, Hq, T, D].
        num_heads, num_kv_heads, head_dim: query heads, K and V heads, elements of a head.
        scale, softcap: as attributes of HqmqAttention.
        sinks: constant of Hq elements, or None.
        terms: parts of its mask. causal: whether the node itself masks causally.
        window: tokens a query sees; 0: all (known once the mask was evaluated).
        padding: whether attention_mask hides columns.
        reach: tokens over which the mask was looked at.
        chunks: whether the original takes several new rows after others.
    """

    index: int
    form: str
    node: ir.Node
    key: Join
    value: Join
    q: ir.Value
    y: ir.Value
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    softcap: float
    sinks: ir.Value | None
    terms: tuple[Term, ...]
    causal: bool = False
    window: int = 0
    padding: bool = False
    reach: int = 0
    chunks: bool = True
