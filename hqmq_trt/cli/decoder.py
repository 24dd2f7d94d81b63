"""What the recogniser of ONNX decoders says, for ``export --dry-run`` and ``inspect``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text


def recognised(path: Path) -> tuple[Any, ...]:
    """(document, tables) of the attention layers found in an ONNX decoder, and of what was not understood.

    Raises:
        HqmqError: the file is no decoder with a cache.
    """
    from hqmq_trt.export.rewrite import analyse

    found = analyse(path)
    layers: list[dict[str, Any]] = [
        {
            "layer": layer.index,
            "node": layer.node.name,
            "form": layer.form,
            "key": layer.key.past.name,
            "value": layer.value.past.name,
            "query": layer.q.name,
            "num_heads": layer.num_heads,
            "num_kv_heads": layer.num_kv_heads,
            "head_dim": layer.head_dim,
            "scale": layer.scale,
            "window": layer.window,
            "softcap": layer.softcap,
            "sinks": layer.sinks is not None,
            "attention_mask": "hides padding" if layer.padding else "unused",
            "mask_looked_at": layer.reach,
        }
        for layer in found.layers
    ]
    table = Table(title=f"{path}: attention over caches, recognised and tried", title_justify="left")
    for column in ("layer", "node", "form", "caches", "heads", "KV", "dim", "scale", "window", "softcap", "sinks"):
        table.add_column(column, overflow="fold")
    for layer in layers:
        table.add_row(
            str(layer["layer"]),
            layer["node"],
            layer["form"],
            f"{layer['key']}, {layer['value']}",
            *(str(layer[name]) for name in ("num_heads", "num_kv_heads", "head_dim")),
            f"{layer['scale']:.6g}",
            str(layer["window"] or "-"),
            f"{layer['softcap']:.6g}" if layer["softcap"] else "-",
            "yes" if layer["sinks"] else "-",
        )
    document = {"kind": "decoder", "layers": layers, "problems": found.problems, "convertible": not found.problems}
    lines = [f"not recognised: {problem}" for problem in found.problems]
    verdict = "cannot be exported" if lines else f"all {len(layers)} layers are recognised"
    return document, table, Text("\n".join([*lines, verdict]))
