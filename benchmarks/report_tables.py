"""The tables of benchmarks/gpu_report.py: on the terminal, as Markdown, and all numbers as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.engine_tables import NOTE, comparison
from hqmq_trt.cli.output import size

Result = dict[str, Any]
Results = dict[str, dict[str, Result]]


@dataclass(frozen=True)
class Sheet:
    """A table: title, column names, rows of text; `note` stands below it."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def rich(self) -> Table:
        """For the terminal."""
        table = Table(title=self.title, title_justify="left", caption=self.note or None, caption_justify="left")
        for name in self.columns:
            table.add_column(name, overflow="fold")
        for row in self.rows:
            table.add_row(*(escape(cell) for cell in row))
        return table

    def markdown(self) -> str:
        """For docs/."""
        lines = [f"**{self.title}**", "", _line(self.columns), _line(["---"] * len(self.columns))]
        lines += [_line(row) for row in self.rows]
        return "\n".join([*lines, "", *([self.note, ""] if self.note else [])])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def sheets(results: Results) -> list[Sheet]:
    """A table for every stage that ran."""
    made = [_engines, _texts, _plugins, _memory, _inplace, _diff, _sanitizer, _tests, _speed, _others, _failures]
    return [sheet for make in made if (sheet := make(results)) and sheet.rows]


def _number(value: Any, style: str = ".3g") -> str:
    return "" if value is None else format(value, style)


def _engines(results: Results) -> Sheet:
    exports, rows = results.get("export", {}), []
    for key, found in results.get("engine", {}).items():
        export = exports.get(key, {})
        cells = [_number(export.get("job_seconds"), ".0f"), _number(found.get("job_seconds"), ".0f")]
        cells += [_number(found.get("build_seconds"), ".0f")]
        plan, scratch = found.get("plan_bytes"), found.get("scratch_bytes")
        cells += ["" if plan is None else size(plan), "" if not scratch else " / ".join(size(n) for n in scratch)]
        rows.append([key, *cells, _passed(found)])
    columns = ("engine", "export s", "build s", "of which TensorRT", "plan", "scratch (decode / prefill)", "")
    return Sheet("Engines", columns, rows, "Several exports and builds ran side by side.")


def _texts(results: Results) -> Sheet:
    rows = []
    for key, found in results.get("text", {}).items():
        if "new_tokens" not in found:
            rows.append([key, *[""] * 5, _passed(found), "", ""])
            continue
        first = found["first_divergence"]
        equal = f"all {found['new_tokens']} equal" if first is None else f"token {first} differs"
        gap = "" if first is None else f"{found['gap']:.3g} / {_number(found['bound'])}"
        numbers = [_number(found["max_abs_difference"]), _number(found["mean_kl"], ".1e"), f"{found['top1']:.1%}"]
        rows.append([key, equal, gap, *numbers, _passed(found), _ran(found.get("kernels")), found["torch_kernels"]])
    numbers_of = ("largest difference", "mean KL", "top-1", "")
    columns = ("engine", "greedy text", "gap / bound", *numbers_of, "our kernels in a decode step", "PyTorch kernels")
    note = (
        "Greedy tokens against PyTorch with the same HqmqCache. gap: between PyTorch's two likeliest tokens where the "
        "texts part; bound: what rounding can close (twice the largest change of a logit when PyTorch computes in "
        "float32). Difference, KL and top-1 are of the logits with the engine fed PyTorch's tokens. Kernels: as the "
        "profiler saw them in a replay of the engine's CUDA graph; as said: one a layer, hqmq_cuda_attention_path's."
    )
    return Sheet("Text", columns, rows, note)


def _ran(kernels: Result | None) -> str:
    """Launches of our kernels, and whether they are those that hqmq_cuda_attention_path names."""
    if kernels is None:
        return ""
    if "unseen" in kernels:
        return f"not seen: {kernels['unseen'][:80]}"
    counts = ", ".join(f"{count} {name}" for name, count in kernels["launches"].items())
    said = {None: "", True: "; as said", False: "; NOT AS SAID"}[kernels["as_said"]]
    return f"{counts or 'none'}; {kernels['layers']} layers{said}"


