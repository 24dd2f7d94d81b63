"""Figures of benchmarks from kept results: accuracy with its interval, and the paired difference to the reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from hqmq_trt.eval.statistics import Estimate, paired_mean, score_interval, sign_test
from hqmq_trt.eval.store import Record, Store, column, item_name
from hqmq_trt.eval.subject import REFERENCE, Subject
from hqmq_trt.eval.tasks import Task, problem_key


@dataclass(frozen=True)
class TaskResult:
    """One codec on one task (or one group of its items).

    Attributes:
        task, group, metric: what was measured; group is the context of a recall task.
        codec, mode: under what.
        items, skipped: how many were asked, and left out because the context does not hold them.
        score: mean score, 0…1.
        interval: 95 % of it: Wilson's for scores of 0 and 1, else mean ± 1.96 standard errors.
        score_by_sum: choice tasks: accuracy by log-probability without division by length.
        difference: score minus the reference's, paired by item; None without a reference.
        better, worse: items whose score rose and fell.
        sign_p: two-sided sign test of better against worse.
        within: the reference's score lies in `interval`.
        nll: mean -log p of the right answer, nats an item.
        nll_difference: to the reference, paired by item.
        prompt_tokens, coded_tokens: means over items; coded: read from codes by the first answer token.
        stored_bits, paper_bits, tail: see hqmq_trt.eval.subject.Bits.
    """

    task: str
    group: str
    metric: str
    codec: str
    mode: str
    items: int
    skipped: int
    score: float
    interval: tuple[float, float]
    score_by_sum: float | None
    difference: Estimate | None
    better: int
    worse: int
    sign_p: float | None
    within: bool | None
    nll: float
    nll_difference: Estimate | None
    prompt_tokens: float
    coded_tokens: float
    stored_bits: float
    paper_bits: float | None
    tail: int

    @property
    def document(self) -> dict[str, Any]:
        """For JSON; infinite standard errors (a single item) are left to the writer."""
        document = {name: value for name, value in vars(self).items() if not isinstance(value, Estimate)}
        for name, estimate in (("difference", self.difference), ("nll_difference", self.nll_difference)):
            document[name] = None if estimate is None else estimate.mean
            document[f"{name}_standard_error"] = None if estimate is None else estimate.error
        if self.task == "lambada":
            document["perplexity"] = self.perplexity
        return document

    @property
    def perplexity(self) -> float:
        """exp of the mean -log p of an answer (LAMBADA: of a last word)."""
        return math.exp(self.nll)


def summaries(store: Store, subject: Subject, task: Task) -> list[TaskResult]:
    """All codecs that the store has for these problems, this model and runtime, by group, reference first."""
    found = []
    for group in dict.fromkeys(problem.group for problem in task.problems):
        problems = [problem for problem in task.problems if problem.group == group]
        keys = {item_name(problem_key(subject, task, problem)) for problem in problems}
        by_codec: dict[tuple[str, str], dict[Any, Record]] = {}
        for record in store.records(task=task.name):
            name, key = item_name(record["key"]), record["key"]
            if name in keys:
                by_codec.setdefault((key["codec"], key["mode"]), {})[name] = record["value"]
        reference = by_codec.get((REFERENCE, ""))
        results = [
            _summarise(task, group, codec, mode, values, reference) for (codec, mode), values in by_codec.items()
        ]
        found += sorted(results, key=lambda item: (item.codec != REFERENCE, item.mode, item.stored_bits, item.codec))
    return found


def _summarise(
    task: Task, group: str, codec: str, mode: str, values: dict[Any, Record], reference: dict[Any, Record] | None
) -> TaskResult:
    names = sorted(values, key=repr)
    rows = [values[name] for name in names]
    scores = column(rows, "score")
    interval = score_interval(scores, task.binary)
    difference = nll_difference = sign_p = within = None
    better = worse = 0
    if reference is not None and codec != REFERENCE and set(values) <= set(reference):
        exact = [reference[name] for name in names]
        change = scores - column(exact, "score")
        better, worse = int((change > 0).sum()), int((change < 0).sum())
        difference, sign_p = paired_mean(change), sign_test(better, worse)
        nll_difference = paired_mean(column(rows, "nll") - column(exact, "nll"))
        within = interval[0] <= float(column(exact, "score").mean()) <= interval[1]
    papers = [row["paper_bits"] for row in rows]
    return TaskResult(
        task=task.name,
        group=group,
        metric=task.metric,
        codec=codec,
        mode=mode,
        items=len(rows),
        skipped=task.skipped,
        score=float(scores.mean()),
        interval=interval,
        score_by_sum=float(column(rows, "score_by_sum").mean()) if "score_by_sum" in rows[0] else None,
        difference=difference,
        better=better,
        worse=worse,
        sign_p=sign_p,
        within=within,
        nll=float(column(rows, "nll").mean()),
        nll_difference=nll_difference,
        prompt_tokens=float(column(rows, "prompt_tokens").mean()),
        coded_tokens=float(column(rows, "coded_tokens").mean()),
        stored_bits=float(column(rows, "stored_bits").mean()),
        paper_bits=None if None in papers else float(np.mean(papers)),
        tail=max(row["tail"] for row in rows),
    )
