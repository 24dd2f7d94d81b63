"""From a captured module to the finished ONNX graph: interface, names, weights."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnxscript.optimizer
import torch
import torch._dynamo.config
from onnx_ir.passes import common

from hqmq_trt import codebooks, contract
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import CacheTensor, cache_tensors
from hqmq_trt.manifest import codebook_name
from hqmq_trt.scheme import ROLES, Scheme

from . import functions, weights
from .capture import CaptureModule
from .layers import AttentionLayer
from .simplify import simplify
from .translate import TABLE

OPSET = 23
IR_VERSION = 10
"""The first with overloads of local functions."""

# Example sizes of the capture. All differ, and none is 0 or 1, which torch.export would take for constants.
_BATCH, _ROWS, _LOGITS, _PAGES = 2, 5, 3, 4

_CODEBOOK_INPUT = {contract.QUANTIZE: 3, contract.DEQUANTIZE: 1, contract.ATTENTION: 5}
"""Position of the first codebook among an operator's inputs, without sinks."""
_SCOPES = "pkg.torch.onnx.name_scopes"


def cache_names(scheme: Scheme, layers: Sequence[AttentionLayer]) -> list[str]:
    """Names of all cache tensors in the order of the graph, without ``past.`` and ``present.``."""
    return [f"{layer.index}.{role}.{spec.name}" for layer in layers for role, spec in _specs(scheme, layer)]


def _specs(scheme: Scheme, layer: AttentionLayer) -> Iterator[tuple[str, CacheTensor]]:
    for role in ROLES:
        sizes = (scheme.page_size, layer.head_dim, layer.num_kv_heads, _BATCH, _PAGES)
        for spec in cache_tensors(scheme.role(role), *sizes):
            yield role, spec


def build(model: Any, scheme: Scheme, mode: str, layers: Sequence[AttentionLayer], bodies: bool = True) -> ir.Model:
    """The ONNX model of a language model whose attention implementation is the exporter's.

    `bodies`: give HqmqQuantize and HqmqDequantize function bodies.

    Raises:
        HqmqError: torch.onnx cannot capture the model.
    """
    captured = _capture(CaptureModule(model, scheme, mode, layers), scheme, layers, model.device)
    weights.share_tied(captured.model)
    weights.fold_value_rotation(captured.model, layers)
    weights.store_transposed(captured.model)
    weights.strip_prefix(captured.model)
    result: ir.Model = captured.model
    with _quiet():
        _optimise(result)
    names = cache_names(scheme, layers)
    fixed = ["input_ids", "past_length", "new_length", "logits_index"]
    _rename(result.graph.inputs, [*fixed, *(f"past.{name}" for name in names)])
    _rename(result.graph.outputs, ["logits", "present_length", *(f"present.{name}" for name in names)])
    _attach_codebooks(result, scheme, layers)
    _name_nodes(result.graph)
    if bodies:
        functions.attach(result)
    result.ir_version = max(IR_VERSION, result.ir_version or 0)
    result.opset_imports[contract.DOMAIN] = contract.OPSET_VERSION
    result.producer_name, result.producer_version = "hqmq-trt", None
    result.graph.name = type(model).__name__
    for node in result.graph.all_nodes():
        node.metadata_props.clear()  # stack traces of the exporting machine
    return result


def _optimise(model: ir.Model) -> None:
    """onnxscript's optimiser without its general rewrite rules, which take a third of an export and save no time in a
    decoder, and without its fusions to opset 23 (RMSNormalization, RotaryEmbedding): TensorRT knows those from 10.15
    only, and ONNX Runtime is no faster with them."""
    common.InlinePass()(model)
    onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
    simplify(model)
    for _ in range(2):
        onnxscript.optimizer.fold_constants(model, onnx_shape_inference=True)
        common.RemoveUnusedNodesPass()(model)
    ir.passes.Sequential(
        common.RemoveUnusedFunctionsPass(),
        common.RemoveUnusedOpsetsPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.LiftSubgraphInitializersToMainGraphPass(),
        common.DeduplicateInitializersPass(),
        common.CommonSubexpressionEliminationPass(),
        common.OutputFixPass(),
        common.NameFixPass(),
    )(model)


def _capture(module: CaptureModule, scheme: Scheme, layers: Sequence[AttentionLayer], device: Any) -> Any:
    batch, rows, logits, capacity, pages = (
        torch.export.Dim(name) for name in ("batch", "sequence", "num_logits", "capacity", "pages")
    )

    def dims(spec: CacheTensor) -> dict[int, Any]:
        if spec.name == "tail":
            return {0: batch}
        return {0: batch, 2: capacity if spec.name == "codes" else pages}

    def zeros(*shape: int, dtype: torch.dtype) -> torch.Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    past = [
        [zeros(*spec.shape, dtype=getattr(torch, spec.dtype)) for _, spec in _specs(scheme, layer)] for layer in layers
    ]
    lengths = zeros(_BATCH, dtype=torch.int32)
    example = (
        zeros(_BATCH, _ROWS, dtype=torch.int64),
        lengths,
        torch.full_like(lengths, _ROWS),
        zeros(_BATCH, _LOGITS, dtype=torch.int64),
        past,
    )
    dynamic = {
        "input_ids": {0: batch, 1: rows},
        "past_length": {0: batch},
        "new_length": {0: batch},
        "logits_index": {0: batch, 1: logits},
        "past": [[dims(spec) for _, spec in _specs(scheme, layer)] for layer in layers],
    }
    try:
        # The cache of fake tensors costs a fifth of the capture: with symbolic shapes it computes more than it saves.
        with _quiet(), torch.no_grad(), torch._dynamo.config.patch(fake_tensor_cache_enabled=False):
            return torch.onnx.export(
                module.to(device),
                example,
                dynamo=True,
                dynamic_shapes=dynamic,
                opset_version=OPSET,
                custom_translation_table=TABLE,
                optimize=False,
                verbose=False,
            )
    except HqmqError:
        raise
    except Exception as error:
        causes = []
        cause: BaseException | None = error
        while cause is not None:
            causes.append(cause)
            cause = cause.__cause__
        if any(type(cause).__name__ == "GuardOnDataDependentSymNode" for cause in causes):
            raise HqmqError(
                f"torch.export cannot capture {type(module.model).__name__}: which code runs depends on the data, as "
                "in experts that do not use the experts interface of transformers"
            ) from error
        root = " ".join(str(causes[-1]).split())[:300]
        raise HqmqError(
            f"torch.onnx cannot capture {type(module.model).__name__}: {type(causes[-1]).__name__}: {root}"
        ) from error


