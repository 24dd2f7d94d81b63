"""Mutated decoders: each is refused, or rewritten rightly, which is tried by running both."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hqmq_trt.errors import HqmqError
from hqmq_trt.export.rewrite import rewrite_model
from tests import rewrite_cases as cases
from tests.tiny_decoders import make_model

LENGTHS = ([9, 5, 2], [4, 1, 0], [1, 1, 1])
MUTATIONS = 42


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> onnx.ModelProto:
    path = tmp_path_factory.mktemp("fuzz") / "model.onnx"
    cases.export_traced(make_model("mistral"), path)
    return onnx.load(path)


def number(model: onnx.ModelProto, rng: random.Random) -> str:
    """Change one element of a small constant: scales, sizes, window, axes."""
    small = [t for t in model.graph.initializer if int(np.prod(t.dims)) <= 8]
    held = [(n, a) for n in model.graph.node if n.op_type == "Constant" for a in n.attribute if a.name == "value"]
    small += [attribute.t for _, attribute in held if int(np.prod(attribute.t.dims)) <= 8]
    tensor = rng.choice(small)
    array = onnx.numpy_helper.to_array(tensor).copy()
    if array.dtype == bool:
        array = ~array
    else:
        array.reshape(-1)[rng.randrange(array.size)] += rng.choice([1, -1, 2])
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    return f"number {tensor.name}"


def swap(model: onnx.ModelProto, rng: random.Random) -> str:
    """Exchange the inputs of a node."""
    node = rng.choice([node for node in model.graph.node if len(node.input) >= 2])
    node.input[0], node.input[1] = node.input[1], node.input[0]
    return f"swap {node.name}"


def drop(model: onnx.ModelProto, rng: random.Random) -> str:
    """Take a node out: its readers read its first input."""
    node = rng.choice([node for node in model.graph.node if node.input and len(node.output) == 1])
    for other in model.graph.node:
        for place, name in enumerate(other.input):
            if name == node.output[0]:
                other.input[place] = node.input[0]
    return f"drop {node.name}"


def kind(model: onnx.ModelProto, rng: random.Random) -> str:
    """Another operator with the same inputs."""
    other = {"Mul": "Add", "Add": "Sub", "Div": "Mul", "LessOrEqual": "Less", "Greater": "GreaterOrEqual", "And": "Or"}
    node = rng.choice([node for node in model.graph.node if node.op_type in other])
    node.op_type = other[node.op_type]
    return f"kind {node.name}"


def rewire(model: onnx.ModelProto, rng: random.Random) -> str:
    """An input taken from the same place of a like node elsewhere, before it."""
    nodes = list(model.graph.node)
    for _ in range(100):
        second = rng.randrange(1, len(nodes))
        like = [node for node in nodes[:second] if node.op_type == nodes[second].op_type and node.input]
        if like and nodes[second].input:
            place = rng.randrange(len(nodes[second].input))
            source = rng.choice(like)
            if place < len(source.input) and source.input[place] != nodes[second].input[place]:
                nodes[second].input[place] = source.input[place]
                return f"rewire {nodes[second].name}:{place}"
    raise AssertionError("no two nodes are alike")


def attribute(model: onnx.ModelProto, rng: random.Random) -> str:
    """An axis or permutation changed."""
    found = [(n, a) for n in model.graph.node for a in n.attribute if a.name in ("axis", "perm", "keepdims")]
    node, chosen = rng.choice(found)
    if chosen.name == "perm":
        i, j = rng.sample(range(len(chosen.ints)), 2)
        chosen.ints[i], chosen.ints[j] = chosen.ints[j], chosen.ints[i]
    else:
        chosen.i = rng.choice([-1, 0, 1, 2])
    return f"attribute {node.name}.{chosen.name}"


def test_mutated_decoders(decoder: onnx.ModelProto, tmp_path: Path) -> None:
    """Nothing but HqmqError is raised, nothing is left behind, and what is rewritten is right."""
    kinds = [number, swap, drop, kind, rewire, attribute]
    refused = rewritten = 0
    for seed in range(MUTATIONS):
        rng = random.Random(seed)
        model: Any = onnx.ModelProto()
        model.CopyFrom(decoder)
        what = kinds[seed % len(kinds)](model, rng)
        path, output = tmp_path / "m.onnx", tmp_path / f"out{seed}"
        onnx.save(model, path)
        try:
            rewrite_model(path, output, "fp16@p8")
        except HqmqError:
            assert not output.exists()
            refused += 1
            continue
        rewritten += 1
        wanted, found = cases.run_original(model, LENGTHS), cases.run_rewritten(output, LENGTHS)
        assert cases.mean_difference(wanted, found) < 1e-3, f"seed {seed}: {what}"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]
    assert refused >= MUTATIONS // 4
    assert rewritten >= 3
