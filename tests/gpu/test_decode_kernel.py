"""The fused decode kernel against float32 attention over the same bytes, for all shapes it takes.

Every call has sequences of all LENGTHS at once. The reference is hqmq_trt.torch_attention on the GPU, which other tests
compare with the oracle; a query head's answer does not depend on its group, so that one reference of the largest group
serves all groups.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import lru_cache
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_paths import attention_path, plain_attention
from hqmq_trt import cuda, torch_attention
from hqmq_trt.scheme import Scheme
from tests.attention_cases import Attention, assert_same_caches, attention_of, bits
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
SINKS = 4
"""First tokens that the presets keep exact."""
CAPACITY = 4352
HEADS = 2
GROUPS = (1, 2, 3, 4, 6, 7, 8, 16)
TOKENS = (1, 2, 5, 8)
PRESETS = ("hq3", "hq3.5", "hq4", "hq5")
MED3 = "paper:s96_r4+med3"
CASES = [
    *[(name, head_dim) for name in PRESETS for head_dim in (64, 128, 256)],
    *[("k=hq4,v=hq3.5", head_dim) for head_dim in (64, 128, 256)],
    *[("k=hq4,v=hq3", 128), ("k=hq3.5,v=hq3", 128), ("hq3@p128", 128), ("hq4@p16", 64), ("k=hq4,v=hq3.5@p16", 256)],
    *[(name, head_dim) for name in (MED3, "paper:s96_r4") for head_dim in (64, 128, 256)],
    *[(MED3 + "@p16", 128), (MED3 + "@p128", 64), (MED3 + "@p32", 256)],
]
PLAIN = {
    "hq:s170_r4+med3": "gain MAX",
    "paper:s8_r2+med3": "no instance",
    "paper:s128_r4+med3": "no instance",
    f"k={MED3},v=paper:s96_r4": "one role has Med3x outliers",
    "paper:s24_r3": "no instance",
    "k=hq3,v=hq4": "no instance",
    "hq:s10_r2": "no instance",
    "hq3@p8": "fewer than 16 tokens",
    "fp16": "no codes",
    "k=hq4,v=paper:s24_r3": "different numbers of first tokens",
    "k=hq:s170_r4-sinks,v=hq4": "different numbers of first tokens",
}
"""Schemes that the fused kernel leaves to the plain ones, and words of the reason."""
SINK_CASES = [
    *[("hq3", 128, 4), ("hq4", 128, 4), ("hq3.5", 64, 4), ("hq5", 64, 4), ("hq4", 256, 4), ("k=hq4,v=hq3", 128, 4)],
    *[("k=hq4,v=hq3.5", 128, 4), ("k=hq4,v=hq3.5", 256, 4), (MED3, 128, 4), (MED3, 64, 0)],
    *[("hq4@p16", 64, 8), ("hq3@p16", 128, 1), ("hq5@p128", 128, 8), ("hq3.5@p32", 256, 3), ("hq3", 128, 0)],
]
"""Schemes, head_dim and how many first tokens are exact."""
LIMITS = {torch.float16: 2e-3, torch.bfloat16: 4e-3}
"""Of the relative error. Rounding y to bfloat16 alone gives 1.7e-3."""


class Layer:
    """One layer on the GPU: caches that hold the longest of `ends` in every sequence, and inputs of GROUPS[-1].

    K and V keep `sinks` first tokens exact (None: SINKS for our schemes, 0 for the paper's), as values of their own,
    so that it shows whether codes or exact rows are read, and which.
    """

    def __init__(self, name: str, head_dim: int, ends: tuple[int, ...] = LENGTHS, sinks: int | None = None) -> None:
        scheme, self.head_dim, self.ends = Scheme.parse(name), head_dim, ends
        if sinks is None:
            sinks = SINKS if scheme.key.optimised else 0
        key, value = (replace(role, sink_tokens=sinks) for role in (scheme.key, scheme.value))
        self.scheme = replace(scheme, key=key, value=value)
        past = (max(ends),) * len(ends)
        case = attention_of(name)(name, head_dim, HEADS, GROUPS[-1], past=past, capacity=CAPACITY)
        self.books = [[book.to(DEVICE) for book in role] for role in case.books]
        g = torch.Generator().manual_seed(1)
        for cache in case.caches:
            tail = cache[-1]
            exact = 2 * torch.randn(*tail.shape[:2], sinks, head_dim, generator=g)
            cache[-1] = torch.cat([tail[:, :, : scheme.page_size], exact.half()], 2)
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
def layer(name: str, head_dim: int, ends: tuple[int, ...] = LENGTHS, sinks: int | None = None) -> Layer:
    """Made once for the tests that follow one another."""
    return Layer(name, head_dim, ends, sinks)


def held(tokens: int, ends: tuple[int, ...] = LENGTHS) -> tuple[Tensor, Tensor]:
    """past_length and new_length of a call after which sequences hold `ends`."""
    new = [min(tokens, length) for length in ends]
    past = [length - count for length, count in zip(ends, new, strict=True)]
    return lengths(*past).to(DEVICE), lengths(*new).to(DEVICE)


def sink_ends(page: int) -> tuple[int, ...]:
    """Tokens after a call, around the first ones, around the first pages and far from both."""
    first = (*range(1, 6), 8, 9, 12)
    return *first, *range(page - 1, page + 10), 2 * page - 1, 2 * page, 2 * page + 1, 2 * page + 5, 12 * page + 3


def assert_close(y: Tensor, expected: Tensor, new: Tensor, limit: float) -> None:
    """Assert that every sequence follows the reference and that rows without a token are 0."""
    assert y.isfinite().all()
    row = torch.arange(y.shape[2], device=y.device)
    given = (row < new[:, None])[:, None, :, None]
    assert not (y * ~given).any()
    error = ((y.float() - expected) * given).flatten(1).norm(dim=1)
    size = (expected * given).flatten(1).norm(dim=1)
    assert (error <= limit * size).all(), f"relative errors by sequence: {(error / size).tolist()}"


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


@pytest.mark.parametrize(
    ("name", "head_dim"), [*[(name, 128) for name in (*PRESETS, "k=hq4,v=hq3.5", MED3)], ("hq4", 64)]
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
        ("hq3", 64),
        ("hq4", 256),
        *[(MED3, d) for d in (64, 128, 256)],
    ],
)
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


@pytest.mark.parametrize("name", [*PRESETS, MED3])
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
    [("hq3", 1, False), ("hq3", 1, True), ("hq4", 8, True), (MED3, 1, False), (MED3, 8, True)],
)
def test_a_captured_graph_serves_all_lengths(name: str, tokens: int, around: bool) -> None:
    ends = sink_ends(64) if around else LENGTHS
    case = layer(name, 128, ends)
    q, k, v = case.inputs(tokens, torch.float16)
    q = case.of_group(q, 4)
    assert fast(q, k, case.scheme)
    past, new = held(tokens, ends)
    caches, static, static_new = case.clone(), past.clone(), new.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        case.attend((q, k, v), static, static_new, caches)
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        y = case.attend((q, k, v), static, static_new, caches)
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


@pytest.mark.parametrize(("name", "head_dim", "sinks"), SINK_CASES)
def test_the_first_tokens_are_exact(name: str, head_dim: int, sinks: int) -> None:
    """Sequences of fewer tokens, calls that go from page 0 to page 1, windows that hide some of these tokens."""
    page = Scheme.parse(name).page_size
    ends = sink_ends(page)
    case = layer(name, head_dim, ends, sinks)
    for tokens in range(1, 9):
        past, new = held(tokens, ends)
        ragged = (new - torch.arange(len(ends), device=DEVICE) % tokens).clamp(min=0).int()
        q, k, v = case.inputs(tokens, torch.float16)
        for window, count in ((0, new), (0, ragged), (1, new), (5, new), (page, ragged), (page + 2, new)):
            present = case.clone()
            expected = case.attend((q, k, v), past, count, present, window=window, reference=True)
            for group in (1, 4, 7):
                rows, caches = case.of_group(q, group), case.clone()
                assert fast(rows, k, case.scheme)
                y = case.attend((rows, k, v), past, count, caches, window=window)
                assert_close(y, case.of_group(expected, group), count, LIMITS[torch.float16])
                assert_same_caches(caches, present)
            with plain_attention():
                plain = case.attend((rows, k, v), past, count, case.clone(), window=window)
            assert_close(y, plain.float(), count, LIMITS[torch.float16])


@pytest.mark.parametrize("window", [0, 3, 18])
@pytest.mark.parametrize(("name", "head_dim"), [("hq4@p16", 64), ("hq3@p16", 128)])
def test_the_first_tokens_are_those_of_the_oracle(name: str, head_dim: int, window: int) -> None:
    past = (0, 1, 3, 4, 5, 8, 11, 15, 16, 17, 31, 32, 100)
    case = Attention(name, head_dim, 1, 4, past=past, dtype=torch.float16)
    g = torch.Generator().manual_seed(1)
    for cache in case.caches:
        cache[-1][:, :, 16:] = 2 * torch.randn(cache[-1][:, :, 16:].shape, generator=g)
    q, k, v = case.inputs(8)
    new = lengths(*[8 - b % 5 for b in range(len(past))])
    expected, _ = case.oracle(q, k, v, new, head_dim**-0.5, window)
    books, caches = ([[x.to(DEVICE) for x in role] for role in part] for part in (case.books, case.caches))
    assert fast(q, k, case.scheme)
    q, k, v, held_, count = (x.to(DEVICE) for x in (q, k, v, lengths(*past), new))
    y = cuda.attend(q, k, v, held_, count, None, case.scheme, books, caches, head_dim**-0.5, window)
    assert_close(y.cpu(), expected, new, LIMITS[torch.float16])


@pytest.mark.parametrize("name", PRESETS)
def test_codes_of_the_first_tokens_are_not_read_from_later_pages(name: str) -> None:
    ends = tuple(length for length in sink_ends(64) if length >= 72)
    case = layer(name, 128, ends)
    spoiled = case.clone()
    for codes, scales, *_ in spoiled:
        codes[:, :, :SINKS] = -1
        scales[:, :, :SINKS] = torch.nan
    for tokens, window in ((1, 0), (5, 0), (8, 70)):
        past, new = held(tokens, ends)
        q, k, v = case.inputs(tokens, torch.float16)
        q = case.of_group(q, 4)
        y = case.attend((q, k, v), past, new, case.clone(), window=window)
        caches = [[tensor.clone() for tensor in role] for role in spoiled]
        assert torch.equal(bits(case.attend((q, k, v), past, new, caches, window=window)), bits(y))


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("tokens", [1, 5])
def test_nan_in_an_exact_row_reaches_the_queries_that_see_it(tokens: int, window: int) -> None:
    case = layer("hq3", 128)
    past, new = held(tokens)
    q, k, v = case.inputs(tokens, torch.float16)
    q = case.of_group(q, 4)
    i = torch.arange(tokens, device=DEVICE)
    time, page = past[:, None] + i, case.scheme.page_size
    sees = (i < new[:, None]) & (time >= page)
    if window:
        sees &= time - window < 2
    assert sees.any()
    for role in (0, 1):
        caches = case.clone()
        caches[role][-1][:, :, page + 2, 3] = torch.nan
        y = case.attend((q, k, v), past, new, caches, window=window)
        assert torch.equal(y[..., 3].isnan(), sees[:, None].expand(y.shape[:3]))
        others = y[..., [0, 127]].isnan().any(-1)
        assert torch.equal(others, sees[:, None].expand(y.shape[:3]) if role == 0 else torch.zeros_like(others))


@pytest.mark.parametrize("name", [*PRESETS, MED3])
def test_many_sequences_and_heads(name: str) -> None:
    """More problems than multiprocessors, of random lengths."""
    heads, group, batch, capacity = 8, 4, 48, 1024
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


def outliers(case: Layer) -> tuple[Tensor, Tensor]:
    """Outliers of the pages that all sequences hold in full, of K and V: kept, and without a slot."""
    kept, dropped = [], []
    for _, _, mask, _, _ in case.caches:
        words = mask[:, :, : max(case.ends) // case.scheme.page_size].cpu()
        bits_of = words[..., :-1].contiguous().view(torch.uint8)
        kept.append(sum((bits_of >> i & 1).sum(-1) for i in range(8)))
        dropped.append(words[..., -1])
    return torch.stack([torch.as_tensor(x) for x in kept]), torch.stack(dropped)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_layers_with_outliers_have_pages_of_all_kinds(head_dim: int) -> None:
    """What the tests of MED3 above rely on."""
    case = layer(MED3, head_dim)
    kept, dropped = outliers(case)
    chunks = case.scheme.page_size * head_dim // 4
    capacity = case.scheme.key.outlier_capacity(head_dim, case.scheme.page_size)
    assert (kept[..., ::3] == 0).any()
    usual = kept[..., 1::3].float().mean() / chunks
    assert 0.02 < usual < 0.05
    assert (kept[..., 2::3] == capacity).any()
    assert (dropped[..., 2::3] > 0).any()


@pytest.mark.parametrize("role", [0, 1])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_outliers_of_any_size(head_dim: int, role: int) -> None:
    """Values that are far beyond 65504 times their token's scale, beside tokens whose other chunks are 0."""
    case = layer(MED3, head_dim)
    caches = case.clone()
    values, scales = caches[role][3], caches[role][1]
    scales *= 2.0**-12
    scales[:, :, 5::9] = 0
    values *= 2.0**-6 if role == 0 else 2.0**9
    assert values.isfinite().all()
    for tokens, group in ((1, 4), (5, 7)):
        past, new = held(tokens)
        q, k, v = case.inputs(tokens, torch.float16)
        copies = [[tensor.clone() for tensor in each] for each in caches]
        expected = case.attend((q, k, v), past, new, copies, reference=True)
        q = case.of_group(q, group)
        assert fast(q, k, case.scheme)
        y = case.attend((q, k, v), past, new, [[tensor.clone() for tensor in each] for each in caches])
        assert_close(y, case.of_group(expected, group), new, LIMITS[torch.float16])


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
