"""The benchmark of GPU attention without a GPU: caches, bytes and errors on the CPU, targets from made-up rows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import typer

from benchmarks import gpu_attention, gpu_cases, gpu_encode, gpu_ragged, gpu_targets
from benchmarks.gpu_cases import Ours, Shape, build_cache
from hqmq_trt.scheme import Scheme
from tests.emulated_cuda import EmulatedGpu

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _small_block(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_cases, "BLOCK", 128)
    gpu_cases._coded_block.cache_clear()


def run(main: Any, arguments: str) -> None:
    app = typer.Typer()
    app.command()(main)
    typer.main.get_command(app).main(arguments.split(), standalone_mode=False)


def test_a_run_writes_rows_tables_and_a_plot(tmp_path: Path) -> None:
    arguments = (
        f"--output {tmp_path} --device cpu --contexts 128,256,512 --batches 1 --heads 2 --groups 2 --head-dims 64"
    )
    run(gpu_attention.main, f"{arguments} --grid --commit abc")
    found = json.loads((tmp_path / "gpu_attention.json").read_text())
    ours = [row for row in found["rows"] if row["kind"] == "ours"]
    assert {row["case"] for row in ours} == {"hq3", "hq3.5", "hq4", "hq5"}
    assert all(row["error"] < 1e-3 and row["us"] > 0 and 1 < row["limit_x"] < 5 for row in ours)
    assert all(row["x_fp16"] > 0 for row in ours)
    assert len(found["growth"]) == 4
    assert {row["reached"] for row in found["targets"]} == {None}
    text = (tmp_path / "gpu_attention.md").read_text()
    assert "commit abc" in text
    assert "FlashInfer and Triton are not timed in a grid" in text
    assert (tmp_path / "gpu_attention.png").stat().st_size > 1000


def test_encoding_is_compared_with_attention_and_steps_with_those_that_fill_pages(tmp_path: Path) -> None:
    arguments = f"--output {tmp_path} --device cpu --contexts 256 --head-dim 64 --scheme hq3"
    run(gpu_encode.main, f"{arguments} --batches 2 --step-context 128")
    rows = json.loads((tmp_path / "gpu_encode.json").read_text())["rows"]
    (row,) = [r for r in rows if r["kind"] == "encode"]
    assert row["share"] > 0
    (step,) = [r for r in rows if r["kind"] == "step"]
    assert (step["batch"], step["context"]) == (2, 128)
    assert step["fill"] > step["ordinary"] > 0
    assert step["append_fill"] > step["append"] > 0
    assert "A new token in each sequence" in (tmp_path / "gpu_encode.md").read_text()


def test_bytes_of_a_step_are_those_of_full_pages_and_the_tail() -> None:
    shape = Shape(2, 256, group=2, head_dim=64, heads=2)
    case = Ours(shape, "hq3", CPU)
    words, pages, rest = 6, 4, 32  # 12 bits for each of 16 chunks; 256 + 32 tokens, 4 pages of 64
    key, value = 64 * (4 * words + 1) + 2 * 64, 64 * (4 * words + 1)
    expected = 2 * 2 * (pages * (key + value) + 2 * (rest + 4) * 2 * 64) + 2 * 2 * 4 * 64 * 2
    assert case.bytes_read() == expected
    outliers = Ours(shape, "paper:s96_r4+med3", CPU)
    share = outliers.outlier_share()
    assert share == pytest.approx(0.03, abs=0.01)


def test_pages_of_a_cache_differ() -> None:
    for name in ("hq3", "paper:s8_r3"):
        cache = build_cache(Scheme.parse(name), "key", 2, 64, 2, 512, CPU)
        scales = cache[1].transpose(1, 2).flatten(0, 1).flatten(1)
        assert len({tuple(page.tolist()) for page in scales}) == 16


def test_scales_change_a_little_and_stay_scales() -> None:
    g = torch.Generator().manual_seed(0)
    short = torch.arange(248).to(torch.uint8).reshape(1, 31, 8)
    words = short.clone().view(torch.int32)
    gpu_cases._change_scales(words, Scheme.parse("hq3").key, g)
    change = words.view(torch.uint8).int() - short.int()
    assert change.unique().tolist() == [-1, 0, 1]
    assert change[0, 0, 0] == 0
    assert change[0, 0, 1] >= 0
    assert change[0, 30, 7] <= 0
    half = torch.full((1, 4, 64), 2.0).half()
    gpu_cases._change_scales(half.view(torch.int32), Scheme.parse("paper:s8_r3").key, g)
    assert half.min() >= 1
    assert half.max() <= 3
    assert half.unique().numel() > 50


def row(**values: Any) -> dict[str, Any]:
    usual = {"kind": "ours", "case": "hq3", "heads": 8, "group": 4, "head_dim": 128, "tokens": 1, "us": 10.0}
    return {**usual, **values}


def test_targets_follow_from_rows() -> None:
    rows = [
        row(batch=1, context=131072, x_fp16=4.3, warm_x_fp16=4.3),
        row(batch=16, context=32768, x_fp16=4.4, us=150.0),
        row(batch=1, context=4096, x_fp16=0.9),
        row(kind="encode", batch=1, context=32768, share=0.04),
        row(kind="encode", case="hq4", batch=1, context=32768, share=0.16),
        row(kind="prefill", batch=1, context=32768, tokens=8192, x_fp16=0.8),
    ]
    found = {target["target"]: target for target in gpu_targets.targets(rows, 2.7e12)}
    reached = {name: target["reached"] for name, target in found.items() if target["reached"] is not None}
    assert reached == {
        "hq3, B1 128k, times the best fp16": True,
        "hq3, B16 32k, times the best fp16": False,
        "hq3, B1 4k, times the best fp16": False,
        "hq3, B16 32k, times the fp8 byte limit (FlashInfer is not there)": True,
        "encoding a 32k prefill, hq3, share of its attention, at most": True,
        "encoding a 32k prefill, hq4, share of its attention, at most": False,
        "prefill of 8k over 24k, hq3, times the best fp16": True,
        "the least of all points from 4k on, times the best fp16": False,
    }
    assert [r["x_fp16"] for r in gpu_targets.worst_first(rows)] == [0.9, 4.3, 4.4]


def test_growth_is_told() -> None:
    rows = [row(batch=1, context=context, us=us) for context, us in ((1024, 1.0), (2048, 2.0), (4096, 8.0))]
    assert gpu_targets.growth(rows)[0]["growth"] == pytest.approx(3.0)


def test_ragged_batches_are_timed_and_compared(emulated: EmulatedGpu) -> None:
    *times, error = gpu_ragged.measure([40, 300, 130], "hq4", CPU, heads=1)
    assert len(times) == 4
    assert all(float(time) > 0 for time in times)
    assert float(error) < 1e-3
