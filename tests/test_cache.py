"""HqmqCache under transformers: generate(), both modes, on tiny random models."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from hqmq_trt import hf_attention
from hqmq_trt.cache import HqmqCache
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import cache_bytes
from hqmq_trt.scheme import Scheme
from tests.cache_cases import EVERY_MODEL, PAGE, SCHEME, generate, left_pad, mean_kl, model_of, prompt, run


@pytest.fixture(autouse=True)
def _no_grad() -> Iterator[None]:
    with torch.no_grad():
        yield


@EVERY_MODEL
def test_scheme_fp16_gives_the_models_own_logits(name: str) -> None:
    (ids,) = prompt(50)
    model = model_of(name)
    expected = model(ids, past_key_values=transformers.DynamicCache()).logits
    qdq = run(model, ids, HqmqCache(model.config, "fp16@p16"), [30, 1, 1, 18])
    cache = HqmqCache.for_model(model, "fp16@p16")
    fused = run(model, ids, cache, [30, 1, 1, 18])
    torch.testing.assert_close(qdq, expected, rtol=1e-3, atol=2e-3)
    torch.testing.assert_close(fused, expected, rtol=1e-3, atol=2e-3)
    assert cache.lengths is not None
    assert cache.lengths.tolist() == [50]
    assert cache.get_seq_length() == 50


@EVERY_MODEL
@pytest.mark.parametrize("scheme", [SCHEME, "hq5@p16"])  # without and with exact first tokens
def test_fused_logits_do_not_depend_on_how_tokens_arrive(name: str, scheme: str) -> None:
    (ids,) = prompt(90)
    model = model_of(name)
    whole = run(model, ids, HqmqCache.for_model(model, scheme), [90])
    for pieces in ([33, 1, 40, 16], [2, 1, 2, 60, 25], [1] * 90):
        other = run(model, ids, HqmqCache(model.config, scheme), pieces)
        assert mean_kl(other, whole) < 1e-5
    exact = model_of(name)(ids, past_key_values=transformers.DynamicCache()).logits
    assert 1e-9 < mean_kl(whole, exact) < 0.05  # the scheme is lossy, and only a little


@EVERY_MODEL
def test_left_padded_batch_equals_single_runs(name: str) -> None:
    model = model_of(name)
    prompts = prompt(37, 5, 21)
    cache = HqmqCache.for_model(model, SCHEME)
    batch = generate(model, cache, left_pad(prompts))
    assert cache.lengths is not None
    assert cache.lengths.tolist() == [37 + 11, 5 + 11, 21 + 11]
    for b, ids in enumerate(prompts):
        mask = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        single = generate(model, HqmqCache.for_model(model, SCHEME), mask)
        assert torch.equal(single.sequences[0, ids.shape[1] :], batch.sequences[b, 37:])
        for one, many in zip(single.logits, batch.logits, strict=True):
            torch.testing.assert_close(many[b], one[0], rtol=1e-3, atol=1e-3)


def test_padding_may_hold_anything() -> None:
    model = model_of("llama")
    inputs = left_pad(prompt(30, 9))
    first = generate(model, HqmqCache.for_model(model, SCHEME), inputs)
    inputs["input_ids"] = torch.where(inputs["attention_mask"] == 0, 55, inputs["input_ids"])
    second = generate(model, HqmqCache.for_model(model, SCHEME), inputs)
    for a, b in zip(first.logits, second.logits, strict=True):
        assert torch.equal(a, b)


def test_right_padded_call_and_what_follows() -> None:
    model = model_of("llama")
    long, short = prompt(20, 8)
    rest = torch.cat(prompt(3, 3, seed=1))
    ids = torch.cat([long, torch.nn.functional.pad(short, (0, 12), value=4)])
    mask = torch.cat([torch.ones_like(long), torch.nn.functional.pad(torch.ones_like(short), (0, 12))])
    positions = torch.arange(20).expand(2, 20)
    cache = HqmqCache.for_model(model, SCHEME)
    model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
    mask = torch.cat([mask, torch.ones_like(rest)], 1)
    after = torch.tensor([[20], [8]]) + torch.arange(3)
    y = model(rest, attention_mask=mask, position_ids=after, past_key_values=cache).logits
    alone = run(model, torch.cat([short, rest[1:]], 1), HqmqCache.for_model(model, SCHEME), [11])
    torch.testing.assert_close(y[1], alone[0, 8:], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_generate_samples_reproducibly(fused: bool, dtype: torch.dtype) -> None:
    model = model_of("llama", "sdpa", dtype)
    (ids,) = prompt(40)
    runs = []
    for _ in range(2):
        cache = HqmqCache.for_model(model, SCHEME) if fused else HqmqCache(model.config, SCHEME)
        torch.manual_seed(3)
        runs.append(generate(model, cache, {"input_ids": ids}, 30, do_sample=True, top_k=10).sequences)
        assert cache.get_seq_length() == 69
    assert torch.equal(runs[0], runs[1])
    assert runs[0].shape == (1, 70)


def test_beam_search_follows_its_beams() -> None:
    model = model_of("llama")
    (ids,) = prompt(25)
    expected = generate(model, transformers.DynamicCache(), {"input_ids": ids}, num_beams=3)
    for cache in (HqmqCache(model.config, "fp16@p8"), HqmqCache.for_model(model, "fp16@p8")):
        assert torch.equal(generate(model, cache, {"input_ids": ids}, num_beams=3).sequences, expected.sequences)


def test_a_second_turn_continues_the_cache() -> None:
    model = model_of("llama")
    (ids,) = prompt(25)
    cache = HqmqCache.for_model(model, SCHEME)
    first = generate(model, cache, {"input_ids": ids}).sequences
    talk = torch.cat([first, *prompt(9, seed=4)], 1)
    second = generate(model, cache, {"input_ids": talk})
    fresh = generate(model, HqmqCache.for_model(model, SCHEME), {"input_ids": talk})
    assert torch.equal(second.sequences, fresh.sequences)
    assert mean_kl(torch.stack(second.logits), torch.stack(fresh.logits)) < 1e-5


class _Watch(transformers.LogitsProcessor):
    """Looks, at each step, for new float tensors as large as one layer's K of the whole sequence."""

    def __init__(self, limit: int) -> None:
        self.limit, self.steps = limit, 0
        self.found: list[tuple[int, ...]] = []
        self.before = self._large()

    def _large(self) -> dict[int, Tensor]:
        gc.collect()
        tensors = (thing for thing in gc.get_objects() if issubclass(type(thing), Tensor))
        return {id(t): t for t in tensors if t.is_floating_point() and t.untyped_storage().nbytes() >= 2 * self.limit}

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        self.steps += 1
        self.found += [tuple(t.shape) for key, t in self._large().items() if key not in self.before]
        return scores


