"""The operators' contract: inputs, outputs and attributes of the ONNX domain ``com.hqmq``, as tables.

The ONNX schemas (hqmq_trt.schemas), docs/contract.md (``python -m hqmq_trt.contract --markdown``), the table that the
TensorRT plugins are compiled with (``--header``, plugins/trt/contract_table.h) and the checks of nodes
(hqmq_trt.contract_check) are made from :data:`OPERATORS`; the tests compare what is committed with what is made.

Symbols of shapes: B batch, H heads of K and V, Hq heads of Q (a multiple of H), T new tokens, D head_dim, P page_size,
M pages, S secondaries, r radius_bits, W words of a token (hqmq_trt.format.words_per_token), U words of a page's outlier
mask (hqmq_trt.format.mask_words), Z words of a page's scales (hqmq_trt.format.scale_words), C outlier_capacity, N
sink_tokens. S, r, W, U, Z, C, N are of the role whose tensor it is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from hqmq_trt.format import FORMAT_VERSION
from hqmq_trt.scheme import MAX_RADIUS_BITS, MAX_SINK_TOKENS, ROLES, RoleScheme, Scheme

DOMAIN = "com.hqmq"
OPSET_VERSION = 1
PLUGIN_VERSION = "1"

QUANTIZE = "HqmqQuantize"
DEQUANTIZE = "HqmqDequantize"
ATTENTION = "HqmqAttention"

Attribute = int | float | str
Dim = int | str

ACTIVATION = "T"
ACTIVATION_DTYPES: tuple[str, ...] = ("float32", "float16", "bfloat16")
"""What T may be; all tensors of dtype T of a node have one type."""

INT32_MAX = 2**31 - 1
FLOAT32_MAX = (2.0 - 2.0**-23) * 2.0**127


@dataclass(frozen=True)
class AttributeSpec:
    """One attribute. Every node states every attribute; there are no defaults.

    Attributes:
        name: as in the ONNX node and in TensorRT's plugin fields.
        kind: type of the value; a float is float32.
        low, high: least and greatest value, both allowed; floats are finite. Of numbers only.
        text: the one value that a str may have.
        power_of_two: the value is a power of two.
        meaning: what it says.
    """

    name: str
    kind: type[int] | type[float] | type[str]
    low: float = 0
    high: float = 1
    meaning: str = ""
    power_of_two: bool = False
    text: str = ""


@dataclass(frozen=True)
class TensorSpec:
    """One input or output.

    Attributes:
        name: of the formal parameter.
        dtype: ``T``, ``int32``, ``float16`` or ``float32``.
        shape: symbols (see the module) and numbers.
        meaning: what it holds.
        when: attributes that must all be non-zero for the tensor to be there; () if it always is.
        alias: of outputs: the input it equals but for the rows written, and whose memory it may share.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    meaning: str
    when: tuple[str, ...] = ()
    alias: str = ""


@dataclass(frozen=True)
class OperatorSpec:
    """One operator. `roles`: (prefix of tensors, prefix of attributes) of each role, in order."""

    name: str
    meaning: str
    roles: tuple[tuple[str, str], ...]
    attributes: tuple[AttributeSpec, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]

    @property
    def numbers(self) -> tuple[AttributeSpec, ...]:
        """Attributes that TensorRT hands to the plugin; its parser keeps those that are texts."""
        return tuple(spec for spec in self.attributes if spec.kind is not str)

    def present_inputs(self, attributes: Mapping[str, Attribute]) -> tuple[TensorSpec, ...]:
        """Inputs of a node with these attributes, in order."""
        return _present(self.inputs, attributes)

    def present_outputs(self, attributes: Mapping[str, Attribute]) -> tuple[TensorSpec, ...]:
        """Outputs of a node with these attributes, in order."""
        return _present(self.outputs, attributes)


def _present(specs: tuple[TensorSpec, ...], attributes: Mapping[str, Attribute]) -> tuple[TensorSpec, ...]:
    return tuple(spec for spec in specs if all(attributes[name] for name in spec.when))


def _role_specs(prefix: str, subject: str) -> tuple[AttributeSpec, ...]:
    return (
        AttributeSpec(f"{prefix}storage", int, 0, 1, f"how {subject} is stored: 0 as fp16, 1 as quaternion codes"),
        AttributeSpec(f"{prefix}radius_bits", int, 1, MAX_RADIUS_BITS, "r, bits of a chunk's radius"),
        AttributeSpec(f"{prefix}gain", int, 0, 1, "radius: 0 levels of the largest norm (paper), 1 of the RMS (ours)"),
        AttributeSpec(f"{prefix}hadamard", int, 0, 1, "1: the operator rotates head_dim before it quantises"),
        AttributeSpec(f"{prefix}page_mean", int, 0, 1, "1: codes hold the token minus the mean of its page"),
        AttributeSpec(f"{prefix}outlier_capacity", int, 0, 2**20, "C, outlier slots of a page and head; 0: no Med3x"),
        AttributeSpec(f"{prefix}sink_tokens", int, 0, MAX_SINK_TOKENS, "N, first tokens of a sequence that stay exact"),
    )


