"""ONNX schemas of the three operators, so that onnx.checker and shape inference know the domain ``com.hqmq``.

Importing this module registers them. They are made from hqmq_trt.contract. The number of inputs and outputs depends on
the attributes, hence a variadic, heterogeneous parameter from the first that may be absent.
"""

from __future__ import annotations

from itertools import takewhile

import onnx
from onnx.defs import OpSchema

from hqmq_trt import contract
from hqmq_trt.contract import OperatorSpec, TensorSpec

_KINDS = {int: OpSchema.AttrType.INT, float: OpSchema.AttrType.FLOAT, str: OpSchema.AttrType.STRING}
_ACTIVATIONS = [f"tensor({name})".replace("float32", "float") for name in contract.ACTIVATION_DTYPES]
_CONSTRAINTS = {
    "T": (_ACTIVATIONS, "activations"),
    "S": ([*_ACTIVATIONS, "tensor(int32)"], "codebooks, cache tensors, sinks"),
}


def _type(dtype: str) -> str:
    return "T" if dtype == contract.ACTIVATION else f"tensor({dtype})".replace("float32", "float")


def _parameters(specs: tuple[TensorSpec, ...]) -> list[OpSchema.FormalParameter]:
    fixed = list(takewhile(lambda spec: not spec.when, specs))
    result = [OpSchema.FormalParameter(spec.name, _type(spec.dtype), _description(spec)) for spec in fixed]
    if rest := specs[len(fixed) :]:
        result.append(
            OpSchema.FormalParameter(
                "tensors",
                "S",
                "; ".join(_description(spec) for spec in rest),
                param_option=OpSchema.FormalParameterOption.Variadic,
                is_homogeneous=False,
                min_arity=sum(not spec.when for spec in rest),
            )
        )
    return result


def _description(spec: TensorSpec) -> str:
    condition = f" if {' and '.join(spec.when)}" if spec.when else ""
    return f"{spec.name} [{', '.join(map(str, spec.shape))}]{condition}: {spec.meaning}"


def _schema(op: OperatorSpec) -> OpSchema:
    inputs, outputs = _parameters(op.inputs), _parameters(op.outputs)
    types = {parameter.type_str for parameter in (*inputs, *outputs)}
    return OpSchema(
        op.name,
        contract.DOMAIN,
        contract.OPSET_VERSION,
        doc=op.meaning,
        inputs=inputs,
        outputs=outputs,
        type_constraints=[(name, *constraint) for name, constraint in _CONSTRAINTS.items() if name in types],
        attributes=[
            OpSchema.Attribute(spec.name, _KINDS[spec.kind], spec.meaning, required=True) for spec in op.attributes
        ],
    )


def schemas() -> tuple[OpSchema, ...]:
    """Schemas of HqmqQuantize, HqmqDequantize and HqmqAttention."""
    return tuple(_schema(op) for op in contract.OPERATORS)


def register() -> None:
    """Register the schemas with onnx once per process."""
    for schema in schemas():
        if not onnx.defs.has(schema.name, schema.domain):
            onnx.defs.register_schema(schema)


register()
