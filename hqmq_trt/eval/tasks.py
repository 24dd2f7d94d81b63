"""Benchmarks measured item by item under a codec: what is asked, what counts as right, and what came out.

Every item runs through Subject with a cache of its own, the same items for every codec, so that differences are
paired. An item gives a score in 0…1 and -log p of the right answer given the prompt, which still tells codecs apart
where a small model answers nothing right.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.store import Record, Store
from hqmq_trt.eval.subject import Bits, Scores, Subject
from hqmq_trt.eval.task_data import SPECS, Item, Items

NEW_TOKENS = 256
"""Tokens that GSM8K's answers may have."""
_STOPS = ("\n\n", "Question:")
"""Where an answer after worked examples ends; the model would go on with a question of its own."""
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_BATCH_TOKENS = 1024
"""Tokens of a sequence that --batch counts with; longer ones run fewer at a time."""


@dataclass(frozen=True)
class Problem:
    """An item as tokens.

    Attributes:
        key: names it within its task: ``item``, and ``context`` and ``depth`` where there are any.
        kind: ``choice``, ``last_word`` or ``generate``.
        sequences: prompt and continuation, one a choice.
        starts: index of each sequence's first token of the continuation, at least 1.
        characters: of each continuation, its first space left out.
        gold: index of the right continuation.
        group: items summarised together; empty: all of the task.
        new_tokens: most tokens to generate after the prompt; 0: none.
        grade: score 0…1 of a generated text.
        stops: texts at which an answer is cut.
        facts: more to keep with the result.
    """

    key: Record
    kind: str
    sequences: tuple[tuple[int, ...], ...]
    starts: tuple[int, ...]
    characters: tuple[int, ...]
    gold: int = 0
    group: str = ""
    new_tokens: int = 0
    grade: Callable[[str], float] | None = None
    stops: tuple[str, ...] = ()
    facts: Record = field(default_factory=dict)

    @property
    def prompt(self) -> tuple[int, ...]:
        """Tokens before the answer."""
        return self.sequences[self.gold][: self.starts[self.gold]]

    @property
    def tokens(self) -> int:
        """Tokens that the model's context must hold."""
        return max(*(len(row) for row in self.sequences), len(self.prompt) + self.new_tokens)


@dataclass(frozen=True)
class Task:
    """Problems that make one figure (or one a group).

    Attributes:
        name: of the command line.
        problems: in drawing order.
        data_sha256: what they were made of.
        metric: what the score is.
        binary: scores are 0 or 1.
        skipped: items left out because the model's context does not hold them.
    """

    name: str
    problems: tuple[Problem, ...]
    data_sha256: str
    metric: str
    binary: bool = True
    skipped: int = 0


def leading_tokens(tokenizer: Any) -> list[int]:
    """The beginning-of-sequence token in a list where the tokenizer puts one before a text, else empty."""
    begin = tokenizer("a")["input_ids"][0]
    return [begin] if begin == tokenizer.bos_token_id else []


def encode_pair(tokenizer: Any, context: str, continuation: str, leading: Sequence[int]) -> tuple[tuple[int, ...], int]:
    """Tokens of `leading`, context and continuation, and the index of the continuation's first token.

    As lm-evaluation-harness does: both are tokenised as one text, spaces at the context's end count as the
    continuation's, and the continuation is what the context's own tokens leave over.
    """
    text = context + continuation
    context = context.rstrip()
    whole = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    before = tokenizer(context, add_special_tokens=False, verbose=False)["input_ids"]
    # A merge across the border may leave no token over; the last one then holds the answer.
    start = len(leading) + min(len(before), len(whole) - 1)
    if start < 1:
        raise HqmqError(f"the prompt {context!r} has no token before its answer; give a longer one")
    return (*leading, *whole), start


def build_task(items: Items, tokenizer: Any, max_context: int) -> Task:
    """Tokenise items of a benchmark.

    Args:
        items: of hqmq_trt.eval.task_data.
        tokenizer: of transformers.
        max_context: tokens the model holds, 0: unknown. Longer items are left out and counted.

    Raises:
        HqmqError: no item fits.
    """
    spec, leading = SPECS[items.task], leading_tokens(tokenizer)
    problems = [_problem(item, spec.kind, tokenizer, leading) for item in items.items]
    kept = tuple(problem for problem in problems if not max_context or problem.tokens <= max_context)
    if not kept:
        shortest = min(problem.tokens for problem in problems)
        raise HqmqError(
            f"{items.task}: its {spec.shots}-shot prompts need {shortest} tokens and more, the model holds "
            f"{max_context}; use a model of longer context"
        )
    return Task(items.task, kept, items.sha256, spec.metric, skipped=len(problems) - len(kept))


def _problem(item: Item, kind: str, tokenizer: Any, leading: Sequence[int]) -> Problem:
    pairs = [encode_pair(tokenizer, item.context, text, leading) for text in item.continuations]
    number = kind == "number"
    return Problem(
        key={"item": item.number, **({"new_tokens": NEW_TOKENS} if number else {})},
        kind="generate" if number else kind,
        sequences=tuple(tokens for tokens, _ in pairs),
        starts=tuple(start for _, start in pairs),
        characters=tuple(max(len(text.removeprefix(" ")), 1) for text in item.continuations),
        gold=item.gold,
        new_tokens=NEW_TOKENS if number else 0,
        grade=(lambda text: float(last_number(text) == last_number(item.answer))) if number else None,
        stops=_STOPS if number else (),
    )


def last_number(text: str) -> Decimal | None:
    """The last number in a text (``$1,234.50.`` is 1234.5), or None."""
    found = _NUMBER.findall(text)
    return Decimal(found[-1].replace(",", "")) if found else None


