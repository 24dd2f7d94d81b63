"""Logits of 16 bits as float32, for ONNX Runtime; engines give float32. numpy converts float16 one by one; these few
vector operations are several times quicker."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

_FIELDS = np.int32(0x8FFFE000 - (1 << 32))  # sign, and exponent and mantissa of a float16 shifted by 13
_BIAS = np.float32(2.0**112)  # 2^(127 - 15)


def widen(logits: NDArray[Any]) -> NDArray[np.float32]:
    """Logits of float32 (returned as they are), float16, or bfloat16 (as uint16 bits) in a new array of
    float32, exactly. They must be contiguous."""
    if logits.dtype == np.float32:
        return logits
    out = np.empty(logits.shape, np.float32)
    if logits.dtype == np.uint16:
        bits = out.view(np.uint32)
        bits[...] = logits
        np.left_shift(bits, np.uint32(16), out=bits)
        return out
    fields = out.view(np.int32)
    fields[...] = logits.view(np.int16)  # the sign spreads over bits 15…31
    np.left_shift(fields, np.int32(13), out=fields)
    np.bitwise_and(fields, _FIELDS, out=fields)
    np.multiply(out, _BIAS, out=out)
    # Exponent 31 of float16 means infinity or NaN, and has become a number of at least 2^16.
    if out.size and (out.max() >= 65536.0 or out.min() <= -65536.0):
        out[...] = logits
    return out
