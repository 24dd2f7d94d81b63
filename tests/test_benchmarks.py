"""The parts of the GPU machine's programs that need no GPU: what they read, plan and compare."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import typer

from benchmarks import engine
from benchmarks.decode_cases import Shape, TorchDecoder, plan_points, random_model
from benchmarks.engine import Point, measure
from benchmarks.engine_tables import TORCH, comparison, finish, sequences_that_fit, table, targets
from benchmarks.gpu_report import parse_model
from benchmarks.host_time import HostClock, timed
from benchmarks.report_jobs import compare_logits, follow
from benchmarks.report_readers import last_words, read_junit, read_ncu, read_sanitizer, read_speed
from benchmarks.report_tables import sheets

TINY = Shape(layers=2, vocab=64, hidden=64, heads=4, kv_heads=2, head_dim=16, intermediate=96)


class FakeDecoder:
    """Takes 1 ms a sequence and thousand tokens; at most `fits` tokens in all."""

    def __init__(self, batch: int, context: int, fits: int) -> None:
        if batch * context > fits:
            raise MemoryError
        self.batch, self.context = batch, context

    def measure(self, batch: int, context: int, seconds: float) -> dict[str, Any]:
        assert batch <= self.batch
        assert context <= self.context
        return {"ms": batch * context / 1000, "fill_ms": None, "host_us": 10.0, "repeats": 3}

    def close(self) -> None:
        pass


class Killed(BaseException):
    """What a program cannot handle."""


def test_points_that_do_not_fit_are_measured_with_fewer_sequences_and_none_is_lost() -> None:
    points = [Point(b, b, c) for b, c in plan_points([1024, 32768, 65536, 524288], [1, 8])]
    rows: list[dict[str, Any]] = []
    measure("hq3", lambda b, c: FakeDecoder(b, c, 300_000), points, time.monotonic() + 60, 0.1, rows)
    assert {(row["batch_asked"], row["context"]) for row in rows} == {(p.asked, p.context) for p in points}
    found = {(row["batch_asked"], row["context"]): row for row in rows}
    assert found[8, 32768]["batch"] == 8
    assert found[8, 65536]["batch"] == 4
    assert found[1, 524288]["skipped"] == "out of memory with one sequence"
    finish(rows, layers=8)
    assert found[8, 32768]["ms_32_layers"] == pytest.approx(4 * found[8, 32768]["ms"])
    assert table(rows, "t").row_count == len(rows)


def test_points_after_the_deadline_are_listed_as_skipped() -> None:
    rows: list[dict[str, Any]] = []
    points = [Point(1, 1, 1024)]
    measure("hq3", lambda b, c: FakeDecoder(b, c, 10**9), points, time.monotonic() - 1, 0.1, rows)
    assert rows[0]["skipped"] == "the time was up"


def test_the_focus_is_measured_first_and_targets_follow_from_rows() -> None:
    points = plan_points([1024, 4096, 32768], [1, 8])
    assert points[0] == (8, 32768)
    rows: list[dict[str, Any]] = []
    for case, speed in (("fp16", 2.0), ("hq3", 1.0)):
        for batch, context in points:
            row = {"case": case, "batch_asked": batch, "batch": batch, "context": context, "ms": speed * context}
            rows.append(row | {"host_us": 60.0, "host_least_us": 40.0, "fill_ms": None, "repeats": 3})
    finish(rows, layers=8)
    reached = [target["reached"] for target in targets(rows, sequences_that_fit(["fp16", "hq3"]))]
    assert reached == [True, True, None, None, False, True, True]


def test_points_are_compared_with_the_faster_fp16_and_the_best_comes_first() -> None:
    times = {TORCH: (2.0, 9.0), "hq3": (1.0, 2.0), "fp16": (3.0, 8.0)}
    rows = [
        {"case": case, "batch": 1, "context": context, "ms": ms[i]}
        for case, ms in times.items()
        for i, context in enumerate((1024, 4096))
    ]
    columns, lines = comparison(rows)
    assert columns[-1] == "hq3 over the faster fp16"
    assert [line[1] for line in lines] == ["4,096", "1,024"]
    assert [line[-1] for line in lines] == ["4.00", "2.00"]


class Waiting:
    """A session of which a step waits for a GPU `waits` times, 20 ms each, and works 5 ms before, 2 of them to launch
    a graph, and 3 ms after."""

    class Graph:
        def launch(self) -> None:
            spin(0.002)

    class Executor:
        def __init__(self) -> None:
            self._graphs = {(1, True): Waiting.Graph()}

        def _wait(self) -> None:
            time.sleep(0.02)

    def __init__(self, waits: int = 1) -> None:
        self._gpu, self.waits = self.Executor(), waits

    def decode(self) -> None:
        spin(0.003)
        self._gpu._graphs[1, True].launch()
        for _ in range(self.waits):
            self._gpu._wait()
        spin(0.003)


def spin(seconds: float) -> None:
    start = time.thread_time()
    while time.thread_time() < start + seconds:
        pass


def test_the_hosts_part_of_a_step_leaves_out_its_wait() -> None:
    session = Waiting()
    with HostClock(session) as clock:
        found = timed(lambda: clock.of(session.decode), 0.0, least=5)
    assert found.repeats == len(found.host) == 5
    assert found.seconds > 0.028
    times = found.host_us()
    assert 8e3 < times["host_least_us"] <= times["host_us"] < 12e3
    assert min(host.submit_cpu for host in found.host) == pytest.approx(5e-3, rel=0.2)
    assert times["launch_us"] == pytest.approx(2e3, rel=0.2)
    assert "_wait" not in vars(session._gpu), "the session is as it was"
    assert "launch" not in vars(session._gpu._graphs[1, True])
    with HostClock(Waiting(2)) as clock:
        assert clock.of(Waiting(2).decode) is None
    with HostClock(object()) as clock:
        assert clock.of(lambda: None) is None


def test_the_torch_baseline_is_the_transformers_model() -> None:
    model = random_model(TINY, "cpu", torch.float32)
    decoder = TorchDecoder(model, TINY, batch=2, context=32)
    ids = torch.randint(0, TINY.vocab, (2, 20))
    with torch.no_grad():
        expected = model(ids).logits[:, -1]
        for position in range(20):
            found = decoder.forward(ids[:, position : position + 1], position)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_sanitizer_reports_are_counted_by_whose_kernel_it_was() -> None:
    report = """