@pytest.mark.parametrize("fused", [True, False])
def test_no_float_copy_of_the_cache_is_kept(fused: bool) -> None:
    model = model_of("llama", "sdpa")
    (ids,) = prompt(600)
    limit = 2 * 600 * 16  # heads * tokens * head_dim
    options: dict[str, Any] = {"max_length": 608}
    cache = HqmqCache.for_model(model, SCHEME, **options) if fused else HqmqCache(model.config, SCHEME, **options)
    watch = _Watch(limit)
    generate(model, cache, {"input_ids": ids}, 4, output_logits=False, logits_processor=[watch])
    assert watch.steps == 4
    assert watch.found == []
    # The control: the model's own cache is found.
    control = _Watch(limit)
    model.set_attn_implementation("sdpa")
    dynamic = transformers.DynamicCache()
    generate(model, dynamic, {"input_ids": ids}, 1, output_logits=False, logits_processor=[control])
    assert control.found
    assert cache.nbytes() == cache_bytes(Scheme.parse(SCHEME), 2, 2, 16, 608)


def test_a_growing_cache_takes_a_quarter_more_at_most() -> None:
    model = model_of("llama")
    cache = HqmqCache.for_model(model, SCHEME)
    (ids,) = prompt(200)
    moves, last = 0, 0
    for first in range(0, 200, 2):
        model(ids[:, first : first + 2], past_key_values=cache)
        layer = cache.layers[0]
        moves += layer.capacity != last
        last = layer.capacity
        assert first + 2 <= last <= max(1.25 * (first + 2) + PAGE, PAGE)
    assert moves < 12
    assert cache.nbytes() == cache_bytes(Scheme.parse(SCHEME), 2, 2, 16, last)


def test_max_length_is_kept() -> None:
    model = model_of("llama")
    (ids,) = prompt(50)
    cache = HqmqCache.for_model(model, SCHEME, max_length=50)
    run(model, ids, cache, [49, 1])
    with pytest.raises(HqmqError, match="max_length=51"):
        model(ids[:, :1], past_key_values=cache)


