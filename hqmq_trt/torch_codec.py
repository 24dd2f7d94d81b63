"""The codec in vectorised torch, over heads and pages at once, for devices the native library does not serve.

Same arithmetic as docs/format.md, so the same bytes as the oracle and the native codec, but for chunks that lie
within rounding of two codewords: the search scores secondaries with plain float32, and only the winner's projection
is formed with fused multiply-adds.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from hqmq_trt.codebooks import HALF_PRIMARIES
from hqmq_trt.format import LARGEST_SHORT_SCALE, SHORT_NAN, planes, words_per_token
from hqmq_trt.scheme import OUTLIER_FACTOR, Gain, RoleScheme

_HALF_MAX = 65504.0
_SEARCH_FLOATS = 1 << 22
"""Floats of one temporary of the codeword search."""


class Pages(NamedTuple):
    """Coded pages [H, N] of one role, by cache tensor; None where the scheme has none.

    codes: int32 [H, N, P, W]; scales: int32 words [H, N, Z]; mean: fp16 [H, N, D]; outlier_mask: int32 [H, N, U];
    outlier_value: fp16 [H, N, cap, 4].
    """

    codes: Tensor
    scales: Tensor | None
    mean: Tensor | None
    outlier_mask: Tensor | None
    outlier_value: Tensor | None


def _fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return (a.double() * b.double() + c.double()).float()


def _hadamard(x: Tensor) -> Tensor:
    size, stride = x.shape[-1], 1
    while stride < size:
        pair = x.unflatten(-1, (size // (2 * stride), 2, stride))
        low, high = pair.unbind(-2)
        x = torch.stack((low + high, low - high), -2).flatten(-3)
        stride *= 2
    return x * (1.0 / math.sqrt(size))


def _tree_sum(x: Tensor) -> Tensor:
    """Sum over the last axis by halves."""
    size = 1 << (x.shape[-1] - 1).bit_length()
    x = torch.nn.functional.pad(x, (0, size - x.shape[-1]))
    while x.shape[-1] > 1:
        low, high = x.chunk(2, -1)
        x = low + high
    return x.squeeze(-1)


def _rotation(secondaries: Tensor) -> Tensor:
    """[..., 4, 4]: row i holds the factors of x0…x3 in component i of x * conj(q)."""
    a, b, c, d = secondaries.unbind(-1)
    rows = ((a, b, c, d), (-b, a, -d, c), (-c, d, a, -b), (-d, -c, b, a))
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


def nearest_word(x: Tensor, secondaries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Nearest codewords of chunks x [H, N, 4] by head: word in 12*S, negative, projection, each [H, N].

    secondaries: float32 [H, S, 4].
    """
    rotation = _rotation(secondaries)
    block = max(_SEARCH_FLOATS // (secondaries.shape[0] * secondaries.shape[1]), 1)
    best = torch.cat([_best_secondary(part, rotation) for part in x.split(block, 1)], 1)
    heads = torch.arange(len(x), device=x.device)[:, None]
    factors = rotation[heads, best]  # [H, N, 4, 4]
    v = x[..., None, 0] * factors[..., 0]
    for i in (1, 2, 3):
        v = _fma(x[..., None, i], factors[..., i], v)
    size = v.abs()
    axis, longest = size.max(-1)
    half = 0.5 * ((size[..., 0] + size[..., 1]) + (size[..., 2] + size[..., 3]))
    minus = v < 0
    flip = (minus ^ minus[..., :1]).long()
    primary = torch.where(axis >= half, longest, 4 + flip[..., 1] + 2 * flip[..., 2] + 4 * flip[..., 3])
    negative = torch.where(axis >= half, minus.gather(-1, longest[..., None])[..., 0], minus[..., 0])
    return best * 12 + primary, negative, torch.maximum(axis, half)


def _best_secondary(x: Tensor, rotation: Tensor) -> Tensor:
    components = []
    for i in range(4):
        row = rotation[:, None, :, i]  # [H, 1, S, 4]
        v = x[..., :1] * row[..., 0]
        for j in (1, 2, 3):
            v = torch.addcmul(v, x[..., j : j + 1], row[..., j])
        components.append(v.abs_())
    w, x, y, z = components
    axis = torch.maximum(torch.maximum(w, x), torch.maximum(y, z))
    return torch.maximum(axis, w.add_(x).add_(y.add_(z)).mul_(0.5)).argmax(-1)


def _outliers(norm2: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Med3x of pages: norm2 [H, N, P, C] to bool [H, N, P, C] of the chunks that get a slot, and dropped [H, N]."""
    flat = norm2.flatten(-2)
    median = flat.sort(-1).values[..., (flat.shape[-1] - 1) // 2, None]
    above = flat > (OUTLIER_FACTOR * OUTLIER_FACTOR) * median
    order = torch.where(above, flat, -1.0).sort(dim=-1, descending=True, stable=True).indices
    chosen = torch.zeros_like(above)
    chosen.scatter_(-1, order[..., :capacity], above.gather(-1, order[..., :capacity]))
    return chosen.reshape(norm2.shape), (above.sum(-1) - capacity).clamp_min(0)


def _pack_bits(flags: Tensor) -> Tensor:
    """bool [..., n] to int32 words [..., ceil(n/32)], lowest bit first."""
    flags = torch.nn.functional.pad(flags.long(), (0, -flags.shape[-1] % 32)).unflatten(-1, (-1, 32))
    return _wrap((flags << torch.arange(32, device=flags.device)).sum(-1))


def _wrap(words: Tensor) -> Tensor:
    """Unsigned 32-bit values held as int64 to the int32 of the same bits."""
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def _fields(role: RoleScheme, head_dim: int, device: torch.device) -> list[tuple[Tensor, Tensor, int, int]]:
    """(word, bit, shift, mask) of each plane: where the field of every chunk lies."""
    chunk = torch.arange(head_dim // 4, device=device)
    where = [(plane, plane.offset + chunk * plane.width) for plane in planes(role.code_bits, head_dim)]
    return [(bit // 32, bit % 32, plane.shift, (1 << plane.width) - 1) for plane, bit in where]


def pack(codes: Tensor, role: RoleScheme) -> Tensor:
    """Codes int64 [..., C] to words int32 [..., W]."""
    head_dim = 4 * codes.shape[-1]
    words = codes.new_zeros((*codes.shape[:-1], words_per_token(role, head_dim)))
    for word, bit, shift, mask in _fields(role, head_dim, codes.device):
        words.index_add_(-1, word, ((codes >> shift) & mask) << bit)
    return _wrap(words)


def unpack(words: Tensor, role: RoleScheme, head_dim: int) -> Tensor:
    """Words int32 [..., W] to codes int64 [..., C]."""
    wide = words.long()
    codes = wide.new_zeros((*words.shape[:-1], head_dim // 4))
    for word, bit, shift, mask in _fields(role, head_dim, words.device):
        codes |= ((wide[..., word] >> bit) & mask) << shift
    return codes


def pack_scales(scales: Tensor, role: RoleScheme) -> Tensor:
    """fp16 scales [..., P] to int32 words [..., Z]."""
    bits = scales.view(torch.int16).long() & 0xFFFF
    if role.scale_bits == 8:
        bits = torch.where(scales.isnan(), SHORT_NAN, bits >> 7)
    fields = bits.unflatten(-1, (-1, 32 // role.scale_bits))
    return _wrap((fields << torch.arange(0, 32, role.scale_bits, device=scales.device)).sum(-1))


def unpack_scales(words: Tensor, role: RoleScheme) -> Tensor:
    """Words int32 [..., Z] to fp16 scales [..., P]."""
    bits = words.long()[..., None] >> torch.arange(0, 32, role.scale_bits, device=words.device)
    bits = (bits & ((1 << role.scale_bits) - 1)).flatten(-2)
    return _scale_of_short(bits) if role.scale_bits == 8 else bits.to(torch.int16).view(torch.float16)


def _scale_of_short(short: Tensor) -> Tensor:
    """fp16 numbers of short scales, int64 in 0…255 (hqmq_trt.format)."""
    return (short << 7).to(torch.int16).view(torch.float16)


def _best_scale(scales: Tensor, projection: Tensor, counted: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Of the short scale nearest to fp16 `scales` [..., 1] and the two beside it the one that leaves the least error,
    and the levels [..., C] that go with it (docs/format.md, arithmetic, step 9)."""
    nearest = ((scales.view(torch.int16).long() + 64) >> 7).clamp_max(LARGEST_SHORT_SCALE)
    middle = (levels[1:] + levels[:-1]) * 0.5
    best = torch.zeros_like(scales)
    best_level = torch.zeros(projection.shape, dtype=torch.long, device=scales.device)
    least = torch.full(scales.shape, math.inf, device=scales.device)
    for short in (nearest, nearest - 1, nearest + 1):
        scale = _scale_of_short(short.clamp(1, LARGEST_SHORT_SCALE))
        level = torch.bucketize(projection / scale.float(), middle)
        radius = levels[level] * scale.float()
        error = _tree_sum(torch.where(counted, radius * (radius - (projection + projection)), 0.0))[..., None]
        allowed = (nearest > 0) & (short >= 1) & (short <= LARGEST_SHORT_SCALE)
        better = allowed & (error < least)
        best, best_level = torch.where(better, scale, best), torch.where(better, level, best_level)
        least = torch.where(better, error, least)
    return best, best_level


def encode_pages(tokens: Tensor, role: RoleScheme, secondaries: Tensor, levels: Tensor) -> Pages:
    """Code full pages, fp16 [H, N, P, D], with secondaries [H, S, 4] and levels [2^r]."""
    heads, count, page_size, head_dim = tokens.shape
    x = _hadamard(tokens.float()) if role.hadamard else tokens.float()
    mean = None
    if role.page_mean:
        mean = (_tree_sum(x.transpose(-1, -2)) * (1.0 / page_size)).half()
        x = x - mean.float()[:, :, None]
    chunks = x.unflatten(-1, (-1, 4))
    square = chunks * chunks
    norm2 = (square[..., 0] + square[..., 1]) + (square[..., 2] + square[..., 3])
    finite = norm2.isfinite().all(-1, keepdim=True)
    norm2 = torch.where(finite, norm2, 0.0)

    outlier, mask, value = torch.zeros_like(norm2, dtype=torch.bool), None, None
    if role.med3:
        slots = role.outlier_capacity(head_dim, page_size)
        outlier, dropped = _outliers(norm2, slots)
        mask = torch.cat([_pack_bits(outlier.flatten(-2)), dropped.int()[..., None]], -1)
        flags = outlier.flatten(-2)
        value = tokens.new_zeros((heads, count, slots, 4))
        head, page, chunk = flags.nonzero(as_tuple=True)
        slot = (flags.cumsum(-1) - 1)[head, page, chunk]
        value[head, page, slot] = chunks.flatten(2, 3)[head, page, chunk].clamp(-_HALF_MAX, _HALF_MAX).half()
    kept = torch.where(outlier, 0.0, norm2)
    if role.gain is Gain.MAX:
        raw = kept.amax(-1).sqrt() / float(2**role.radius_bits - 1)
    else:
        raw = (_tree_sum(kept) / (4.0 * (~outlier).sum(-1).clamp_min(1))).sqrt()
    scales = raw.clamp_max(_HALF_MAX).half()[..., None]

    word, negative, projection = (y.reshape(norm2.shape) for y in nearest_word(chunks.flatten(1, 3), secondaries))
    if role.gain is Gain.MAX:
        level = (norm2.sqrt() / scales.float()).round().clamp_max(len(levels) - 1)
    else:
        scales, level = _best_scale(scales, projection, ~outlier, levels)
    coded = ~outlier & (scales.float() > 0) & finite
    code = word | torch.where(coded, level, 0).long() << role.index_bits
    code = code | negative.long() << (role.index_bits + role.radius_bits)
    scales = torch.where(finite, scales, float("nan"))
    words = pack_scales(scales.squeeze(-1), role)
    return Pages(pack(torch.where(coded, code, 0), role), words, mean, mask, value)


def decode_pages(pages: Pages, role: RoleScheme, secondaries: Tensor, levels: Tensor, head_dim: int) -> Tensor:
    """Pages to float32 [H, N, P, D]."""
    if not role.packed:
        return pages.codes.contiguous().view(torch.float16).float()
    codes = unpack(pages.codes, role, head_dim)
    index = codes & ((1 << role.index_bits) - 1)
    level = (codes >> role.index_bits) & ((1 << role.radius_bits) - 1)
    negative = (codes >> (role.index_bits + role.radius_bits)).bool()
    assert pages.scales is not None
    radius = levels[level] * unpack_scales(pages.scales, role).float()[..., None]
    heads = torch.arange(len(codes), device=codes.device)[:, None, None, None]
    chunks = word_table(secondaries)[heads, index] * torch.where(negative, -radius, radius)[..., None]
    if pages.outlier_mask is not None and pages.outlier_value is not None:
        bits = torch.arange(32, device=codes.device)
        flags = (pages.outlier_mask[..., :-1, None].long() >> bits & 1).flatten(-2).bool()
        head, page, chunk = flags.nonzero(as_tuple=True)
        slot = (flags.cumsum(-1) - 1)[head, page, chunk]
        chunks.flatten(2, 3)[head, page, chunk] = pages.outlier_value[head, page, slot].float()
    x = chunks.flatten(-2)
    if pages.mean is not None:
        x = x + pages.mean.float()[:, :, None]
    return _hadamard(x) if role.hadamard else x


def word_table(secondaries: Tensor) -> Tensor:
    """The 12*S codewords up to sign, float32 [H, 12*S, 4] (word s*12 + p: primary p times secondary s)."""
    p = torch.from_numpy(HALF_PRIMARIES).to(secondaries.device)
    w, x, y, z = p.unbind(-1)
    # Row i of the left-multiplication matrix of p gives component i of p * q.
    rows = ((w, -x, -y, -z), (x, w, -z, y), (y, z, w, -x), (z, -y, x, w))
    q = secondaries.double()[..., None, :]  # [H, S, 1, 4]
    terms = [[factor * q[..., i] for i, factor in enumerate(row)] for row in rows]
    table = torch.stack([((a + b) + c) + d for a, b, c, d in terms], -1)
    return table.flatten(1, 2).float()
