"""Runs an exported folder and its PyTorch source over one text through Polygraphy, and measures the difference."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

import hqmq_trt.torch_ops  # noqa: F401  (registers torch.ops.hqmq)
from hqmq_trt.diff.measures import LayerError, LogitComparison, relative_mse
from hqmq_trt.diff.pinned import PinnedRunner, Recording, RecordingRunner
from hqmq_trt.diff.runners import SessionRunner, TorchRunner, codebook_tensors
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import cache_tensors
from hqmq_trt.manifest import Manifest
from hqmq_trt.runtime.ort_session import OrtSession
from hqmq_trt.scheme import ROLES, Scheme

REFERENCES = ("unpacked", "same", "pinned")
"""What a folder is compared with: PyTorch with a DynamicCache; PyTorch with an HqmqCache of the same scheme, each
writing its own; and the same, but each feed begins from the bytes of the HqmqCache (hqmq_trt.diff.pinned)."""

_SESSION = "onnxruntime"
Progress = Callable[[str, int], None]


@dataclass
class DiffResult:
    """What `compare` found.

    Attributes:
        manifest: of the folder.
        tokens, decode_steps: tokens read in chunks, and then one by one.
        logits: comparison by reference (of REFERENCES).
        layers: error of K and V by layer, against PyTorch with an unpacked cache; empty without that reference.
        cache_bytes: bytes of the session's cache by kind.
        changed: by role, the share of chunks that got another code than in PyTorch, from K and V that differ by
            rounding alone; empty without the reference ``pinned``.
    """

    manifest: Manifest
    tokens: int
    decode_steps: int
    logits: dict[str, LogitComparison]
    layers: list[LayerError] = field(default_factory=list)
    cache_bytes: dict[str, int] = field(default_factory=dict)
    changed: dict[str, float] = field(default_factory=dict)

    def within(self, max_kl: float | None, min_top1: float | None) -> bool:
        """Whether every comparison keeps to the limits."""
        return all(found.within(max_kl, min_top1) for found in self.logits.values())

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {
            "scheme": self.manifest.scheme,
            "mode": self.manifest.mode,
            "tokens": self.tokens,
            "decode_steps": self.decode_steps,
            "cache_bytes": self.cache_bytes,
            "changed_chunks": self.changed,
            "logits": {name: found.summary() for name, found in self.logits.items()},
            "layers": [vars(error) for error in self.layers],
        }


def compare(
    folder: str | Path,
    model: Any,
    token_ids: Sequence[int],
    against: Sequence[str] = REFERENCES,
    decode_steps: int = 32,
    chunk: int = 512,
    threads: int = 0,
    on_feed: Progress | None = None,
) -> DiffResult:
    """Compare an exported folder with its PyTorch model over `token_ids`, the last `decode_steps` one by one.

    Args:
        folder: what `hqmq-trt export` wrote.
        model: the transformers model it came from, in eval mode, not rotated.
        token_ids: the text; every position's logits are compared.
        against: of REFERENCES.
        chunk: tokens of one prefill feed.
        on_feed: called with a runner's name and the tokens it has just read.

    Raises:
        HqmqError: no tokens, unknown reference, or a model whose cache differs from the folder's.
    """
    ids = np.asarray(token_ids, np.int64)
    if not 0 <= decode_steps < len(ids):
        raise HqmqError(f"{len(ids)} tokens are too few for {decode_steps} decode steps; give more text")
    unknown = set(against) - set(REFERENCES)
    if unknown or not against:
        raise HqmqError(f"unknown reference {sorted(unknown)}: use {' or '.join(REFERENCES)}")
    manifest = Manifest.load(folder)
    sessions: list[OrtSession] = []

    def new_session() -> OrtSession:
        sessions.append(OrtSession(folder, 1, len(ids), max(chunk, manifest.page_size), threads))
        return sessions[-1]

    def run(runners: list[Any], feeds: list[Any]) -> list[_Measure]:
        """Compare the last runner with each of the others."""
        measures = [_Measure(feeds, ids, manifest) for _ in runners[1:]]
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            results = Comparator.run(runners, data_loader=feeds)
            for index, measure in enumerate(measures):
                Comparator.compare_accuracy(results, comparisons=[(index, len(measures))], compare_func=measure)
        return measures

    result = DiffResult(manifest, len(ids) - decode_steps, decode_steps, {})
    free = [name for name in against if name != "pinned"]
    if free:
        runners = [_torch_runner(name, model, manifest, len(ids), _feed(on_feed, name)) for name in free]
        runners.append(SessionRunner(_SESSION, new_session, _feed(on_feed, _SESSION)))
        for name, measure in zip(free, run(runners, list(_feeds(ids, decode_steps, chunk))), strict=True):
            result.logits[name] = LogitComparison.join(measure.parts)
            result.layers = result.layers or measure.layers
    if "pinned" in against:
        recording = Recording()
        reference = _torch_runner("pinned", model, manifest, len(ids), _feed(on_feed, "pinned"), recording)
        pinned = PinnedRunner(recording, f"{_SESSION}-pinned", new_session, _feed(on_feed, "pinned"))
        (measure,) = run([reference, pinned], list(_feeds(ids, decode_steps, manifest.page_size)))
        result.logits["pinned"] = LogitComparison.join(measure.parts)
        result.changed = {role: pinned.changed[role] / max(pinned.chunks[role], 1) for role in ROLES}
    result.cache_bytes = sessions[0].cache_nbytes()
    return result


def _feed(on_feed: Progress | None, name: str) -> Callable[[int], None] | None:
    return (lambda tokens: on_feed(name, tokens)) if on_feed else None


def _feeds(ids: NDArray[np.int64], decode_steps: int, chunk: int) -> Iterator[OrderedDict[str, NDArray[Any]]]:
    prompt = len(ids) - decode_steps
    starts = [*range(0, prompt, chunk), *range(prompt, len(ids))]
    for start, end in zip(starts, [*starts[1:], len(ids)], strict=True):
        yield OrderedDict(
            input_ids=ids[None, start:end],
            position=np.array([start], np.int64),
            want_cache=np.array([end == len(ids)]),
        )


def _torch_runner(
    name: str,
    model: Any,
    manifest: Manifest,
    tokens: int,
    on_feed: Callable[[int], None] | None,
    recording: Recording | None = None,
) -> TorchRunner:
    from transformers import DynamicCache

    if name == "unpacked":
        return TorchRunner(name, model, DynamicCache, on_feed=on_feed)
    from hqmq_trt.cache import HqmqCache
    from hqmq_trt.hf_attention import IMPLEMENTATION

    attention = IMPLEMENTATION if manifest.mode == "fused" else None
    scheme = manifest.parsed_scheme

    def new_cache() -> HqmqCache:
        return HqmqCache(model.config, scheme, max_length=tokens)

    if recording is not None:
        return RecordingRunner(recording, name, model, new_cache, attention, on_feed)
    return TorchRunner(name, model, new_cache, attention, on_feed)


class _Measure:
    """Polygraphy compare_func: collects logits feed by feed, and K and V from the feed that has them."""

    def __init__(self, feeds: list[Any], ids: NDArray[np.int64], manifest: Manifest) -> None:
        self._feeds, self._ids, self._manifest = feeds, ids, manifest
        self.parts: list[LogitComparison] = []
        self.layers: list[LayerError] = []

    def __call__(self, reference: Any, found: Any) -> OrderedDict[str, bool]:
        feed = self._feeds[len(self.parts)]
        end = int(feed["position"][0]) + feed["input_ids"].shape[1]
        following = self._ids[int(feed["position"][0]) + 1 : end + 1]
        part = LogitComparison.of(np.asarray(reference["logits"]), np.asarray(found["logits"]), following)
        self.parts.append(part)
        for index, layer in enumerate(self._manifest.layers):
            for role in ROLES:
                name = f"{role}.{index}"
                if name not in reference or name not in found:
                    continue
                true, cached = np.asarray(reference[name]), np.asarray(found[name])
                if true.shape != cached.shape:
                    raise HqmqError(
                        f"layer {index}: the model's {role} is {list(true.shape)}, the folder's {list(cached.shape)}; "
                        "give the model that was exported"
                    )
                coded = roundtrip(true, self._manifest.parsed_scheme, index, layer.num_kv_heads, role)
                self.layers.append(LayerError(index, role, relative_mse(true, coded), relative_mse(true, cached)))
        return OrderedDict(logits=bool(np.isfinite(part.kl).all()))


def roundtrip(
    x: NDArray[np.float32], scheme: Scheme, layer: int, num_kv_heads: int, role_name: str
) -> NDArray[np.float32]:
    """K or V [H, T, D] through the codec of one layer and role; the tokens of a last, partial page stay fp16."""
    role = scheme.role(role_name)
    heads, tokens, head_dim = x.shape
    pages = -(-tokens // scheme.page_size)
    specs = cache_tensors(role, scheme.page_size, head_dim, heads, 1, pages)
    past = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs]
    book = codebook_tensors(role, scheme.seed, layer, num_kv_heads, role_name)
    count, zero = torch.tensor([tokens], dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    new = torch.from_numpy(np.ascontiguousarray(x, np.float32))[None]
    present = torch.ops.hqmq.quantize(new, zero, count, book, past, scheme.name, role_name)
    out = torch.ops.hqmq.dequantize(count, book, present, scheme.name, role_name, torch.float32)
    result: NDArray[np.float32] = out[0, :, :tokens].numpy()
    return result
