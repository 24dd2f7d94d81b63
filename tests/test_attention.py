"""Native HqmqAttention and HqmqDequantize against the oracle, and the promises of page-causal attention."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from hqmq_trt import native, native_attention, oracle
from hqmq_trt.errors import HqmqError
from tests.attention_cases import CASES, Attention, assert_same_caches, bits, relative_error
from tests.codec_cases import lengths

ROOT = Path(__file__).parent.parent
TOLERANCE = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}


def attend(
    case: Attention,
    inputs: tuple[Tensor, Tensor, Tensor],
    past: Tensor,
    new: Tensor,
    caches: list[list[Tensor]],
    sinks: Tensor | None = None,
    **options: Any,
) -> Tensor:
    scale = case.head_dim**-0.5
    return native_attention.attend(*inputs, past, new, sinks, case.scheme, case.books, caches, scale, **options)


def check(case: Attention, tokens: int, new: tuple[int, ...], sinks: Tensor | None = None, **options: Any) -> Tensor:
    """Native output and caches equal the oracle's; returns the output."""
    inputs, added, caches = case.inputs(tokens), lengths(*new), case.clone()
    y = attend(case, inputs, lengths(*case.past), added, caches, sinks, **options)
    want, present = case.oracle(*inputs, added, case.head_dim**-0.5, sinks=sinks, **options)
    assert y.dtype == case.dtype
    assert relative_error(y, want) < TOLERANCE[case.dtype]
    for b, count in enumerate(new):
        assert not y[b, :, count:].any()
    assert_same_caches(caches, present)
    return y


@pytest.mark.parametrize(("name", "head_dim", "heads", "group"), CASES)
def test_matches_the_oracle(name: str, head_dim: int, heads: int, group: int) -> None:
    check(Attention(name, head_dim, heads, group, (0, 37, 150)), 70, (70, 3, 45))


@pytest.mark.parametrize("count", [1, 63, 64, 65, 200])
def test_prompt_lengths(count: int) -> None:
    check(Attention("hq4", 64, 1, 2, (0,)), count, (count,))
    check(Attention("hq3", 64, 1, 1, (count,)), 1, (1,))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["hq4", "fp16"])
def test_sixteen_bit_activations(name: str, dtype: torch.dtype) -> None:
    check(Attention(name, 64, 2, 2, (100, 0), dtype=dtype), 40, (40, 17))


@pytest.mark.parametrize("window", [1, 20, 64, 100])
@pytest.mark.parametrize("name", ["hq4@p16", "paper:s24_r3+med3@p128"])
def test_sliding_window(name: str, window: int) -> None:
    check(Attention(name, 64, 1, 2, (150, 0)), 40, (40, 9), window=window)


def test_window_hides_whole_splits() -> None:
    case = Attention("hq3", 64, 1, 1, (2500,), capacity=2560)
    wide = check(case, 2, (2,), window=64)
    assert not torch.equal(wide, check(case, 2, (2,), window=65))


def test_softcap_and_sinks() -> None:
    case = Attention("hq4@p32", 64, 2, 3, (90, 5))
    sinks = torch.randn(6, generator=torch.Generator().manual_seed(1)) * 3
    plain = check(case, 12, (12, 12))
    capped = check(case, 12, (12, 12), softcap=5.0)
    sunk = check(case, 12, (12, 12), sinks=sinks)
    check(case, 12, (12, 12), sinks=sinks, softcap=5.0, window=30)
    assert not torch.allclose(plain, capped)
    assert not torch.allclose(plain, sunk)


@pytest.mark.parametrize("name", ["hq4", "fp16", "paper:s96_r4+med3"])
def test_one_query_sees_every_cached_token(name: str) -> None:
    """Changing any one cached V changes the output of a single query (the classic bug sees key 0 only)."""
    case = Attention(name, 64, 1, 1, (130,))
    _, k, v = case.inputs(130, seed=1000)
    new = case.inputs(1)
    seen = attend(case, new, lengths(130), lengths(1), case.clone())
    for token in (0, 1, 63, 64, 100, 127, 128, 129):
        other = Attention(name, 64, 1, 1, (0,))
        changed = v.clone()
        changed[:, :, token] += 10
        attend(other, (k, k, changed), lengths(0), lengths(130), other.caches)
        assert not torch.equal(seen, attend(other, new, lengths(130), lengths(1), other.caches)), token


def test_scores_of_keys_far_apart() -> None:
    """A query equal to one old key finds its value through the codes."""
    case = Attention("hq5", 128, 1, 1, (0,), capacity=1024)
    q, k, v = case.inputs(1000)
    attend(case, (q, k, v), lengths(0), lengths(1000), case.caches)
    query = (12 * (k[:, :, 321:322] - k.mean(2, keepdim=True))).clone()
    y = attend(case, (query, k[:, :, :1], v[:, :, :1]), lengths(1000), lengths(1), case.caches)
    assert relative_error(y[0, 0, 0], v[0, 0, 321]) < 0.1


