"""Kept results of one or several models, grouped so that only what is comparable stands together.

Records (see hqmq_trt.eval.store) are grouped by model and runtime; perplexities further by text and window length,
tasks by their data, and everything by mode.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.envelope import FP16, OURS, TRIAL, Comparison, Point, compare_envelopes, family
from hqmq_trt.eval.perplexity import TASK as PPL
from hqmq_trt.eval.perplexity import Perplexity, summarise
from hqmq_trt.eval.statistics import Estimate, paired_mean, score_interval
from hqmq_trt.eval.store import FILE, Record, Store, column, item_name
from hqmq_trt.eval.subject import REFERENCE

BUDGETS = (3.0, 5.5)
"""Stored bits between which the envelopes are compared."""


@dataclass(frozen=True)
class Text:
    """Perplexities of one model over one text with windows of one length.

    Attributes:
        title: for headings.
        found: by mode, then by rising bits; the reference (mode empty) first.
        points: by mode: what is drawn and compared; without the reference, fp16, codebooks of other seeds and what
            `apart` names.
        apart: by mode: codecs that saw other windows than most, so that their changes do not compare.
    """

    title: str
    found: tuple[Perplexity, ...]
    points: dict[str, list[Point]]
    apart: dict[str, tuple[str, ...]] = field(default_factory=dict)

    def envelopes(self, mode: str) -> list[Comparison]:
        """Ours beside the baselines, see hqmq_trt.eval.envelope."""
        points = self.points[mode]
        ours = [point for point in points if point.family == OURS]
        return compare_envelopes(ours, [point for point in points if point.family != OURS], *BUDGETS)


@dataclass(frozen=True)
class Score:
    """A codec on a task: mean score in 0…1 with a 95 % interval, and differences to the reference, paired by item.

    The interval is Wilson's where every score is 0 or 1, else mean ± 1.96 standard errors.
    """

    codec: str
    mode: str
    items: int
    score: float
    interval: tuple[float, float]
    difference: Estimate | None
    nll_difference: Estimate | None
    coded_tokens: float
    stored_bits: float


@dataclass(frozen=True)
class TaskRun:
    """One task on one model; `context` None: all items, else those of a recall task with so many tokens."""

    task: str
    context: int | None
    scores: tuple[Score, ...]


@dataclass(frozen=True)
class Run:
    """All results of one model on one runtime.

    Attributes:
        model, sha256, where: as in the records.
        about: what the results were measured with, for instance ``torch 2.9.0``.
        texts, tasks: by text and window length, and by task.
        recall: task to codec (and mode) to (context, depth) to mean score.
    """

    model: str
    sha256: str
    where: str
    about: tuple[str, ...]
    texts: tuple[Text, ...]
    tasks: tuple[TaskRun, ...]
    recall: dict[str, dict[str, dict[tuple[int, float], float]]]


def read_records(folders: Sequence[str | Path]) -> list[Record]:
    """Records of all folders; where two have the same key the later folder's counts.

    Raises:
        HqmqError: a folder without results.
    """
    merged: dict[str, Record] = {}
    for folder in folders:
        if not (Path(folder) / FILE).is_file():
            raise HqmqError(f"{folder}: holds no {FILE}; give a folder that `hqmq-trt eval … --output` wrote")
        for record in Store(folder, read_only=True).records():
            merged[repr(sorted(record["key"].items()))] = record
    if not merged:
        raise HqmqError(f"{', '.join(map(str, folders))}: hold no results yet")
    return list(merged.values())


def runs(records: Iterable[Record], windows: range | None = None) -> list[Run]:
    """Group records by model and runtime, in the order of first appearance.

    Args:
        records: see read_records.
        windows: of perplexities, only these windows count; tasks are not affected. None: all.

    Raises:
        HqmqError: none of the windows was measured, and there are no tasks either.
    """
    records = list(records)
    if windows is not None:
        chosen = [item for item in records if item["key"]["task"] != PPL or item["key"]["item"] in windows]
        if records and not chosen:
            kept = [item["key"]["item"] for item in records]
            raise HqmqError(
                f"none of the windows {windows.start}…{windows.stop - 1} was measured; "
                f"these results hold some of {min(kept)}…{max(kept)}: choose others with --windows"
            )
        records = chosen
    found = []
    for (model, sha256, where), group in _grouped(records, "model", "model_sha256", "where").items():
        perplexity = [record for record in group if record["key"]["task"] == PPL]
        tasks = [record for record in group if record["key"]["task"] != PPL]
        texts = _grouped(perplexity, "text_sha256", "length")
        named = {key: _text_title(model, key, texts, windows) for key in texts}
        found.append(
            Run(
                model,
                sha256,
                where,
                _about(group),
                tuple(_text(named[key], part) for key, part in texts.items()),
                tuple(_task_runs(tasks)),
                _recall(tasks),
            )
        )
    return found


def _about(records: Iterable[Record]) -> tuple[str, ...]:
    pairs = {(name, str(value)) for record in records for name, value in record.get("about", {}).items()}
    return tuple(f"{name} {value}" for name, value in sorted(pairs) if name != "seconds")


def _grouped(records: Iterable[Record], *fields: str) -> dict[tuple[Any, ...], list[Record]]:
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(record["key"].get(name) for name in fields), []).append(record)
    return groups


def _text_title(model: str, key: tuple[Any, ...], texts: Iterable[tuple[Any, ...]], windows: range | None) -> str:
    several = len({text for text, _ in texts}) > 1
    which = "" if windows is None else f"{windows.start}…{windows.stop - 1} "
    return f"{model}, windows {which}of {key[1]} tokens" + (f", text {key[0][:8]}" if several else "")


def _text(title: str, records: Sequence[Record]) -> Text:
    groups = _grouped(records, "codec", "mode")
    reference = groups.get((REFERENCE, ""), [])
    found = [summarise(group, reference) for group in groups.values()]
    found.sort(key=lambda item: (item.mode, item.codec != REFERENCE, item.stored_bits, item.codec))
    points: dict[str, list[Point]] = {}
    for item in found:
        if item.change is not None and item.mode and family(item.codec) not in (FP16, TRIAL) and "#" not in item.codec:
            nll = {record["key"]["item"]: record["value"]["nll"] for record in groups[item.codec, item.mode]}
            point = Point(item.codec, item.stored_bits, 100 * item.change.mean, 100 * item.change.error, nll)
            points.setdefault(item.mode, []).append(point)
    apart = {}
    for mode, items in points.items():
        # Most codecs' windows; of equally frequent ones the larger set.
        common = Counter(frozenset(item.nll) for item in items).most_common()
        usual = max(common, key=lambda pair: (pair[1], len(pair[0])))[0]
        points[mode] = [item for item in items if set(item.nll) == usual]
        apart[mode] = tuple(item.codec for item in items if set(item.nll) != usual)
    return Text(title, tuple(found), points, apart)


def _task_runs(records: Sequence[Record]) -> Iterable[TaskRun]:
    for (task, _, context), group in _grouped(records, "task", "data_sha256", "context").items():
        codecs = _grouped(group, "codec", "mode")
        reference = {item_name(record["key"]): record["value"] for record in codecs.get((REFERENCE, ""), [])}
        scores = [_score(codec, mode, part, reference) for (codec, mode), part in codecs.items()]
        scores.sort(key=lambda item: (item.mode, item.codec != REFERENCE, item.stored_bits, item.codec))
        yield TaskRun(task, context, tuple(scores))


def _score(codec: str, mode: str, records: Sequence[Record], reference: Mapping[str, Record]) -> Score:
    values = {item_name(record["key"]): record["value"] for record in records}
    scores = column(values.values(), "score")
    difference = nll = None
    if codec != REFERENCE and reference and set(values) <= set(reference):
        exact = [reference[name] for name in values]
        difference = paired_mean(scores - column(exact, "score"))
        nll = paired_mean(column(values.values(), "nll") - column(exact, "nll"))
    bits, coded = (float(column(values.values(), name).mean()) for name in ("stored_bits", "coded_tokens"))
    return Score(
        codec,
        mode,
        len(scores),
        float(scores.mean()),
        score_interval(scores, set(scores.tolist()) <= {0.0, 1.0}),
        difference,
        nll,
        coded,
        bits,
    )


def _recall(records: Sequence[Record]) -> dict[str, dict[str, dict[tuple[int, float], float]]]:
    found: dict[str, dict[str, dict[tuple[int, float], float]]] = {}
    placed = [record for record in records if "context" in record["key"] and "depth" in record["key"]]
    for (task, codec, mode, context, depth), group in _grouped(
        placed, "task", "codec", "mode", "context", "depth"
    ).items():
        cells = found.setdefault(task, {}).setdefault(f"{codec} ({mode})" if mode else codec, {})
        cells[context, float(depth)] = float(column((record["value"] for record in group), "score").mean())
    return found
