"""Comparison of engines and greedy text, on a simulated GPU (tests/simulated_gpu.py): what needs no TensorRT."""

from __future__ import annotations

import copy
import json
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner

from hqmq_trt import cli, ort_library
from hqmq_trt.diff import compare, greedy, open_runtimes, stateless
from hqmq_trt.diff.greedy import GreedyCheck
from hqmq_trt.diff.report import write_report
from hqmq_trt.engine.manifest import EngineManifest
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest
from hqmq_trt.runtime import OrtSession, TrtSession, trt_engine
from hqmq_trt.scheme import ROLES
from tests import simulated_gpu
from tests.trt_session_cases import text

CONTEXT, CHUNK, PAGE = 128, 40, 16
TOKENS, STEPS = 70, 10
Export = Callable[..., Path]
Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def model(tiny_model: Models) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(tiny_model("llama"), dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(tiny_export: Export, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("diff") / "engine"
    return simulated_gpu.make_engine(tiny_export(), folder, 2, CONTEXT, CHUNK)


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch, tiny_export: Export) -> Iterator[simulated_gpu.Gpu]:
    """The simulated GPU; in Polygraphy's TrtRunner's place stands another OnnxrtRunner."""

    @contextmanager
    def runner(folder: Path) -> Iterator[BaseRunner]:
        assert EngineManifest.is_engine(folder)
        path = tiny_export() / "model.onnx"
        yield OnnxrtRunner(lambda: ort_library.session(path), "tensorrt")

    gpu = simulated_gpu.simulate(monkeypatch)
    monkeypatch.setattr(stateless, "_trt_runner", runner)
    yield gpu
    trt_engine.trt_log.cache_clear()


def test_engine_beside_onnx_runtime(
    model: Any, tiny_export: Export, engine: Path, gpu: simulated_gpu.Gpu, tmp_path: Path
) -> None:
    read: dict[str, int] = {}

    def on_feed(name: str, tokens: int) -> None:
        read[name] = read.get(name, 0) + tokens

    result = compare(
        tiny_export(), model, text(TOKENS + STEPS), decode_steps=STEPS, on_feed=on_feed, engine=engine, chunk=512
    )
    total = TOKENS + STEPS
    assert read == {"unpacked": total, "same": total, "onnxruntime": total, "tensorrt": total, "pinned": 3 * total}
    assert gpu.launches == 2 * (STEPS - 1), "all but the first decode step of each session are graph launches"
    assert (gpu.live, gpu.graphs) == ({}, 0), "the sessions are closed"
    assert list(result.runtimes) == ["onnxruntime", "tensorrt"]
    for found in result.runtimes.values():
        assert list(found.logits) == ["unpacked", "same", "pinned"]
        assert found.logits["same"].mean_kl < 1e-5 < found.logits["unpacked"].mean_kl
        assert found.logits["pinned"].mean_kl < 1e-6
        assert len(found.logits["pinned"].kl) == TOKENS + STEPS
        assert max(found.changed.values()) < 0.05
        for error in found.layers:
            assert error.codec is not None
            assert 0.003 < error.codec < 0.012
            assert error.in_run < 0.05
    assert result.direct is not None
    assert result.direct.logits.mean_kl < 1e-5
    assert [(error.layer, error.role, error.codec) for error in result.direct.layers] == [
        (layer, role, None) for layer in (0, 1) for role in ROLES
    ]
    assert max(error.in_run for error in result.direct.layers) < 1e-3
    check = result.stateless
    assert check is not None
    assert (check.tokens, check.max_difference) == (CHUNK, 0.0)
    assert check.changed == {"key": 0, "value": 0}
    assert check.chunks == dict.fromkeys(ROLES, 2 * 2 * 2 * PAGE * 64 // 4), "layers, heads, pages of 16 tokens"

    content = json.loads(json.dumps(result.document(), allow_nan=False))
    assert content["logits"] == content["runtimes"]["onnxruntime"]["logits"]
    assert content["tensorrt_against_onnxruntime"]["logits"]["positions"] == TOKENS + STEPS
    assert not result.within(1e-9, None)
    write_report(result, tmp_path / "report.html", "tiny", {}, [("greedy text", "equal")])
    page = (tmp_path / "report.html").read_text()
    assert page.count("<svg") == 5
    for words in ("TensorRT against ONNX Runtime", "TensorRT against PyTorch, same HqmqCache bytes", "TrtRunner"):
        assert words in page


def test_pinned_counts_and_corrects_other_bytes(
    model: Any, tiny_export: Export, engine: Path, gpu: simulated_gpu.Gpu, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that writes one wrong word in each page is seen in the count, and does not pass it on."""
    honest = TrtSession._run

    def run(self: TrtSession, ids: Any, new: Any, index: Any) -> Any:
        before = int(self.lengths[0]) // PAGE
        logits = honest(self, ids, new, index)
        after = (int(self.lengths[0]) + int(new[0])) // PAGE
        if after > before:
            codes = self._read_cache("0.key.codes", 0, after * PAGE)
            codes[0, -1, 0] ^= 1
            self._write_cache("0.key.codes", 0, codes)
        return logits

    arguments = (tiny_export(), model, text(TOKENS + STEPS), ["pinned"], STEPS)
    clean = compare(*arguments, engine=engine, onnx_runtime=False)
    monkeypatch.setattr(TrtSession, "_run", run)
    wrong = compare(*arguments, engine=engine, onnx_runtime=False)
    pages = (TOKENS + STEPS) // PAGE
    chunks = 2 * 2 * pages * PAGE * 64 // 4
    assert wrong.stateless is None
    assert list(wrong.runtimes) == ["tensorrt"]
    assert wrong.changed["key"] - clean.changed["key"] == pytest.approx(pages / chunks)
    assert wrong.changed["value"] == clean.changed["value"]
    assert wrong.logits["pinned"].mean_kl < 1e-6


def test_stateless_check_sees_other_codes(tiny_export: Export) -> None:
    folder = tiny_export()
    manifest = Manifest.load(folder)
    ids = np.array(text(2 * PAGE + 3), np.int64)

    class Wrong(OnnxrtRunner):
        def infer_impl(self, feed_dict: Any) -> Any:
            outputs = super().infer_impl(feed_dict)
            outputs["present.1.value.codes"][0, 0, 0, 0] ^= 1
            outputs["present.1.value.codes"][0, 0, 2 * PAGE :] = -1  # of no full page
            outputs["logits"][0, 0, 0] += 0.5
            return outputs

    def new_session() -> Any:
        return ort_library.session(folder / "model.onnx")

    check = stateless.compare_runners(manifest, OnnxrtRunner(new_session, "a"), Wrong(new_session, "b"), ids)
    assert check.changed == {"key": 0, "value": 1}
    assert check.max_difference == pytest.approx(0.5, abs=1e-3)
    assert check.logits.mean_kl > 0


@lru_cache(maxsize=1)
def _prompt() -> tuple[int, ...]:
    # With some texts float32 rounding turns a code, and with it a token: which, depends on the cache format.
    return tuple(text(2 * PAGE + 5, 2))


def test_greedy_text_is_equal(model: Any, tiny_export: Export, engine: Path, gpu: simulated_gpu.Gpu) -> None:
    for new_session in open_runtimes(tiny_export(), CONTEXT, CHUNK, engine=engine).values():
        with new_session() as session:
            check = greedy(model, session, _prompt(), 40)
        assert check.passed
        assert check.first_divergence is None, str(check)
        assert "all 40 greedy tokens equal" in str(check)


@pytest.mark.parametrize("seed", [1, 3, 4])
def test_a_code_that_rounding_turns_explains_a_token(model: Any, tiny_export: Export, seed: int) -> None:
    """Texts after which float32 sums in another order chose another code or scale, and so another token."""
    check = greedy(model, OrtSession(tiny_export(), 1, CONTEXT), text(2 * PAGE + 5, seed), 40)
    assert check.passed, str(check)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_greedy_divergence_is_measured(
    model: Any, tiny_export: Export, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A runtime that prefers the second likeliest token at one step."""
    honest, step, lift = OrtSession.decode, 7, 3.0

    def decode(self: OrtSession, tokens: Any) -> Any:
        logits = honest(self, tokens).copy()
        if int(self.lengths[0]) == len(_prompt()) + step:
            second, first = np.argsort(logits[0])[-2:]
            logits[0, second] = logits[0, first] + lift
        return logits

    monkeypatch.setattr(OrtSession, "decode", decode)
    check = greedy(copy.deepcopy(model).to(dtype), OrtSession(tiny_export(), 1, CONTEXT), _prompt(), 20)
    assert check.first_divergence == step
    assert check.reference != check.found
    assert check.gap is not None
    assert check.difference == pytest.approx(check.gap + lift, abs=0.2)
    assert check.rounding is not None
    assert 0 < check.rounding < 0.5
    assert check.document()["passed"] == check.passed == (check.gap <= 2 * check.rounding)


def test_greedy_verdict() -> None:
    found = GreedyCheck(5, 20, 7, 1, 2, gap=0.1, difference=0.2, rounding=0.06)
    assert found.passed
    assert "token 7 of 20 is 2, PyTorch's 1: explained by rounding (gap 0.1, bound 0.12" in str(found)
    far = replace(found, gap=0.13)
    assert not far.passed
    assert "NOT explained" in str(far)
    assert not replace(found, gap=float("nan")).passed


def test_mistakes(model: Any, tiny_export: Export, engine: Path, gpu: simulated_gpu.Gpu, tmp_path: Path) -> None:
    ids = text(20)
    with pytest.raises(HqmqError, match="is an engine; give the folder"):
        compare(engine, model, ids, decode_steps=4)
    with pytest.raises(HqmqError, match="no runtime to compare"):
        compare(tiny_export(), model, ids, decode_steps=4, onnx_runtime=False)
    with pytest.raises(HqmqError, match=f"holds {CONTEXT} tokens, 200 are needed"):
        compare(tiny_export(), model, text(200), decode_steps=4, engine=engine)
    with pytest.raises(HqmqError, match="was not built from"):
        compare(tiny_export("hq4@p16", "qdq"), model, ids, decode_steps=4, engine=engine)
    with pytest.raises(HqmqError, match="needs a prompt"):
        greedy(model, OrtSession(tiny_export(), 1, CONTEXT), [], 4)
    with pytest.raises(HqmqError, match="raise max_context"):
        greedy(model, OrtSession(tiny_export(), 1, 16), ids, 4)
    cut = Path(shutil.copytree(engine, tmp_path / "copy"))
    (cut / "engine.plan").write_bytes(b"cut off")
    with pytest.raises(HqmqError, match=r"engine\.plan"):
        compare(tiny_export(), model, ids, decode_steps=4, engine=cut)


def test_command(
    tiny_export: Export,
    tiny_model: Models,
    engine: Path,
    gpu: simulated_gpu.Gpu,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ("diff", tiny_export(), "--model", tiny_model("llama"), "--engine", engine, "--tokens", "36")
    options = ("--against", "same", "--greedy", "5", "--device", "cpu")
    monkeypatch.setattr(sys, "argv", ["hqmq-trt", *map(str, (*arguments, *options)), "--json"])
    with suppress(SystemExit):
        cli.main()
    found = json.loads(capsys.readouterr().out)
    assert found["decode_steps"] == 64
    assert found["tensorrt_against_onnxruntime"]["logits"]["positions"] == 100
    assert {name: check["new_tokens"] for name, check in found["greedy"].items()} == {"onnxruntime": 5, "tensorrt": 5}
    assert found["passed"] is True
    assert found["device"] == "cpu"
    monkeypatch.setattr(sys, "argv", ["hqmq-trt", *map(str, (*arguments, *options)), "--no-ort", "--decode-steps", "8"])
    with suppress(SystemExit):
        cli.main()
    out = capsys.readouterr().out
    assert "PyTorch runs on: cpu" in out
    assert "greedy text, tensorrt: all 5 greedy tokens equal PyTorch's" in out