def cut(text: str, stops: Sequence[str]) -> str:
    """`text` up to the first of `stops`; leading white space does not count as a stop."""
    text = text.lstrip()
    return text[: min((text.find(stop) for stop in stops if stop in text), default=len(text))]


def coded_tokens(prompt: int, total: int, bits: Bits, codec_mode: str) -> int:
    """How many tokens the first answer token's attention reads from codes.

    Args:
        prompt, total: tokens of the prompt, and with the answer.
        bits: its `tail` is the page; 0: codecs that code every token.
        codec_mode: ``fused``, ``qdq`` (the page that fills during the answer is read decoded too) or empty (reference).
    """
    if not codec_mode:
        return 0
    if not bits.tail:
        return prompt
    if codec_mode == "qdq":
        return min(prompt, total // bits.tail * bits.tail)
    return (prompt - 1) // bits.tail * bits.tail


def problem_key(subject: Subject, task: Task, problem: Problem) -> Record:
    """What tells the measurement of one item from all others."""
    return {
        "task": task.name,
        "model": subject.model_name,
        "model_sha256": subject.model_sha256,
        "codec": subject.codec,
        "mode": subject.mode,
        "where": subject.where,
        "data_sha256": task.data_sha256,
        **problem.key,
    }


def measure(
    subject: Subject,
    task: Task,
    store: Store,
    about: Record,
    batch: int = 8,
    on_items: Callable[[int], None] = lambda count: None,
) -> None:
    """Measure the problems that the store does not have yet.

    Args:
        subject: model and codec.
        task: what to ask.
        store: where results are kept; each is on disk before the next batch starts.
        about: circumstances, kept with each result.
        batch: sequences of up to 1024 tokens that run together; fewer when longer.
        on_items: told how many more items are done.
    """
    if batch < 1:
        raise HqmqError(f"--batch {batch} runs nothing; use 1 or more")
    if subject.mode == "qdq":
        batch = 1  # A padded batch would count padding into pages in this mode.
    circumstances = dict(subject.circumstances)
    waiting = [p for p in task.problems if store.get(problem_key(subject, task, p), circumstances) is None]
    on_items(len(task.problems) - len(waiting))
    for group in _groups(waiting, batch):
        start = time.perf_counter()
        values = _measure_group(subject, group, batch)
        seconds = round((time.perf_counter() - start) / len(group), 3)
        for problem, value in zip(group, values, strict=True):
            store.add(problem_key(subject, task, problem), value, {**about, **circumstances, "seconds": seconds})
        on_items(len(group))


def _rows(longest: int, batch: int) -> int:
    """Sequences of `longest` tokens that run together."""
    return max(1, min(batch, batch * _BATCH_TOKENS // longest))


def _groups(problems: Sequence[Problem], batch: int) -> Iterator[list[Problem]]:
    """Problems that run together: longest first, which pads least and runs out of memory at once or not at all."""
    group: list[Problem] = []
    rows = 0
    for problem in sorted(problems, key=lambda problem: -problem.tokens):
        if group and rows + len(problem.sequences) > _rows(group[0].tokens, batch):
            yield group
            group, rows = [], 0
        group.append(problem)
        rows += len(problem.sequences)
    if group:
        yield group


def _measure_group(subject: Subject, group: Sequence[Problem], batch: int) -> list[Record]:
    rows = _rows(max(problem.tokens for problem in group), batch)
    sequences = [row for problem in group for row in problem.sequences]
    scores: list[Scores] = []
    for start in range(0, len(sequences), rows):
        scores += subject.score(sequences[start : start + rows])
    bits = subject.bits()
    asked = [problem for problem in group if problem.new_tokens]
    texts: dict[int, str] = {}
    for start in range(0, len(asked), rows):
        part = asked[start : start + rows]
        made = subject.generate([problem.prompt for problem in part], max(problem.new_tokens for problem in part))
        for problem, tokens in zip(part, made, strict=True):
            text = subject.tokenizer.decode(tokens[: problem.new_tokens], skip_special_tokens=True)
            texts[id(problem)] = cut(text, problem.stops)
    found = iter(scores)
    return [
        _value(problem, [next(found) for _ in problem.sequences], texts.get(id(problem)), bits, subject.mode)
        for problem in group
    ]


def _value(problem: Problem, scores: Sequence[Scores], text: str | None, bits: Bits, mode: str) -> Record:
    """What came out of one problem."""
    # nll[i] belongs to token i + 1.
    nll = [float(s.nll[start - 1 :].sum()) for s, start in zip(scores, problem.starts, strict=True)]
    gold, prompt, total = problem.gold, len(problem.prompt), len(problem.sequences[problem.gold])
    value: Record = {
        "nll": nll[gold],
        "nll_tokens": total - prompt,
        "prompt_tokens": prompt,
        "coded_tokens": coded_tokens(prompt, total, bits, mode),
        "stored_bits": bits.stored,
        "paper_bits": bits.paper,
        "tail": bits.tail,
        **problem.facts,
    }
    if problem.kind == "choice":
        per_character = [n / c for n, c in zip(nll, problem.characters, strict=True)]
        value["score"] = float(per_character.index(min(per_character)) == gold)
        value["score_by_sum"] = float(nll.index(min(nll)) == gold)
        value["choices_nll"] = nll
    elif problem.kind == "last_word":
        value["score"] = float(bool(scores[gold].greedy[prompt - 1 :].all()))
    else:
        assert problem.grade is not None
        assert text is not None
        value["score"], value["text"] = problem.grade(text), text
    return value
