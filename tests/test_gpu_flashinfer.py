"""FlashInfer as a baseline, without FlashInfer and without a GPU: a module in its place that attends over pages."""

from __future__ import annotations

import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import typer
from torch import Tensor

from benchmarks import gpu_attention, gpu_cases, gpu_flashinfer, gpu_tables, gpu_targets
from benchmarks.gpu_cases import Shape
from benchmarks.gpu_flashinfer import Decode, Setting, kernels
from hqmq_trt.errors import HqmqError

CPU = torch.device("cpu")
NOT_INSTALLED = "not installed (pip install flashinfer-python)"


def attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """[Hq, D] of q [Hq, D], k and v [H, T, D]."""
    group = len(q) // len(k)
    k, v = (x.float().repeat_interleave(group, 0) for x in (k, v))
    weights = torch.einsum("hd,htd->ht", q.float(), k).mul(scale).softmax(-1)
    return torch.einsum("ht,htd->hd", weights, v).half()


def paged(q: Tensor, cache: Tensor, pages: list[Tensor], tokens: list[int], scale: float) -> Tensor:
    """[B, Hq, D] over the first tokens[i] of pages[i] of a cache [pages, 2, H, page, D]."""
    rows = []
    for row, its_pages, count in zip(q, pages, tokens, strict=True):
        k, v = torch.cat([cache[page].float() for page in its_pages.tolist()], 2)[:, :, :count]
        rows.append(attend(row, k, v, scale))
    return torch.stack(rows)


class Wrapper:
    """Does what FlashInfer's documentation says of BatchDecodeWithPagedKVCacheWrapper; keeps how it was made."""

    made: list[dict[str, Any]]
    broken: dict[str, Callable[[Tensor], Tensor]]
    """Kernels that compute something else."""

    def __init__(self, workspace: Tensor, kv_layout: str = "NHD", **options: Any) -> None:
        assert workspace.dtype == torch.uint8
        assert kv_layout == "HND"
        self.options = options
        self.kernel = options.get("backend", "auto") if options["use_tensor_cores"] else "cuda_cores"
        self.buffers = [options[f"paged_kv_{name}_buffer"] for name in ("indptr", "indices", "last_page_len")]
        self.made.append(options)

    def plan(self, indptr: Tensor, indices: Tensor, last_page_len: Tensor, *sizes: int, **more: Any) -> None:
        for buffer, given in zip(self.buffers, (indptr, indices, last_page_len), strict=True):
            assert given.dtype == torch.int32
            buffer.copy_(given)
        self.heads, self.kv_heads, self.head_dim, self.page_size = sizes
        self.more = more

    def run(self, q: Tensor, cache: Tensor) -> Tensor:
        assert q.dtype == self.more["q_data_type"]
        assert cache.dtype == self.more["kv_data_type"]
        assert q.shape[1:] == (self.heads, self.head_dim)
        assert cache.shape[1:] == (2, self.kv_heads, self.page_size, self.head_dim)
        indptr, indices, last = (buffer.tolist() for buffer in self.buffers)
        pages = [torch.tensor(indices[a:b]) for a, b in itertools.pairwise(indptr)]
        tokens = [(len(p) - 1) * self.page_size + n for p, n in zip(pages, last, strict=True)]
        y = paged(q, cache, pages, tokens, self.more["sm_scale"])
        return self.broken.get(self.kernel, lambda x: x)(y)


def xqa_batch_decode_with_kv_cache(
    query: Tensor, kv_cache: Tensor, workspace: Tensor, block_tables: Tensor, seq_lens: Tensor, most: int, **more: Any
) -> Tensor:
    assert not workspace.any()
    assert seq_lens.dtype == torch.uint32
    assert (block_tables.dtype, more["kv_layout"], more["bmm2_scale"]) == (torch.int32, "HND", 1.0)
    assert most == block_tables.shape[1] * kv_cache.shape[3]
    tokens = seq_lens.view(torch.int32).tolist()
    return paged(query, kv_cache, list(block_tables), tokens, more["bmm1_scale"])


