"""The tests and sanitizers that benchmarks/gpu_report.py runs: which of them, beside what, and with which limits."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from functools import partial
from threading import Semaphore

from benchmarks.report_commands import Result, Runner, together
from benchmarks.report_readers import read_junit, read_sanitizer

WORKERS = {"engine_build": 4}
"""Processes of pytest-xdist for files that build many engines and measure nothing."""
TESTS = {"trt_session": 400.0, "trt_diff": 400.0, "samples": 300.0, "engine_build": 400.0, "ort_cuda": 200.0}
"""Files tests/gpu/test_*.py of stage ``tests`` with their limits in seconds."""
QUIET = {"trt_session": "thousand_sessions or host_time", "trt_diff": "given_back", "ort_cuda": "memory_back"}
"""Tests of these files that others on the GPU disturb, for pytest -k: they count its free memory, or time the host.
Stage ``quiet``."""
QUIET_LIMIT = 420.0
SIDE_BY_SIDE = 5
SANITIZED = {
    "memcheck": (
        "trt_plugins",
        "(oracle and (decode or prefill or single) and float16 and not bfloat16) or without_a_page or "
        "(of_the_host and float16 and not bfloat16)",
    ),
    "racecheck": (
        "trt_plugins",
        "(oracle and (decode or single) and float16 and not bfloat16) or (of_the_host and float16 and not bfloat16)",
    ),
    "initcheck": (
        "trt_plugins",
        "(oracle and (decode or prefill) and float16 and not bfloat16) or (of_the_host and float16 and not bfloat16)",
    ),
    "memcheck_kernels": ("small_calls", "follows_the_host"),
    "racecheck_kernels": ("small_calls", "follows_the_host"),
    "initcheck_kernels": ("small_calls", "follows_the_host"),
}
"""Tests that each tool sees: a file, and what pytest -k chooses of it. Those of trt_plugins use one fp16 engine of
attention nodes and one of Q/D nodes; those of small_calls have no TensorRT between them and the kernels (and no graph:
without its caching allocator torch cannot capture one)."""
SANITIZER_LIMIT = 240.0
_PYTEST = ["-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider"]


class Checks:
    """Runs tests (`files` of TESTS) and sanitizers with a runner. `env`: also for tests that build programs."""

    def __init__(self, runner: Runner, files: Sequence[str] = (), env: dict[str, str] | None = None) -> None:
        self.runner, self._files, self._env = runner, list(files) or list(TESTS), env
        self._slots = Semaphore(SIDE_BY_SIDE)

    def pytest(self, stage: str, key: str, file: str, seconds: float, *more: str, threads: int = 2) -> None:
        """tests/gpu/test_{file}.py; counts of bytes and errors come from the properties it records."""
        report = self.runner.logs / f"{stage}.{key}.xml"
        if self.runner.kept(stage, key) is None:
            report.unlink(missing_ok=True)
        command = [sys.executable, *_PYTEST, f"tests/gpu/test_{file}.py", f"--junitxml={report}", *more]

        def read(output: str, code: int) -> Result:
            if not report.is_file():  # ended by its limit: pytest writes it last
                return {"ok": False}
            found = read_junit(report)
            problem = None if found["ok"] else f"failed: {', '.join(found['failed']) or 'no test ran'}"
            said = [line.strip(".") for line in output.splitlines() if line.strip(".").startswith(_SAID)]
            return {**found, "ok": code == 0 and found["ok"], "error": problem, "said": said}

        self.runner.command(stage, key, command, seconds, read, self._env, threads=threads)

    def files(self) -> list[str]:
        """Those that this machine can run: it has onnxruntime or onnxruntime-gpu, which are one module."""
        if "ort_cuda" not in self._files:
            return self._files
        import onnxruntime

        if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
            return self._files
        self.runner.keep("tests", "ort_cuda", {"ok": True, "seconds": 0.0, "note": "not run: no onnxruntime-gpu here"})
        return [name for name in self._files if name != "ort_cuda"]

    def beside(self, name: str) -> None:
        """What may run beside others of a file of TESTS."""
        some = ["-k", f"not ({QUIET[name]})"] if name in QUIET else []
        if name in WORKERS:
            some += ["-n", str(WORKERS[name])]
        with self._slots:
            self.pytest("tests", name, name, TESTS[name], *some)

    def alone(self) -> None:
        """The tests in QUIET, one file after the other."""
        for name in [name for name in QUIET if name in self.files()]:
            self.pytest("tests", f"{name}_quiet", name, QUIET_LIMIT, "-s", "-k", QUIET[name])

    def kernels(self, wanted: set[str]) -> None:
        """The plugin tests, then the same engines under compute-sanitizer; beside them the kernels alone."""
        tools = list(SANITIZED) if "sanitizer" in wanted else []
        first = [partial(self.sanitizer, name) for name in tools if SANITIZED[name][0] != "trt_plugins"]
        if "plugins" in wanted:
            first.insert(0, partial(self.pytest, "plugins", "all", "trt_plugins", 400))
        together(first)
        second = [name for name in tools if SANITIZED[name][0] == "trt_plugins"]
        if any((self.runner.work / "plans").glob("*.plan")):
            together([partial(self.sanitizer, name) for name in second])
            return
        for name in second:  # building engines under the sanitizer would take minutes
            self.runner.fail("sanitizer", name, "there are no plans: run stage plugins")

    def sanitizer(self, name: str) -> None:
        """One of SANITIZED, without torch's caching allocator, which would hide errors."""
        file, selection = SANITIZED[name]
        tool = name.partition("_")[0]
        command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--print-limit", "50"]
        command += [sys.executable, *_PYTEST, f"tests/gpu/test_{file}.py", "-k", selection]
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        self.runner.command("sanitizer", name, command, SANITIZER_LIMIT, read_sanitizer, env)


_SAID = ("host time of a decode step", "1000 sessions in", "bytes of device memory gone")
"""Beginnings of lines that quiet tests print with what they measured."""
