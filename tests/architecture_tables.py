"""The generated tables of docs/models.md: written from runs of tests.architecture_runs and from TensorRT engines."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tests.architectures import BY_NAME, EXPORTED, REFUSED

DOCUMENT = Path(__file__).parents[1] / "docs" / "models.md"
MODES = ("fused", "qdq")
VERDICTS = [f"{target}, {mode}" for target in ("ONNX Runtime", "TensorRT 10.6 parser") for mode in MODES]
_ENGINES = [f"TensorRT engine, {mode}" for mode in MODES]
_MEASURED = ["fp16: largest error of a logit", "hq4: mean KL"]
_NOT_RUN = "not run"

Record = dict[str, Any]
"""One engine, a line of benchmarks/architectures_trt.py's engines.jsonl."""


def read_records(path: Path) -> list[Record]:
    """The records of engines.jsonl; the last of each case.

    Raises:
        ValueError: a line that is none.
    """
    found: dict[str, Record] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            record = json.loads(line)
            found[record["case"]] = record
            _ = [record[key] for key in ("road", "name", "mode", "outcome")]
        except (ValueError, KeyError, TypeError):
            raise ValueError(f"{path}, line {number} is not the record of an engine: run it again") from None
    return list(found.values())


def engine_cell(records: Iterable[Record], wanted: Iterable[str]) -> str:
    """One cell: what became of the engines of one model, road and mode.

    Args:
        records: of all engines.
        wanted: ids of the cases that belong to the cell.
    """
    ids = list(wanted)
    found = [record for record in records if record["case"] in ids]
    if not found:
        return _NOT_RUN
    failed = sorted({f"{_variant(r)}: {r['stage']}" for r in found if r["outcome"] != "passes"})
    if failed:
        return f"fails ({', '.join(failed)})"
    versions = ", ".join(sorted({record["tensorrt"] for record in found}))
    return f"passes ({versions})" if len(found) == len(ids) else f"passes {len(found)} of {len(ids)} ({versions})"


def _variant(record: Record) -> str:
    return f"{record['dtype']} {record['scheme'].split('@')[0]}"


class Document:
    """docs/models.md, whose generated sections stand between comments ``NAME: begin`` and ``NAME: end``."""

    def __init__(self, path: Path = DOCUMENT) -> None:
        self.path = path
        self.text = path.read_text(encoding="utf-8")

    def section(self, name: str) -> str:
        """What a section holds."""
        return self.text.split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0]

    def replace(self, name: str, content: str) -> None:
        """Put something else into a section, and save."""
        begin, end = (f"<!-- {name}: {place} -->" for place in ("begin", "end"))
        before, rest = self.text.split(begin)
        self.text = f"{before}{begin}\n{content}\n{end}{rest.split(end)[1]}"
        self.path.write_text(self.text, encoding="utf-8")

    def cells(self) -> dict[str, list[str]]:
        """The cells after the name, by architecture."""
        lines = [line[2:-2].split(" | ") for line in self.section("architectures").splitlines() if line.startswith("|")]
        return {name: cells for name, *cells in lines if name in BY_NAME}

    def verdicts(self) -> dict[str, list[str]]:
        """What tests of this machine find, by architecture: what the model has, then VERDICTS or the refusal."""
        return {name: cells[: 1 + len(VERDICTS)] for name, cells in self.cells().items()}

    def write_runs(self, found: dict[str, tuple[list[str], list[str]]]) -> None:
        """Write what runs found; engines and other architectures stay.

        Args:
            found: by architecture, the cells as `verdicts` gives them and the measured numbers ([] if refused).
        """
        cells = self.cells()
        for name, (verdicts, measured) in found.items():
            engines = cells.get(name, [])[len(verdicts) : len(verdicts) + len(_ENGINES)] or [_NOT_RUN] * len(_ENGINES)
            cells[name] = [*verdicts, *(engines if measured else []), *measured]
        self._write_architectures(cells)

    def write_engines(self, records: Sequence[Record], wanted: dict[tuple[str, str, str], list[str]]) -> None:
        """Write what became of engines, in the place of what earlier runs said of them.

        Args:
            records: see read_records.
            wanted: ids of cases by road, name and mode.
        """
        if strange := {r["case"] for r in records} - {case for ids in wanted.values() for case in ids}:
            raise ValueError(f"no such engine: {', '.join(sorted(strange))}")
        cells = self.cells()
        first = 1 + len(VERDICTS)
        for architecture in EXPORTED:
            made = [engine_cell(records, wanted["hugging-face", architecture.name, mode]) for mode in MODES]
            cells[architecture.name][first : first + len(made)] = made
        self._write_architectures(cells)
        lines = _head(["ONNX file", "TensorRT engine, fused"])
        lines += [_row([name, engine_cell(records, ids)]) for (road, name, _), ids in wanted.items() if road == "onnx"]
        failed = [record for record in records if record["outcome"] != "passes"]
        if failed:
            lines += ["", "Engines that fail:", ""]
            lines += [f"- {r['name']}, {r['mode']}, {_variant(r)}: {r['stage']}: {_reason(r)}" for r in failed]
        self.replace("engines", "\n".join(lines))

    def _write_architectures(self, cells: dict[str, list[str]]) -> None:
        lines = _head(["Architecture", "What the test has", *VERDICTS, *_ENGINES, *_MEASURED])
        lines += [_row([architecture.name, *cells[architecture.name]]) for architecture in EXPORTED]
        lines += ["", *_head(["Refused", "What it is", "Why: the exporter's message"])]
        lines += [_row([architecture.name, *cells[architecture.name]]) for architecture in REFUSED]
        self.replace("architectures", "\n".join(lines))


def _reason(record: Record) -> str:
    nodes = [f"{node['node']} ({node['operator']}): {node['text']}" for node in record.get("unsupported", [])]
    return "; ".join(nodes) or record["error"]


def _head(cells: list[str]) -> list[str]:
    return [_row(cells), _row(["---"] * len(cells))]


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"
