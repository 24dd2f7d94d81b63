"""Nodes of every operator and several schemes, written for tests/cpp/trt_contract_test.

The format is described in tests/cpp/trt_contract_cases.h.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hqmq_trt import contract
from hqmq_trt.contract import ATTENTION, DEQUANTIZE, QUANTIZE, Attribute, TensorSpec
from hqmq_trt.format import mask_words, scale_words, words_per_token
from hqmq_trt.scheme import ROLES, Scheme

SCHEMES = (
    *("fp16", "hq3", "hq3.5", "hq4", "hq5", "hq:s21_r3-sinks", "paper:s96_r4+med3"),
    *("k=hq4,v=fp16@p128", "k=paper:s24_r3,v=hq4@p16", "k=hq3,v=hq2.5"),
)
HEADS, QUERY_HEADS, HEAD_DIM, BATCH, TOKENS, PAGES = 2, 6, 64, 3, 5, 4

_DYNAMIC = ("B", "T", "M", "M*P")


def nodes() -> Iterator[tuple[str, str, dict[str, Attribute]]]:
    """(name, operator, attributes) of each case."""
    for text in SCHEMES:
        scheme = Scheme.parse(text)
        for role in ROLES:
            attributes = {
                **contract.role_attributes(scheme.role(role), HEAD_DIM, scheme.page_size),
                **contract.common_attributes(scheme.page_size),
            }
            yield f"{text}.{role}", QUANTIZE, attributes
            yield f"{text}.{role}", DEQUANTIZE, attributes
        yield text, ATTENTION, contract.attention_attributes(scheme, HEAD_DIM, HEAD_DIM**-0.5)
        sinks = contract.attention_attributes(scheme, HEAD_DIM, 0.25, 70_001, 30.0, has_sinks=True, rotate_value=False)
        yield f"{text}.sinks", ATTENTION, sinks


def _sizes(scheme: Scheme, role: str) -> dict[str, int]:
    codec, page = scheme.role(role), scheme.page_size
    return {
        **{"B": BATCH, "H": HEADS, "Hq": QUERY_HEADS, "T": TOKENS, "D": HEAD_DIM, "P+N": page + codec.sink_tokens},
        **{"M": PAGES, "M*P": PAGES * page, "S": codec.secondaries, "2^r": 2**codec.radius_bits},
        "W": words_per_token(codec, HEAD_DIM),
        "U": mask_words(HEAD_DIM, page),
        "Z": scale_words(codec, page),
        "C": codec.outlier_capacity(HEAD_DIM, page),
    }


def _shape(spec: TensorSpec, sizes: dict[str, int], alone: set[str]) -> str:
    """Sizes, ``?`` behind dynamic ones and ``+`` behind those that nothing else depends on."""
    words = []
    for dim in spec.shape:
        size = dim if isinstance(dim, int) else sizes[dim]
        words.append(f"{size}{'?' * (dim in _DYNAMIC)}{'+' * (dim in alone)}")
    return " ".join(words)


def _alone(specs: tuple[TensorSpec, ...], spec: TensorSpec) -> set[str]:
    """Symbols that no other input says: T of a lone x, and S, from which W follows only in whole bits."""
    others = {str(dim) for other in specs if other is not spec for dim in other.shape}
    return {"S"} | ({"T"} - others)


def write_cases(path: Path) -> list[str]:
    """Write all cases and return their lines."""
    lines = []
    for name, op_type, attributes in nodes():
        scheme = Scheme.parse(name.split(".key")[0].split(".value")[0].split(".sinks")[0])
        only = name.rpartition(".")[2]
        op = contract.operator(op_type)
        inputs, outputs = op.present_inputs(attributes), op.present_outputs(attributes)
        lines.append(f"case {name} {op_type}")
        for attribute in op.numbers:
            value = attributes[attribute.name]
            lines.append(f"attribute {attribute.name} {attribute.kind.__name__} {value!r}")
        names = [spec.name for spec in inputs]
        for specs in (inputs, outputs):
            for spec in specs:
                role = only if only in ROLES else role_of(spec)
                shape = _shape(spec, _sizes(scheme, role), _alone(inputs, spec) if specs is inputs else set())
                alias = "" if specs is inputs else f" {names.index(spec.alias) if spec.alias else -1}"
                kind = "input" if specs is inputs else "output"
                lines.append(f"{kind} {spec.name} {spec.dtype}{alias} {shape}")
        lines.append("end")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines


def role_of(spec: TensorSpec) -> str:
    """The role of a tensor of HqmqAttention; of what belongs to neither, ``key``."""
    return "value" if (spec.alias or spec.name).startswith("value_") else "key"
