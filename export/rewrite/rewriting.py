"""The road from ONNX to ONNX: a decoder with a key-value cache in, a folder with an HQMQ cache out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from hqmq_trt import __version__, contract, contract_check, schemas
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest, ModelFile
from hqmq_trt.output_folder import check_output, new_folder
from hqmq_trt.scheme import Scheme

from .. import compile, functions, targets
from ..compile import MODEL_FILE, MODES, Progress, _layer, _write
from ..layers import AttentionLayer
from ..source import Source
from . import logits, masks, positions
from .attention import find_layers
from .building import Builder, rename_dimensions
from .building import replace as swap
from .decompose import decompose
from .emit import Emitter
from .files import Beside, look_beside
from .interface import Interface, find_interface
from .layer import Layer
from .ordinary import Lengths
from .reading import _without_weights, read
from .trial import try_rows
from .verify import verify
from .walk import name

_DTYPES = {ir.DataType.FLOAT: "float32", ir.DataType.FLOAT16: "float16", ir.DataType.BFLOAT16: "bfloat16"}
_DIMENSIONS = {"B": "batch", "T": "sequence"}


@dataclass(frozen=True)
class Analysis:
    """What was found in an ONNX decoder.

    Attributes:
        model, interface: the graph and its inputs and outputs.
        layers: attention layers that were recognised and tried.
        problems: why others were not; empty if the model can be rewritten.
        beside: files beside the model.
    """

    model: ir.Model
    interface: Interface
    layers: list[Layer]
    problems: list[str]
    beside: Beside

    @property
    def hidden_size(self) -> int:
        """Features of the hidden states before the last projection; of the queries where that is unknown."""
        hidden, projection = logits.rows_of(self.interface.logits)
        if projection is None or hidden.shape is None:
            return self.layers[0].num_heads * self.layers[0].head_dim
        return int(hidden.shape[2])


def analyse(path: str | Path) -> Analysis:
    """Recognise the attention layers of an ONNX decoder.

    Raises:
        HqmqError: not an ONNX file, or not a decoder with a cache. What keeps a layer from being recognised is in
            Analysis.problems.
    """
    path = Path(path)
    model = read(path)
    try:
        interface = find_interface(model.graph)
    except HqmqError as error:
        raise HqmqError(f"{path}: {error}") from error
    beside = look_beside(path)
    found, problems = find_layers(model.graph, interface)
    layers = []
    for layer in found:
        _know(interface, layer)
    for layer in found:
        try:
            mask = masks.classify(model, interface, layer, beside.max_position or masks.REACH)
            known = replace(
                layer,
                scale=_usual(layer),
                window=mask.window,
                padding=mask.padding,
                reach=mask.reach,
                chunks=mask.chunks,
            )
            verify(model, interface, known)
            layers.append(known)
        except HqmqError as error:
            problems.append(str(error))
    return Analysis(model, interface, layers, problems, beside)


def _usual(layer: Layer) -> float:
    """The scale; head_dim ** -0.5 where it is that but for float32: some exporters give q and K its root each."""
    usual = float(layer.head_dim**-0.5)
    return usual if abs(layer.scale / usual - 1) < 2.0**-22 else layer.scale


def _know(interface: Interface, layer: Layer) -> None:
    heads, kv_heads, dim = layer.num_heads, layer.num_kv_heads, layer.head_dim
    for value in (layer.q, layer.y):
        interface.known[id(value)] = ("B", heads, "T", dim)
    for join in (layer.key, layer.value):
        interface.known[id(join.new)] = ("B", kv_heads, "T", dim)
        interface.known[id(join.full)] = ("B", kv_heads, "S", dim)


def rewrite_model(
    path: str | Path,
    output: str | Path,
    scheme: str | Scheme = "hq4",
    *,
    mode: str = "fused",
    bodies: bool = True,
    target: str | None = None,
    seed: int = 0,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Manifest:
    """Give an existing ONNX decoder an HQMQ cache: the folder is as export_model makes it.

    Args:
        path: the ONNX file, with its external weights and, if it has one, its tokenizer beside it.
        output, scheme, mode, bodies, target, seed, overwrite, progress: see hqmq_trt.export.export_model.

    Raises:
        HqmqError: anything in the file that is not recognised with certainty; the message names the node.
    """
    path, output = Path(path), Path(output)
    chosen = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme, seed)
    if mode not in MODES:
        raise HqmqError(f"unknown mode '{mode}': use {' or '.join(MODES)}")
    targets.check_target(target)
    check_output(output, overwrite)
    report = progress or (lambda stage, share: None)
    report("load", 0.0)
    found = analyse(path)
    report("load", 1.0)
    if found.problems:
        raise HqmqError(f"{path}: {found.problems[0]}")
    for layer in found.layers:
        chosen.check_head_dim(layer.head_dim)
    try:
        try_rows(found.model, found.interface, found.layers, lambda share: report("try", share))
        report("capture", 0.0)
        hidden_size = _rewrite(found, chosen, mode, bodies and targets.wants_bodies(target))
    except HqmqError as error:
        raise HqmqError(f"{path}: {error}") from error
    report("capture", 1.0)
    if sum(v.const_value.nbytes for v in found.model.graph.initializers.values()) <= compile._EXTERNAL_ABOVE:
        ir.external_data.load_to_model(found.model)  # small enough to lie in the graph
    with new_folder(output) as folder:
        tokenizer = found.beside if found.beside.tokenizer else None
        files = _write(found.model, Source(None, tokenizer, path.name), folder, report, target)
        manifest = _manifest(found, chosen, mode, path, hidden_size, files)
        manifest.verify_codebooks(folder / MODEL_FILE)
        manifest.save(folder)
    return manifest


def _rewrite(found: Analysis, scheme: Scheme, mode: str, bodies: bool) -> int:
    """Change found.model; returns the size of its hidden states."""
    model, face = found.model, found.interface
    graph = model.graph
    past, new = (_input(label, ir.DataType.INT32, "batch") for label in ("past_length", "new_length"))
    index = _input("logits_index", ir.DataType.INT64, "batch", "num_logits")
    fresh = [value for layer in found.layers for value in (layer.q, layer.key.new, layer.value.new)]
    results = [layer.y for layer in found.layers]
    redirections = positions.find(model, face, [*fresh, face.logits], results)
    rename_dimensions(
        graph, {symbol: _DIMENSIONS[what] for symbol, what in face.symbols.items() if what in _DIMENSIONS}
    )
    start = Builder(graph, graph[0], "lengths")
    present = start.op("Add", past, new)
    present.name, present.shape = "present_length", ir.Shape(["batch"])
    ids = _ids(start, face)
    positions.apply(graph, redirections, ids, past, present)
    hidden_size = found.hidden_size
    emitter = Emitter(graph, scheme, mode, Lengths(ids, past, new, present))
    for layer in found.layers:
        emitter.layer(layer)
    vocabulary = face.logits.shape[2]
    rows = logits.take_rows(graph, face.logits, index)
    rows.name, rows.shape = "logits", ir.Shape(["batch", "num_logits", vocabulary])
    _replace_all(graph.outputs, [rows, present, *emitter.present])
    common.RemoveUnusedNodesPass()(model)
    _replace_all(graph.inputs, [ids, past, new, index, *emitter.past])
    _check_inputs(graph)
    decompose(graph)
    if bodies:
        functions.attach(model)
    model.opset_imports[contract.DOMAIN] = contract.OPSET_VERSION
    common.RemoveUnusedOpsetsPass()(model)
    common.NameFixPass()(model)
    model.graph.sort()
    schemas.register()
    proto = ir.to_proto(_without_weights(model))
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise HqmqError(f"the rewritten graph is not valid: {' '.join(str(error).split())[:300]}") from error
    contract_check.check_model(proto)
    return hidden_size


def _input(label: str, dtype: ir.DataType, *shape: str) -> ir.Value:
    return ir.Value(name=label, shape=ir.Shape(shape), type=ir.TensorType(dtype))


def _ids(start: Builder, face: Interface) -> ir.Value:
    """The input input_ids, int64 [batch, sequence]; readers of another integer type get a cast."""
    old = face.ids
    if old.dtype == ir.DataType.INT64:
        old.name, old.shape = "input_ids", ir.Shape(["batch", "sequence"])
        return old
    ids = _input("input_ids", ir.DataType.INT64, "batch", "sequence")
    assert old.dtype is not None
    swap(old, start.op("Cast", ids, dtype=old.dtype, to=int(old.dtype)))
    old.name = "input_ids.old"
    return ids


def _replace_all(values: Any, new: Sequence[ir.Value]) -> None:
    while len(values):
        values.pop()
    values.extend(new)


def _check_inputs(graph: ir.Graph) -> None:
    """Nothing may read what is no longer an input."""
    known = {id(value) for value in (*graph.inputs, *graph.initializers.values())}
    for node in graph:
        for value in node.inputs:
            if value is not None and value.producer() is None and id(value) not in known:
                raise HqmqError(f"{name(node)} still needs '{value.name}', which the new graph does not have")


def _as_exported(layer: Layer) -> AttentionLayer:
    return AttentionLayer(
        layer.index,
        layer.num_heads,
        layer.num_kv_heads,
        layer.head_dim,
        layer.scale,
        layer.window,
        layer.softcap,
        layer.sinks is not None,
    )


def _manifest(
    found: Analysis, scheme: Scheme, mode: str, path: Path, hidden_size: int, files: list[ModelFile]
) -> Manifest:
    graph, beside = found.model.graph, found.beside
    dtype = found.layers[0].q.dtype
    reach = min(layer.reach for layer in found.layers)
    return Manifest(
        hqmq_trt_version=__version__,
        opset=found.model.opset_imports[""],
        source=path.name,
        architecture=beside.architecture or graph.name or "decoder",
        scheme=scheme.name,
        seed=scheme.seed,
        page_size=scheme.page_size,
        mode=mode,  # type: ignore[arg-type]
        dtype=_DTYPES[dtype],  # type: ignore[arg-type]
        logits_dtype=_DTYPES[graph.outputs[0].dtype],  # type: ignore[arg-type]
        vocab_size=int(graph.outputs[0].shape[2]),
        hidden_size=hidden_size,
        max_position=min(beside.max_position or reach, reach),
        bos_token_id=beside.bos,
        eos_token_ids=beside.eos,
        pad_token_id=beside.pad,
        layers=[_layer(_as_exported(layer), scheme) for layer in found.layers],
        files=files,
    )
