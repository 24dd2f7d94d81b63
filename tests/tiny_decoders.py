"""Tiny random decoders of transformers, for tests of both roads of export."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import transformers

BASE: dict[str, Any] = {
    "vocab_size": 97,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.15,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: transformers.LlamaConfig(**BASE),
    "llama64": lambda: transformers.LlamaConfig(**{**BASE, "head_dim": 64, "tie_word_embeddings": True}),
    "qwen2": lambda: transformers.Qwen2Config(**BASE),
    "qwen3": lambda: transformers.Qwen3Config(**BASE),
    "mistral": lambda: transformers.MistralConfig(**BASE, sliding_window=7),
    "gemma2": lambda: transformers.Gemma2Config(
        **BASE, sliding_window=9, query_pre_attn_scalar=16, attn_logit_softcapping=5.0, final_logit_softcapping=10.0
    ),
}


def make_model(name: str, attention: str = "eager") -> Any:
    """One of MODELS with reproducible random weights; biases that count."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(MODELS[name](), attn_implementation=attention).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model
