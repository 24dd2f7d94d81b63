"""Decoders exported to ONNX as others do it, and the two sides of a comparison."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor
from transformers import DynamicCache

from hqmq_trt import ort_library
from hqmq_trt.cache import HqmqCache
from hqmq_trt.manifest import Manifest

PAGES = 8
LENGTHS = ([19, 11, 3], [6, 1, 0], *[[1, 1, 1]] * 32)
"""Tokens that each of three sequences gets in each step: prefill, a chunk, 32 single tokens."""

CACHES = [f"{layer}.{role}" for layer in range(2) for role in ("key", "value")]


class Flat(torch.nn.Module):
    """A model whose cache is a list of (key, value)."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Any, attention_mask: Any, position_ids: Any, past_key_values: Any) -> Any:
        cache = DynamicCache()
        for index, (key, value) in enumerate(past_key_values):
            cache.update(key, value, index)
        found = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        return found.logits, [(layer.keys, layer.values) for layer in found.past_key_values.layers]


def _example(model: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
    config = model.config.get_text_config()
    dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    shape = (2, getattr(config, "num_key_value_heads", None) or config.num_attention_heads, 5, dim)
    layers = range(config.num_hidden_layers)
    past = [tuple(torch.zeros(shape, dtype=model.dtype) for _ in range(2)) for _ in layers]
    ids = torch.ones(2, 3, dtype=torch.int64)
    return ids, torch.ones(2, 8, dtype=torch.int64), torch.arange(5, 8)[None].repeat(2, 1), past


def export_dynamo(model: Any, path: Path, opset: int, positions: bool = True, mask: bool = True) -> None:
    """torch.onnx.export(dynamo=True), the cache a DynamicCache."""
    ids, attention, numbers, past = _example(model)
    free, row = torch.export.Dim.DYNAMIC, {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    names = ["input_ids", *["attention_mask"] * mask, *["position_ids"] * positions]
    caches = [f"{layer}.{role}" for layer in range(len(past)) for role in ("key", "value")]
    program = torch.onnx.export(
        Flat(model),
        kwargs={
            "input_ids": ids,
            "attention_mask": attention if mask else None,
            "position_ids": numbers if positions else None,
            "past_key_values": past,
        },
        dynamic_shapes={
            "input_ids": row,
            "attention_mask": row if mask else None,
            "position_ids": row if positions else None,
            "past_key_values": [({0: free, 2: free}, {0: free, 2: free}) for _ in past],
        },
        dynamo=True,
        opset_version=opset,
        input_names=[*names, *(f"past_key_values.{name}" for name in caches)],
        output_names=["logits", *(f"present.{name}" for name in caches)],
        verbose=False,
    )
    assert program is not None
    program.save(str(path))


def export_traced(model: Any, path: Path) -> None:
    """The interface, names and exporter (TorchScript, opset 18) of optimum-onnx, without that package."""
    names = ["input_ids", "attention_mask", "position_ids"]
    rows, total = {0: "batch_size", 1: "sequence_length"}, "past_sequence_length + sequence_length"
    axes: dict[str, Any] = {"input_ids": rows, "position_ids": rows, "logits": rows}
    axes["attention_mask"] = {0: "batch_size", 1: total}
    for name in CACHES:
        axes[f"past_key_values.{name}"] = {0: "batch_size", 2: "past_sequence_length"}
        axes[f"present.{name}"] = {0: "batch_size", 2: total}
    torch.onnx.export(
        Flat(model),
        _example(model),
        str(path),
        input_names=[*names, *(f"past_key_values.{name}" for name in CACHES)],
        output_names=["logits", *(f"present.{name}" for name in CACHES)],
        dynamic_axes=axes,
        opset_version=18,
        dynamo=False,
    )


def tokens() -> Any:
    return np.random.default_rng(5).integers(3, 97, (3, int(np.sum(LENGTHS, 0).max())))


Held = dict[str, np.ndarray]
"""What a cache holds: by ``{layer}.{role}``, rows [B, H, P, D]."""


def run_rewritten(
    folder: Path, lengths: Any = LENGTHS, kept: list[Held] | None = None, graph: Path | None = None
) -> list[Tensor]:
    """Logits [tokens, V] of each of three sequences, fed together, right-padded. `kept`: gets what the cache of
    scheme fp16 holds after each step. `graph`: run instead of the folder's."""
    manifest = Manifest.load(folder, hashes=True)
    session = ort_library.session(graph or folder / manifest.model_file, threads=1)
    names = [value.name for value in session.get_outputs()]
    cache = {f"past.{name}": np.zeros(spec.shape, spec.dtype) for name, spec in manifest.cache(3, PAGES)}
    length, ids = np.zeros(3, np.int32), tokens()
    rows: list[list[Tensor]] = [[], [], []]
    for new in lengths:
        padded = np.zeros((3, max(new)), np.int64)
        for b, count in enumerate(new):
            padded[b, :count] = ids[b, length[b] : length[b] + count]
        feed = {"input_ids": padded, "past_length": length, "new_length": np.array(new, np.int32), **cache}
        feed["logits_index"] = np.tile(np.arange(max(new)), (3, 1))
        found = dict(zip(names, session.run(None, feed), strict=True))
        length, logits = found.pop("present_length"), found.pop("logits")
        cache = {name.replace("present", "past", 1): value for name, value in found.items()}
        if kept is not None:
            kept.append({name: dense(cache, name, length, manifest.scheme) for name in CACHES})
        for b, count in enumerate(new):
            rows[b].append(torch.from_numpy(logits[b, :count].astype(np.float32)))
    return [torch.cat(parts) for parts in rows]


def dense(cache: Held, name: str, length: np.ndarray, scheme: str) -> np.ndarray:
    """Rows of one cache of scheme fp16, float32 [B, H, P, D]."""
    tensors = [torch.from_numpy(cache[f"past.{name}.{part}"]) for part in ("codes", "tail")]
    role = name.split(".")[1]
    rows = torch.ops.hqmq.dequantize(torch.from_numpy(length), [], tensors, scheme, role, torch.float32)
    return np.asarray(rows.numpy())


def run_held(model: onnx.ModelProto, kept: list[Held], lengths: Any = LENGTHS) -> tuple[list[Tensor], float]:
    """The original, each sequence on its own, over the K and V that another run kept, new ones included.

    Returns:
        Its logits [tokens, V] of each sequence, and by how many half steps of float16 the K and V that it would have
        kept itself differ at most: rounding makes 1.
    """
    session = open_original(hold_cache(model))
    outputs, given = [v.name for v in session.get_outputs()], {v.name for v in session.get_inputs()}
    ids, result, worst = tokens(), [], 0.0
    for b in range(3):
        done, rows = 0, []
        for step, new in enumerate(lengths):
            if not (count := new[b]):
                continue
            feed = {"input_ids": ids[b : b + 1, done : done + count], "attention_mask": np.ones((1, done + count), int)}
            feed["position_ids"] = np.arange(done, done + count)[None]
            for name in CACHES:
                held = kept[step][name][b : b + 1]
                feed[f"past_key_values.{name}"] = held[:, :, :done]
                feed[f"held.past_key_values.{name}"] = held[:, :, done : done + count]
            found = dict(zip(outputs, session.run(None, {k: v for k, v in feed.items() if k in given}), strict=True))
            rows.append(torch.from_numpy(found["logits"][0]))
            for name in CACHES:
                own, held = found[f"own.past_key_values.{name}"], feed[f"held.past_key_values.{name}"]
                half = np.maximum(np.spacing(np.abs(held).astype(np.float16)).astype(np.float32) / 2, 1e-5)
                worst = max(worst, float((np.abs(own - held) / half).max()))
            done += count
        result.append(torch.cat(rows))
    return result, worst


def run_original(model: onnx.ModelProto, lengths: Any = LENGTHS, rounded: bool = True) -> list[Tensor]:
    """The same, each sequence on its own with the model's own cache. `rounded`: new K and V go through float16, as in
    a cache of scheme fp16."""
    return run_alone(open_original(round_cache(model) if rounded else model), lengths)


def run_alone(session: Any, lengths: Any = LENGTHS, rows: int = 0, dim: int | None = None) -> list[Tensor]:
    """Logits [tokens, V] of each of three sequences on its own in a decoder with its own cache, which begins with
    `rows` rows of zeros; `dim`: head_dim, where the file does not tell it."""
    inputs = {value.name: value for value in session.get_inputs()}
    names, ids, result = [value.name for value in session.get_outputs()], tokens(), []
    for b in range(3):
        past = {
            name: np.zeros((1, value.shape[1], rows, dim or value.shape[3]), np.float32)
            for name, value in inputs.items()
            if "past" in name
        }
        done, found_rows = 0, []
        for new in lengths:
            if not (count := new[b]):
                continue
            feed = {"input_ids": ids[b : b + 1, done : done + count], **past}
            done += count
            feed["attention_mask"] = np.ones((1, done), np.int64)
            feed["position_ids"] = np.arange(done - count, done)[None]
            found = dict(zip(names, session.run(None, {k: v for k, v in feed.items() if k in inputs}), strict=True))
            found_rows.append(torch.from_numpy(found["logits"][0]))
            past = {n.replace("present", "past_key_values"): v for n, v in found.items() if n != "logits"}
        result.append(torch.cat(found_rows))
    return result


def open_original(model: onnx.ModelProto) -> Any:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    return onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def round_cache(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which what joins the cache is rounded to float16 before."""

    def rounded(new: str, past: str) -> tuple[str, list[onnx.NodeProto]]:
        half, full = f"{past}.half", f"{past}.full"
        down = onnx.helper.make_node("Cast", [new], [half], to=onnx.TensorProto.FLOAT16)
        return full, [down, onnx.helper.make_node("Cast", [half], [full], to=onnx.TensorProto.FLOAT)]

    return change_joins(model, rounded)


def hold_cache(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy in which inputs ``held.…`` join the cache, and what would have joined it is an output ``own.…``."""
    infos = []

    def held(new: str, past: str) -> tuple[str, list[onnx.NodeProto]]:
        infos.append(past)
        return f"held.{past}", [onnx.helper.make_node("Identity", [new], [f"own.{past}"])]

    copy = change_joins(model, held)
    for past in infos:
        info = onnx.helper.make_tensor_value_info
        copy.graph.input.append(info(f"held.{past}", onnx.TensorProto.FLOAT, [None] * 4))
        copy.graph.output.append(info(f"own.{past}", onnx.TensorProto.FLOAT, [None] * 4))
    return copy


def change_joins(
    model: onnx.ModelProto, change: Callable[[str, str], tuple[str, list[onnx.NodeProto]]]
) -> onnx.ModelProto:
    """A copy in which something else joins each cache. `change`: (new rows, cache input) → (what joins it, nodes)."""
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    past = {value.name: value.name for value in copy.graph.input if "past" in value.name}
    nodes: list[onnx.NodeProto] = []
    for node in copy.graph.node:
        if len(node.input) == 1 and node.input[0] in past and node.op_type in ("Concat", "Identity"):
            past[node.output[0]] = past[node.input[0]]
        elif node.op_type in ("Concat", "Attention"):
            for place, source in enumerate(list(node.input)):
                if source in past:
                    new = place - 3 if node.op_type == "Attention" else 1
                    node.input[new], made = change(node.input[new], past[source])
                    nodes += made
        nodes.append(node)
    del copy.graph.node[:]
    copy.graph.node.extend(nodes)
    return copy


def run_torch(model: Any, scheme: str, lengths: Any = LENGTHS) -> list[Tensor]:
    """PyTorch with an HqmqCache, each sequence on its own."""
    ids, result = tokens(), []
    for b in range(3):
        cache, done, rows = HqmqCache.for_model(model, scheme), 0, []
        for new in lengths:
            if new[b]:
                piece = torch.from_numpy(ids[b : b + 1, done : done + new[b]])
                with torch.no_grad():
                    rows.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0])
                done += new[b]
        result.append(torch.cat(rows))
    return result


def difference(first: list[Tensor], second: list[Tensor]) -> float:
    return max(float((a - b).abs().max()) for a, b in zip(first, second, strict=True))


def mean_difference(first: list[Tensor], second: list[Tensor]) -> float:
    return float((torch.cat(first) - torch.cat(second)).abs().mean())


def divergence(reference: list[Tensor], found: list[Tensor]) -> float:
    """Mean KL(reference || found) over all tokens, in nats."""
    p, q = (torch.cat(rows).double().log_softmax(1) for rows in (reference, found))
    return float((p.exp() * (p - q)).sum(1).mean())
