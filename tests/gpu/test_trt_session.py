"""TrtSession on a GPU: tests/trt_session_cases.py on engines of tiny models, and what only a GPU can show."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError
from hqmq_trt.runtime import OrtSession, TrtSession
from tests.conftest import VOCABULARY, tiny_config
from tests.gpu.device_memory import lost_each_round
from tests.gpu.requirements import QUICK, missing
from tests.trt_session_cases import (
    MAX_BATCH,
    MAX_CONTEXT,
    PREFILL_CHUNK,
    TrtNumericCases,
    TrtSessionCases,
    text,
)

SESSIONS, ROUNDS = 1000, 10


_MISSING = missing("tensorrt", "pycuda")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_MISSING), reason=_MISSING)]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[Path], Path]:
    """Exported folder → engine folder, built once a session of pytest."""
    made: dict[Path, Path] = {}

    def engine_of(export: Path) -> Path:
        from hqmq_trt.engine.builder import build_engine

        if export not in made:
            folder = tmp_path_factory.mktemp("engine") / "engine"
            limits: dict[str, Any] = {
                "max_batch": MAX_BATCH,
                "max_context": MAX_CONTEXT,
                "prefill_chunk": PREFILL_CHUNK,
            }
            build_engine(export, folder, **limits, optimization_level=QUICK)
            made[export] = folder
        return made[export]

    return engine_of


@pytest.fixture(scope="module")
def packed_export(tiny_export: Callable[..., Path]) -> Path:
    return tiny_export()


@pytest.fixture(scope="module")
def packed_engine(build: Callable[[Path], Path], packed_export: Path) -> Path:
    return build(packed_export)


@pytest.fixture(params=["pycuda", "torch"])
def on_device(request: pytest.FixtureRequest) -> Callable[[NDArray[Any]], Any]:
    if request.param == "torch":
        return lambda host: torch.from_numpy(np.ascontiguousarray(host)).cuda()

    from pycuda import gpuarray

    from hqmq_trt.runtime.cuda_driver import Device

    def put(host: NDArray[Any]) -> Any:
        with Device.get(0):
            return gpuarray.to_gpu(np.ascontiguousarray(host))

    return put


class TestPacked(TrtSessionCases):
    """hq4. Logits are float32, but K and V that round another way recode a chunk here and there: 2 % of the chunks
    with another code move the logits of this model by 0.13, another token moves them by 1."""

    @pytest.fixture
    def export(self, packed_export: Path) -> Path:
        return packed_export

    @pytest.fixture
    def engine(self, packed_engine: Path) -> Path:
        return packed_engine

    @pytest.fixture
    def tolerance(self) -> float:
        return 0.3


class TestUncompressed(TrtNumericCases):
    """Scheme fp16, where rounding differences stay as small as they are: the plumbing, with a tight tolerance."""

    @pytest.fixture(scope="class")
    def export(self, tiny_export: Callable[..., Path]) -> Path:
        return tiny_export("fp16@p16")

    @pytest.fixture(scope="class")
    def engine(self, build: Callable[[Path], Path], export: Path) -> Path:
        return build(export)

    @pytest.fixture
    def tolerance(self) -> float:
        return 1e-2


def test_half_precision_logits(
    build: Callable[[Path], Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    from hqmq_trt.export import export_model

    export = tmp_path / "half"
    export_model(str(tiny_model("llama")), export, "hq4@p16", dtype="float16")
    with TrtSession(build(export)) as session:
        reference = OrtSession(export, 2, MAX_CONTEXT)
        prompts = [text(20), text(31, 1)]
        found, wanted = session.append(prompts), reference.append(prompts)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, wanted, rtol=0, atol=0.3)
        np.testing.assert_allclose(session.decode([1, 2]), reference.decode([1, 2]), rtol=0, atol=0.3)
        assert np.abs(wanted[0] - wanted[1]).max() > 0.6


def test_logits_that_are_not_finite(
    build: Callable[[Path], Path], tiny_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """One NaN among the logits makes TensorRT's sum of them one."""
    from transformers import AutoModelForCausalLM

    from hqmq_trt.export import export_model

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float16).eval()
    with torch.no_grad():
        model.lm_head.weight[-1] = float("nan")
    export_model(model, tmp_path / "model", "hq4@p16")
    with TrtSession(build(tmp_path / "model")) as session:
        for run in (
            lambda: session.append([[], text(20)]),
            lambda: session.decode([None, 1]),
            lambda: session.decode([None, 1]),  # by the graph
            lambda: session.step(np.ones((1, 3), np.int64), np.array([3], np.int32), np.array([[0, 2]], np.int64)),
        ):
            with pytest.raises(HqmqError, match=r"logits of sequence [01] are not finite"):
                run()
            assert not session.lengths.any()


