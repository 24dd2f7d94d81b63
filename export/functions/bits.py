"""Bits by int64 arithmetic: ONNX has no bit cast before opset 26."""

from __future__ import annotations

from typing import Any

import numpy as np

from hqmq_trt.format import LARGEST_SHORT_SCALE

from .codec import Codec
from .ops import FLOAT, INT32, INT64, Ops

_WORD = 1 << 32


def _fields(codec: Codec) -> list[tuple[int, int, int, int]]:
    """(word, bit, width, shift) of each field of a token, plane by plane, chunk by chunk."""
    fields = []
    for plane in codec.planes:
        for chunk in range(codec.chunks):
            word, bit = divmod(plane.offset + chunk * plane.width, 32)
            fields.append((word, bit, plane.width, plane.shift))
    return fields


def signed(o: Ops, words: Any) -> Any:
    """int64 words 0…2^32-1 to the int32 of the same bits."""
    return o.to(o.Where(o.GreaterOrEqual(words, _WORD // 2), o.Sub(words, _WORD), words), INT32)


def unsigned(o: Ops, words: Any) -> Any:
    """int32 words to int64 0…2^32-1."""
    words = o.to(words, INT64)
    return o.Where(o.Less(words, 0), o.Add(words, _WORD), words)


def pack(o: Ops, codes: Any, codec: Codec) -> Any:
    """Codes int64 [..., C] to words int32 [..., W]."""
    places = np.zeros((len(codec.planes) * codec.chunks, codec.words), np.int64)
    for field, (word, bit, _, _) in enumerate(_fields(codec)):
        places[field, word] = 1 << bit
    parts = [o.Mod(o.Div(codes, 1 << plane.shift), 1 << plane.width) for plane in codec.planes]
    return signed(o, o.MatMul(o.Concat(*parts, axis=-1), places))


def unpack(o: Ops, words: Any, codec: Codec) -> Any:
    """Words int32 [B, H, R, W] to codes int64 [B, H, R, C]."""
    word, bit, width, shift = (np.array(column, np.int64) for column in zip(*_fields(codec), strict=True))
    fields = o.Div(o.Gather(unsigned(o, words), word, axis=3), np.left_shift(1, bit))
    fields = o.Mul(o.Mod(fields, np.left_shift(1, width)), np.left_shift(1, shift))
    return o.ReduceSum(o.Reshape(fields, [0, 0, 0, len(codec.planes), codec.chunks]), [3], keepdims=0)


def short_scales() -> Any:
    """What the 256 short scales stand for, float32; 255 is NaN (hqmq_trt.format)."""
    return (np.arange(256, dtype=np.uint16) << 7).view(np.float16).astype(np.float32)


def short_scale_bounds() -> Any:
    """float32 [255]: the nearest short scale of an fp16 number is how many of these it is not below."""
    # Half a step of the short scale is 64 units of fp16; past the largest no number is.
    bounds = ((np.arange(1, 256, dtype=np.uint16) << 7) - 64).view(np.float16).astype(np.float32)
    bounds[LARGEST_SHORT_SCALE:] = np.inf
    return bounds


def pack_bytes(o: Ops, values: Any, count: int) -> Any:
    """Bytes int64 [X, Y, count, 1] to words int32 [X, Y, 1, count/4], the first in the lowest bits."""
    places = np.left_shift(1, 8 * np.arange(4, dtype=np.int64))
    fields = o.Mul(o.Reshape(values, [0, 0, 1, count // 4, 4]), places)
    return signed(o, o.ReduceSum(fields, [4], keepdims=0))


def unpack_bytes(o: Ops, words: Any, count: int) -> Any:
    """Words int32 [B, H, M, count/4] to bytes int64 [B, H, M, count]; the inverse of :func:`pack_bytes`."""
    places = np.left_shift(1, 8 * np.arange(4, dtype=np.int64))
    fields = o.Mod(o.Div(o.Unsqueeze(unsigned(o, words), [4]), places), 256)
    return o.Reshape(fields, [0, 0, 0, count])


def half_to_words(o: Ops, x: Any, head_dim: int) -> Any:
    """float16 [..., D] of rank 4 to int32 [..., D/2] of the same bits (a NaN becomes the quiet NaN 0x7E00)."""
    x = o.to(x, FLOAT)
    size = o.Abs(x)
    finite = o.Less(size, float("inf"))
    # In units of 2^-24 a finite half is an integer: mantissa << (exponent - 1), or just the mantissa if subnormal.
    units = o.to(o.Mul(o.Where(finite, size, 0.0), float(2**24)), INT64)
    exponent = o.Mul(units, 0)
    for step in (16, 8, 4, 2, 1):
        large = o.GreaterOrEqual(o.Div(units, o.Mul(_power(o, exponent), 1 << step)), 1 << 10)
        exponent = o.Where(large, o.Add(exponent, step), exponent)
    bits = o.Add(o.Mul(exponent, 1 << 10), o.Div(units, _power(o, exponent)))
    # Where the value is normal, its leading bit 1 << 10 has already raised the exponent by one.
    bits = o.Where(finite, bits, o.Where(o.IsNaN(x), 0x7E00, 0x7C00))
    minus = o.Or(o.Less(x, 0.0), o.Less(o.Reciprocal(x), 0.0))  # -0 has a negative reciprocal
    low, high = o.split(o.Reshape(o.Add(bits, o.Where(minus, 0x8000, 0)), [0, 0, 0, head_dim // 2, 2]), 2)
    return signed(o, o.Squeeze(o.Add(low, o.Mul(high, 1 << 16)), [4]))


def words_to_half(o: Ops, words: Any, head_dim: int) -> Any:
    """int32 [..., D/2] of rank 4 to the float32 [..., D] that its halves stand for."""
    words = o.Unsqueeze(unsigned(o, words), [4])
    bits = o.Reshape(o.Concat(o.Mod(words, 1 << 16), o.Div(words, 1 << 16), axis=4), [0, 0, 0, head_dim])
    mantissa, exponent = o.Mod(bits, 1 << 10), o.Mod(o.Div(bits, 1 << 10), 1 << 5)
    lead = np.array([0] + [1 << 10] * 31, np.int64)
    unit = np.array([2.0 ** (max(e, 1) - 25) for e in range(32)], np.float32)
    size = o.Mul(o.to(o.Add(mantissa, o.Gather(lead, exponent)), FLOAT), o.Gather(unit, exponent))
    special = o.Where(o.Equal(mantissa, 0), _scalar(np.inf), _scalar(np.nan))
    size = o.Where(o.Equal(exponent, 31), special, size)
    return o.Where(o.GreaterOrEqual(bits, 0x8000), o.Neg(size), size)


def _scalar(value: float) -> Any:
    return np.array(value, np.float32)


def _power(o: Ops, exponent: Any) -> Any:
    return o.Gather(np.left_shift(1, np.arange(32, dtype=np.int64)), exponent)
