"""The baselines against plain loops over scalars, hand-computed sizes and published tables."""

from __future__ import annotations

import itertools
import math
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.baseline_parts import lloyd_max_levels, rotate, unrotate
from hqmq_trt.eval.baselines import BASELINES, NOT_COMPARED, Baseline, Field, measured_bits, names, parse_baseline
from hqmq_trt.scheme import ROLES

ALL = pytest.mark.parametrize("name", names())
ROLE = pytest.mark.parametrize("role", ROLES)
F32 = np.float32


def data(*shape: int, seed: int = 0) -> Tensor:
    """float16 numbers with channels of different sizes and offsets, as K has them."""
    gen = torch.Generator().manual_seed(seed)
    size = torch.rand(shape[-1], generator=gen) * 2 + 0.2
    offset = torch.randn(shape[-1], generator=gen)
    return (torch.randn(*shape, generator=gen) * size + offset).half().float()


def coded(baseline: Baseline, x: Tensor, role: str = "key") -> np.ndarray[Any, Any]:
    return baseline.decode(baseline.encode(x, role), role).numpy()


def named(fields: list[Field]) -> dict[str, Tensor]:
    return {field.name: field.values for field in fields}


def int_token(x: np.ndarray[Any, Any], bits: int) -> list[np.float32]:
    largest = 2 ** (bits - 1) - 1
    scale = F32(np.float16(max(abs(v) for v in x) / F32(largest)))
    return [F32(min(max(round(float(v / scale)), -largest), largest)) * scale if scale else F32(0) for v in x]


@pytest.mark.parametrize("bits", range(2, 9))
def test_int_is_one_symmetric_scale_a_token(bits: int) -> None:
    x = data(2, 8, 12)
    x[0, 3] = 0
    expected = [[int_token(token, bits) for token in head] for head in x.numpy()]
    np.testing.assert_array_equal(coded(parse_baseline(f"int{bits}@p8"), x), np.array(expected))


