"""Mixture-of-experts blocks in a form that torch.export can capture and TensorRT can parse.

What transformers offers loops over the experts that were hit, calls grouped products that ONNX has no operator for, or
copies the weights of its experts for every token. Here every expert sees every token, and the router's weights, zero
for those it did not choose, add them up: three products, exact, at the price of num_experts / experts_per_token times
the arithmetic.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

IMPLEMENTATION = "hqmq_export"
"""Name under which transformers knows these experts."""


def all_experts(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts' answer [N, F] to hidden states [N, F].

    Args:
        self: the experts module; weights [E, out, in], or [E, in, out] if `is_transposed`, biases [E, out].
        top_k_index: the experts chosen for each token, int64 [N, K].
        top_k_weights: their weights, [N, K].
    """
    first = "gate_up_proj" if self.has_gate else "up_proj"
    x = _product(self, first, hidden_states[None])
    x = self._apply_gate(x) if self.has_gate else self.act_fn(x)
    x = _product(self, "down_proj", x)
    if getattr(self, "has_post_expert_norm", False):
        x = self.post_expert_norm(x)
    experts = torch.arange(x.shape[0], device=x.device)[:, None, None]
    chosen = top_k_index[None] == experts
    weights = (chosen.to(top_k_weights.dtype) * top_k_weights[None]).sum(2)
    # An expert that was not asked may overflow in float16, and infinity times 0 is not 0.
    used = torch.where((weights != 0)[:, :, None], x * weights[:, :, None], 0.0)
    return used.sum(0).to(hidden_states.dtype)


def _product(self: Any, name: str, x: Tensor) -> Tensor:
    """x [1 or E, N, in] times the weights of all experts, [E, N, out]."""
    weight = getattr(self, name)
    y = x @ (weight if self.is_transposed else weight.transpose(1, 2))
    return y + getattr(self, f"{name}_bias")[:, None] if self.has_bias else y


ALL_EXPERTS_FUNCTIONS.register(IMPLEMENTATION, all_experts)


@contextmanager
def experts_implementation(model: Any) -> Iterator[None]:
    """Switch a model's experts, if it has any, to IMPLEMENTATION, and back at the end."""
    before = getattr(model.config, "_experts_implementation", None)
    model.set_experts_implementation(IMPLEMENTATION)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
