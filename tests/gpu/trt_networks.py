"""Small TensorRT engines of com.hqmq nodes, run on torch CUDA tensors: what tests of the plugins share.

All nodes of an engine share past_length, new_length and length; everything else is a node's own. Building takes
seconds, so many nodes sit in one engine; with HQMQ_TEST_PLANS=FOLDER in the environment plans are kept there and used
again, which spares a run under compute-sanitizer the builder.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from hqmq_trt import contract
from hqmq_trt.format import cache_tensors
from hqmq_trt.scheme import ROLES, Scheme
from tests.codec_cases import codebook

PLANS_VARIABLE = "HQMQ_TEST_PLANS"
ONNX_TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int32: TensorProto.INT32,
}
LENGTHS = ("past_length", "new_length", "length")


@dataclass(frozen=True)
class Sizes:
    """Sequences, new rows of each, tokens the cache holds (a multiple of every node's page size)."""

    batch: int
    tokens: int
    capacity: int


Spec = tuple[torch.dtype, tuple[int, ...]]


@dataclass(frozen=True)
class Node:
    """One HqmqAttention, or with `role` one HqmqQuantize followed by HqmqDequantize. Its tensors begin with `name`."""

    scheme: str
    head_dim: int
    heads: int = 2
    group: int = 1
    window: int = 0
    softcap: float = 0.0
    sinks: bool = False
    role: str = ""

    @property
    def parsed(self) -> Scheme:
        """The scheme."""
        return Scheme.parse(self.scheme)

    @property
    def name(self) -> str:
        """Unique among the nodes of an engine."""
        parts = [self.scheme, f"d{self.head_dim}", self.role or f"h{self.heads}x{self.group}"]
        options = (("w", self.window), ("c", self.softcap), ("sinks", self.sinks))
        return "-".join(parts + [f"{key}{value:g}" for key, value in options if value])

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles whose caches the node holds."""
        return (self.role,) if self.role else ROLES

    def past(self, role: str, sizes: Sizes) -> dict[str, Spec]:
        """Cache tensors of one role by their names without ``past.``."""
        scheme = self.parsed
        pages = sizes.capacity // scheme.page_size
        specs = cache_tensors(
            scheme.role(role), scheme.page_size, self.head_dim, self.heads, sizes.batch, max(pages, 1)
        )
        return {f"{role}.{spec.name}": (getattr(torch, spec.dtype), spec.shape) for spec in specs}

    def inputs(self, sizes: Sizes, dtype: torch.dtype) -> dict[str, Spec]:
        """Network inputs of this node; `dtype` of the activations."""
        rows = (sizes.tokens, self.head_dim)
        found: dict[str, Spec] = {}
        if self.role:
            found["x"] = (dtype, (sizes.batch, self.heads, *rows))
        else:
            found["q"] = (dtype, (sizes.batch, self.heads * self.group, *rows))
            found |= dict.fromkeys("kv", (dtype, (sizes.batch, self.heads, *rows)))
        if self.sinks:
            found["sinks"] = (dtype, (self.heads * self.group,))
        for role in self.roles:
            found |= {f"past.{key}": spec for key, spec in self.past(role, sizes).items()}
        return {f"{self.name}.{key}": spec for key, spec in found.items()}

    def outputs(self, sizes: Sizes, dtype: torch.dtype) -> dict[str, Spec]:
        """Network outputs of this node."""
        if self.role:
            dense = (sizes.batch, self.heads, sizes.capacity, self.head_dim)
            found: dict[str, Spec] = {"dense": (torch.float32, dense)}
        else:
            found = {"y": (dtype, (sizes.batch, self.heads * self.group, sizes.tokens, self.head_dim))}
        for role in self.roles:
            found |= {f"present.{key}": spec for key, spec in self.past(role, sizes).items()}
        return {f"{self.name}.{key}": spec for key, spec in found.items()}

    def graph(self) -> tuple[list[onnx.NodeProto], list[onnx.TensorProto]]:
        """ONNX nodes and the codebooks they read."""
        scheme, smallest = self.parsed, Sizes(1, 1, 1024)
        books: list[str] = []
        weights = []
        for role in self.roles:
            names = [f"{self.name}.codebook.{role}.{part}" for part in ("secondaries", "levels")]
            found = codebook(scheme.role(role), self.heads, role)
            weights += [numpy_helper.from_array(b.numpy(), n) for b, n in zip(found, names, strict=False)]
            books += names[: len(found)]
        keys = [key for role in self.roles for key in self.past(role, smallest)]
        past, present = ([f"{self.name}.{side}.{key}" for key in keys] for side in ("past", "present"))

        def own(*keys: str) -> list[str]:
            return [f"{self.name}.{key}" for key in keys]

        def node(op: str, inputs: list[str], outputs: list[str], attributes: Mapping[str, Any]) -> onnx.NodeProto:
            return helper.make_node(op, inputs, outputs, f"{self.name}.{op}", domain=contract.DOMAIN, **attributes)

        if self.role:
            codec = contract.role_attributes(scheme.role(self.role), self.head_dim, scheme.page_size)
            attributes = {**codec, **contract.common_attributes(scheme.page_size)}
            quantize = [*own("x"), *LENGTHS[:2], *books, *past]
            dequantize = [LENGTHS[2], *books, *present]
            return [
                node(contract.QUANTIZE, quantize, present, attributes),
                node(contract.DEQUANTIZE, dequantize, own("dense"), attributes),
            ], weights
        inputs = [*own("q", "k", "v"), *LENGTHS[:2], *(own("sinks") if self.sinks else []), *books, *past]
        attributes = contract.attention_attributes(
            scheme, self.head_dim, self.head_dim**-0.5, self.window, self.softcap, self.sinks
        )
        return [node(contract.ATTENTION, inputs, [*own("y"), *present], attributes)], weights


def _inputs(nodes: Sequence[Node], sizes: Sizes, dtype: torch.dtype) -> dict[str, Spec]:
    used = LENGTHS if any(node.role for node in nodes) else LENGTHS[:2]
    found: dict[str, Spec] = dict.fromkeys(used, (torch.int32, (sizes.batch,)))
    for node in nodes:
        found |= node.inputs(sizes, dtype)
    return found


def onnx_model(nodes: Sequence[Node], dtype: torch.dtype) -> onnx.ModelProto:
    """One graph with every node side by side; sizes of batch, tokens and cache are dynamic."""
    one, two = Sizes(2, 5, 1024), Sizes(3, 7, 2048)

    def infos(a: dict[str, Spec], b: dict[str, Spec]) -> Iterator[onnx.ValueInfoProto]:
        for name, (kind, shape) in a.items():
            dims = [x if x == y else None for x, y in zip(shape, b[name][1], strict=True)]
            yield helper.make_tensor_value_info(name, ONNX_TYPES[kind], dims)

    parts = [node.graph() for node in nodes]
    outputs = [info for node in nodes for info in infos(node.outputs(one, dtype), node.outputs(two, dtype))]
    graph = helper.make_graph(
        [proto for protos, _ in parts for proto in protos],
        "plugins",
        list(infos(_inputs(nodes, one, dtype), _inputs(nodes, two, dtype))),
        outputs,
        [weight for _, weights in parts for weight in weights],
    )
    imports = [helper.make_opsetid("", 20), helper.make_opsetid(contract.DOMAIN, contract.OPSET_VERSION)]
    return helper.make_model(graph, opset_imports=imports, ir_version=9)


@lru_cache(maxsize=1)
def logger() -> Any:
    """TensorRT's logger for all engines of this process; `messages` keeps warnings and errors."""
    import tensorrt as trt

    class Log(trt.ILogger):
        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            levels = trt.ILogger.Severity
            if severity in (levels.INTERNAL_ERROR, levels.ERROR, levels.WARNING):
                self.messages.append(message)

    return Log()


@lru_cache(maxsize=1)
def _runtime() -> Any:
    import tensorrt as trt

    from hqmq_trt.engine.plugin_library import load_plugin_library

    load_plugin_library(logger())
    return trt.Runtime(logger())


@lru_cache(maxsize=1)
def _builder() -> Any:
    import tensorrt as trt

    _runtime()
    return trt.Builder(logger())


def _last(count: int = 6) -> str:
    return " | ".join(logger().messages[-count:])


def _build(nodes: Sequence[Node], dtype: torch.dtype, limits: Sizes, model: bytes) -> bytes:
    import tensorrt as trt

    builder = _builder()
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, logger())
    if not parser.parse(model):
        errors = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise AssertionError(f"TensorRT cannot parse the nodes: {errors} | {_last()}")
    config = builder.create_builder_config()
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    profile = builder.create_optimization_profile()
    largest = _inputs(nodes, limits, dtype)
    page = max(node.parsed.page_size for node in nodes)
    for name, (_, shape) in _inputs(nodes, Sizes(1, 1, page), dtype).items():
        profile.set_shape(name, shape, largest[name][1], largest[name][1])
    config.add_optimization_profile(profile)
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, f"TensorRT built no engine: {_last()}"
    return bytes(plan)