@pytest.mark.parametrize("bits", [3, 4])
def test_med3_keeps_large_chunks_exact_and_out_of_the_scale(bits: int) -> None:
    baseline, gen = parse_baseline(f"int{bits}+med3@p4"), torch.Generator().manual_seed(5)
    # Norms of all sizes, so that some lie just above three medians and some just below.
    x = torch.randn(3, 32, 8, generator=gen) * torch.randn(3, 32, 2, generator=gen).exp().repeat_interleave(4, -1)
    x = x.half().float()
    expected, found = np.zeros(x.shape, F32), 0
    for head in range(3):
        for page in range(8):
            tokens = x[head, 4 * page : 4 * page + 4].numpy()
            norms = sorted(math.sqrt(sum(float(v) ** 2 for v in t[c : c + 4])) for t in tokens for c in (0, 4))
            median = norms[(len(norms) - 1) // 2]
            for i, token in enumerate(tokens):
                large = [math.sqrt(sum(float(v) ** 2 for v in token[c : c + 4])) > 3 * median for c in (0, 4)]
                rest = np.array([0 if large[j // 4] else v for j, v in enumerate(token)], F32)
                row = int_token(rest, bits)
                expected[head, 4 * page + i] = [token[j] if large[j // 4] else row[j] for j in range(8)]
                found += sum(large)
    assert 5 < found < 50
    np.testing.assert_array_equal(coded(baseline, x), expected)
    fields = baseline.encode(x, "key")
    assert int(named(fields)["flags"].sum()) == found
    bits_each = bits + 16 / 8 + 0.25 + 64 * found / x.numel()
    assert measured_bits(fields, x.numel()) == pytest.approx(bits_each)
    assert baseline.stored_bits(8, "key", outlier_share=4 * found / x.numel()) == pytest.approx(bits_each)


def q4_0(block: np.ndarray[Any, Any]) -> list[np.float32]:
    largest = F32(0)
    for v in block:
        if abs(v) > abs(largest):
            largest = v
    d = largest / F32(-8)
    inverse = F32(1) / d if d else F32(0)
    return [F32(min(15, int(v * inverse + F32(8.5))) - 8) * F32(np.float16(d)) for v in block]


def q8_0(block: np.ndarray[Any, Any]) -> list[np.float32]:
    d = F32(max(abs(v) for v in block)) / F32(127)
    inverse = F32(1) / d if d else F32(0)
    rounded = [math.copysign(math.floor(abs(float(v * inverse)) + 0.5), v) for v in block]
    return [F32(r) * F32(np.float16(d)) for r in rounded]


@pytest.mark.parametrize(("name", "block"), [("q4_0", q4_0), ("q8_0", q8_0)])
def test_llama_blocks_are_those_of_ggml(name: str, block: Any) -> None:
    x = data(2, 64, 96)
    x[0, 0] = 0
    x[0, 1, :32] = torch.arange(32) - 16  # -16 and no 16
    x[0, 2, :2] = torch.tensor([50.0, -50.0])  # the first of equal sizes decides the sign
    x[0, 3, :32] = torch.arange(32) + 96.5  # q8_0: d = 1.0039, and halves
    x[0, 3, 31] = 127
    y = coded(parse_baseline(name), x)
    np.testing.assert_array_equal(y, np.array([block(b) for b in x.numpy().reshape(-1, 32)]).reshape(x.shape))
    kind = gguf.GGMLQuantizationType[name.upper()]
    np.testing.assert_array_equal(y, gguf.dequantize(gguf.quantize(x.numpy(), kind), kind))


def asymmetric(group: np.ndarray[Any, Any], bits: int) -> list[np.float32]:
    low = min(group)
    scale = F32(np.float16((max(group) - low) / F32(2**bits - 1)))
    return [F32(min(round(float((v - low) / scale)), 2**bits - 1)) * scale + low if scale else F32(low) for v in group]


@pytest.mark.parametrize(("bits", "key_group", "value_group"), [(2, 4, 8), (3, 8, 4), (4, 8, 16)])
def test_kivi_groups_k_by_channel_and_v_by_token(bits: int, key_group: int, value_group: int) -> None:
    baseline, x = parse_baseline(f"kivi-{bits}:k{key_group}v{value_group}@p8"), data(2, 16, 16)
    key, value = np.zeros(x.shape, F32), np.zeros(x.shape, F32)
    for head in range(2):
        for channel in range(16):
            for t in range(0, 16, key_group):
                group = x[head, t : t + key_group, channel].numpy()
                key[head, t : t + key_group, channel] = asymmetric(group, bits)
        for token in range(16):
            for j in range(0, 16, value_group):
                value[head, token, j : j + value_group] = asymmetric(x[head, token, j : j + value_group].numpy(), bits)
    np.testing.assert_array_equal(coded(baseline, x, "key"), key)
    np.testing.assert_array_equal(coded(baseline, x, "value"), value)


def test_kivi_keeps_constant_channels_exact() -> None:
    x = data(1, 64, 64)
    channels = x[:, :1].expand_as(x)
    assert torch.equal(torch.from_numpy(coded(BASELINES["kivi-2"], channels, "key")), channels)
    assert not torch.equal(torch.from_numpy(coded(BASELINES["kivi-2"], channels, "value")), channels)
    tokens = x[..., :1].expand_as(x)
    assert torch.equal(torch.from_numpy(coded(BASELINES["kivi-2"], tokens, "value")), tokens)


def test_rotation_is_orthonormal_with_random_signs() -> None:
    matrix = rotate(torch.eye(64))
    torch.testing.assert_close(matrix @ matrix.T, torch.eye(64), atol=1e-6, rtol=0)
    torch.testing.assert_close(unrotate(matrix), torch.eye(64), atol=1e-6, rtol=0)
    signs = matrix[:, 0] * 8  # row i is sign i times row i of the Hadamard matrix, whose first column is 1
    assert 16 < int((signs > 0).sum()) < 48
    hadamard = torch.tensor([[(-1.0) ** (i & j).bit_count() / 8 for j in range(64)] for i in range(64)])
    torch.testing.assert_close(matrix, signs[:, None] * hadamard)


@pytest.mark.parametrize(
    ("bits", "positive", "mse"),
    [
        (1, [0.7980], 0.3634),
        (2, [0.4528, 1.510], 0.1175),
        (3, [0.2451, 0.7560, 1.344, 2.152], 0.03454),
        (4, [0.1284, 0.3881, 0.6568, 0.9424, 1.256, 1.618, 2.069, 2.733], 0.009497),
    ],
)
def test_levels_are_those_of_max_1960(bits: int, positive: list[float], mse: float) -> None:
    levels = lloyd_max_levels(bits)
    np.testing.assert_allclose(levels[2 ** (bits - 1) :], positive, atol=6e-4)
    assert torch.equal(levels, -levels.flip(0))
    x = np.linspace(-9, 9, 180_001)
    weight = np.exp(-x * x / 2) / math.sqrt(2 * math.pi) * (x[1] - x[0])
    error = np.abs(x[:, None] - levels.double().numpy()).min(1) ** 2
    assert (weight * error).sum() == pytest.approx(mse, rel=1e-3)


@pytest.mark.parametrize("name", ["turbo-2@p8", "turbo-3@p8", "turbo-4@p8", "turbo-3+mean@p8"])
@ROLE
def test_turbo_rotates_and_takes_the_nearest_level(name: str, role: str) -> None:
    baseline, x = parse_baseline(name), data(2, 16, 32)
    x[1, 3] = 0
    matrix, levels = rotate(torch.eye(32)).double().numpy(), lloyd_max_levels(int(name[6])).double().numpy()
    expected = np.zeros(x.shape)
    for head in range(2):
        for page in range(2):
            rows = x[head, 8 * page : 8 * page + 8].double().numpy()
            mean = rows.mean(0).astype(np.float16).astype(float) if "mean" in name and role == "key" else np.zeros(32)
            for i, row in enumerate(rows):
                turned = (row - mean) @ matrix
                scale = float(np.float16(math.sqrt((turned**2).sum() / 32)))
                near = [min(levels, key=lambda level: abs(v - level * scale)) * scale for v in turned]
                expected[head, 8 * page + i] = matrix @ near + mean
    np.testing.assert_allclose(coded(baseline, x, role), expected, atol=2e-5)


def test_page_mean_removes_what_channels_share() -> None:
    x = (torch.randn(1, 128, 64, generator=torch.Generator().manual_seed(1)) + 20 * data(1, 1, 64)).half().float()
    plain, mean = parse_baseline("turbo-4"), parse_baseline("turbo-4+mean")
    error = {b.name: float(((coded(b, x) - x.numpy()) ** 2).mean()) for b in (plain, mean)}
    assert error["turbo-4+mean"] < error["turbo-4"] / 20
    assert error["turbo-4+mean"] == pytest.approx(0.0095, rel=0.15)
    np.testing.assert_array_equal(coded(plain, x, "value"), coded(mean, x, "value"))


def test_fp8_is_the_nearest_e4m3_number_and_saturates() -> None:
    numbers = {}  # value to mantissa; sign, 4 exponent bits (bias 7), 3 mantissa bits; 0x7F is NaN
    for byte in range(0x7F):
        exponent, mantissa = byte >> 3, byte & 7
        numbers[2.0 ** (max(exponent, 1) - 7) * (mantissa / 8 + (exponent > 0))] = mantissa
    grid = sorted(numbers)
    halves = [(a + b) / 2 for a, b in itertools.pairwise(grid)]
    x = torch.cat([torch.tensor(halves), torch.tensor([448.0, 500, 60000]), data(64 * 4 - len(halves) - 3)])
    x = (x * torch.where(torch.arange(256) % 3 == 0, -1, 1)).half().float().reshape(64, 4)
    expected = [
        math.copysign(min(grid, key=lambda g: (abs(abs(v) - g), numbers[g] % 2)), v) for v in x.flatten().tolist()
    ]
    np.testing.assert_array_equal(coded(BASELINES["fp8"], x).reshape(-1), np.array(expected, F32))


@pytest.mark.parametrize(
    ("name", "role", "head_dim", "bits"),
    [
        ("int4", "key", 128, 4 + 16 / 128),
        ("int8", "value", 64, 8.25),
        ("q4_0", "key", 64, 4.5),
        ("q8_0", "value", 128, 8.5),
        ("kivi-2", "key", 128, 3.0),
        ("kivi-2", "value", 128, 3.0),
        ("kivi-4:k128v64", "key", 64, 4.25),
        ("kivi-4:k128v64", "value", 64, 4.5),
        ("turbo-3", "key", 128, 3.125),
        ("turbo-4+mean", "key", 128, 4 + 16 / 128 + 16 / 64),
        ("turbo-4+mean@p256", "key", 128, 4 + 16 / 128 + 16 / 256),
        ("turbo-4+mean", "value", 128, 4.125),
        ("fp8", "key", 80, 8.0),
    ],
)
def test_stored_bits(name: str, role: str, head_dim: int, bits: float) -> None:
    baseline = parse_baseline(name)
    assert baseline.stored_bits(head_dim, role) == pytest.approx(bits, abs=1e-12)
    x = data(2, 3, 2 * baseline.page_size, head_dim)
    assert measured_bits(baseline.encode(x, role), x.numel()) == pytest.approx(bits, abs=1e-12)


@ALL
@ROLE
def test_fields_fit_their_bits_and_pages_stand_alone(name: str, role: str) -> None:
    baseline = BASELINES[name]
    x = data(2, 3 * baseline.page_size, 64)
    x[0, 5, 7] = 300
    fields = baseline.encode(x, role)
    for field in fields:
        if field.bits == 16:
            assert field.values.dtype == torch.float16
            assert field.values.isfinite().all()
        else:
            assert field.values.dtype == torch.uint8
            assert int(field.values.max()) < 2**field.bits
    together = baseline.decode(fields, role)
    assert together.shape == x.shape
    assert together.dtype == torch.float32
    apart = [baseline.decode(baseline.encode(page, role), role) for page in x.split(baseline.page_size, -2)]
    assert torch.equal(together, torch.cat(apart, -2))
    assert torch.equal(baseline.decode(baseline.encode(x[1], role), role), together[1])
    zero = torch.zeros(baseline.page_size, 64)
    assert torch.equal(baseline.decode(baseline.encode(zero, role), role), zero)


@ALL
@ROLE
def test_largest_float16_numbers_stay_finite(name: str, role: str) -> None:
    baseline = BASELINES[name]
    x = torch.full((baseline.page_size, 64), 65504.0)
    x[1::2] *= -1
    x[0] = -65504.0
    assert baseline.decode(baseline.encode(x, role), role).isfinite().all()


@pytest.mark.parametrize(("bits", "mse"), [(2, 0.1175), (3, 0.03454), (4, 0.009497)])
@ROLE
def test_turbo_error_on_any_data_is_that_of_the_levels_on_a_gaussian(bits: int, mse: float, role: str) -> None:
    x = data(4, 128, 128)
    error = ((coded(BASELINES[f"turbo-{bits}"], x, role) - x.numpy()) ** 2).sum() / (x.numpy() ** 2).sum()
    assert error == pytest.approx(mse, rel=0.06)


@pytest.mark.parametrize(("name", "steps"), [("int4", 0.5), ("int8", 0.5), ("q8_0", 0.5), ("kivi-3", 0.5), ("q4_0", 1)])
@ROLE
def test_error_is_within_steps(name: str, steps: float, role: str) -> None:
    baseline, x = BASELINES[name], data(2, 64, 64)
    fields = baseline.encode(x, role)
    step, error = named(fields)["scale"].float().abs(), (baseline.decode(fields, role) - x).abs()
    if name.startswith("kivi") and role == "key":  # scale [..., N, D, P/Gk, 1]
        error = error.unflatten(1, (1, 64)).transpose(-1, -2).unflatten(-1, (-1, 32))
    elif step.dim() > 4:  # scale [..., N, P, D/32, 1]
        error = error.unflatten(1, (1, 64)).unflatten(-1, (-1, 32))
    else:
        error = error.unflatten(1, (1, 64))
    # The largest number of a group lies up to 2^-11 of itself beyond the last level: the scale is a float16.
    slack = 2**-11 * x.abs().max()
    assert bool((error <= steps * step + slack).all())
    assert float((error / step).max()) > 0.9 * steps


def test_spellings() -> None:
    assert all(name == baseline.name for name, baseline in BASELINES.items())
    assert parse_baseline("kivi-2:k32v32").name == "kivi-2"
    assert parse_baseline(" kivi-4:k128v64 ").page_size == 128
    assert parse_baseline("kivi-4:k48v64").page_size == 96
    assert parse_baseline("int5+med3@p128") == parse_baseline(parse_baseline("int5+med3@p128").name)
    assert parse_baseline("int5+med3@p128").page_size == 128
    assert parse_baseline("turbo-2@p64").name == "turbo-2"
    for baseline in BASELINES.values():
        assert baseline.description
        assert baseline.source
    assert all(NOT_COMPARED.values())
    assert not set(NOT_COMPARED) & set(BASELINES)


@pytest.mark.parametrize(
    "text", ["", "fp16", "hq4", "int9", "int4+mean", "q5_0", "kivi-5", "kivi-2:k0v8", "turbo-3+med3", "int4@p0"]
)
def test_unknown_spellings(text: str) -> None:
    with pytest.raises(HqmqError, match=r"unknown baseline.*kivi-2"):
        parse_baseline(text)


def test_what_baselines_refuse() -> None:
    with pytest.raises(HqmqError, match="whole groups of 48"):
        parse_baseline("kivi-2:k48v8@p64")
    page = torch.zeros(64, 64)
    for name, head_dim, match in [
        ("turbo-3", 96, "power of two"),
        ("q4_0", 80, "not divisible"),
        ("kivi-2", 80, "kivi-2:k32v80"),
        ("int4+med3", 6, "not divisible by 4"),
    ]:
        with pytest.raises(HqmqError, match=match):
            BASELINES[name].encode(torch.zeros(64, head_dim), "key")
    with pytest.raises(HqmqError, match="whole pages"):
        BASELINES["int4"].encode(torch.zeros(65, 64), "key")
    with pytest.raises(HqmqError, match="whole pages"):
        BASELINES["int4"].encode(torch.zeros(0, 64), "key")
    with pytest.raises(HqmqError, match="unknown role"):
        BASELINES["int4"].encode(page, "keys")
    for bad in (float("nan"), float("inf"), 1e6):
        with pytest.raises(HqmqError, match="key holds"):
            BASELINES["int4"].encode(torch.full_like(page, bad), "key")
    with pytest.raises(HqmqError, match="outlier_share"):
        BASELINES["int4+med3"].stored_bits(64, "key")
    with pytest.raises(HqmqError, match="no outliers"):
        BASELINES["int4"].stored_bits(64, "key", outlier_share=0.1)
