"""What attention hqmq and HqmqCache refuse, and how masks are recognised."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import masking_utils

from hqmq_trt import hf_attention
from hqmq_trt.cache import HqmqCache, HqmqLayer
from hqmq_trt.errors import HqmqError
from tests.cache_cases import SCHEME, SIZES, model_of, prompt


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def test_attention_hqmq_wants_an_hqmq_cache() -> None:
    model = model_of("llama", "hqmq")
    (ids,) = prompt(5)
    for cache in (None, transformers.DynamicCache()):
        with pytest.raises(HqmqError, match="HqmqCache"):
            model(ids, past_key_values=cache, use_cache=cache is not None)
    with pytest.raises(HqmqError, match=r"padding mask|sdpa"):
        model(ids, attention_mask=torch.zeros(1, 1, 5, 5), past_key_values=HqmqCache.for_model(model, SCHEME))
    gap = torch.tensor([[1, 1, 0, 1, 1]])
    with pytest.raises(HqmqError, match="gaps"):
        model(ids, attention_mask=gap, past_key_values=HqmqCache.for_model(model, SCHEME))
    with pytest.raises(HqmqError, match="covers 3 tokens"):
        model(ids, attention_mask=gap[:, :3], past_key_values=HqmqCache.for_model(model, SCHEME))


def test_nan_in_a_model_is_reported_and_the_cache_says_it_is_stale() -> None:
    model = model_of("llama")
    (ids,) = prompt(5)
    cache = HqmqCache.for_model(model, SCHEME)
    embeds = model.get_input_embeddings()(ids)
    embeds[0, 2, 3] = float("nan")
    with pytest.raises(HqmqError, match=r"^k.*NaN"):
        model(inputs_embeds=embeds, past_key_values=cache)
    with pytest.raises(HqmqError, match="reset"):
        model(ids, past_key_values=cache)
    cache.reset()
    assert model(ids, past_key_values=cache).logits.isfinite().all()


@pytest.mark.parametrize(
    ("match", "scheme", "change"),
    [
        ("unknown scheme", "hq9", {}),
        ("power of two", "hq4", {"head_dim": 24}),
        ("not divisible by 4", "paper:s8_r3", {"head_dim": 6}),
        ("linear_attention", "hq4", {"layer_types": ["linear_attention", "full_attention"]}),
        ("encoder-decoder", "hq4", {"is_encoder_decoder": True}),
    ],
)
def test_models_and_schemes_it_cannot_serve(match: str, scheme: str, change: dict[str, Any]) -> None:
    config = transformers.LlamaConfig(**SIZES)
    for name, value in change.items():
        object.__setattr__(config, name, value)
    with pytest.raises(HqmqError, match=match):
        HqmqCache(config, scheme)


def test_masks_are_recognised_by_what_they_hide() -> None:
    def mask(function: Callable[..., Any], q: int, kv: int) -> Tensor:
        return hf_attention.hqmq_mask(1, q, kv, q_offset=kv - q, mask_function=function)

    assert mask(masking_utils.causal_mask_function, 50, 70).shape == (1, 70)
    window = masking_utils.sliding_window_causal_mask_function(8)
    assert getattr(mask(window, 50, 70), "_hqmq_window") == 8  # noqa: B009
    assert getattr(mask(window, 5, 7), "_hqmq_window") == 0  # noqa: B009 (nothing is out of the window yet)
    chunked = masking_utils.chunked_causal_mask_function(8, torch.zeros(1, dtype=torch.long))
    for function in (chunked, masking_utils.bidirectional_mask_function):
        with pytest.raises(HqmqError, match="neither causal nor a sliding window"):
            mask(function, 50, 70)


def test_a_window_the_layer_does_not_pass_is_noticed() -> None:
    model = model_of("mistral")
    (ids,) = prompt(40)
    cache = HqmqCache.for_model(model, SCHEME)
    mask = hf_attention.hqmq_mask(1, 40, 40, mask_function=masking_utils.causal_mask_function)
    layer = cache.layers[0]
    assert isinstance(layer, HqmqLayer)
    k = torch.randn(1, 2, 40, 16)
    keys, values = layer.update(k, k)
    with pytest.raises(HqmqError, match="sliding_window=20"):
        hf_attention.hqmq_attention(
            torch.nn.Module(), torch.randn(1, 4, 40, 16), keys, values, mask, 0.25, sliding_window=20
        )
    assert ids.shape == (1, 40)