def test_reset_forgets() -> None:
    model = model_of("llama")
    one, two = prompt(40, 30)
    for scheme in (SCHEME, "hq4@p16"):
        cache = HqmqCache.for_model(model, scheme)
        run(model, one, cache, [40])
        cache.reset()
        assert cache.get_seq_length() == 0
        again = run(model, two, cache, [2, 1, 27])
        assert torch.equal(again, run(model, two, HqmqCache.for_model(model, scheme), [2, 1, 27]))


def test_batch_operations_move_whole_sequences() -> None:
    model = model_of("llama")
    ids = torch.cat(prompt(40, 40, 40))
    (rest,) = prompt(5, seed=9)

    def after(change: Callable[[HqmqCache], None], order: list[int]) -> None:
        cache = HqmqCache.for_model(model, SCHEME)
        model(ids, past_key_values=cache)
        change(cache)
        y = model(rest.expand(len(order), 5), past_key_values=cache).logits
        fresh = HqmqCache.for_model(model, SCHEME)
        expected = run(model, torch.cat([ids[order], rest.expand(len(order), 5)], 1), fresh, [40, 5])[:, 40:]
        torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)

    after(lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0])
    after(lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2])
    after(lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1])
    after(lambda cache: cache.batch_select_indices(torch.tensor([True, False, True])), [0, 2])


def test_crop_returns_to_a_page_that_is_still_exact() -> None:
    model = model_of("llama")
    (ids,) = prompt(60)
    other = torch.cat([ids[:, :37], *prompt(20, seed=5)], 1)
    cache = HqmqCache.for_model(model, SCHEME)
    run(model, ids[:, :45], cache, [45])
    cache.crop(-8)  # 37: page 2 (32…47) is open, its tokens are in the tail
    y = run(model, other[:, 37:], cache, [20])
    expected = run(model, other, HqmqCache.for_model(model, SCHEME), [57])
    torch.testing.assert_close(y, expected[:, 37:], rtol=1e-4, atol=1e-4)
    with pytest.raises(HqmqError, match="already coded"):
        cache.crop(-27)  # 30: page 1 is coded, and the tail has moved on
    cache.crop(-9)  # 48, a page boundary
    with pytest.raises(HqmqError, match="already coded"):
        cache.crop(-3)  # 45 lies in page 2, whose tail rows page 3 has overwritten
    with pytest.raises(HqmqError, match="holds only"):
        cache.crop(-49)
    with pytest.raises(HqmqError, match="minus"):
        cache.crop(5)
    assert cache.get_seq_length() == 48


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize(("held", "kept"), [(10, 2), (16, 3), (50, 0), (3, 1)])
def test_crop_into_the_first_tokens_and_growing_again(fused: bool, held: int, kept: int) -> None:
    """The first tokens stay exact (sink_tokens): those that come after a crop, not those that went."""
    model = model_of("llama", "sdpa")

    def new_cache() -> HqmqCache:
        return HqmqCache.for_model(model, "hq4@p16") if fused else HqmqCache(model.config, "hq4@p16")

    (ids,) = prompt(held)
    other = torch.cat([ids[:, :kept], *prompt(60, seed=5)], 1)
    cache, fresh = new_cache(), new_cache()
    run(model, ids, cache, [held])
    cache.crop(kept - held)
    assert cache.get_seq_length() == kept
    if kept:
        run(model, other[:, :kept], fresh, [kept])
    pieces = [1, 1, 3, 20, 1, 34]
    torch.testing.assert_close(
        run(model, other[:, kept:], cache, pieces), run(model, other[:, kept:], fresh, pieces), rtol=1e-4, atol=1e-4
    )
    for ours, theirs in zip(cache.layers, fresh.layers, strict=True):
        for role in ("key", "value"):
            ours_tail, theirs_tail = (layer.role_tensors(role)[-1].float() for layer in (ours, theirs))
            assert ours_tail.shape[2] == 16 + 4
            torch.testing.assert_close(ours_tail[:, :, 16:], theirs_tail[:, :, 16:], rtol=1e-3, atol=1e-3)


def test_dropped_outliers_are_counted() -> None:
    model = model_of("llama")
    cache = HqmqCache.for_model(model, "paper:s24_r3+med3@p8")
    (ids,) = prompt(40)
    assert cache.dropped_outliers() == 0
    run(model, ids, cache, [40])
    assert cache.dropped_outliers() == 0
    layer = cache.layers[0]
    k = torch.full((1, 2, 8, 16), 0.1)
    k[:, :, :3] = 50.0  # 12 outliers a head, 4 slots
    layer.attend(torch.zeros(1, 4, 8, 16), k, k, None, hf_attention.AttentionParameters(1.0, 0, 0.0, None))
    assert cache.dropped_outliers() == 2 * 2 * 8
