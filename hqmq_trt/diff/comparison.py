"""Runs an exported folder and its PyTorch source over one text through Polygraphy, and measures the difference."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.comparator import Comparator
from polygraphy.logger import G_LOGGER

import hqmq_trt.torch_ops  # noqa: F401  (registers torch.ops.hqmq)
from hqmq_trt.balance import balanced_like
from hqmq_trt.diff import stateless
from hqmq_trt.diff.measures import LayerError, LogitComparison, relative_mse
from hqmq_trt.diff.pinned import PinnedRunner, Recording, RecordingRunner
from hqmq_trt.diff.result import DiffResult, DirectDiff, RuntimeDiff
from hqmq_trt.diff.runners import SessionRunner, TorchRunner, codebook_tensors
from hqmq_trt.engine.manifest import EngineManifest
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import cache_tensors
from hqmq_trt.manifest import Manifest
from hqmq_trt.runtime.cache_file import model_digest
from hqmq_trt.runtime.ort_session import OrtSession
from hqmq_trt.runtime.session import Session
from hqmq_trt.scheme import ROLES, Scheme

REFERENCES = ("unpacked", "same", "pinned")
"""What a folder is compared with: PyTorch with a DynamicCache; PyTorch with an HqmqCache of the same scheme, each
writing its own; and the same, but each feed begins from the bytes of the HqmqCache (hqmq_trt.diff.pinned)."""

ONNX_RUNTIME, TENSORRT = "onnxruntime", "tensorrt"
Progress = Callable[[str, int], None]


def compare(
    folder: str | Path,
    model: Any,
    token_ids: Sequence[int],
    against: Sequence[str] = REFERENCES,
    decode_steps: int = 32,
    chunk: int = 512,
    threads: int = 0,
    on_feed: Progress | None = None,
    engine: str | Path | None = None,
    onnx_runtime: bool = True,
) -> DiffResult:
    """Compare an exported folder with its PyTorch model over `token_ids`, the last `decode_steps` one by one.

    Args:
        folder: what `hqmq-trt export` wrote.
        model: the transformers model it came from, in eval mode, neither rotated nor balanced; it runs where its
            weights lie.
        token_ids: the text; every position's logits are compared.
        against: of REFERENCES.
        chunk: tokens of one prefill feed; at most the engine's prefill_chunk, where there is one.
        on_feed: called with a runner's name and the tokens it has just read: a reference's, a runtime's, or for
            what belongs to the pinned comparison ``pinned``.
        engine: what `hqmq-trt build` made of the folder; None: TensorRT is left out.
        onnx_runtime: False leaves ONNX Runtime out.

    Raises:
        HqmqError: no tokens, unknown reference, no runtime, an engine of another model or too small, or a model whose
            cache differs from the folder's.
    """
    ids = np.asarray(token_ids, np.int64)
    if not 0 <= decode_steps < len(ids):
        raise HqmqError(f"{len(ids)} tokens are too few for {decode_steps} decode steps; give more text")
    unknown = set(against) - set(REFERENCES)
    if unknown or not against:
        raise HqmqError(f"unknown reference {sorted(unknown)}: use {' or '.join(REFERENCES)}")
    sessions = open_runtimes(folder, len(ids), max(chunk, 1), threads, engine, onnx_runtime)
    manifest = Manifest.load(folder)
    limits = None if engine is None else EngineManifest.load(Path(engine))
    most = chunk if limits is None else min(chunk, limits.prefill_chunk)
    result = DiffResult(manifest, len(ids) - decode_steps, decode_steps, {name: RuntimeDiff() for name in sessions})

    free = [name for name in against if name != "pinned"]
    if free:
        references = [torch_runner(name, model, manifest, len(ids), _feed(on_feed, name)) for name in free]
        ours = [SessionRunner(name, new, _feed(on_feed, name)) for name, new in sessions.items()]
        pairs = [(i, len(free) + j) for j in range(len(ours)) for i in range(len(free))]
        if len(ours) == 2:
            pairs.append((len(free), len(free) + 1))
        measures = _run([*references, *ours], list(_feeds(ids, decode_steps, most)), pairs, ids, manifest)
        for (reference, runner), measure in zip(pairs, measures, strict=True):
            if reference >= len(free):
                result.direct = DirectDiff(LogitComparison.join(measure.parts), measure.layers)
                continue
            found = result.runtimes[ours[runner - len(free)].name]
            found.logits[free[reference]] = LogitComparison.join(measure.parts)
            found.layers = found.layers or measure.layers
            found.cache_bytes = ours[runner - len(free)].cache_nbytes
    if "pinned" in against:
        recording = Recording()
        on_pinned = _feed(on_feed, "pinned")
        recorder = torch_runner("pinned", model, manifest, len(ids), on_pinned, recording)
        pinned = [PinnedRunner(recording, f"{name}-pinned", new, on_pinned) for name, new in sessions.items()]
        pairs = [(0, 1 + j) for j in range(len(pinned))]
        feeds = list(_feeds(ids, decode_steps, min(manifest.page_size, most)))
        measures = _run([recorder, *pinned], feeds, pairs, ids, manifest)
        for name, runner, measure in zip(sessions, pinned, measures, strict=True):
            found = result.runtimes[name]
            found.logits["pinned"] = LogitComparison.join(measure.parts)
            found.changed = {role: runner.changed[role] / max(runner.chunks[role], 1) for role in ROLES}
            found.cache_bytes = runner.cache_nbytes
    if engine is not None and limits is not None and onnx_runtime:
        result.stateless = stateless.check(Path(folder), Path(engine), stateless.step_tokens(limits, ids), threads)
    return result


def open_runtimes(
    folder: str | Path,
    max_context: int,
    prefill_chunk: int,
    threads: int = 0,
    engine: str | Path | None = None,
    onnx_runtime: bool = True,
) -> dict[str, Callable[[], Session]]:
    """What opens a session for one sequence of each runtime, by name; `compare` explains the arguments.

    Raises:
        HqmqError: no runtime, or an engine of another model or too small.
    """
    manifest = Manifest.load(folder)
    if manifest.engine_file is not None:
        raise HqmqError(f"{folder}: is an engine; give the folder that `hqmq-trt export` wrote, and this with --engine")
    if engine is None and not onnx_runtime:
        raise HqmqError("no runtime to compare: give an engine (--engine), or leave out --no-ort")
    sessions: dict[str, Callable[[], Session]] = {}
    if onnx_runtime:
        sessions[ONNX_RUNTIME] = partial(
            OrtSession, folder, 1, max_context, max(prefill_chunk, manifest.page_size), threads
        )
    if engine is not None:
        limits = EngineManifest.load(Path(engine))
        if model_digest(limits.source_model) != model_digest(manifest.files):
            raise HqmqError(f"{engine}: was not built from {folder}; build it again, or give the folder it came from")
        if max_context > limits.max_context:
            raise HqmqError(
                f"{engine}: holds {limits.max_context} tokens, {max_context} are needed; take fewer tokens, or build "
                f"it with --max-context {max_context}"
            )
        from hqmq_trt.runtime.trt_session import TrtSession

        sessions[TENSORRT] = partial(TrtSession, engine, 1, max_context)
    return sessions


def _run(
    runners: list[Any], feeds: list[Any], pairs: list[tuple[int, int]], ids: NDArray[np.int64], manifest: Manifest
) -> list[_Measure]:
    """Run all runners over the feeds, and compare those of each pair (reference, other)."""
    measures = [_Measure(feeds, ids, manifest, codec=pair[0] == 0) for pair in pairs]
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
        results = Comparator.run(runners, data_loader=feeds)
        for pair, measure in zip(pairs, measures, strict=True):
            Comparator.compare_accuracy(results, comparisons=[pair], compare_func=measure)
    return measures


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


def torch_runner(
    name: str,
    model: Any,
    manifest: Manifest,
    tokens: int,
    on_feed: Callable[[int], None] | None = None,
    recording: Recording | None = None,
    balance: bool = True,
) -> TorchRunner:
    """The runner of a reference: `name` is of REFERENCES, `tokens` what its cache must hold.

    The model gets the weights of its export while the runner is active (hqmq_trt.balance); with `balance` False it is
    taken to have them.
    """
    from transformers import DynamicCache

    weights = partial(balanced_like, model, manifest) if balance else None
    if name == "unpacked":
        return TorchRunner(name, model, DynamicCache, None, on_feed, weights)
    from hqmq_trt.cache import HqmqCache
    from hqmq_trt.hf_attention import IMPLEMENTATION

    attention = IMPLEMENTATION if manifest.mode == "fused" else None
    scheme = manifest.parsed_scheme

    def new_cache() -> HqmqCache:
        return HqmqCache(model.config, scheme, max_length=tokens)

    if recording is not None:
        return RecordingRunner(recording, name, model, new_cache, attention, on_feed, weights)
    return TorchRunner(name, model, new_cache, attention, on_feed, weights)


class _Measure:
    """Polygraphy compare_func: collects logits feed by feed, and K and V from the feed that has them."""

    def __init__(self, feeds: list[Any], ids: NDArray[np.int64], manifest: Manifest, codec: bool) -> None:
        self._feeds, self._ids, self._manifest, self._codec = feeds, ids, manifest, codec
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
                codec = None
                if self._codec:
                    coded = roundtrip(true, self._manifest.parsed_scheme, index, layer.num_kv_heads, role)
                    codec = relative_mse(true, coded)
                self.layers.append(LayerError(index, role, codec, relative_mse(true, cached)))
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
