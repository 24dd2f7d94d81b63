"""One script for a machine with an NVIDIA GPU: builds, tries and measures all that TensorRT runs, and writes a report.

``python -m benchmarks.gpu_report --output DIR --work DIR --model smollm2=FOLDER:FILE.gguf --model qwen=FOLDER`` from
the root of the repository. Needs TensorRT with its Python bindings, pycuda, torch with CUDA, nvcc, compute-sanitizer
and, for DRAM bytes, ncu. Stages, in the order in which they run (--stages picks some; --list prints the plan):

build      compile the libraries (cmake preset ``trt``) and install them into hqmq_trt/_lib
plugins    tests/gpu/test_trt_plugins.py: each operator in TensorRT against the host codec (words that differ, ties) and
           the float32 oracle
sanitizer  compute-sanitizer memcheck, racecheck and initcheck over a part of these tests; a report that names a kernel
           of TensorRT or torch is counted apart
export     every model as ONNX: modes x schemes, and fp16 fused; float16
engines    `hqmq-trt build` of each, several at a time; seconds and sizes
text       128 greedy tokens of each engine against PyTorch with the same HqmqCache (hqmq_trt.diff.greedy): equal, or
           the first divergence with the gap that rounding can close; and the logits under teacher forcing
memory     device bytes of the cache against `hqmq-trt memory`
inplace    addresses of past and present; time and DRAM bytes of a step when only the capacity grows
diff       `hqmq-trt diff --engine` over a prefill of 512 tokens and 64 decode steps
samples    builds samples/cpp and compares its tokens with the Python session's
tables     report.json and report.md in --output, and the tables on stdout, from all stages that have run so far

Jobs run side by side in processes of their own. A failure is recorded and the rest goes on; the exit code is 1 if
anything failed. Results and logs stay in --work, and a later call goes on from there (--again repeats); so the whole
can be cut into calls of limited length with --deadline.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.machine import log, machine
from benchmarks.report_stages import STAGES, Options, Stages
from benchmarks.report_tables import write_report

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
    jobs: Annotated[int, typer.Option(min=1, help="Jobs side by side.")] = 16,
    limit: Annotated[float, typer.Option(help="Seconds of a single build or diff.")] = 580.0,
    again: Annotated[bool, typer.Option("--again", help="Repeat jobs that succeeded before.")] = False,
    cmake: Annotated[list[str] | None, typer.Option(help="More arguments for cmake, such as -DTensorRT_ROOT=…")] = None,
    keep_exports: Annotated[bool, typer.Option("--keep-exports", help="Keep ONNX files after their engines.")] = False,
    deadline: Annotated[float, typer.Option(help="Seconds for this call; what is left goes into the next.")] = 3600.0,
    commit: Annotated[str | None, typer.Option(help="Where git cannot tell.")] = None,
    list_only: Annotated[bool, typer.Option("--list", help="Print the plan and exit.")] = False,
) -> None:
    """Build, try and measure the TensorRT side on this machine."""
    wanted = set(stages.split(","))
    if unknown := sorted(wanted - set(STAGES)):
        raise typer.BadParameter(f"unknown stage {unknown[0]}: use {', '.join(STAGES)}")
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
        jobs=jobs,
        limit=limit,
        again=again,
        cmake=cmake or [],
        keep_exports=keep_exports,
        deadline=time.monotonic() + deadline,
    )
    if not options.models and wanted & {"export", "engines", "text", "memory", "diff", "samples"}:
        raise typer.BadParameter("give a --model, or only the stages build, plugins, sanitizer, inplace and tables")
    if list_only:
        print("stages:", ", ".join(stage for stage in STAGES if stage in wanted))
        print("engines:", *(combo.key for combo in options.combos()), sep="\n  ")
        print("diff:", *(combo.key for combo in options.diff_combos()), sep="\n  ")
        return
    output.mkdir(parents=True, exist_ok=True)
    folder = (work or Path(tempfile.mkdtemp(prefix="hqmq-report-"))).resolve()
    log(f"working in {folder}")
    report = Stages(folder, options)
    report.run(wanted)
    results = report.collect()
    failures = {
        f"{stage} {key}": r["error"] for stage, found in results.items() for key, r in found.items() if not r["ok"]
    }
    if "tables" in wanted:
        write_report(results, machine(commit), output)
    logs = [folder / "logs" / f"{name.replace(' ', '.')}.log" for name in failures]
    if logs:
        parts = [f"==> {path.name}\n{path.read_text(errors='replace')[-20000:]}\n" for path in logs if path.is_file()]
        (output / "failures.log").write_text("".join(parts), encoding="utf-8")
    for name, error in failures.items():
        log(f"FAILED {name}: {error[:300]}")
    raise typer.Exit(int(bool(failures)))


if __name__ == "__main__":
    typer.run(main)
