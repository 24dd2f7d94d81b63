"""Finding attention: from every pair of cache inputs to the softmax over it, and to its result.

Cases:
1. decomposed: Softmax of scores that MatMul makes of q and a cache, then MatMul with a cache. In between, in any order
   that makes sense: factors, soft-cap (Tanh), masks (Add, Where), Cast, subtraction of the maximum, one more column of
   sinks, and care for rows of NaN.
2. Attention (opset 23) whose K and V are caches joined before it.
3. Attention (opset 23) with cache inputs and outputs of its own.

What is found here is a claim; masks.py and verify.py evaluate it.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import onnx_ir as ir

from hqmq_trt.errors import HqmqError

from .interface import Interface
from .layer import Join, Layer, Term
from .microsoft_nodes import REFUSED
from .walk import SAME, climb, factor, name, number, reaches, standard, users

_SCORE = frozenset({"Mul", "Div", "Add", "Sub", "Cast", "Tanh", "Where", "Identity", "Concat"})
"""Operators between the product of q and k and the softmax."""


@dataclass
class _Scores:
    """What stands between MatMul(q, k) and the softmax."""

    product: ir.Node | None = None
    factor: float = 1.0
    softcap: float = 0.0
    sinks: ir.Value | None = None
    terms: list[Term] = field(default_factory=list)


def _join(past: ir.Value, interface: Interface) -> Join:
    nodes = [node for node in users(past) if not standard(node, "Shape")]
    if len(nodes) != 1:
        what = ", ".join(name(node) for node in nodes) or "nothing"
        raise HqmqError(f"cache input '{past.name}' is used by {what}; one node must join it with the new rows")
    node = nodes[0]
    if standard(node, "Concat") and len(node.inputs) == 2 and node.inputs[0] is past:
        new, full = node.inputs[1], node.outputs[0]
        if node.attributes["axis"].as_int() not in (2, -2):
            raise HqmqError(f"{name(node)} joins cache input '{past.name}' on another axis than that of tokens")
    elif standard(node, "Attention") and past in node.inputs[4:6]:
        role = node.inputs.index(past) - 4
        new, full = node.inputs[1 + role], node.outputs[1 + role] if len(node.outputs) > 1 + role else None
    elif (reason := node.metadata_props.get(REFUSED)) is not None:
        raise HqmqError(f"{name(node)}, over cache '{past.name}': {reason}")
    else:
        raise HqmqError(f"cache input '{past.name}' goes into {name(node)}; only Concat and Attention are known there")
    if new is None or full is None:
        raise HqmqError(f"{name(node)} does not give cache '{past.name}' with the new rows")
    if not any(_origin(output) is full for output in interface.present):
        raise HqmqError(f"{name(node)}: the cache '{past.name}' with the new rows is no output of the model")
    return Join(past, new, full, node)


def _origin(value: ir.Value) -> ir.Value:
    while standard(node := value.producer(), "Identity"):
        assert node is not None
        assert node.inputs[0] is not None
        value = node.inputs[0]
    return value


def find_layers(graph: ir.Graph, interface: Interface) -> tuple[list[Layer], list[str]]:
    """Attention layers in the order of their caches, and what was not understood."""
    problems: list[str] = []
    joins: dict[int, Join] = {}
    for past in interface.past:
        try:
            joins[id(past)] = _join(past, interface)
        except HqmqError as error:
            problems.append(str(error))
    by_full = {id(join.full): join for join in joins.values()}
    order = {id(past): position for position, past in enumerate(interface.past)}
    found: list[Layer] = []
    for node in graph:
        try:
            if standard(node, "Softmax"):
                layer = _decomposed(node, by_full)
            elif standard(node, "Attention"):
                layer = _operator(node, by_full)
            else:
                continue
        except HqmqError as error:
            problems.append(str(error))
            continue
        if layer is not None:
            found.append(layer)
    found.sort(key=lambda layer: order[id(layer.key.past)])
    taken: dict[int, Layer] = {}
    for layer in found:
        for join in (layer.key, layer.value):
            if id(join.past) in taken:
                problems.append(f"{name(layer.node)} and {name(taken[id(join.past)].node)} share '{join.past.name}'")
            taken[id(join.past)] = layer
    for join in joins.values():
        if id(join.past) not in taken and not any(f"'{join.past.name}'" in problem for problem in problems):
            near = ", ".join(name(node) for node in users(join.full)) or "nothing"
            problems.append(
                f"cache '{join.past.name}': no attention over the result of {name(join.node)} is known; it goes into "
                f"{near}"
            )
    return [replace(layer, index=index) for index, layer in enumerate(found)], problems


def _decomposed(node: ir.Node, by_full: dict[int, Join]) -> Layer | None:
    """Case 1; None if the softmax has nothing to do with a cache."""
    fulls = set(by_full)
    weighted = _weighted(node.outputs[0])
    right = weighted.inputs[1] if weighted is not None else None
    value = None if right is None else by_full.get(id(climb(right, fulls)[0]))
    if node.inputs[0] is None:
        return None
    scores = _scores(node, node.inputs[0], strict=value is not None)
    made = scores.product
    key, k_factor = None, 1.0
    if made is not None and made.inputs[1] is not None:
        top, k_factor = climb(made.inputs[1], fulls)
        key = by_full.get(id(top))
    if key is None and value is None:
        return None
    if key is None or made is None or made.inputs[0] is None:
        raise HqmqError(f"{name(node)} weighs cache '{value.past.name}', but its scores are of no cache")  # type: ignore[union-attr]
    if value is None or weighted is None or right is None:
        raise HqmqError(f"{name(node)} scores cache '{key.past.name}', but weighs no cache with it")
    if climb(right, fulls)[1] != 1.0:
        raise HqmqError(f"{name(weighted)}: V of cache '{value.past.name}' is multiplied by a number")
    if (axis := node.attributes.get_int("axis", -1)) not in (-1, 3):
        raise HqmqError(f"{name(node)} is over axis {axis}, not the last")
    q, q_factor = _queries(made.inputs[0], key, name(made))
    cap = scores.softcap
    y = _result(weighted.outputs[0], name(weighted))
    return _layer("decomposed", node, key, value, q, y, scores.factor * q_factor * k_factor * (cap or 1.0), scores)


def _scores(anchor: ir.Node, value: ir.Value, strict: bool) -> _Scores:
    """Walk up from the softmax to MatMul(q, k). `factor`: before the soft-cap, if there is one."""
    found = _Scores()
    while (node := value.producer()) is not None:
        if standard(node, "MatMul"):
            found.product = node
            break
        step = _score_step(node, found)
        if step is None:
            if strict:
                raise HqmqError(f"{name(anchor)}: {name(node)} between scores and softmax is not understood")
            break
        value = step
    return found


def _score_step(node: ir.Node, found: _Scores) -> ir.Value | None:
    scaled = factor(node)
    if scaled is not None:
        found.factor *= scaled[1]
        return scaled[0]
    if node.domain:
        return None
    if node.op_type in SAME:
        return node.inputs[0]
    if node.op_type == "Tanh" and not found.softcap:
        found.softcap, found.factor = found.factor, 1.0
        return node.inputs[0]
    if node.op_type == "Sub" and standard(_maker(node.inputs[1]), "ReduceMax"):
        return node.inputs[0]
    if node.op_type == "Concat" and len(node.inputs) == 2 and found.sinks is None and not found.terms:
        found.sinks = node.inputs[1]
        return node.inputs[0]
    if node.op_type == "Add":
        return _masked(node, found, (0, 1), "add")
    if node.op_type == "Where":
        condition, first, second = node.inputs
        if condition is not None and first is not None and second is not None:
            for scores, other, kind in ((first, second, "keep"), (second, first, "drop")):
                low = number(other)
                if reaches(scores, ("MatMul",), _SCORE) and low is not None and low <= -1e4:
                    found.terms.append(Term(kind, condition))
                    return scores
    return None


def _masked(node: ir.Node, found: _Scores, order: tuple[int, int], kind: str) -> ir.Value | None:
    for scores, mask in (order, order[::-1]):
        above, other = node.inputs[scores], node.inputs[mask]
        if above is not None and other is not None and reaches(above, ("MatMul",), _SCORE):
            found.terms.append(Term(kind, other))
            return above
    return None


def _maker(value: ir.Value | None) -> ir.Node | None:
    return None if value is None else value.producer()


def _weighted(value: ir.Value) -> ir.Node | None:
    """The MatMul with V below the softmax."""
    for _ in range(8):
        below = [node for node in users(value) if not standard(node, "IsNaN")]
        if len(below) != 1:
            return None
        node = below[0]
        if standard(node, "MatMul"):
            return node if node.inputs[0] is value else None
        if not standard(node, "Cast", "Identity", "Dropout", "Slice", "Where"):
            return None
        value = node.outputs[0]
    return None


def _queries(value: ir.Value, key: Join, where: str) -> tuple[ir.Value, float]:
    """The queries [B, Hq, T, D] above the scores' product, and the factor between."""
    product = 1.0
    while True:
        node = value.producer()
        scaled = factor(node)
        rank = None if value.shape is None else len(value.shape)
        if scaled is not None and scaled[0].shape is not None:
            value, product = scaled[0], product * scaled[1]
        elif standard(node, "Identity") or (rank != 4 and standard(node, "Reshape", "Squeeze", "Cast")):
            assert node is not None
            assert node.inputs[0] is not None
            value = node.inputs[0]
        else:
            break
    if value.shape is None or len(value.shape) != 4:
        raise HqmqError(f"{where}: its queries '{value.name}' are not of shape [batch, heads, tokens, head_dim]")
    return value, product


