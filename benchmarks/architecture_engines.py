"""A TensorRT engine of one exported tiny model, run beside ONNX Runtime on the same file. Does not import torch."""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest
from hqmq_trt.runtime.session import Session

PACKED, UNPACKED = "hq4@p16", "fp16@p16"
MAX_BATCH, MAX_CONTEXT, PREFILL_CHUNK = 3, 256, 64
STEPS = ([64, 41, 3], [30, 1, 0], *([1, 1, 1],) * 32)
"""Tokens that each sequence gets in each call: a prefill as wide as the engine takes, a chunk, 32 single tokens."""
LOGIT_LIMIT = {"hugging-face": 3e-4, "onnx": 5e-3}
"""Largest difference of a logit in float32 with the unpacked cache, by road. Only the order of sums differs, and here
and there a K or V falls to the other side when it is rounded to float16, which moves a logit by up to 1e-4 in
tests/architectures.py and more in tests/rewrite_cases.py, whose weights are larger. A scale wrong by 5 % in one layer
moves logits by at least 6.4e-4 and 7e-2."""
KL_LIMIT = 1e-4
"""Mean KL in float32 with the packed cache, where a K or V that rounds otherwise may also get another code: as for
ONNX Runtime beside PyTorch (docs/models.md). These models are so small that a wrong scale may pass; a wrong code table
or page would not, and the bytes themselves are compared in tests/gpu/test_trt_plugins.py."""
HALF_LIMIT, HALF_FACTOR = 1e-3, 4.0
"""Mean KL in float16, where two runtimes round at other places: this much, or this factor times what the rounding alone
does to the model (ONNX Runtime's float32 export against its float16 one, which says too little where its CPU kernels
compute in float32). A tenth of what the tests allow ONNX Runtime beside PyTorch. It shows that TensorRT takes the types
and nothing overflows; that the arithmetic is right is shown in float32."""
LEAST_SPREAD = 0.15
"""Standard deviation of logits; a flat distribution would hide mistakes."""


@dataclass(frozen=True)
class Case:
    """An engine to build.

    Attributes:
        road: ``hugging-face`` or ``onnx``.
        name: of the architecture, or of the way an ONNX file was exported.
        mode: ``fused`` or ``qdq``.
        dtype: ``float32`` or ``float16``, of the weights.
        scheme: of the cache, PACKED or UNPACKED.
        exports: folder that holds the exports, each in `folder`.
    """

    road: str
    name: str
    mode: str
    dtype: str
    scheme: str
    exports: Path

    @property
    def id(self) -> str:
        """Unique name, fit for a folder."""
        return "-".join(
            (self.road, self.name.lower().replace(" ", "_"), self.mode, self.dtype, self.scheme.split("@")[0])
        )

    @property
    def folder(self) -> Path:
        """Where its export lies."""
        return self.exports / self.id

    def wide(self) -> Case:
        """The same in float32."""
        return replace(self, dtype="float32")

    def record(self) -> dict[str, Any]:
        """What says which case a result is of."""
        return {"case": self.id, **{key: value for key, value in asdict(self).items() if key != "exports"}}


def run(session: Session) -> NDArray[np.float32]:
    """Logits [all tokens, V] of MAX_BATCH sequences of random tokens, sequence by sequence."""
    generator = np.random.default_rng(5)
    ids = generator.integers(3, session.manifest.vocab_size, (MAX_BATCH, int(np.sum(STEPS, 0).max())))
    rows: list[list[NDArray[np.float32]]] = [[] for _ in ids]
    done = np.zeros(MAX_BATCH, int)
    for new in STEPS:
        if max(new) == 1:
            logits = session.decode([int(ids[b, done[b]]) for b in range(MAX_BATCH)]).copy()[:, None]
        else:
            padded = np.zeros((MAX_BATCH, max(new)), np.int64)
            for b, count in enumerate(new):
                padded[b, :count] = ids[b, done[b] : done[b] + count]
            index = np.tile(np.arange(max(new)), (MAX_BATCH, 1))
            logits = session.step(padded, np.array(new, np.int32), index)
        for b, count in enumerate(new):
            rows[b].append(logits[b, :count])
        done += new
    assert session.lengths.tolist() == done.tolist()
    return np.concatenate([part for parts in rows for part in parts]).astype(np.float32)


