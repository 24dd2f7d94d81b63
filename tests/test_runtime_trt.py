"""TrtSession on a simulated GPU (tests/simulated_gpu.py), and what needs no GPU at all."""

from __future__ import annotations

import gc
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hqmq_trt import cli
from hqmq_trt.errors import HqmqError
from hqmq_trt.runtime import OrtSession, TrtSession, cuda_driver, open_session, trt_engine
from tests import simulated_gpu
from tests.simulated_gpu import Gpu
from tests.trt_session_cases import MAX_BATCH, MAX_CONTEXT, PREFILL_CHUNK, TrtSessionCases, text


@pytest.fixture(scope="module")
def export(tiny_export: Callable[..., Path]) -> Path:
    return tiny_export()


@pytest.fixture(scope="module")
def engine(export: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("engine") / "engine"
    return simulated_gpu.make_engine(export, folder, MAX_BATCH, MAX_CONTEXT, PREFILL_CHUNK)


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gpu]:
    yield from simulated_gpu.simulation(monkeypatch)


@pytest.fixture
def tolerance() -> float:
    return 1e-4


@pytest.fixture
def on_device() -> Callable[[NDArray[Any]], Any]:
    class Array:
        def __init__(self, host: NDArray[Any]) -> None:
            self.host, self.shape = np.ascontiguousarray(host), host.shape

        @property
        def __cuda_array_interface__(self) -> dict[str, Any]:
            data = (self.host.ctypes.data, False)
            return {"shape": self.shape, "typestr": self.host.dtype.str, "data": data, "version": 3, "stream": None}

    return Array


class TestSimulated(TrtSessionCases):
    """All of tests/trt_session_cases.py."""


def test_a_decode_step_is_one_graph_launch(engine: Path, gpu: Gpu) -> None:
    with TrtSession(engine, 2) as session:
        session.append([text(20), text(20)])
        session.decode([1, 2])
        runs = gpu.runs
        assert (gpu.graphs, gpu.launches) == (1, 0)
        for step in range(5):
            session.decode([step, None])
        assert (gpu.graphs, gpu.launches, gpu.runs) == (1, 5, runs + 5)
        session.decode_device([1, 1])
        session.decode_device([1, 1])
        session.decode([3])
        assert (gpu.graphs, gpu.launches) == (3, 6)
    with TrtSession(engine, 1, cuda_graph=False) as session:
        session.append([text(3)])
        session.decode([1])
        session.decode([2])
        assert (gpu.graphs, gpu.launches) == (0, 6)


def test_a_refused_capture_is_an_error(engine: Path, gpu: Gpu) -> None:
    with TrtSession(engine, 1) as session:
        session.append([text(3)])
        gpu.refuse_capture = True
        with pytest.raises(HqmqError, match=r"could not capture a graph .* cuda_graph=False .*CAPTURE_INVALIDATED"):
            session.decode([1])
        assert gc.isenabled()
        gpu.refuse_capture = False
        session.decode([1])
        assert session.lengths.tolist() == [4]


def test_out_of_device_memory(engine: Path, gpu: Gpu) -> None:
    gpu.capacity = 100_000
    with pytest.raises(HqmqError, match=r"out of device memory: the cache needs [\d,]+ bytes, 100,000 of 100,000"):
        TrtSession(engine)
    assert not gpu.live
    gpu.capacity = 1 << 30
    with TrtSession(engine, 1) as session:
        gpu.capacity = sum(gpu.live.values())
        ids = np.ones((1, 20), np.int64)
        every = np.arange(20, dtype=np.int64)[None]
        with pytest.raises(HqmqError, match="the logits of many rows needs 21,056 bytes, 0 of"):
            session.step(ids, np.array([20], np.int32), every)
        assert session.append([text(20)]).any()
        gpu.capacity *= 2
        assert session.step(ids, np.array([20], np.int32), every).any()


def test_a_broken_context_says_so(engine: Path, gpu: Gpu) -> None:
    with TrtSession(engine, 1) as session:
        session.append([text(3)])
        gpu.broken = True
        with pytest.raises(HqmqError, match=r"illegal memory access.*CUDA_ERROR_ILLEGAL_ADDRESS.*restart the process"):
            session.decode([1])
        gpu.broken = False


def test_sessions_that_are_forgotten_are_freed(engine: Path, gpu: Gpu) -> None:
    for _ in range(20):
        session = TrtSession(engine, 1)
        session.append([text(3)])
        session.decode([1])
    del session
    gc.collect()
    assert not gpu.live


