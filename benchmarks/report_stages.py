"""The stages of benchmarks/gpu_report.py: what runs, in which process, and what is kept of it.

Every job writes RESULTS/{job}.{key}.json in the work folder, whether it succeeds or not, so that stages can run in
several calls and a failure does not stop the others. A job that succeeded is not run again unless asked for.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Semaphore
from typing import Any

from benchmarks.machine import log
from benchmarks.report_readers import (
    last_words,
    read_document,
    read_junit,
    read_last_json,
    read_ncu,
    read_sanitizer,
    read_words,
)

ROOT = Path(__file__).resolve().parent.parent
STAGES = (
    *("build", "plugins", "sanitizer", "export", "engines", "text"),
    *("memory", "inplace", "diff", "samples", "tables"),
)
Result = dict[str, Any]

SANITIZED = {
    "memcheck": "(oracle and (decode or prefill or single) and float16 and not bfloat16) or without_a_page or "
    "(of_the_host and float16 and not bfloat16)",
    "racecheck": "(oracle and (decode or single) and float16 and not bfloat16) or "
    "(of_the_host and float16 and not bfloat16)",
    "initcheck": "(oracle and (decode or prefill) and float16 and not bfloat16) or "
    "(of_the_host and float16 and not bfloat16)",
}
"""Tests that each tool sees, for pytest -k. They use one fp16 engine of attention nodes and one of Q/D nodes."""


@dataclass(frozen=True)
class Combo:
    """One engine: a model with a mode and a scheme."""

    model: str
    mode: str
    scheme: str

    @property
    def key(self) -> str:
        """Name of its folders and results."""
        return f"{self.model}.{self.mode}.{re.sub(r'[^A-Za-z0-9.]+', '_', self.scheme)}"


@dataclass(frozen=True)
class Options:
    """What main() was asked for; see there."""

    models: dict[str, tuple[str, str | None]]
    modes: list[str]
    schemes: list[str]
    fp16: bool
    diffs: list[str]
    max_batch: int
    max_context: int
    prefill_chunk: int
    tokens: int
    prompt: str
    jobs: int
    limit: float
    again: bool
    cmake: list[str]
    keep_exports: bool
    deadline: float

    def combos(self) -> list[Combo]:
        """All engines, the models in turn so that small and large ones run side by side."""
        pairs = [(mode, scheme) for scheme in self.schemes for mode in self.modes]
        if self.fp16 and "fused" in self.modes:
            pairs.append(("fused", "fp16"))
        return [Combo(model, *pair) for pair in pairs for model in self.models]

    def diff_combos(self) -> list[Combo]:
        """Engines that `hqmq-trt diff` compares: those named, or hq3 and hq4 of the first model."""
        combos = self.combos()
        if self.diffs:
            return [combo for combo in combos if combo.key in self.diffs]
        return [c for c in combos if c.model == next(iter(self.models)) and c.scheme in ("hq3", "hq4")]


class Stages:
    """Runs stages in a work folder."""

    def __init__(self, work: Path, options: Options) -> None:
        self.work, self.options = work, options
        self.results = work / "results"
        for folder in ("results", "logs", "models", "onnx", "engines", "plans"):
            (work / folder).mkdir(parents=True, exist_ok=True)
        self._slots = {"export": Semaphore(5), "engine": Semaphore(4), "text": Semaphore(3), "convert": Semaphore(4)}

    def run(self, wanted: set[str]) -> None:
        """Run the stages asked for: chains of one engine each side by side, then what needs a quiet GPU."""
        options = self.options
        if "build" in wanted and not self.build():
            log("the libraries were not built: going on with those that are there")
        if wanted & {"export", "engines", "text"}:
            self._all([partial(self.convert, name) for name in options.models])
        chains: list[Callable[[], Any]] = [partial(self.chain, combo, wanted) for combo in options.combos()]
        if wanted & {"plugins", "sanitizer"}:
            chains.insert(0, partial(self.kernels, wanted))
        if wanted & {"export", "engines", "text", "plugins", "sanitizer"}:
            self._all(chains)
        engines = {c.key: str(self.engine(c)) for c in options.combos() if self.engine(c).is_dir()}
        if "memory" in wanted:
            self.job("memory", "all", {"engines": engines}, 240)
        if "inplace" in wanted:
            self.inplace(list(engines.items()))
        late: list[Callable[[], Any]] = []
        if "diff" in wanted:
            late += [partial(self.diff, combo) for combo in options.diff_combos()]
        if "samples" in wanted:
            late.append(self.samples)
        self._all(late)

    def onnx(self, combo: Combo) -> Path:
        """Folder of an export."""
        return self.work / "onnx" / combo.key

    def engine(self, combo: Combo) -> Path:
        """Folder of an engine."""
        return self.work / "engines" / combo.key

    def model(self, name: str) -> str:
        """Folder of a model as float16 safetensors."""
        return str(self.work / "models" / name)

    def build(self) -> bool:
        """Configure, compile and install the libraries into hqmq_trt/_lib."""
        for step, command in (
            ("configure", ["cmake", "--preset", "trt", *self.options.cmake]),
            ("compile", ["cmake", "--build", "build/trt", f"-j{os.cpu_count() or 4}"]),
            ("install", ["cmake", "--install", "build/trt", "--prefix", "."]),
        ):
            if not self.command("build", step, command, self.options.limit)["ok"]:
                return False
        return True

    def convert(self, name: str) -> None:
        """Load a model once and save it as float16 safetensors."""
        source, gguf = self.options.models[name]
        self.job("convert", name, {"model": source, "gguf_file": gguf, "output": self.model(name)}, 180)

    def chain(self, combo: Combo, wanted: set[str]) -> None:
        """Export, build and read one engine; a step is left out when the one before failed."""
        options, model = self.options, self.model(combo.model)
        onnx, engine = str(self.onnx(combo)), str(self.engine(combo))
        if "export" in wanted and (options.again or not self.engine(combo).is_dir()):
            arguments = {"model": model, "output": onnx, "mode": combo.mode, "scheme": combo.scheme}
            if not self.job("export", combo.key, arguments, 300)["ok"]:
                return
        if "engines" in wanted:
            build: Result = {"model": onnx, "output": engine, "timing_cache": str(self.work / "timing.cache")}
            build |= {name: getattr(options, name) for name in ("max_batch", "max_context", "prefill_chunk")}
            if not self.job("engine", combo.key, build, options.limit)["ok"]:
                return
            if not options.keep_exports and combo not in options.diff_combos():
                shutil.rmtree(onnx, ignore_errors=True)  # disks are small where GPUs are lent
        if "text" in wanted:
            read: Result = {"engine": engine, "model": model, "prompt": options.prompt, "count": options.tokens}
            self.job("text", combo.key, read, 180)

    def kernels(self, wanted: set[str]) -> None:
        """The plugin tests, then the same engines under compute-sanitizer, its tools side by side."""
        if "plugins" in wanted:
            self.plugins()
        if "sanitizer" in wanted and not any((self.work / "plans").glob("*.plan")):
            # Building engines under the sanitizer would take minutes.
            missing: Result = {"ok": False, "error": "there are no plans: run stage plugins", "seconds": 0.0}
            for tool in SANITIZED:
                self._keep("sanitizer", tool, missing)
        elif "sanitizer" in wanted:
            self._all([partial(self.sanitizer, tool) for tool in SANITIZED])

    def plugins(self) -> None:
        """tests/gpu/test_trt_plugins.py; counts of bytes and errors come from the properties it records."""
        report = self.work / "logs" / "plugins.xml"
        report.unlink(missing_ok=True)
        command = [*_PYTEST, f"--junitxml={report}"]
        self.command("plugins", "all", command, 400, lambda output, code: {"ok": code == 0, **read_junit(report)})

    def sanitizer(self, tool: str) -> None:
        """One tool of compute-sanitizer over SANITIZED, without torch's caching allocator, which would hide errors."""
        command = ["compute-sanitizer", "--tool", tool, "--target-processes", "all", "--print-limit", "50"]
        command += [*_PYTEST, "-k", SANITIZED[tool]]
        env = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        self.command("sanitizer", tool, command, 240, read_sanitizer, env)

    def inplace(self, engines: list[tuple[str, str]]) -> None:
        """Addresses and time of a step over capacities: of engines, and of one operator with a large cache and ncu."""
        for key, folder in [item for item in engines if "fused" in item[0]][:2]:
            self.job("addresses", key, {"engine": folder, "steps": 40}, 120)
        for capacity in (65536, 131072):
            base = [sys.executable, "-m", "benchmarks.report_traffic", str(capacity)]
            self.command("traffic", str(capacity), base, 120, read_last_json)
            metrics = "dram__bytes_read.sum,dram__bytes_write.sum"
            ncu = ["ncu", "--graph-profiling", "graph", "--profile-from-start", "off", "--metrics", metrics]
            ncu += ["--csv", "--print-units", "base"]
            self.command("ncu", str(capacity), [*ncu, *base, "--profile"], 150, read_ncu)

    def diff(self, combo: Combo) -> None:
        """`hqmq-trt diff`: PyTorch, ONNX Runtime and TensorRT over a prefill of 512 and 64 decode steps."""
        command = [sys.executable, "-m", "hqmq_trt.cli", "diff", str(self.onnx(combo)), "--model"]
        command += [self.model(combo.model), "--engine", str(self.engine(combo)), "--tokens", "512"]
        command += ["--decode-steps", "64", "--threads", "4", "--json"]
        self.command("diff", combo.key, command, self.options.limit, read_document)

    def samples(self) -> None:
        """Build samples/cpp and compare what it decodes with the Python session; chat and `hqmq-trt run` once."""
        engine = next((self.engine(c) for c in self.options.combos() if self.engine(c).is_dir()), None)
        if engine is None:
            self._keep("sample", "cpp", {"ok": False, "error": "there is no engine to run", "seconds": 0.0})
            return
        arguments: Result = {"engine": str(engine), "build": str(self.work / "sample"), "cmake": self.options.cmake}
        arguments |= {"prompt": self.options.prompt, "count": self.options.tokens}
        self.job("sample", "cpp", arguments, 180)
        run = [sys.executable, "-m", "hqmq_trt.cli", "run", str(engine), "-n", "32", "-p", self.options.prompt]
        self.command("sample", "run", run, 120, read_words)
        chat = (
            f"printf 'Why is the sky blue?\\nSay it in one line.\\n' | {sys.executable} samples/chat.py {engine} -n 32"
        )
        self.command("sample", "chat", ["sh", "-c", chat], 120, read_words)

    def job(self, job: str, key: str, arguments: Result, seconds: float) -> Result:
        """Run a job of benchmarks.report_jobs in its own process; its result, with ``ok``."""
        given, made = self.work / "logs" / f"{job}.{key}.args.json", self.work / "logs" / f"{job}.{key}.out.json"
        given.write_text(json.dumps(arguments), encoding="utf-8")
        made.unlink(missing_ok=True)

        def read(output: str, code: int) -> Result:
            if code or not made.is_file():
                return {"ok": False}
            found: Result = json.loads(made.read_text(encoding="utf-8"))
            return {"ok": True, **found, **{"job_seconds": found.get("seconds")}}

        command = [sys.executable, "-m", "benchmarks.report_jobs", job, str(given), str(made)]
        slot = self._slots.get(job)
        if slot is None:
            return self.command(job, key, command, seconds, read)
        with slot:
            return self.command(job, key, command, seconds, read)

    def command(
        self,
        stage: str,
        key: str,
        command: list[str],
        seconds: float,
        read: Callable[[str, int], Result] | None = None,
        env: dict[str, str] | None = None,
    ) -> Result:
        """Run a command, keep its output in logs/ and its result in results/; never raises for what the command does.

        `read(output, exit code)` makes the result; without it ``ok`` is exit code 0.
        """
        kept = self.results / f"{stage}.{key}.json"
        if kept.is_file() and not self.options.again:
            found: Result = json.loads(kept.read_text(encoding="utf-8"))
            if found["ok"]:
                log(f"{stage} {key}: done before")
                return found
        left = self.options.deadline - time.monotonic()
        if left < 5:
            return self._keep(
                stage, key, {"ok": False, "error": "the time was up: run the stage again", "seconds": 0.0}
            )
        threads = str(max((os.cpu_count() or 4) // 4, 1))
        environment = {**os.environ, "OMP_NUM_THREADS": threads, "PYTHONPATH": _python_path(), **(env or {})}
        environment |= {"HQMQ_TEST_PLANS": str(self.work / "plans")}
        output_file = self.work / "logs" / f"{stage}.{key}.log"
        log(f"{stage} {key}: started")
        started = time.monotonic()
        with output_file.open("w", encoding="utf-8") as file:
            code, problem = _run(command, file, environment, min(seconds, left))
        took = time.monotonic() - started
        output = output_file.read_text(encoding="utf-8", errors="replace")
        try:
            result = read(output, code) if read else {"ok": code == 0}
        except Exception as error:
            result, problem = {"ok": False}, f"{problem}; its output cannot be read: {type(error).__name__}: {error}"
        if not result["ok"]:
            result["error"] = result.get("error") or f"{problem or 'failed'}: {last_words(output)}"
        return self._keep(stage, key, {**result, "seconds": took})

    def _keep(self, stage: str, key: str, result: Result) -> Result:
        (self.results / f"{stage}.{key}.json").write_text(json.dumps(result, indent=1), encoding="utf-8")
        log(f"{stage} {key}: {'ok' if result['ok'] else 'FAILED'} after {result['seconds']:.1f} s")
        if not result["ok"]:
            log(f"  {result.get('error', '')[:400]}")
        return result

    def collect(self) -> dict[str, dict[str, Result]]:
        """All results kept: stage → key → result."""
        found: dict[str, dict[str, Result]] = {}
        for path in sorted(self.results.glob("*.json")):
            stage, _, key = path.stem.partition(".")
            found.setdefault(stage, {})[key] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def _all(self, tasks: list[Callable[[], Any]]) -> None:
        if not tasks:
            return
        with ThreadPoolExecutor(min(self.options.jobs, len(tasks))) as pool:
            for future in [pool.submit(task) for task in tasks]:
                future.result()


_PYTEST = [
    sys.executable,
    "-m",
    "pytest",
    "-q",
    "--no-header",
    "-p",
    "no:cacheprovider",
    "tests/gpu/test_trt_plugins.py",
]


def _run(command: list[str], file: Any, environment: dict[str, str], seconds: float) -> tuple[int, str]:
    """Exit code and what went wrong; after `seconds` the command ends with all that it started."""
    try:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
        )
    except OSError as error:
        return -1, str(error)
    try:
        code = process.wait(seconds)
        return code, f"exit code {code}" if code else ""
    except subprocess.TimeoutExpired:
        return -1, f"not done after {seconds:.0f} s"
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
