"""``hqmq-trt inspect``: layers, cache tensors and nodes of an export, an engine's limits, or an ONNX file's nodes."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table
from rich.text import Text

from hqmq_trt.cli.build import engine_table
from hqmq_trt.cli.decoder import recognised
from hqmq_trt.cli.memory import scheme_row
from hqmq_trt.cli.output import JsonFlag, Output, QuietFlag, VerboseFlag, size
from hqmq_trt.contract import ATTENTION, DEQUANTIZE, DOMAIN, QUANTIZE
from hqmq_trt.engine.manifest import EngineManifest
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import MANIFEST_FILE, Layer, Manifest
from hqmq_trt.scheme import ROLES, Scheme
from hqmq_trt.shapes import cache_shape

_STANDARD_ATTENTION = ("Attention", "MultiHeadAttention", "GroupQueryAttention")


def inspect(
    path: Annotated[Path, typer.Argument(help="Exported folder, engine folder, ONNX file, or Hugging Face folder.")],
    context: Annotated[int, typer.Option(min=1, help="Tokens for which the cache is sized.")] = 4096,
    batch: Annotated[int, typer.Option(min=1, help="Sequences for which the cache is sized.")] = 1,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Show attention layers, cache tensors with shapes and sizes, bits and node counts."""
    output = Output(json_mode, quiet, verbose)
    if path.is_dir() and EngineManifest.is_engine(path):
        output.result(*_engine(path))
    elif path.is_dir() and ((path / MANIFEST_FILE).exists() or not (path / "config.json").exists()):
        output.result(*_folder(path, context, batch))
    elif path.is_dir():
        output.result(*_hugging_face(path, context, batch))
    elif path.is_file():
        output.result(*_onnx(path))
    else:
        raise HqmqError(f"{path}: no such file or folder")


