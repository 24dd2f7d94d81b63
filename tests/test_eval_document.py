"""The tables of the fidelity document, against numbers worked out by hand from a few windows."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from hqmq_trt.cli.eval_report import report
from hqmq_trt.errors import HqmqError
from hqmq_trt.eval import ablation, cells
from hqmq_trt.eval.document import document_tables, fill, marked
from hqmq_trt.eval.envelope import BETTER, WITHIN, WORSE, judge
from hqmq_trt.eval.report_settings import Settings, read_settings
from hqmq_trt.eval.results import read_records, runs
from hqmq_trt.eval.table import Table
from tests.test_eval_report import fill as store

FUSED = {
    "reference": (16.0, [0.0, 0.0, 0.0]),
    "hq3": (3.25, [0.05, 0.06, 0.04]),
    "hq4": (4.25, [0.02, 0.02, 0.02]),
    "kivi-2": (3.0, [0.2, 0.3, 0.4]),
    "kivi-4": (4.5, [0.01, 0.012, 0.008]),
    "int4": (4.1, [8.0, 9.0, 10.0]),
    "unbalanced:hq4": (4.25, [0.03, 0.03, 0.03]),
    "hq:s170_r4-sinks": (4.25, [0.04, 0.04]),
    "balanced:kivi-4": (4.5, [0.002, 0.002, 0.002]),
}
QDQ = {"hq3": (3.25, [0.1, 0.1, 0.1]), "kivi-4": (4.5, [0.05, 0.05, 0.05])}
"""exp(x) - 1 in percent: 0.01 1.01, 0.02 2.02, 0.03 3.05, 0.04 4.08, 0.05 5.13, 0.1 10.52, 0.3 34.99, 9 810,208;
s.e. of hq3 exp(0.05) * 0.01 / sqrt(3) = 0.61, of kivi-4 exp(0.01) * 0.002 / sqrt(3) = 0.12 points."""
SETTINGS = {
    "models": [{"sha256": "aaaaaaaa", "name": "Small", "head_dim": 64}, {"sha256": "bbbbbbbb", "name": "Large"}],
    "summary": ["hq3", "kivi-4", "int4", "hq5"],
    "targets": [
        {"model": "Small", "bits": 4.25, "percent": 2.5},
        {"model": "Small", "bits": 3.5, "percent": 4.0},
        {"model": "Small", "bits": 4.25, "better_than": "kivi-4"},
        {"model": "Small", "bits": 3.1, "percent": 1, "mode": "fused"},
        {"model": "Small", "bits": 4.0, "percent": 1, "mode": "fused", "codec": "hq4"},
        {"model": "Large", "bits": 4.0, "percent": 1},
    ],
}  # fmt: skip


def made(folder: Path, settings: Mapping[str, object] | None = None) -> dict[str, Table]:
    store(folder, FUSED, model_sha256="aaaaaaaa1111")
    store(folder, QDQ, mode="qdq", model_sha256="aaaaaaaa1111")
    return document_tables(runs(read_records([folder])), Settings.model_validate(settings or {}))


def test_summary(tmp_path: Path) -> None:
    table = made(tmp_path, SETTINGS)["summary"]
    assert table.columns == ("scheme", "stored, D = 64", "Small")
    assert table.rows == (
        ("hq3", "3.25", "+5.13 / +10.52"),
        ("kivi-4", "4.5", "+1.01 / +5.13"),
        ("int4", "4.1", "+810,208 / –"),
        ("hq5", "–", "–"),
    )
    assert table.note == "Change of perplexity in percent, fused / qdq."


def test_summary_of_all_codecs_without_settings(tmp_path: Path) -> None:
    # Ablations and the reference do not belong there; a codec that saw fewer windows says so.
    store(tmp_path / "b", {"reference": FUSED["reference"], "hq3": FUSED["hq3"], "hq4": (4.25, [0.02, 0.02])})
    (run,) = runs(read_records([tmp_path / "b"]))
    table = document_tables([run], Settings(summary=("hq3", "hq4")))["summary"]
    assert table.rows[1] == ("hq4", "4.25", "+2.02 (2 windows)")
    table = made(tmp_path / "a")["summary"]
    # hq:s170_r4-sinks saw two windows, others three: it does not compare.
    assert [row[0] for row in table.rows] == ["kivi-2", "hq3", "int4", "hq4", "kivi-4"]
    assert table.columns == ("scheme", "stored, tiny", "tiny")


def test_envelopes_and_where_ours_is_above(tmp_path: Path) -> None:
    tables = made(tmp_path)
    # fused: 3…3.25 nothing, 3.25…4.25 hq3 (5.13) under kivi-2 (34.99), 4.25…4.5 hq4 under it, 4.5…5.5 above kivi-4.
    # qdq: the only baseline is kivi-4 from 4.5 on; hq3 is 5.39 points above it with no spread between windows.
    assert tables["envelopes"].rows == (
        ("tiny", "fused", "4", "2", "0", "1", "3.00…3.25"),
        ("tiny", "qdq", "1", "0", "0", "1", "–"),
    )
    # 102.02 * 0.002 / sqrt(3) = 0.12 points.
    assert tables["above"].rows == (
        ("tiny, fused", "4.500…5.500", "kivi-4 (+1.01 %)", "hq4 (+2.02 %)", "+1.02 ± 0.12 (clear)"),
        ("tiny, qdq", "4.500…5.500", "kivi-4 (+5.13 %)", "hq3 (+10.52 %)", "+5.39 ± 0.00 (clear)"),
    )


def test_nothing_above_is_a_result(tmp_path: Path) -> None:
    store(tmp_path, {name: FUSED[name] for name in ("reference", "hq4", "int4")})
    tables = document_tables(runs(read_records([tmp_path])), Settings())
    assert tables["above"].rows == ()
    assert fill("<!-- table above -->\n<!-- end -->", tables) == (
        "<!-- table above -->\nOurs is nowhere above the baselines.\n<!-- end -->"
    )


def test_targets_of_codecs_that_do_not_compare(tmp_path: Path) -> None:
    wanted = [
        {"model": "tiny", "bits": 5, "percent": 1, "mode": "fused", "codec": "hq:s170_r4-sinks"},  # saw two windows
        {"model": "tiny", "bits": 5, "better_than": "kivi-3", "mode": "fused"},
    ]
    rows = made(tmp_path, {"targets": wanted})["targets"].rows
    assert [row[1:] for row in rows] == [
        ("hq:s170_r4-sinks: does not compare (other windows)", "–"),
        ("kivi-3: not measured", "–"),
    ]


def test_targets(tmp_path: Path) -> None:
    rows = made(tmp_path, SETTINGS)["targets"].rows
    assert rows == (
        (
            "Small, ≤ 4.25 bits, ≤ +2.50 %",
            "hq4 (4.250): +2.02 ± 0.00 %, reached",
            "hq3 (3.250): +10.52 ± 0.00 %, **missed by 8.02 points**",
        ),
        (
            "Small, ≤ 3.5 bits, ≤ +4.00 %",
            "hq3 (3.250): +5.13 ± 0.61 %, **missed by 1.13 points**, within 2 s.e.",
            "hq3 (3.250): +10.52 ± 0.00 %, **missed by 6.52 points**",
        ),
        (
            "Small, ≤ 4.25 bits, better than kivi-4 (4.5)",
            "hq4 (4.250): +1.02 ± 0.12 points, **missed by 1.02 points**",
            "hq3 (3.250): +5.39 ± 0.00 points, **missed by 5.39 points**",
        ),
        ("Small, ≤ 3.1 bits, ≤ +1.00 %", "nothing of ours fits 3.1 bits", "–"),
        ("Small, ≤ 4 bits, ≤ +1.00 %", "hq4: stores 4.25 bits, beyond the budget", "–"),
        ("Large, ≤ 4 bits, ≤ +1.00 %", "–", "–"),
    )


def test_settings_and_results_may_name_a_preset_by_its_parts(tmp_path: Path) -> None:
    changes = [0.02, 0.02, 0.02]
    named = {"reference": FUSED["reference"], "k=hq3,v=hq:s10_r2": (3.0, changes), "hq:s10_r2-mean": (4.0, changes)}
    store(tmp_path, named)
    found = runs(read_records([tmp_path]))
    for name in ("k=hq3,v=hq:s10_r2", "k=hq3,v=hq2.5"):
        target = {"model": "tiny", "bits": 3, "percent": 2.5, "mode": "fused", "codec": name}
        tables = document_tables(found, Settings.model_validate({"summary": [name], "targets": [target]}))
        assert tables["summary"].rows == (("k=hq3,v=hq2.5", "3", "+2.02"),)
        assert tables["targets"].rows[0][1] == "k=hq3,v=hq2.5 (3.000): +2.02 ± 0.00 %, reached"
    assert [row[0] for row in tables["model tiny"].rows] == ["k=hq3,v=hq2.5", "hq:s10_r2-mean"]


def test_targets_name_models_that_exist(tmp_path: Path) -> None:
    settings = {"targets": [{"model": "Smal", "bits": 4, "percent": 1}]}
    with pytest.raises(HqmqError, match="a target is for 'Smal', which no model is called: tiny"):
        made(tmp_path, settings)


def test_one_model_on_two_machines_is_told_apart(tmp_path: Path) -> None:
    store(tmp_path, FUSED, model_sha256="aaaaaaaa1111", where="torch cuda")
    tables = made(tmp_path, SETTINGS)
    names = [f"Small (torch {where}, aaaaaaaa, windows of 2048 tokens)" for where in ("cuda", "cpu float32")]
    assert tables["summary"].columns[2:] == tuple(names)
    assert [row[0] for row in tables["targets"].rows[:2]] == [f"{name}, ≤ 4.25 bits, ≤ +2.50 %" for name in names]


def test_ablation_and_balancing(tmp_path: Path) -> None:
    tables = made(tmp_path)
    assert tables["ablation"].rows == (
        ("tiny, hq4", "+2.02 ± 0.00; –", "+3.05 ± 0.00; –", "+4.08 ± 0.00; – (2 windows)", "–"),
    )
    assert tables["balancing"].rows == (
        ("kivi-4", "+1.01 ± 0.12; +5.13 ± 0.00"),
        ("balanced:kivi-4", "+0.20 ± 0.00; –"),
    )


def test_variants() -> None:
    assert ablation.variants("k=hq4,v=hq3@p128") == (
        "k=hq4,v=hq3@p128",
        "unbalanced:k=hq4,v=hq3@p128",
        "k=hq:s170_r4-sinks,v=hq:s21_r3-sinks@p128",
        "unbalanced:k=hq:s170_r4-sinks,v=hq:s21_r3-sinks@p128",
    )
    assert ablation.variants("hq:s42_r3+med3")[2] == "hq:s42_r3-sinks+med3"
    for codec in ("kivi-4", "paper:s24_r3", "hq:s170_r4-mean", "hq:s170_r4-sinks", "unbalanced:hq4"):
        with pytest.raises(HqmqError, match="only schemes with balanced K and sink tokens"):
            ablation.variants(codec)


def test_model_table(tmp_path: Path) -> None:
    table = made(tmp_path)["model tiny"]
    assert table.title == "tiny, reference 12.182"
    assert [row[0] for row in table.rows] == ["kivi-2", "hq3", "int4", "hq4", "kivi-4"]  # no ablations
    assert table.columns == ("codec", "stored", "paper", "tail", "ppl fused", "change", "ppl qdq", "change")
    # exp(2.55) = 12.81, exp(2.6) = 13.46, exp(2.8) = 16.44; exp(0.3) * 0.1 / sqrt(3) = 7.79 %.
    assert table.rows[0] == ("kivi-2", "3.000", "2.90", "64", "16.44", "+34.99 ± 7.79 %", "–", "–")
    assert table.rows[1][4:] == ("12.81", "+5.13 ± 0.61 %", "13.46", "+10.52 ± 0.00 %")
    assert table.rows[2][4:6] == ("98,716", "+810,208 %")


def test_numbers() -> None:
    assert [cells.signed(x) for x in (-0.004, 1.234, -99.99, 123.4, -1234.5)] == [
        "0.00",
        "+1.23",
        "−99.99",
        "+123",
        "−1,234",
    ]
    assert (cells.signed(3_850_515, short=True), cells.signed(3_850_515)) == ("+3.9 M", "+3,850,515")
    assert cells.with_error(250.4, 12.6, "%") == "+250 ± 13 %"
    assert (cells.with_error(1500.0, 12.6), cells.with_error(1.0, math.inf)) == ("+1,500", "+1.00")
    assert cells.bits_range([5.0804, 4.9371]) == "4.937…5.08"
    assert [judge(*pair) for pair in ((0.3, 0.1), (-0.3, 0.1), (0.2, 0.1), (9.0, math.inf))] == [
        WORSE, BETTER, WITHIN, WITHIN,
    ]  # fmt: skip


def test_fill_writes_marked_places_anew(tmp_path: Path) -> None:
    tables = made(tmp_path)
    document = (
        "# A\n\n<!-- table ablation -->\nold\n\nnote\n<!-- end -->\n\nmore\n\n<!-- table model tiny -->\n<!-- end -->\n"
    )
    found = fill(document, tables)
    blocks = [marked(name, tables[name]) for name in ("ablation", "model tiny")]
    assert found == f"# A\n\n{blocks[0]}\n\nmore\n\n{blocks[1]}\n"
    assert fill(found, tables) == found
    assert "| tiny, hq4 | +2.02 ± 0.00; – |" in found
    with pytest.raises(HqmqError, match="asks for table 'model Huge'; these results give summary, envelopes"):
        fill(document.replace("model tiny", "model Huge"), tables)
    with pytest.raises(HqmqError, match="no '<!-- end -->' before the next one"):
        fill(document.replace("<!-- end -->", "", 1), tables)
    with pytest.raises(HqmqError, match="no '<!-- end -->'"):
        fill("<!-- table summary -->\n", tables)
    with pytest.raises(HqmqError, match="no marks"):
        fill("# A\n", tables)


def test_command_fills_a_document(tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(report)
    made(tmp_path / "in")
    settings, document = tmp_path / "settings.json", tmp_path / "document.md"
    settings.write_text(json.dumps(SETTINGS))
    document.write_text("<!-- table targets -->\n<!-- end -->\n")
    arguments = [str(tmp_path / "in"), "--settings", str(settings), "-o", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, [*arguments, "--into", str(document)])
    assert result.exit_code == 0, result.output
    assert "| Small, ≤ 3.5 bits, ≤ +4.00 % | hq3 (3.250): +5.13 ± 0.61 %, **missed" in document.read_text("utf-8")
    assert json.loads(result.stdout)["tables"]["summary"]["rows"][0] == ["hq3", "3.25", "+5.13 / +10.52"]
    written = (tmp_path / "out" / "tables.md").read_text("utf-8")
    assert document.read_text("utf-8").strip() in written
    assert "## All models" in (tmp_path / "out" / "fidelity.md").read_text("utf-8")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"targets": [{"model": "a", "bits": 4}]}', "targets.0: .*either percent or better_than"),
        ('{"targets": [{"model": "a", "bits": 4, "percent": 1, "better_than": "b"}]}', "either percent"),
        ('{"model": []}', "model: Extra inputs"),
        ('{"models": [{"sha256": "xyz", "name": "a"}]}', "models.0.sha256"),
        ("{", "Invalid JSON"),
    ],
)
def test_settings_that_are_wrong(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "s.json").write_text(text)
    with pytest.raises(HqmqError, match=message):
        read_settings(tmp_path / "s.json")


def test_settings_of_our_document() -> None:
    docs = Path(__file__).parent.parent / "docs"
    settings = read_settings(docs / "fidelity.json")
    text = (docs / "fidelity.md").read_text(encoding="utf-8")
    for model in settings.models:
        assert f"<!-- table model {model.name} -->" in text
    for codec in settings.summary:
        assert f"\n| {codec} | " in text.split("<!-- table summary -->")[1].split("<!-- end -->")[0]
    assert text.split("<!-- table targets -->")[1].split("<!-- end -->")[0].count("bits, ") == len(settings.targets)