def _plugins(results: Results) -> Sheet:
    rows = []
    for found in results.get("plugins", {}).values():
        counts = (f"{found.get(name, '?')} {name}" for name in ("passed", "failures", "errors", "skipped"))
        rows.append(["all tests", ", ".join(counts), "", "", "", ""])
        for name, values in found.get("measured", {}).items():
            cells = [_number(values.get(key), ",.0f") for key in ("words", "differing_words", "tied_tokens")]
            ran = ", ".join(f"{v:.0f} {k}" for k, v in values.items() if k.endswith("Kernel"))
            rows.append([name.removeprefix("test_"), ran, *cells, _number(values.get("relative_error"), ".1e")])
    columns = ("plugins in TensorRT", "tests", "words", "differ from the host", "tied tokens", "largest relative error")
    return Sheet("Operators", columns, rows)


def _memory(results: Results) -> Sheet:
    rows = []
    for found in results.get("memory", {}).values():
        for row in found.get("rows", []):
            by_cuda = "" if row["by_cuda"] is None else f"{row['by_cuda']:,}"
            where = f"{row['batch']} x {row['context']:,}" + (" (session)" if "session" in row else "")
            cells = [f"{row['predicted']:,}", f"{row['allocated']:,}", f"{row['error']:+.3%}", by_cuda]
            rows.append([row["engine"], where, *cells])
    columns = ("engine", "cache", "predicted bytes", "allocated bytes", "error", "by cuMemGetInfo")
    note = "Predicted: `hqmq-trt memory` without codebooks, which are weights. CUDA hands out memory in steps of 2 MiB."
    return Sheet("Device memory of the cache", columns, rows, note)


def _inplace(results: Results) -> Sheet:
    rows = []
    for key, found in results.get("addresses", {}).items():
        for row in found.get("rows", []):
            same = f"{row['tensors']} tensors, past = present" if found["ok"] else "DIFFERENT ADDRESSES"
            cells = [f"{row['capacity']:,}", size(row["cache_bytes"]), f"{row['step_us']:.0f}", f"{row['host_us']:.0f}"]
            rows.append([key, *cells, same])
    traffic = results.get("ncu", {})
    for capacity, found in sorted(results.get("traffic", {}).items(), key=lambda item: int(item[0])):
        dram = traffic.get(capacity, {})
        moved = (
            f"DRAM {size(dram['read'])} read, {size(dram['write'])} written" if dram.get("ok") else "ncu: no numbers"
        )
        time = f"{found['step_us']:.1f}" if "step_us" in found else ""
        cache = size(found["cache_bytes"]) if "cache_bytes" in found else ""
        rows.append(["one HqmqAttention, 4 x 1,001 tokens", f"{int(capacity):,}", cache, time, "", moved])
    columns = ("decode step", "capacity", "cache", "us", "host us", "")
    note = "Lengths stay the same while the capacity grows: a copy of the cache would show as its bytes and their time."
    return Sheet("The cache in place", columns, rows, note)


def _diff(results: Results) -> Sheet:
    rows = []
    for key, found in results.get("diff", {}).items():
        document = found.get("document", {})
        if not found["ok"]:
            rows.append([key, "", _passed(found)])
        pairs = [
            (f"{runtime} against {reference}", summary)
            for runtime, values in document.get("runtimes", {}).items()
            for reference, summary in values["logits"].items()
        ]
        if direct := document.get("tensorrt_against_onnxruntime"):
            pairs.append(("tensorrt against onnxruntime", direct["logits"]))
        for name, summary in pairs:
            rows.append([key, name, ", ".join(f"{label} {_number(value)}" for label, value in summary.items())])
    note = "unpacked, same, pinned: PyTorch with a plain cache, with an HqmqCache, with the same cache bytes."
    return Sheet("hqmq-trt diff, 512 + 64 tokens", ("engine", "logits", ""), rows, note)


