"""Prefill attention on tensor cores against float32 attention over the same bytes, for all shapes it takes.

Every call has sequences of all PAST lengths and as many new tokens as NEW says, so that pages fill within the call and
queries lie on several pages. The reference is hqmq_trt.torch_attention on the GPU.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, byref, c_int, c_size_t
from dataclasses import replace
from functools import lru_cache
from unittest import mock

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_paths import PREFILL, attention_path, use_kernels
from hqmq_trt import cuda, native, torch_attention
from hqmq_trt.native import RoleParams
from hqmq_trt.native_attention import AttentionParams
from hqmq_trt.scheme import ROLES, Scheme
from tests.attention_cases import LIMITS, Attention, assert_close, assert_same_caches, bits
from tests.codec_cases import lengths
from tests.gpu.graphs import captured
from tests.gpu.requirements import KERNEL_TESTS

pytestmark = KERNEL_TESTS

DEVICE = "cuda"
PAST = (0, 1, 63, 64, 130, 1000, 2377, 5)
NEW = (300, 299, 1, 65, 300, 17, 128, 0)
TOKENS = max(NEW)
CAPACITY = 3072
HEADS = 2
CASES = [
    *[(name, head_dim) for name in ("hq3", "hq3.5", "hq4", "hq5") for head_dim in (64, 128, 256)],
    *[(name, 128) for name in ("k=hq4,v=hq3", "k=fp16,v=hq3", "fp16", "hq3@p8", "hq3@p16", "hq4@p256", "paper:s24_r3")],
    ("k=hq4,v=paper:s24_r3", 128),
    *[(name, head_dim) for name in ("paper:s96_r4+med3", "fp16") for head_dim in (80, 96)],
    *[("paper:s5_r8+med3@p16", 20), ("paper:s24_r3+med3@p8", 128), ("hq4@p16", 64)],
]
SINK_CASES = [
    *[("hq3", 128, (4, 4)), ("hq4", 64, (8, 8)), ("hq5", 256, (4, 4)), ("hq4@p16", 128, (4, 0))],
    *[("hq3@p8", 64, (0, 8)), ("hq3.5@p256", 256, (1, 4)), ("k=fp16,v=hq3", 128, (0, 4))],
    ("paper:s96_r4+med3", 80, (3, 4)),
]
"""Schemes, head_dim and how many first tokens of K and V are exact."""
SINK_NEW = (90, 20, 9, 64, 90, 5, 90, 1, 70, 90, 0, 33)
PLAIN, KERNELS = 1, (0, 2)
"""use_kernels: the plain ones; those of this GPU, and those without warpgroups."""


Inputs = Sequence[Tensor]


class Layer:
    """A layer on the GPU whose sequences hold `past` tokens, and inputs of a call of max(new) tokens.

    Exact rows of first tokens get values of their own, so that it shows which are read; NaN where no token is held.
    """

    def __init__(
        self, name: str, head_dim: int, group: int, past: tuple[int, ...] = PAST, new: tuple[int, ...] = NEW,
        sinks: tuple[int, int] | None = None,
    ) -> None:  # fmt: skip
        scheme, self.head_dim = Scheme.parse(name), head_dim
        key, value = scheme.key, scheme.value
        if sinks is not None:
            key, value = replace(key, sink_tokens=sinks[0]), replace(value, sink_tokens=sinks[1])
        self.scheme = replace(scheme, key=key, value=value)
        case = Attention(name, head_dim, HEADS, group, past=past, capacity=CAPACITY)
        self.books = [[book.to(DEVICE) for book in role] for role in case.books]
        g = torch.Generator().manual_seed(1)
        for role, cache in zip((key, value), case.caches, strict=True):
            tail = cache[-1]
            exact = 2 * torch.randn(*tail.shape[:2], role.sink_tokens, head_dim, generator=g)
            for b, held in enumerate(past):
                exact[b, :, held:] = torch.nan
            cache[-1] = torch.cat([tail[:, :, : scheme.page_size], exact.half()], 2)
        self.caches = [[tensor.to(DEVICE) for tensor in role] for role in case.caches]
        self.rows = [x.to(DEVICE) for x in case.inputs(max(new))]
        self.past, self.new = lengths(*past).to(DEVICE), lengths(*new).to(DEVICE)

    def inputs(self, dtype: torch.dtype) -> Inputs:
        """q, k and v."""
        q, k, v = (x.to(dtype) for x in self.rows)
        path, why = attention_path(q, k, CAPACITY // self.scheme.page_size, self.scheme)
        assert path == PREFILL, why
        return q, k, v

    def clone(self) -> list[list[Tensor]]:
        """Caches that a call may change."""
        return [[tensor.clone() for tensor in role] for role in self.caches]

    def attend(
        self, inputs: Inputs, caches: list[list[Tensor]], past: Tensor | None = None,
        new: Tensor | None = None, sinks: Tensor | None = None, window: int = 0, softcap: float = 0.0,
        kernels: int = 0,
    ) -> Tensor:  # fmt: skip
        """y of the kernels that use_kernels tells."""
        q, k, v = inputs
        lens = self.past if past is None else past, self.new if new is None else new
        scale = self.head_dim**-0.5
        use_kernels(kernels)
        try:
            return cuda.attend(q, k, v, *lens, sinks, self.scheme, self.books, caches, scale, window, softcap)
        finally:
            use_kernels(0)

    def reference(
        self, inputs: Inputs, caches: list[list[Tensor]], sinks: Tensor | None = None, window: int = 0,
        softcap: float = 0.0,
    ) -> Tensor:  # fmt: skip
        """y of float32 torch; pages that fill are coded by the library, so that bytes agree."""
        q, k, v = inputs
        rest = (self.past, self.new, sinks, self.scheme, self.books, caches, self.head_dim**-0.5, window, softcap)
        with mock.patch.object(torch_attention, "append", cuda.append):
            return torch_attention.attend(q.float(), k.float(), v.float(), *rest)


@lru_cache(maxsize=2)
def layer(name: str, head_dim: int, group: int = 4) -> Layer:
    """Made once for the tests that follow one another."""
    return Layer(name, head_dim, group)


@pytest.fixture(autouse=True)
def _clean_status() -> None:
    cuda.clear_status(torch.device(DEVICE, 0) if DEVICE == "cuda" else torch.device(DEVICE))


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_every_scheme_and_type_follows_the_reference(name: str, head_dim: int) -> None:
    case = layer(name, head_dim)
    for dtype in (torch.float16, torch.bfloat16):
        inputs, caches, present = case.inputs(dtype), case.clone(), case.clone()
        expected = case.reference(inputs, present)
        assert_close(case.attend(inputs, caches), expected, case.new, LIMITS[dtype])
        assert_same_caches(caches, present)


@pytest.mark.parametrize("group", [1, 3, 7, 8, 40, 200])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_every_group_follows_the_reference(group: int, head_dim: int) -> None:
    case = layer("hq3", head_dim, group)
    inputs = case.inputs(torch.float16)
    expected = case.reference(inputs, case.clone())
    assert_close(case.attend(inputs, case.clone()), expected, case.new, LIMITS[torch.float16])


@pytest.mark.parametrize(("name", "head_dim"), [("hq3", 128), ("hq4@p16", 64), ("hq4@p256", 128), ("hq3", 256)])
@pytest.mark.parametrize(
    ("window", "softcap", "sink"),
    [(50, 0.0, False), (700, 0.0, True), (0, 5.0, False), (0, 0.0, True), (65, 3.0, True)],
)
def test_window_softcap_and_sinks(name: str, head_dim: int, window: int, softcap: float, sink: bool) -> None:
    for group, dtype in ((4, torch.float16), (3, torch.bfloat16)):
        case = layer(name, head_dim, group)
        sinks = torch.linspace(-1, 4, HEADS * group, device=DEVICE) if sink else None
        inputs = case.inputs(dtype)
        expected = case.reference(inputs, case.clone(), sinks, window, softcap)
        y = case.attend(inputs, case.clone(), sinks=sinks, window=window, softcap=softcap)
        assert_close(y, expected, case.new, LIMITS[dtype])


def sequence(case: Layer, b: int, capacity: int) -> list[list[Tensor]]:
    """The cache of one sequence in a larger buffer, with NaN and all bits set behind."""
    page, found = case.scheme.page_size, []
    for role in case.caches:
        tensors = []
        for tensor in role[:-1]:
            rows = tensor.shape[2] * capacity // CAPACITY
            bad = -1 if tensor.dtype == torch.int32 else torch.nan
            made = torch.full((1, HEADS, rows, *tensor.shape[3:]), bad, dtype=tensor.dtype, device=tensor.device)
            kept = tensor.shape[2] // (CAPACITY // page) * (PAST[b] // page)
            made[:, :, :kept] = tensor[b : b + 1, :, :kept]
            tensors.append(made)
        tail = role[-1][b : b + 1].clone()
        tail[:, :, PAST[b] % page : page] = torch.nan
        found.append([*tensors, tail])
    return found


@pytest.mark.parametrize(("name", "head_dim"), [("hq3", 128), ("hq4", 64), ("hq3@p16", 256), ("paper:s24_r3", 128)])
def test_bits_repeat_and_depend_on_no_other_sequence_and_on_nothing_unseen(name: str, head_dim: int) -> None:
    case = layer(name, head_dim, 3)
    for window, dtype in ((0, torch.float16), (100, torch.bfloat16)):
        inputs = case.inputs(dtype)
        y = case.attend(inputs, case.clone(), window=window)
        for _ in range(3):
            assert torch.equal(bits(case.attend(inputs, case.clone(), window=window)), bits(y))
        for b in range(len(PAST)):
            one = slice(b, b + 1)
            rows = tuple(x[one].contiguous() for x in inputs)
            for capacity in (CAPACITY, 4 * CAPACITY):
                caches = sequence(case, b, capacity)
                alone = case.attend(rows, caches, case.past[one], case.new[one], window=window)
                assert torch.equal(bits(alone), bits(y[one])), f"past {PAST[b]}, capacity {capacity}"


@pytest.mark.parametrize("name", ["hq3", "hq4@p16", "paper:s96_r4+med3"])
def test_a_prompt_cut_in_chunks_gives_the_same_answer(name: str) -> None:
    case = layer(name, 128)
    q, k, v = case.inputs(torch.float16)
    whole, parts = case.clone(), case.clone()
    y = case.attend((q, k, v), whole).float()
    start, found = 0, []
    for step in (9, 64, 100, 10, 117):
        past = case.past + case.new.clamp(max=start)
        new = (case.new - start).clamp(0, step)
        rows = tuple(x[:, :, start : start + step] for x in (q, k, v))
        found.append(case.attend(rows, parts, past, new.int()).float())
        start += step
    assert start == TOKENS
    assert_same_caches(whole, parts)
    assert float((torch.cat(found, 2) - y).norm() / y.norm()) < 3e-4


def test_more_heads_than_one_workspace_holds() -> None:
    """Tiles of all sequences and heads together take more than the most that is asked for."""
    heads, group, batch, capacity, tokens = 8, 2, 24, 8192, 20
    scheme = Scheme.parse("hq3")
    g = torch.Generator().manual_seed(3)
    past = tuple(torch.randint(0, 400, (batch,), generator=g).tolist())
    case = Attention("hq3", 128, heads, group, past=past, capacity=capacity, dtype=torch.float16, seed=5)
    q, k, v = (x.to(DEVICE) for x in case.inputs(tokens))
    assert 4 * batch * heads * capacity * 128 > 1 << 28
    books = [[book.to(DEVICE) for book in role] for role in case.books]
    caches, copies = ([[tensor.to(DEVICE).clone() for tensor in role] for role in case.caches] for _ in range(2))
    held, new = lengths(*past).to(DEVICE), lengths(*[tokens] * batch).to(DEVICE)
    assert attention_path(q, k, capacity // 64, scheme)[0] == PREFILL
    y = cuda.attend(q, k, v, held, new, None, scheme, books, caches, 128**-0.5)
    with mock.patch.object(torch_attention, "append", cuda.append):
        inputs = (q.float(), k.float(), v.float(), held, new)
        expected = torch_attention.attend(*inputs, None, scheme, books, copies, 128**-0.5, 0, 0.0)
    assert_close(y, expected, new, LIMITS[torch.float16])
    assert_same_caches(caches, copies)


def test_a_captured_graph_serves_all_lengths() -> None:
    case = layer("hq3", 128)
    inputs, caches = case.inputs(torch.float16), case.clone()
    past, new = case.past.clone(), case.new.clone()
    graph, y = captured(lambda: case.attend(inputs, caches, past, new))
    for shift in range(len(PAST)):
        moved = case.new.roll(shift)
        expected = case.attend(inputs, case.clone(), case.past, moved)
        for target, source in zip(caches, case.caches, strict=True):
            for tensor, other in zip(target, source, strict=True):
                tensor.copy_(other)
        new.copy_(moved)
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(bits(y), bits(expected))


def sink_layer(name: str, head_dim: int, sinks: tuple[int, int]) -> Layer:
    """Sequences that hold numbers of tokens around the first ones and the first pages."""
    page = Scheme.parse(name).page_size
    past = (*range(6), 7, page - 1, page, page + 1, 2 * page, 3 * page + 5)
    return Layer(name, head_dim, 3, past, SINK_NEW, sinks)


@pytest.mark.parametrize(("name", "head_dim", "sinks"), SINK_CASES)
def test_the_first_tokens_are_exact(name: str, head_dim: int, sinks: tuple[int, int]) -> None:
    case = sink_layer(name, head_dim, sinks)
    page = case.scheme.page_size
    for dtype in (torch.float16, torch.bfloat16):
        inputs = case.inputs(dtype)
        for window in (0, 1, 5, page, page + 2):
            present = case.clone()
            expected = case.reference(inputs, present, window=window)
            plain = case.attend(inputs, case.clone(), window=window, kernels=PLAIN).float()
            for kernels in KERNELS:
                caches = case.clone()
                y = case.attend(inputs, caches, window=window, kernels=kernels)
                assert_close(y, expected, case.new, LIMITS[dtype])
                assert_close(y, plain, case.new, LIMITS[dtype])
                assert_same_caches(caches, present)


@pytest.mark.parametrize("window", [0, 100])
@pytest.mark.parametrize("kernels", KERNELS)
def test_nan_in_an_exact_row_reaches_the_queries_that_see_it(kernels: int, window: int) -> None:
    """Not those of page 0, and none where the call brings that token."""
    case = sink_layer("hq4", 128, (4, 4))
    inputs, page = case.inputs(torch.float16), case.scheme.page_size
    i = torch.arange(max(SINK_NEW), device=DEVICE)
    time = case.past[:, None] + i
    sees = (i < case.new[:, None]) & (time >= page) & (case.past[:, None] > 2)
    if window:
        sees &= time - window < 2
    assert sees.any()
    for role in (0, 1):
        caches = case.clone()
        caches[role][-1][:, :, page + 2, 3] = torch.nan
        y = case.attend(inputs, caches, window=window, kernels=kernels)
        assert torch.equal(y[..., 3].isnan(), sees[:, None].expand(y.shape[:3]))
        others = y[..., [0, 127]].isnan().any(-1)
        assert torch.equal(others, sees[:, None].expand(y.shape[:3]) if role == 0 else torch.zeros_like(others))


@pytest.mark.parametrize("name", ["hq4", "paper:s96_r4+med3", "fp16", "hq3@p16"])
def test_nan_poisons_what_reads_it_and_nothing_else(name: str) -> None:
    """Rows that see NaN or infinity are those of the plain kernels; the others keep their bits."""
    case = Layer(name, 64, 2)
    q, k, v = case.inputs(torch.float16)
    clean = case.attend((q, k, v), case.clone())
    assert clean.isfinite().all()
    for role in (1, 2):
        rows = [q, k.clone(), v.clone()]
        rows[role][4, 1, 62:64, 3] = torch.tensor([torch.nan, torch.inf], device=DEVICE)
        for window in (0, 100):
            y = case.attend(tuple(rows), case.clone(), window=window)
            plain = case.attend(tuple(rows), case.clone(), window=window, kernels=PLAIN)
            same = case.attend((q, k, v), case.clone(), window=window, kernels=PLAIN)
            seen = ~plain.isfinite()
            assert seen.any()
            assert torch.equal(~y.isfinite(), seen)
            assert ((y - plain)[~seen].float().norm() / same.float().norm()) < LIMITS[torch.float16]
            untouched = case.attend((q, k, v), case.clone(), window=window)
            others = torch.arange(len(PAST), device=DEVICE) != 4
            assert torch.equal(y[others], untouched[others])
            assert torch.equal(y[:, :2], untouched[:, :2])
            assert torch.equal(y[4, :, :62], untouched[4, :, :62])


def test_tokens_without_a_page_are_nan_and_change_no_other_row() -> None:
    case = Layer("hq3", 128, 4)
    inputs = case.inputs(torch.bfloat16)
    past = case.past.clone()
    past[5] = CAPACITY - 10
    new = case.new.clone()
    y = case.attend(inputs, case.clone(), past, new)
    assert cuda.status(y.device)[:2] == (0, 7)
    new[5] = 10
    fitting = case.attend(inputs, case.clone(), past, new)
    assert y[5, :, 10:17].isnan().all()
    y[5, :, 10:17] = 0
    assert torch.equal(bits(y), bits(fitting))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_strides_and_odd_addresses(dtype: torch.dtype) -> None:
    case = layer("hq3", 128)
    inputs = case.inputs(dtype)
    expected = case.attend(inputs, case.clone())
    strided = tuple(x.transpose(1, 2).contiguous().transpose(1, 2) for x in inputs)
    assert torch.equal(bits(case.attend(strided, case.clone())), bits(expected))
    odd = tuple(torch.cat([x[..., :1], x], -1)[..., 1:] for x in inputs)
    assert odd[1].stride(2) == 129
    assert torch.equal(bits(case.attend(odd, case.clone())), bits(expected))


def test_bytes_for_the_largest_call_are_enough_for_smaller_ones() -> None:
    scheme = Scheme.parse("hq4")
    signature: list[object] = [POINTER(AttentionParams), POINTER(RoleParams), POINTER(RoleParams), POINTER(c_size_t)]
    names = ("hqmq_cuda_attention_workspace", "hqmq_cuda_attention_workspace_limit")
    library = cuda.library()
    native.declare(library, dict.fromkeys(names, (c_int, signature)))

    def asked(name: str, batch: int, tokens: int, pages: int, dim: int, group: int) -> int:
        params = AttentionParams(batch, 8, group, tokens, pages, 0, dim**-0.5, 0.0)
        roles = [native.role_params(scheme.role(role), dim, scheme.page_size) for role in ROLES]
        size = c_size_t()
        assert not getattr(library, name)(byref(params), byref(roles[0]), byref(roles[1]), byref(size))
        return int(size.value)

    for dim, group in ((64, 1), (128, 4), (256, 7)):
        most = asked(names[1], 16, 2048, 512, dim, group)
        for batch in (1, 3, 16):
            for tokens in (1, 8, 9, 64, 100, 500, 2048):
                for pages in (0, 1, 40, 511, 512):
                    assert asked(names[0], batch, tokens, pages, dim, group) <= most


@pytest.mark.parametrize(
    ("tokens", "dtype", "name", "words"),
    [
        (300, torch.float32, "hq3", "float32"),
        (8, torch.float16, "paper:s24_r3", "9 tokens and more"),
        (300, torch.float16, "hq3", "256 MiB"),
    ],
)
def test_calls_it_does_not_take_say_why(tokens: int, dtype: torch.dtype, name: str, words: str) -> None:
    q, k = torch.zeros(1, 4, tokens, 128, dtype=dtype), torch.zeros(1, 1, tokens, 128, dtype=dtype)
    path, why = attention_path(q, k, 1 << 14 if words == "256 MiB" else 16, Scheme.parse(name))
    assert path == 0
    assert words in why
