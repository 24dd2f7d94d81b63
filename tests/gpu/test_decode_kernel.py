"""The fused decode kernel against float32 attention over the same bytes, for all shapes it takes.

Every call has sequences of all LENGTHS at once. The reference is hqmq_trt.torch_attention on the GPU, which other tests
compare with the oracle; a query head's answer does not depend on its group, so that one reference of the largest group
serves all groups.
"""

from __future__ import annotations

from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_paths import attention_path
from hqmq_trt import cuda, torch_attention
from hqmq_trt.scheme import Scheme
from tests.attention_cases import LIMITS, assert_close, assert_same_caches, attention_of, bits
from tests.codec_cases import lengths
from tests.gpu.decode_layer import (
    CAPACITY,
    DEVICE,
    GROUPS,
    HEADS,
    LENGTHS,
    MED3,
    PRESETS,
    SINKS,
    TEN_BIT,
    TOKENS,
    Layer,
    fast,
    held,
    layer,
    sink_ends,
)
from tests.gpu.graphs import captured
from tests.gpu.requirements import KERNEL_TESTS

pytestmark = [*KERNEL_TESTS, pytest.mark.usefixtures("clean_status")]

CASES = [
    *[(name, head_dim) for name in PRESETS for head_dim in (64, 128, 256)],
    *[("k=hq4,v=hq3.5", head_dim) for head_dim in (64, 128, 256)],
    *[("k=hq4,v=hq3", 128), ("k=hq3.5,v=hq3", 128), ("hq3@p128", 128), ("hq4@p16", 64), ("k=hq4,v=hq3.5@p16", 256)],
    *[(name, head_dim) for name in TEN_BIT for head_dim in (64, 128)],
    *[("k=hq3,v=hq2.5@p16", 64), ("k=hq3.5,v=hq2.5@p128", 64), ("k=hq3,v=hq2.5@p16", 128)],
    *[(name, head_dim) for name in (MED3, "paper:s96_r4") for head_dim in (64, 128, 256)],
    *[(MED3 + "@p16", 128), (MED3 + "@p128", 64), (MED3 + "@p32", 256)],
]
PLAIN = {
    "hq:s170_r4+med3": "gain MAX",
    "paper:s8_r2+med3": "no instance",
    "paper:s128_r4+med3": "no instance",
    f"k={MED3},v=paper:s96_r4": "one role has Med3x outliers",
    "paper:s24_r3": "no instance",
    "paper:s170_r4": "no instance",  # codes of hq4, scales of 16 bits
    "paper:s21_r3": "no instance",
    "k=hq3,v=hq4": "no instance",
    "hq2.5": "no instance",
    "k=hq2.5,v=hq3": "no instance",
    "k=hq4,v=hq2.5": "no instance",
    "hq3@p8": "fewer than 16 tokens",
    "fp16": "no codes",
    "k=hq4,v=paper:s24_r3": "different numbers of first tokens",
    "k=hq:s170_r4-sinks,v=hq4": "different numbers of first tokens",
}
"""Schemes that the fused kernel leaves to the plain ones, and words of the reason."""


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_every_group_dtype_and_number_of_queries_follows_the_reference(name: str, head_dim: int) -> None:
    case = layer(name, head_dim)
    for tokens in TOKENS:
        for dtype in (torch.float16, torch.bfloat16):
            past, new = held(tokens)
            q, k, v = case.inputs(tokens, dtype)
            present = case.clone()
            expected = case.attend((q, k, v), past, new, present, reference=True)
            for group in GROUPS:
                rows, caches = case.of_group(q, group), case.clone()
                assert fast(rows, k, case.scheme)
                y = case.attend((rows, k, v), past, new, caches)
                assert_close(y, case.of_group(expected, group), new, LIMITS[dtype])
                if group == 4:
                    assert_same_caches(caches, present)


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [*[(name, 128) for name in (*PRESETS, "k=hq4,v=hq3.5", MED3)], ("hq4", 64), (TEN_BIT[0], 64), (TEN_BIT[1], 128)],
)
@pytest.mark.parametrize(
    ("window", "softcap", "sink"),
    [(50, 0.0, False), (700, 0.0, True), (0, 5.0, False), (0, 0.0, True), (65, 3.0, True)],
)
def test_window_softcap_and_sinks(name: str, head_dim: int, window: int, softcap: float, sink: bool) -> None:
    case = layer(name, head_dim)
    sinks = torch.linspace(-1, 4, HEADS * GROUPS[-1], device=DEVICE) if sink else None
    for tokens, dtype in ((1, torch.float16), (5, torch.float16), (8, torch.bfloat16)):
        past, new = held(tokens)
        q, k, v = case.inputs(tokens, dtype)
        expected = case.attend((q, k, v), past, new, case.clone(), sinks, window, softcap, reference=True)
        for group in (1, 4, 7, 8):
            own = None if sinks is None else sinks.unflatten(0, (HEADS, -1))[:, :group].flatten().contiguous()
            rows = case.of_group(q, group)
            assert fast(rows, k, case.scheme)
            y = case.attend((rows, k, v), past, new, case.clone(), own, window, softcap)
            assert_close(y, case.of_group(expected, group), new, LIMITS[dtype])


