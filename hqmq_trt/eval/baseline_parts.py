"""Parts of the KV-cache baselines: what they store, Lloyd-Max levels and the random rotation."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from hqmq_trt.errors import HqmqError
from hqmq_trt.oracle.codec import hadamard

_SIGN_SEED = 2504_19874


@dataclass(frozen=True)
class Field:
    """One tensor of what a baseline stores.

    Attributes:
        name: what it is (codes, scale, zero, flags, outliers, mean).
        values: uint8 integers below 2^bits (e4m3 bytes for fp8), or float16.
        bits: stored bits of one value; 16 for float16.
    """

    name: str
    values: Tensor
    bits: int


def measured_bits(fields: Sequence[Field], elements: int) -> float:
    """Stored bits per element of what `fields` hold, for `elements` coded numbers."""
    return sum(field.values.numel() * field.bits for field in fields) / elements


@lru_cache
def lloyd_max_levels(bits: int) -> Tensor:
    """The 2^bits levels of least squared error for a unit Gaussian (Max 1960, table I), float32, ascending.

    Raises:
        HqmqError: bits not in 1…6.
    """
    if not 1 <= bits <= 6:
        raise HqmqError(f"Lloyd-Max levels for {bits} bits: choose 1…6")
    # Symmetric, so only the cells above 0: a level is the mean of its cell, E[x; a<x<b] / P(a<x<b).
    count = 2 ** (bits - 1)
    levels = [3.0 * (i + 0.5) / count for i in range(count)]
    for _ in range(20_000):
        edges = [0.0, *((a + b) / 2 for a, b in itertools.pairwise(levels)), math.inf]
        density = [math.exp(-e * e / 2) / math.sqrt(2 * math.pi) for e in edges]
        above = [math.erfc(e / math.sqrt(2)) / 2 for e in edges]
        new = [(density[i] - density[i + 1]) / (above[i] - above[i + 1]) for i in range(count)]
        moved = max(abs(a - b) for a, b in zip(new, levels, strict=True))
        levels = new
        if moved < 1e-12:
            break
    return torch.tensor([-level for level in reversed(levels)] + levels, dtype=torch.float32)


@lru_cache
def _signs(head_dim: int) -> Tensor:
    """Random signs ±1, float32 [head_dim], the same on every run and device."""
    generator = torch.Generator().manual_seed(_SIGN_SEED + head_dim)
    return torch.randint(0, 2, (head_dim,), generator=generator).float() * 2 - 1


def rotate(x: Tensor) -> Tensor:
    """Random signs, then the orthonormal Hadamard transform of the last axis: a fast random rotation."""
    return hadamard(x * _signs(x.shape[-1]).to(x.device))


def unrotate(x: Tensor) -> Tensor:
    """The inverse of :func:`rotate`."""
    return hadamard(x) * _signs(x.shape[-1]).to(x.device)