def test_other_threads_are_refused(engine: Path) -> None:
    from concurrent.futures import ThreadPoolExecutor

    with TrtSession(engine, 1) as session, ThreadPoolExecutor(1) as pool:
        with pytest.raises(HqmqError, match="works in the thread that opened it"):
            pool.submit(session.append, [[1]]).result()
        assert session.append([[1]]).any()


def test_open_session_picks_the_runtime(engine: Path, export: Path, tmp_path: Path) -> None:
    with open_session(engine) as session:
        assert type(session).__name__ == "TrtSession"
        assert (session.max_batch, session.max_context, session.prefill_chunk) == (4, 128, 32)
    with open_session(export, 2, 100) as session:
        assert type(session).__name__ == "OrtSession"
        assert (session.max_batch, session.max_context, session.prefill_chunk) == (2, 112, 512)
    with pytest.raises(HqmqError, match="max_batch must be at least 1"):
        open_session(export, max_batch=0)
    with pytest.raises(HqmqError, match="no such folder"):
        open_session(tmp_path / "none")
    with pytest.raises(HqmqError, match=r"holds no engine\.json"):
        TrtSession(export)


def test_run_on_an_engine(
    engine: Path, export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """`hqmq-trt run` gives the same document for both folders, with more prompts than the engine's batch."""
    documents = []
    for folder in (engine, export):
        prompts = [part for i in range(6) for part in ("-p", f"prompt {i}")]
        monkeypatch.setattr(sys, "argv", ["hqmq-trt", "run", str(folder), *prompts, "-n", "5", "--raw", "--json"])
        capsys.readouterr()
        with suppress(SystemExit):
            cli.main()
        documents.append(json.loads(capsys.readouterr().out))
    trt, ort = documents
    assert trt.keys() == ort.keys()
    assert trt["completions"] == ort["completions"]
    assert len(trt["completions"]) == 6
    assert trt["cache_bytes"] * 6 == ort["cache_bytes"] * MAX_BATCH


def test_memory_of_an_engine(
    engine: Path, export: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def memory(*arguments: str | Path) -> Any:
        monkeypatch.setattr(sys, "argv", ["hqmq-trt", "memory", *map(str, arguments)])
        capsys.readouterr()
        with suppress(SystemExit):
            cli.main()
        return capsys.readouterr()

    document = json.loads(memory(engine, "--json").out)
    with TrtSession(engine) as session:
        assert document["by_kind"] == session.cache_nbytes()
        assert document["cache_bytes"] <= session.device_nbytes()["cache"] <= 1.01 * document["cache_bytes"]
    assert (document["batch"], document["context"]) == (MAX_BATCH, MAX_CONTEXT)
    assert document["working_bytes"] == 4096
    smaller = json.loads(memory(export, "--batch", "2", "--context", "100", "--json").out)
    assert smaller["by_kind"] == OrtSession(export, 2, 100).cache_nbytes()
    assert "working memory" in memory(engine).out
    assert "the engine holds 4 x 128 tokens, not 5 x 128" in memory(engine, "--batch", "5").err
    assert "has its own model and scheme" in memory(engine, "--scheme", "hq3").err


def test_without_pycuda(engine: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(sys.modules["pycuda"], "driver")
    monkeypatch.setitem(sys.modules, "pycuda.driver", None)
    with pytest.raises(HqmqError, match=r"pip install 'hqmq-trt\[pycuda\]'"):
        TrtSession(engine)


def test_pycuda_without_a_driver(engine: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    package = tmp_path / "pycuda"
    package.mkdir()
    (package / "__init__.py").touch()
    message = "libcuda.so.1: cannot open shared object file: No such file or directory"
    (package / "driver.py").write_text(f"raise ImportError({message!r})")
    for name in ("pycuda", "pycuda.driver"):
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(HqmqError, match=r"cannot reach the NVIDIA driver \(libcuda\.so\.1: cannot open"):
        TrtSession(engine)


def test_without_a_driver_or_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    driver = sys.modules["pycuda.driver"]

    def no_driver() -> None:
        raise simulated_gpu.Error("cuInit failed: no CUDA-capable device is detected")

    monkeypatch.setattr(driver, "init", no_driver)
    with pytest.raises(HqmqError, match=r"no usable NVIDIA GPU .*no CUDA-capable device.*nvidia-smi"):
        cuda_driver.Device.get(0)
    monkeypatch.setattr(driver, "init", lambda: None)
    monkeypatch.setattr(driver.Device, "count", staticmethod(lambda: 0))
    with pytest.raises(HqmqError, match="no NVIDIA GPU is visible"):
        cuda_driver.Device.get(0)


def test_without_tensorrt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    with pytest.raises(HqmqError, match=r"pip install 'hqmq-trt\[tensorrt\]'"):
        trt_engine.tensorrt()
