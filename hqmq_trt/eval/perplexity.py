"""Perplexity over windows of a text.

A window is `length` consecutive tokens, windows do not overlap, and each starts with an empty cache; its tokens
1…length-1 are predicted. Where the tokenizer puts a beginning-of-sequence token before a text, that token takes the
place of a window's first one (as llama.cpp does), since such models are lost without it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.digests import text_digest
from hqmq_trt.eval.statistics import Estimate, paired_mean
from hqmq_trt.eval.store import Record, Store
from hqmq_trt.eval.subject import REFERENCE, Subject

TASK = "ppl"


@dataclass(frozen=True)
class Windows:
    """Windows of a tokenised text.

    Attributes:
        numbers: which windows of the text.
        tokens: one row of `length` token ids each.
        length: tokens of a window.
        text_sha256: digest of the whole text.
    """

    numbers: tuple[int, ...]
    tokens: tuple[tuple[int, ...], ...]
    length: int
    text_sha256: str


def parse_range(text: str) -> range:
    """``20`` → 0…19, ``100:120`` → 100…119."""
    first, colon, last = text.partition(":")
    try:
        numbers = range(int(first), int(last)) if colon else range(int(first))
    except ValueError:
        numbers = range(0)
    if not len(numbers) or numbers.start < 0:
        raise HqmqError(f"--windows {text}: write a number (20) or a range (100:120)")
    return numbers


def read_windows(file: str | Path, tokenizer: Any, numbers: range, length: int) -> Windows:
    """Cut windows from a text file.

    Raises:
        HqmqError: an empty or too short text, or a length below 2.
    """
    if length < 2:
        raise HqmqError(f"windows of {length} tokens predict nothing; use --length 2 or more")
    try:
        text = Path(file).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise HqmqError(f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})") from error
    if not text.strip():
        raise HqmqError(f"{file}: is empty; give a text of at least {length} tokens")
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    held = len(ids) // length
    if numbers.stop > held:
        raise HqmqError(
            f"{file}: {len(ids)} tokens make {held} windows of {length}; windows {numbers.start}…{numbers.stop - 1} "
            "were asked for: give a longer text, fewer --windows or a smaller --length"
        )
    rows = [ids[i * length : (i + 1) * length] for i in numbers]
    begin = tokenizer("a")["input_ids"][0]
    if begin == tokenizer.bos_token_id:
        rows = [[begin, *row[1:]] for row in rows]
    return Windows(tuple(numbers), tuple(tuple(row) for row in rows), length, text_digest(text))


def window_key(subject: Subject, windows: Windows, number: int) -> Record:
    """What tells the measurement of one window from all others."""
    return {
        "task": TASK,
        "model": subject.model_name,
        "model_sha256": subject.model_sha256,
        "codec": subject.codec,
        "mode": subject.mode,
        "where": subject.where,
        "text_sha256": windows.text_sha256,
        "length": windows.length,
        "item": number,
    }


def measure(
    subject: Subject,
    windows: Windows,
    store: Store,
    about: Record,
    on_window: Callable[[], None] = lambda: None,
) -> None:
    """Measure the windows that the store does not have yet."""
    for number, row in zip(windows.numbers, windows.tokens, strict=True):
        key = window_key(subject, windows, number)
        if store.get(key, dict(subject.circumstances)) is None:
            start = time.perf_counter()
            nll = float(subject.score([row])[0].nll.mean())
            bits = subject.bits()
            seconds = round(time.perf_counter() - start, 3)
            value = {"nll": nll, "stored_bits": bits.stored, "paper_bits": bits.paper, "tail": bits.tail}
            store.add(key, value, {**about, **subject.circumstances, "seconds": seconds})
        on_window()


@dataclass(frozen=True)
class Perplexity:
    """Perplexity of one codec beside the reference.

    Attributes:
        codec, mode: what was measured.
        windows: how many.
        perplexity: exp of the mean -log p over all predicted tokens.
        change: relative to the reference, 0.01 is 1 % worse; paired by window; None without a reference.
        stored_bits, paper_bits: an element, mean over the windows (see subject.Bits).
    """

    codec: str
    mode: str
    windows: int
    perplexity: float
    change: Estimate | None
    stored_bits: float
    paper_bits: float | None
    tail: int

    @property
    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "codec": self.codec,
            "mode": self.mode,
            "windows": self.windows,
            "perplexity": self.perplexity,
            "change": None if self.change is None else self.change.mean,
            "change_standard_error": None if self.change is None else self.change.error,
            "stored_bits": self.stored_bits,
            "paper_bits": self.paper_bits,
            "tail_tokens": self.tail,
        }


def summarise(records: Sequence[Record], reference: Sequence[Record]) -> Perplexity:
    """Perplexity of the records of one codec; `reference` may hold other windows as well."""
    values = {record["key"]["item"]: record["value"] for record in records}
    exact = {record["key"]["item"]: record["value"]["nll"] for record in reference}
    nll = np.array([values[item]["nll"] for item in sorted(values)])
    change = None
    if exact and set(values) <= set(exact):
        difference = paired_mean(nll - np.array([exact[item] for item in sorted(values)]))
        # The error of exp(x) - 1 is exp(x) times that of x.
        change = Estimate(math.expm1(difference.mean), math.exp(difference.mean) * difference.error, difference.count)
    first = records[0]
    papers = [value["paper_bits"] for value in values.values()]
    return Perplexity(
        first["key"]["codec"],
        first["key"]["mode"],
        len(nll),
        math.exp(nll.mean()),
        change,
        float(np.mean([value["stored_bits"] for value in values.values()])),
        None if None in papers else float(np.mean(papers)),
        max(value["tail"] for value in values.values()),
    )


def same_run(record: Record, other: Record) -> bool:
    """Whether two records are of one model, text and window length, on one runtime."""
    fields = ("task", "model_sha256", "model", "text_sha256", "length", "where")
    return all(record["key"].get(field) == other["key"].get(field) for field in fields)


def summaries(store: Store, subject: Subject, windows: Windows) -> list[Perplexity]:
    """All codecs that the store has for this model, text, length and runtime, restricted to these windows."""
    sample = {"key": window_key(subject, windows, 0)}
    chosen = set(windows.numbers)
    groups: dict[tuple[str, str], list[Record]] = {}
    for record in store.records(task=TASK):
        key = record["key"]
        if key["item"] in chosen and same_run(record, sample):
            groups.setdefault((key["codec"], key["mode"]), []).append(record)
    reference = groups.get((REFERENCE, ""), [])
    found = [summarise(records, reference) for records in groups.values()]
    return sorted(found, key=lambda item: (item.mode, item.stored_bits, item.codec))
