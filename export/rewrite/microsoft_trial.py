"""Trying what an operator of ONNX Runtime is written out to: both run on the same random inputs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError

from .microsoft_nodes import Context, Feed, Rule, Trial, shape_of, take_over, wanted

_TOLERANCE = {ir.DataType.FLOAT16: 1e-2}
_SINGLE = ir.DataType.FLOAT


class _Alone:
    """A node alone in a graph: its constants are constants there, its other inputs are inputs named by position.

    bfloat16 becomes float32, since ONNX Runtime's CPU kernels do not run it.
    """

    def __init__(self, model: ir.Model, node: ir.Node, drop: Iterable[str]) -> None:
        self.ids = ir.Value(name="ids", shape=ir.Shape(["B", "T"]), type=ir.TensorType(ir.DataType.INT64))
        self.fed: dict[int, ir.DataType] = {}
        inputs: list[ir.Value | None] = []
        constants, variables = [], [self.ids]
        for place, value in enumerate(node.inputs):
            if value is None or value.name == "":
                inputs.append(None)
                continue
            dtype = value.dtype if value.dtype is not None else _type_beside(node)
            dtype = _SINGLE if dtype == ir.DataType.BFLOAT16 else dtype
            mine = ir.Value(name=f"in{place}", shape=shape_of(value), type=ir.TensorType(dtype))
            if value.const_value is not None:
                array = np.array(value.const_value.numpy())  # a copy: views keep files of weights open
                widened = value.const_value.dtype == ir.DataType.BFLOAT16
                mine.const_value = ir.tensor(
                    array.astype(np.float32) if widened else array,
                    dtype=_SINGLE if widened else value.const_value.dtype,
                    name=mine.name,
                )
                mine.shape, mine.type = ir.Shape(array.shape), ir.TensorType(mine.const_value.dtype)
                constants.append(mine)
            else:
                self.fed[place] = dtype
                variables.append(mine)
            inputs.append(mine)
        self.node = ir.Node(
            node.domain,
            node.op_type,
            inputs,
            [attribute for name, attribute in node.attributes.items() if name not in drop],
            num_outputs=len(node.outputs),
            name="tried",
        )
        self.outputs = [place for place in range(len(node.outputs)) if wanted(node, place)]
        for place, output in enumerate(self.node.outputs):
            output.name = f"out{place}" if place in self.outputs else ""
        graph = ir.Graph(
            variables,
            [self.node.outputs[place] for place in self.outputs],
            nodes=[self.node],
            initializers=constants,
            opset_imports=dict(model.opset_imports),
            name="trial",
        )
        self.model = ir.Model(graph, ir_version=model.ir_version or 10)

    def session(self) -> ort.InferenceSession:
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = 1
        options.enable_cpu_mem_arena = False
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        proto = ir.to_proto(self.model)
        for value in proto.graph.input:
            value.type.tensor_type.ClearField("shape")
        for value in proto.graph.output:
            value.ClearField("type")
        return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def run(self, session: ort.InferenceSession, feed: Feed, trial: Trial) -> list[NDArray[Any]]:
        given = {f"in{place}": np.asarray(feed[place], dtype.numpy()) for place, dtype in self.fed.items()}
        given["ids"] = np.zeros(trial.tokens, np.int64)
        known = {value.name for value in session.get_inputs()}
        found = session.run(None, {name: array for name, array in given.items() if name in known})
        return [np.asarray(array, np.float32) for array in found]


def _type_beside(node: ir.Node) -> ir.DataType:
    """The type of a node's floating inputs, of which one at least is known."""
    for value in node.inputs:
        if value is not None and value.dtype in (_SINGLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
            assert value.dtype is not None
            return value.dtype
    raise HqmqError("its inputs are of unknown type")


def try_rule(model: ir.Model, node: ir.Node, rule: Rule) -> None:
    """Run a node and what `rule` makes of it.

    Raises:
        HqmqError: the rule does not take the node, ONNX Runtime does not run it, or results differ.
    """
    ours = _Alone(model, node, ())
    apply(Context(ours.model.graph, ours.ids), ours.node, rule)
    theirs = _Alone(model, node, rule.inexact)
    trials = rule.trials(theirs.node, np.random.default_rng(0))
    try:
        results = _all(theirs, [(trial.given, trial) for trial in trials])
    except HqmqError:
        if rule.stand_in is None or not rule.stand_in(Context(theirs.model.graph, theirs.ids), theirs.node):
            raise
        results = _all(theirs, [(trial.given, trial) for trial in trials])
    again = _all(ours, [(trial.given if trial.ours is None else trial.ours, trial) for trial in trials])
    half = ir.DataType.FLOAT16 in ours.fed.values()
    limit = _TOLERANCE[ir.DataType.FLOAT16] if half else 1e-4
    for trial, wanted_arrays, found_arrays in zip(trials, results, again, strict=True):
        for place, a, b in zip(ours.outputs, wanted_arrays, found_arrays, strict=True):
            rows = trial.rows.get(place)
            a, b = (a, b) if rows is None else (a[:, :, :rows], b[:, :, :rows])
            if a.shape != b.shape:
                raise HqmqError(f"tried, it gives {list(a.shape)} where {list(b.shape)} was expected")
            off = float(np.abs(a - b).max(initial=0.0))
            if not off <= limit * max(1.0, float(np.abs(a).max(initial=0.0))):
                raise HqmqError(f"tried, it is not what its attributes say: results differ by {off:.2g}")


def apply(context: Context, node: ir.Node, rule: Rule) -> None:
    """Put what a rule makes in the place of a node."""
    new = rule.write(context, node)
    for old, value in zip(node.outputs, new, strict=False):
        if value is not None:
            take_over(context.graph, old, value)
    context.graph.remove(node, safe=True)


def _all(alone: _Alone, feeds: list[tuple[Feed, Trial]]) -> list[list[NDArray[Any]]]:
    try:
        session = alone.session()
        return [alone.run(session, feed, trial) for feed, trial in feeds]
    except Exception as error:  # ONNX Runtime raises a type per status code
        raise HqmqError(f"ONNX Runtime does not run it: {' '.join(str(error).split())[:240]}") from error