def _attach_codebooks(model: ir.Model, scheme: Scheme, layers: Sequence[AttentionLayer]) -> None:
    """Give every operator the codebooks of its own layer and role: the optimiser merges equal initialisers."""
    for name, value in list(model.graph.initializers.items()):
        if name.startswith("codebook."):
            value.name = f"merged.{name}"
    values: dict[tuple[int, str], list[ir.Value]] = {}
    for layer in layers:
        for role in ROLES:
            codec = scheme.role(role)
            parts = values[layer.index, role] = []
            if codec.packed:
                secondaries = codebooks.secondaries(codec, scheme.seed, layer.index, layer.num_kv_heads, role)
                for part, array in (("secondaries", secondaries), ("levels", codebooks.levels(codec))):
                    tensor = ir.tensor(array, name=codebook_name(layer.index, role, part))
                    value = ir.Value(name=tensor.name, shape=tensor.shape, type=ir.TensorType(tensor.dtype))
                    value.const_value = tensor
                    model.graph.register_initializer(value)
                    parts.append(value)
    for node in model.graph:
        if node.domain != contract.DOMAIN:
            continue
        layer_index, role_name = _place(node)
        roles = ROLES if node.op_type == contract.ATTENTION else (role_name,)
        position = _CODEBOOK_INPUT[node.op_type]
        if node.op_type == contract.ATTENTION:
            position += node.attributes["has_sinks"].as_int()
        for offset, value in enumerate(value for role in roles for value in values[layer_index, role]):
            node.replace_input_with(position + offset, value)
        _type_outputs(node)
    for name in [name for name in model.graph.initializers if name.startswith("merged.")]:
        assert not model.graph.initializers[name].uses()
        del model.graph.initializers[name]


def _type_outputs(node: ir.Node) -> None:
    """Types and shapes of an operator's outputs, which shape inference cannot know from its variadic schema."""
    outputs = list(node.outputs)
    if node.op_type == contract.DEQUANTIZE:
        outputs[0].type = ir.TensorType(ir.DataType.FLOAT)
        return
    if node.op_type == contract.ATTENTION:
        outputs[0].type = node.inputs[0].type
        del outputs[0]
    for output, past in zip(outputs, node.inputs[-len(outputs) :], strict=True):
        assert past is not None
        output.type, output.shape = past.type, past.shape


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter's libraries say about packages and types that do not matter here."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnx_ir", "onnxscript")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, before, strict=True):
            logger.setLevel(level)


def _rename(values: Sequence[ir.Value], names: Sequence[str]) -> None:
    if len(values) != len(names):
        raise RuntimeError(f"the captured graph has {len(values)} inputs or outputs, expected {len(names)}")
    for value, name in zip(values, names, strict=True):
        value.name = name


def _name_nodes(graph: ir.Graph) -> None:
    """Names such as ``layers.3.self_attn.MatMul_2``; ``layers.3.attention`` for the operators of com.hqmq."""
    seen: dict[str, int] = {}
    for node in graph:
        if node.domain == contract.DOMAIN:
            name = _operator_name(node)
        else:
            scopes = node.metadata_props.get(_SCOPES, "[]").strip("[]").replace("'", "").split(", ")
            module = scopes[-2] if len(scopes) > 1 else ""
            module = module.removeprefix("model").removeprefix(".").removeprefix("model").removeprefix(".")
            name = f"{module}.{node.op_type}" if module else node.op_type
        count = seen[name] = seen.get(name, -1) + 1
        node.name = f"{name}_{count}" if count else name
        for position, output in enumerate(node.outputs):
            if not output.is_graph_output():
                output.name = f"{node.name}.{position}" if position else f"{node.name}.out"


def _place(node: ir.Node) -> tuple[int, str]:
    """Layer and role of an operator, read off its last cache tensor (``past.3.key.tail``)."""
    tail = node.inputs[-1]
    maker = tail.producer() if tail is not None else None
    if maker is not None:  # HqmqDequantize follows its HqmqQuantize
        tail = maker.inputs[-1]
    assert tail is not None
    _, layer, role, _ = (tail.name or "").split(".")
    return int(layer), role


def _operator_name(node: ir.Node) -> str:
    layer, role = _place(node)
    if node.op_type == contract.ATTENTION:
        return f"layers.{layer}.attention"
    return f"layers.{layer}.{role}.{'quantize' if node.op_type == contract.QUANTIZE else 'dequantize'}"
