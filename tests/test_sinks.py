"""The first tokens of a sequence, which stay exact (sink_tokens): around N and P tokens, behind windows, on reuse."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from hqmq_trt import native, oracle
from hqmq_trt.errors import HqmqError
from hqmq_trt.scheme import ROLES, Scheme
from tests.attention_cases import Attention, bits, relative_error
from tests.codec_cases import lengths
from tests.test_ort_ops import attention_model, caches_of, halves
from tests.torch_cases import APPEND, ATTEND, OPS, Case, assert_same_bytes, make, run_native

N = 4
SPLITS = {
    "one by one": [1] * 40,
    "one, two, three": [1, 2, 3, 9, 1, 1, 30],
    "up to N, up to P": [4, 12, 1, 15, 16],
    "across N, across P": [3, 2, 10, 3, 30],
    "at once": [50],
}
EVERY_SPLIT = pytest.mark.parametrize("split", SPLITS.values(), ids=list(SPLITS))
MIXED = ("hq4@p16", "k=hq4,v=paper:s8_r3@p16", "k=paper:s8_r3,v=hq4@p16", "hq:s170_r4+med3@p16")


def steps(split: list[int]) -> list[tuple[Tensor, Tensor]]:
    """(past, new) of two sequences: one grows by the split, the other by a token less where there is one."""
    past, result = lengths(0, 0), []
    for count in split:
        new = lengths(count, max(count - 1, 1) if count != 3 else 0)
        result.append((past, new))
        past = past + new
    return result


def dense(case: Case, role: str, length: Tensor, cache: list[Tensor]) -> Tensor:
    return OPS.dequantize(length, case.books(role), cache, case.scheme.name, role, torch.float32)


@EVERY_SPLIT
@APPEND
@pytest.mark.parametrize("role", ROLES)
def test_any_split_writes_the_oracles_rows(append: Callable[..., None], split: list[int], role: str) -> None:
    case = make("k=hq4,v=hq3.5@p16", 64)
    codec = case.scheme.role(role)
    x = case.x(sum(split), 0)
    cache, expected = case.empty(role), case.named(role, case.empty(role))
    for past, new in steps(split):
        part = torch.zeros(2, case.heads, int(new.max()), 64)
        for b, (first, count) in enumerate(zip(past.tolist(), new.tolist(), strict=True)):
            part[b, :, :count] = x[b, :, first : first + count]
        append(case, role, part, past, new, cache)
        expected = oracle.quantize(part, past, new, codec, *case.oracle_books(role), expected)
        assert_same_bytes(cache, list(expected.values()), codec)
        held, exact = past + new, x.half().float()
        found = dense(case, role, held, cache)
        want = oracle.dequantize(case.named(role, cache), held, codec, *case.oracle_books(role))
        torch.testing.assert_close(found, want, rtol=1e-6, atol=1e-6)
        for b, count in enumerate(held.tolist()):
            assert torch.equal(found[b, :, : min(count, N)], exact[b, :, : min(count, N)])
            assert count < 16 or not torch.equal(found[b, :, N:16], exact[b, :, N:16])


@EVERY_SPLIT
@ATTEND
@pytest.mark.parametrize("name", MIXED)
@pytest.mark.parametrize("window", [0, 20])
def test_attention_in_any_split(name: str, attend: Callable[..., Tensor], split: list[int], window: int) -> None:
    """Against the oracle; the window of 20 has left the first tokens behind at the end."""
    case = make(name, 32)
    q, k, v = case.x(sum(split), 0, 4), case.x(sum(split), 1), case.x(sum(split), 2)
    cache, count = case.both(case.empty), len(case.empty("key"))
    named = (case.named("key", cache[:count]), case.named("value", cache[count:]))
    named = ({n: t.clone() for n, t in named[0].items()}, {n: t.clone() for n, t in named[1].items()})
    books = [case.oracle_books(role) for role in ROLES]
    for past, new in steps(split):
        rows = [torch.zeros(2, x.shape[1], int(new.max()), 32) for x in (q, k, v)]
        for b, (first, added) in enumerate(zip(past.tolist(), new.tolist(), strict=True)):
            for part, x in zip(rows, (q, k, v), strict=True):
                part[b, :, :added] = x[b, :, first : first + added]
        want, named = oracle.attention(
            rows[0], rows[1], rows[2], past, new, case.scheme, (books[0][0], books[1][0]), (books[0][1], books[1][1]),
            named, 0.2, window,
        )  # fmt: skip
        y = attend(case, *rows, past, new, cache, None, 0.2, window, 0.0)
        torch.testing.assert_close(y, want, rtol=2e-4, atol=2e-4)


@EVERY_SPLIT
@pytest.mark.parametrize("name", MIXED)
def test_onnx_runtime_in_any_split(name: str, split: list[int]) -> None:
    """The operator of ONNX Runtime, in place, as a decoder calls it."""
    case = Attention(name, 64, 2, 2, (0,), capacity=64)
    q, k, v = case.inputs(sum(split))
    want, present = case.oracle(q, k, v, lengths(sum(split)), 0.125)
    cache, out = caches_of(case), []
    models = {count: attention_model(case, count, (count,)) for count in set(split)}
    for first, end in pairwise([0, *torch.tensor(split).cumsum(0).tolist()]):
        y = torch.empty(1, 4, end - first, 64)
        rows = {n: x[:, :, first:end].contiguous() for n, x in (("q", q), ("k", k), ("v", v))}
        models[end - first].run_in_place(y, cache, past_length=lengths(first), **rows)
        out.append(y)
    assert relative_error(torch.cat(out, 2), want) < 1e-5
    for ours, theirs in zip(halves(case, list(cache.values())), present, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert torch.equal(bits(a), bits(b))


@ATTEND
@pytest.mark.parametrize(("role", "name"), [("key", MIXED[1]), ("value", MIXED[2]), ("key", MIXED[0])])
@pytest.mark.parametrize("tokens", [1, 20])
def test_rows_of_the_first_tokens_are_read_while_a_window_sees_them(
    attend: Callable[..., Tensor], name: str, role: str, tokens: int
) -> None:
    """Other rows P…P+N-1 change what is seen, from codes or not; a window past them does not look."""
    case = make(name, 32, batch=1)
    cache = case.both(case.empty)
    q, k, v = case.x(40, 0, 4), case.x(40, 1), case.x(40, 2)
    attend(case, q, k, v, lengths(0), lengths(40), cache, None, 0.2, 0, 0.0)
    tail = len(case.empty("key")) - 1 if role == "key" else len(cache) - 1
    part = (case.x(tokens, 3, 4), case.x(tokens, 4), case.x(tokens, 5))

    def outputs(window: int) -> list[Tensor]:
        found = []
        for row in (None, *range(16, 16 + N)):
            held = [tensor.clone() for tensor in cache]
            if row is not None:
                held[tail][:, :, row] += 9
            found.append(attend(case, *part, lengths(40), lengths(tokens), held, None, 0.01, window, 0.0))
        return found

    plain, *changed = outputs(0)
    assert all(not torch.equal(plain, y) for y in changed)
    plain, *changed = outputs(37)  # the query at 40 sees keys 4…40
    assert all(torch.equal(plain, y) for y in changed)


@ATTEND
def test_a_sequence_of_other_tokens_in_the_same_memory(attend: Callable[..., Tensor]) -> None:
    """What an earlier sequence left, its first tokens included, is never seen."""
    case = make("hq4@p16", 32, batch=1)
    used, fresh = case.both(case.empty), case.both(case.empty)
    old = (case.x(60, 10, 4), case.x(60, 11), case.x(60, 12))
    attend(case, *old, lengths(0), lengths(60), used, None, 0.2, 0, 0.0)
    q, k, v = case.x(40, 0, 4), case.x(40, 1), case.x(40, 2)
    first = 0
    for count in (2, 1, 15, 20, 1):  # two tokens: rows P+2 and P+3 are still the old sequence's
        part = [x[:, :, first : first + count] for x in (q, k, v)]
        ours, theirs = (
            attend(case, *part, lengths(first), lengths(count), cache, None, 0.2, 0, 0.0) for cache in (used, fresh)
        )
        assert torch.equal(ours, theirs)
        first += count
        split = len(case.empty("key"))
        assert torch.equal(
            dense(case, "key", lengths(first), used[:split]), dense(case, "key", lengths(first), fresh[:split])
        )


@pytest.mark.parametrize("role", ROLES)
def test_without_sinks_the_cache_is_that_of_format_1(role: str) -> None:
    """`-sinks` changes no code, drops the rows, and reads the first tokens from their codes."""
    with_sinks, without = make("hq:s170_r4@p16", 64), make("hq:s170_r4-sinks@p16", 64)
    x, past, new = with_sinks.x(40, 0), lengths(0, 0), lengths(40, 33)
    caches = []
    for case in (with_sinks, without):
        cache = case.empty(role)
        run_native(case, role, x, past, new, cache)
        caches.append(cache)
    for a, b in zip(caches[0][:-1], caches[1][:-1], strict=True):
        assert torch.equal(bits(a), bits(b))
    assert caches[1][-1].shape[2] == 16
    assert torch.equal(caches[0][-1][:, :, :16], caches[1][-1])
    ours, plain = (dense(case, role, new, cache) for case, cache in zip((with_sinks, without), caches, strict=True))
    assert torch.equal(ours[:, :, N:], plain[:, :, N:])
    secondaries, levels = without.oracle_books(role)
    codec = without.scheme.role(role)
    for sequence in range(2):
        for head in range(2):
            page = oracle.cache._load(without.named(role, caches[1]), sequence, head, 0, codec, secondaries, levels)
            torch.testing.assert_close(plain[sequence, head, :16], page, rtol=1e-6, atol=1e-6)
    assert not torch.equal(plain[:, :, :N], ours[:, :, :N])


def test_a_tail_without_the_rows_is_refused() -> None:
    case = make("hq4@p16", 64)
    old = make("hq:s170_r4-sinks@p16", 64).empty("key")
    x, past, new = case.x(5, 0), lengths(0, 0), lengths(5, 5)
    with pytest.raises(HqmqError, match=r"key tail \[2, 2, 16, 64\] does not fit \[B, H, 20, D\]"):
        OPS.quantize_(x, past, new, case.books("key"), old, "hq4@p16", "key")
    with pytest.raises(HqmqError, match="holds no page beside the 4 sink tokens"):
        native.append(x, past, new, case.scheme.key, case.books("key"), [*old[:-1], old[-1][:, :, :4]])
    with pytest.raises(HqmqError):  # 12 is no page size
        native.append(x, past, new, case.scheme.key, case.books("key"), old)
    assert all(tensor.eq(0).all() for tensor in old)


def test_roles_keep_as_many_as_they_say() -> None:
    scheme = Scheme.parse("k=hq4,v=paper:s8_r3")
    assert (scheme.key.sink_tokens, scheme.value.sink_tokens) == (N, 0)
    assert Scheme.parse("hq:s170_r4-sinks").key.sink_tokens == 0
    assert Scheme.parse("fp16").key.sink_tokens == 0