def single_prefill_with_kv_cache(
    q: Tensor, k: Tensor, v: Tensor, causal: bool, kv_layout: str, sm_scale: float
) -> Tensor:
    assert (causal, kv_layout) == (True, "HND")
    seen = [k.shape[1] - len(q) + 1 + i for i in range(len(q))]
    return torch.stack([attend(q[i], k[:, :n], v[:, :n], sm_scale) for i, n in enumerate(seen)])


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module in FlashInfer's place."""
    module: Any = ModuleType("flashinfer")
    module.decode = ModuleType("flashinfer.decode")
    module.BatchDecodeWithPagedKVCacheWrapper = type("Fresh", (Wrapper,), {"made": [], "broken": {}})
    module.decode.xqa_batch_decode_with_kv_cache = xqa_batch_decode_with_kv_cache
    module.single_prefill_with_kv_cache = single_prefill_with_kv_cache
    monkeypatch.setitem(sys.modules, "flashinfer", module)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", module.decode)
    monkeypatch.setattr(gpu_flashinfer, "WORKSPACE", 1 << 16)
    return module


@pytest.fixture
def absent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flashinfer", None)


@pytest.mark.usefixtures("absent")
def test_it_is_told_why_flashinfer_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpu_flashinfer.missing(CPU) == NOT_INSTALLED
    del sys.modules["flashinfer"]
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "flashinfer.py").write_text("import a_module_that_is_not_there\n")
    assert gpu_flashinfer.missing(CPU) == "does not import: No module named 'a_module_that_is_not_there'"
    (tmp_path / "flashinfer.py").write_text("raise OSError('libx.so: no such file\\nmore')  # another size\n")
    assert gpu_flashinfer.missing(CPU) == "does not import: libx.so: no such file"
    (tmp_path / "flashinfer.py").write_text("")
    assert gpu_flashinfer.missing(CPU) == "needs a GPU"
    assert gpu_flashinfer.missing(torch.device("cuda", 0)) is None


@pytest.mark.parametrize("kind", ["fp16", "fp8"])
@pytest.mark.parametrize("context", [64, 100, 129])
def test_every_setting_attends_over_the_tokens_of_the_shape(fake: Any, context: int, kind: str) -> None:
    shape = Shape(3, context, group=4, head_dim=64, heads=2)
    decode = Decode(shape, CPU, gpu_flashinfer.DTYPES[kind])
    settings = kernels("flashinfer", kind) + kernels("flashinfer_xqa", kind)
    for setting in settings:
        steps = decode.steps(setting)
        assert decode.error(steps, setting.page_size) < 2e-3, setting
    options = fake.BatchDecodeWithPagedKVCacheWrapper.made
    assert all(made["use_cuda_graph"] for made in options)
    found = [made.get("backend") if made["use_tensor_cores"] else "cores" for made in options]
    expected = ["fa2", "fa2", "fa3", "fa3", "cores", "cores"] if kind == "fp16" else ["fa2", "fa2", "cores", "cores"]
    assert found == expected
    assert settings[-1] == Setting("xqa", 64)


def test_an_error_is_one_of_the_checked_sequences(fake: Any) -> None:
    decode = Decode(Shape(2, 64, group=2, head_dim=32, heads=1), CPU, torch.float16)
    setting = Setting("fa2", 16)
    fake.BatchDecodeWithPagedKVCacheWrapper.broken["fa2"] = lambda y: 1.25 * y
    assert decode.error(decode.steps(setting), 16) == pytest.approx(0.25, abs=1e-2)


def test_launches_in_turn_read_other_memory(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_flashinfer, "copies_for", lambda nbytes, device: 3)
    decode = Decode(Shape(1, 64, group=1, head_dim=32, heads=1), CPU, torch.float8_e4m3fn)
    decode.q[:] = decode.q[0].clone()
    for setting in (Setting("fa2", 16), Setting("xqa", 64)):
        steps: Any = decode.steps(setting)
        outputs = {tuple(step().flatten().tolist()) for step in steps}
        assert len(steps) == len(outputs) == 3
    starts = {decode.cache(copy, 16).data_ptr() for copy in range(3)}
    assert len(starts) == 3
    assert decode.memory.float().std() == pytest.approx(1, abs=0.05)


