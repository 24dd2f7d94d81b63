"""Logits as sessions hand them out: float32 of every type of model, checked to be finite, at little cost to the host.

Engines run on a simulated GPU (tests/simulated_gpu.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from hqmq_trt.errors import HqmqError
from hqmq_trt.export import export_model
from hqmq_trt.runtime import OrtSession, TrtSession
from hqmq_trt.runtime.session import Session
from hqmq_trt.runtime.widen import widen
from tests import simulated_gpu
from tests.conftest import tiny_config
from tests.simulated_gpu import Gpu
from tests.trt_session_cases import text

BATCH, CONTEXT, CHUNK = 3, 128, 32
WithHead = Callable[..., tuple[Path, Path]]


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    yield from simulated_gpu.simulation(monkeypatch)


@pytest.fixture
def with_head(tiny_model: Callable[[str], Path], tmp_path: Path) -> WithHead:
    """(edit of the last matrix [V, hidden], dtype) → an export of the tiny model with it, and its engine."""

    def make(edit: Callable[[NDArray[Any]], None], dtype: str = "float32") -> tuple[Path, Path]:
        model = AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=getattr(torch, dtype)).eval()
        with torch.no_grad():
            edit(model.lm_head.weight.numpy())
        export_model(model, tmp_path / "model", "hq4@p16")
        engine = simulated_gpu.make_engine(tmp_path / "model", tmp_path / "engine", BATCH, CONTEXT, CHUNK)
        return tmp_path / "model", engine

    return make


def test_widen_is_exact() -> None:
    bits = np.arange(1 << 16, dtype=np.uint16)
    half = bits.view(np.float16)
    finite = half[np.isfinite(half)]
    wide = finite.astype(np.float32)
    np.testing.assert_array_equal(widen(finite).view(np.uint32), wide.view(np.uint32))
    np.testing.assert_array_equal(widen(half), half.astype(np.float32))
    assert widen(wide) is wide
    np.testing.assert_array_equal(widen(bits).view(np.uint32), bits.astype(np.uint32) << 16)


def test_half_precision_logits_are_float32(with_head: WithHead) -> None:
    export, engine = with_head(lambda head: None, "float16")
    reference = OrtSession(export, 2, CONTEXT)
    assert reference.manifest.logits_dtype == "float16"
    prompts, ids, new = [text(20), text(9, 1)], np.array([text(5)] * 2, np.int64), np.array([5, 4], np.int32)
    every = np.array([[0, 1, 2, 3, 4], [3, 2, 1, 0, 0]], np.int64)
    one, zero = np.ones(2, np.int32), np.zeros((2, 1), np.int64)
    with TrtSession(engine, 2) as session:
        for _ in range(2):  # the second time by graphs
            found = [
                session.append(prompts),
                session.decode([5, 6]).copy(),
                session.step(ids, new, every),
                session.step_device(ids, new, every).to_host(),
                session.decode_device([7, 8]).to_host(),
            ]
            wanted = [
                reference.append(prompts),
                reference.decode([5, 6]),
                reference.step(ids, new, every),
                reference.step(ids, new, every),
                reference.step(np.array([[7], [8]], np.int64), one, zero),
            ]
            for ours, theirs in zip(found, wanted, strict=True):
                assert ours.dtype == np.float32
                np.testing.assert_array_equal(ours, theirs)
        kept = session.step(ids, new, every)
        logits = session.decode_device([1, 2])
        assert logits.__cuda_array_interface__["typestr"] == "<f4"
        assert logits.dtype == np.float32
        assert (kept[0, 0] != kept[0, 1]).any()


@pytest.mark.parametrize(("dtype", "bad"), [("float32", np.nan), ("float16", np.inf), ("float16", -np.inf)])
def test_logits_that_are_not_finite(with_head: WithHead, dtype: str, bad: float) -> None:
    """Both runtimes say the same of the same sequence, whichever way the rows are asked for."""

    def spoil(head: NDArray[Any]) -> None:
        head[-1] = bad

    export, engine = with_head(spoil, dtype)
    one, zero = np.array([0, 1, 1], np.int32), np.zeros((3, 1), np.int64)
    many = (np.ones((3, 2), np.int64), np.array([0, 2, 1], np.int32), np.array([[0, 0], [0, 1], [0, 0]], np.int64))
    calls: list[Callable[[Session], Any]] = [
        lambda session: session.append([[], text(3), text(4)]),
        lambda session: session.decode([None, 1, 2]),
        lambda session: session.decode([None, 1, 2]),  # by the graph
        lambda session: session.step(np.ones((3, 1), np.int64), one, zero),
        lambda session: session.step(*many),
    ]
    with TrtSession(engine) as session:
        for call in calls:
            said = []
            for runtime in (session, OrtSession(export, 3, CONTEXT)):
                with pytest.raises(HqmqError, match="logits of sequence 1 are not finite") as info:
                    call(runtime)
                assert runtime.lengths.tolist() == [0, 0, 0]
                said.append(str(info.value).removeprefix(str(runtime.folder)))
            assert said[0] == said[1]
        assert session.step_device(*many).shape == (3, 2, session.manifest.vocab_size)
        empty = session.step(many[0], many[1], np.zeros((3, 0), np.int64))
        assert empty.shape == (3, 0, session.manifest.vocab_size)


def test_idle_sequences_may_have_any_logits(with_head: WithHead, monkeypatch: pytest.MonkeyPatch) -> None:
    _, engine = with_head(lambda head: None)
    with TrtSession(engine, 2) as session:
        session.append([text(5), text(5)])
        session.decode([1, 1])

        def spoil() -> None:
            session._gpu._outputs.logits[1, 3] = session._gpu._outputs.sums[1] = np.nan  # type: ignore[index]

        monkeypatch.setattr(session._gpu, "_wait", spoil)
        found = session.decode([1, None])
        assert found[0].any()
        assert not found[1].any()
        assert session.lengths.tolist() == [7, 6]
        with pytest.raises(HqmqError, match="logits of sequence 1 are not finite"):
            session.decode([1, 1])
        assert session.lengths.tolist() == [7, 6]


def test_finite_logits_whose_sum_is_not(with_head: WithHead) -> None:
    """Then the logits themselves are looked at."""

    def enlarge(head: NDArray[Any]) -> None:
        head[:] = head[0] * np.float32(1e37)

    export, engine = with_head(enlarge)
    with TrtSession(engine) as session:
        found, wanted = session.append([text(20)]), OrtSession(export, 1, CONTEXT).append([text(20)])
        np.testing.assert_allclose(found, wanted, rtol=1e-3)
        assert not np.isfinite(session._gpu.sums).any()
        assert np.isfinite(session.decode([1])).all()
        assert session.lengths[0] == 21


@pytest.mark.slow
def test_host_time_does_not_grow_with_the_vocabulary(with_head: WithHead, gpu: Gpu, tmp_path: Path) -> None:
    """Launches that do nothing leave the host's own work of a step; looking at every logit would take milliseconds."""
    _, small = with_head(lambda head: None)
    config = tiny_config("llama")
    config.vocab_size = 150_000
    model = AutoModelForCausalLM.from_config(config).half().eval()
    export_model(model, tmp_path / "large", "hq4@p16")
    large = simulated_gpu.make_engine(tmp_path / "large", tmp_path / "large engine", BATCH, CONTEXT, CHUNK)
    microseconds = []
    for folder in (small, large):
        with TrtSession(folder) as session:
            session.append([text(3)] * BATCH)
            session.decode([1] * BATCH)
            for operations in gpu.executables.values():
                operations.clear()
            times = []
            for _ in range(20):
                session.reset_host_time()
                for token in range(2):
                    session.decode([token] * BATCH)
                times.append(1e6 * session.host_seconds / session.host_steps)
            microseconds.append(min(times))
    assert microseconds[1] < 2 * microseconds[0] + 20, microseconds
