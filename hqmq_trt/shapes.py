"""Shapes of the KV cache of well-known models, and how to read them from a config.json or an exported folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqmq_trt.errors import HqmqError


@dataclass(frozen=True)
class CacheShape:
    """Attention layers that cache K and V, KV heads and elements of a head."""

    layers: int
    kv_heads: int
    head_dim: int

    @property
    def elements_per_token(self) -> int:
        """Elements of K and V that one token adds to the cache."""
        return 2 * self.layers * self.kv_heads * self.head_dim


KNOWN_MODELS = {
    "gemma-3-270m": CacheShape(18, 1, 256),
    "gpt-oss-20b": CacheShape(24, 8, 64),
    "llama-3-8b": CacheShape(32, 8, 128),
    "llama-3-70b": CacheShape(80, 8, 128),
    "llama-3.1-405b": CacheShape(126, 8, 128),
    "mistral-7b": CacheShape(32, 8, 128),
    "qwen2.5-0.5b": CacheShape(24, 2, 64),
    "qwen2.5-1.5b": CacheShape(28, 2, 128),
    "qwen2.5-7b": CacheShape(28, 4, 128),
    "qwen2.5-72b": CacheShape(80, 8, 128),
    "qwen3-8b": CacheShape(36, 8, 128),
    "smollm2-135m": CacheShape(30, 3, 64),
    "smollm2-1.7b": CacheShape(24, 32, 64),
}
"""Published shapes, from each model's config.json."""


def cache_shape(model: str) -> CacheShape:
    """Shape of a known model (by name), a folder with a config.json, or a config.json.

    Raises:
        HqmqError: neither a known name nor a readable configuration.
    """
    if model.lower() in KNOWN_MODELS:
        return KNOWN_MODELS[model.lower()]
    path = Path(model)
    path = path / "config.json" if path.is_dir() else path
    if not path.is_file():
        raise HqmqError(
            f"unknown model '{model}': give a folder, a config.json, --layers with --kv-heads and --head-dim, "
            f"or one of {', '.join(KNOWN_MODELS)}"
        )
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise HqmqError(f"{path} is not JSON: {error}") from None
    return _from_config(config, path)


def _from_config(config: Any, path: Path) -> CacheShape:
    if isinstance(config, dict):
        config = config.get("text_config", config)
    try:
        layers = config.get("num_hidden_layers") or config["n_layer"]
        heads = config.get("num_attention_heads") or config["n_head"]
        width = config.get("hidden_size") or config.get("n_embd")
        shape = CacheShape(
            int(layers),
            int(config.get("num_key_value_heads") or heads),
            int(config.get("head_dim") or width // heads),
        )
    except (AttributeError, KeyError, TypeError, ValueError):
        raise HqmqError(
            f"{path} does not state num_hidden_layers, num_attention_heads and hidden_size; "
            "give --layers, --kv-heads and --head-dim instead"
        ) from None
    if min(shape.layers, shape.kv_heads, shape.head_dim) < 1:
        raise HqmqError(f"{path}: layers, KV heads and head_dim must be positive, got {shape}")
    return shape