def divergence(reference: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Mean KL(reference || found) over all tokens, in nats."""
    p, q = (_log_softmax(logits.astype(np.float64)) for logits in (reference, found))
    return float((np.exp(p) * (p - q)).sum(1).mean())


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(1, keepdims=True))
    return result


_KEPT: list[Any] = []


def prepare() -> None:
    """Load TensorRT, its builder and the plugin library, which takes most of a small build's time. The builder lives as
    long as the process, so that what it loaded stays."""
    from hqmq_trt.engine.plugin_library import load_plugin_library
    from hqmq_trt.engine.versions import check_tensorrt
    from hqmq_trt.runtime.trt_engine import trt_log

    trt = check_tensorrt()
    load_plugin_library(trt_log())
    _KEPT.append(trt.Builder(trt_log()))


def examine(task: tuple[Case, dict[str, Any]]) -> dict[str, Any]:
    """Build, run and compare.

    Args:
        task: the case, and options of build_engine (``timing_cache``, ``optimization_level``).

    Returns:
        The case's record with ``outcome`` ``passes`` or ``fails`` and, as far as it came, what was measured. If it
        fails, ``stage`` (``parse``, ``build``, ``load``, ``run``, ``reference``, ``compare``) and ``error``; for
        ``parse`` also ``unsupported``, all nodes that TensorRT's parser objects to.
    """
    case, options = task
    started = time.monotonic()
    result: dict[str, Any] = {**case.record(), "outcome": "fails", "operators": _operators(case.folder)}
    try:
        with tempfile.TemporaryDirectory() as root:
            found = _run_engine(case, Path(root) / "engine", options, result)
        result["stage"] = "reference"
        wanted = _reference(case.folder)
        if case.dtype != "float32":
            result["rounding"] = divergence(_reference(case.wide().folder), wanted)
        result["stage"] = "compare"
        _compare(wanted, found, result)
    except Exception as error:
        text = str(error) if isinstance(error, HqmqError) else f"{type(error).__name__}: {error}"
        result["error"] = " ".join(text.split())[:1500].replace(str(case.exports), "…")
        if result["stage"] == "build" and "cannot parse it" in text:
            result |= {"stage": "parse", "unsupported": unsupported_nodes(case.folder)}
    if result["outcome"] == "passes":
        del result["stage"]
    result["seconds"] = round(time.monotonic() - started, 2)
    return result


def _run_engine(case: Case, folder: Path, options: dict[str, Any], result: dict[str, Any]) -> NDArray[np.float32]:
    from hqmq_trt.engine.builder import build_engine
    from hqmq_trt.runtime.trt_session import TrtSession

    result["stage"] = "build"
    limits: dict[str, Any] = {"max_batch": MAX_BATCH, "max_context": MAX_CONTEXT, "prefill_chunk": PREFILL_CHUNK}
    made = build_engine(case.folder, folder, **limits, **options, note=lambda text: None)
    result |= {"stage": "load", "tensorrt": made.tensorrt_version, "gpu": made.gpu_name}
    result["build_seconds"] = made.build_seconds
    with TrtSession(folder) as session:
        result["stage"] = "run"
        return run(session)


def _reference(folder: Path) -> NDArray[np.float32]:
    from hqmq_trt.runtime.ort_session import OrtSession

    with OrtSession(folder, MAX_BATCH, MAX_CONTEXT, PREFILL_CHUNK, threads=1) as session:
        return run(session)


def _compare(wanted: NDArray[np.float32], found: NDArray[np.float32], result: dict[str, Any]) -> None:
    result |= {
        "spread": float(wanted.std()),
        "kl": divergence(wanted, found),
        "logit_error": float(np.abs(wanted - found).max()),
    }
    measure, limit = "kl", KL_LIMIT
    if result["dtype"] != "float32":
        limit = max(HALF_LIMIT, HALF_FACTOR * result["rounding"])
    elif result["scheme"] == UNPACKED:
        measure, limit = "logit_error", LOGIT_LIMIT[result["road"]]
    result["limit"] = {measure: limit}
    if result["spread"] < LEAST_SPREAD:
        raise HqmqError(f"the logits spread by {result['spread']:.2g} only, which would hide mistakes")
    if not result[measure] < limit:
        raise HqmqError(f"{measure} from ONNX Runtime is {result[measure]:.2g}, not under {limit:.2g}")
    result["outcome"] = "passes"


def _operators(folder: Path) -> dict[str, int]:
    """Nodes of the main graph by operator."""
    manifest = Manifest.load(folder)
    graph = onnx.load(folder / manifest.model_file, load_external_data=False).graph
    return dict(sorted(Counter(node.op_type for node in graph.node).items()))


def unsupported_nodes(folder: Path) -> list[dict[str, str]]:
    """All nodes of an export that TensorRT's parser objects to (a build stops at the first), with its words."""
    try:
        from hqmq_trt.engine.network import read_graph
        from hqmq_trt.runtime.trt_engine import tensorrt, trt_log

        trt, log = tensorrt(), trt_log()
        graph = read_graph(folder, Manifest.load(folder))
        strongly_typed = getattr(trt.NetworkDefinitionCreationFlag, "STRONGLY_TYPED", None)
        builder = trt.Builder(log)
        network = builder.create_network(0 if strongly_typed is None else 1 << int(strongly_typed))
        parser = trt.OnnxParser(network, log)
        parser.supports_model_v2(graph.content, os.fspath(graph.path.resolve()))
        errors = [parser.get_error(index) for index in range(parser.num_errors)]
        return [
            {"node": e.node_name(), "operator": e.node_operator(), "text": " ".join(e.desc().split())[:500]}
            for e in errors
        ]
    except Exception as error:  # the first error is known already; this one must not hide it
        return [{"node": "", "operator": "", "text": f"no list: {type(error).__name__}: {error}"}]
