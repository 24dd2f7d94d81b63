"""How benchmarks/gpu_report.py runs programs: side by side, with limits, and with every result kept as a file.

Every job writes RESULTS/{stage}.{key}.json in the work folder, whether it succeeds or not, so that stages can run in
several calls and a failure does not stop the others. A job that succeeded is not run again unless asked for.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

from benchmarks.machine import log
from benchmarks.report_readers import last_words

ROOT = Path(__file__).resolve().parent.parent
Result = dict[str, Any]
Read = Callable[[str, int], Result]
"""(output, exit code) → the result of a command, with ``ok``."""


class Runner:
    """Runs commands until a deadline (of time.monotonic) and keeps their results and output in a work folder."""

    def __init__(self, work: Path, again: bool, deadline: float, on_result: Callable[[], None] = lambda: None) -> None:
        self.work, self.again, self.deadline, self._on_result = work, again, deadline, on_result
        self.results, self.logs = work / "results", work / "logs"
        for folder in (self.results, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        self._lock = threading.Lock()
        self._running: set[int] = set()
        self._made: set[str] = set()

    def left(self) -> float:
        """Seconds until the deadline."""
        return self.deadline - time.monotonic()

    def kept(self, stage: str, key: str) -> Result | None:
        """The result of a job that succeeded, in this call or, unless all is to be repeated, an earlier one."""
        path = self.results / f"{stage}.{key}.json"
        if not path.is_file() or (self.again and path.name not in self._made):
            return None
        found: Result = json.loads(path.read_text(encoding="utf-8"))
        return found if found["ok"] else None

    def keep(self, stage: str, key: str, result: Result) -> Result:
        """Write a result, with ``ok`` and ``seconds``, as a whole."""
        path = self.results / f"{stage}.{key}.json"
        part = path.with_suffix(".part")
        with self._lock:
            part.write_text(json.dumps(result, indent=1), encoding="utf-8")
            part.replace(path)
            self._made.add(path.name)
        log(f"{stage} {key}: {'ok' if result['ok'] else 'FAILED'} after {result['seconds']:.1f} s")
        if not result["ok"]:
            log(f"  {result.get('error', '')[:400]}")
        self._on_result()
        return result

    def fail(self, stage: str, key: str, error: str) -> Result:
        """Keep a failure of what was not even started."""
        return self.keep(stage, key, {"ok": False, "error": error, "seconds": 0.0})

    def collect(self) -> dict[str, dict[str, Result]]:
        """All results kept: stage → key → result."""
        found: dict[str, dict[str, Result]] = {}
        for path in sorted(self.results.glob("*.json")):
            stage, _, key = path.stem.partition(".")
            found.setdefault(stage, {})[key] = json.loads(path.read_text(encoding="utf-8"))
        return found

    def job(self, job: str, key: str, arguments: Result, seconds: float, threads: int = 2) -> Result:
        """Run a job of benchmarks.report_jobs in its own process; its result, with ``ok``."""
        given, made = self.logs / f"{job}.{key}.args.json", self.logs / f"{job}.{key}.out.json"
        if (found := self.kept(job, key)) is not None:
            return found
        given.write_text(json.dumps(arguments), encoding="utf-8")
        made.unlink(missing_ok=True)

        def read(output: str, code: int) -> Result:
            if code or not made.is_file():
                return {"ok": False}
            done: Result = json.loads(made.read_text(encoding="utf-8"))
            return {"ok": True, **done, "job_seconds": done.get("seconds")}

        command = [sys.executable, "-m", "benchmarks.report_jobs", job, str(given), str(made)]
        return self.command(job, key, command, seconds, read, threads=threads)

    def batch(
        self,
        job: str,
        name: str,
        arguments: Result,
        cases: dict[str, Result],
        seconds: float,
        on_case: Callable[[str, Result], None] = lambda key, result: None,
        env: dict[str, str] | None = None,
    ) -> None:
        """Run the cases of a job in one process, which loads once what they share; a result is kept for each case.

        The job gets ``cases``, a list of the cases' own arguments, each with ``result``: the file that it writes as
        soon as the case is done, with ``ok`` and ``seconds``. `on_case(key, result)` is called as these appear. `name`,
        of the process, must not be a case's.
        """
        waiting: dict[str, Path] = {}
        for key in cases:
            if (found := self.kept(job, key)) is not None:
                log(f"{job} {key}: done before")
                on_case(key, found)
            else:
                waiting[key] = self.logs / f"{job}.{key}.out.json"
                waiting[key].unlink(missing_ok=True)
        if not waiting:
            return
        given = self.logs / f"{job}.{name}.args.json"
        listed = [{**cases[key], "result": str(path)} for key, path in waiting.items()]
        given.write_text(json.dumps({**arguments, "cases": listed}), encoding="utf-8")
        command = [
            sys.executable,
            "-m",
            "benchmarks.report_jobs",
            job,
            str(given),
            str(self.logs / f"{job}.{name}.out.json"),
        ]
        ended: Result = {}

        def run() -> None:
            try:
                path = self.logs / f"{job}.{name}.log"
                ended.update(self._execute(f"{job} {name}", path, command, seconds, 1, env=env))
            except BaseException as error:
                ended.update(ok=False, error=f"{type(error).__name__}: {error}", seconds=0.0)
                raise

        def take() -> None:
            for key in [key for key, path in waiting.items() if path.is_file()]:
                done: Result = json.loads(waiting.pop(key).read_text(encoding="utf-8"))
                on_case(key, self.keep(job, key, {**done, "job_seconds": done["seconds"]}))

        thread = threading.Thread(target=run)
        thread.start()
        while thread.is_alive():
            thread.join(0.3)
            take()
        take()
        for key in waiting:
            error = ended.get("error") or "its process ended without a result"
            on_case(key, self.keep(job, key, {"ok": False, "error": error, "seconds": ended["seconds"]}))

    def command(
        self,
        stage: str,
        key: str,
        command: list[str],
        seconds: float,
        read: Read | None = None,
        env: dict[str, str] | None = None,
        threads: int = 2,
    ) -> Result:
        """Run a command, keep its output in logs/ and its result in results/; never raises for what the command does.

        `read(output, exit code)` makes the result; without it ``ok`` is exit code 0. `threads` is what torch, BLAS
        and our host library may use each; dozens of processes with a pool for every core would stand in their way.
        """
        if (found := self.kept(stage, key)) is not None:
            log(f"{stage} {key}: done before")
            return found
        path = self.logs / f"{stage}.{key}.log"
        return self.keep(stage, key, self._execute(f"{stage} {key}", path, command, seconds, threads, read, env))

    def _execute(
        self,
        name: str,
        output_file: Path,
        command: list[str],
        seconds: float,
        threads: int,
        read: Read | None = None,
        env: dict[str, str] | None = None,
    ) -> Result:
        left = self.left()
        if left < 5:
            return {"ok": False, "error": "the time was up: run the stage again", "seconds": 0.0}
        pools = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "HQMQ_NUM_THREADS")
        environment = {**os.environ, **dict.fromkeys(pools, str(threads)), "TOKENIZERS_PARALLELISM": "false"}
        environment |= {"PYTHONPATH": _python_path(), "HQMQ_TEST_PLANS": str(self.work / "plans"), **(env or {})}
        log(f"{name}: started")
        started = time.monotonic()
        with output_file.open("w", encoding="utf-8") as file:
            code, problem = self._run(command, file, environment, min(seconds, left))
        took = time.monotonic() - started
        output = output_file.read_text(encoding="utf-8", errors="replace")
        try:
            result: Result = read(output, code) if read else {"ok": code == 0}
        except Exception as error:
            result, problem = {"ok": False}, f"{problem}; its output cannot be read: {type(error).__name__}: {error}"
        if not result["ok"]:
            result["error"] = result.get("error") or f"{problem or 'failed'}: {last_words(output)}"
        return {**result, "seconds": took}

    def _run(self, command: list[str], file: Any, environment: dict[str, str], seconds: float) -> tuple[int, str]:
        """Exit code and what went wrong; after `seconds` the command ends with all that it started."""
        try:
            process = subprocess.Popen(
                command, stdout=file, stderr=subprocess.STDOUT, cwd=ROOT, env=environment, start_new_session=True
            )
        except OSError as error:
            return -1, str(error)
        with self._lock:
            self._running.add(process.pid)
        try:
            code = process.wait(seconds)
            return code, f"exit code {code}" if code else ""
        except subprocess.TimeoutExpired:
            return -1, f"not done after {seconds:.0f} s"
        finally:
            _end(process.pid)
            process.wait()
            with self._lock:
                self._running.discard(process.pid)

    def end_all(self) -> None:
        """End every command that runs, with all that it started, and begin no other."""
        self.deadline = 0.0
        for group in list(self._running):
            _end(group)


def _end(group: int) -> None:
    with suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def together(tasks: Iterable[Callable[[], Any]]) -> None:
    """Run all tasks side by side; the first exception is raised when all have ended."""
    todo = list(tasks)
    if not todo:
        return
    with ThreadPoolExecutor(len(todo)) as pool:
        for future in [pool.submit(task) for task in todo]:
            future.result()


def _python_path() -> str:
    return os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
