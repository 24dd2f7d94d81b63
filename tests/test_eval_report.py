"""Reports of kept results: grouping, tables, envelopes and pictures, from records of known numbers."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
import typer
from typer.testing import CliRunner

from hqmq_trt.cli.eval_report import report
from hqmq_trt.errors import HqmqError
from hqmq_trt.eval import envelope as families
from hqmq_trt.eval import plots
from hqmq_trt.eval.report import run_tables, write_report
from hqmq_trt.eval.results import read_records, runs
from hqmq_trt.eval.statistics import wilson
from hqmq_trt.eval.store import Store

Codecs = dict[str, tuple[float, list[float]]]
"""Codec to stored bits and the change of log-perplexity in each window."""
WINDOWS = [2.0, 2.5, 3.0]
"""nll of the reference."""
CODECS: Codecs = {
    "reference": (16.0, [0.0, 0.0, 0.0]),
    "hq3": (3.25, [0.05, 0.06, 0.04]),
    "hq4": (4.25, [0.02, 0.02, 0.02]),
    "hq4#7": (4.25, [0.001, 0.001, 0.001]),
    "kivi-2": (3.0, [0.2, 0.3, 0.4]),
    "kivi-4": (4.5, [0.01, 0.012, 0.008]),
    "int4": (4.1, [8.0, 9.0, 10.0]),
    "fp16": (16.0, [0.0, 1e-5, -1e-5]),
    "fp8": (8.0, [-0.001, 0.0, -0.002]),
}


def fill(folder: Path, codecs: Codecs, model: str = "tiny", mode: str = "fused", **key: Any) -> Store:
    store = Store(folder)
    for codec, (bits, changes) in codecs.items():
        for item, change in enumerate(changes):
            found = {
                "task": "ppl", "model": model, "model_sha256": f"{model}-digest", "codec": codec,
                "mode": "" if codec == "reference" else mode, "where": "torch cpu float32", "text_sha256": "aaaa",
                "length": 2048, "item": item, **key,
            }  # fmt: skip
            value = {"nll": WINDOWS[item] + change, "stored_bits": bits, "paper_bits": bits - 0.1, "tail": 64}
            store.add(found, value, {"torch": "2.9.0", "seconds": 1.5})
    return store


def add_items(store: Store, codec: str, task: str, scores: list[float], nll: float, **key: Any) -> None:
    for item, score in enumerate(scores):
        found = {
            "task": task, "model": "tiny", "model_sha256": "tiny-digest", "codec": codec,
            "mode": "" if codec == "reference" else "fused", "where": "torch cpu float32", "data_sha256": "bbbb",
            "item": item, **key,
        }  # fmt: skip
        value = {"score": score, "nll": nll + item, "stored_bits": 4.25, "paper_bits": None, "tail": 64}
        store.add(found, {**value, "coded_tokens": 100 + item})


def cells(table: Any, codec: str, column: int = 0) -> tuple[str, ...]:
    row: tuple[str, ...] = next(row for row in table.rows if row[column] == codec)
    return row


def test_perplexity_rows(tmp_path: Path) -> None:
    fill(tmp_path, CODECS)
    (run,) = runs(read_records([tmp_path]))
    assert (run.model, run.about) == ("tiny", ("torch 2.9.0",))
    table = run_tables(run)[0]
    assert table.title == "tiny, windows of 2048 tokens, fused"
    assert [row[0] for row in table.rows][:4] == ["reference", "kivi-2", "hq3", "int4"]
    # exp(2.5) = 12.182; exp(2.55) = 12.807; exp(0.05) - 1 = 5.13 %; 0.01 / sqrt(3) * exp(0.05) = 0.607 %.
    assert cells(table, "reference") == ("reference", "-", "16.000", "15.90", "64", "12.182", "-", "-", "3")
    assert cells(table, "hq3") == (
        "hq3", families.OURS, "3.250", "3.15", "64", "12.807", "+5.13%", "0.607%", "3",
    )  # fmt: skip
    assert cells(table, "int4")[5:7] == ("98,716", "+810,208%")
    assert table.note == ""


def test_windows_that_differ_are_said(tmp_path: Path) -> None:
    fill(tmp_path, {**CODECS, "hq5": (5.25, [0.001, 0.002])})
    (run,) = runs(read_records([tmp_path]))
    table = run_tables(run)[0]
    assert "Not every codec has seen all windows" in table.note
    assert cells(table, "hq5")[-1] == "2"
    assert cells(table, "hq5")[6] == f"{100 * math.expm1(0.0015):+.2f}%"


def test_codecs_of_other_windows_are_not_compared(tmp_path: Path) -> None:
    # hq5 saw only the windows in which it is free of loss: it must not win a budget.
    fill(tmp_path, {**CODECS, "hq5": (4.0, [0.0])})
    (run,) = runs(read_records([tmp_path]))
    (text,) = run.texts
    assert text.apart == {"fused": ("hq5",)}
    assert "hq5" in [item.codec for item in text.found]
    assert "hq5" not in [item.codec for item in text.points["fused"]]
    assert {item.ours.codec for item in text.envelopes("fused") if item.ours} == {"hq3", "hq4"}
    assert run_tables(run)[1].note.endswith(" Not compared, as they saw other windows than most: hq5.")
    write_report([run], tmp_path / "out")
    assert "hq4#7, hq5." in (tmp_path / "out" / "fidelity.md").read_text(encoding="utf-8")


def test_range_of_windows(tmp_path: Path) -> None:
    add_items(fill(tmp_path, CODECS), "hq4", "hellaswag", [1, 0, 0, 1], 1.5)
    records = read_records([tmp_path])
    (run,) = runs(records, range(1, 3))
    table, envelopes, tasks = run_tables(run)
    assert table.title == "tiny, windows 1…2 of 2048 tokens, fused"
    assert envelopes.title == "Best within a budget: tiny, windows 1…2 of 2048 tokens, fused"
    # exp(2.75) = 15.643; windows 1 and 2 of hq3 change by 0.06 and 0.04.
    assert cells(table, "reference")[5:] == ("15.643", "-", "-", "2")
    assert cells(table, "hq3")[6:] == ("+5.13%", f"{100 * math.exp(0.05) * 0.01:.3f}%", "2")
    assert cells(tasks, "hq4", 1)[-1] == "4"
    (run,) = runs(records, range(0, 1))
    assert cells(run_tables(run)[0], "kivi-2")[6] == f"{100 * math.expm1(0.2):+.2f}%"
    (run,) = runs(records, range(7, 9))  # no such window: the tasks alone
    assert [table.title for table in run_tables(run)] == ["Tasks: tiny"]
    fill(tmp_path / "b", CODECS)
    with pytest.raises(HqmqError, match="windows 7…8 was measured; these results hold some of 0…2"):
        runs(read_records([tmp_path / "b"]), range(7, 9))


def test_models_modes_and_lengths_stay_apart(tmp_path: Path) -> None:
    fill(tmp_path / "a", CODECS)
    fill(tmp_path / "a", {"hq3": (3.25, [0.5, 0.5, 0.5])}, mode="qdq")
    fill(tmp_path / "a", {"hq3": (3.25, [0.7, 0.7, 0.7])}, length=512)
    fill(tmp_path / "b", {"reference": (16.0, [0.0]), "hq3": (3.25, [0.9])}, model="other")
    first, second = runs(read_records([tmp_path / "a", tmp_path / "b"]))
    long, short = first.texts
    assert (first.model, second.model) == ("tiny", "other")
    assert (long.title, short.title) == ("tiny, windows of 2048 tokens", "tiny, windows of 512 tokens")
    assert [point.codec for point in long.points["qdq"]] == ["hq3"]
    assert long.points["qdq"][0].change == pytest.approx(100 * math.expm1(0.5))
    assert short.found[0].change is None  # no reference of this length: none is borrowed
    assert short.points == {}
    (point,) = second.texts[0].points["fused"]
    assert point.change == pytest.approx(100 * math.expm1(0.9))
    assert math.isinf(point.error)


def test_later_folder_counts(tmp_path: Path) -> None:
    fill(tmp_path / "a", {"hq3": (3.25, [0.5, 0.5, 0.5])})
    fill(tmp_path / "b", {"hq3": (3.25, [0.1, 0.1, 0.1])})
    for order, change in (("ab", 0.1), ("ba", 0.5)):
        (run,) = runs(read_records([tmp_path / name for name in order]))
        assert run.texts[0].found[0].perplexity == pytest.approx(math.exp(2.5 + change))


def test_envelope_table(tmp_path: Path) -> None:
    fill(tmp_path, CODECS)
    (run,) = runs(read_records([tmp_path]))
    table = run_tables(run)[1]
    assert table.title == "Best within a budget: tiny, windows of 2048 tokens, fused"
    assert [row[0] for row in table.rows] == ["3.000…3.250", "3.250…4.250", "4.250…4.500", "4.500…5.500"]
    assert cells(table, "3.000…3.250")[2:] == ("none so small", "-", "-", "ours: none")
    assert cells(table, "3.250…4.250")[5] == "ours better"
    # exp(0.02) - exp(0.01) = 1.02 points; paired differences 0.010, 0.008, 0.012: 102.02 * 0.002 / sqrt(3).
    assert cells(table, "4.500…5.500")[1:] == ("kivi-4 (+1.01%)", "hq4 (+2.02%)", "+1.02", "0.12", "ours worse")
    assert table.note == "Ours is above the baselines in 2 of 4 stretches of 3…5.5 bits."


def test_tasks(tmp_path: Path) -> None:
    store = Store(tmp_path)
    add_items(store, "reference", "hellaswag", [1, 1, 0, 1], 1.0)
    add_items(store, "hq4", "hellaswag", [1, 0, 0, 1], 1.5)
    add_items(store, "hq4", "arc_easy", [1, 0], 1.5)
    add_items(store, "reference", "tracking", [0.5, 1.0], 1.0, context=1024, depth=0)
    add_items(store, "hq4", "tracking", [0.5, 0.0], 1.0, context=1024, depth=0)
    (run,) = runs(read_records([tmp_path]))
    (table,) = run_tables(run)
    low, high = (f"{100 * x:.1f}" for x in wilson(2, 4))
    assert cells(table, "hq4", 1) == (
        "hellaswag", "hq4", "fused", "4.250", "50.0", f"{low}…{high}", "-25.0 ± 25.0", "+0.500 ± 0.000", "102", "4",
    )  # fmt: skip
    rows = {(row[0], row[1]): row for row in table.rows}
    assert rows["arc_easy", "hq4"][6] == "-"  # no reference: no difference
    assert rows["tracking, 1024 tokens", "reference"][4:6] == ("75.0", "26.0…100.0")  # shares: mean ± 1.96 * 0.25
    assert rows["tracking, 1024 tokens", "hq4"][6] == "-50.0 ± 50.0"


def needle(store: Store) -> None:
    for context in (1024, 4096):
        for depth in (0, 50, 100):
            for codec in ("reference", "hq4"):
                scores = [1.0, float(depth != 50 or codec != "hq4" or context == 1024)]
                add_items(store, codec, "needle", scores, 0.5, context=context, depth=depth)


def test_recall_by_context_and_depth(tmp_path: Path) -> None:
    needle(Store(tmp_path))
    (run,) = runs(read_records([tmp_path]))
    found = run.recall["needle"]
    assert list(found) == ["reference", "hq4 (fused)"]
    assert found["hq4 (fused)"] == {
        **{(1024, depth): 1.0 for depth in (0.0, 50.0, 100.0)},
        **{(4096, depth): score for depth, score in ((0.0, 1.0), (50.0, 0.5), (100.0, 1.0))},
    }


def is_picture(file: Path) -> bool:
    image = matplotlib.image.imread(file)
    return min(image.shape[:2]) > 100 and float(image[..., :3].std()) > 0.01


def test_written_report(tmp_path: Path) -> None:
    needle(fill(tmp_path / "in", {**CODECS, "int8": (8.1, [0.0, 0.001, 0.002])}))
    fill(tmp_path / "in", {"hq3": (3.25, [0.5, 0.5, 0.5])}, mode="qdq")
    files = write_report(runs(read_records([tmp_path / "in"])), tmp_path / "out")
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    pictures = [file for file in files if file.suffix == ".png"]
    assert [file.name.split("-")[0] for file in pictures] == ["bits", "bits", "needle"]
    assert all(is_picture(file) for file in pictures)
    markdown = (tmp_path / "out" / "fidelity.md").read_text(encoding="utf-8")
    assert "| hq3 | HQMQ, ours (hq…) | 3.250 | 3.15 | 64 | 12.807 | +5.13% | 0.607% | 3 |" in markdown
    assert "Not drawn (large, another codebook seed, other windows, or no reference): fp16, hq4#7." in markdown
    assert re.findall(r"\]\((.*?)\)", markdown) == [file.name for file in pictures]
    page = (tmp_path / "out" / "fidelity.html").read_text(encoding="utf-8")
    assert page.count('src="data:image/png;base64,iVBOR') == len(pictures)
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert "<script" not in page
    assert "<td>+5.13%</td>" in page


def test_names_are_escaped(tmp_path: Path) -> None:
    fill(tmp_path / "in", {"reference": (16.0, [0.0])}, model="<b>x|y</b>")
    write_report(runs(read_records([tmp_path / "in"])), tmp_path / "out")
    assert "<b>x" not in (tmp_path / "out" / "fidelity.html").read_text(encoding="utf-8")


def test_runs_of_one_name_are_all_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path / "in", CODECS)
    fill(tmp_path / "in", CODECS, model_sha256="another")
    drawn: list[Any] = []
    real = plots.bits_loss

    def bits_loss(panels: Any, path: Path) -> Path:
        drawn.append(panels)
        return real(panels, path)

    monkeypatch.setattr(plots, "bits_loss", bits_loss)
    write_report(runs(read_records([tmp_path / "in"])), tmp_path / "out")
    assert list(drawn[0]) == ["tiny, windows of 2048 tokens", "tiny, windows of 2048 tokens (another)"]


def test_command(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    fill(tmp_path / "in", CODECS)
    result = CliRunner().invoke(app, [str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--json"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert (tmp_path / "out" / "fidelity.html").exists()
    (text,) = document["runs"][0]["texts"]
    worst = text["envelopes"]["fused"][-1]
    assert (worst["budget"], worst["ours"]["codec"], worst["baseline"]["codec"]) == (4.5, "hq4", "kivi-4")
    assert worst["excess_percent"] == pytest.approx(100 * (math.exp(0.02) - math.exp(0.01)))
    assert text["envelopes"]["fused"][0]["excess_percent"] is None  # none of ours is so small
    result = CliRunner().invoke(app, [str(tmp_path / "in")], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "ours worse" in result.stdout
    assert "+5.13%" in result.stdout


def test_command_with_windows(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    fill(tmp_path / "in", CODECS)
    arguments = [str(tmp_path / "in"), "-o", str(tmp_path / "out"), "--json", "--windows"]
    result = CliRunner().invoke(app, [*arguments, "0:2"])
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    (text,) = document["runs"][0]["texts"]
    assert (document["windows"], text["title"]) == ([0, 2], "tiny, windows 0…1 of 2048 tokens")
    assert {item["windows"] for item in text["codecs"]} == {2}
    assert "### tiny, windows 0…1 of 2048 tokens, fused" in (tmp_path / "out" / "fidelity.md").read_text("utf-8")
    assert isinstance(CliRunner().invoke(app, [*arguments, "2:1"]).exception, HqmqError)


def test_folders_without_results(tmp_path: Path) -> None:
    with pytest.raises(HqmqError, match=r"holds no results\.jsonl"):
        read_records([tmp_path / "missing"])
    assert not (tmp_path / "missing").exists()
    (tmp_path / "results.jsonl").write_text("")
    with pytest.raises(HqmqError, match="hold no results yet"):
        read_records([tmp_path])
