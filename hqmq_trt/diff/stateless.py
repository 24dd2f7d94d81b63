"""One prefill step from an empty cache, in Polygraphy's own TrtRunner and OnnxrtRunner: no code of our runtimes runs.

TrtRunner gives past and present addresses of their own wherever TensorRT does not tell it that they are aliased; the
plugins then copy past to present. So this also tries an engine in the hands of a tool that knows nothing of our cache.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.comparator import Comparator
from polygraphy.exception import PolygraphyException
from polygraphy.logger import G_LOGGER

from hqmq_trt import ort_library
from hqmq_trt.diff.measures import LogitComparison
from hqmq_trt.diff.pinned import differing_chunks
from hqmq_trt.engine.manifest import PREFILL_PROFILE, EngineManifest
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest
from hqmq_trt.scheme import ROLES

_NUMPY_TYPE: dict[str, Any] = {"int32": np.int32, "float16": np.float16}


@dataclass
class StatelessCheck:
    """TrtRunner against OnnxrtRunner.

    Attributes:
        tokens: of the step.
        logits: with ONNX Runtime's as the reference.
        max_difference: largest difference of a logit.
        chunks, changed: chunks of full pages by role, and how many of them got another code.
    """

    tokens: int
    logits: LogitComparison
    max_difference: float
    chunks: dict[str, int] = field(default_factory=dict)
    changed: dict[str, int] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {
            "tokens": self.tokens,
            "logits": self.logits.summary(),
            "max_difference": self.max_difference,
            "chunks": self.chunks,
            "changed_chunks": self.changed,
        }


def check(folder: Path, engine: Path, token_ids: NDArray[np.int64], threads: int = 0) -> StatelessCheck | None:
    """Run one prefill step of an engine and of its ONNX file; None for bfloat16 logits, which numpy lacks.

    Args:
        folder, engine: the exported folder, and the engine built from it.
        token_ids: int64 [T], at most the engine's prefill_chunk.

    Raises:
        HqmqError: as TrtSession; or Polygraphy's own reasons.
    """
    manifest = Manifest.load(folder)
    if manifest.logits_dtype == "bfloat16":
        return None
    path = folder / manifest.model_file

    def session() -> ort.InferenceSession:
        return ort_library.session(path, ort_library.providers("cpu"), threads)

    with _trt_runner(engine) as runner:
        return compare_runners(manifest, OnnxrtRunner(session, "onnxruntime"), runner, token_ids)


def compare_runners(
    manifest: Manifest, reference: BaseRunner, found: BaseRunner, token_ids: NDArray[np.int64]
) -> StatelessCheck:
    """Feed both runners one step of token_ids [T] from an empty cache, and compare all they return.

    Raises:
        HqmqError: a runner failed.
    """
    feed = step_feed(manifest, token_ids)
    checks: list[StatelessCheck] = []

    def measure(theirs: Any, ours: Any) -> OrderedDict[str, bool]:
        checks.append(_measure(manifest, token_ids, theirs, ours))
        return OrderedDict(logits=bool(np.isfinite(checks[-1].max_difference)))

    try:
        with G_LOGGER.verbosity(G_LOGGER.CRITICAL):
            results = Comparator.run([reference, found], data_loader=[feed])
            Comparator.compare_accuracy(results, compare_func=measure)
    except PolygraphyException as error:
        raise HqmqError(f"Polygraphy cannot run the engine: {' '.join(str(error).split())[:400]}") from error
    return checks[0]


def step_feed(manifest: Manifest, token_ids: NDArray[np.int64]) -> OrderedDict[str, NDArray[Any]]:
    """Inputs of the graph for token_ids [T] of one sequence with an empty cache, every row's logits wanted."""
    count = len(token_ids)
    feed: OrderedDict[str, NDArray[Any]] = OrderedDict(
        input_ids=np.ascontiguousarray(token_ids, np.int64)[None],
        past_length=np.zeros(1, np.int32),
        new_length=np.array([count], np.int32),
        logits_index=np.arange(count, dtype=np.int64)[None],
    )
    for name, spec in manifest.cache(1, -(-count // manifest.page_size)):
        feed[f"past.{name}"] = np.zeros(spec.shape, _NUMPY_TYPE[spec.dtype])
    return feed


@contextmanager
def _trt_runner(folder: Path) -> Iterator[BaseRunner]:
    """TrtRunner over an engine folder; afterwards everything is given back."""
    from polygraphy.backend.trt import TrtRunner

    from hqmq_trt.runtime.cuda_driver import Device
    from hqmq_trt.runtime.trt_engine import load_engine

    runtime, engine = load_engine(folder, EngineManifest.load(folder), Device.get(0), verify=False)
    # "profile": scratch memory of the prefill profile alone, not of the largest.
    runner = TrtRunner(engine, "tensorrt", optimization_profile=PREFILL_PROFILE, allocation_strategy="profile")
    try:
        yield runner
    finally:
        del runner, engine  # before the runtime
        del runtime


def _measure(manifest: Manifest, token_ids: NDArray[np.int64], theirs: Any, ours: Any) -> StatelessCheck:
    logits = [np.asarray(result["logits"])[0].astype(np.float32) for result in (theirs, ours)]
    check = StatelessCheck(
        len(token_ids),
        LogitComparison.of(logits[0], logits[1], token_ids[1:]),
        float(np.abs(logits[0] - logits[1]).max()),
        dict.fromkeys(ROLES, 0),
        dict.fromkeys(ROLES, 0),
    )
    if any(int(np.asarray(result["present_length"])[0]) != len(token_ids) for result in (theirs, ours)):
        raise HqmqError("present_length is not the number of tokens read; export the model and build the engine again")
    rows = slice(len(token_ids) // manifest.page_size * manifest.page_size)
    for index, layer in enumerate(manifest.layers):
        for role in ROLES:
            codes = [np.asarray(result[f"present.{index}.{role}.codes"])[0, :, rows] for result in (ours, theirs)]
            chunks, changed = differing_chunks(codes[0], codes[1], manifest.parsed_scheme.role(role), layer)
            check.chunks[role] += chunks
            check.changed[role] += changed
    return check


def step_tokens(engine: EngineManifest, token_ids: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
    """The first tokens of a text, as many as one prefill run of the engine takes."""
    return np.asarray(token_ids[: engine.prefill_chunk], np.int64)