@pytest.mark.parametrize("name", ["hq4@p16", "hq3", "paper:s96_r4+med3@p32", "fp16@p16"])
def test_chunked_prefill_in_any_split(name: str) -> None:
    """One prefill, random chunks, token by token: the same bytes in the cache and the same bits out."""
    count = 150
    whole = Attention(name, 64, 2, 2, (0,))
    inputs = whole.inputs(count)
    want = attend(whole, inputs, lengths(0), lengths(count), whole.caches)
    for seed in range(4):
        part = Attention(name, 64, 2, 2, (0,))
        rng, start, out = random.Random(seed), 0, []
        while start < count:
            step = 1 if seed == 0 else min(rng.choice((1, 2, 15, 16, 17, 40, 64, 90)), count - start)
            rows = tuple(x[:, :, start : start + step] for x in inputs)
            out.append(attend(part, rows, lengths(start), lengths(step), part.caches))  # type: ignore[arg-type]
            start += step
        assert_same_caches(part.caches, whole.caches)
        assert torch.equal(torch.cat(out, 2), want)


@pytest.mark.parametrize("tokens", [1, 30])
def test_batch_invariance(tokens: int) -> None:
    """A sequence's bits do not depend on what shares its batch, on padding, or on the number of threads."""
    past, new = (130, 0, 77, 64), (tokens, 0, 1, tokens)
    case = Attention("hq4", 64, 2, 2, past)
    inputs, caches = case.inputs(tokens), case.clone()
    y = attend(case, inputs, lengths(*past), lengths(*new), caches)
    assert not y[1].any()
    assert_same_caches([[t[1:2] for t in c] for c in caches], [[t[1:2] for t in c] for c in case.caches])
    threads = native.num_threads()
    for b in (0, 2, 3):
        alone = [[t[b : b + 1].clone() for t in cache] for cache in case.caches]
        rows = tuple(x[b : b + 1, :, : new[b]] for x in inputs)
        native.set_num_threads(1)
        try:
            out = attend(case, rows, lengths(past[b]), lengths(new[b]), alone)  # type: ignore[arg-type]
        finally:
            native.set_num_threads(threads)
        assert torch.equal(out, y[b : b + 1, :, : new[b]])
        assert_same_caches(alone, [[t[b : b + 1] for t in cache] for cache in caches])


def test_strided_inputs() -> None:
    case = Attention("hq4", 64, 2, 2, (70,))
    inputs = case.inputs(5)
    strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    a = attend(case, inputs, lengths(70), lengths(5), case.clone())
    assert torch.equal(a, attend(case, strided, lengths(70), lengths(5), case.clone()))  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "head_dim", "heads", "group"), CASES)
def test_dequantize_equals_the_oracle(name: str, head_dim: int, heads: int, group: int) -> None:
    case = Attention(name, head_dim, heads, group, (0, 37, 200))
    length = lengths(*case.past)
    none = [torch.zeros(heads, 0, 4), torch.zeros(0)]
    for role, book, cache, names in zip(
        (case.scheme.key, case.scheme.value), case.books, case.caches, case.empty(), strict=True
    ):
        want = oracle.dequantize(dict(zip(names, cache, strict=True)), length, role, *(book or none))
        for dtype in (torch.float32, torch.float16, torch.bfloat16):
            assert torch.equal(bits(native_attention.load(length, role, book, cache, dtype)), bits(want.to(dtype)))


BASELINE = """
from hqmq_trt import native
from tests.test_attention import Attention, check
assert native.versions()["isa"] == "baseline"
for name, head_dim in (("hq3", 64), ("hq4", 128), ("fp16", 64), ("paper:s96_r4+med3@p32", 80)):
    check(Attention(name, head_dim, 2, 2, (0, 37)), 70, (70, 45), softcap=20.0)
"""


def test_baseline_instruction_set_agrees() -> None:
    """In a process that may not use AVX2."""
    env = {**os.environ, "HQMQ_ISA": "baseline"}
    done = subprocess.run([sys.executable, "-c", BASELINE], env=env, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_errors_leave_the_caches_alone() -> None:
    case = Attention("hq4", 64, 2, 2, (200,))
    q, k, v = case.inputs(100)
    before = case.clone()
    with pytest.raises(HqmqError, match="too small"):
        attend(case, (q, k, v), lengths(200), lengths(100), case.caches)
    for name, broken in (("k", (q, k.clone(), v)), ("v", (q, k, v.clone()))):
        broken["qkv".index(name)][0, 1, 7, 3] = float("nan")
        with pytest.raises(HqmqError, match=f"{name} holds NaN"):
            attend(case, broken, lengths(200), lengths(10), case.caches)
    with pytest.raises(HqmqError, match="softcap"):
        attend(case, (q, k, v), lengths(200), lengths(10), case.caches, softcap=-1.0)
    with pytest.raises(HqmqError, match="window"):
        attend(case, (q, k, v), lengths(200), lengths(10), case.caches, window=-1)
    with pytest.raises(HqmqError, match="does not fit"):
        attend(case, (q[:, :3], k, v), lengths(200), lengths(10), case.caches)
    with pytest.raises(HqmqError, match="outside the cache"):
        native_attention.load(lengths(257), case.scheme.key, case.books[0], case.caches[0], torch.float32)
    assert_same_caches(before, case.caches)


def test_table_follows_a_codebook_changed_in_place() -> None:
    case = Attention("hq4", 64, 1, 1, (100,))
    load = lambda: native_attention.load(lengths(100), case.scheme.key, case.books[0], case.caches[0], torch.float32)  # noqa: E731
    before = load()
    case.books[0][0].neg_()
    assert not torch.equal(before, load())