def test_the_fastest_is_taken_and_a_wrong_kernel_is_not(fake: Any) -> None:
    decode = Decode(Shape(2, 64, group=2, head_dim=32, heads=1), CPU, torch.float16)
    fake.BatchDecodeWithPagedKVCacheWrapper.broken["fa3"] = torch.zeros_like
    settings = kernels("flashinfer", "fp16")
    times = iter([30.0, 20.0, 10.0, 40.0])  # the two of fa3 are not timed
    found = decode.fastest(settings, lambda steps: next(times))
    assert found.setting == Setting("cuda_cores", 16)
    assert found.error < 1e-3
    assert len(found.steps) == 1
    assert found.tried["fa2, pages of 64"] == 20.0
    assert found.tried["fa3, pages of 16"] == "HqmqError: its output is off by 1"
    del fake.decode.xqa_batch_decode_with_kv_cache
    found = decode.fastest(kernels("flashinfer_xqa", "fp16"), lambda steps: 1.0)
    assert found.setting is None
    assert found.tried == {"xqa, pages of 64": "HqmqError: this FlashInfer has no XQA"}


def test_nan_is_wrong(fake: Any) -> None:
    fake.BatchDecodeWithPagedKVCacheWrapper.broken["fa2"] = lambda y: y * float("nan")
    decode = Decode(Shape(1, 64, group=2, head_dim=32, heads=1), CPU, torch.float16)
    assert decode.fastest([Setting("fa2", 16)], lambda steps: 1.0).setting is None


def test_bytes_of_a_step() -> None:
    shape = Shape(16, 32768)
    elements, rows = 2 * 16 * 32768 * 8 * 128, 2 * 16 * 32 * 128 * 2
    small = Shape(2, 100, group=2, head_dim=32, heads=1)
    assert Decode(small, CPU, torch.float16).bytes_read(16) == 2 * 2 * 100 * 32 * 2 + 4 * 2 * 7 + 2 * 2 * 2 * 32 * 2
    for dtype, each in ((torch.float16, 2), (torch.float8_e4m3fn, 1)):
        decode = object.__new__(Decode)
        decode.shape, decode.dtype = shape, dtype
        assert decode.bytes_read(64) == each * elements + 4 * 16 * 512 + rows