_COMMON = (
    AttributeSpec("page_size", int, 8, 1024, "P, tokens of a page", power_of_two=True),
    AttributeSpec(
        "format_version",
        int,
        0,
        INT32_MAX,
        "version of the cache format; libraries and tools refuse any but their own",
    ),
    AttributeSpec("plugin_version", str, meaning="by which TensorRT's parser finds the plugin", text=PLUGIN_VERSION),
    AttributeSpec("plugin_namespace", str, meaning="by which TensorRT's parser finds the plugin", text=DOMAIN),
)

_ATTENTION_NUMBERS = (
    AttributeSpec("scale", float, -FLOAT32_MAX, FLOAT32_MAX, "factor of q·k before the softmax"),
    AttributeSpec("window", int, 0, INT32_MAX, "tokens that a query sees, itself included; 0: all"),
    AttributeSpec("softcap", float, 0.0, FLOAT32_MAX, "scores become softcap·tanh(score / softcap); 0: they do not"),
    AttributeSpec("has_sinks", int, 0, 1, "1: there is an input sinks"),
)


def _codebook(name: str, attribute: str) -> tuple[TensorSpec, ...]:
    when = (f"{attribute}storage",)
    return (
        TensorSpec(f"{name}secondaries", "float32", ("H", "S", 4), "secondary quaternions of each head", when),
        TensorSpec(f"{name}levels", "float32", ("2^r",), "radius levels, ascending", when),
    )


def _cache(name: str, attribute: str) -> tuple[TensorSpec, ...]:
    storage = f"{attribute}storage"
    mean, outliers = (storage, f"{attribute}page_mean"), (storage, f"{attribute}outlier_capacity")
    lead = ("B", "H")
    return (
        TensorSpec(f"{name}codes", "int32", (*lead, "M*P", "W"), "packed codes, or two fp16 a word"),
        TensorSpec(f"{name}scales", "int32", (*lead, "M", "Z"), "scales of a page's tokens", (storage,)),
        TensorSpec(f"{name}mean", "float16", (*lead, "M", "D"), "mean of a page", mean),
        TensorSpec(f"{name}outlier_mask", "int32", (*lead, "M", "U"), "which chunks are outliers", outliers),
        TensorSpec(f"{name}outlier_value", "float16", (*lead, "M", "C", 4), "the outliers", outliers),
        TensorSpec(f"{name}tail", "float16", (*lead, "P+N", "D"), "last P tokens, t in row t mod P; first N tokens"),
    )


def _present_cache(name: str, attribute: str) -> tuple[TensorSpec, ...]:
    return tuple(
        TensorSpec(f"present_{t.name}", t.dtype, t.shape, f"{t.name} with the new rows", t.when, t.name)
        for t in _cache(name, attribute)
    )


_PAST = TensorSpec("past_length", "int32", ("B",), "tokens that each sequence holds")
_NEW = TensorSpec(
    "new_length", "int32", ("B",), "rows that each sequence adds, the first of its T; the rest is padding"
)
_KEY, _VALUE = (f"{role}_" for role in ROLES)

OPERATORS = (
    OperatorSpec(
        QUANTIZE,
        "Appends the new rows of K or V to its cache.",
        (("", ""),),
        (*_role_specs("", "the role"), *_COMMON),
        (
            TensorSpec("x", ACTIVATION, ("B", "H", "T", "D"), "new rows of K or V"),
            _PAST,
            _NEW,
            *_codebook("", ""),
            *_cache("", ""),
        ),
        _present_cache("", ""),
    ),
    OperatorSpec(
        DEQUANTIZE,
        "Gives a cache as K or V. Rows at and past the length are zero; graphs in half precision cast x.",
        (("", ""),),
        (*_role_specs("", "the role"), *_COMMON),
        (TensorSpec("length", "int32", ("B",), "tokens that each sequence holds"), *_codebook("", ""), *_cache("", "")),
        (TensorSpec("x", "float32", ("B", "H", "M*P", "D"), "K or V, not rotated"),),
    ),
    OperatorSpec(
        ATTENTION,
        "Appends K and V to their caches and attends to them, page-causally. Rows of y past new_length are zero.",
        ((_KEY, "k_"), (_VALUE, "v_")),
        (*_ATTENTION_NUMBERS, *_role_specs("k_", "K"), *_role_specs("v_", "V"), *_COMMON),
        (
            TensorSpec("q", ACTIVATION, ("B", "Hq", "T", "D"), "queries"),
            TensorSpec("k", ACTIVATION, ("B", "H", "T", "D"), "new rows of K"),
            TensorSpec("v", ACTIVATION, ("B", "H", "T", "D"), "new rows of V"),
            _PAST,
            _NEW,
            TensorSpec("sinks", ACTIVATION, ("Hq",), "a score of each head in the softmax", ("has_sinks",)),
            *_codebook(_KEY, "k_"),
            *_codebook(_VALUE, "v_"),
            *_cache(_KEY, "k_"),
            *_cache(_VALUE, "v_"),
        ),
        (
            TensorSpec("y", ACTIVATION, ("B", "Hq", "T", "D"), "attention's result"),
            *_present_cache(_KEY, "k_"),
            *_present_cache(_VALUE, "v_"),
        ),
    ),
)


def operator(name: str) -> OperatorSpec:
    """The operator of that name (KeyError if there is none)."""
    return {spec.name: spec for spec in OPERATORS}[name]


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
        f"{prefix}sink_tokens": role.sink_tokens,
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


if __name__ == "__main__":
    from hqmq_trt.contract_text import main

    main()
