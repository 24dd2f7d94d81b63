"""Models of ONNX Runtime GenAI and others with operators of com.microsoft: these are written out in standard ones, so
that the rest of the recogniser, ONNX Runtime and TensorRT read them.

Each operator has a rule (microsoft_*.py) with its cases. Every form of a node that occurs is tried: it and what it is
written out to run on the same random inputs in ONNX Runtime (microsoft_trial.py). Attention that is refused stays in
the graph, with the reason in its metadata, so that `inspect` can tell of the other layers; anything else refused is an
error.
"""

from __future__ import annotations

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from hqmq_trt.errors import HqmqError

from ..graph import OPSET, _quiet
from .evaluate import Case, Part
from .interface import FLOATS, Interface, find_interface
from .microsoft_group import GROUP, group_sizes
from .microsoft_multi import MULTI, multi_sizes
from .microsoft_nodes import REFUSED, Context, Rule, given
from .microsoft_norms import NORMS
from .microsoft_rotary import ROTARY
from .microsoft_trial import apply, try_rule
from .microsoft_weights import WEIGHTS, reshape_tables
from .walk import climb, name, standard

DOMAIN = "com.microsoft"
_RULES: dict[str, Rule] = {**NORMS, **ROTARY, **GROUP, **MULTI, **WEIGHTS}
_ATTENTION = frozenset(
    {"GroupQueryAttention", "MultiHeadAttention", "Attention", "PagedAttention", "DecoderMaskedMultiHeadAttention"}
)
_DEFAULT_DOMAIN = frozenset({"SimplifiedLayerNormalization"})
"""Operators that ONNX Runtime has in the default domain without being of the standard."""
_CASES = (Case(2, 3, 5), Case(3, 4, 7), Case(2, 5, 0), Case(5, 1, 11))
_FIRST_OPSET = 14
# fmt: off
_SAME = frozenset(
    {
        "Abs", "Add", "And", "Cast", "CastLike", "Ceil", "Clip", "Concat", "Constant", "ConstantOfShape", "Cos",
        "CumSum", "Div", "Equal", "Erf", "Exp", "Expand", "Flatten", "Floor", "Gather", "GatherElements",
        "GatherND", "Gelu", "Gemm", "Greater", "GreaterOrEqual", "Identity", "LayerNormalization", "Less",
        "LessOrEqual", "Log", "MatMul", "Max", "Min", "Mod", "Mul", "Neg", "Not", "Or", "Pow", "Range",
        "Reciprocal", "ReduceSum", "Relu", "Reshape", "Shape", "Sigmoid", "Sin", "Size", "Slice", "Softmax",
        "Sqrt", "Squeeze", "Sub", "Tanh", "Tile", "TopK", "Transpose", "Trilu", "Unsqueeze", "Where",
    }
)
# fmt: on
"""Operators that mean the same from opset 14 on: later versions added types, or attributes that change nothing if they
are left out."""


def write_out(model: ir.Model) -> None:
    """Write out all operators of com.microsoft.

    Raises:
        HqmqError: one that is not known, has an unknown attribute, or does not do what its rule says.
    """
    graph = model.graph
    if not any(_foreign(node) for node in graph):
        return
    common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
    for node in graph:
        for value in node.outputs:
            _forget_names(value)
    with _quiet():
        common.ShapeInferencePass()(model)  # of what makes masks and lengths; a file need not say it
    for index, node in enumerate(graph):
        node.name = node.name or f"{node.op_type}.{index}"
        node.metadata_props.pop(REFUSED, None)
    _raise_opset(model)
    reshape_tables(graph)
    _name_sizes(graph)
    face = find_interface(graph)
    context = Context(graph, face.ids)
    tried: dict[object, str] = {}
    for node in list(graph):
        if not _foreign(node):
            continue
        try:
            rule = _rule(node)
            _try(model, node, rule, tried)
            if node.op_type in GROUP:
                _check_lengths(model, face, node, tried)
            apply(context, node, rule)
        except HqmqError as error:
            if node.op_type not in _ATTENTION:
                raise HqmqError(f"{name(node)}: {error}") from error
            node.metadata_props[REFUSED] = str(error)


def _forget_names(value: ir.Value) -> None:
    """Sizes that only have a name are inferred anew: the builder gives keys of all tokens the name of new rows."""
    if value.shape is not None and not value.is_graph_output():
        value.shape = ir.Shape([dim if isinstance(dim, int) else None for dim in value.shape])


def _foreign(node: ir.Node) -> bool:
    return node.domain == DOMAIN or (not node.domain and node.op_type in _DEFAULT_DOMAIN)


def _rule(node: ir.Node) -> Rule:
    rule = _RULES.get(node.op_type)
    if rule is None:
        raise HqmqError(f"the operator {node.op_type} of {node.domain or 'ONNX Runtime'} is not known")
    for label, attribute in node.attributes.items():
        if label not in rule.attributes:
            raise HqmqError(f"its attribute {label} is not known")
        allowed = rule.attributes[label]
        value = attribute.value
        if allowed is not None and value not in allowed:
            raise HqmqError(f"its attribute {label} = {value} is not supported")
    for place in range(rule.inputs, len(node.inputs)):
        if given(node, place) is not None:
            raise HqmqError(f"its input {place} ('{node.inputs[place].name}') is not known")
    return rule


