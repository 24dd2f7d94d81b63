"""Engines of tiny models against PyTorch and ONNX Runtime, and in Polygraphy's own TrtRunner."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from hqmq_trt import cuda
from hqmq_trt.diff import DiffResult, compare, greedy
from hqmq_trt.runtime import TrtSession
from hqmq_trt.scheme import ROLES
from tests.gpu.device_memory import lost_each_round
from tests.gpu.requirements import QUICK, missing
from tests.trt_session_cases import text

CONTEXT, CHUNK, TOKENS, STEPS = 512, 64, 150, 64
CASES = [
    ("hq4@p16", "fused", "float32"),
    ("hq4@p16", "qdq", "float32"),
    ("hq3", "fused", "float16"),
    ("paper:s96_r4+med3", "fused", "float16"),
    ("fp16", "fused", "float16"),
]
Models = Callable[[str], Path]


_MISSING = missing("tensorrt", "pycuda") or ("" if cuda.available() else "libhqmq_cuda.so is not built")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_MISSING), reason=_MISSING)]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(
    request: pytest.FixtureRequest, tiny_model: Models, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Any, Path, Path]:
    """(dtype, model on the GPU, export, engine)."""
    from transformers import AutoModelForCausalLM

    from hqmq_trt.engine.builder import build_engine
    from hqmq_trt.export import export_model

    scheme, mode, dtype = request.param
    folder = tmp_path_factory.mktemp("diff")
    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=getattr(torch, dtype)).eval()
    export_model(model, folder / "model", scheme, mode=mode)
    limits: dict[str, Any] = {"max_batch": 2, "max_context": CONTEXT, "prefill_chunk": CHUNK}
    build_engine(folder / "model", folder / "engine", **limits, optimization_level=QUICK)
    return dtype, model.cuda(), folder / "model", folder / "engine"


@pytest.fixture(scope="module")
def result(case: tuple[str, Any, Path, Path]) -> DiffResult:
    _, model, folder, engine = case
    return compare(folder, model, text(TOKENS + STEPS), decode_steps=STEPS, engine=engine)


def test_logits(case: tuple[str, Any, Path, Path], result: DiffResult) -> None:
    found = result.runtimes["tensorrt"].logits
    assert result.decode_steps == STEPS
    assert len(found["pinned"].kl) == TOKENS + STEPS
    # From the same bytes only rounding is left: of float32 sums, or of fp16 activations. In qdq mode the page that a
    # step fills is read back from its codes at once, and a sum that rounds otherwise may have changed one of them.
    exact = case[0] == "float32" and result.manifest.mode == "fused"
    assert found["pinned"].mean_kl < (1e-6 if exact else 1e-5)
    assert found["pinned"].top1 > 0.98
    assert result.direct is not None
    assert result.direct.logits.mean_kl < max(10 * found["same"].mean_kl, 1e-5)


def test_keys_and_values(case: tuple[str, Any, Path, Path], result: DiffResult) -> None:
    limit = 0.05 if result.manifest.parsed_scheme.key.packed else 1e-3
    for runtime in result.runtimes.values():
        assert len(runtime.layers) == 2 * len(ROLES)
        # hq3 codes a Gaussian chunk with a relative MSE of 0.029.
        assert max(error.in_run for error in runtime.layers) < 2 * limit
    first = [error for error in result.runtimes["tensorrt"].layers if error.layer == 0]
    for error in first:
        assert error.codec is not None
        assert error.in_run == pytest.approx(error.codec, rel=0.05, abs=1e-5), "layer 0 sees no earlier error"


def test_bytes(case: tuple[str, Any, Path, Path], result: DiffResult) -> None:
    limit = 0.02 if case[0] == "float32" else 0.05  # K and V that fp16 sums round otherwise
    packed = [role for role in ROLES if result.manifest.parsed_scheme.role(role).packed]
    assert all(result.runtimes["tensorrt"].changed[role] < limit for role in packed)
    check = result.stateless
    assert check is not None
    assert check.tokens == CHUNK
    assert all(check.chunks[role] > 0 for role in ROLES)
    assert all(check.changed[role] < limit * check.chunks[role] for role in packed)
    assert check.logits.mean_kl < 1e-4


def test_greedy(case: tuple[str, Any, Path, Path]) -> None:
    _, model, _, engine = case
    with TrtSession(engine) as session:
        check = greedy(model, session, text(100), 128)
    assert check.passed, str(check)


def test_gpu_memory_is_given_back(case: tuple[str, Any, Path, Path]) -> None:
    _, model, folder, engine = case

    def once() -> None:
        compare(folder, model, text(40), ["same"], 8, engine=engine)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()

    once()
    once()
    assert abs(lost_each_round(lambda: int(torch.cuda.mem_get_info()[0]), once, 4)) < 4 << 20
