"""The transformers side of the exporter: its attention function, mask function and cache.

While a :class:`Step` is active, every attention layer of the model goes to it.
"""

from __future__ import annotations

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

IMPLEMENTATION = "hqmq_export"
"""Name under which transformers knows the attention of the exporter."""


class PassThroughCache(Cache):
    """A transformers cache that hands new K and V through: the step owns the packed store.

    Attributes:
        updated: indices of the layers that called `update`, in order.
    """

    def __init__(self) -> None:
        self.layers: list[Any] = []
        self.updated: list[int] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """K and V unchanged."""
        self.updated.append(layer_idx)
        return key, value

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Always 0: positions come from past_length."""
        return 0

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
    """Switch a model to IMPLEMENTATION, and back at the end."""
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(IMPLEMENTATION)
    except (AttributeError, ValueError) as error:
        raise HqmqError(
            f"{type(model).__name__} does not use the attention interface of transformers "
            f"({' '.join(str(error).split())[:200]}); HQMQ cannot replace its attention"
        ) from error
    try:
        yield
    finally:
        model.set_attn_implementation(before)