def test_torch_reads_logits_without_a_copy(packed_engine: Path) -> None:
    before = torch.arange(1000, device="cuda").sum()
    with TrtSession(packed_engine, 2) as session, TrtSession(packed_engine, 2) as plain:
        for one in (session, plain):
            one.append([text(20), text(9, 1)])
        logits = session.decode_device([5, 6])
        seen = torch.as_tensor(logits, device="cuda")
        assert seen.data_ptr() == logits.address
        assert seen.dtype == torch.float32
        np.testing.assert_array_equal(seen[:, 0].cpu().numpy(), plain.decode([5, 6]))
        following = seen[:, 0].argmax(-1, keepdim=True)
        again = session.step(following, np.ones(2, np.int32), np.zeros((2, 1), np.int64))
        np.testing.assert_array_equal(again[:, 0], plain.decode(following[:, 0].tolist()))
    assert int(before) == int(torch.arange(1000, device="cuda").sum()) == 499500


def test_out_of_device_memory_is_not_sticky(packed_engine: Path) -> None:
    from hqmq_trt.runtime.cuda_driver import Device

    with TrtSession(packed_engine, 1) as session:
        first = session.append([text(20)])
        with pytest.raises(HqmqError, match=r"out of device memory: a test needs 10,000,000,000,000 bytes, [\d,]+ of"):
            Device.get(0).allocate(10**13, "a test")
        session.reset()
        np.testing.assert_array_equal(session.append([text(20)]), first)
        session.decode([1])
        session.decode([2])


@pytest.mark.parametrize("vocabulary", [260, 151_936])
def test_a_decode_step_takes_little_host_time(
    packed_engine: Path, build: Callable[[Path], Path], tmp_path: Path, vocabulary: int
) -> None:
    """Of several rounds the quickest: what else the machine does is not the session's."""
    engine = packed_engine
    if vocabulary != VOCABULARY:
        from transformers import AutoModelForCausalLM

        from hqmq_trt.export import export_model

        config = tiny_config("llama")
        config.vocab_size = vocabulary
        export_model(AutoModelForCausalLM.from_config(config).half().eval(), tmp_path / "model", "hq4@p16")
        engine = build(tmp_path / "model")
    with TrtSession(engine) as session:
        session.append([text(10)] * MAX_BATCH)
        for token in range(3):
            session.decode([token] * MAX_BATCH)
        rounds = []
        for _ in range(10):
            session.reset_host_time()
            for token in range(10):
                session.decode([token] * MAX_BATCH)
            rounds.append(1e6 * session.host_seconds / session.host_steps)
    print(f"host time of a decode step: {min(rounds):.1f} to {max(rounds):.1f} us")
    assert min(rounds) < 50


def test_a_thousand_sessions_leak_nothing(packed_engine: Path) -> None:
    from hqmq_trt.runtime.cuda_driver import Device

    def use(count: int = SESSIONS // ROUNDS) -> None:
        for number in range(count):
            with TrtSession(packed_engine, verify=False) as session:
                session.append([text(3)])
                if number % 20 == 0:  # captures a graph
                    session.decode([1])
                    session.decode([1])

    use(20)
    start = time.perf_counter()
    lost = lost_each_round(lambda: Device.get(0).memory()[0], use, ROUNDS)
    print(f"{SESSIONS} sessions in {time.perf_counter() - start:.1f} s")
    assert abs(lost) < 1 << 22  # leaking the caches of a round alone would take 13 MB