def _sanitizer(results: Results) -> Sheet:
    rows = []
    for tool, found in results.get("sanitizer", {}).items():
        counts = [str(found.get(key, "")) for key in ("tests", "kernel_reports", "other_reports", "api_reports")]
        rows.append([tool, *counts, found.get("summary", ""), _passed(found)])
    columns = ("compute-sanitizer", "tests", "in our kernels", "in others' kernels", "API calls", "its summary", "")
    return Sheet("Sanitizer", columns, rows)


def _tests(results: Results) -> Sheet:
    rows = []
    for key, found in results.get("tests", {}).items():
        counts = [str(found.get(name, "")) for name in ("passed", "failures", "errors", "skipped")]
        said = "; ".join([found.get("note") or _passed(found), *found.get("said", [])])
        rows.append([key, f"{found['seconds']:.0f}", *counts, ", ".join(found.get("failed", [])), said])
    return Sheet("Tests on the GPU", ("file", "s", "passed", "failed", "errors", "skipped", "which", ""), rows)


def _speed(results: Results) -> Sheet:
    found = results.get("speed", {}).get("measure", {})
    columns, rows = comparison(found.get("rows", []))
    words = {None: "not measured", True: "reached", False: "NOT REACHED"}
    targets = (f"{t['target']}: {_number(t['value'], '.2f')} {words[t['reached']]}" for t in found.get("targets", []))
    return Sheet(f"Decode steps, best first: {found.get('title', '')}", columns, rows, "; ".join([*targets, NOTE]))


def _others(results: Results) -> Sheet:
    rows = [
        [f"{stage} {key}", f"{found['seconds']:.0f} s", _passed(found), str(found.get("speed", ""))]
        for stage in ("build", "convert", "sample", "speed")
        for key, found in results.get(stage, {}).items()
    ]
    return Sheet(
        "Other steps", ("step", "time", "", ""), rows, "sample cpp: its tokens are those of the Python session."
    )


def _failures(results: Results) -> Sheet:
    rows = [
        [f"{stage} {key}", str(found.get("error", ""))[:500]]
        for stage, keys in results.items()
        for key, found in keys.items()
        if not found["ok"]
    ]
    return Sheet("Failures", ("job", "why"), rows)


def _passed(found: Result) -> str:
    return "ok" if found["ok"] else "FAILED"


def texts_markdown(results: Results) -> str:
    """What each engine wrote; PyTorch's words only where they differ."""
    parts = []
    for key, found in results.get("text", {}).items():
        if "text" in found:
            parts.append(f"`{key}`: {_flat(found['text'])}\n")
            if found["text"] != found["torch_text"]:
                parts.append(f"`{key}`, PyTorch: {_flat(found['torch_text'])}\n")
    return "\n".join(["**What was written**", "", *parts]) if parts else ""


def _flat(text: str) -> str:
    return " ".join(text.split())


def _heading(where: dict[str, str]) -> tuple[str, str]:
    date = f"{where['date']} · {where['card']}, driver {where['driver']} · {where['commit']}"
    return date, ", ".join(f"{name} {where[name]}" for name in ("tensorrt", "torch", "onnxruntime", "transformers"))


def print_report(results: Results, where: dict[str, str]) -> None:
    """All tables on the terminal."""
    console = Console(width=150)
    console.print(*_heading(where), sep="\n")
    for sheet in sheets(results):
        console.print(sheet.rich())
    console.print(texts_markdown(results), markup=False, highlight=False)


def write_report(results: Results, where: dict[str, str], output: Path) -> None:
    """Write report.md and report.json; each is complete at any time."""
    heading, versions = _heading(where)
    body = [f"## {heading}", versions, "", *(sheet.markdown() for sheet in sheets(results)), texts_markdown(results)]
    document = json.dumps({"machine": where, "results": results}, indent=1)
    for name, text in (("report.md", "\n".join(body)), ("report.json", document)):
        part = output / f"{name}.part"
        part.write_text(text, encoding="utf-8")
        part.replace(output / name)