========= Invalid __global__ write of size 4 bytes
=========     at void hqmq::cuda::Append<1>(int)+0x70
=========     by thread (0,0,0) in block (0,0,0)
=========     Address 0x7f00 is out of bounds
=========
========= Uninitialized __global__ memory read of size 2 bytes
=========     at void genericReformat::copy(int)+0x10
=========     by thread (1,0,0) in block (0,0,0)
=========
========= Program hit cudaErrorNotReady (error 600) due to "device not ready" on CUDA API call to cudaEventQuery.
3 passed in 4.00s
========= ERROR SUMMARY: 3 errors
"""
    found = read_sanitizer(report, 0)
    assert (found["kernel_reports"], found["other_reports"], found["api_reports"]) == (1, 1, 1)
    assert not found["ok"]
    clean = read_sanitizer("3 passed in 1s\n========= RACECHECK SUMMARY: 0 hazards displayed (0 errors)\n", 0)
    assert clean["ok"]
    assert clean["tests"] == 3
    assert not read_sanitizer("========= ERROR SUMMARY: 0 errors\n", 0)["ok"], "no test ran"
    assert not read_sanitizer("1 failed, 2 passed in 1s\n========= ERROR SUMMARY: 0 errors\n", 0)["ok"]


def test_ncu_bytes_are_summed() -> None:
    line = (
        '"0","1","python","host","graph","1","7","(1)","(1)","0","9.0","Command line","dram__bytes_{}.sum","byte","{}"'
    )
    found = read_ncu("\n".join([line.format("read", "1,024"), line.format("write", "12"), line.format("read", "6")]), 0)
    assert found == {"ok": True, "read": 1030.0, "write": 12.0}
    assert not read_ncu("==ERROR== ERR_NVGPUCTRPERM", 1)["ok"]


def test_junit_properties_are_summed_by_test(tmp_path: Path) -> None:
    cases = "".join(
        f'<testcase name="test_bytes[{i}-torch.float16]"><properties><property name="words" value="{i}"/>'
        f'<property name="relative_error" value="0.{i}"/></properties></testcase>'
        for i in (1, 2)
    )
    suite = f'<testsuite tests="3" failures="1" errors="0" skipped="0">{cases}'
    path = tmp_path / "a.xml"
    path.write_text(f'<testsuites>{suite}<testcase name="test_bad"><failure/></testcase></testsuite></testsuites>')
    found = read_junit(path)
    assert found["measured"] == {"test_bytes float16": {"words": 3.0, "relative_error": 0.2}}
    assert (found["passed"], found["failed"], found["ok"]) == (2, ["test_bad"], False)


def test_logits_are_compared_and_teacher_forcing_feeds_what_was_given() -> None:
    fed: list[list[int]] = []

    def step(tokens: Any) -> Any:
        fed.append(list(tokens))
        return np.eye(5, dtype=np.float32)[(sum(map(len, fed)) * 2) % 5]

    tokens, logits = follow(step, [1, 2, 3], 4, given=[4, 4, 4, 4])
    assert fed == [[1, 2, 3], [4], [4], [4]]
    assert tokens == [1, 3, 0, 2]
    assert compare_logits(logits, logits) == {"max_abs_difference": 0.0, "mean_kl": 0.0, "top1": 1.0}
    other = compare_logits(logits, logits[::-1])
    assert other["top1"] == 0
    assert other["mean_kl"] > 0.1


def test_models_on_the_command_line() -> None:
    assert parse_model("a=/x/y") == ("a", ("/x/y", None))
    assert parse_model("a=/x/y:z.gguf") == ("a", ("/x/y", "z.gguf"))
    with pytest.raises(typer.BadParameter, match="NAME=FOLDER"):
        parse_model("/x/y")


def test_a_speed_table_is_there_after_every_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def opener(self: Any, folder: Path, batch: int, context: int) -> None:
        if folder.name.startswith("fp16"):
            raise Killed
        FakeDecoder.__init__(self, batch, context, 10**9)

    fake = type("Opened", (FakeDecoder,), {"__init__": opener})
    monkeypatch.setattr(engine, "EngineDecoder", fake)
    monkeypatch.setattr(engine, "TorchDecoder", lambda model, shape, batch, context: FakeDecoder(batch, context, 10**9))
    arguments = f"--output {tmp_path} --device cpu --tiny --stages measure --contexts 4096,8192 --schemes hq3,fp16"
    app = typer.Typer()
    app.command()(engine.main)
    with pytest.raises(Killed):
        typer.main.get_command(app).main(arguments.split(), standalone_mode=False)
    document = json.loads((tmp_path / "engine.json").read_text())
    assert {row["case"] for row in document["rows"]} == {engine.TORCH, "hq3"}
    assert "hq3" in (tmp_path / "engine.md").read_text()
    assert (tmp_path / "engine.png").stat().st_size > 1000
    found = read_speed(tmp_path / "engine.json", "", -1)
    assert not found["ok"]
    (sheet,) = [
        s for s in sheets({"speed": {"measure": {**found, "error": "ended", "seconds": 1.0}}}) if "toy model" in s.title
    ]
    assert len(document["rows"]) == 8
    assert [row[:2] for row in sheet.rows] == [["8", "8,192"], ["8", "4,096"], ["1", "8,192"], ["1", "4,096"]]


def test_the_exception_is_the_last_word() -> None:
    text = 'Traceback\n  File "a.py", line 1\n    raise X\n    ^^^^^^^\nhqmq_trt.errors.HqmqError: no GPU\n'
    assert last_words(text).endswith("hqmq_trt.errors.HqmqError: no GPU")
