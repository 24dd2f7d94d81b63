"""What benchmarks/gpu_report.py reads from the output of other programs."""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path
from typing import Any

Result = dict[str, Any]


def last_words(output: str, most: int = 600) -> str:
    """The last lines of an output that say something, in one line; of a traceback, the exception."""
    lines = [line.strip() for line in output.splitlines() if line.strip(" ^~=|")]
    words = [line for line in lines[-12:] if not line.startswith(("File ", "raise ", "^", "SKIPPED"))][-3:]
    return " | ".join(words)[-most:]


def read_junit(path: Path) -> Result:
    """Counts of a junit report, and the properties its tests recorded, by test function."""
    root = ElementTree.parse(path).getroot()
    suites = [root] if root.tag == "testsuite" else list(root)
    counts = {name: sum(int(s.get(name, 0)) for s in suites) for name in ("tests", "failures", "errors", "skipped")}
    sums: dict[str, dict[str, float]] = {}
    failed = []
    for case in root.iter("testcase"):
        name = case.get("name", "")
        if case.find("failure") is not None or case.find("error") is not None:
            failed.append(name)
        kind = re.search(r"torch\.(\w+)", name)
        group = f"{name.split('[')[0]} {kind[1] if kind else ''}".strip()
        for entry in case.iter("property"):
            label, value = entry.get("name", ""), float(entry.get("value", "nan"))
            into = sums.setdefault(group, {})
            into[label] = max(into.get(label, 0.0), value) if "error" in label else into.get(label, 0.0) + value
    counts["passed"] = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    return {**counts, "failed": failed[:40], "measured": sums, "ok": not failed and counts["passed"] > 0}


def read_sanitizer(output: str, code: int) -> Result:
    """Errors by whose they are: of kernels (ours or not, by name) and of API calls; and whether the tests passed."""
    lines = [line.removeprefix("=========").strip() for line in output.splitlines() if line.startswith("=========")]
    summary = next((line for line in reversed(lines) if "SUMMARY" in line), "")
    found: Result = {"summary": summary}
    # Every report says in its next lines "at <kernel>+0x...": the first such line names the kernel.
    start = re.compile(r"(Invalid __\w+__|Uninitialized __\w+__|Program hit|Error: Race|Warning: Race|Misaligned)")
    ours = others = api = 0
    for position, line in enumerate(lines):
        if not (match := start.search(line)):
            continue
        if match[1] == "Program hit":
            api += 1
            continue
        where = " ".join(lines[position : position + 4])
        if "hqmq" in where:
            ours += 1
        else:
            others += 1
    # pytest's last line, such as "1 failed, 2 passed in 3.00s"
    tests = next((line for line in output.splitlines() if re.match(r"\d.* passed.* in [\d.]+s", line)), "")
    passed, failed = re.search(r"(\d+) passed", tests), re.search(r"(failed|error)", tests)
    found |= {"kernel_reports": ours, "other_reports": others, "api_reports": api}
    found["tests"] = int(passed[1]) if passed else 0
    found["ok"] = bool(summary and passed) and not failed and not ours
    return found


def read_ncu(output: str, code: int) -> Result:
    """Bytes of DRAM traffic by metric, summed over what ncu profiled (one graph), from its CSV."""
    units = {"byte": 1.0, "Kbyte": 1e3, "Mbyte": 1e6, "Gbyte": 1e9}
    found: Result = {}
    for line in output.splitlines():
        match = re.search(r'"dram__bytes_(read|write)\.sum","(\w+)","([\d.,]+)"', line)
        if match:
            value = float(match[3].replace(",", "")) * units[match[2]]
            found[match[1]] = found.get(match[1], 0.0) + value
    if "ERR_NVGPUCTRPERM" in output:
        return {"ok": False, "error": "this machine does not let ncu read performance counters"}
    return {"ok": {"read", "write"} <= found.keys(), **found}


def read_last_json(output: str, code: int) -> Result:
    """The JSON object on the last line that is one."""
    for line in reversed(output.splitlines()):
        if line.startswith("{"):
            return {"ok": code == 0, **json.loads(line)}
    return {"ok": False}


def read_speed(table: Path, output: str, code: int) -> Result:
    """What benchmarks/engine.py wrote to its engine.json: also of a run that was ended before its last case."""
    document = json.loads(table.read_text(encoding="utf-8"))
    return {"ok": code == 0, "rows": document["rows"], "targets": document["targets"], "title": document["title"]}


def read_words(output: str, code: int) -> Result:
    """What a program for people said, in one line."""
    return {"ok": code == 0, "speed": " ".join(output.split())[:400]}


def read_document(output: str, code: int) -> Result:
    """The one JSON document of a command with --json, after whatever was written to stderr."""
    start = output.find("\n{") + 1 if not output.startswith("{") else 0
    document, _ = json.JSONDecoder().raw_decode(output[start:])
    return {"ok": code == 0, "document": document}
