"""TensorRT engines of every architecture in docs/models.md, and of rewritten ONNX files, beside ONNX Runtime.

    python -m benchmarks.architectures_trt --output FOLDER

exports tiny models, builds an engine of each in a few processes, runs a padded batch of three sequences (prefill, a
chunk, 32 single tokens) and compares with ONNX Runtime on the same file. Results are lines of FOLDER/engines.jsonl,
each written as its engine is done; what is there already is not done again. ``--export-only`` makes FOLDER/exports on
a machine without a GPU. ``python -m tests.architecture_runs --engines FOLDER/engines.jsonl`` writes them into
docs/models.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.architecture_engines import PACKED, UNPACKED, Case, examine, prepare
from benchmarks.worker_pool import Crew

RESULTS = "engines.jsonl"
QDQ = ("Llama 3", "Gemma 2", "gpt-oss")
"""Architectures whose qdq mode goes first: the plain case, soft-caps, sinks."""
HUGGING_FACE, ONNX = "hugging-face", "onnx"
EXACT, HALF, WIDE = ("float32", UNPACKED), ("float16", PACKED), ("float32", PACKED)
"""Weights and cache: the arithmetic with a tight limit; as engines are built; the packed cache in float32."""
Subject = tuple[str, str, str]
"""Road, name, mode."""


def all_cases(exports: Path) -> list[Case]:
    """Every engine, the most telling first."""
    from tests.architectures import EXPORTED
    from tests.test_rewrite import WAYS

    names = [architecture.name for architecture in EXPORTED]
    fused: list[Subject] = [(HUGGING_FACE, name, "fused") for name in names]
    rewritten: list[Subject] = [(ONNX, way, "fused") for way in WAYS]
    qdq: list[Subject] = [(HUGGING_FACE, name, "qdq") for name in sorted(names, key=lambda name: name not in QDQ)]
    order = [
        (fused, EXACT),
        (rewritten, EXACT),
        (qdq[: len(QDQ)], EXACT),
        (fused, HALF),
        (qdq[: len(QDQ)], HALF),
        (rewritten, WIDE),
        (qdq[len(QDQ) :], EXACT),
        (qdq[len(QDQ) :], HALF),
    ]
    return [Case(*subject, *variant, exports) for subjects, variant in order for subject in subjects]


def needed(case: Case) -> list[Case]:
    """The exports that a case needs: its own, and in float16 the float32 one that tells what rounding does."""
    return list(dict.fromkeys((case.wide(), case))) if case.dtype != "float32" else [case]


def missing(case: Case) -> list[Case]:
    """Those of `needed` that are not there."""
    return [one for one in needed(case) if not (one.folder / "manifest.json").is_file()]


def export(case: Case) -> None:
    """Make the exports that a case needs and that are not there."""
    import warnings

    import torch
    import transformers

    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    for one in missing(case):
        _export(one)


def _export(case: Case) -> None:
    import torch

    from hqmq_trt.export import export_model
    from hqmq_trt.export.rewrite import rewrite_model
    from tests.architectures import BY_NAME
    from tests.test_rewrite import Exports

    if case.road == HUGGING_FACE:
        model = BY_NAME[case.name].model().to(getattr(torch, case.dtype))
        export_model(model, case.folder, case.scheme, mode=case.mode, overwrite=True)
    else:
        sources = case.exports / "sources" / case.id
        sources.mkdir(parents=True, exist_ok=True)
        rewrite_model(Exports(sources)(case.name), case.folder, case.scheme, mode=case.mode, overwrite=True)


class Records:
    """Results of a file of JSON lines, by case id; new ones are appended at once."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.found: dict[str, dict[str, Any]] = {}
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        for line in text.splitlines():
            try:
                record = json.loads(line)
            except ValueError:  # cut off
                continue
            self.found[record["case"]] = record
        if text and not text.endswith("\n"):
            with path.open("a", encoding="utf-8") as file:
                file.write("\n")

    def add(self, record: dict[str, Any]) -> None:
        """Append and show."""
        self.found[record["case"]] = record
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        print(line(record), flush=True)


def line(record: dict[str, Any]) -> str:
    """A result for people."""
    numbers = " ".join(f"{key}={record[key]:.2g}" for key in ("kl", "logit_error") if key in record)
    reason = f"{record['stage']}: {record['error']}" if record["outcome"] != "passes" else ""
    return f"{record['outcome']:6} {record['case']:45} {record.get('seconds', 0):6.1f} s {numbers} {reason}".rstrip()


