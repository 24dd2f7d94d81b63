"""BaselineCache: page-causal attention against plain loops, and tiny random models in both modes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hqmq_trt.cache import HqmqCache
from hqmq_trt.errors import HqmqError
from hqmq_trt.eval import baseline_cache
from hqmq_trt.eval.baseline_cache import BaselineCache, BaselineLayer
from hqmq_trt.eval.baselines import Baseline, Field, parse_baseline
from hqmq_trt.hf_attention import AttentionParameters
from tests.cache_cases import EVERY_MODEL, generate, left_pad, mean_kl, model_of, prompt, run

PAGE = 16
LOSSY = parse_baseline("kivi-4:k16v8@p16")
COARSE = parse_baseline("kivi-2:k8v16@p8")


class Exact(Baseline):
    """Stores float16: what is left is the cache itself."""

    def _encode(self, pages: Tensor, role: str) -> list[Field]:
        return [Field("values", pages.half(), 16)]

    def _decode(self, stored: dict[str, Tensor], role: str) -> Tensor:
        return stored["values"].float()


EXACT = Exact("exact", "float16", "this test", PAGE)


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


def make_layer(baseline: Baseline, mode: str = "fused") -> BaselineLayer:
    name = baseline_cache.IMPLEMENTATION if mode == "fused" else "sdpa"
    return BaselineLayer(baseline, 0, mode, lambda: name)


def parameters(window: int = 0, softcap: float = 0.0, sinks: Tensor | None = None) -> AttentionParameters:
    return AttentionParameters(scale=0.3, window=window, softcap=softcap, sinks=sinks)


def loop(q: Tensor, k: Tensor, v: Tensor, baseline: Baseline, options: AttentionParameters) -> Tensor:
    """One sequence, key by key: q [Hq, T, D], k, v [H, T, D] from position 0."""
    page, group = baseline.page_size, q.shape[0] // k.shape[0]
    exact = {"key": k.half().float(), "value": v.half().float()}
    out = torch.zeros(*q.shape[:2], v.shape[2])
    for h in range(q.shape[0]):
        for t in range(q.shape[1]):
            logits, values = [], []
            for j in range(max(t - options.window + 1, 0) if options.window else 0, t + 1):
                start = j // page * page
                if j // page == t // page:
                    key, value = (exact[role][h // group, j] for role in ("key", "value"))
                else:
                    key, value = (
                        baseline.decode(baseline.encode(exact[role][h // group, start : start + page], role), role)[
                            j - start
                        ]
                        for role in ("key", "value")
                    )
                logit = float(q[h, t] @ key) * options.scale
                logits.append(options.softcap * math.tanh(logit / options.softcap) if options.softcap else logit)
                values.append(value)
            weight = [math.exp(x) for x in logits]
            total = sum(weight) + (math.exp(float(options.sinks[h])) if options.sinks is not None else 0)
            out[h, t] = sum(w / total * x for w, x in zip(weight, values, strict=True))
    return out


def random_qkv(batch: int, rows: int) -> tuple[Tensor, Tensor, Tensor]:
    gen = torch.Generator().manual_seed(3)
    q, k, v = (torch.randn(batch, heads, rows, 16, generator=gen) for heads in (4, 2, 2))
    return q, k + 2, v


@pytest.mark.parametrize(
    "options",
    [
        parameters(),
        parameters(window=11),
        parameters(window=3),
        parameters(softcap=2.0),
        parameters(window=9, sinks=torch.tensor([-1.0, 0.5, 2.0, 0.0])),
    ],
    ids=["causal", "window", "short-window", "softcap", "sinks"],
)
@pytest.mark.parametrize("pieces", [[29], [5, 14, 10], [20] + [1] * 9])
def test_page_causal_attention_equals_a_loop(
    options: AttentionParameters, pieces: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baseline_cache, "_QUERY_ROWS", 7)
    q, k, v = random_qkv(2, 29)
    layer, out = make_layer(COARSE), []
    for part in zip(*(x.split(pieces, 2) for x in (q, k, v)), strict=True):
        keys, values = layer.update(*part[1:])
        out.append(layer.attend(part[0], keys, values, None, options))
    expected = torch.stack([loop(q[b], k[b], v[b], COARSE, options) for b in range(2)])
    torch.testing.assert_close(torch.cat(out, 2), expected, rtol=1e-5, atol=1e-5)


def test_sequences_of_a_batch_advance_on_their_own() -> None:
    q, k, v = random_qkv(2, 29)
    layer = make_layer(COARSE)
    keys, values = layer.update(k, v)
    out = layer.attend(q, keys, values, torch.tensor([29, 13]), parameters())
    assert layer.length is not None
    assert layer.length.tolist() == [29, 13]
    assert layer.get_seq_length() == 29
    torch.testing.assert_close(out[1, :, :13], loop(q[1, :, :13], k[1, :, :13], v[1, :, :13], COARSE, parameters()))
    assert not out[1, :, 13:].any()
    torch.testing.assert_close(out[0], loop(q[0], k[0], v[0], COARSE, parameters()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["int3+med3@p8", "kivi-2:k8v16@p8", "turbo-3+mean@p8", "fp8@p8"])
def test_codes_do_not_depend_on_how_tokens_arrive(name: str) -> None:
    baseline, (_, k, v) = parse_baseline(name), random_qkv(2, 45)
    dense = []
    for pieces in ([45], [1] * 45, [7, 30, 8]):
        layer = make_layer(baseline, "qdq")
        for part in zip(k.split(pieces, 2), v.split(pieces, 2), strict=True):
            keys, values = layer.update(*part)
        dense.append((keys, values))
    for keys, values in dense[1:]:
        assert torch.equal(keys, dense[0][0])
        assert torch.equal(values, dense[0][1])
    half = k.half().float()
    assert torch.equal(dense[0][0][:, :, 40:], half[:, :, 40:])
    for page in range(0, 40, 8):
        rows = slice(page, page + 8)
        alone = baseline.decode(baseline.encode(half[:, :, rows], "key"), "key")
        assert torch.equal(dense[0][0][:, :, rows], alone)


@EVERY_MODEL
def test_exact_baseline_gives_the_models_own_logits(name: str) -> None:
    (ids,) = prompt(50)
    model = model_of(name)
    own = model(ids, past_key_values=transformers.DynamicCache()).logits
    packed = run(model, ids, HqmqCache(model.config, "fp16@p16"), [50])  # K and V rounded to float16 there too
    cache = BaselineCache.for_model(model, EXACT, "qdq")
    qdq = run(model, ids, cache, [30, 1, 1, 18])
    fused, whole, steps = (
        run(model, ids, BaselineCache.for_model(model, EXACT), pieces) for pieces in ([30, 1, 1, 18], [50], [1] * 50)
    )
    assert model.config._attn_implementation == baseline_cache.IMPLEMENTATION
    for logits in (qdq, fused, whole, steps):
        # A last bit of K that rounds to another float16 moves a few rows by some 1e-4.
        assert torch.quantile((logits - packed).abs(), 0.9) < 1e-4
        torch.testing.assert_close(logits, packed, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(logits, own, rtol=1e-3, atol=2e-3)
    assert cache.get_seq_length() == 50
    assert cache.stored_bits() == 16


@EVERY_MODEL
def test_fused_logits_do_not_depend_on_how_tokens_arrive(name: str) -> None:
    (ids,) = prompt(70)
    model = model_of(name)
    whole = run(model, ids, BaselineCache.for_model(model, LOSSY), [70])
    for pieces in ([33, 1, 20, 16], [1] * 70):
        assert mean_kl(run(model, ids, BaselineCache.for_model(model, LOSSY), pieces), whole) < 1e-5
    # Not bit by bit: K of another matrix shape differs in its last bit, which may cross the edge between two codes.
    own = model_of(name)(ids, past_key_values=transformers.DynamicCache()).logits
    assert mean_kl(whole[:, :PAGE], own[:, :PAGE]) < 1e-6  # the first page is read exactly
    assert 1e-6 < mean_kl(whole, own) < 0.2


@pytest.mark.parametrize("name", ["llama", "mistral", "gpt_oss"])
def test_padded_batches_equal_single_runs(name: str) -> None:
    model, prompts = model_of(name), prompt(37, 5, 21)
    batch = generate(model, BaselineCache.for_model(model, LOSSY), left_pad(prompts))
    right = {
        "input_ids": torch.cat([torch.nn.functional.pad(p, (0, 37 - p.shape[1])) for p in prompts]),
        "attention_mask": torch.arange(37) < torch.tensor([[37], [5], [21]]),
    }
    scored = model(**right, past_key_values=BaselineCache.for_model(model, LOSSY)).logits
    for b, ids in enumerate(prompts):
        single = generate(model, BaselineCache.for_model(model, LOSSY), {"input_ids": ids})
        for one, many in zip(single.logits, batch.logits, strict=True):
            torch.testing.assert_close(many[b], one[0], rtol=1e-3, atol=1e-3)
        alone = model(ids, past_key_values=BaselineCache.for_model(model, LOSSY)).logits[0]
        torch.testing.assert_close(scored[b, : ids.shape[1]], alone, rtol=1e-3, atol=1e-3)


def test_qdq_attends_to_decoded_pages_within_the_prompt() -> None:
    (ids,) = prompt(40)
    model = model_of("llama", "sdpa")
    own = model(ids, past_key_values=transformers.DynamicCache()).logits
    qdq = run(model, ids, BaselineCache.for_model(model, LOSSY, "qdq"), [40])
    fused = run(model, ids, BaselineCache.for_model(model, LOSSY), [40])
    assert mean_kl(qdq[:, :PAGE], own[:, :PAGE]) > 1e-6  # its first page is coded before it attends
    assert mean_kl(fused[:, :PAGE], own[:, :PAGE]) < 1e-6
    BaselineCache.for_model(model, LOSSY, "qdq")
    assert model.config._attn_implementation == "sdpa"


def test_bits_and_bytes_are_measured() -> None:
    (ids,) = prompt(40)
    model = model_of("llama")
    cache = BaselineCache.for_model(model, parse_baseline("turbo-4+mean@p16"))
    model(ids[:, :15], past_key_values=cache)
    assert cache.stored_bits() is None
    model(ids[:, 15:], past_key_values=cache)
    key, value = 4 + 16 / 16 + 16 / 16, 4 + 16 / 16
    assert cache.stored_bits() == pytest.approx((key + value) / 2)
    elements = 2 * 2 * 16  # layers, heads, head_dim
    assert cache.nbytes() == {"coded": elements * 32 * (key + value) / 8, "tail": 2 * elements * 8 * 2}
    cache.reset()
    assert cache.stored_bits() is None
    assert cache.nbytes() == {"coded": 0, "tail": 0}
    again = model(ids, past_key_values=cache).logits
    assert torch.equal(again, model(ids, past_key_values=BaselineCache.for_model(model, cache.baseline)).logits)


def test_sequences_can_be_repeated_reordered_and_selected() -> None:
    model = model_of("llama")
    ids = torch.cat(prompt(20, 20))
    cache = BaselineCache.for_model(model, LOSSY)
    model(ids, past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.reorder_cache(torch.tensor([3, 1, 0, 2]))
    cache.batch_select_indices(torch.tensor([True, True, False, False]))  # sequence 1, then sequence 0
    last = torch.tensor([[5], [6]])
    swapped = model(last, past_key_values=cache).logits
    cache = BaselineCache.for_model(model, LOSSY)
    model(ids.flip(0), past_key_values=cache)
    torch.testing.assert_close(swapped, model(last, past_key_values=cache).logits)
    cache = BaselineCache.for_model(model, LOSSY)
    model(ids[:1], past_key_values=cache)
    cache.batch_repeat_interleave(2)
    model(last, past_key_values=cache)  # the two part here
    apart = model(last, past_key_values=cache).logits
    cache = BaselineCache.for_model(model, LOSSY)
    model(torch.cat([ids[:1]] * 2), past_key_values=cache)
    model(last, past_key_values=cache)
    torch.testing.assert_close(apart, model(last, past_key_values=cache).logits)
    beams = generate(model, BaselineCache.for_model(model, LOSSY), {"input_ids": ids[:1]}, num_beams=3, tokens=4)
    assert beams.sequences.shape == (1, 24)


def test_what_it_refuses() -> None:
    (ids,) = prompt(20)
    model = model_of("llama", "sdpa")
    with pytest.raises(HqmqError, match="mode fused over attention 'sdpa'"):
        model(ids, past_key_values=BaselineCache(model.config, LOSSY))
    with pytest.raises(HqmqError, match="head_dim 16"):
        BaselineCache.for_model(model, parse_baseline("q8_0"))
    with pytest.raises(HqmqError, match="neither fused nor qdq"):
        BaselineCache(model.config, LOSSY, "page-causal")
    cache = BaselineCache.for_model(model, LOSSY)
    with pytest.raises(HqmqError, match="mode qdq over attention 'hqmq_baseline'"):
        model(ids, past_key_values=BaselineCache(model.config, LOSSY, "qdq"))
    for other in (None, transformers.DynamicCache(), HqmqCache(model.config, "fp16@p16")):
        with pytest.raises(HqmqError, match="found no BaselineCache"):
            model(ids, past_key_values=other, use_cache=other is not None)
    embeds: Any = model.get_input_embeddings()(ids)
    embeds[0, 2, 3] = float("nan")
    with pytest.raises(HqmqError, match="key holds NaN"):
        model(inputs_embeds=embeds, past_key_values=cache)
    with pytest.raises(HqmqError, match="reset"):
        model(ids, past_key_values=cache)
    cache.reset()
    assert model(ids, past_key_values=cache).logits.isfinite().all()
    with pytest.raises(HqmqError, match="cropped"):
        cache.crop(-1)
    for change, match in (
        ({"layer_types": ["linear_attention", "full_attention"]}, "linear_attention"),
        ({"is_encoder_decoder": True}, "encoder-decoder"),
        ({"head_dim": 20}, "not divisible"),
    ):
        config = transformers.LlamaConfig(num_hidden_layers=2)
        for key, value in change.items():
            object.__setattr__(config, key, value)
        with pytest.raises(HqmqError, match=match):
            BaselineCache(config, LOSSY)
