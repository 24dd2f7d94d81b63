"""Oracle of the codec: one page of one head to codes and back.

Shapes: P tokens a page, D = head_dim, C = D/4 chunks a token. Everything is float32; what the cache stores in
fp16 is rounded to fp16 at the point where it is stored, and used as rounded.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from hqmq_trt.codebooks import HALF_PRIMARIES
from hqmq_trt.format import LARGEST_SHORT_SCALE, SHORT_NAN, planes, words_per_token
from hqmq_trt.scheme import OUTLIER_FACTOR, Gain, RoleScheme

_HALF_MAX = 65504.0
_SEARCH_BLOCK = 1 << 14


@dataclass
class EncodedPage:
    """A coded page of one head: `codes` int64 [P, C], `scales` fp16 [P], `mean` fp16 [D] or None, outliers.

    Short scales are widened to fp16. `outlier` is bool [P, C]; `outlier_value` fp16 [n, 4] in the order of the set
    bits; `dropped` counts outliers that found no slot.
    """

    codes: Tensor
    scales: Tensor
    mean: Tensor | None
    outlier: Tensor | None
    outlier_value: Tensor | None
    dropped: int


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """a*b + c rounded once (the product of two float32 is exact in float64)."""
    return (a.double() * b.double() + c.double()).float()


def tree_sum(x: Tensor, dim: int) -> Tensor:
    """Sum over `dim` by halves: pad with zeros to a power of two, add the upper half to the lower, repeat."""
    x = x.movedim(dim, -1)
    size = 1 << max(x.shape[-1] - 1, 0).bit_length()
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    while x.shape[-1] > 1:
        half = x.shape[-1] // 2
        x = x[..., :half] + x[..., half:]
    return x[..., 0]


def hadamard(x: Tensor) -> Tensor:
    """Orthonormal Walsh-Hadamard transform (Sylvester order) of the last axis: strides 1, 2, 4, …, then 1/√D."""
    size = x.shape[-1]
    stride = 1
    while stride < size:
        pairs = x.reshape(*x.shape[:-1], size // (2 * stride), 2, stride)
        low, high = pairs[..., 0, :], pairs[..., 1, :]
        x = torch.stack([low + high, low - high], dim=-2).reshape(x.shape)
        stride *= 2
    return x * torch.tensor(1.0 / math.sqrt(size), dtype=torch.float32)


def rotate(x: Tensor, secondaries: Tensor) -> Tensor:
    """v = x * conj(q) for chunks x [N, 4] and secondaries q [S, 4]: float32 [N, S, 4], as a chain of three fmas."""
    a, b, c, d = secondaries.unbind(-1)
    columns = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    x0, x1, x2, x3 = (component[:, None] for component in x.unbind(-1))
    return torch.stack([fma(x3, e3, fma(x2, e2, fma(x1, e1, x0 * e0))) for e0, e1, e2, e3 in columns], dim=-1)


def nearest_word(x: Tensor, secondaries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Codeword nearest in angle to chunks x [N, 4]: (word index [N] in 12*S, negative [N], projection [N]).

    The nearest Hurwitz unit to v has score max(max|v_i|, ½Σ|v_i|); the first best secondary wins ties.
    """
    words, negatives, projections = [], [], []
    for block in x.split(_SEARCH_BLOCK):
        v = rotate(block, secondaries)
        size = v.abs()
        axis = torch.maximum(torch.maximum(size[..., 0], size[..., 1]), torch.maximum(size[..., 2], size[..., 3]))
        half = 0.5 * ((size[..., 0] + size[..., 1]) + (size[..., 2] + size[..., 3]))
        score = torch.maximum(axis, half)
        best = score.argmax(1)  # the first of equal scores
        row = torch.arange(len(block))
        v, is_axis = v[row, best], axis[row, best] >= half[row, best]
        longest = v.abs().argmax(-1)
        minus = v < 0
        flip = minus ^ minus[:, :1]
        half_primary = 4 + flip[:, 1].long() + 2 * flip[:, 2].long() + 4 * flip[:, 3].long()
        words.append(best * 12 + torch.where(is_axis, longest, half_primary))
        negatives.append(torch.where(is_axis, minus[row, longest], minus[:, 0]))
        projections.append(score[row, best])
    return torch.cat(words), torch.cat(negatives), torch.cat(projections)


