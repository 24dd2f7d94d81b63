"""The stages of benchmarks/gpu_report.py: what runs beside what, in which process, and with which limit.

All that only has to be right runs side by side, in chains that wait for nothing but what they need: convert, export,
build and read each model; kernels; tests; the engines of the speed table. What is timed, or counts device memory, runs
afterwards, one at a time. benchmarks/report_commands.py keeps the results.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Event, Lock, Semaphore
from typing import Any

from benchmarks.machine import log
from benchmarks.report_commands import Result, Runner, together
from benchmarks.report_readers import read_document, read_last_json, read_ncu, read_speed, read_words
from benchmarks.report_tests import Checks

STAGES = (
    *("build", "plugins", "sanitizer", "export", "engines", "text", "diff", "samples", "tests"),
    *("speed", "quiet", "inplace", "memory", "tables"),
)
ORT_PARAMETERS = 500_000_000
"""Models up to this size run in ONNX Runtime too when `diff` reads them: on a CPU it computes float16 by converting."""
SPEED_BUDGET, SPEED_LEAST = 200.0, 60.0
"""Seconds of measuring in stage ``speed``: at most, and those without which it does not begin."""
SLOTS = {"engine": 5, "text": 3, "diff": 3}
"""Jobs of a kind side by side. A text of a model of 1.5B parameters takes 15 GB of the GPU."""


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
    limit: float
    cmake: list[str]
    keep_exports: bool
    speed: list[str]
    tests: Sequence[str] = ()
    gpu_after: Path | None = None

    def combos(self) -> list[Combo]:
        """All engines, the models in turn so that small and large ones run side by side."""
        pairs = [(mode, scheme) for scheme in self.schemes for mode in self.modes]
        if self.fp16 and "fused" in self.modes:
            pairs.append(("fused", "fp16"))
        return [Combo(model, *pair) for pair in pairs for model in self.models]

    def diff_combos(self) -> list[Combo]:
        """Engines that `hqmq-trt diff` compares: those named, or the second scheme (hq4) of every model and mode."""
        combos = self.combos()
        if self.diffs:
            return [combo for combo in combos if combo.key in self.diffs]
        return [combo for combo in combos if combo.scheme == self.schemes[:2][-1]]


class Stages:
    """Runs stages with a runner."""

    def __init__(self, runner: Runner, options: Options) -> None:
        self.runner, self.work, self.options = runner, runner.work, options
        for folder in ("models", "onnx", "engines", "plans", "speed"):
            (self.work / folder).mkdir(parents=True, exist_ok=True)
        self._slots = {kind: Semaphore(count) for kind, count in SLOTS.items()}
        self._first = {name: Lock() for name in options.models}
        # tests/gpu/test_samples.py configures samples/cpp by itself: CMake takes these from the environment too.
        defined = [text[2:].partition("=") for text in options.cmake if text.startswith("-D")]
        named = {name: value for name, _, value in defined if name == "TensorRT_ROOT"}
        self.checks = Checks(runner, options.tests, named)

    def run(self, wanted: set[str]) -> None:
        """Run the stages asked for."""
        models = self.options.models
        sources = wanted & {"export", "text", "diff"}
        converted = {name: Event() for name in models}
        built = {name: Event() for name in models}
        with ThreadPoolExecutor(len(models) or 1) as pool:
            early = [pool.submit(self.convert, name, converted[name]) for name in models if sources]
            if "build" in wanted and not self.build():
                log("the libraries were not built: going on with those that are there")
            tasks: list[Callable[[], Any]] = []
            if wanted & {"plugins", "sanitizer"}:
                tasks.append(partial(self.on_gpu, partial(self.checks.kernels, wanted)))
            if sources | (wanted & {"engines"}):
                tasks += [partial(self.chain, name, wanted, converted[name], built[name]) for name in models]
            else:
                for event in built.values():
                    event.set()
            if "tests" in wanted:
                tasks += [partial(self.on_gpu, partial(self.checks.beside, name)) for name in self.checks.files()]
            if "samples" in wanted:
                tasks.append(partial(self.samples, built))
            if "speed" in wanted:
                tasks.append(partial(self.speed_engines, built))
            together(tasks)
            for future in early:
                future.result()
        # From here on nothing else runs on the GPU.
        engines = {c.key: str(self.engine(c)) for c in self.options.combos() if self.engine(c).is_dir()}
        if "speed" in wanted:
            self.speed()
        if "quiet" in wanted:
            self.checks.alone()
        if "inplace" in wanted:
            self.inplace(list(engines.items()))
        if "memory" in wanted:
            self.runner.job("memory", "all", {"engines": engines}, 240)
        if "speed" in wanted:
            self.runner.command("speed", "kernels", self._speed("kernels"), 120, read_words, threads=4)

    def wait_for_gpu(self) -> None:
        """Until the file of --gpu-after is there, if one was named."""
        after = self.options.gpu_after
        while after is not None and not after.exists() and self.runner.left() > 5:
            time.sleep(0.5)

    def on_gpu(self, task: Callable[[], Any]) -> None:
        """Run a task that needs TensorRT or the GPU."""
        self.wait_for_gpu()
        task()

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
            if not self.runner.command("build", step, command, self.options.limit)["ok"]:
                return False
        return True

    def convert(self, name: str, done: Event) -> None:
        """Load a model once and save it as float16 safetensors."""
        source, gguf = self.options.models[name]
        try:
            self.runner.job("convert", name, {"model": source, "gguf_file": gguf, "output": self.model(name)}, 300, 4)
        finally:
            done.set()

    def chain(self, name: str, wanted: set[str], converted: Event, built: Event) -> None:
        """Export, build and read the engines of a model: each step as soon as what it needs is there."""
        combos = [combo for combo in self.options.combos() if combo.model == name]
        try:
            if wanted & {"export", "text", "diff"}:
                converted.wait()
                if self.runner.kept("convert", name) is None:
                    return
            exported = {combo.key: Event() for combo in combos}
            with ThreadPoolExecutor(3 * len(combos) + 1) as pool:
                exports = pool.submit(self.exports, name, wanted, exported)
                engines = {
                    combo: pool.submit(self.build_engine, combo, exported[combo.key], wanted) for combo in combos
                }
                later: list[Future[Any]] = [exports]
                for combo, future in engines.items() if "text" in wanted else ():
                    later.append(pool.submit(self.text, combo, future))
                for combo in self.options.diff_combos() if "diff" in wanted else ():
                    if combo in engines:
                        later.append(pool.submit(self.diff, combo, engines[combo]))
                for future in engines.values():
                    future.result()
                built.set()
                for future in later:
                    future.result()
        finally:
            built.set()

    def exports(self, name: str, wanted: set[str], exported: dict[str, Event]) -> None:
        """Export a model in one process, from which the exports fork; those without an engine yet."""
        cases: dict[str, Result] = {}
        for combo in [c for c in self.options.combos() if c.key in exported and "export" in wanted]:
            if self.runner.again or not (self.engine(combo).is_dir() or self._kept_export(combo)):
                cases[combo.key] = {"output": str(self.onnx(combo)), "mode": combo.mode, "scheme": combo.scheme}
        try:
            arguments: Result = {"model": self.model(name), "jobs": 6}
            hidden = {"CUDA_VISIBLE_DEVICES": ""}  # CUDA does not outlive a fork, and torch asks for it where it is
            self.runner.batch("export", name, arguments, cases, 400, lambda key, found: exported[key].set(), hidden)
        finally:
            for event in exported.values():
                event.set()

    def _kept_export(self, combo: Combo) -> bool:
        return self.runner.kept("export", combo.key) is not None and self.onnx(combo).is_dir()

    def build_engine(self, combo: Combo, exported: Event, wanted: set[str]) -> bool:
        """Build an engine once its export is there; whether there is one.

        The first of a model is built before the others begin: they find its products timed in the timing cache.
        """
        exported.wait()
        if "engines" not in wanted:
            return self.engine(combo).is_dir()
        self.wait_for_gpu()
        if "export" in wanted and not self.engine(combo).is_dir() and self.runner.kept("export", combo.key) is None:
            return False
        cache = self.work / f"timing.{combo.model}.cache"
        with self._first[combo.model]:
            if not cache.is_file():
                return self._build(combo, cache)
        return self._build(combo, cache)

    def _build(self, combo: Combo, cache: Path) -> bool:
        options = self.options
        arguments: Result = {
            "model": str(self.onnx(combo)),
            "output": str(self.engine(combo)),
            "timing_cache": str(cache),
        }
        arguments |= {name: getattr(options, name) for name in ("max_batch", "max_context", "prefill_chunk")}
        with self._slots["engine"]:
            if not self.runner.job("engine", combo.key, arguments, options.limit)["ok"]:
                return False
        if not options.keep_exports and combo not in options.diff_combos():
            shutil.rmtree(self.onnx(combo), ignore_errors=True)  # disks are small where GPUs are lent
        return True

    def text(self, combo: Combo, engine: Future[bool]) -> None:
        """Read an engine beside PyTorch as soon as it is built."""
        if not engine.result():
            return
        options = self.options
        arguments: Result = {"model": self.model(combo.model), "prompt": options.prompt, "count": options.tokens}
        with self._slots["text"]:
            cases = {combo.key: {"engine": str(self.engine(combo))}}
            self.runner.batch("text", f"{combo.key}.process", arguments, cases, 400)

    def diff(self, combo: Combo, engine: Future[bool]) -> None:
        """`hqmq-trt diff`: PyTorch, TensorRT and, for small models, ONNX Runtime over 512 tokens and 64 steps."""
        if self.runner.kept("diff", combo.key) is None and not (engine.result() and self.onnx(combo).is_dir()):
            self.runner.fail("diff", combo.key, "there is no engine, or its export is gone (--keep-exports)")
            return
        command = [sys.executable, "-m", "hqmq_trt.cli", "diff", str(self.onnx(combo)), "--model"]
        command += [self.model(combo.model), "--engine", str(self.engine(combo)), "--tokens", "512"]
        command += ["--decode-steps", "64", "--threads", "4", "--json"]
        converted = self.runner.kept("convert", combo.model) or {}
        if converted.get("parameters", 0) > ORT_PARAMETERS:
            command.append("--no-ort")
        with self._slots["diff"]:
            found = self.runner.command("diff", combo.key, command, 240, read_document, threads=4)
        if found["ok"] and not self.options.keep_exports:
            shutil.rmtree(self.onnx(combo), ignore_errors=True)

    def inplace(self, engines: list[tuple[str, str]]) -> None:
        """Addresses and time of a step over capacities: of engines, and of one operator with a large cache and ncu."""
        for key, folder in [item for item in engines if "fused" in item[0]][:2]:
            self.runner.job("addresses", key, {"engine": folder, "steps": 40}, 120)
        for capacity in (65536, 131072):
            base = [sys.executable, "-m", "benchmarks.report_traffic", str(capacity)]
            self.runner.command("traffic", str(capacity), base, 120, read_last_json)
            metrics = "dram__bytes_read.sum,dram__bytes_write.sum"
            ncu = ["ncu", "--graph-profiling", "graph", "--profile-from-start", "off", "--metrics", metrics]
            ncu += ["--csv", "--print-units", "base"]
            self.runner.command("ncu", str(capacity), [*ncu, *base, "--profile"], 150, read_ncu)

    def samples(self, built: dict[str, Event]) -> None:
        """Build samples/cpp and compare what it decodes with the Python session; chat and `hqmq-trt run` once."""
        if not built:
            self.runner.fail("sample", "cpp", "there is no engine to run")
            return
        next(iter(built.values())).wait()
        engine = next((self.engine(c) for c in self.options.combos() if self.engine(c).is_dir()), None)
        if engine is None:
            self.runner.fail("sample", "cpp", "there is no engine to run")
            return
        arguments: Result = {"engine": str(engine), "build": str(self.work / "sample"), "cmake": self.options.cmake}
        arguments |= {"prompt": self.options.prompt, "count": self.options.tokens}
        self.runner.job("sample", "cpp", arguments, 180)
        run = [sys.executable, "-m", "hqmq_trt.cli", "run", str(engine), "-n", "32", "-p", self.options.prompt]
        self.runner.command("sample", "run", run, 120, read_words)
        chat = (
            f"printf 'Why is the sky blue?\\nSay it in one line.\\n' | {sys.executable} samples/chat.py {engine} -n 32"
        )
        self.runner.command("sample", "chat", ["sh", "-c", chat], 120, read_words)

    def _speed(self, stage: str, *more: str) -> list[str]:
        command = [sys.executable, "-m", "benchmarks.engine", "--output", str(self.work / "speed")]
        return [*command, "--work", str(self.work / "speed"), "--stages", stage, *more, *self.options.speed]

    def speed_engines(self, built: dict[str, Event]) -> None:
        """Export and build the engines of benchmarks/engine.py, after the models' own: a builder times kernels."""
        for event in built.values():
            event.wait()
        self.runner.command("speed", "prepare", self._speed("export,build", "--jobs", "2"), self.options.limit)

    def speed(self) -> None:
        """Measure the table of benchmarks/engine.py; what a killed run has measured is read too."""
        if self.runner.kept("speed", "prepare") is None:
            self.runner.fail("speed", "measure", "its engines were not built")
            return
        if self.runner.kept("speed", "measure") is not None:
            return
        budget = min(SPEED_BUDGET, self.runner.left() - 45)
        if budget < SPEED_LEAST:
            self.runner.fail("speed", "measure", f"the time was up: it takes {SPEED_LEAST + 45:.0f} s; run it again")
            return
        table = self.work / "speed" / "engine.json"
        table.unlink(missing_ok=True)
        command = self._speed("measure", "--budget", f"{budget:.0f}")
        self.runner.command("speed", "measure", command, budget + 40, partial(read_speed, table), threads=4)

    def copy_speed(self, output: Path) -> None:
        """Copy the table and plot of benchmarks/engine.py, where there are any."""
        for name in ("engine.json", "engine.md", "engine.png"):
            with suppress(FileNotFoundError):
                shutil.copyfile(self.work / "speed" / name, output / name)
