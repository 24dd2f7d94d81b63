"""The fused decode kernel against float32 attention over the same bytes, for all shapes it takes.

Every call has sequences of all LENGTHS at once. The reference is hqmq_trt.torch_attention on the GPU, which other tests
compare with the oracle; a query head's answer does not depend on its group, so that one reference of the largest group
serves all groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_paths import attention_path
from hqmq_trt import cuda, torch_attention
from hqmq_trt.scheme import Scheme
from tests.attention_cases import Attention, assert_same_caches, bits
from tests.codec_cases import lengths

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.skipif(not cuda.available(), reason="libhqmq_cuda.so is not built"),
]

DEVICE = "cuda"
DECODE = 1  # enum hqmq_cuda_path
LENGTHS = (1, 63, 64, 65, 4097, 130, 1000, 2377, 129)
"""Tokens a sequence holds after the call."""
CAPACITY = 4352
HEADS = 2
GROUPS = (1, 2, 3, 4, 6, 7, 8, 16)
TOKENS = (1, 2, 5, 8)
PRESETS = ("hq3", "hq3.5", "hq4", "hq5")
CASES = [
    *[(name, head_dim) for name in PRESETS for head_dim in (64, 128, 256)],
    *[("k=hq4,v=hq3", 128), ("hq3@p128", 128), ("hq4@p16", 64)],
]
PLAIN = {
    "paper:s96_r4+med3": "outliers",
    "paper:s24_r3": "no instance",
    "k=hq3,v=hq4": "no instance",
    "hq3@p8": "fewer than 16 tokens",
    "fp16": "no codes",
}
"""Schemes that the fused kernel leaves to the plain ones, and words of the reason."""
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 4e-3}
"""Of the relative error. Rounding y to bfloat16 alone gives 1.7e-3."""


class Layer:
    """One layer on the GPU: caches that hold the longest of LENGTHS in every sequence, and inputs of GROUPS[-1]."""

    def __init__(self, name: str, head_dim: int) -> None:
        self.scheme, self.head_dim = Scheme.parse(name), head_dim
        longest = max(LENGTHS)
        case = Attention(name, head_dim, HEADS, GROUPS[-1], past=(longest,) * len(LENGTHS), capacity=CAPACITY)
        self.books = [[book.to(DEVICE) for book in role] for role in case.books]
        self.caches = [[tensor.to(DEVICE) for tensor in role] for role in case.caches]
        self.q, self.k, self.v = (x.to(DEVICE) for x in case.inputs(max(TOKENS)))

    def inputs(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
        """q of the largest group, k and v."""
        q, k, v = (x[:, :, :tokens].to(dtype).contiguous() for x in (self.q, self.k, self.v))
        return q, k, v

    def clone(self) -> list[list[Tensor]]:
        """Caches that a call may change."""
        return [[tensor.clone() for tensor in role] for role in self.caches]

    def of_group(self, x: Tensor, group: int) -> Tensor:
        """The first `group` query heads of each KV head of [B, HEADS * GROUPS[-1], T, D]."""
        return x.unflatten(1, (HEADS, -1))[:, :, :group].flatten(1, 2).contiguous()

    def attend(
        self, inputs: tuple[Tensor, Tensor, Tensor], past: Tensor, new: Tensor, caches: list[list[Tensor]],
        sinks: Tensor | None = None, window: int = 0, softcap: float = 0.0, reference: bool = False,
    ) -> Tensor:  # fmt: skip
        """y of the kernels, or of float32 torch; both code pages that fill with the library, so that bytes agree."""
        q, k, v = (x.float() for x in inputs) if reference else inputs
        rest = (past, new, sinks, self.scheme, self.books, caches, self.head_dim**-0.5, window, softcap)
        if not reference:
            return cuda.attend(q, k, v, *rest)
        with mock.patch.object(torch_attention, "append", cuda.append):
            return torch_attention.attend(q, k, v, *rest)


@lru_cache(maxsize=2)
def layer(name: str, head_dim: int) -> Layer:
    """Made once for the tests that follow one another."""
    return Layer(name, head_dim)


def held(tokens: int) -> tuple[Tensor, Tensor]:
    """past_length and new_length of a call after which sequences hold LENGTHS."""
    new = [min(tokens, length) for length in LENGTHS]
    past = [length - count for length, count in zip(LENGTHS, new, strict=True)]
    return lengths(*past).to(DEVICE), lengths(*new).to(DEVICE)


def assert_close(y: Tensor, expected: Tensor, new: Tensor, limit: float) -> None:
    """Assert that every sequence follows the reference and that rows without a token are 0."""
    assert y.isfinite().all()
    row = torch.arange(y.shape[2], device=y.device)
    given = (row < new[:, None])[:, None, :, None]
    assert not (y * ~given).any()
    error = ((y.float() - expected) * given).flatten(1).norm(dim=1) / (expected * given).flatten(1).norm(dim=1)
    assert (error < limit).all(), f"relative errors by sequence: {[f'{e:.1e}' for e in error.tolist()]}"


@pytest.fixture(autouse=True)
def _clean_status() -> Iterator[None]:
    cuda.clear_status(DEVICE)
    yield
    assert cuda.status(DEVICE)[:2] == (0, 0)


def fast(q: Tensor, k: Tensor, scheme: Scheme) -> bool:
    """Whether the fused decode kernel takes a call with these q and k."""
    path, why = attention_path(q, k, CAPACITY // scheme.page_size, scheme)
    assert path or why
    return path == DECODE


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


@pytest.mark.parametrize(("name", "head_dim"), [*[(name, 128) for name in PRESETS], ("hq4", 64)])
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


@pytest.mark.parametrize(("name", "head_dim"), [*[(name, 128) for name in PRESETS], ("hq3", 64), ("hq4", 256)])
def test_bits_repeat_and_depend_on_no_other_sequence_and_no_capacity(name: str, head_dim: int) -> None:
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


@pytest.mark.parametrize("name", PRESETS)
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
                role[-1][b, :, length % page :] = torch.nan
    assert torch.equal(bits(case.attend((q, k, v), past, new, spoiled)), bits(y))


def test_a_captured_graph_serves_all_lengths() -> None:
    case = layer("hq3", 128)
    q, k, v = case.inputs(1, torch.float16)
    q = case.of_group(q, 4)
    past, new = held(1)
    caches, static = case.clone(), past.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case.attend((q, k, v), static, new, caches)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = case.attend((q, k, v), static, new, caches)
    for shift in range(len(LENGTHS)):
        moved = past.roll(shift)
        expected = case.attend((q, k, v), moved, new, case.clone())
        for target, source in zip(caches, case.caches, strict=True):
            for tensor, other in zip(target, source, strict=True):
                tensor.copy_(other)
        static.copy_(moved)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(bits(y), bits(expected))


@pytest.mark.parametrize("name", PRESETS)
def test_many_sequences_and_heads(name: str) -> None:
    """More problems than multiprocessors, of random lengths."""
    heads, group, batch, capacity = 8, 4, 48, 1024
    scheme = Scheme.parse(name)
    g = torch.Generator().manual_seed(3)
    past = tuple(torch.randint(0, capacity - 1, (batch,), generator=g).tolist())
    case = Attention(name, 128, heads, group, past=past, capacity=capacity, dtype=torch.float16, seed=5)
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