class Engine:
    """An engine of `nodes` for up to `limits`; deserialised once."""

    def __init__(self, nodes: Sequence[Node], dtype: torch.dtype, limits: Sizes) -> None:
        import tensorrt as trt

        from hqmq_trt.engine.plugin_library import find_plugin_library

        self.nodes, self.dtype, self.limits = tuple(nodes), dtype, limits
        model = onnx_model(nodes, dtype).SerializeToString(deterministic=True)
        folder = os.environ.get(PLANS_VARIABLE)
        digest = hashlib.sha256(model + repr((limits, trt.__version__)).encode())
        digest.update(find_plugin_library().read_bytes())
        kept = Path(folder, f"{digest.hexdigest()[:20]}.plan") if folder else None
        plan = kept.read_bytes() if kept and kept.is_file() else _build(nodes, dtype, limits, model)
        if kept and not kept.is_file():
            kept.parent.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(f".{os.getpid()}")
            part.write_bytes(plan)
            part.rename(kept)
        self.engine = _runtime().deserialize_cuda_engine(plan)
        assert self.engine is not None, f"TensorRT cannot load the plan: {_last()}"


class Run:
    """An execution context with its inputs and outputs on the GPU.

    `inputs` are CPU tensors by name; they reach the GPU by copies only, so that initcheck can tell what was written.
    Present tensors have the memory of their past tensors, or with aliased=False their own.
    """

    def __init__(self, engine: Engine, sizes: Sizes, inputs: Mapping[str, Tensor], aliased: bool = True) -> None:
        self.engine, self.aliased = engine, aliased
        self.context = engine.engine.create_execution_context()
        assert self.context is not None, _last()
        self.stream = torch.cuda.Stream()
        self.inputs: dict[str, Tensor] = {}
        self.outputs: dict[str, Tensor] = {}
        self.set(sizes, inputs)

    def set(self, sizes: Sizes, inputs: Mapping[str, Tensor]) -> None:
        """Take over `inputs`; those not named stay, which is how a cache goes on from one step to the next."""
        for name, tensor in inputs.items():
            self.inputs[name] = tensor.contiguous().cuda()
            assert self.context.set_input_shape(name, tuple(tensor.shape)), f"{name}: {_last()}"
        for node in self.engine.nodes:
            for name, (kind, shape) in node.outputs(sizes, self.engine.dtype).items():
                past = name.replace(".present.", ".past.")
                if self.aliased and past != name:
                    self.outputs[name] = self.inputs[past]
                else:
                    self.outputs[name] = torch.empty(shape, dtype=kind, device="cuda")
        for name, tensor in (*self.inputs.items(), *self.outputs.items()):
            assert self.context.set_tensor_address(name, tensor.data_ptr()), f"{name}: {_last()}"
        missing = self.context.infer_shapes()
        assert not missing, f"shapes of {missing}: {_last()}"
        for name, tensor in self.outputs.items():
            assert tuple(self.context.get_tensor_shape(name)) == tuple(tensor.shape), name
        torch.cuda.synchronize()

    def enqueue(self) -> None:
        """Start the engine on `stream`."""
        assert self.context.execute_async_v3(self.stream.cuda_stream), _last()

    def __call__(self) -> dict[str, Tensor]:
        """Run once; outputs on the CPU."""
        self.enqueue()
        self.stream.synchronize()
        return {name: tensor.cpu() for name, tensor in self.outputs.items()}
