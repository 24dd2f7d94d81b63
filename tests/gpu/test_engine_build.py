"""Engines built by TensorRT on a GPU: modes and schemes, stripped and version-compatible plans, timing caches."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest, record_file
from tests.gpu.requirements import QUICK, missing

PROMPT, STEPS = 40, 6
CONTEXT = 96


_MISSING = missing("tensorrt", "pycuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_MISSING), reason=_MISSING)]
Build = Callable[..., Path]


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One timing cache for all builds of this file."""
    return tmp_path_factory.mktemp("timing") / "timing.cache"


@pytest.fixture
def build(tmp_path: Path, cache: Path) -> Build:
    """(exported folder, options) → engine folder."""
    from hqmq_trt.engine import build_engine

    def made(model: Path, name: str = "engine", **options: Any) -> Path:
        limits = {"max_batch": 2, "max_context": CONTEXT, "prefill_chunk": 32, "timing_cache": cache}
        build_engine(model, tmp_path / name, **{**limits, "optimization_level": QUICK, **options})
        return tmp_path / name

    return made


def logits(session: Any) -> NDArray[np.float32]:
    """Logits [STEPS + 1, 2, V] of two sequences of different lengths: after the prompt, then token by token."""
    tokens = np.random.default_rng(3).integers(3, 250, (2, PROMPT + STEPS))
    counts = (PROMPT, PROMPT - 9)
    with session:
        rows = [session.append([tokens[b, : counts[b]].tolist() for b in range(2)])]
        rows += [session.decode([int(tokens[b, counts[b] + step]) for b in range(2)]) for step in range(STEPS)]
    return np.stack(rows)


def reference(model: Path) -> NDArray[np.float32]:
    from hqmq_trt.runtime import OrtSession

    return logits(OrtSession(model, 2, CONTEXT, prefill_chunk=32))


def run(engine: Path) -> NDArray[np.float32]:
    from hqmq_trt.runtime.trt_session import TrtSession

    return logits(TrtSession(engine))


def divergence(p: NDArray[np.float32], q: NDArray[np.float32]) -> float:
    """Mean KL(p || q) in nats."""
    a, b = (torch.from_numpy(x).double().log_softmax(-1) for x in (p, q))
    return float((a.exp() * (a - b)).sum(-1).mean())


@pytest.mark.parametrize("mode", ["fused", "qdq"])
@pytest.mark.parametrize("scheme", ["hq4@p16", "hq3@p16", "fp16@p16", "paper:s96_r4+med3@p16"])
def test_engine_is_onnx_runtime(tiny_export: Callable[..., Path], build: Build, scheme: str, mode: str) -> None:
    model = tiny_export(scheme, mode)
    assert divergence(reference(model), run(build(model))) < 1e-4


@pytest.mark.parametrize("mode", ["fused", "qdq"])
def test_qwen2(tiny_export: Callable[..., Path], build: Build, mode: str) -> None:
    model = tiny_export("hq4@p16", mode, "qwen2")
    assert divergence(reference(model), run(build(model))) < 1e-4


@pytest.mark.parametrize("options", [{"strip_weights": True}, {"version_compatible": True}], ids=str)
def test_kinds_of_plans(tiny_export: Callable[..., Path], build: Build, options: dict[str, bool]) -> None:
    """A stripped plan is smaller and takes its weights from the ONNX file; both give the plain engine's logits."""
    model = tiny_export("hq4@p16", "fused")
    plain, other = build(model), build(model, "other", **options)
    assert divergence(run(plain), run(other)) < 1e-6
    if "strip_weights" in options:
        assert (other / "engine.plan").stat().st_size < (plain / "engine.plan").stat().st_size


def test_timing_cache_is_used_and_a_damaged_one_replaced(
    tiny_export: Callable[..., Path], build: Build, tmp_path: Path
) -> None:
    model, path = tiny_export("hq4@p16", "fused"), tmp_path / "timing.cache"
    notes: list[str] = []
    build(model, "first", timing_cache=path, note=notes.append)
    content = path.read_bytes()
    build(model, "second", timing_cache=path, note=notes.append)
    assert notes == []
    for damaged in (content[: len(content) // 2], b"no timing cache", content[:64][::-1] + content[64:]):
        path.write_bytes(damaged)
        build(model, "third", timing_cache=path, note=notes.append, overwrite=True)
        assert path.read_bytes() not in (b"", damaged)
    assert notes
    assert all("replacing it" in note for note in notes)
    build(model, "fourth", timing_cache=path, note=notes.append)


def test_phases_are_told(tiny_export: Callable[..., Path], build: Build) -> None:
    """Every phase that starts ends, and inner phases name the outer one."""
    open_phases: list[str] = []
    parents: list[str | None] = []

    class Watch:
        def start(self, phase: str, parent: str | None, steps: int) -> None:
            assert steps > 0
            assert parent is None or parent in open_phases
            open_phases.append(phase)
            parents.append(parent)

        def step(self, phase: str, step: int) -> None:
            assert step >= 0

        def finish(self, phase: str) -> None:
            open_phases.remove(phase)

    build(tiny_export("hq4@p16", "fused"), progress=Watch())
    assert parents
    assert open_phases == []


def test_parser_errors_name_the_node(tiny_export: Callable[..., Path], build: Build, tmp_path: Path) -> None:
    model = Path(shutil.copytree(tiny_export("hq4@p16", "fused"), tmp_path / "model"))
    proto = onnx.load(model / "model.onnx")
    node = next(node for node in proto.graph.node if node.op_type == "HqmqAttention")
    next(a for a in node.attribute if a.name == "plugin_version").s = b"77"
    onnx.save(proto, model / "model.onnx")
    old = Manifest.model_validate_json((model / "manifest.json").read_text())
    files = [record_file(model, file.name, file.purpose) for file in old.files]
    Manifest.model_validate({**dict(old), "files": files}).save(model)
    with pytest.raises(HqmqError, match=r"cannot parse it: node 'layers\.0\.attention'"):
        build(model)
    assert not (tmp_path / "engine").exists()
