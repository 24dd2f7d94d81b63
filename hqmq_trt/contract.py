"""The operators' contract: names, inputs, outputs and attributes of the ONNX domain ``com.hqmq``.

The exporter, the ONNX schemas, the ONNX Runtime library and the TensorRT plugins all follow this file.

==============  =============================================================================================
HqmqQuantize    x, past_length, new_length, CODEBOOK, CACHE                → CACHE
HqmqDequantize  length, CODEBOOK, CACHE                                    → x
HqmqAttention   q, k, v, past_length, new_length, [sinks], CODEBOOK of K, CODEBOOK of V, CACHE of K, CACHE of V
                                                                           → y, CACHE of K, CACHE of V
==============  =============================================================================================

CODEBOOK is ``secondaries`` float32 [H, S, 4] and ``levels`` float32 [2^r]; nothing for storage fp16.
CACHE is the list of hqmq_trt.format.cache_tensors, in that order; which tensors it has follows from the attributes.
x, k, v: [B, H, T, D]; q, y: [B, Hq, T, D], Hq a multiple of H, all of one type: float32, float16 or bfloat16.
past_length, new_length, length: int32 [B]. Sequence b holds past_length[b] tokens and gets the first new_length[b]
of the T rows (right padding); output rows past them are zero. `x` of HqmqDequantize: float32 [B, H, M*P, D]; graphs
in half precision cast it.
sinks: [Hq] of the type of q, present if the attribute has_sinks is 1.

Present tensors equal past tensors but for the rows written; a runtime may give both one buffer.
"""

from __future__ import annotations

from hqmq_trt.format import FORMAT_VERSION
from hqmq_trt.scheme import RoleScheme, Scheme

DOMAIN = "com.hqmq"
OPSET_VERSION = 1
PLUGIN_VERSION = "1"

QUANTIZE = "HqmqQuantize"
DEQUANTIZE = "HqmqDequantize"
ATTENTION = "HqmqAttention"

Attribute = int | float | str


def role_attributes(
    role: RoleScheme, head_dim: int, page_size: int, prefix: str = "", rotate: bool = True
) -> dict[str, Attribute]:
    """Attributes that describe one role's codec; `prefix` is ``k_`` or ``v_`` in HqmqAttention.

    rotate=False says that the model's weights already hold the Hadamard rotation, so that the operator applies none.
    """
    return {
        f"{prefix}storage": int(role.storage),
        f"{prefix}radius_bits": role.radius_bits,
        f"{prefix}gain": int(role.gain),
        f"{prefix}hadamard": int(role.hadamard and rotate),
        f"{prefix}page_mean": int(role.page_mean),
        f"{prefix}outlier_capacity": role.outlier_capacity(head_dim, page_size),
    }


def common_attributes(page_size: int) -> dict[str, Attribute]:
    """Attributes every node carries; TensorRT's parser finds the plugin by the last two."""
    return {
        "page_size": page_size,
        "format_version": FORMAT_VERSION,
        "plugin_version": PLUGIN_VERSION,
        "plugin_namespace": DOMAIN,
    }


def attention_attributes(
    scheme: Scheme,
    head_dim: int,
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    has_sinks: bool = False,
    rotate_value: bool = True,
) -> dict[str, Attribute]:
    """All attributes of an HqmqAttention node. window 0: none; softcap 0: none."""
    return {
        "scale": float(scale),
        "window": window,
        "softcap": float(softcap),
        "has_sinks": int(has_sinks),
        **role_attributes(scheme.key, head_dim, scheme.page_size, "k_"),
        **role_attributes(scheme.value, head_dim, scheme.page_size, "v_", rotate_value),
        **common_attributes(scheme.page_size),
    }