def _folder(path: Path, context: int, batch: int) -> tuple[Any, ...]:
    manifest = Manifest.load(path)
    scheme, pages = manifest.parsed_scheme, -(-context // manifest.page_size)
    tensors: list[dict[str, Any]] = [
        {"name": name, "dtype": spec.dtype, "shape": list(spec.shape), "bytes": spec.nbytes}
        for name, spec in manifest.cache(batch, pages)
    ]
    layers = [layer.model_dump(exclude={"codebooks"}) for layer in manifest.layers]
    graph = graph_summary(path / manifest.model_file)
    bits = _bits(manifest, scheme)
    total = sum(tensor["bytes"] for tensor in tensors)
    dense = sum(4 * layer.num_kv_heads * layer.head_dim for layer in manifest.layers) * context * batch
    document = {
        "kind": "export",
        "scheme": manifest.scheme,
        "seed": manifest.seed,
        "mode": manifest.mode,
        "dtype": manifest.dtype,
        "source": manifest.source,
        "architecture": manifest.architecture,
        "format_version": manifest.format_version,
        **bits,
        "context": context,
        "batch": batch,
        "layers": layers,
        "cache": tensors,
        "cache_bytes": total,
        "fp16_bytes": dense,
        "nodes": graph["nodes"],
        "files": [{"name": file.name, "bytes": file.size} for file in manifest.files],
    }
    summary = _pairs(
        f"{path}: {manifest.architecture}",
        {
            "source": manifest.source,
            "scheme": f"{manifest.scheme}, seed {manifest.seed}, pages of {manifest.page_size} tokens",
            "mode, dtype": f"{manifest.mode}, {manifest.dtype}",
            "bits an element": f"{bits['paper_bits']:.2f} as the paper counts, {bits['stored_bits']:.2f} stored",
            f"cache of {batch} x {context:,} tokens": f"{size(total)} ({dense / total:.2f}x less than fp16)",
            "nodes": ", ".join(f"{name} x{count}" for name, count in graph["nodes"].items() if "::" in name) or "-",
            "other nodes": str(sum(count for name, count in graph["nodes"].items() if "::" not in name)),
        },
    )
    return document, summary, _layer_table(manifest.layers), _tensor_table(tensors)


def _engine(path: Path) -> tuple[Any, ...]:
    """engine.json, and the cache at the engine's limits."""
    engine, manifest = EngineManifest.load(path), Manifest.load(path)
    tensors: list[dict[str, Any]] = [
        {"name": name, "dtype": spec.dtype, "shape": list(spec.shape), "bytes": spec.nbytes}
        for name, spec in manifest.cache(engine.max_batch, engine.num_pages)
    ]
    document = {
        "kind": "engine",
        "scheme": manifest.scheme,
        "mode": manifest.mode,
        "dtype": manifest.dtype,
        "source": manifest.source,
        "architecture": manifest.architecture,
        "engine": engine.model_dump(),
        "layers": [layer.model_dump(exclude={"codebooks"}) for layer in manifest.layers],
        "cache": tensors,
        "cache_bytes": sum(tensor["bytes"] for tensor in tensors),
    }
    model = _pairs(
        f"{manifest.architecture} from {manifest.source}",
        {
            "scheme": f"{manifest.scheme}, seed {manifest.seed}, pages of {manifest.page_size} tokens",
            "mode, dtype": f"{manifest.mode}, {manifest.dtype}",
            f"cache of {engine.max_batch} x {engine.max_context:,} tokens": size(document["cache_bytes"]),
        },
    )
    return document, engine_table(path, engine), model, _layer_table(manifest.layers), _tensor_table(tensors)


def _bits(manifest: Manifest, scheme: Scheme) -> dict[str, float]:
    """Bits an element over all layers, K and V: as the paper counts them (no outliers), and as stored."""
    from hqmq_trt.format import paper_bits, stored_bits

    paper = stored = elements = 0.0
    for layer in manifest.layers:
        weight = layer.num_kv_heads * layer.head_dim
        for role in ROLES:
            elements += weight
            paper += weight * paper_bits(scheme.role(role), layer.head_dim)
            stored += weight * stored_bits(scheme.role(role), layer.head_dim, scheme.page_size)
    return {"paper_bits": paper / elements, "stored_bits": stored / elements}


def _hugging_face(path: Path, context: int, batch: int) -> tuple[Any, ...]:
    shape = cache_shape(str(path))
    row = scheme_row(Scheme.parse("fp16"), shape, context, batch)
    dense = 2 * shape.elements_per_token * context * batch
    document = {
        "kind": "hugging_face",
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "context": context,
        "batch": batch,
        "fp16_bytes": dense,
        "fp16_bytes_by_kind": row["by_kind"],
    }
    return document, _pairs(
        f"{path}: a Hugging Face model, not exported yet",
        {
            "attention layers": str(shape.layers),
            "KV heads, head_dim": f"{shape.kv_heads}, {shape.head_dim}",
            f"fp16 cache of {batch} x {context:,} tokens": size(dense),
        },
    )


def graph_summary(path: Path) -> dict[str, Any]:
    """Node counts (``domain::type``), operators' nodes with their attributes, inputs and outputs of an ONNX file."""
    import onnx

    try:
        graph = onnx.load(path, load_external_data=False).graph
    except Exception as error:  # protobuf raises its own types on damage
        raise HqmqError(f"{path}: is not an ONNX file ({' '.join(str(error).split())[:200]})") from None
    if not graph.node:
        raise HqmqError(f"{path}: is not an ONNX file, or its graph is empty")
    nodes = Counter(f"{node.domain}::{node.op_type}" if node.domain else node.op_type for node in graph.node)
    shown = {f"{DOMAIN}::{name}" for name in (ATTENTION, QUANTIZE, DEQUANTIZE)} | set(_STANDARD_ATTENTION)
    attention = [
        {
            "name": node.name,
            "type": node.op_type,
            "attributes": {
                attribute.name: _plain(onnx.helper.get_attribute_value(attribute)) for attribute in node.attribute
            },
        }
        for node in graph.node
        if (f"{node.domain}::{node.op_type}" if node.domain else node.op_type) in shown
    ]
    return {
        "nodes": dict(nodes.most_common()),
        "attention": attention,
        "inputs": [_value(value) for value in graph.input],
        "outputs": [_value(value) for value in graph.output],
    }


def _onnx(path: Path) -> tuple[Any, ...]:
    graph = graph_summary(path)
    attention = Table(title="attention and cache nodes", title_justify="left")
    for name in ("node", "type", "attributes"):
        attention.add_column(name)
    for node in graph["attention"]:
        attention.add_row(node["name"], node["type"], ", ".join(f"{k}={v}" for k, v in node["attributes"].items()))
    counts = _pairs(f"{path}", {name: str(count) for name, count in graph["nodes"].items()})
    if any(name.startswith(f"{DOMAIN}::") for name in graph["nodes"]):
        return {"kind": "onnx", **graph}, counts, attention
    try:
        decoder, *shown = recognised(path)
    except HqmqError as error:
        decoder, shown = {"problems": [str(error)], "convertible": False}, [Text(f"cannot be exported: {error}")]
    return {"kind": "onnx", **graph, "decoder": decoder}, counts, attention, *shown


def _plain(value: Any) -> Any:
    return value.decode(errors="replace") if isinstance(value, bytes) else value if _is_json(value) else str(value)


def _is_json(value: Any) -> bool:
    return isinstance(value, (int, float, str))


def _value(value: Any) -> dict[str, Any]:
    import onnx

    tensor = value.type.tensor_type
    return {
        "name": value.name,
        "dtype": onnx.TensorProto.DataType.Name(tensor.elem_type).lower(),
        "shape": [dim.dim_param or dim.dim_value for dim in tensor.shape.dim],
    }


def _pairs(title: str, rows: dict[str, str]) -> Table:
    table = Table(title=title, title_justify="left", show_header=False)
    table.add_column()
    table.add_column(overflow="fold")
    for name, value in rows.items():
        table.add_row(name, value)
    return table


def _layer_table(layers: list[Layer]) -> Table:
    """Attention layers; neighbours that are alike share a row."""
    table = Table(title="attention layers", title_justify="left")
    for name in ("layers", "heads", "KV", "dim", "scale", "window", "softcap", "sinks", "V folded"):
        table.add_column(name, justify="right")
    runs: list[tuple[int, int, tuple[str, ...]]] = []
    for index, layer in enumerate(layers):
        cells: tuple[str, ...] = (
            str(layer.num_heads),
            str(layer.num_kv_heads),
            str(layer.head_dim),
            f"{layer.scale:.4g}",
            str(layer.window or "-"),
            str(layer.softcap or "-"),
            "yes" if layer.has_sinks else "-",
            "yes" if layer.value_rotation_folded else "-",
        )
        if runs and runs[-1][2] == cells:
            runs[-1] = (runs[-1][0], index, cells)
        else:
            runs.append((index, index, cells))
    for first, last, cells in runs:
        table.add_row(str(first) if first == last else f"{first}…{last}", *cells)
    return table


def _tensor_table(tensors: list[dict[str, Any]]) -> Table:
    """Cache tensors by role and kind; layers of equal shape share a row."""
    table = Table(title="cache tensors", title_justify="left")
    for name in ("tensor", "layers", "dtype", "shape", "all layers"):
        table.add_column(name, justify="right" if name == "all layers" else "left")
    groups: dict[tuple[str, str, str], list[int]] = {}
    for tensor in tensors:
        _, kind = tensor["name"].split(".", 1)
        groups.setdefault((kind, tensor["dtype"], str(tensor["shape"])), []).append(tensor["bytes"])
    for (kind, dtype, shape), found in groups.items():
        table.add_row(kind, str(len(found)), dtype, shape, size(sum(found)))
    return table
