"""ONNX schemas of the three operators, so that onnx.checker and shape inference know the domain ``com.hqmq``.

Importing this module registers them. The number of inputs depends on the attributes (hqmq_trt.contract), hence the
variadic, heterogeneous last parameter of each.
"""

from __future__ import annotations

import onnx
from onnx.defs import OpSchema

from hqmq_trt import contract
from hqmq_trt.scheme import Scheme

_FLOATS = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)"]
_STORED = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int32)"]
_TYPES = {int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT, str: OpSchema.AttrType.STRING}
_SCHEME = Scheme.parse("fp16")

_ROLE = {**contract.role_attributes(_SCHEME.key, 4, 8), **contract.common_attributes(8)}
_REST = "codebooks, then cache tensors in the order of hqmq_trt.format.cache_tensors"


def _parameter(name: str, type_name: str, description: str) -> OpSchema.FormalParameter:
    return OpSchema.FormalParameter(name, type_name, description)


def _variadic(name: str, description: str) -> OpSchema.FormalParameter:
    return OpSchema.FormalParameter(
        name, "S", description, param_option=OpSchema.FormalParameterOption.Variadic, is_homogeneous=False, min_arity=1
    )


def _schema(
    name: str,
    doc: str,
    inputs: list[OpSchema.FormalParameter],
    outputs: list[OpSchema.FormalParameter],
    attributes: dict[str, contract.Attribute],
) -> OpSchema:
    types = {parameter.type_str for parameter in (*inputs, *outputs)}
    constraints = [
        ("T", _FLOATS, "activations"),
        ("I", ["tensor(int32)"], "lengths, int32 [B]"),
        ("S", _STORED, "codebooks, cache tensors, sinks"),
    ]
    return OpSchema(
        name,
        contract.DOMAIN,
        contract.OPSET_VERSION,
        doc=doc,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[constraint for constraint in constraints if constraint[0] in types],
        attributes=[
            OpSchema.Attribute(key, _TYPES[type(value)], "see hqmq_trt.contract", required=True)
            for key, value in attributes.items()
        ],
    )


def schemas() -> tuple[OpSchema, ...]:
    """Schemas of HqmqQuantize, HqmqDequantize and HqmqAttention."""
    past, new = _parameter("past_length", "I", "tokens held"), _parameter("new_length", "I", "tokens added")
    x, cache = _parameter("x", "T", "[B, H, T, D]"), _variadic("present", "the cache with the new rows written")
    q, k, v = (_parameter(name, "T", f"[B, {heads}, T, D]") for name, heads in (("q", "Hq"), ("k", "H"), ("v", "H")))
    y, dense = _parameter("y", "T", "[B, Hq, T, D]"), _parameter("x", "T", "[B, H, M*P, D]")
    length = _parameter("length", "I", "tokens held")
    rest = _variadic("tensors", _REST)
    return (
        _schema(contract.QUANTIZE, "Append K or V to a cache.", [x, past, new, rest], [cache], _ROLE),
        _schema(contract.DEQUANTIZE, "A cache as K or V.", [length, rest], [dense], _ROLE),
        _schema(
            contract.ATTENTION,
            "Append K and V to their caches and attend to them, page-causally.",
            [q, k, v, past, new, _variadic("tensors", f"sinks if has_sinks, {_REST}, K's before V's")],
            [y, cache],
            contract.attention_attributes(_SCHEME, 4, 1.0),
        ),
    )


def register() -> None:
    """Register the schemas with onnx once per process."""
    for schema in schemas():
        if not onnx.defs.has(schema.name, schema.domain):
            onnx.defs.register_schema(schema)


register()
