"""Recall from long prompts: a needle in a haystack, and variable tracking after RULER (arXiv 2404.06654).

Prompts are made here from a seed and a filler text. Each fills its context up to a sentence of the filler. The answer
is begun for the model, as RULER does, so that also models without instruction tuning answer at once.
"""

from __future__ import annotations

import random
import re
import string
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import accumulate
from pathlib import Path
from typing import Any

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.digests import text_digest
from hqmq_trt.eval.tasks import Problem, Task, encode_pair, leading_tokens

RECALL_TASKS = ("needle", "tracking")
DEPTHS = (0, 25, 50, 75, 100)
"""Where the needle is: percent of the filler before it."""
DEFAULT_CONTEXTS = (1024, 2048, 4096)
CHAINS, HOPS = 2, 4
"""Chains of assignments, one of which is asked for, and copies in each (RULER's own setting has one chain)."""
_NEEDLE_TOKENS, _TRACKING_TOKENS = 16, 48
_VERSION = 1
"""Raised when the same seed makes other prompts: results of different versions are never compared."""
# fmt: off
_CITIES = (
    "Accra", "Athens", "Auckland", "Bergen", "Bogota", "Boston", "Cairo", "Chicago", "Dakar", "Dublin", "Geneva",
    "Hanoi", "Havana", "Helsinki", "Jakarta", "Kyoto", "Lagos", "Lima", "Lisbon", "Lyon", "Madrid", "Manila", "Mumbai",
    "Nairobi", "Oslo", "Prague", "Quito", "Riga", "Rome", "Seoul", "Sydney", "Toronto", "Vienna", "Warsaw",
)
# fmt: on
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
_MOST_WORDS = 60
"""A longer sentence is cut there, so that contexts fill evenly from any text."""


@dataclass(frozen=True)
class Filler:
    """Sentences to hide things in.

    Attributes:
        sentences: at least one; used again from the start where a context needs more.
        sha256: digest of the text.
    """

    sentences: tuple[str, ...]
    sha256: str


def read_filler(path: str | Path | None = None) -> Filler:
    """Sentences of a UTF-8 text; None: the sample that comes with the package (about 1000 words).

    Raises:
        HqmqError: the text cannot be read or is empty.
    """
    if path is None:
        text = resources.files("hqmq_trt").joinpath("data/sample.txt").read_text(encoding="utf-8")
    else:
        try:
            text = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise HqmqError(f"--text {path}: cannot be read as UTF-8 text ({error})") from None
    parts = [part.split() for part in _SENTENCE_END.split(text)]
    sentences = tuple(
        " ".join(words[i : i + _MOST_WORDS]) for words in parts for i in range(0, len(words), _MOST_WORDS)
    )
    if not sentences:
        raise HqmqError(f"--text {path}: is empty; give some pages of plain prose")
    return Filler(sentences, text_digest(text))


@dataclass(frozen=True)
class Riddle:
    """What is hidden and asked, before it is put into a filler.

    Attributes:
        introduction, question: text before and after the filler.
        hidden: sentences to hide, in order.
        places: for each, the share of the filler before it, 0…1, not falling.
        begun: the answer's beginning, given to the model.
        answer: what should follow.
        grade: score 0…1 of what did.
    """

    introduction: str
    question: str
    hidden: tuple[str, ...]
    places: tuple[float, ...]
    begun: str
    answer: str
    grade: Callable[[str], float]


def needle(rng: random.Random, depth: int) -> Riddle:
    """A 7-digit number of a city, hidden at `depth` percent (0: before the filler, 100: after it)."""
    city, number = rng.choice(_CITIES), str(rng.randrange(1_000_000, 10_000_000))
    return Riddle(
        introduction="A special magic number is hidden within the following text. Make sure to memorize it. "
        "I will quiz you about the number afterwards.",
        question=f"What is the special magic number for {city} mentioned in the provided text?",
        hidden=(f"The special magic number for {city} is {number}.",),
        places=(depth / 100,),
        begun=f"The special magic number for {city} mentioned in the provided text is",
        answer=f" {number}",
        grade=lambda text: float(number in text.replace(",", "")),
    )


