"""``hqmq-trt memory``: what a cache really takes, by scheme."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from hqmq_trt.cli.output import JsonFlag, Output, QuietFlag, VerboseFlag, size
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import cache_bytes, paper_bits, stored_bits
from hqmq_trt.scheme import PRESETS, Scheme
from hqmq_trt.shapes import KNOWN_MODELS, CacheShape, cache_shape

DEFAULT_SCHEMES = ("fp16", *(name for name in PRESETS if name != "fp16"), "paper:s24_r3", "paper:s96_r4+med3")


def memory(
    folder: Annotated[
        Path | None, typer.Argument(help="Instead of --model: what `hqmq-trt export` or `build` wrote.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", "-m", help="Known model, folder with a config.json, or a config.json."),
    ] = None,
    layers: Annotated[int | None, typer.Option(help="Attention layers, instead of --model.")] = None,
    kv_heads: Annotated[int | None, typer.Option(help="KV heads, instead of --model.")] = None,
    head_dim: Annotated[int | None, typer.Option(help="Elements of a head, instead of --model.")] = None,
    context: Annotated[
        int | None, typer.Option(min=1, help="Tokens of each sequence [default: 131072, or the engine's limit].")
    ] = None,
    batch: Annotated[int | None, typer.Option(min=1, help="Sequences [default: 1, or the engine's limit].")] = None,
    scheme: Annotated[list[str] | None, typer.Option("--scheme", "-s", help="Repeatable.")] = None,
    outlier_share: Annotated[
        float, typer.Option(min=0.0, max=1.0, help="Share of outlier chunks the paper bits of +med3 assume.")
    ] = 0.03,
    known: Annotated[bool, typer.Option("--known", help="List the known models and exit.")] = False,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Bytes of the KV cache: fp16 against each scheme, with nominal and stored bits.

    For a folder: what a session takes, and on an engine its working memory besides."""
    output = Output(json_mode, quiet, verbose)
    if folder is not None:
        if model is not None or scheme or (layers, kv_heads, head_dim) != (None, None, None):
            raise HqmqError(f"{folder} has its own model and scheme; give it with --context and --batch only")
        _session_memory(output, folder, context, batch)
        return
    context, batch = context or 131072, batch or 1
    if known:
        _list_known(output)
        return
    shape = _shape(model, layers, kv_heads, head_dim)
    dense = 2 * shape.elements_per_token * context * batch
    rows = [scheme_row(Scheme.parse(name), shape, context, batch, outlier_share) for name in scheme or DEFAULT_SCHEMES]
    document = {
        "model": model,
        "layers": shape.layers,
        "kv_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "context": context,
        "batch": batch,
        "fp16_bytes": dense,
        "schemes": rows,
    }
    title = (
        f"{model or 'KV cache'}: {shape.layers} layers, {shape.kv_heads} KV heads, head_dim {shape.head_dim}, "
        f"{context:,} tokens x {batch}: {size(dense)} in fp16"
    )
    output.result(document, *_tables(title, rows))


