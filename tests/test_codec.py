"""The native codec against the oracle: the same bytes, the same search, the same layout."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch

from hqmq_trt import native, oracle
from hqmq_trt.codebooks import haar, optimised
from hqmq_trt.format import mask_words, planes, words_per_token
from hqmq_trt.oracle.codec import LARGEST_SHORT_SCALE, SHORT_NAN, unpack_scales
from hqmq_trt.scheme import Gain, RoleScheme, Scheme
from tests.codec_cases import activations, cache_digest, cases, codebook, lengths, oracle_quantize, same_bytes

NEAR_TIE_SHARE = 1e-5


@pytest.mark.parametrize(("name", "role_name", "head_dim"), cases())
def test_same_bytes_as_the_oracle(name: str, role_name: str, head_dim: int) -> None:
    scheme = Scheme.parse(name)
    role, page = scheme.role(role_name), scheme.page_size
    book = codebook(role, 2, role_name)
    past, new = lengths(0, page - 3), lengths(page + page // 2 + 1, 4)
    x = activations(2, 2, int(new.max()), head_dim)
    cache = oracle.empty_cache(role, page, head_dim, 2, 2, 2)
    cache["tail"][:] = activations(2, 2, page + role.sink_tokens, head_dim, seed=1)
    want = oracle_quantize(x, past, new, role, book, cache)
    dropped = native.append(x, past, new, role, book, list(cache.values()))
    same_bytes(cache, want)
    if role.med3:
        assert int(want["outlier_mask"][..., :-1].count_nonzero()) > 0
        assert dropped == int(want["outlier_mask"][..., -1].sum())
    else:
        assert dropped == 0


@pytest.mark.parametrize(("secondaries", "count"), [(21, 100_000), (170, 20_000)])
def test_search_agrees_with_the_oracle(secondaries: int, count: int) -> None:
    x = torch.randn(count, 4, generator=torch.Generator().manual_seed(secondaries))
    table = torch.from_numpy(optimised(secondaries).astype(np.float32))
    word, negative, projection = (torch.from_numpy(a) for a in native.search(x, table))
    want = oracle.nearest_word(x, table)
    near_ties = int(((word != want[0]) | (negative != want[1])).sum())
    assert near_ties <= NEAR_TIE_SHARE * count
    torch.testing.assert_close(projection, want[2], rtol=1e-6, atol=0)


@pytest.mark.parametrize("secondaries", [1, 2, 7, 21, 96, 170])
def test_search_equals_brute_force(secondaries: int) -> None:
    x = torch.randn(8_001, 4, generator=torch.Generator().manual_seed(secondaries))
    table = torch.from_numpy(haar(secondaries, 3).astype(np.float32))
    word, negative, projection = native.search(x, table)
    want_word, want_negative, want_projection = (a.numpy() for a in oracle.brute_force_word(x, table))
    np.testing.assert_allclose(projection, want_projection, rtol=2e-6)
    other = (word != want_word) | (negative != want_negative)
    # Words may differ only where two are equally near, up to rounding.
    words = oracle.codec.word_table(table).double().numpy()[word] * np.where(negative, -1.0, 1.0)[:, None]
    reached = (words * x.double().numpy()).sum(1)
    assert np.all(reached[other] >= want_projection[other] * (1 - 1e-6))
    assert other.mean() < 1e-3


def test_ties_take_the_first_secondary_and_zero_has_word_zero() -> None:
    table = np.repeat(haar(1, 5), 3, axis=0).astype(np.float32)
    word, negative, projection = native.search(np.array([[0, 0, 0, 0], [1, 2, 3, 4]], np.float32), table)
    assert word.max() < 12
    assert (word[0], negative[0], projection[0]) == (0, False, 0)


SPLITS = [[1] * 75, [64, 11], [63, 1, 11], [7, 60, 8], [75]]


@pytest.mark.parametrize("name", ["hq4@p16", "paper:s24_r3+med3@p32", "fp16@p16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_any_split_leaves_the_same_bytes(name: str, dtype: torch.dtype) -> None:
    scheme = Scheme.parse(name)
    role, page = scheme.key, scheme.page_size
    book = codebook(role, 2)
    x = activations(1, 75, 2, 64).to(dtype).transpose(1, 2)  # the strides of [B, T, H, D]
    results = []
    for split in SPLITS:
        cache = oracle.empty_cache(role, page, 64, 2, 1, 5)
        start = 0
        for count in split:
            part = x[:, :, start : start + count]
            native.append(part, lengths(start), lengths(count), role, book, list(cache.values()))
            start += count
        results.append(cache)
    same_bytes(
        results[0], oracle_quantize(x, lengths(0), lengths(75), role, book, {k: v * 0 for k, v in cache.items()})
    )
    for cache in results[1:]:
        same_bytes(cache, results[0])


def test_a_sequence_does_not_depend_on_its_batch() -> None:
    scheme = Scheme.parse("hq3@p16")
    book = codebook(scheme.key, 1)
    x = activations(3, 1, 40, 64)
    together = oracle.empty_cache(scheme.key, 16, 64, 1, 3, 3)
    native.append(x, lengths(0, 0, 0), lengths(40, 0, 23), scheme.key, book, list(together.values()))
    for b, count in ((0, 40), (2, 23)):
        alone = oracle.empty_cache(scheme.key, 16, 64, 1, 1, 3)
        native.append(x[b : b + 1], lengths(0), lengths(count), scheme.key, book, list(alone.values()))
        same_bytes(alone, {name: tensor[b : b + 1] for name, tensor in together.items()})
    assert all(int(tensor[1].count_nonzero()) == 0 for tensor in together.values())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 1e6])
@pytest.mark.parametrize("name", ["hq3@p16", "fp16@p16"])
def test_not_finite_is_an_error_and_writes_nothing(bad: float, name: str) -> None:
    scheme = Scheme.parse(name)
    book = codebook(scheme.value, 3)
    x = activations(2, 3, 20, 64)
    x[1, 2, 17, 63] = bad
    cache = oracle.empty_cache(scheme.value, 16, 64, 3, 2, 2)
    message = r"^v holds NaN or infinity \(as fp16\) at sequence 1, head 2, token 21; "
    with pytest.raises(native.HqmqError, match=message):
        native.append(x, lengths(0, 4), lengths(20, 20), scheme.value, book, list(cache.values()), name="v")
    assert all(int(tensor.count_nonzero()) == 0 for tensor in cache.values())
    # Rows past new_length are padding: never read.
    native.append(x, lengths(0, 4), lengths(20, 17), scheme.value, book, list(cache.values()))


@pytest.mark.parametrize("head_dim", [12, 32, 128])
@pytest.mark.parametrize("name", ["hq3", "hq5", "hq:s10_r2", "hq:s42_r4+med3"])
def test_short_scales_from_the_least_to_the_largest(name: str, head_dim: int) -> None:
    """Tokens of every size fp16 has, with a spread within the token that makes the three candidates differ."""
    scheme = Scheme.parse(f"{name}@p256")
    role = replace(scheme.key, hadamard=False, page_mean=False)
    book = codebook(role, 1)
    g = torch.Generator().manual_seed(5)
    size = torch.exp2(torch.linspace(-25, 16, 1024))[:, None]
    x = (torch.randn(1024, head_dim, generator=g) * size).clamp(-65504, 65504)
    x[-64:] = 65504.0 * (1 - 2.0 * (torch.rand(64, head_dim, generator=g) > 0.5))
    cache = oracle.empty_cache(role, 256, head_dim, 1, 1, 4)
    rows = x[None, None].half()
    want = oracle_quantize(rows, lengths(0), lengths(1024), role, book, cache)
    native.append(rows, lengths(0), lengths(1024), role, book, list(cache.values()))
    same_bytes(cache, want)
    found = cache["scales"].view(torch.uint8).flatten()
    assert found.min() == 0
    assert found[-1] in (LARGEST_SHORT_SCALE - 1, LARGEST_SHORT_SCALE)
    assert len(found.unique()) > 200


@pytest.mark.parametrize("name", ["hq3@p16", "paper:s8_r3@p16", "paper:s8_r3+med3@p16"])
def test_nan_in_a_tail_becomes_nan_not_codes(name: str) -> None:
    role = Scheme.parse(name).key
    book = codebook(role, 1)
    cache = oracle.empty_cache(role, 16, 64, 1, 1, 1)
    cache["tail"][:] = activations(1, 1, 16 + role.sink_tokens, 64)
    cache["tail"][0, 0, 6, 9] = float("inf")
    want = oracle_quantize(activations(1, 1, 1, 64), lengths(15), lengths(1), role, book, cache)
    native.append(activations(1, 1, 1, 64), lengths(15), lengths(1), role, book, list(cache.values()))
    same_bytes({k: v for k, v in cache.items() if k != "mean"}, {k: v for k, v in want.items() if k != "mean"})
    assert unpack_scales(cache["scales"][0, 0, 0], role)[6].isnan()
    bits = cache["scales"].view(torch.uint8 if role.gain is Gain.RMS else torch.int16)[0, 0, 0]
    assert int(bits[6]) == (SHORT_NAN if role.gain is Gain.RMS else 0x7E00)
    assert int(cache["codes"][0, 0, 6].count_nonzero()) == 0


def test_too_small_a_cache_names_the_pages_and_writes_nothing() -> None:
    scheme = Scheme.parse("hq3@p16")
    cache = oracle.empty_cache(scheme.key, 16, 64, 1, 2, 2)
    message = "^the cache is too small: sequence 1 needs 3 pages of 16 tokens and the cache has 2; "
    with pytest.raises(native.HqmqError, match=message):
        native.append(
            activations(2, 1, 20, 64),
            lengths(0, 13),
            lengths(20, 20),
            scheme.key,
            codebook(scheme.key, 1),
            [*cache.values()],
        )
    assert all(int(tensor.count_nonzero()) == 0 for tensor in cache.values())


def test_wrong_tensors_are_errors() -> None:
    role = Scheme.parse("hq3@p16").key
    book = codebook(role, 1)
    x = activations(1, 1, 8, 64)
    good = list(oracle.empty_cache(role, 16, 64, 1, 1, 2).values())
    one, zero = lengths(1), lengths(0)
    for message, call in {
        "past_length of sequence 0 is 33": lambda: native.append(x, lengths(33), one, role, book, good),
        "new_length of sequence 0 is 9": lambda: native.append(x, zero, lengths(9), role, book, good),
        "past_length is torch.int64": lambda: native.append(x, zero.long(), one, role, book, good),
        "x is torch.float64": lambda: native.append(x.double(), zero, one, role, book, good),
        "does not fit a cache": lambda: native.append(x[..., :32], zero, one, role, book, good),
        "takes codes, scales, mean, tail": lambda: native.append(x, zero, one, role, book, good[1:]),
        "cache tensor scales is torch.float32": lambda: native.append(
            x, zero, one, role, book, [good[0], good[1].float(), *good[2:]]
        ),
        "codebook secondaries": lambda: native.append(x, zero, one, role, [book[0][:, :20], book[1]], good),
        "needs a codebook": lambda: native.append(x, zero, one, role, [], good),
    }.items():
        with pytest.raises(native.HqmqError, match=message):
            call()


def test_outlier_overflow_is_counted_and_ties_go_to_the_first() -> None:
    role = replace(Scheme.parse("paper:s8_r3+med3@p16").key, outlier_fraction=1 / 32)  # 8 slots
    book = codebook(role, 2)
    x = torch.randn(1, 2, 16, 64, generator=torch.Generator().manual_seed(0)) * 0.1
    x.view(1, 2, 256, 4)[0, 0, 3::17] = torch.tensor([1.0, -2.0, 1.0, 0.5])  # 15 equal outliers
    x.view(1, 2, 256, 4)[0, 0, 200] = 9.0
    x.view(1, 2, 256, 4)[0, 1, ::3] = 0  # many equal norms below the bound
    cache = oracle.empty_cache(role, 16, 64, 2, 1, 1)
    want = oracle_quantize(x, lengths(0), lengths(16), role, book, cache)
    assert native.append(x, lengths(0), lengths(16), role, book, list(cache.values())) == 8
    same_bytes(cache, want)
    assert cache["outlier_mask"][0, 0, 0, -1] == 8
    chosen = np.unpackbits(cache["outlier_mask"][0, 0, 0, :-1].numpy().view(np.uint8), bitorder="little")
    assert np.flatnonzero(chosen).tolist() == [3, 20, 37, 54, 71, 88, 105, 200]


def test_layout_is_the_same_in_cpp_and_python() -> None:
    for secondaries in [*range(1, 1025, 37), 21, 42, 85, 170, 341, 682, 1024]:
        for radius_bits in range(1, 9):
            role = RoleScheme("x", secondaries=secondaries, radius_bits=radius_bits)
            for head_dim in (4, 64, 80, 96, 128, 256):
                found = native.layout(role, head_dim, 64)
                assert found.index_bits == role.index_bits
                assert found.code_bits == role.code_bits
                assert found.words == words_per_token(role, head_dim)
                assert found.mask_words == mask_words(head_dim, 64)
                listed = zip(found.plane_width, found.plane_shift, found.plane_offset, strict=True)
                expected = [(p.width, p.shift, p.offset) for p in planes(role.code_bits, head_dim)]
                assert list(listed)[: found.num_planes] == expected
    fp16 = native.layout(Scheme.parse("fp16").key, 66, 64)
    assert (fp16.words, fp16.num_planes) == (33, 0)


@pytest.mark.parametrize("secondaries", [1, 5, 21, 85, 170, 682, 1024])
def test_pack_is_the_oracles_and_unpack_its_inverse(secondaries: int) -> None:
    rng = np.random.default_rng(secondaries)
    for radius_bits in (1, 3, 6, 8):
        role = RoleScheme("x", secondaries=secondaries, radius_bits=radius_bits)
        for head_dim in (4, 80, 128):
            codes = rng.integers(0, 1 << role.code_bits, (5, head_dim // 4), dtype=np.uint32)
            words = native.pack(codes, role)
            assert np.array_equal(words, oracle.pack(torch.from_numpy(codes.astype(np.int64)), role).numpy())
            assert np.array_equal(native.unpack(words, role, head_dim), codes)


def test_baseline_kernels_and_one_thread_write_the_same_bytes() -> None:
    root = os.path.dirname(os.path.dirname(__file__))
    code = "from tests.codec_cases import cache_digest; print(*cache_digest())"
    environment = {**os.environ, "PYTHONPATH": root, "HQMQ_ISA": "baseline", "HQMQ_NUM_THREADS": "1"}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert run.stdout.split() == ["baseline", "1", cache_digest()[2]]


def test_library_of_another_format_version_is_refused() -> None:
    path = native.library_path(native.HOST_LIBRARY)
    with pytest.raises(native.HqmqError, match=r"is built for format version 3, this package needs 4; rebuild it with"):
        native.load_library(path, expected_format=4)


def test_missing_and_foreign_libraries_are_refused(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(native.LIBRARY_DIR_VARIABLE, str(tmp_path))
    with pytest.raises(native.HqmqError, match=r"libhqmq_host.so is missing; rebuild it with"):
        native.library_path(native.HOST_LIBRARY)
    foreign = native.library_dir() / native.HOST_LIBRARY
    foreign.write_text("not a library")
    with pytest.raises(native.HqmqError, match="cannot load native library"):
        native.load_library(foreign)


def test_levels_of_max_gain_round_half_to_even() -> None:
    # Scale 1 exactly; norms 0.5, 1.5, 2.5 and 7 give levels 0, 2, 2, 7.
    role = RoleScheme("x", secondaries=1, radius_bits=3, gain=Gain.MAX)
    token = torch.tensor([0.5, 0, 0, 0, 1.5, 0, 0, 0, 2.5, 0, 0, 0, 7, 0, 0, 0])
    cache = oracle.empty_cache(role, 8, 16, 1, 1, 1)
    book = [torch.tensor([[[1.0, 0, 0, 0]]]), torch.arange(8.0)]
    native.append(token.repeat(1, 1, 8, 1), lengths(0), lengths(8), role, book, list(cache.values()))
    codes = native.unpack(cache["codes"][0, 0].numpy(), role, 16)
    assert (codes[0] >> role.index_bits & 7).tolist() == [0, 2, 2, 7]


def test_a_callers_threads_run_the_loops() -> None:
    scheme = Scheme.parse("hq3@p16")
    book = codebook(scheme.key, 2)
    x = activations(2, 2, 40, 64)
    past, new = lengths(0, 0), lengths(40, 33)
    own, lent = ([*oracle.empty_cache(scheme.key, 16, 64, 2, 2, 3).values()] for _ in range(2))
    native.append(x, past, new, scheme.key, book, own)
    ran = []

    def parallel_for(pool: int, count: int, body: Callable[[int, int], None], ctx: int) -> None:
        assert pool == 77
        for i in reversed(range(count)):
            body(ctx, i)
            ran.append(i)

    body_type = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)
    callback = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, body_type, ctypes.c_void_p)(parallel_for)
    pointers, params, num_pages = native.role_cache(scheme.key, lent)
    source, x = native.rows(x, "x")
    books, keep = native.codebook_pointers(scheme.key, book, 2)
    arrays = [past.data_ptr(), new.data_ptr(), *books]
    dropped = ctypes.c_int64()
    native.check(
        native.library().hqmq_append(
            ctypes.byref(params), 2, 2, 40, num_pages, ctypes.byref(source), *arrays, ctypes.byref(pointers),
            ctypes.byref(dropped), ctypes.cast(callback, ctypes.c_void_p), ctypes.c_void_p(77),
        )
    )  # fmt: skip
    del keep
    assert 7 in ran  # 2 heads of 2 pages in both sequences
    for a, b in zip(own, lent, strict=True):
        assert torch.equal(a.view(torch.uint8), b.view(torch.uint8))


def test_concurrent_calls_write_the_same_bytes() -> None:
    expected = cache_digest()[2]
    with ThreadPoolExecutor(4) as executor:
        assert {future[2] for future in executor.map(lambda _: cache_digest(), range(8))} == {expected}
