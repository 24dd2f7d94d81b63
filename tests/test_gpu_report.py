"""benchmarks/gpu_report.py without a GPU: what runs when, what is kept of it, and real exports."""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import report_commands
from benchmarks.report_commands import Runner
from benchmarks.report_readers import read_document
from benchmarks.report_stages import STAGES, Combo, Options, Stages
from benchmarks.report_tables import print_report, sheets, write_report
from hqmq_trt.manifest import Manifest


def options(folder: Path | str, schemes: str = "hq4") -> Options:
    """For one model ``m``."""
    models: dict[str, tuple[str, str | None]] = {"m": (str(folder), None)}
    modes, limits = ["fused", "qdq"], (1, 64, 16, 4)
    return Options(models, modes, schemes.split(","), False, [], *limits, "x", 60.0, [], False, [])


def test_the_exports_of_a_model_fork_from_one_process(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    written: list[int] = []
    runner = Runner(tmp_path, False, time.monotonic() + 300, lambda: written.append(len(runner.collect())))
    stages = Stages(runner, options(tiny_model("llama"), "hq4,paper:s0_r1"))
    stages.run({"export"})
    results = runner.collect()
    assert results["convert"]["m"]["ok"]
    assert {key: found["ok"] for key, found in results["export"].items()} == {
        "m.fused.hq4": True, "m.qdq.hq4": True, "m.fused.paper_s0_r1": False, "m.qdq.paper_s0_r1": False,
    }  # fmt: skip
    assert results["export"]["m.fused.paper_s0_r1"]["error"].startswith("HqmqError: ")
    for combo in (Combo("m", "fused", "hq4"), Combo("m", "qdq", "hq4")):
        manifest = Manifest.load(stages.onnx(combo))
        assert (manifest.mode, manifest.source, manifest.dtype) == (combo.mode, "m", "float16")
        assert manifest.tokenizer_files
    assert len(written) == 5, "the report is written anew after every result"


def test_tests_of_samples_get_the_headers_of_the_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    given = replace(options(""), cmake=["-DTensorRT_ROOT=/opt/a=b", "-DCMAKE_CUDA_ARCHITECTURES=90a-real"])
    seen: dict[str, tuple[list[str], dict[str, str]]] = {}

    def command(_: str, key: str, line: list[str], __: float, ___: object, env: dict[str, str], **____: int) -> None:
        seen[key] = line, env

    runner = Runner(tmp_path, False, time.monotonic() + 100)
    monkeypatch.setattr(runner, "command", command)
    checks = Stages(runner, given).checks
    checks.beside("samples")
    checks.beside("engine_build")
    assert seen["samples"][1] == {"TensorRT_ROOT": "/opt/a=b"}
    assert seen["engine_build"][0][-2:] == ["-n", "4"]
    assert "-n" not in seen["samples"][0]


def test_a_batch_that_is_ended_keeps_the_cases_that_were_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text(
        f"#!{sys.executable}\nimport json, pathlib, sys, time\n"
        "cases = json.load(open(sys.argv[4]))['cases']\n"
        "pathlib.Path(cases[0]['result']).write_text(json.dumps({'ok': True, 'seconds': 1.0, 'n': 7}))\n"
        "print('second case', flush=True)\ntime.sleep(60)\n"
    )
    program.chmod(0o755)
    monkeypatch.setattr(report_commands.sys, "executable", str(program))
    runner = Runner(tmp_path, False, time.monotonic() + 100)
    seen: list[tuple[str, bool]] = []
    runner.batch("text", "m", {}, {"a": {}, "b": {}}, 2, lambda key, found: seen.append((key, found["ok"])))
    assert seen == [("a", True), ("b", False)]
    results = runner.collect()["text"]
    assert results["a"]["n"] == 7
    assert results["b"]["error"] == "not done after 2 s: second case"
    runner.batch("text", "m", {}, {"a": {}}, 2, lambda key, found: seen.append((key, found["ok"])))
    assert seen[-1] == ("a", True), "what succeeded is not run again"


FAKE = """
import json, pathlib, sys, time
words = sys.argv[1:]
folder = pathlib.Path(__file__).parent
def note(name, begin): (folder / "ran.txt").open("a").write(json.dumps([name, begin, time.time(), words]) + "\\n")
def work(name):
    begin = time.time()
    time.sleep(0.2)
    note(name, begin)
if "benchmarks.report_jobs" in words:
    job, given, result = words[-3:]
    arguments = json.load(open(given))
    for case in arguments.get("cases", []):
        work(job + " " + pathlib.Path(case.get("output") or case["engine"]).name)
        pathlib.Path(case.get("output", folder)).mkdir(parents=True, exist_ok=True)
        pathlib.Path(case["result"]).write_text(json.dumps({"ok": True, "seconds": 0.2}))
    if job == "engine":
        work("engine " + pathlib.Path(arguments["output"]).name)
        pathlib.Path(arguments["output"]).mkdir()
        pathlib.Path(arguments["timing_cache"]).touch()
    elif "cases" not in arguments:
        work(job)
    parameters = 10**9 if arguments.get("model") == "big" else 10**8
    pathlib.Path(result).write_text(json.dumps({"seconds": 0.2, "parameters": parameters}))
elif "pytest" in words:
    chosen = " ".join(words[words.index("-k"):][:2]) if "-k" in words else ""
    work("pytest " + next(word for word in words if word.startswith("tests/")) + " " + chosen)
    (folder / "work" / "plans" / "a.plan").touch()
    suite = '<testsuite tests="1"><testcase name="a"/></testsuite>'
    for word in words:
        if word.startswith("--junitxml="):
            pathlib.Path(word.removeprefix("--junitxml=")).write_text(suite)
    print("1 passed in 1s\\n========= ERROR SUMMARY: 0 errors")
elif "benchmarks.engine" in words:
    stage = words[words.index("--stages") + 1]
    work("speed " + stage)
    if stage == "measure":
        (folder / "work" / "speed" / "engine.json").write_text(json.dumps({"rows": [], "targets": [], "title": "t"}))
else:
    work("diff " + pathlib.Path(words[words.index("diff") + 1]).name if "diff" in words else " ".join(words[:3]))
    print("{}")
"""


def test_stages_wait_for_what_they_need_and_timings_for_a_quiet_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!{sys.executable} -SE\n{FAKE}")
    for name in ("ncu", "compute-sanitizer"):
        (tmp_path / name).write_text('#!/bin/sh\nwhile [ "$1" != "$PROGRAM" ]; do shift; done\nexec "$@"\n')
    for name in ("python", "ncu", "compute-sanitizer"):
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("PROGRAM", str(program))
    monkeypatch.setattr(report_commands.sys, "executable", str(program))
    models: dict[str, tuple[str, str | None]] = {"s": ("small", None), "b": ("big", None)}
    modes, schemes, limits = ["fused", "qdq"], ["hq3", "hq4"], (1, 64, 16, 4)
    runner = Runner(tmp_path / "work", False, time.monotonic() + 400)
    stages = Stages(runner, Options(models, modes, schemes, True, [], *limits, "x", 60.0, [], False, []))
    stages.run(set(STAGES) - {"build"})
    results = runner.collect()
    assert not [
        (stage, key, r) for stage, keys in results.items() for key, r in keys.items() if not r["ok"] and stage != "ncu"
    ]
    lines = [json.loads(line) for line in (tmp_path / "ran.txt").read_text().splitlines()]
    ran = {name: (begin, end) for name, begin, end, _ in lines}
    for model in models:
        engines = sorted(span for name, span in ran.items() if name.startswith(f"engine {model}."))
        assert len(engines) == 5
        assert all(begin >= engines[0][1] for begin, _ in engines[1:]), "the first fills the timing cache"
    for combo in stages.options.combos():
        engine_begin, engine_end = ran[f"engine {combo.key}"]
        assert ran[f"export {combo.key}"][1] <= engine_begin
        assert ran[f"text {combo.key}"][0] >= engine_end
    assert {key: "--no-ort" in words for key, _, _, words in lines if key.startswith("diff ")} == {
        "diff s.fused.hq4": False, "diff s.qdq.hq4": False, "diff b.fused.hq4": True, "diff b.qdq.hq4": True,
    }  # fmt: skip
    assert ran["speed export,build"][0] >= max(end for name, (_, end) in ran.items() if name.startswith("engine "))
    quiet = [
        n
        for n in ran
        if n in ("memory", "addresses", "speed measure", "speed kernels")
        or n.endswith("-k thousand_sessions or host_time")
    ]
    assert len(quiet) == 5
    for one in quiet:
        begin, end = ran[one]
        assert all(name == one or b >= end or e <= begin for name, (b, e) in ran.items()), f"{one} was not alone"
    stages.run(set(STAGES) - {"build"})
    again = (tmp_path / "ran.txt").read_text().splitlines()[len(lines) :]
    assert [json.loads(line)[0] for line in again if "report_traffic" not in line] == [], "nothing is run again"


def test_after_an_end_nothing_runs_and_nothing_begins(tmp_path: Path) -> None:
    runner = Runner(tmp_path, False, time.monotonic() + 100)
    threading.Timer(0.5, runner.end_all).start()
    started = time.monotonic()
    assert not runner.command("build", "slow", ["sh", "-c", "sleep 50; true"], 60)["ok"]
    assert runner.command("build", "next", ["true"], 60)["error"].startswith("the time was up")
    assert time.monotonic() - started < 20


def test_a_test_file_of_the_gpu_is_run_with_its_limit_and_what_failed_is_named(tmp_path: Path) -> None:
    runner = Runner(tmp_path, False, time.monotonic() + 100)
    stages = Stages(runner, options("nowhere"))
    stages.checks.pytest("tests", "none", "no_such_file", 60)
    assert not runner.collect()["tests"]["none"]["ok"]
    report = runner.logs / "tests.ended.xml"
    stages.checks.pytest("tests", "ended", "trt_session", 0.1)
    assert not report.exists()
    assert runner.collect()["tests"]["ended"]["error"].startswith("not done after 0 s")


def test_a_failing_job_is_recorded_and_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stages = Runner(tmp_path / "work", False, time.monotonic() + 100)
    assert options("nowhere").combos() == [Combo("m", "fused", "hq4"), Combo("m", "qdq", "hq4")]
    assert Combo("m", "qdq", "paper:s96_r4+med3").key == "m.qdq.paper_s96_r4_med3"
    failed = stages.command("build", "configure", ["sh", "-c", "echo no [compiler] here; exit 3"], 10)
    assert failed["error"] == "exit code 3: no [compiler] here"
    assert stages.command("build", "slow", ["sleep", "30"], 1)["error"].startswith("not done after 1 s")
    assert stages.command("diff", "e", ["sh", "-c", 'echo note; echo "{\\"a\\": 1}"'], 10, read_document)["ok"]
    again = stages.command("diff", "e", ["false"], 10)
    assert again["document"] == {"a": 1}, "what succeeded is not run again"
    results = stages.collect()
    where = dict.fromkeys(("date", "card", "driver", "commit", "tensorrt", "torch", "onnxruntime", "transformers"), "?")
    write_report(results, where, tmp_path)
    print_report(results, where)
    assert "no [compiler] here" in capsys.readouterr().out
    assert "| build configure | exit code 3: no [compiler] here |" in (tmp_path / "report.md").read_text()
    assert json.loads((tmp_path / "report.json").read_text())["results"]["diff"]["e"]["ok"]
    assert sheets({}) == []