def _session_memory(output: Output, folder: Path, context: int | None, batch: int | None) -> None:
    """Memory of a session on an exported model or an engine: the cache by kind of tensor, and what else is known."""
    from hqmq_trt.engine.manifest import EngineManifest
    from hqmq_trt.manifest import Manifest

    manifest = Manifest.load(folder)
    engine = EngineManifest.load(folder) if EngineManifest.is_engine(folder) else None
    batch = batch or (engine.max_batch if engine else 1)
    context = context or (engine.max_context if engine else manifest.max_position)
    if engine and (batch > engine.max_batch or context > engine.max_context):
        raise HqmqError(
            f"{folder}: the engine holds {engine.max_batch} x {engine.max_context} tokens, not {batch} x {context}; "
            "build it with --max-batch and --max-context"
        )
    num_pages = -(-context // manifest.page_size)
    kinds: dict[str, int] = {}
    for name, tensor in manifest.cache(batch, num_pages):
        kind = name.rsplit(".", 1)[1]
        kinds[kind] = kinds.get(kind, 0) + tensor.nbytes
    document: dict[str, Any] = {
        "folder": str(folder),
        "scheme": manifest.scheme,
        "context": num_pages * manifest.page_size,
        "batch": batch,
        "cache_bytes": sum(kinds.values()),
        "by_kind": kinds,
        "fp16_bytes": 4 * context * batch * sum(layer.num_kv_heads * layer.head_dim for layer in manifest.layers),
    }
    table = Table(title=f"{folder}: {manifest.scheme}, {batch} x {document['context']:,} tokens", title_justify="left")
    for column in ("", "bytes"):
        table.add_column(column, justify="right" if column else "left")
    for kind, nbytes in kinds.items():
        table.add_row(kind, size(nbytes))
    table.add_row("cache", size(document["cache_bytes"]), style="bold")
    table.add_row("the same in fp16", size(document["fp16_bytes"]))
    if engine:
        document["plan_bytes"], document["working_bytes"] = engine.plan_size, max(engine.device_memory_bytes)
        table.add_row("plan: weights and kernels", size(engine.plan_size))
        table.add_row("working memory", size(document["working_bytes"]))
    output.result(document, table)


def scheme_row(
    scheme: Scheme, shape: CacheShape, context: int, batch: int, outlier_share: float = 0.0
) -> dict[str, Any]:
    """One row: paper and stored bits an element (mean of K and V), bytes by kind, and the ratio to dense fp16.

    ``by_kind`` holds the cache tensors at a capacity of whole pages, the fp16 tail and the codebooks.
    """
    scheme.check_head_dim(shape.head_dim)
    roles = (scheme.key, scheme.value)
    by_kind = cache_bytes(scheme, shape.layers, shape.kv_heads, shape.head_dim, context, batch)
    total = sum(by_kind.values())
    return {
        "scheme": scheme.name,
        "paper_bits": sum(paper_bits(r, shape.head_dim, outlier_share) for r in roles) / 2,
        "stored_bits": sum(stored_bits(r, shape.head_dim, scheme.page_size) for r in roles) / 2,
        "bytes": total,
        "by_kind": by_kind,
        "ratio": 2 * shape.elements_per_token * context * batch / total,
    }


def _shape(model: str | None, layers: int | None, kv_heads: int | None, head_dim: int | None) -> CacheShape:
    given = (layers, kv_heads, head_dim)
    if model is not None:
        if any(value is not None for value in given):
            raise HqmqError("give either --model or --layers, --kv-heads and --head-dim, not both")
        return cache_shape(model)
    if all(value is None for value in given):
        return cache_shape("llama-3-70b")
    if layers is None or kv_heads is None or head_dim is None:
        raise HqmqError("--layers, --kv-heads and --head-dim go together: give all three, or --model")
    if min(layers, kv_heads, head_dim) < 1:
        raise HqmqError(f"--layers {layers}, --kv-heads {kv_heads} and --head-dim {head_dim} must be positive")
    return CacheShape(layers, kv_heads, head_dim)


def _tables(title: str, rows: list[dict[str, Any]]) -> list[Table]:
    totals = Table(title=title, title_justify="left")
    kinds = list(dict.fromkeys(kind for row in rows for kind in row["by_kind"]))
    details = Table(title="of which", title_justify="left", padding=0)
    for table, names in ((totals, ("paper bits", "stored bits", "bytes", "ratio")), (details, kinds)):
        table.add_column("scheme", no_wrap=True)
        for name in names:
            table.add_column(name.replace("_", "\n"), justify="right")
    for row in rows:
        totals.add_row(
            row["scheme"],
            f"{row['paper_bits']:.2f}",
            f"{row['stored_bits']:.2f}",
            size(row["bytes"]),
            f"{row['ratio']:.2f}x",
        )
        details.add_row(row["scheme"], *(size(row["by_kind"].get(kind, 0)) for kind in kinds))
    return [totals, details]


def _list_known(output: Output) -> None:
    table = Table()
    for name in ("model", "layers", "KV heads", "head_dim", "fp16 a token"):
        table.add_column(name, justify="left" if name == "model" else "right")
    document: dict[str, Any] = {}
    for name, shape in KNOWN_MODELS.items():
        table.add_row(
            name, str(shape.layers), str(shape.kv_heads), str(shape.head_dim), size(2 * shape.elements_per_token)
        )
        document[name] = {"layers": shape.layers, "kv_heads": shape.kv_heads, "head_dim": shape.head_dim}
    output.result({"models": document}, table)
