"""Tiny random models of the architectures that the exporter is tried on, and of those that it must refuse."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import transformers

VOCABULARY = 97
WINDOW = 7
"""Sliding window of the models that have one: smaller than a page, and than the prefill."""


@dataclass(frozen=True)
class Architecture:
    """One line of docs/models.md.

    Attributes:
        name: what people call it.
        config: name of the configuration class in transformers.
        settings: what differs from _SIZES (None: take it out).
        shows: what the tiny model exercises, or for a refused one what it is.
        refused: words that the refusal must contain; empty: it must be exported.
        auto: name of the class in transformers that makes the model.
    """

    name: str
    config: str
    settings: dict[str, Any] = field(default_factory=dict)
    shows: str = ""
    refused: str = ""
    auto: str = "AutoModelForCausalLM"

    @property
    def id(self) -> str:
        """Name for pytest."""
        return self.name.lower().replace(" ", "-")

    def model(self) -> Any:
        """The model with random weights, in float32."""
        torch.manual_seed(0)
        settings = {key: value for key, value in {**_SIZES, **self.settings}.items() if value is not None}
        config = getattr(transformers, self.config)(**settings)
        kind = getattr(transformers, self.auto)
        make = kind.from_config if self.auto.startswith("Auto") else kind._from_config
        model = make(config, attn_implementation="eager").eval()
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if key.endswith("bias") or "sinks" in key:
                    parameter.normal_(0, 0.3)
                if self.config.startswith("Gemma") and "post_" in key:
                    parameter.fill_(-0.7)  # 1 is added; a norm of 1 would make layers far larger than the embeddings
            embeddings = model.get_input_embeddings().weight
            if model.get_output_embeddings() is not None and model.get_output_embeddings().weight is not embeddings:
                # As large as what the layers add: a value that falls to the other side when it is rounded to float16
                # would else move a logit by more than the tolerance.
                embeddings.mul_(6)
        return model


_SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "initializer_range": 0.05,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_HEADS = {"num_key_value_heads": None, "head_dim": None}
_LOCAL_GLOBAL = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}

EXPORTED = (
    Architecture(
        "Llama 3",
        "LlamaConfig",
        {
            "num_hidden_layers": 3,
            "num_attention_heads": 8,
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 1e4,
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 32,
            },
        },
        "rope scaling, GQA 8:2",
    ),
    Architecture(
        "Llama tied",
        "LlamaConfig",
        {"hidden_size": 144, "num_attention_heads": 9, "num_key_value_heads": 3, "tie_word_embeddings": True},
        "tied embeddings, GQA 9:3",
    ),
    Architecture("Mistral", "MistralConfig", {"sliding_window": WINDOW}, "sliding window"),
    Architecture(
        "Qwen2", "Qwen2Config", {"num_key_value_heads": 1, "tie_word_embeddings": True}, "bias in q, k, v; MQA"
    ),
    Architecture("Qwen3", "Qwen3Config", {"num_key_value_heads": 4}, "norms of q and k; MHA"),
    Architecture(
        "Gemma 2",
        "Gemma2Config",
        {
            **_LOCAL_GLOBAL,
            "query_pre_attn_scalar": 24,
            "attn_logit_softcapping": 1.0,
            "final_logit_softcapping": 10.0,
        },
        "local and global layers, soft-caps, own scale",
    ),
    Architecture(
        "Gemma 3 text",
        "Gemma3TextConfig",
        {
            **_LOCAL_GLOBAL,
            "query_pre_attn_scalar": 24,
            "num_key_value_heads": 1,
        },
        "local and global layers with rope of their own, norms of q and k",
    ),
    Architecture("Phi-3", "Phi3Config", {"head_dim": None, "sliding_window": WINDOW}, "fused qkv, sliding window"),
    Architecture(
        "Phi-4-mini",
        "Phi3Config",
        {
            "head_dim": None,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "tie_word_embeddings": True,
            "original_max_position_embeddings": 32,
            "rope_parameters": {
                "rope_type": "longrope",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
                "short_factor": [1.0 + i / 10 for i in range(12)],
                "long_factor": [1.5 + i / 5 for i in range(12)],
                "original_max_position_embeddings": 32,
            },
        },
        "partial rotary, longrope, fused qkv",
    ),
    Architecture(
        "GPT-2",
        "GPT2Config",
        {
            **_HEADS,
            "intermediate_size": None,
            "n_inner": 80,
            "initializer_range": 0.1,
            "scale_attn_by_inverse_layer_idx": True,
        },
        "learned positions, Conv1D, a scale for each layer",
    ),
    Architecture(
        "OPT",
        "OPTConfig",
        {**_HEADS, "intermediate_size": None, "ffn_dim": 80, "word_embed_proj_dim": 32, "initializer_range": 0.1},
        "learned positions from 2, projected embeddings",
    ),
    Architecture(
        "GPT-NeoX",
        "GPTNeoXConfig",
        {**_HEADS, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.25}},
        "fused qkv, partial rotary, parallel blocks",
    ),
    Architecture(
        "gpt-oss",
        "GptOssConfig",
        {
            "sliding_window": WINDOW,
            "layer_types": ["sliding_attention", "full_attention"],
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
        },
        "sinks, local and global layers, mixture of experts, yarn",
    ),
    Architecture(
        "Mixtral",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
        "mixture of experts",
    ),
    Architecture(
        "Qwen3 MoE",
        "Qwen3MoeConfig",
        {"num_experts": 6, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "mlp_only_layers": [0]},
        "mixture of experts, a dense layer, norms of q and k",
    ),
    Architecture("SmolLM3", "SmolLM3Config", {"no_rope_layers": [1, 0]}, "a layer without positions"),
    Architecture(
        "Cohere", "CohereConfig", {"head_dim": None, "logit_scale": 1.0}, "interleaved rotary, parallel blocks"
    ),
)

_NO_SIZES = dict.fromkeys(_SIZES)
_TEXT = {key: _SIZES[key] for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")}
_VISION = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 28,
}
REFUSED = (
    Architecture(
        "DeepSeek-V3",
        "DeepseekV3Config",
        {
            **_HEADS,
            "num_key_value_heads": 4,
            "kv_lora_rank": 16,
            "q_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 2,
        },
        "multi-head latent attention",
        "multi-head latent attention",
    ),
    Architecture("Mamba", "MambaConfig", {**_HEADS, "num_attention_heads": None}, "recurrent state", "recurrent state"),
    Architecture(
        "RWKV",
        "RwkvConfig",
        {**_HEADS, "max_position_embeddings": None, "context_length": 64},
        "recurrent state",
        "recurrent state",
    ),
    Architecture(
        "Jamba",
        "JambaConfig",
        {"head_dim": None, "use_mamba_kernels": False, "num_experts": 2},
        "attention and Mamba",
        "beside attention it has mamba layers",
    ),
    Architecture(
        "LFM2",
        "Lfm2Config",
        {"layer_types": ["conv", "full_attention"]},
        "attention and convolution",
        "beside attention it has conv layers",
    ),
    Architecture(
        "Qwen3-Next",
        "Qwen3NextConfig",
        {"layer_types": ["linear_attention", "full_attention"], "num_experts": 4},
        "attention and linear attention",
        "beside attention it has linear_attention layers",
    ),
    Architecture(
        "RecurrentGemma",
        "RecurrentGemmaConfig",
        {"num_hidden_layers": 3},
        "attention and recurrence",
        "beside attention it has recurrent layers",
    ),
    Architecture(
        "Gemma 3n text",
        "Gemma3nTextConfig",
        {
            "num_hidden_layers": 4,
            "num_kv_shared_layers": 2,
            "sliding_window": WINDOW,
            "intermediate_size": [80] * 4,
            "layer_types": ["sliding_attention", "full_attention"] * 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.0] * 4,
        },
        "layers share caches",
        "share key-value caches",
    ),
    Architecture(
        "Llama 4 text",
        "Llama4TextConfig",
        {"attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 80},
        "chunked attention",
        "neither causal nor a sliding window",
    ),
    Architecture(
        "BLOOM",
        "BloomConfig",
        {**_NO_SIZES, "vocab_size": VOCABULARY, "hidden_size": 64, "n_layer": 2, "n_head": 4},
        "ALiBi",
        "does not use the attention interface",
    ),
    Architecture(
        "MPT",
        "MptConfig",
        {**_NO_SIZES, "vocab_size": VOCABULARY, "d_model": 64, "n_layers": 2, "n_heads": 4},
        "ALiBi",
        "does not use the attention interface",
    ),
    Architecture(
        "Falcon",
        "FalconConfig",
        {**_HEADS, "intermediate_size": None},
        "attention of its own",
        "does not use the attention interface",
    ),
    Architecture(
        "GPT-J",
        "GPTJConfig",
        {**_NO_SIZES, "vocab_size": VOCABULARY, "n_embd": 64, "n_layer": 2, "n_head": 4, "rotary_dim": 8},
        "attention of its own",
        "does not use the attention interface",
    ),
    Architecture(
        "T5",
        "T5Config",
        {
            **_NO_SIZES,
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "d_ff": 80,
            "num_layers": 2,
            "num_heads": 4,
            "d_kv": 16,
            "decoder_start_token_id": 0,
        },
        "encoder-decoder",
        "encoder-decoder",
        "T5ForConditionalGeneration",
    ),
    Architecture(
        "Gemma 3",
        "Gemma3Config",
        {**_NO_SIZES, "text_config": _TEXT, "vision_config": _VISION},
        "images",
        "multimodal model (vision)",
        "Gemma3ForConditionalGeneration",
    ),
    Architecture(
        "Qwen2-VL",
        "Qwen2VLConfig",
        {
            **_NO_SIZES,
            "text_config": _TEXT,
            "vision_config": {"embed_dim": 32, "depth": 1, "hidden_size": 64, "num_heads": 2},
        },
        "images",
        "multimodal model (vision)",
        "Qwen2VLForConditionalGeneration",
    ),
    Architecture(
        "DBRX",
        "DbrxConfig",
        {
            **_NO_SIZES,
            "vocab_size": VOCABULARY,
            "d_model": 64,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 64,
            "attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0},
            "ffn_config": {"ffn_hidden_size": 32, "moe_num_experts": 2},
        },
        "mixture of experts of its own",
        "depends on the data",
    ),
    Architecture(
        "Llama dynamic",
        "LlamaConfig",
        {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
        "rope of type dynamic",
        "rope of type dynamic",
    ),
    Architecture(
        "BERT", "BertConfig", {**_HEADS}, "bidirectional", "neither causal nor a sliding window", "BertLMHeadModel"
    ),
)
BY_NAME = {architecture.name: architecture for architecture in (*EXPORTED, *REFUSED)}