def _try(model: ir.Model, node: ir.Node, rule: Rule, tried: dict[object, str]) -> None:
    """Try a node, once for all that look alike."""
    form = _form(node)
    if form not in tried:
        try:
            try_rule(model, node, rule)
            tried[form] = ""
        except HqmqError as error:
            tried[form] = str(error)
    if tried[form]:
        raise HqmqError(tried[form])


def _form(node: ir.Node) -> object:
    """What nodes have in common that need to be tried only once."""
    attributes = tuple(sorted((label, str(attribute.value)) for label, attribute in node.attributes.items()))
    inputs: list[object] = []
    for value in node.inputs:
        if value is None or value.name == "":
            inputs.append(None)
        else:
            shape = None if value.shape is None else tuple(str(dim) for dim in value.shape)
            inputs.append((value.const_value is None, str(value.dtype), shape))
    read = tuple(bool(value.uses()) or value.is_graph_output() for value in node.outputs)
    return node.op_type, attributes, tuple(inputs), read


def _check_lengths(model: ir.Model, face: Interface, node: ir.Node, tried: dict[object, str]) -> None:
    """seqlens_k must be the position of the last new row, total_sequence_length their number with the cache's rows."""
    seqlens, total = given(node, 5), given(node, 6)
    if seqlens is None or total is None:
        raise HqmqError("has no seqlens_k or no total_sequence_length")
    key = ("lengths", id(seqlens), id(total))
    if key not in tried:
        part = Part(model, face, [seqlens, total])
        tried[key] = ""
        for case in _CASES:
            last, whole = part.run(case)
            rows = case.past + case.rows
            if last.size != case.batch or not (last == rows - 1).all():
                tried[key] = f"seqlens_k '{seqlens.name}' is not the position of the last token"
            elif whole.size != 1 or int(whole.reshape(())) != rows:
                tried[key] = f"total_sequence_length '{total.name}' is not the number of all tokens"
    if tried[key]:
        raise HqmqError(tried[key])


def _name_sizes(graph: ir.Graph) -> None:
    """Give caches the head_dim (and heads) that their attention tells, where the file leaves them symbolic."""
    fulls = {
        id(node.outputs[0]): node
        for node in graph
        if standard(node, "Concat") and any(node.inputs[0] is value for value in graph.inputs)
    }
    for node in graph:
        if node.domain != DOMAIN or node.op_type not in ("GroupQueryAttention", "MultiHeadAttention"):
            continue
        group = node.op_type in GROUP
        sides: list[tuple[ir.Value | None, ir.Value | None]] = []
        for place in (0, 1):
            past = given(node, (3 if group else 6) + place)
            full = node.outputs[1 + place] if len(node.outputs) > 1 + place else None
            if past is None and not group and (value := given(node, 1 + place)) is not None:
                join = fulls.get(id(climb(value, set(fulls))[0]))
                past, full = (None, None) if join is None else (join.inputs[0], join.outputs[0])
            sides.append((past, full))
        for past, full in sides:
            if past is None or past.shape is None or len(past.shape) != 4:
                continue
            if past.dtype not in FLOATS:
                raise HqmqError(
                    f"{name(node)}: its cache '{past.name}' is quantised; export the model with a plain one"
                )
            symbolic = not all(isinstance(past.shape[axis], int) for axis in (1, 3))
            try:
                heads, dim = group_sizes(node)[1:] if group else multi_sizes(node)
            except HqmqError as error:
                if symbolic:
                    raise HqmqError(f"{name(node)}: {error}") from error
                continue
            _fix(past, heads if given(node, 3 if group else 6) is not None else None, dim)
            if full is not None:
                full.type = full.type or past.type
                _fix(full, heads if given(node, 3 if group else 6) is not None else None, dim)


def _fix(value: ir.Value, heads: int | None, dim: int) -> None:
    if value.shape is None or len(value.shape) != 4:
        return
    sizes = list(value.shape)
    if heads is not None and not isinstance(sizes[1], int):
        sizes[1] = heads
    if not isinstance(sizes[3], int):
        sizes[3] = dim
    value.shape = ir.Shape(sizes)


def _raise_opset(model: ir.Model) -> None:
    """Count a graph to be of our opset, if its operators mean the same there; GenAI's are of opset 14 to 22."""
    opset = model.opset_imports.get("", 0)
    if not _FIRST_OPSET <= opset < OPSET:
        return
    changed = [node for node in model.graph if not node.domain and not _foreign(node) and not _unchanged(node, opset)]
    if not changed:
        model.opset_imports[""] = OPSET
    elif opset < 18:
        raise HqmqError(f"opset {opset}, and {name(changed[0])} means something else in later ones: export it again")


def _unchanged(node: ir.Node, opset: int) -> bool:
    if node.op_type in _SAME:
        return True
    try:
        old, new = (onnx.defs.get_schema(node.op_type, version, "") for version in (opset, OPSET))
    except onnx.defs.SchemaError:
        return False
    if node.op_type == "Split" and opset < 18 <= OPSET:
        if len(node.inputs) < 2 or node.inputs[1] is None:
            node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
        return True
    return bool(old.since_version == new.since_version)
