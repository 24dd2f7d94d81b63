"""Tiny random models and helpers for the tests of HqmqCache."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hqmq_trt.cache import HqmqCache

VOCAB = 97
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 1024,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}
MIXED = {"sliding_window": 20, "layer_types": ["sliding_attention", "full_attention"], "head_dim": 16}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "qwen2": ("Qwen2", {}),
    "mistral": ("Mistral", {"sliding_window": 20}),
    "gpt2": ("GPT2", {"n_embd": 64, "n_head": 4, "n_layer": 2, "n_positions": 1024, "attn_pdrop": 0.0}),
    "gemma2": ("Gemma2", {**MIXED, "attn_logit_softcapping": 5.0}),
    "gpt_oss": ("GptOss", {**MIXED, "num_local_experts": 2, "num_experts_per_tok": 1}),
}
EVERY_MODEL = pytest.mark.parametrize("name", list(MODELS))
SCHEME = "paper:s90_r6@p16"
PAGE = 16


@functools.cache
def _model(name: str, dtype: torch.dtype) -> Any:
    family, options = MODELS[name]
    sizes = {k: v for k, v in SIZES.items() if name != "gpt2" or k.endswith("token_id") or k == "vocab_size"}
    config = getattr(transformers, f"{family}Config")(**sizes, **options)
    model = getattr(transformers, "GPT2LMHeadModel" if name == "gpt2" else f"{family}ForCausalLM")(config)
    gen = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter_name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.12, generator=gen)
            elif parameter_name.endswith(("bias", "sinks")):
                parameter.normal_(0, 0.3, generator=gen)
    return model.to(dtype).eval()


def model_of(name: str, implementation: str = "eager", dtype: torch.dtype = torch.float32) -> Any:
    model = _model(name, dtype)
    model.set_attn_implementation(implementation)
    return model


def prompt(*lengths: int, seed: int = 0) -> list[Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCAB, (1, length), generator=gen) for length in lengths]


def left_pad(prompts: list[Tensor]) -> dict[str, Tensor]:
    width = max(p.shape[1] for p in prompts)
    pad = [torch.nn.functional.pad(p, (width - p.shape[1], 0)) for p in prompts]
    mask = [torch.nn.functional.pad(torch.ones_like(p), (width - p.shape[1], 0)) for p in prompts]
    return {"input_ids": torch.cat(pad), "attention_mask": torch.cat(mask)}


def generate(model: Any, cache: Any, inputs: dict[str, Tensor], tokens: int = 12, **kwargs: Any) -> Any:
    options = {"do_sample": False, "output_logits": True, "return_dict_in_generate": True, **kwargs}
    return model.generate(**inputs, past_key_values=cache, max_new_tokens=tokens, **options)


def mean_kl(actual: Tensor, expected: Tensor) -> float:
    p, q = expected.double().log_softmax(-1), actual.double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


def run(model: Any, ids: Tensor, cache: HqmqCache, pieces: list[int]) -> Tensor:
    return torch.cat([model(part, past_key_values=cache).logits for part in ids.split(pieces, 1)], 1)
