"""Schemes, data and comparisons that the codec's tests share."""

from __future__ import annotations

import hashlib
import itertools

import torch
from torch import Tensor

from hqmq_trt import codebooks, native, oracle
from hqmq_trt.scheme import PRESETS, ROLES, RoleScheme, Scheme

PAPER = ("paper:s24_r3", "paper:s96_r4", "paper:s96_r4+med3", "paper:s8_r2+med3", "paper:s1_r1", "paper:s3_r8+med3")
NARROW = ("hq:s5_r3",)
"""Ours with 10-bit codes as hq2.5 has them, in other parts."""


def cases() -> list[tuple[str, str, int]]:
    """(scheme, role, head_dim): presets over head_dim and page size, paper schemes also with odd head_dim."""
    result = []
    for name, role in itertools.product((*PRESETS, *NARROW), ROLES):
        result += [(f"{name}@p{page}", role, head_dim) for head_dim, page in ((64, 128), (128, 64), (256, 16))]
    for name in PAPER:
        result += [(f"{name}@p{page}", "key", head_dim) for head_dim, page in ((64, 64), (80, 16), (96, 128))]
    return result


def codebook(role: RoleScheme, heads: int, role_name: str = "key", layer: int = 0) -> list[Tensor]:
    """[secondaries, levels] of a role, or [] for fp16."""
    if not role.packed:
        return []
    secondaries = codebooks.secondaries(role, 0, layer, heads, role_name)
    return [torch.from_numpy(secondaries), torch.from_numpy(codebooks.levels(role))]


def activations(*shape: int, seed: int = 0) -> Tensor:
    """Like K: channels of very different size and offset, tokens of different size, some zeros; float32."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=g)
    channel = torch.exp(0.8 * torch.randn(shape[-1], generator=g))
    x = x * channel * torch.exp(0.5 * torch.randn(*shape[:-1], 1, generator=g))
    x = x + 2.0 * torch.randn(shape[-1], generator=g)
    x[:, :, 5::29] = 0
    x[..., : shape[-1] // 2] *= (torch.rand(shape[:-1], generator=g) > 0.05)[..., None]
    return x


def oracle_quantize(
    x: Tensor, past: Tensor, new: Tensor, role: RoleScheme, book: list[Tensor], cache: dict[str, Tensor]
) -> dict[str, Tensor]:
    """The oracle's present cache; `book` as from :func:`codebook`."""
    secondaries, levels = book or (torch.zeros(x.shape[1], 0, 4), torch.zeros(0))
    return oracle.quantize(x, past, new, role, secondaries, levels, cache)


def lengths(*values: int) -> Tensor:
    """An int32 [B] tensor."""
    return torch.tensor(values, dtype=torch.int32)


def same_bytes(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    """Assert that two caches hold identical bytes."""
    assert a.keys() == b.keys()
    for name, tensor in a.items():
        x, y = (t.contiguous().view(torch.uint8) for t in (tensor, b[name]))
        assert torch.equal(x, y), f"{name}: {int((x != y).sum())} of {x.numel()} bytes differ"


def cache_digest() -> tuple[str, int, str]:
    """Instruction set, threads, and sha256 of what the native codec writes for a few schemes."""
    digest = hashlib.sha256()
    for name in ("hq3", "hq5", "paper:s24_r3+med3"):
        role = Scheme.parse(f"{name}@p16").key
        cache = oracle.empty_cache(role, 16, 64, 2, 1, 3)
        native.append(activations(1, 2, 40, 64), lengths(0), lengths(40), role, codebook(role, 2), list(cache.values()))
        for tensor in cache.values():
            digest.update(tensor.numpy().tobytes())
    return native.versions()["isa"], native.num_threads(), digest.hexdigest()