def _result(value: ir.Value, where: str) -> ir.Value:
    """The attention's result [B, Hq, T, D] below the product with V."""
    for _ in range(3):
        if value.shape is not None and len(value.shape) == 4:
            return value
        below = users(value)
        if len(below) != 1 or not standard(below[0], "Reshape", "Unsqueeze"):
            break
        value = below[0].outputs[0]
    raise HqmqError(f"{where}: its result '{value.name}' has no shape [batch, heads, tokens, head_dim]")


def _operator(node: ir.Node, by_full: dict[int, Join]) -> Layer | None:
    """Cases 2 and 3; None for an Attention without a cache."""
    given = [*node.inputs, None, None, None, None][:6]
    joined = given[4] is not None or given[5] is not None
    if joined:
        sides = [by_full.get(id(node.outputs[i])) if len(node.outputs) > i else None for i in (1, 2)]
        moved = [1.0, 1.0]
    else:
        tops = [climb(value, set(by_full)) if value is not None else (None, 1.0) for value in given[1:3]]
        sides, moved = [by_full.get(id(top)) for top, _ in tops], [by for _, by in tops]
    if sides == [None, None]:
        return None
    key, value = sides
    if key is None or value is None:
        known = key or value
        raise HqmqError(f"{name(node)} takes cache '{known.past.name}', but its other half is no cache")  # type: ignore[union-attr]
    if moved[1] != 1.0:
        raise HqmqError(f"{name(node)}: V of cache '{value.past.name}' is multiplied by a number")
    if len(node.inputs) > 6 and node.inputs[6] is not None:
        raise HqmqError(f"{name(node)}: nonpad_kv_seqlen is not supported")
    if len(node.outputs) > 3 and (node.outputs[3].uses() or node.outputs[3].is_graph_output()):
        raise HqmqError(f"{name(node)}: its scores are read, which no packed cache gives")
    assert node.inputs[0] is not None
    q, q_factor = _queries(node.inputs[0], key, name(node))
    dim = key.past.shape[3]
    scores = _Scores(None, 1.0, node.attributes.get_float("softcap", 0.0))
    if given[3] is not None:
        scores.terms.append(Term("keep" if given[3].dtype == ir.DataType.BOOL else "add", given[3]))
    scale = node.attributes.get_float("scale", int(dim) ** -0.5) * q_factor * moved[0]
    y = _result(node.outputs[0], name(node))
    form = "Attention with cache" if joined else "Attention"
    return _layer(form, node, key, value, q, y, scale, scores, bool(node.attributes.get_int("is_causal", 0)))


