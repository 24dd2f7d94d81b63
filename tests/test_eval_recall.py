"""Needle and variable tracking: where things are hidden, how full a context is, what counts as found."""

from __future__ import annotations

import random
import re
from pathlib import Path
from typing import Any

import pytest

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.recall import DEPTHS, Filler, build_recall, check_contexts, needle, read_filler, tracking
from hqmq_trt.eval.store import Store
from hqmq_trt.eval.task_summary import summaries
from hqmq_trt.eval.tasks import Problem, measure
from tests.conftest import tiny_tokenizer
from tests.task_cases import Scripted

WORDS = Filler(tuple(f"Sentence {i:02d} says nothing at all." for i in range(40)), "aa")
LONGEST = 1 + len(WORDS.sentences[0])


def plain_tokenizer() -> Any:
    """No chat template, and <bos> before every text."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 256)])
    return tokenizer


@pytest.fixture(params=["chat", "plain"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    return tiny_tokenizer() if request.param == "chat" else plain_tokenizer()


def prompt_text(tokenizer: Any, problem: Problem) -> str:
    return str(tokenizer.decode(list(problem.prompt)))


def test_needle_is_at_its_depth(tokenizer: Any) -> None:
    task = build_recall("needle", tokenizer, WORDS, [1200], 2)
    assert [problem.key["depth"] for problem in task.problems] == [d for d in DEPTHS for _ in range(2)]
    for problem in task.problems:
        text = prompt_text(tokenizer, problem)
        (hidden,) = re.findall(r"The special magic number for \w+ is \d{7}\.", text)
        body = text.split("\n\n")[1]
        before, after = body.split(hidden)
        share = len(before) / (len(before) + len(after))
        assert abs(share - problem.key["depth"] / 100) <= (LONGEST / 2 + 1) / len(before + after)
        assert bool(before) == (problem.key["depth"] > 0)
        assert bool(after) == (problem.key["depth"] < 100)
        (at,) = problem.facts["hidden_at"]
        # A space before it belongs to it.
        assert tokenizer.decode(list(problem.prompt[at:])).lstrip().startswith(hidden)


@pytest.mark.parametrize("name", ["needle", "tracking"])
@pytest.mark.parametrize("context", [900, 1203, 2000])
def test_prompts_fill_their_context(tokenizer: Any, name: str, context: int) -> None:
    for problem in build_recall(name, tokenizer, WORDS, [context], 3).problems:
        assert context - LONGEST - 1 <= problem.tokens <= context
        assert problem.tokens >= len(problem.prompt) + problem.new_tokens
        assert problem.group == str(context)


def test_answer_is_framed_and_begun() -> None:
    chat, plain = tiny_tokenizer(), plain_tokenizer()
    for tokenizer in (chat, plain):
        problem = build_recall("needle", tokenizer, WORDS, [1000], 1).problems[0]
        ids, text = problem.sequences[0], prompt_text(tokenizer, problem)
        assert text.count("<bos>") == 1
        assert text.startswith("<user>A special" if tokenizer is chat else "<bos>A special")
        assert re.search(r"\?(<bos>|\n\n)The special magic number for \w+ mentioned in the provided text is$", text)
        (number,) = re.findall(r"is (\d{7})\.", text)
        assert tokenizer.decode(list(ids[problem.starts[0] :])) == f" {number}"
        assert problem.facts["chat_template"] is (tokenizer is chat)


def test_same_samples_at_every_depth_and_every_time() -> None:
    tokenizer = tiny_tokenizer()
    task, again = (build_recall("needle", tokenizer, WORDS, [900], 2) for _ in range(2))
    assert [p.sequences for p in task.problems] == [p.sequences for p in again.problems]
    numbers = [prompt_text(tokenizer, p)[-60:] + str(p.sequences[0][p.starts[0] :]) for p in task.problems]
    assert set(numbers[0::2]) == {numbers[0]}
    assert numbers[0] != numbers[1]
    other = build_recall("needle", tokenizer, Filler(WORDS.sentences, "bb"), [900], 2)
    assert other.data_sha256 != task.data_sha256


def test_needle_is_found_in_what_is_said() -> None:
    riddle = needle(random.Random(1), 50)
    number = riddle.answer.strip()
    assert riddle.grade(f" {number}.") == 1.0
    assert riddle.grade(f" {int(number):,}") == 1.0
    assert riddle.grade(f" {number[:-1]}") == 0.0


def test_chains_are_hidden_in_order_and_asked_for() -> None:
    riddle = tracking(random.Random(3), chains=3, hops=4)
    assert list(riddle.places) == sorted(riddle.places)
    value = re.findall(r"value (\d{5}) in", riddle.question)[0]
    known, found = {value}, []
    for line in riddle.hidden:  # in order: one pass resolves every chain
        name, source = re.fullmatch(r"VAR (\w+) = (?:VAR )?(\w+)\.", line).groups()  # type: ignore[union-attr]
        if source in known:
            known.add(name)
            found.append(name)
    assert len(riddle.hidden) == 15
    assert riddle.answer == " " + ", ".join(found)
    assert len(found) == 5
    assert riddle.grade(riddle.answer) == 1.0
    assert riddle.grade(f" {found[0]}, {found[3]} and so on") == pytest.approx(0.4)
    assert riddle.grade("") == 0.0


def test_tracking_prompt_holds_every_assignment(tokenizer: Any) -> None:
    for problem in build_recall("tracking", tokenizer, WORDS, [1500], 2).problems:
        text = prompt_text(tokenizer, problem)
        lines = re.findall(r"VAR \w+ = [^.]+\.", text)
        assert len(lines) == 10
        assert problem.facts["hidden_at"] == sorted(problem.facts["hidden_at"])
        assert [text.index(line) for line in lines] == sorted(text.index(line) for line in lines)
        assert "depth" not in problem.key


def test_measured_through_the_subject(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    needles = build_recall("needle", tokenizer, WORDS, [900, 1000], 1)
    chains = build_recall("tracking", tokenizer, WORDS, [1500], 2)

    def answer(prompt: str) -> str:
        if "magic" in prompt:  # finds the needle unless it comes first
            before, number = re.findall(r"(.)The special magic number for \w+ is (\d+)\.", prompt, re.DOTALL)[0]
            return f" {number}" if before == " " else " 0000000"
        return " " + re.findall(r"VAR (\w+) =", prompt)[0]

    store, subject = Store(tmp_path), Scripted(tokenizer, dict.fromkeys("0123456789", 0.5), answer=answer)
    for task in (needles, chains):
        measure(subject, task, store, {})
    depth = {r["key"]["depth"]: r["value"] for r in store.records(task="needle", context=900)}
    assert [depth[d]["score"] for d in DEPTHS] == [0.0, 1.0, 1.0, 1.0, 1.0]
    assert depth[25]["nll"] == pytest.approx(3.5)
    assert depth[25]["coded_tokens"] == (depth[25]["prompt_tokens"] - 1) // 16 * 16
    found = summaries(store, subject, needles)
    assert [(result.group, result.items, result.score) for result in found] == [("900", 5, 0.8), ("1000", 5, 0.8)]
    (tracked,) = summaries(store, subject, chains)
    assert tracked.score in (0.0, 0.1, 0.2)  # the first assignment may be the other chain's
    assert tracked.interval[0] <= tracked.score <= tracked.interval[1]


def test_contexts() -> None:
    assert check_contexts(None, 2048) == (1024, 2048)
    assert check_contexts(None, 0) == (1024, 2048, 4096)
    assert check_contexts([2048, 512, 512], 8192) == (512, 2048)
    with pytest.raises(HqmqError, match=r"--contexts 4096: the model holds 1…2048"):
        check_contexts([4096], 2048)
    with pytest.raises(HqmqError, match="512 tokens only"):
        check_contexts(None, 512)
    with pytest.raises(HqmqError, match="--contexts 0"):
        check_contexts([0], 0)


def test_what_cannot_be_built_is_refused() -> None:
    tokenizer = tiny_tokenizer()
    with pytest.raises(HqmqError, match=r"context of 300 tokens is too small: question and answer alone take \d+"):
        build_recall("needle", tokenizer, WORDS, [300], 1)
    with pytest.raises(HqmqError, match="'maze' is unknown"):
        build_recall("maze", tokenizer, WORDS, [900], 1)
    with pytest.raises(HqmqError, match="0 samples"):
        build_recall("needle", tokenizer, WORDS, [900], 0)


def test_filler(tmp_path: Path) -> None:
    assert len(read_filler().sentences) > 40
    file = tmp_path / "text"
    file.write_text("One here.\nTwo\n there! " + "word " * 130)
    assert [len(sentence.split()) for sentence in read_filler(file).sentences] == [2, 2, 60, 60, 10]
    file.write_text(" \n")
    with pytest.raises(HqmqError, match="is empty"):
        read_filler(file)
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(HqmqError, match="UTF-8"):
        read_filler(file)
    with pytest.raises(HqmqError, match="cannot be read"):
        read_filler(tmp_path / "none")
