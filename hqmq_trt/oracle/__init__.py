"""The float32 oracle: the truth for every operator, in plain torch, written to be read.

It shares no code with the C++ codec. docs/format.md states the arithmetic (order of additions, fused
multiply-adds) that makes the two agree bit for bit.
"""

from hqmq_trt.oracle.attention import attention
from hqmq_trt.oracle.cache import dequantize, empty_cache, quantize
from hqmq_trt.oracle.codec import (
    EncodedPage,
    brute_force_word,
    decode_page,
    encode_page,
    hadamard,
    nearest_word,
    pack,
    unpack,
)

__all__ = [
    "EncodedPage",
    "attention",
    "brute_force_word",
    "decode_page",
    "dequantize",
    "empty_cache",
    "encode_page",
    "hadamard",
    "nearest_word",
    "pack",
    "quantize",
    "unpack",
]
