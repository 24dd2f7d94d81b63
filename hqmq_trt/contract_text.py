"""The contract as Markdown (docs/contract.md) and as a C++ header (plugins/trt/contract_table.h)."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Iterable, Sequence

from hqmq_trt.contract import (
    ACTIVATION_DTYPES,
    DOMAIN,
    INT32_MAX,
    OPERATORS,
    PLUGIN_VERSION,
    AttributeSpec,
    OperatorSpec,
    TensorSpec,
)

_TYPES = {"T": "kActivation", "int32": "kInt32", "float16": "kFloat16", "float32": "kFloat32"}

_HEADER_START = f"""\
// Made by `python -m hqmq_trt.contract --header` from hqmq_trt/contract.py; do not edit.
#pragma once

namespace hqmq::contract {{

enum class Kind {{ kInt, kFloat }};

// kActivation: float32, float16 or bfloat16, one for all such tensors of a node.
enum class Type {{ kActivation, kInt32, kFloat16, kFloat32 }};

// A value within low…high; a float is finite. Every node has every attribute.
struct Attribute {{
  const char* name;
  Kind kind;
  double low, high;
  bool power_of_two;
}};

struct Tensor {{
  const char* name;
  Type type;
  const char* shape;  // symbols of docs/contract.md: "B H M*P W"
  const char* when;   // attributes, all non-zero where it is there: "k_storage k_page_mean"
  const char* alias;  // of an output: the input it may share its memory with; "" if none
}};

// Attributes without plugin_version and plugin_namespace, which TensorRT's parser reads.
struct Operator {{
  const char* name;
  const Attribute* attributes;
  int num_attributes;
  const Tensor* inputs;
  int num_inputs;
  const Tensor* outputs;
  int num_outputs;
}};

inline constexpr const char* kDomain = "{DOMAIN}";
inline constexpr const char* kPluginVersion = "{PLUGIN_VERSION}";

"""


def header() -> str:
    """Text of plugins/trt/contract_table.h."""
    tables = "\n".join(_operator_tables(op) for op in OPERATORS)
    return f"{_HEADER_START}// clang-format off\n{tables}// clang-format on\n\n}}  // namespace hqmq::contract\n"


def _operator_tables(op: OperatorSpec) -> str:
    name = "k" + op.name.removeprefix("Hqmq")
    fields = [f'"{op.name}"']
    text = ""
    for kind, title, rows in (
        ("Attribute", "Attributes", [_attribute(spec) for spec in op.numbers]),
        ("Tensor", "Inputs", [_tensor(spec) for spec in op.inputs]),
        ("Tensor", "Outputs", [_tensor(spec) for spec in op.outputs]),
    ):
        text += f"inline constexpr {kind} {name}{title}[] = {{\n" + "".join(f"    {row},\n" for row in rows) + "};\n"
        fields += [f"{name}{title}", str(len(rows))]
    return f"{text}inline constexpr Operator {name} = {{{', '.join(fields)}}};\n"


def _attribute(spec: AttributeSpec) -> str:
    kind = "kInt" if spec.kind is int else "kFloat"
    power = "true" if spec.power_of_two else "false"
    return f'{{"{spec.name}", Kind::{kind}, {spec.low!r}, {spec.high!r}, {power}}}'


def _tensor(spec: TensorSpec) -> str:
    shape, when = " ".join(map(str, spec.shape)), " ".join(spec.when)
    return f'{{"{spec.name}", Type::{_TYPES[spec.dtype]}, "{shape}", "{when}", "{spec.alias}"}}'


_INTRODUCTION = f"""\
# Operators

Made by `python -m hqmq_trt.contract --markdown` from `hqmq_trt/contract.py`; do not edit.

The operators of the ONNX domain `{DOMAIN}`, as the exporter writes them and as the libraries for ONNX Runtime and
TensorRT run them. What they compute is in [semantics.md](semantics.md), what the cache holds in [format.md](format.md).

**Shapes.** B batch, H heads of K and V, Hq heads of Q (a multiple of H), T new tokens, D `head_dim`, P `page_size`,
M pages, S secondaries, r `radius_bits`, W words of a token, U words of a page's outlier mask, Z words of a page's
scales, C `outlier_capacity`, N `sink_tokens`. S, r, W, U, Z, C and N are those of the role (K or V) whose tensor it is.

**Types.** T is one of {", ".join(f"`{name}`" for name in ACTIVATION_DTYPES)}: the same for all such tensors of a node.

**Presence.** A tensor that names attributes under *if* is there when they are all non-zero; otherwise the tensors
after it move up. Every node states every attribute.

**Caches.** `present_…` equals the input it names but for the rows written, and a runtime may give both one memory:
ONNX Runtime binds one buffer, the TensorRT plugin declares the alias.

**Names for TensorRT.** Its parser looks for the plugin creator with the operator's name, `plugin_version`
"{PLUGIN_VERSION}" and `plugin_namespace` "{DOMAIN}".
"""


def markdown() -> str:
    """Text of docs/contract.md."""
    return "\n".join([_INTRODUCTION, *(_operator_section(op) for op in OPERATORS)])


def _operator_section(op: OperatorSpec) -> str:
    columns = ("name", "type", "shape", "if", "holds")
    attributes = [(f"`{a.name}`", a.kind.__name__, _range(a), a.meaning) for a in op.attributes]
    parts = (
        ("Inputs", _table(columns, map(_tensor_row, op.inputs))),
        ("Outputs", _table(columns, map(_tensor_row, op.outputs))),
        ("Attributes", _table(("name", "type", "value", "meaning"), attributes)),
    )
    return f"## {op.name}\n\n{op.meaning}\n\n" + "\n".join(f"### {title} of {op.name}\n\n{t}" for title, t in parts)


def _range(spec: AttributeSpec) -> str:
    if spec.kind is str:
        return f'"{spec.text}"'
    if spec.kind is float:
        return "≥ 0, finite" if spec.low == 0 else "finite"
    low, high = ("2³¹ - 1" if value == INT32_MAX else str(value) for value in (spec.low, spec.high))
    return f"{low}…{high}" + (", a power of two" if spec.power_of_two else "")


def _tensor_row(spec: TensorSpec) -> tuple[str, ...]:
    shape = ", ".join(map(str, spec.shape)).replace("*", "·")
    return f"`{spec.name}`", spec.dtype, f"[{shape}]", ", ".join(f"`{name}`" for name in spec.when), spec.meaning


def _table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "".join(re.sub(" +", " ", f"| {' | '.join(line)} |\n") for line in lines)


def main() -> None:
    """``python -m hqmq_trt.contract --markdown`` or ``--header``: print the text."""
    parser = argparse.ArgumentParser(prog="python -m hqmq_trt.contract", description="Print what the contract makes.")
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--markdown", action="store_true", help="docs/contract.md")
    which.add_argument("--header", action="store_true", help="plugins/trt/contract_table.h")
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]
    sys.stdout.write(markdown() if parser.parse_args().markdown else header())
