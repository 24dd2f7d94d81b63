"""The transformers side of the exporter: its attention function, mask function and cache.

While a :class:`Step` is active, every attention layer of the model goes to it.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hqmq_trt.errors import HqmqError
from hqmq_trt.hf_attention import AttentionParameters, attention_parameters

from .experts import experts_implementation
from .rope import rope_by_sequence

IMPLEMENTATION = "hqmq_export"
"""Name under which transformers knows the attention of the exporter."""


class PassThroughCache(Cache):
    """A transformers cache that hands new K and V through: the step owns the packed store.

    Attributes:
        updated: indices of the layers that called `update`, in order.
    """

    def __init__(self, length: int = 0) -> None:
        """`length`: tokens it claims to hold. Positions come from past_length: a model must not look at it."""
        self.layers: list[Any] = []
        self.updated: list[int] = []
        self._length = length

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """K and V unchanged."""
        self.updated.append(layer_idx)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """What the constructor was told."""
        return self._length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[Any, int]:
        """(keys, offset) as of an empty cache; the mask is never built."""
        return query_length if isinstance(query_length, (int, torch.SymInt)) else query_length.shape[0], 0

    def get_max_cache_shape(self, *args: Any) -> int:
        """Unbounded."""
        return -1

    @property
    def is_sliding(self) -> list[bool]:
        """One full layer: windows are a matter of the step."""
        return [False]

    def __len__(self) -> int:
        return 1


class Step:
    """One forward pass: where q, k and v of every attention layer go. At most one is active."""

    active: Step | None = None

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, parameters: AttentionParameters, mask: Any
    ) -> Tensor:
        """Output [B, Hq, T, D] of one layer. q: [B, Hq, T, D]; k, v: [B, H, T, D]; mask: what `mask` returned."""
        raise NotImplementedError

    def mask(self, mask_function: Any) -> Any:
        """What the model hands to its layers as attention mask. `mask_function`: (batch, head, query, key) → bool."""
        raise NotImplementedError

    @contextmanager
    def activate(self) -> Iterator[None]:
        """Make this the step that attention layers find."""
        outer, Step.active = Step.active, self
        try:
            yield
        finally:
            Step.active = outer


def _active() -> Step:
    if Step.active is None:
        raise HqmqError(f"attention '{IMPLEMENTATION}' works only while hqmq_trt.export captures a model")
    return Step.active


def _attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    parameters = attention_parameters(module, query, scaling, kwargs)
    y = _active().attend(module, query, key, value, parameters, attention_mask)
    return y.transpose(1, 2).contiguous(), None


def _mask(*args: Any, mask_function: Any = None, **kwargs: Any) -> Any:
    return _active().mask(mask_function)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _attention)
ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _mask)


@contextmanager
def attention_implementation(model: Any) -> Iterator[None]:
    """Switch a model's attention, experts and longrope to the exporter's, and back at the end.

    Raises:
        HqmqError: the model has no key-value cache, or computes its attention by itself.
    """
    name = type(model).__name__
    if "past_key_values" not in inspect.signature(model.forward).parameters:
        raise HqmqError(f"{name} has no key-value cache but recurrent state, or none: HQMQ has nothing to compress")
    before = model.config._attn_implementation
    reason = ""
    try:
        if getattr(model, "_can_set_attn_implementation", lambda: True)():
            model.set_attn_implementation(IMPLEMENTATION)
        else:
            reason = "it computes attention by itself, as models with position biases (ALiBi) do"
    except (AttributeError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
    if reason:
        raise HqmqError(
            f"{name} does not use the attention interface of transformers ({reason}); HQMQ cannot replace its attention"
        )
    try:
        with experts_implementation(model), rope_by_sequence(model):
            yield
    finally:
        model.set_attn_implementation(before)