def tracking(rng: random.Random, chains: int = CHAINS, hops: int = HOPS) -> Riddle:
    """Chains ``VAR A = 12345``, ``VAR B = VAR A``, …, each in order at random places; the first chain is asked for."""
    names: list[str] = []
    while len(names) < chains * (hops + 1):
        name = "".join(rng.choices(string.ascii_uppercase, k=5))
        if name not in names:
            names.append(name)
    values = [str(value) for value in rng.sample(range(10_000, 100_000), chains)]
    placed: list[tuple[float, str]] = []
    for chain, value in enumerate(values):
        own = names[chain * (hops + 1) : (chain + 1) * (hops + 1)]
        sources = [value, *(f"VAR {name}" for name in own)]
        lines = [f"VAR {name} = {source}." for name, source in zip(own, sources, strict=False)]
        placed += zip(sorted(rng.random() for _ in lines), lines, strict=True)
    placed.sort()
    asked = names[: hops + 1]
    return Riddle(
        introduction="Memorize and track the chains of variable assignments hidden in the following text.",
        question=f"Find all variables that are assigned the value {values[0]} in the text above.",
        hidden=tuple(line for _, line in placed),
        places=tuple(place for place, _ in placed),
        begun=f"According to the chains of variable assignments in the text above, {len(asked)} variables are "
        f"assigned the value {values[0]}, they are:",
        answer=" " + ", ".join(asked),
        grade=lambda text: sum(name in text for name in asked) / len(asked),
    )