def brute_force_word(x: Tensor, secondaries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The same answer by searching all 24*S codewords with float64 dot products (slow; for tests)."""
    table = word_table(secondaries).double()
    score = x.double() @ table.T
    word = score.abs().argmax(1)
    projection = score[torch.arange(len(x)), word]
    return word, projection < 0, projection.abs()


def word_table(secondaries: Tensor) -> Tensor:
    """The 12*S codewords up to sign [12*S, 4]: primary p (left) times secondary s at s*12 + p, rounded once."""
    p, q = torch.from_numpy(HALF_PRIMARIES)[None], secondaries.double()[:, None]
    pw, px, py, pz = p.unbind(-1)
    qw, qx, qy, qz = q.unbind(-1)
    product = [
        pw * qw - px * qx - py * qy - pz * qz,
        pw * qx + px * qw + py * qz - pz * qy,
        pw * qy - px * qz + py * qw + pz * qx,
        pw * qz + px * qy - py * qx + pz * qw,
    ]
    return torch.stack(product, dim=-1).reshape(-1, 4).float()


def _outliers(norm2: Tensor, capacity: int) -> tuple[Tensor, int]:
    """Med3x over a page: bool [P, C] of the outliers that get a slot, and how many got none.

    Outlier: norm > C * (lower) median of the page's norms, compared as squares; the largest win, then the first.
    """
    flat = norm2.flatten()
    median = flat.sort().values[(len(flat) - 1) // 2]
    above = (flat > (OUTLIER_FACTOR * OUTLIER_FACTOR) * median).nonzero()[:, 0]
    order = flat[above].sort(descending=True, stable=True).indices[:capacity]
    chosen = torch.zeros_like(flat, dtype=torch.bool)
    chosen[above[order]] = True
    return chosen.reshape(norm2.shape), max(len(above) - capacity, 0)


def short_scale(scales: Tensor) -> Tensor:
    """The nearest short scale, int64 0…247, of finite fp16 numbers of at least 0."""
    return ((scales.view(torch.int16).long() + 64) >> 7).clamp_max(LARGEST_SHORT_SCALE)


def scale_of_short(short: Tensor) -> Tensor:
    """fp16 numbers of short scales, integers in 0…255."""
    return (short << 7).to(torch.int16).view(torch.float16)


def _best_scale(scales: Tensor, projection: Tensor, counted: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Of the short scale nearest to `scales` [P] and the two beside it the one that leaves the least error, as fp16
    [P], and the levels [P, C] that go with it; `projection` and `counted`: [P, C]."""
    nearest = short_scale(scales)
    middle = (levels[1:] + levels[:-1]) * 0.5
    best_error = torch.full(scales.shape, math.inf)
    best_scale, best_level = torch.zeros_like(scales), torch.zeros(projection.shape, dtype=torch.int64)
    for short in (nearest, nearest - 1, nearest + 1):
        allowed = (nearest > 0) & (short >= 1) & (short <= LARGEST_SHORT_SCALE)
        scale = scale_of_short(short.clamp(1, LARGEST_SHORT_SCALE))
        level = (projection / scale.float()[:, None])[..., None].gt(middle).sum(-1)
        radius = levels[level] * scale.float()[:, None]
        error = tree_sum(torch.where(counted, radius * (radius - (projection + projection)), 0.0), 1)
        better = allowed & (error < best_error)
        best_error = torch.where(better, error, best_error)
        best_scale = torch.where(better, scale, best_scale)
        best_level = torch.where(better[:, None], level, best_level)
    return best_scale, best_level


def encode_page(page: Tensor, role: RoleScheme, secondaries: Tensor, levels: Tensor) -> EncodedPage:
    """Code one full page [P, D] (fp16 values) of one head with secondaries [S, 4] and levels [2^r].

    A token with a non-finite element (after rotation and mean) gets scale NaN and zero codes: it decodes to NaN.
    """
    tokens, head_dim = page.shape
    x = page.half().float()
    if role.hadamard:
        x = hadamard(x)
    mean = None
    if role.page_mean:
        mean = (tree_sum(x, 0) * torch.tensor(1.0 / tokens, dtype=torch.float32)).half()
        x = x - mean.float()
    chunks = x.reshape(tokens, head_dim // 4, 4)
    square = chunks * chunks
    norm2 = (square[..., 0] + square[..., 1]) + (square[..., 2] + square[..., 3])
    finite = norm2.isfinite().all(1)
    norm2 = torch.where(finite[:, None], norm2, 0.0)

    outlier, outlier_value, dropped = torch.zeros_like(norm2, dtype=torch.bool), None, 0
    if role.med3:
        outlier, dropped = _outliers(norm2, role.outlier_capacity(head_dim, tokens))
        outlier_value = chunks[outlier].clamp(-_HALF_MAX, _HALF_MAX).half()
    kept = torch.where(outlier, 0.0, norm2)
    if role.gain is Gain.MAX:
        raw = kept.amax(1).sqrt() / float(2**role.radius_bits - 1)
    else:
        count = 4.0 * (~outlier).sum(1).clamp_min(1)
        raw = (tree_sum(kept, 1) / count).sqrt()
    scales = raw.clamp_max(_HALF_MAX).half()

    word, negative, projection = nearest_word(chunks.reshape(-1, 4), secondaries)
    if role.gain is Gain.MAX:
        level = (norm2.sqrt() / scales.float()[:, None]).round().clamp_max(len(levels) - 1)
    else:
        scales, level = _best_scale(scales, projection.reshape(norm2.shape), ~outlier, levels)
    coded = ~outlier & (scales.float()[:, None] > 0) & finite[:, None]
    level = torch.where(coded, level, 0).long()
    code = word.reshape(norm2.shape) | level << role.index_bits
    code = code | negative.reshape(norm2.shape).long() << (role.index_bits + role.radius_bits)
    scales = torch.where(finite, scales, torch.tensor(float("nan"), dtype=torch.float16))
    return EncodedPage(
        torch.where(coded, code, 0), scales, mean, outlier if role.med3 else None, outlier_value, dropped
    )


def decode_page(page: EncodedPage, role: RoleScheme, secondaries: Tensor, levels: Tensor) -> Tensor:
    """Decode a page to float32 [P, D], page mean added and Hadamard rotation undone."""
    index = page.codes & ((1 << role.index_bits) - 1)
    level = (page.codes >> role.index_bits) & ((1 << role.radius_bits) - 1)
    negative = (page.codes >> (role.index_bits + role.radius_bits)).bool()
    radius = levels[level] * page.scales.float()[:, None]
    chunks = word_table(secondaries)[index] * torch.where(negative, -radius, radius)[..., None]
    if page.outlier is not None and page.outlier_value is not None:
        chunks[page.outlier] = page.outlier_value.float()
    x = chunks.reshape(len(chunks), -1)
    if page.mean is not None:
        x = x + page.mean.float()
    return hadamard(x) if role.hadamard else x


def pack_scales(scales: Tensor, role: RoleScheme) -> Tensor:
    """fp16 scales of a page [P] to its words, int32 [Z]."""
    bits = scales.view(torch.int16).long() & 0xFFFF
    bits = torch.where(scales.isnan(), SHORT_NAN, bits >> 7) if role.scale_bits == 8 else bits
    fields = bits.reshape(-1, 32 // role.scale_bits) << torch.arange(0, 32, role.scale_bits)
    words = fields.sum(1)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack_scales(words: Tensor, role: RoleScheme) -> Tensor:
    """Words of a page, int32 [Z], to fp16 scales [P]; the inverse of :func:`pack_scales`."""
    bits = (words.long()[:, None] >> torch.arange(0, 32, role.scale_bits)) & ((1 << role.scale_bits) - 1)
    if role.scale_bits == 8:
        return scale_of_short(bits.flatten())
    return bits.flatten().to(torch.int16).view(torch.float16)


def pack(codes: Tensor, role: RoleScheme) -> Tensor:
    """Codes int64 [T, C] to words int32 [T, W], plane by plane (see hqmq_trt.format)."""
    tokens, chunks = codes.shape
    words = torch.zeros(tokens, words_per_token(role, 4 * chunks), dtype=torch.int64)
    for plane in planes(role.code_bits, 4 * chunks):
        for chunk in range(chunks):
            word, bit = divmod(plane.offset + chunk * plane.width, 32)
            words[:, word] |= ((codes[:, chunk] >> plane.shift) & ((1 << plane.width) - 1)) << bit
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def unpack(words: Tensor, role: RoleScheme, head_dim: int) -> Tensor:
    """Words int32 [T, W] to codes int64 [T, C]; the inverse of :func:`pack`."""
    codes = torch.zeros(len(words), head_dim // 4, dtype=torch.int64)
    for plane in planes(role.code_bits, head_dim):
        for chunk in range(head_dim // 4):
            word, bit = divmod(plane.offset + chunk * plane.width, 32)
            codes[:, chunk] |= ((words[:, word].long() >> bit) & ((1 << plane.width) - 1)) << plane.shift
    return codes
