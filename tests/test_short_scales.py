"""Short scales: 8 bits, chosen among three by the error they leave (docs/format.md, "Arithmetic", steps 6 to 9)."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from hqmq_trt import native, oracle, torch_codec
from hqmq_trt.codebooks import levels, secondaries
from hqmq_trt.oracle import codec
from hqmq_trt.scheme import RoleScheme, Scheme
from tests.codec_cases import lengths

NAMES = ["hq:s10_r2", "hq3", "hq3.5", "hq4", "hq5", "hq:s21_r3+med3"]
PAGE, HEAD_DIM = 16, 64


def book(role: RoleScheme) -> tuple[Tensor, Tensor]:
    """Secondaries [1, S, 4] and levels of V's first head."""
    return torch.from_numpy(secondaries(role, 0, 0, 1, "value")), torch.from_numpy(levels(role))


def tokens(seed: int = 0) -> Tensor:
    """float16 [PAGE, HEAD_DIM]: of all sizes, and the first one zeros."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(PAGE, HEAD_DIM, generator=g) * torch.logspace(-6, 4, PAGE)[:, None]
    x[0] = 0
    return x.clamp(-65504, 65504).half()


def test_every_short_scale_is_the_upper_half_of_fp16() -> None:
    role = Scheme.parse("hq3").value
    numbers = codec.scale_of_short(torch.arange(256))
    assert numbers[0] == 0
    assert numbers[1] == 2.0**-17
    assert numbers[247] == 61440
    assert numbers[255].isnan()
    assert numbers[248].isinf()
    assert (numbers[1:248] > numbers[:247]).all()
    finite = numbers[:248]
    assert torch.equal(codec.short_scale(finite), torch.arange(248))
    for module in (codec, torch_codec):
        words = module.pack_scales(finite, role)
        assert words.shape == (62,)
        assert torch.equal(module.unpack_scales(words, role), finite)
    # Half way between two, the larger one; 65504 is no short scale.
    between = torch.tensor([1.0625, 65504.0], dtype=torch.float16)
    assert codec.scale_of_short(codec.short_scale(between)).tolist() == [1.125, 61440.0]


@pytest.mark.parametrize("name", ["paper:s96_r4", "paper:s24_r3+med3"])
def test_scales_of_the_paper_stay_fp16(name: str) -> None:
    role = Scheme.parse(name).value
    assert role.scale_bits == 16
    x = torch.tensor([0.1, 3.0, float("nan"), 65504.0, 0.0, 1e-7, 2.0, 7.0], dtype=torch.float16)
    words = codec.pack_scales(x, role)
    assert words.numpy().tobytes() == x.numpy().tobytes()
    assert torch.equal(codec.unpack_scales(words, role).nan_to_num(9), x.nan_to_num(9))


@pytest.mark.parametrize("name", NAMES)
def test_all_codecs_choose_the_same_scales(name: str) -> None:
    role = Scheme.parse(name + f"@p{PAGE}").value
    key, level = book(role)
    x = tokens()
    x[3, 7] = math.inf
    page = codec.encode_page(x, role, key[0], level)
    want = codec.pack_scales(page.scales, role)
    assert page.scales.isnan().nonzero().tolist() == [[3]]
    assert page.scales[0] == 0
    assert not page.codes[[0, 3]].any()
    x[3] = 0  # torch and the library refuse infinity where they can
    want[0] = codec.pack_scales(codec.encode_page(x, role, key[0], level).scales, role)[0]
    found = torch_codec.encode_pages(x[None, None], role, key, level).scales
    assert found is not None
    assert torch.equal(found[0, 0], want)
    cache = oracle.empty_cache(role, PAGE, HEAD_DIM, 1, 1, 1)
    native.append(x[None, None].float(), lengths(0), lengths(PAGE), role, [key, level], list(cache.values()))
    assert torch.equal(cache["scales"][0, 0, 0], want)


@pytest.mark.parametrize("name", NAMES[:-1])
def test_no_scale_beside_the_chosen_one_is_better(name: str) -> None:
    role = Scheme.parse(name).value
    key, level = book(role)
    x = tokens(1)
    page = codec.encode_page(x, role, key[0], level)
    rotated = codec.hadamard(x.float()).reshape(PAGE, -1, 4)
    _, _, projection = codec.nearest_word(rotated.reshape(-1, 4), key[0])
    projection = projection.reshape(PAGE, -1)
    raw = (rotated.double().square().sum((1, 2)) / HEAD_DIM).sqrt()
    nearest = codec.short_scale(raw.half())

    def error(short: Tensor) -> Tensor:
        """Squared error of tokens whose scales are `short`, with the best of all levels, in float64."""
        radius = level.double() * codec.scale_of_short(short).double()[:, None, None]
        return (radius**2 - 2 * radius * projection.double()[..., None]).amin(-1).sum(1)

    chosen = codec.short_scale(page.scales)
    assert ((chosen - nearest).abs() <= 1).all()
    for step in (-1, 0, 1):
        other = (nearest + step).clamp(1, codec.LARGEST_SHORT_SCALE)
        coded = nearest > 0
        assert (error(chosen)[coded] <= error(other)[coded] * (1 - 1e-5) + 1e-12).all()
    assert (chosen != nearest).any() or name == "hq5"
    x_hat = codec.decode_page(page, role, key[0], level)
    measured = (x_hat - x.float()).double().square().sum(1)
    expected = (error(chosen) + rotated.double().square().sum((1, 2)))[nearest > 0]
    assert torch.allclose(measured[nearest > 0], expected, rtol=1e-3)
