"""Families of codecs, their envelopes, and the pictures drawn of them, from points of known numbers."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval import envelope as families
from hqmq_trt.eval import plots
from hqmq_trt.eval.envelope import Point, compare_envelopes, envelope, envelope_check, family
from tests.test_eval_report import is_picture


@pytest.mark.parametrize(
    ("codec", "expected"),
    [
        ("hq3.5", families.OURS),
        ("hq4@p128", families.OURS),
        ("hq4#3", families.OURS),
        ("k=hq4,v=hq3.5", families.OURS),
        ("k=fp16,v=hq4", families.OURS),
        ("paper:s96_r4", families.PAPER),
        ("paper:s96_r4+med3@p32", families.PAPER_MED3),
        ("int4", families.INT),
        ("int3+med3", families.INT_MED3),
        ("int4+med3@p128", families.INT_MED3),
        ("q4_0", families.LLAMA_CPP),
        ("q8_0@p128", families.LLAMA_CPP),
        ("kivi-4:k128v64", families.KIVI),
        ("turbo-4+mean", families.TURBO),
        ("fp8", families.FP8),
        ("fp16", families.FP16),
        ("mystery", families.OTHER),
    ],
)
def test_family(codec: str, expected: str) -> None:
    assert family(codec) == expected


def test_every_baseline_has_a_family() -> None:
    from hqmq_trt.eval.baselines import names

    assert not [name for name in names() if family(name) in (families.OTHER, families.OURS, families.FP16)]


def point(codec: str, bits: float, change: float, error: float = 0.1, **keywords: Any) -> Point:
    return Point(codec, bits, change, error, **keywords)


def test_envelope_is_the_running_minimum() -> None:
    points = [point("c", 4.0, 2.0), point("a", 3.0, 5.0), point("d", 4.5, 3.0), point("b", 3.5, 5.0), point("e", 5, 1)]
    assert [item.codec for item in envelope(points)] == ["a", "c", "e"]


def test_envelope_that_is_never_above() -> None:
    ours = [point("hq3", 3.25, 4.0), point("hq4", 4.25, 1.0)]
    baselines = [point("kivi-3", 3.4, 5.0), point("kivi-4", 4.4, 1.0), point("fp8", 8.0, 0.0), point("int4", 4.1, 90.0)]
    assert envelope_check(ours, baselines) == []
    stretches = [(item.budget, item.until, item.baseline.codec) for item in compare_envelopes(ours, baselines)]
    assert stretches == [(3.4, 4.25, "kivi-3"), (4.25, 4.4, "kivi-3"), (4.4, 5.5, "kivi-4")]
    assert [item.excess for item in compare_envelopes(ours, baselines)] == [-1.0, -4.0, 0.0]


def test_envelope_violations() -> None:
    ours = [point("hq3", 3.25, 4.0, 0.3), point("hq4", 4.5, 1.0)]
    baselines = [point("kivi-2", 2.5, 9.0), point("turbo-3", 4.0, 2.0, 0.4), point("kivi-4", 5.0, 0.5)]
    below, middle, above = envelope_check(ours, baselines)
    # At the lower limit a baseline of 2.5 bits fits, and nothing of ours does.
    assert (below.budget, below.until, below.ours, below.excess) == (3.0, 3.25, None, math.inf)
    assert (middle.budget, middle.until, middle.baseline.codec) == (4.0, 4.5, "turbo-3")
    assert (middle.excess, middle.error) == (2.0, pytest.approx(0.5))  # independent: sqrt(0.3² + 0.4²)
    assert (above.budget, above.until, above.excess) == (5.0, 5.5, 0.5)
    assert [item.budget for item in envelope_check(ours, baselines, low=3.5, high=4.75)] == [4.0]
    assert envelope_check(ours, baselines, low=3.25, high=3.9) == []


def test_envelope_error_is_paired_by_window() -> None:
    ours = [point("hq4", 4.0, 10.0, 5.0, nll={0: 1.0, 1: 2.0, 2: 3.1, 9: 0.0})]
    baselines = [point("kivi-4", 4.0, 9.0, 5.0, nll={0: 0.9, 1: 1.9, 2: 2.9, 8: 7.0})]
    (found,) = envelope_check(ours, baselines)
    assert found.error == pytest.approx(110 * np.std([0.1, 0.1, 0.2], ddof=1) / math.sqrt(3))


def drawn_names(monkeypatch: pytest.MonkeyPatch, draw: Any, points: list[Point], path: Path) -> list[list[Any]]:
    """Names in each panel of a picture with two panels of these points."""
    figures: list[Any] = []
    real = plots._save

    def save(figure: Any, path: Path, dpi: int) -> Path:
        figures.append(figure)
        return real(figure, path, dpi)

    monkeypatch.setattr(plots, "_save", save)
    draw({"one": points, "two": points}, path)
    figures[0].draw_without_rendering()  # sizes at the figure's own resolution, not at the file's
    return [list(axes.texts) for axes in figures[0].axes]


CROWD = [
    *(
        point(name, 3.25 + 0.02 * i, 2.0 - 0.02 * i)
        for i, name in enumerate(["hq3", "hq3@p128", "hq:s21_r2", "k=hq3,v=hq4"])
    ),
    *(
        point(name, 4.20 + 0.02 * i, 0.8)
        for i, name in enumerate(["hq4@p128", "k=hq4,v=hq3.5@p128", "k=hq5,v=hq3", "hq4"])
    ),
    *(point(name, 4.25, 3e4) for name in ["int4", "turbo-4"]),
    *(point(f"kivi-{i}:k128v64", i + 0.375, 40 * 0.2**i) for i in (2, 3, 4)),
]


def test_names_cover_neither_each_other_nor_markers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for texts in drawn_names(monkeypatch, plots.bits_loss, CROWD, tmp_path / "x.png"):
        boxes = {text.get_text(): text.get_window_extent() for text in texts}
        assert {"hq3", "hq4", "kivi-2:k128v64", "kivi-4:k128v64", "int4 +30,000%"} <= set(boxes)
        for name, box in boxes.items():
            assert not [other for other in boxes if other != name and box.overlaps(boxes[other])]
            assert not [
                item.codec
                for item in CROWD
                if box.contains(*texts[0].axes.transData.transform((item.bits, item.change)))
            ]


def test_readme_names_presets_and_what_collapsed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for texts in drawn_names(monkeypatch, plots.readme_figure, CROWD, tmp_path / "x.png"):
        names = {text.get_text() for text in texts}
        assert {"hq3", "hq4", "int4 +30,000%"} <= names <= {"hq3", "hq4", "int4 +30,000%", "turbo-4 +30,000%"}


def test_readme_figure(tmp_path: Path) -> None:
    points = [
        point(codec, 3 + 0.3 * i, 50 * 0.6**i, 0.05)
        for i, codec in enumerate(["kivi-2", "hq3", "turbo-3", "hq3.5", "int4", "hq4", "q4_0", "hq5", "int4+med3"])
    ]
    file = plots.readme_figure({"one": points, "two": points}, tmp_path / "readme.png")
    assert is_picture(file)
    height, width = matplotlib.image.imread(file).shape[:2]
    assert width > 2 * height
    assert file.stat().st_size < 150_000
    with pytest.raises(HqmqError, match="two panels, not 1"):
        plots.readme_figure({"one": points}, tmp_path / "readme.png")


def test_heat_maps_of_uneven_layers_and_zeros(tmp_path: Path) -> None:
    layers = [np.array([0.0, 1.0, 100.0]), np.array([np.nan, 5.0])]
    assert is_picture(plots.heat_maps([("a", layers, True), ("b", layers, False)], "title", tmp_path / "x.png"))
    zeros = [np.zeros(2)]
    plots.heat_maps([("a", zeros, True)], "title", tmp_path / "zeros.png")
    assert (tmp_path / "zeros.png").exists()


def test_collapsed_codecs_and_gains_stay_in_the_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    figures: list[Any] = []
    real = plots._save

    def save(figure: Any, path: Path, dpi: int) -> Path:
        figures.append(figure)
        return real(figure, path, dpi)

    monkeypatch.setattr(plots, "_save", save)
    points = [point("int4", 4.0, 4e6, 9e9), point("hq4", 4.2, 1.0), point("fp8", 8.0, -0.2), point("int8", 16.0, 0.0)]
    assert is_picture(plots.bits_loss({"tiny": points}, tmp_path / "x.png"))
    (axes,) = figures[0].axes
    low, high = axes.get_ylim()
    assert low < -0.2
    assert high > plots.MAX_PERCENT
    assert axes.get_yscale() == "symlog"
    labels = {text.get_text(): text.xy for text in axes.texts}
    assert labels == {"int4 +4.0M%": (4.0, plots.MAX_PERCENT), "hq4": (4.2, 1.0), "fp8": (8.0, -0.2)}
    lines = {
        line.get_label(): line.get_xydata().tolist() for line in axes.lines if line.get_drawstyle() == "steps-post"
    }
    assert sorted(lines.values()) == [
        [[4.0, plots.MAX_PERCENT], [8.0, -0.2], [8.25, -0.2]],
        [[4.2, 1.0], [8.25, 1.0]],
    ]
