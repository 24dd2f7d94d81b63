"""The exporter's front door: a model in, a folder out, or nothing at all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import onnx_ir as ir

from hqmq_trt import __version__, codebooks
from hqmq_trt.balance import BalanceReport, applies_to, balanced
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import CodebookDigest, Layer, Manifest, ModelFile, record_file
from hqmq_trt.output_folder import check_output, new_folder
from hqmq_trt.scheme import ROLES, Scheme

from . import targets
from .graph import OPSET, build
from .interface import attention_implementation
from .layers import AttentionLayer, find_layers
from .source import Source, load

MODES = ("fused", "qdq")
MODEL_FILE, WEIGHTS_FILE = "model.onnx", "model.onnx.data"

_EXTERNAL_ABOVE = 100 << 20
"""Bytes of weights from which they go to a file of their own: readers of the graph then stay fast (protobuf itself
ends at 2 GiB)."""
_EXTERNAL_TENSOR = 64 << 10
"""Bytes of a tensor from which it is moved out."""
_UNLIMITED = 2**31 - 1

Progress = Callable[[str, float], None]
"""Called with a stage (``load``, ``try`` of ONNX decoders, ``capture``, ``write``, ``hash``) and its share, 0…1."""


def export_model(
    model: Any,
    output: str | Path,
    scheme: str | Scheme = "hq4",
    *,
    mode: str = "fused",
    dtype: str | None = None,
    gguf_file: str | None = None,
    fold: bool = True,
    balance: bool = True,
    bodies: bool = True,
    target: str | None = None,
    seed: int = 0,
    tokenizer: Any = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    on_balance: Callable[[BalanceReport], None] | None = None,
) -> Manifest:
    """Export a causal language model to a folder with model.onnx, manifest.json and its tokenizer.

    Args:
        model: a transformers model, a folder (safetensors), a .gguf file, or a hub name.
        output: the folder to make. It appears complete or not at all.
        scheme: spelling of hqmq_trt.scheme, or a Scheme (then `seed` is ignored).
        mode: ``fused`` (HqmqAttention) or ``qdq`` (HqmqQuantize, HqmqDequantize, ordinary attention).
        dtype: ``float32``, ``float16``, ``bfloat16``; None: as the checkpoint has it, float32 for GGUF.
        gguf_file: name of a GGUF file if `model` is a folder.
        fold: move the Hadamard rotation of V into the weights where the architecture allows it.
        balance: scale K's channels, and q's the other way, so that K is easier to code (hqmq_trt.balance); where
            `scheme` takes a page mean and a Hadamard rotation of K. A caller's model gets its weights back.
        bodies: put ONNX function bodies of HqmqQuantize and HqmqDequantize into a ``qdq`` file, so that any ONNX
            Runtime runs it. TensorRT's parser before 10.13 takes those for the plugins; build_engine drops them itself.
        target: ``ort``, ``tensorrt-10`` or ``tensorrt-11``: refuse a graph that it does not import (export/targets.py),
            and write no `bodies` for ``tensorrt-10``. None: the graph that all of them take.
        tokenizer: saved with the model; by default the one found beside it.
        overwrite: replace `output` if it is an earlier export.
        progress: see Progress.
        on_balance: called with what `balance` did.

    Raises:
        HqmqError: anything that keeps this model, scheme and folder from being exported.
    """
    output = Path(output)
    chosen = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme, seed)
    if mode not in MODES:
        raise HqmqError(f"unknown mode '{mode}': use {' or '.join(MODES)}")
    targets.check_target(target)
    check_output(output, overwrite)
    report = progress or (lambda stage, share: None)
    report("load", 0.0)
    source = load(model, dtype, gguf_file)
    if tokenizer is not None:
        source = replace(source, tokenizer=tokenizer)
    report("load", 1.0)
    with _evaluating(source.model), ExitStack() as weights:
        report("capture", 0.0)
        with attention_implementation(source.model):
            layers = find_layers(source.model, chosen)
        done = None
        if balance and applies_to(chosen):
            done = weights.enter_context(balanced(source.model, chosen.page_size))
            if on_balance:
                on_balance(done)
        weights.enter_context(attention_implementation(source.model))
        if fold and chosen.value.hadamard:
            layers = [replace(layer, rotate_value=not layer.foldable) for layer in layers]
        graph = build(source.model, chosen, mode, layers, bodies and targets.wants_bodies(target))
        report("capture", 1.0)
        with new_folder(output) as folder:
            files = _write(graph, source, folder, report, target)
            manifest = _manifest(source, chosen, mode, layers, files, graph, done is not None and done.balanced > 0)
            manifest.verify_codebooks(folder / MODEL_FILE)
            manifest.save(folder)
    return manifest


@contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def _write(
    graph: ir.Model, source: Source, folder: Path, report: Progress, target: str | None = None
) -> list[ModelFile]:
    targets.check_graph(graph, target)
    tensors = [value.const_value for value in graph.graph.initializers.values()]
    external = sum(tensor.nbytes for tensor in tensors if tensor is not None) > _EXTERNAL_ABOVE
    report("write", 0.0)
    if external:
        ir.save(
            graph,
            folder / MODEL_FILE,
            external_data=WEIGHTS_FILE,
            size_threshold_bytes=_EXTERNAL_TENSOR,
            callback=lambda tensor, info: report("write", info.index / info.total),
        )
    else:
        ir.save(graph, folder / MODEL_FILE)
    targets.try_file(folder / MODEL_FILE, target)
    report("write", 1.0)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(folder)
    files = []
    names = sorted(str(path.relative_to(folder).as_posix()) for path in folder.rglob("*") if path.is_file())
    for position, name in enumerate(names):
        report("hash", position / len(names))
        purpose = {MODEL_FILE: "model", WEIGHTS_FILE: "weights"}.get(name, "tokenizer")
        files.append(record_file(folder, name, purpose))  # type: ignore[arg-type]
    report("hash", 1.0)
    return files


def _manifest(
    source: Source,
    scheme: Scheme,
    mode: str,
    layers: list[AttentionLayer],
    files: list[ModelFile],
    graph: ir.Model,
    key_balance: bool,
) -> Manifest:
    config = source.model.config.get_text_config()
    generation = getattr(source.model, "generation_config", None)

    def token(name: str) -> Any:
        found = getattr(generation, name, None)
        return found if found is not None else getattr(config, name, None)

    ends = token("eos_token_id")
    logits = graph.graph.outputs[0].dtype
    return Manifest(
        hqmq_trt_version=__version__,
        opset=OPSET,
        source=source.name,
        architecture=type(source.model).__name__,
        scheme=scheme.name,
        seed=scheme.seed,
        page_size=scheme.page_size,
        mode=mode,  # type: ignore[arg-type]
        dtype=str(source.model.dtype).removeprefix("torch."),  # type: ignore[arg-type]
        logits_dtype={"FLOAT": "float32"}.get(logits.name, logits.name.lower()),
        vocab_size=source.model.get_output_embeddings().weight.shape[0],
        hidden_size=config.hidden_size,
        max_position=getattr(config, "max_position_embeddings", None) or _UNLIMITED,
        bos_token_id=token("bos_token_id"),
        eos_token_ids=[] if ends is None else [ends] if isinstance(ends, int) else list(ends),
        pad_token_id=token("pad_token_id"),
        key_balance=key_balance,
        layers=[_layer(layer, scheme) for layer in layers],
        files=files,
    )


def _layer(layer: AttentionLayer, scheme: Scheme) -> Layer:
    books = {}
    for role in ROLES:
        codec = scheme.role(role)
        if codec.packed:
            secondaries = codebooks.secondaries(codec, scheme.seed, layer.index, layer.num_kv_heads, role)
            books[role] = CodebookDigest(
                secondaries=codebooks.digest(secondaries), levels=codebooks.digest(codebooks.levels(codec))
            )
    return Layer(
        num_heads=layer.num_heads,
        num_kv_heads=layer.num_kv_heads,
        head_dim=layer.head_dim,
        scale=layer.scale,
        window=layer.window,
        softcap=layer.softcap,
        has_sinks=layer.has_sinks,
        value_rotation_folded=not layer.rotate_value,
        codebooks=books,
    )
