"""One script for a machine with an NVIDIA GPU: builds, tries and measures all that TensorRT runs, and writes a report.

``python -m benchmarks.gpu_report --output DIR --work DIR --model smollm2=FOLDER:FILE.gguf --model qwen=FOLDER`` from
the root of the repository. Needs TensorRT with its Python bindings, pycuda, torch with CUDA, nvcc, compute-sanitizer
and, for DRAM bytes, ncu.

Stages (--stages picks some, --list prints them), with the seconds they should take on 16 cores and one H100 for two
models (135M and 1.5B parameters), two modes and three schemes:

build      compile the libraries (cmake preset ``trt``) and install them into hqmq_trt/_lib: 22
   then side by side, about 450 in all:
plugins    tests/gpu/test_trt_plugins.py: each operator in TensorRT against the host codec (words that differ, ties) and
           the float32 oracle; which attention kernels ran: 90
sanitizer  compute-sanitizer memcheck, racecheck and initcheck over a part of these tests, and over small calls of the
           kernels; a report that names a kernel of TensorRT or torch is counted apart: 100 after plugins
export     every model as ONNX: modes x schemes, and fp16 fused; float16. Conversion of GGUF 30 to 100, during build;
           then 60 to 100 for the exports of a model, which fork from one process
engines    `hqmq-trt build` of each: 85 to 130 for the first of a model, which fills the timing cache, then 5 at a time
           in about 60 to 100 each
text       128 greedy tokens of each engine against PyTorch with the same HqmqCache (hqmq_trt.diff.greedy): equal, or
           the first divergence with the gap that rounding can close; the logits under teacher forcing; the kernels
           that a decode step really launched. A process an engine, 50 after it
diff       `hqmq-trt diff --engine` over a prefill of 512 tokens and 64 decode steps: 120 after its engine
samples    builds samples/cpp and compares its tokens with the Python session's: 75 after the first model's engines
tests      tests/gpu/test_{trt_session,trt_diff,samples,engine_build,ort_cuda}.py, side by side, each with its limit
           (--tests picks some): up to 400
   then one at a time, on a quiet GPU, about 400 in all:
speed      benchmarks/engine.py: 90. Its engines are exported and built beside the rest, after the models': 130. At the
           end which kernels its steps launch: 40
quiet      the tests that count free device memory or time the host: 250
inplace    addresses of past and present; time and DRAM bytes of a step when only the capacity grows: 50
memory     device bytes of the cache against `hqmq-trt memory`: 40
tables     report.json and report.md in --output, after every job; on the stdout at the end

Together about 1000 seconds: two calls of at most 10 minutes, the second with what the first had no time for. A failure
is recorded and the rest goes on; the exit code is 1 if anything failed. Results and logs stay in --work, and a later
call goes on from there (--again repeats): cut the whole into calls of limited length with --deadline.
"""

from __future__ import annotations

import signal
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from benchmarks.machine import log, machine
from benchmarks.report_commands import Result, Runner
from benchmarks.report_stages import STAGES, Options, Stages
from benchmarks.report_tables import print_report, write_report
from benchmarks.report_tests import TESTS

PROMPT = (
    "The history of the lighthouse begins with fires on hilltops. Later they were raised on platforms so that ships "
    "could see them from farther away, and towers were built to carry them. The most famous lighthouse of antiquity"
)


def parse_model(text: str) -> tuple[str, tuple[str, str | None]]:
    """``NAME=FOLDER[:FILE.gguf]`` → name, (folder, GGUF file)."""
    name, equals, place = text.partition("=")
    if not equals or not name or not place or "." in name or "/" in name:
        raise typer.BadParameter(
            f"--model {text}: write NAME=FOLDER or NAME=FOLDER:FILE.gguf, NAME without '.' and '/'"
        )
    folder, _, gguf = place.rpartition(":") if place.endswith(".gguf") and ":" in place else (place, "", "")
    return name, (folder, gguf or None)