def _layer(
    form: str,
    node: ir.Node,
    key: Join,
    value: Join,
    q: ir.Value,
    y: ir.Value,
    scale: float,
    scores: _Scores,
    causal: bool = False,
) -> Layer:
    kv_heads, kv_dim = (int(key.past.shape[axis]) for axis in (1, 3))
    heads, dim = q.shape[1], q.shape[3]
    if not isinstance(dim, int):
        dim = kv_dim  # tried later, as everything else
    if not isinstance(heads, int):
        heads = _projected_heads(q, dim)
    if not isinstance(heads, int) or not isinstance(dim, int):
        raise HqmqError(f"{name(node)}: its queries '{q.name}' {q.shape} have a symbolic number of heads or head_dim")
    if [int(value.past.shape[axis]) for axis in (1, 3)] != [kv_heads, kv_dim] or dim != kv_dim:
        raise HqmqError(
            f"{name(node)}: q, K and V differ in head_dim or heads ({dim}, '{key.past.name}' {key.past.shape}, "
            f"'{value.past.name}' {value.past.shape}); latent attention is not supported"
        )
    if heads % kv_heads:
        raise HqmqError(f"{name(node)}: {heads} query heads are no multiple of {kv_heads} cache heads")
    sinks = None if scores.sinks is None else _sinks(scores.sinks, heads, node)
    return Layer(
        0, form, node, key, value, q, y, heads, kv_heads, kv_dim, scale, scores.softcap, sinks,
        tuple(scores.terms), causal,
    )  # fmt: skip


def _projected_heads(q: ir.Value, dim: int) -> int | None:
    """Query heads, from the width of the projections above the queries; None if those differ or are not found."""
    widths: set[int | None] = set()
    todo = [q]
    seen: set[int] = set()
    while todo and len(seen) < 200:
        node = todo.pop().producer()
        if node is None or id(node) in seen or standard(node, "Shape"):
            continue
        seen.add(id(node))
        matrix = node.inputs[1] if standard(node, "MatMul", "Gemm") else None
        if standard(node, "Split"):
            return None
        if matrix is not None and matrix.const_value is not None and len(matrix.const_value.shape) == 2:
            axis = 0 if node.attributes.get_int("transB", 0) else 1
            widths.add(int(matrix.const_value.shape[axis]))
        elif node.op_type not in ("Cos", "Sin"):
            todo += [value for value in node.inputs if value is not None]
    width = widths.pop() if len(widths) == 1 else None
    return width // dim if width and width % dim == 0 else None


def _sinks(value: ir.Value, heads: int, node: ir.Node) -> ir.Value:
    """The constant of sinks, one a query head, above the column that is added to the scores."""
    top, by = climb(value, set())
    if top.const_value is None or top.const_value.size != heads or by != 1.0:
        raise HqmqError(f"{name(node)}: the column '{value.name}' beside its scores is not one constant a head (sinks)")
    return top
