"""The fused decode kernel's way with Med3x outliers, in numpy, against the oracle.

Chunks of outliers decode to zeros (their code is 0, and level 0 of gain MAX is 0.0), so that scores and outputs of the
codes alone lack exactly q·value and weight·value, which are summed sparsely: token by token from the mask's bits, with
the values in the order of the bits. plugins/cuda/decode_outliers.cuh does the same on a GPU.
"""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hqmq_trt import native
from hqmq_trt.scheme import Scheme
from tests.attention_cases import Attention, lengths
from tests.codec_cases import activations

Array = NDArray[np.float64]
SCALE = 0.01
"""Of scores, so small that many tokens have some weight."""


def half_primaries() -> Array:
    """[12, 4] of docs/format.md."""
    halves = [[0.5] + [0.5 - (n >> i & 1) for i in range(3)] for n in range(8)]
    return np.array([*np.eye(4).tolist(), *halves])


def times(p: Array, q: Array) -> Array:
    """Hamilton's product over the last axis."""
    a, b, c, d = np.moveaxis(p, -1, 0)
    e, f, g, h = np.moveaxis(q, -1, 0)
    rows = [a * e - b * f - c * g - d * h, a * f + b * e + c * h - d * g]
    return np.stack([*rows, a * g - b * h + c * e + d * f, a * h + b * g - c * f + d * e], -1)


def codes_alone(scheme: Scheme, codes: NDArray[np.uint16], scales: Array, secondaries: Array, levels: Array) -> Array:
    """[tokens, D] of 16-bit codes [tokens, D/4] without regard to outliers."""
    role, code = scheme.key, codes.astype(np.int64)
    index = code & ((1 << role.index_bits) - 1)
    level = code >> role.index_bits & ((1 << role.radius_bits) - 1)
    sign = 1 - 2 * (code >> (role.code_bits - 1))
    word = times(half_primaries()[index % 12], secondaries[index // 12])
    return ((sign * levels[level] * scales[:, None])[..., None] * word).reshape(len(codes), -1)


def sparse_sums(
    mask: NDArray[np.int32], values: Array, weights: Array, key: bool, chunks: int, page_size: int
) -> Array:
    """What codes lack: scores [tokens] of a query `weights` [D] (key), or outputs [D] of `weights` [tokens]."""
    out = np.zeros(len(mask) * page_size if key else 4 * chunks)
    for page, words in enumerate(mask.view(np.uint32)):
        slot = 0
        for bit in range(page_size * chunks):
            if not words[bit // 32] >> (bit % 32) & 1:
                continue
            token, chunk = page * page_size + bit // chunks, slice(4 * (bit % chunks), 4 * (bit % chunks) + 4)
            if key:
                out[token] += weights[chunk] @ values[page, slot]
            else:
                out[chunk] += weights[token] * values[page, slot]
            slot += 1
    return out


@pytest.mark.parametrize("head_dim", [64, 128])
def test_codes_and_sparse_sums_are_the_oracles_attention(head_dim: int) -> None:
    case = Attention("paper:s96_r4+med3@p16", head_dim, 1, 1, past=(80,), capacity=96)
    page, chunks = 16, head_dim // 4
    x = activations(1, 1, 80, head_dim)
    for role, book, cache in zip((case.scheme.key, case.scheme.value), case.books, case.caches, strict=True):
        native.append(x, lengths(0), lengths(80), role, book, cache)
        x = x.flip(2)
    q, k, v = case.inputs(1)
    expected, _ = case.oracle(q, k, v, lengths(1), SCALE)

    found: list[tuple[Array, NDArray[np.int32], Array]] = []
    counts: list[int] = []
    for cache, book in zip(case.caches, case.books, strict=True):
        words, scales, mask, values, _ = (tensor[0, 0].numpy() for tensor in cache)
        bits = np.ascontiguousarray(words[:80]).view(np.uint16).reshape(80, chunks)
        scale = np.ascontiguousarray(scales).view(np.float16).flatten()[:80].astype(np.float64)
        secondaries, levels = (book[0][0].numpy().astype(np.float64), book[1].numpy().astype(np.float64))
        dense = codes_alone(case.scheme, bits, scale, secondaries, levels)
        found.append((dense, mask[:5], values[:5].astype(np.float64)))
        counts += [sum(int(word).bit_count() for word in row.view(np.uint32)[:-1]) for row in mask[:5]]
        is_outlier = np.unpackbits(mask[:5, :-1].copy().view(np.uint8), bitorder="little").reshape(80, chunks)
        assert not dense.reshape(80, chunks, 4)[is_outlier == 1].any()
    assert max(counts) > 0
    query = q[0, 0, 0].numpy().astype(np.float64)
    (keys, key_mask, key_values), (vals, mask, values) = found
    score = keys @ query + sparse_sums(key_mask, key_values, query, True, chunks, page)
    score = np.append(score, k[0, 0, 0].half().double().numpy() @ query) * SCALE
    weight = np.exp(score - score.max())
    weight /= weight.sum()
    y = weight[:-1] @ vals + sparse_sums(mask, values, weight[:-1], False, chunks, page)
    y += weight[-1] * v[0, 0, 0].half().double().numpy()
    assert torch.allclose(torch.from_numpy(y).float(), expected[0, 0, 0], rtol=1e-4, atol=1e-5)
    dense_only = weight[:-1] @ vals + weight[-1] * v[0, 0, 0].half().double().numpy()
    assert not np.allclose(dense_only, y, rtol=1e-2, atol=1e-3)