def run_cases(
    cases: Sequence[Case],
    output: Path,
    *,
    workers: int,
    exporters: int,
    seconds: float,
    task_seconds: float = 60,
    options: dict[str, Any] | None = None,
    work: Any = examine,
    before: Any = prepare,
) -> dict[str, dict[str, Any]]:
    """Export, build, run and compare cases; their records by case id.

    Args:
        output: folder of RESULTS; cases that it has are not done again.
        workers, exporters: processes that build and run engines, and that export.
        seconds: after so long nothing new is begun and what runs is stopped; those cases have no record.
        task_seconds: what one engine may take; exports may take twice as long.
        options: for build_engine.
        work, before: what engine processes do with (case, options), and at their start.
    """
    output.mkdir(parents=True, exist_ok=True)
    records, until = Records(output / RESULTS), time.monotonic() + seconds
    todo = [case for case in cases if case.id not in records.found]
    absent = [case for case in todo if missing(case)]

    def failed(case: Case, stage: str, error: str) -> None:
        records.add({**case.record(), "outcome": "fails", "stage": stage, "error": error})

    def built(task: tuple[Case, Any], record: dict[str, Any] | None, error: str | None) -> None:
        if record is None:
            failed(task[0], "process", error or "")
        else:
            records.add(record)

    def exported(case: Case, _: None, error: str | None) -> None:
        if error is not None:
            failed(case, "export", error)
        else:
            engines.add((case, options or {}))

    engines = Crew(work, min(workers, len(todo)), task_seconds, until, built, before)
    exports = Crew(export, min(exporters, len(absent)), 2 * task_seconds, until, exported)
    for case in todo:
        if case in absent:
            exports.add(case)
        else:
            engines.add((case, options or {}))
    exports.finish()
    engines.finish()
    return {case.id: records.found[case.id] for case in cases if case.id in records.found}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder for results")
    parser.add_argument("--exports", type=Path, help="folder of exports (OUTPUT/exports); those it holds are used")
    parser.add_argument("--export-only", action="store_true", help="stop before engines: needs no GPU")
    parser.add_argument("--workers", type=int, default=4, help="processes that build engines (4)")
    parser.add_argument("--exporters", type=int, default=max(1, len(os.sched_getaffinity(0)) // 2), help="that export")
    parser.add_argument("--seconds", type=float, default=600, help="stop after so long (600)")
    parser.add_argument("--optimization-level", type=int, help="of TensorRT's builder, 0 to 5")
    parser.add_argument("--mode", choices=("fused", "qdq"), help="only this one")
    parser.add_argument("--again", action="store_true", help="do those again that failed")
    parser.add_argument("names", nargs="*", help="architectures and ways of export (all)")
    given = parser.parse_args()
    exports = (given.exports or given.output / "exports").resolve()
    cases = [case for case in all_cases(exports) if not given.names or case.name in given.names]
    cases = [case for case in cases if given.mode in (None, case.mode)]
    if unknown := set(given.names) - {case.name for case in cases}:
        sys.exit(f"unknown: {', '.join(sorted(unknown))}")
    if given.again:
        _forget_failures(given.output / RESULTS)
    started = time.monotonic()
    if given.export_only:
        sys.exit(_export_only(cases, given.exporters, given.seconds))
    options = {"timing_cache": given.output.resolve() / "timing.cache"}
    if given.optimization_level is not None:
        options["optimization_level"] = given.optimization_level
    found = run_cases(
        cases, given.output, workers=given.workers, exporters=given.exporters, seconds=given.seconds, options=options
    )
    passed = sum(record["outcome"] == "passes" for record in found.values())
    print(f"{passed} pass, {len(found) - passed} fail, {len(cases) - len(found)} not done; {_since(started)}")


def _export_only(cases: Sequence[Case], exporters: int, seconds: float) -> int:
    """Exit status."""

    def done(case: Case, _: None, error: str | None) -> None:
        print(f"{case.id}: {error or 'exported'}", flush=True)

    crew = Crew(export, exporters, 300, time.monotonic() + seconds, done)
    for case in cases:
        if missing(case):
            crew.add(case)
    crew.finish()
    left = [case.id for case in cases if missing(case)]
    print(f"{len(cases) - len(left)} of {len(cases)} exported")
    return int(bool(left))


def _forget_failures(path: Path) -> None:
    kept = [record for record in Records(path).found.values() if record["outcome"] == "passes"]
    if path.is_file():
        path.write_text("".join(json.dumps(record) + "\n" for record in kept), encoding="utf-8")


def _since(started: float) -> str:
    return f"{time.monotonic() - started:.0f} s"


if __name__ == "__main__":
    main()