def sequence(case: Layer, b: int, capacity: int) -> list[list[Tensor]]:
    """The cache of one sequence in a buffer of another capacity: cut, or with NaN and all bits set behind."""
    page, found = case.scheme.page_size, []
    for role in case.caches:
        tensors = []
        for tensor in role[:-1]:
            each = tensor.shape[2] // (CAPACITY // page)  # rows of a page
            rows = capacity // page * each
            bad = -1 if tensor.dtype == torch.int32 else torch.nan
            made = torch.full((1, HEADS, rows, *tensor.shape[3:]), bad, dtype=tensor.dtype, device=tensor.device)
            kept = min(rows, tensor.shape[2])
            made[:, :, :kept] = tensor[b : b + 1, :, :kept]
            tensors.append(made)
        found.append([*tensors, role[-1][b : b + 1].clone()])
    return found


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [
        *[(name, 128) for name in (*PRESETS, "k=hq4,v=hq3.5")],
        *[(name, 64) for name in ("hq3", *TEN_BIT)],
        ("hq4", 256),
        *[(MED3, d) for d in (64, 128, 256)],
    ],
)
def test_bits_repeat_and_depend_on_no_other_sequence_and_no_capacity(
    name: str, head_dim: int, batch_invariant: None
) -> None:
    case = layer(name, head_dim)
    for tokens, group, dtype in ((1, 4, torch.float16), (5, 7, torch.float16), (8, 16, torch.bfloat16)):
        past, new = held(tokens)
        q, k, v = case.inputs(tokens, dtype)
        q = case.of_group(q, group)
        y = case.attend((q, k, v), past, new, case.clone())
        for _ in range(3):
            assert torch.equal(bits(case.attend((q, k, v), past, new, case.clone())), bits(y))
        for b, length in enumerate(LENGTHS):
            one = slice(b, b + 1)
            least = -(-length // 128) * 128
            for capacity in (least, CAPACITY, 4 * CAPACITY):
                rows = tuple(x[one].contiguous() for x in (q, k, v))
                alone = case.attend((rows[0], rows[1], rows[2]), past[one], new[one], sequence(case, b, capacity))
                assert torch.equal(bits(alone), bits(y[one])), f"length {length}, capacity {capacity}"


@pytest.mark.parametrize("name", ["hq3", "hq4", MED3])
def test_of_other_sequences_only_their_number_counts(name: str, cut_by_count: None) -> None:
    """Among as many, a sequence has the same bits in any place and whatever the others hold, if cut by count."""
    case = layer(name, 128)
    past, new = held(1)
    q, k, v = case.inputs(1, torch.float16)
    q = case.of_group(q, 4)
    y = case.attend((q, k, v), past, new, case.clone())
    order = torch.arange(len(LENGTHS)).roll(4)
    caches = [[tensor[order].contiguous() for tensor in role] for role in case.clone()]
    moved = case.attend((q[order], k[order], v[order]), past[order], new[order], caches)
    assert torch.equal(bits(moved), bits(y[order]))
    fewer = past.clone()
    fewer[::2] = 0
    changed = case.attend((q, k, v), fewer, new, case.clone())
    assert torch.equal(bits(changed[1::2]), bits(y[1::2]))


@pytest.mark.parametrize("name", [*PRESETS, TEN_BIT[0], MED3])
def test_what_lies_behind_the_length_is_not_seen(name: str) -> None:
    """Codes, scales and means of later pages, and rows of the tail that hold no token, may be anything."""
    case = layer(name, 128)
    past, new = held(1)
    q, k, v = case.inputs(1, torch.float16)
    q = case.of_group(q, 4)
    y = case.attend((q, k, v), past, new, case.clone())
    spoiled = case.clone()
    page = case.scheme.page_size
    for role in spoiled:
        for tensor in role[:-1]:
            each = tensor.shape[2] // (CAPACITY // page)
            for b, length in enumerate(LENGTHS):
                tensor[b, :, length // page * each :] = -1 if tensor.dtype == torch.int32 else torch.nan
        for b, length in enumerate(LENGTHS):
            if length % page:
                role[-1][b, :, length % page : page] = torch.nan
            role[-1][b, :, page + min(length - 1, SINKS) :] = torch.nan
    assert torch.equal(bits(case.attend((q, k, v), past, new, spoiled)), bits(y))


@pytest.mark.parametrize(
    ("name", "tokens", "around"),
    [("hq3", 1, False), ("hq3", 1, True), ("hq4", 8, True), (TEN_BIT[1], 8, True), (MED3, 1, False), (MED3, 8, True)],
)
def test_a_captured_graph_serves_all_lengths(name: str, tokens: int, around: bool) -> None:
    ends = sink_ends(64) if around else LENGTHS
    case = layer(name, 128, ends)
    q, k, v = case.inputs(tokens, torch.float16)
    q = case.of_group(q, 4)
    assert fast(q, k, case.scheme)
    past, new = held(tokens, ends)
    caches, static, static_new = case.clone(), past.clone(), new.clone()
    graph, y = captured(lambda: case.attend((q, k, v), static, static_new, caches))
    for shift in range(len(ends)):
        moved, moved_new = past.roll(shift), new.roll(shift)
        expected = case.attend((q, k, v), moved, moved_new, case.clone())
        for target, source in zip(caches, case.caches, strict=True):
            for tensor, other in zip(target, source, strict=True):
                tensor.copy_(other)
        static.copy_(moved)
        static_new.copy_(moved_new)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(bits(y), bits(expected))


@pytest.mark.parametrize(("batch", "capacity"), [(48, 1024), (16, 4096)])
@pytest.mark.parametrize("name", [*PRESETS, TEN_BIT[0], MED3])
def test_many_sequences_and_heads(name: str, batch: int, capacity: int) -> None:
    """More problems than multiprocessors, of random lengths; and problems of one split, long ones of which (1,536
    coded tokens and more) have a part of its own for the exact tokens."""
    heads, group = 8, 4
    scheme = Scheme.parse(name)
    g = torch.Generator().manual_seed(3)
    past = tuple(torch.randint(0, capacity - 1, (batch,), generator=g).tolist())
    case = attention_of(name)(name, 128, heads, group, past=past, capacity=capacity, dtype=torch.float16, seed=5)
    q, k, v = (x.to(DEVICE) for x in case.inputs(1))
    books = [[book.to(DEVICE) for book in role] for role in case.books]
    caches = [[tensor.to(DEVICE) for tensor in role] for role in case.caches]
    copies = [[tensor.clone() for tensor in role] for role in caches]
    held_, new = lengths(*past).to(DEVICE), lengths(*[1] * batch).to(DEVICE)
    assert fast(q, k, scheme)
    y = cuda.attend(q, k, v, held_, new, None, scheme, books, caches, 128**-0.5)
    with mock.patch.object(torch_attention, "append", cuda.append):
        inputs = (q.float(), k.float(), v.float(), held_, new)
        expected = torch_attention.attend(*inputs, None, scheme, books, copies, 128**-0.5, 0, 0.0)
    assert_close(y, expected, new, LIMITS[torch.float16])


def test_calls_it_does_not_take_are_served_by_the_plain_kernels() -> None:
    case = layer("hq3", 128)
    past, new = held(8)
    q, k, v = case.inputs(8, torch.float32)
    assert not fast(q, k, case.scheme)
    y = case.attend((q, k, v), past, new, case.clone())
    expected = case.attend((q, k, v), past, new, case.clone(), reference=True)
    assert_close(y, expected, new, 1e-4)


@pytest.mark.parametrize("name", PLAIN)
def test_schemes_it_does_not_take_say_why(name: str) -> None:
    q, k = torch.zeros(1, 4, 1, 128, dtype=torch.float16), torch.zeros(1, 1, 1, 128, dtype=torch.float16)
    path, why = attention_path(q, k, 4, Scheme.parse(name))
    assert path == 0
    assert PLAIN[name] in why