def test_prefill_is_checked_at_its_first_and_last_query(fake: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = Shape(1, 48, group=2, head_dim=32, heads=2, tokens=16)
    y: Any = gpu_flashinfer.prefill_step(shape, CPU)()
    assert y.shape == (16, 4, 32)

    def from_the_first_key(q: Tensor, k: Tensor, v: Tensor, **more: Any) -> Tensor:
        return torch.stack([attend(q[i], k[:, : i + 1], v[:, : i + 1], more["sm_scale"]) for i in range(len(q))])

    monkeypatch.setattr(fake, "single_prefill_with_kv_cache", from_the_first_key)
    with pytest.raises(HqmqError, match="the output of query 0 is off"):
        gpu_flashinfer.prefill_step(shape, CPU)
    with pytest.raises(HqmqError, match="one sequence"):
        gpu_flashinfer.prefill_step(Shape(2, 48, tokens=16), CPU)


def test_prefill_is_timed_or_told_why_not(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = gpu_attention.Run(tmp_path, CPU, 60.0, "abc")

    def found() -> dict[str, Any]:
        run.rows.clear()
        run.prefill(16, 48, [])
        (row,) = (row for row in run.rows if row["case"] == "flashinfer")
        return row

    assert found()["missing"] == "needs a GPU"
    monkeypatch.setattr(gpu_flashinfer, "missing", lambda device: None)
    assert found()["us"] > 0
    monkeypatch.setattr(fake, "single_prefill_with_kv_cache", lambda q, k, v, **more: torch.zeros_like(q))
    assert found()["failed"] == "the output of query 0 is off by 1"
    run.without = ["prefill"]
    assert found()["missing"] == "left out"


def measure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: str = "") -> tuple[list[dict[str, Any]], str]:
    """Rows and tables of a small run on the CPU."""
    monkeypatch.setattr(gpu_cases, "BLOCK", 128)
    gpu_cases._coded_block.cache_clear()
    app = typer.Typer()
    app.command()(gpu_attention.main)
    arguments = f"--output {tmp_path} --device cpu --contexts 128 --batches 1 --heads 2 --groups 2 --head-dims 64"
    command = typer.main.get_command(app)
    command.main([*arguments.split(), *more.split(), "--scheme", "hq3", "--commit", "abc"], standalone_mode=False)
    rows = json.loads((tmp_path / "gpu_attention.json").read_text())["rows"]
    return rows, (tmp_path / "gpu_attention.md").read_text()


@pytest.mark.usefixtures("absent")
def test_a_table_says_that_flashinfer_is_not_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, text = measure(tmp_path, monkeypatch)
    found = {(row["kind"], row["case"]): row["missing"] for row in rows if "missing" in row}
    assert found == {("fp16", "flashinfer"): NOT_INSTALLED, ("fp8", "flashinfer_fp8"): NOT_INSTALLED}
    assert text.count(NOT_INSTALLED) == 2
    (ours,) = (row for row in rows if row["kind"] == "ours")
    assert ours["best_fp16"] == "torch_cpu"


def test_a_table_names_the_settings(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_flashinfer, "missing", lambda device: None)
    fake.BatchDecodeWithPagedKVCacheWrapper.broken["fa3"] = torch.zeros_like
    rows, text = measure(tmp_path, monkeypatch)
    found = {row["case"]: row for row in rows if row["case"].startswith("flashinfer")}
    assert list(found) == ["flashinfer", "flashinfer_xqa", "flashinfer_fp8", "flashinfer_xqa_fp8"]
    assert [row["kind"] for row in found.values()] == ["fp16", "fp16", "fp8", "fp8"]
    assert all(row["us"] > 0 and row["error"] < 2e-3 for row in found.values())
    half = 2 * 128 * 2 * 64  # elements of K and V
    assert found["flashinfer_xqa"]["bytes"] == 2 * half + 4 * 2 + 2 * 4 * 64 * 2
    assert found["flashinfer_xqa_fp8"]["bytes"] == half + 4 * 2 + 2 * 4 * 64 * 2
    assert f"flashinfer fp16 ({found['flashinfer']['settings']})" in text
    assert "flashinfer_xqa_fp8 (xqa, pages of 64)" in text
    assert "flashinfer, fa3, pages of 16: HqmqError: its output is off by 1" in text


def test_several_tokens_are_no_decode_of_flashinfer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows, text = measure(tmp_path, monkeypatch, "--tokens 2")
    assert {row["case"] for row in rows} == {"torch_cpu", "hq3"}
    assert "timed with one new token a sequence only" in text


def test_kernels_can_be_left_out(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_flashinfer, "missing", lambda device: None)
    rows, text = measure(tmp_path, monkeypatch, "--flashinfer-without fa2,fa3,xqa")
    found = {row["case"]: row for row in rows if row["case"].startswith("flashinfer")}
    assert list(found["flashinfer"]["tried"]) == ["cuda_cores, pages of 16", "cuda_cores, pages of 64"]
    assert [found[f"flashinfer_xqa{end}"]["missing"] for end in ("", "_fp8")] == ["left out"] * 2
    assert "left out of FlashInfer: fa2, fa3, xqa" in text
    with pytest.raises(typer.BadParameter, match="FlashInfer has no fa4"):
        measure(tmp_path, monkeypatch, "--flashinfer-without fa4")


def test_a_case_of_which_no_setting_runs_says_so(fake: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_flashinfer, "missing", lambda device: None)
    del fake.BatchDecodeWithPagedKVCacheWrapper
    rows, text = measure(tmp_path, monkeypatch)
    (row,) = (row for row in rows if row["case"] == "flashinfer")
    assert "us" not in row
    assert row["failed"].startswith("AttributeError")
    assert "flashinfer failed 1 times: AttributeError" in text


def test_the_prefill_table_says_it_too() -> None:
    rows = [{"kind": "prefill_fp16", "case": "flashinfer", "tokens": 8, "context": 16, "missing": NOT_INSTALLED}]
    assert gpu_tables.prefill_sheet(rows).rows == [("8", "8", "flashinfer fp16", NOT_INSTALLED, "")]


def test_the_target_of_fp8_is_the_fastest_fp8() -> None:
    usual = {"batch": 16, "context": 32768, "heads": 8, "group": 4, "head_dim": 128, "tokens": 1}
    times = (("ours", "hq3", 100.0), ("fp8", "flashinfer_fp8", 400.0), ("fp8", "flashinfer_xqa_fp8", 300.0))
    rows = [{"kind": kind, "case": case, "us": us, **usual} for kind, case, us in times]
    found = {target["target"]: target["value"] for target in gpu_targets.targets(rows, 2.7e12)}
    assert found["hq3, B16 32k, times FlashInfer fp8"] == 3.0