def main(
    output: Annotated[Path, typer.Option(help="Folder for report.json, report.md and failures.log.")],
    model: Annotated[list[str] | None, typer.Option(help="NAME=FOLDER[:FILE.gguf]; repeatable.")] = None,
    work: Annotated[Path | None, typer.Option(help="Exports, engines, logs, results [default: temporary].")] = None,
    stages: Annotated[str, typer.Option(help="Separated by commas.")] = ",".join(STAGES),
    no_build: Annotated[bool, typer.Option("--no-build", help="Take the libraries that are there.")] = False,
    modes: Annotated[str, typer.Option(help="Of the exports.")] = "fused,qdq",
    schemes: Annotated[str, typer.Option(help="Of the exports, separated by commas.")] = "hq3,hq4,paper:s96_r4+med3",
    fp16: Annotated[bool, typer.Option("--fp16/--no-fp16", help="Also scheme fp16, fused.")] = True,
    diff: Annotated[list[str] | None, typer.Option(help="Engines for `diff`, such as smollm2.fused.hq4.")] = None,
    max_batch: Annotated[int, typer.Option(help="Of the engines.")] = 4,
    max_context: Annotated[int, typer.Option(help="Of the engines.")] = 4096,
    prefill_chunk: Annotated[int, typer.Option(help="Of the engines.")] = 512,
    tokens: Annotated[int, typer.Option(help="Greedy tokens to compare.")] = 128,
    prompt: Annotated[str, typer.Option(help="What the text goes on from; shorter than prefill_chunk.")] = PROMPT,
    limit: Annotated[float, typer.Option(help="Seconds of a single build.")] = 400.0,
    again: Annotated[bool, typer.Option("--again", help="Repeat jobs that succeeded before.")] = False,
    cmake: Annotated[list[str] | None, typer.Option(help="More arguments for cmake, such as -DTensorRT_ROOT=…")] = None,
    keep_exports: Annotated[bool, typer.Option("--keep-exports", help="Keep ONNX files after their engines.")] = False,
    speed: Annotated[str, typer.Option(help="More arguments for benchmarks.engine, in one string.")] = "",
    deadline: Annotated[float, typer.Option(help="Seconds for this call; what is left goes into the next.")] = 3600.0,
    tests: Annotated[str, typer.Option(help=f"Test files of stages tests and quiet: {', '.join(TESTS)}.")] = "",
    gpu_after: Annotated[Path | None, typer.Option(help="All but exports waits for this file to appear.")] = None,
    commit: Annotated[str | None, typer.Option(help="Where git cannot tell.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Print the plan and exit.")] = False,
) -> None:
    """Build, try and measure the TensorRT side on this machine."""
    end = time.monotonic() + deadline
    wanted = set(stages.split(","))
    if unknown := sorted(wanted - set(STAGES)):
        raise typer.BadParameter(f"unknown stage {unknown[0]}: use {', '.join(STAGES)}")
    files = [name for name in tests.split(",") if name]
    if odd := sorted(set(files) - set(TESTS)):
        raise typer.BadParameter(f"unknown test file {odd[0]}: use {', '.join(TESTS)}")
    if no_build:
        wanted.discard("build")
    options = Options(
        models=dict(parse_model(text) for text in model or []),
        modes=modes.split(","),
        schemes=schemes.split(","),
        fp16=fp16,
        diffs=diff or [],
        max_batch=max_batch,
        max_context=max_context,
        prefill_chunk=prefill_chunk,
        tokens=tokens,
        prompt=prompt,
        limit=limit,
        cmake=cmake or [],
        keep_exports=keep_exports,
        speed=speed.split(),
        tests=files,
        gpu_after=gpu_after,
    )
    if not options.models and wanted & {"export", "engines", "text", "memory", "diff", "samples"}:
        raise typer.BadParameter(
            "give a --model, or only the stages build, plugins, sanitizer, tests, quiet, inplace, speed and tables"
        )
    if list_only:
        print("stages:", ", ".join(stage for stage in STAGES if stage in wanted))
        print("engines:", *(combo.key for combo in options.combos()), sep="\n  ")
        print("diff:", *(combo.key for combo in options.diff_combos()), sep="\n  ")
        return
    output.mkdir(parents=True, exist_ok=True)
    folder = (work or Path(tempfile.mkdtemp(prefix="hqmq-report-"))).resolve()
    log(f"working in {folder}")
    with ThreadPoolExecutor(1) as pool:
        # Versions come from imports that take many seconds on a cold disk.
        where = pool.submit(machine, commit)
        writing = threading.Lock()

        def write() -> None:
            """Never in the way of the stages: what cannot be shown is still in the results."""
            if "tables" not in wanted or not where.done():
                return
            try:
                with writing:
                    write_report(runner.collect(), where.result(), output)
            except Exception as error:
                log(f"the report was not written: {type(error).__name__}: {error}")

        runner = Runner(folder, again, end, write)
        work_stages = Stages(runner, options)

        def stop(*_: Any) -> NoReturn:
            runner.end_all()
            raise SystemExit(143)

        signal.signal(signal.SIGTERM, stop)
        try:
            work_stages.run(wanted)
        finally:
            where.result()
            write()
            work_stages.copy_speed(output)
    failures = _failures(runner, output)
    if "tables" in wanted:
        print_report(runner.collect(), where.result())
    for name, error in failures.items():
        log(f"FAILED {name}: {error[:300]}")
    raise typer.Exit(int(bool(failures)))


def _failures(runner: Runner, output: Path) -> dict[str, str]:
    """Errors by job; their logs go to failures.log."""
    results: dict[str, dict[str, Result]] = runner.collect()
    found = {f"{stage} {key}": r["error"] for stage, keys in results.items() for key, r in keys.items() if not r["ok"]}
    paths = [runner.logs / f"{name.replace(' ', '.')}.log" for name in found]
    parts = [f"==> {path.name}\n{path.read_text(errors='replace')[-20000:]}\n" for path in paths if path.is_file()]
    if parts:
        (output / "failures.log").write_text("".join(parts), encoding="utf-8")
    return found


if __name__ == "__main__":
    typer.run(main)
