"""torch.ops.hqmq on CPU (native) and hqmq_trt.torch_attention (any device) against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from hqmq_trt import native, native_attention, oracle, torch_attention, torch_ops
from hqmq_trt.errors import HqmqError
from hqmq_trt.scheme import ROLES
from tests.torch_cases import (
    APPEND,
    ATTEND,
    EVERY_SCHEME,
    OPS,
    Case,
    assert_same_bytes,
    lengths,
    make,
    run_native,
    run_torch,
)


@EVERY_SCHEME
@APPEND
@pytest.mark.parametrize("role", ROLES)
def test_quantize_and_dequantize_follow_the_oracle(
    name: str, head_dim: int, append: Callable[..., None], role: str
) -> None:
    case = make(name, head_dim)
    codec, page = case.scheme.role(role), case.scheme.page_size
    actual, expected = case.empty(role), case.named(role, case.empty(role))
    past = lengths(0, 0)
    for step, new in enumerate([lengths(2 * page + 3, 5), lengths(page - 3, 1), lengths(1, 2 * page)]):
        x = case.x(int(new.max()), step)
        append(case, role, x, past, new, actual)
        expected = oracle.quantize(x, past, new, codec, *case.oracle_books(role), expected)
        past = past + new
    assert_same_bytes(actual, list(expected.values()), codec)
    dense = oracle.dequantize(case.named(role, actual), past, codec, *case.oracle_books(role))
    op = OPS.dequantize(past, case.books(role), actual, case.scheme.name, role, torch.float32)
    vector = torch_attention.load(past, codec, case.books(role), actual, torch.float32)
    torch.testing.assert_close(op, dense, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(vector, dense, rtol=1e-6, atol=1e-6)
    for dtype in (torch.float16, torch.bfloat16):
        half = OPS.dequantize(past, case.books(role), actual, case.scheme.name, role, dtype)
        torch.testing.assert_close(half, op.to(dtype), rtol=1e-2, atol=1e-3)
        assert half.dtype == dtype


@EVERY_SCHEME
@ATTEND
@pytest.mark.parametrize(
    ("window", "softcap", "with_sinks"),
    [(0, 0.0, False), (11, 2.0, True), (40, 0.0, False)],
    ids=["full", "all", "window"],
)
def test_attention_follows_the_oracle(
    name: str, head_dim: int, attend: Callable[..., Tensor], window: int, softcap: float, with_sinks: bool
) -> None:
    case = make(name, head_dim, heads=1 if with_sinks else 2)
    scheme, page = case.scheme, case.scheme.page_size
    sinks = torch.linspace(-1, 2, case.heads * case.group) if with_sinks else None
    scale, past = head_dim**-0.5, lengths(0, 0)
    cache = case.both(case.empty)
    split = len(case.empty("key"))
    named = (case.named("key", cache[:split]), case.named("value", cache[split:]))
    books = [case.oracle_books(role) for role in ROLES]
    for step, new in enumerate([lengths(2 * page + 3, 5), lengths(1, 1), lengths(0, page), lengths(page, 3)]):
        rows = int(new.max())
        q, k, v = case.x(rows, step, case.heads * case.group), case.x(rows, 10 + step), case.x(rows, 20 + step)
        expected, named = oracle.attention(
            q, k, v, past, new, scheme, (books[0][0], books[1][0]), (books[0][1], books[1][1]), named, scale, window,
            softcap, sinks,
        )  # fmt: skip
        y = attend(case, q, k, v, past, new, cache, sinks, scale, window, softcap)
        torch.testing.assert_close(y, expected, rtol=2e-4, atol=2e-4)
        past = past + new
    for role, tensors, oracle_cache in zip(ROLES, (cache[:split], cache[split:]), named, strict=True):
        assert_same_bytes(tensors, list(oracle_cache.values()), scheme.role(role))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@ATTEND
def test_half_precision_attention_is_fp32_attention_rounded(attend: Callable[..., Tensor], dtype: torch.dtype) -> None:
    case = make("hq4@p16", 64)
    q, k, v = (case.x(37, seed, heads).to(dtype) for seed, heads in ((0, 4), (1, 2), (2, 2)))
    rest = (lengths(0, 0), lengths(37, 20))
    y = attend(case, q, k, v, *rest, case.both(case.empty), None, 0.125, 0, 0.0)
    exact = attend(case, q.float(), k.float(), v.float(), *rest, case.both(case.empty), None, 0.125, 0, 0.0)
    assert y.dtype == dtype
    torch.testing.assert_close(y, exact.to(dtype), rtol=1e-2, atol=1e-2)


@ATTEND
@pytest.mark.parametrize("group", [1, 4])
def test_arrival_in_pieces_changes_nothing(attend: Callable[..., Tensor], group: int) -> None:
    case = make("hq3@p16", 64, group=group, batch=1)
    tokens = 75
    q, k, v = case.x(tokens, 0, 2 * group), case.x(tokens, 1), case.x(tokens, 2)
    results = []
    for pieces in ([tokens], [20, 1, 30, 24], [1] * tokens):
        cache, outputs, first = case.both(case.empty), [], 0
        for piece in pieces:
            part = (x[:, :, first : first + piece] for x in (q, k, v))
            outputs.append(attend(case, *part, lengths(first), lengths(piece), cache, None, 0.125, 0, 0.0))
            first += piece
        results.append((torch.cat(outputs, 2), cache))
    for y, cache in results[1:]:
        torch.testing.assert_close(y, results[0][0], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(a, b) for a, b in zip(cache, results[0][1], strict=True))


@ATTEND
def test_a_sequence_does_not_see_its_batch(attend: Callable[..., Tensor]) -> None:
    case, alone = make("paper:s8_r3+med3@p8", 16, batch=3), make("paper:s8_r3+med3@p8", 16, batch=1)
    new = [19, 40, 3]
    q, k, v = case.x(40, 0, 4), case.x(40, 1), case.x(40, 2)
    cache = case.both(case.empty)
    y = attend(case, q, k, v, lengths(0, 0, 0), lengths(*new), cache, None, 0.25, 0, 0.0)
    for b, count in enumerate(new):
        single = alone.both(alone.empty)
        part = (x[b : b + 1, :, :count] for x in (q, k, v))
        expected = attend(alone, *part, lengths(0), lengths(count), single, None, 0.25, 0, 0.0)
        torch.testing.assert_close(y[b, :, :count], expected[0], rtol=1e-5, atol=1e-6)
        assert y[b, :, count:].eq(0).all()
        assert all(torch.equal(a[b], c[0]) for a, c in zip(cache, single, strict=True))


@EVERY_SCHEME
@ATTEND
def test_one_query_sees_every_cached_token(name: str, head_dim: int, attend: Callable[..., Tensor]) -> None:
    case = make(name, head_dim, batch=1, group=1)
    tokens = 3 * case.scheme.page_size + 5
    k, v = case.x(tokens, 0), case.x(tokens, 1)
    cache = case.both(case.empty)
    attend(case, k, k, v, lengths(0), lengths(tokens), cache, None, 1.0, 0, 0.0)
    # Query 0 weighs all keys alike: the answer is the mean over the cache, exact in the own page.
    q, k1, v1 = torch.zeros_like(k[:, :, :1]), case.x(1, 2), case.x(1, 3)
    y = attend(case, q, k1, v1, lengths(tokens), lengths(1), cache, None, 1.0, 0, 0.0)
    split = len(case.empty("key"))
    values = OPS.dequantize(
        lengths(tokens + 1), case.books("value"), cache[split:], case.scheme.name, "value", torch.float32
    )
    torch.testing.assert_close(y[0, :, 0], values[0, :, : tokens + 1].mean(1), rtol=1e-4, atol=1e-5)


def test_functional_operators_leave_their_input_alone() -> None:
    case = make("hq4@p16", 64)
    past = case.both(case.empty)
    before = [tensor.clone() for tensor in past]
    q, k, v = case.x(20, 0, 4), case.x(20, 1), case.x(20, 2)
    args = (lengths(0, 0), lengths(20, 9))
    y, *present = OPS.attention(q, k, v, *args, None, case.both(case.books), past, case.scheme.name, 0.125)
    assert all(torch.equal(a, b) for a, b in zip(past, before, strict=True))
    in_place = OPS.attention_(q, k, v, *args, None, case.both(case.books), past, case.scheme.name, 0.125)
    assert torch.equal(y, in_place)
    assert all(torch.equal(a, b) for a, b in zip(past, present, strict=True))
    split = len(case.empty("key"))
    keys = OPS.quantize(k, *args, case.books("key"), before[:split], case.scheme.name, "key")
    assert all(torch.equal(a, b) for a, b in zip(keys, present[:split], strict=True))
    assert before[0].eq(0).all()


def test_rotate_false_expects_rotated_input() -> None:
    case = make("hq:s170_r4-sinks@p16", 64)  # sink tokens come back as they were given, rotated or not
    x = case.x(32, 0).half().float()
    rotated = oracle.hadamard(x).half()
    args = (lengths(0, 0), lengths(32, 32), case.books("value"))
    cache = OPS.quantize(rotated, *args, case.empty("value"), case.scheme.name, "value", False)
    plain = OPS.dequantize(lengths(32, 32), case.books("value"), cache, case.scheme.name, "value", torch.float32, False)
    turned = OPS.dequantize(lengths(32, 32), case.books("value"), cache, case.scheme.name, "value", torch.float32, True)
    torch.testing.assert_close(oracle.hadamard(plain[:, :, :32]), turned[:, :, :32], rtol=1e-4, atol=1e-5)
    assert (turned[:, :, :32] - x).square().mean() < 0.02 * x.square().mean()


def test_med3_reports_dropped_outliers_in_the_mask() -> None:
    case = make("paper:s8_r3+med3@p8", 16, batch=1, heads=1)
    x = torch.full((1, 1, 8, 16), 0.1)
    x[:, :, :3] = 50.0  # 12 outliers of 32 chunks; a page has 4 slots
    for append in (run_native, run_torch):
        cache = case.empty("key")
        append(case, "key", x, lengths(0), lengths(8), cache)
        assert case.named("key", cache)["outlier_mask"][0, 0, 0, -1] == 8


def bad_input() -> dict[str, tuple[str, Callable[[dict[str, Any]], Any]]]:
    def nan(a: dict[str, Any]) -> None:
        a["v"][1, 0, 2, 3] = float("nan")

    def huge(a: dict[str, Any]) -> None:
        a["k"][0, 0, 0, 0] = 1e6

    return {
        "nan": ("^v(alue)? .*NaN", nan),
        "beyond fp16": ("^k(ey)? .*(fp16|float16)", huge),
        "integer input": ("(?i)float", lambda a: a.update(k=a["k"].int(), v=a["v"].int(), q=a["q"].int())),
        "cache too small": ("(?i)cache.*(small|pages|holds)", lambda a: a.update(past=lengths(90, 0))),
        "scheme": ("unknown scheme 'hq9'", lambda a: a.update(scheme="hq9")),
        "other scheme's cache": ("codes.*expected", lambda a: a.update(scheme="hq3@p16")),
        "rows": ("new_length", lambda a: a.update(new=lengths(11, 1))),
        "negative": ("negative", lambda a: a.update(past=lengths(-1, 0))),
        "int64 lengths": ("past_length.*int32", lambda a: a.update(past=lengths(0, 0).long())),
        "heads": ("k.*expected", lambda a: a.update(q=a["q"][:, :3])),
        "mixed types": ("convert", lambda a: a.update(q=a["q"].half())),
        "few tensors": ("takes codes, scales, mean, tail", lambda a: a.update(cache=a["cache"][:3])),
        "codebook": ("secondaries.*expected", lambda a: a["books"].__setitem__(0, a["books"][0][:, :5])),
    }


@pytest.mark.parametrize("kernels", [native_attention, torch_attention], ids=["native", "torch"])
@pytest.mark.parametrize("what", list(bad_input()))
def test_bad_input_is_refused_and_changes_nothing(
    what: str, kernels: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_ops, "_kernels", lambda x: kernels)
    case = make("hq4@p16", 64)
    match, spoil = bad_input()[what]
    args: dict[str, Any] = {
        "q": case.x(10, 0, 4),
        "k": case.x(10, 1),
        "v": case.x(10, 2),
        "past": lengths(0, 0),
        "new": lengths(10, 7),
        "sinks": None,
        "books": case.both(case.books),
        "cache": case.both(case.empty),
        "scheme": case.scheme.name,
        "scale": 0.125,
    }
    cache = args["cache"]
    spoil(args)
    with pytest.raises(HqmqError, match=match) as error:
        OPS.attention_(*args.values())
    assert "\n" not in str(error.value)
    assert all(tensor.eq(0).all() for tensor in cache)


def test_nan_in_padding_rows_is_no_mistake() -> None:
    case = make("hq4@p16", 64)
    x = case.x(20, 0)
    x[1, :, 5:] = float("nan")
    cache = OPS.quantize(
        x, lengths(0, 0), lengths(20, 5), case.books("key"), case.empty("key"), case.scheme.name, "key"
    )
    dense = OPS.dequantize(lengths(20, 5), case.books("key"), cache, case.scheme.name, "key", torch.float32)
    assert dense.isfinite().all()


def test_missing_native_library_is_an_error_that_says_how_to_build(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    case = make("hq4@p16", 64)
    monkeypatch.setenv(native.LIBRARY_DIR_VARIABLE, str(tmp_path))
    native.library.cache_clear()
    try:
        with pytest.raises(HqmqError, match="pip install"):
            run_native(case, "key", case.x(20, 0), lengths(0, 0), lengths(20, 5), case.empty("key"))
    finally:
        native.library.cache_clear()


@pytest.mark.parametrize("name", ["quantize", "quantize_", "dequantize", "attention", "attention_"])
def test_opcheck(name: str) -> None:
    case = make("paper:s8_r3+med3@p8", 16)
    past, new = lengths(3, 0), lengths(9, 4)
    q, k, v = case.x(9, 0, 4), case.x(9, 1), case.x(9, 2)
    if name == "dequantize":
        args: tuple[Any, ...] = (new, case.books("key"), case.empty("key"), case.scheme.name, "key", torch.bfloat16)
    elif name.startswith("quantize"):
        args = (k, past, new, case.books("key"), case.empty("key"), case.scheme.name, "key")
    else:
        cache = case.both(case.empty)
        args = (q, k, v, past, new, torch.zeros(4), case.both(case.books), cache, case.scheme.name, 0.25, 5, 1.0)
    results = torch.library.opcheck(getattr(OPS, name).default, args)
    assert set(results.values()) == {"SUCCESS"}


class _Layer(torch.nn.Module):
    def __init__(self, case: Case) -> None:
        super().__init__()
        self.case = case

    def forward(self, q: Tensor, k: Tensor, v: Tensor, past: Tensor, new: Tensor, cache: list[Tensor]) -> list[Tensor]:
        case = self.case
        out = OPS.attention(q, k, v, past, new, None, case.both(case.books), cache, case.scheme.name, 0.125)
        keys = out[1 : 1 + len(case.empty("key"))]
        return [*out, OPS.dequantize(past + new, case.books("key"), keys, case.scheme.name, "key", torch.float32)]


def test_export_keeps_batch_rows_and_capacity_dynamic() -> None:
    case = make("hq4@p16", 64)
    model = _Layer(case)

    def inputs(case: Case, rows: int, counts: list[int]) -> tuple[Any, ...]:
        new = lengths(*counts)
        return (
            case.x(rows, 0, 4), case.x(rows, 1), case.x(rows, 2), torch.zeros_like(new), new, case.both(case.empty)
        )  # fmt: skip

    auto = torch.export.Dim.AUTO
    grows = [{0: auto} if name == "tail" else {0: auto, 2: auto} for name in torch_ops.tensor_names(case.scheme.key)]
    grows += [{0: auto} if name == "tail" else {0: auto, 2: auto} for name in torch_ops.tensor_names(case.scheme.value)]
    rows = {0: auto, 2: auto}
    program = torch.export.export(
        model, inputs(case, 20, [20, 7]), dynamic_shapes=(rows, rows, rows, {0: auto}, {0: auto}, grows)
    )
    other = make("hq4@p16", 64, batch=3, pages=9)
    args = inputs(other, 50, [50, 1, 33])
    for a, b in zip(program.module()(*args), model(*args), strict=True):
        assert a.shape == b.shape
        assert torch.equal(a, b)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@EVERY_SCHEME
def test_plain_torch_on_cuda_follows_the_oracle(name: str, head_dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HQMQ_TORCH_CUDA", "1")
    case = make(name, head_dim)
    scheme, page, past = case.scheme, case.scheme.page_size, lengths(0, 0)
    cache = [tensor.cuda() for tensor in case.both(case.empty)]
    split = len(case.empty("key"))
    named = tuple(case.named(role, case.empty(role)) for role in ROLES)
    (key_book, key_levels), (value_book, value_levels) = (case.oracle_books(role) for role in ROLES)
    for step, new in enumerate([lengths(2 * page + 3, 5), lengths(1, 1), lengths(page, 3)]):
        rows = int(new.max())
        q, k, v = case.x(rows, step, 4), case.x(rows, 10 + step), case.x(rows, 20 + step)
        expected, named = oracle.attention(
            q, k, v, past, new, scheme, (key_book, value_book), (key_levels, value_levels), (named[0], named[1]),
            head_dim**-0.5, 40, 2.0,
        )  # fmt: skip
        on_gpu = [x.cuda() for x in (q, k, v, past, new)]
        books = [book.cuda() for book in case.both(case.books)]
        y = OPS.attention_(*on_gpu, None, books, cache, scheme.name, head_dim**-0.5, 40, 2.0)
        torch.testing.assert_close(y.cpu(), expected, rtol=2e-4, atol=2e-4)
        past = past + new
    for role, tensors, oracle_cache in zip(ROLES, (cache[:split], cache[split:]), named, strict=True):
        assert_same_bytes([tensor.cpu() for tensor in tensors], list(oracle_cache.values()), scheme.role(role))
        dense = OPS.dequantize(past.cuda(), [b.cuda() for b in case.books(role)], tensors, scheme.name, role, q.dtype)
        expected = oracle.dequantize(oracle_cache, past, scheme.role(role), *case.oracle_books(role))
        assert ((dense.cpu() - expected).abs() > 1e-3).float().mean() < 1e-3  # near-ties decode to a neighbour