class Prompter:
    """Puts riddles into filler so that prompt and answer fill a context.

    Args:
        tokenizer: of transformers; its chat template frames the prompt if it has one.
        filler: to hide things in.
    """

    def __init__(self, tokenizer: Any, filler: Filler) -> None:
        self._tokenizer, self._filler = tokenizer, filler
        self.framed = bool(getattr(tokenizer, "chat_template", None))
        # A chat template writes its own beginning-of-sequence token.
        self._leading = [] if self.framed else leading_tokens(tokenizer)
        self._counts = [self._count(" " + sentence) for sentence in filler.sentences]

    def _count(self, text: str) -> int:
        return len(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def text(self, riddle: Riddle, sentences: Sequence[str]) -> str:
        """The prompt, answer's beginning included."""
        asked = f"{riddle.introduction}\n\n{' '.join(sentences)}\n\n{riddle.question}"
        if not self.framed:
            return f"{asked}\n\n{riddle.begun}"
        message = [{"role": "user", "content": asked}]
        framed = self._tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
        return f"{framed}{riddle.begun}"

    def prompt(self, riddle: Riddle, context: int, first: int, answer_tokens: int) -> tuple[tuple[int, ...], int, str]:
        """Tokens of prompt and right answer, the index of the answer, and the prompt's text.

        Args:
            riddle: to hide and ask.
            context: most tokens of the prompt and an answer of `answer_tokens` (or the right one, if longer).
            first: sentence of the filler to begin with.
            answer_tokens: room for a generated answer.

        Raises:
            HqmqError: the context is too small to hide anything in.
        """
        filler, counts = self._filler.sentences, self._counts
        longest, used, shrinking = max(counts), 0, False
        taken, tokens, start, text = empty = self._room_taken(riddle, [], answer_tokens)
        # Adds as many sentences as are sure to fit until not one more is; if they do not fit after all, takes some off.
        while True:
            if taken > context and used:
                used, shrinking = used - min(used, -(-(taken - context) // longest)), True
            elif shrinking or context - taken < longest:
                break
            else:
                used += (context - taken) // longest
            order = [(first + i) % len(filler) for i in range(used)]
            placed = _hide(riddle, [filler[i] for i in order], [counts[i] for i in order])
            taken, tokens, start, text = self._room_taken(riddle, placed, answer_tokens)
        if not used:
            raise HqmqError(
                f"a context of {context} tokens is too small: question and answer alone take {empty[0]}; "
                "use larger --contexts"
            )
        return tokens, start, text

    def _room_taken(
        self, riddle: Riddle, sentences: Sequence[str], answer_tokens: int
    ) -> tuple[int, tuple[int, ...], int, str]:
        text = self.text(riddle, sentences or riddle.hidden)  # without filler: what is hidden alone
        tokens, start = encode_pair(self._tokenizer, text, riddle.answer, self._leading)
        return max(len(tokens), start + answer_tokens), tokens, start, text

    def position(self, text: str, hidden: str) -> int:
        """Tokens before a hidden sentence."""
        return len(self._leading) + self._count(text[: text.index(hidden)].rstrip())


def _hide(riddle: Riddle, sentences: Sequence[str], counts: Sequence[int]) -> list[str]:
    """Sentences with the hidden ones between them, each at the border nearest to its place, in tokens."""
    borders = [0, *accumulate(counts)]
    placed = list(sentences)
    # From the end, so that earlier indices stay what they are.
    for hidden, place in reversed(list(zip(riddle.hidden, riddle.places, strict=True))):
        wanted = place * borders[-1]
        at = bisect_left(borders, wanted)
        if at and wanted - borders[at - 1] < borders[at] - wanted:
            at -= 1
        placed.insert(at, hidden)
    return placed


def check_contexts(contexts: Sequence[int] | None, max_context: int) -> tuple[int, ...]:
    """Contexts to measure, by default those of DEFAULT_CONTEXTS that the model holds (0: unknown).

    Raises:
        HqmqError: the model does not hold one that was asked for, or none of the default ones.
    """
    chosen = tuple(contexts or (c for c in DEFAULT_CONTEXTS if not max_context or c <= max_context))
    if not chosen:
        raise HqmqError(f"the model holds {max_context} tokens only; give --contexts it has room for")
    for context in chosen:
        if context < 1 or (max_context and context > max_context):
            raise HqmqError(f"--contexts {context}: the model holds 1…{max_context or 'any'} tokens; leave it out")
    return tuple(sorted(set(chosen)))


def build_recall(
    name: str, tokenizer: Any, filler: Filler, contexts: Sequence[int], samples: int, max_context: int = 0
) -> Task:
    """Problems of a recall task.

    Args:
        name: ``needle`` or ``tracking``.
        tokenizer: of transformers.
        filler: text to hide things in.
        contexts: tokens of prompt and answer.
        samples: of each context, for ``needle`` of each context and depth.
        max_context: tokens the model holds, 0: unknown.

    Raises:
        HqmqError: unknown name, or a context that the model does not hold or that holds no question.
    """
    if name not in RECALL_TASKS:
        raise HqmqError(f"recall task '{name}' is unknown; there are {' and '.join(RECALL_TASKS)}")
    if samples < 1:
        raise HqmqError(f"{samples} samples measure nothing; use 1 or more")
    prompter = Prompter(tokenizer, filler)
    problems = []
    for context in check_contexts(contexts, max_context):
        for depth in DEPTHS if name == "needle" else (None,):
            for sample in range(samples):
                problems.append(_problem(prompter, filler, name, context, depth, sample))
    return Task(
        name,
        tuple(problems),
        text_digest(f"{name} {_VERSION} {filler.sha256}"),
        "number found" if name == "needle" else "variables found",
        binary=name == "needle",
    )


def _problem(prompter: Prompter, filler: Filler, name: str, context: int, depth: int | None, sample: int) -> Problem:
    # Seeded by a text, which Random hashes the same everywhere; all depths of a sample hide the same thing.
    rng = random.Random(f"{name} {context} {sample}")
    first = rng.randrange(len(filler.sentences))
    riddle = tracking(rng) if depth is None else needle(rng, depth)
    room = _TRACKING_TOKENS if depth is None else _NEEDLE_TOKENS
    tokens, start, text = prompter.prompt(riddle, context, first, room)
    positions = [prompter.position(text, hidden) for hidden in riddle.hidden]
    return Problem(
        key={"item": sample, "context": context, **({} if depth is None else {"depth": depth})},
        kind="generate",
        sequences=(tokens,),
        starts=(start,),
        characters=(len(riddle.answer.lstrip()),),
        group=str(context),
        new_tokens=room,
        grade=riddle.grade,
        facts={"hidden_at": positions, "chat_template": prompter.framed},
    )
