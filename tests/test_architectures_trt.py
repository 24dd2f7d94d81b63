"""benchmarks/architectures_trt.py without a GPU: engines simulated by ONNX Runtime, failures of every kind."""

from __future__ import annotations

import json
import os
import shutil
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest
from onnx import numpy_helper

from benchmarks import architecture_engines
from benchmarks.architecture_engines import Case
from benchmarks.architectures_trt import EXACT, HALF, RESULTS, all_cases, export, run_cases
from hqmq_trt.engine import builder
from hqmq_trt.engine.manifest import EngineManifest
from hqmq_trt.errors import HqmqError
from tests import fake_tensorrt, simulated_gpu

LIMITS = ("max_batch", "max_context", "prefill_chunk")


def simulated(task: tuple[Case, dict[str, Any]]) -> dict[str, Any]:
    """examine() on a simulated GPU. The case's name says what goes wrong."""
    case, _ = task
    if case.name == "crash":
        os._exit(3)
    if case.name == "hang":
        time.sleep(600)
    if case.name == "raise":
        raise ValueError("of the work itself")
    monkeypatch = pytest.MonkeyPatch()
    gpu = simulated_gpu.simulate(monkeypatch)
    gpu.capacity = 1000 if case.name == "memory" else gpu.capacity

    def build(model: Path, output: Path, **options: Any) -> EngineManifest:
        assert options["timing_cache"] == "cache"
        if case.name == "parse":
            monkeypatch.setitem(sys.modules, "tensorrt", parser_that_objects())
            raise HqmqError(f"{model}: TensorRT 10.6.0 cannot parse it: node 'layers.0.top' (TopK): no")
        simulated_gpu.make_engine(model, output, *(options[name] for name in LIMITS))
        if case.name == "wrong":
            _spoil(output.with_suffix(".onnx"))
        return EngineManifest.load(output)

    with monkeypatch.context() as patch:
        patch.setattr(builder, "build_engine", build)
        found = architecture_engines.examine(task)
    monkeypatch.undo()
    return found


def parser_that_objects() -> Any:
    """A TensorRT whose parser names two nodes."""
    trt = fake_tensorrt.FakeTensorRT()

    def error(name: str, operator: str) -> Any:
        return SimpleNamespace(node_name=lambda: name, node_operator=lambda: operator, desc=lambda: "is\nnot known")

    errors = [error("layers.0.top", "TopK"), error("layers.1.norm", "LayerNormalization")]
    trt.OnnxParser = lambda network, log: SimpleNamespace(
        supports_model_v2=lambda content, path: False, num_errors=2, get_error=lambda index: errors[index]
    )
    return trt


def _spoil(path: Path) -> None:
    model = onnx.load(path)
    for tensor in model.graph.initializer:
        if tensor.name.endswith("up_proj.weight"):
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    onnx.save(model, path)


def cases_of(exports: Path, *names: str, variant: tuple[str, str] = EXACT) -> list[Case]:
    return [Case("hugging-face", name, "fused", *variant, exports) for name in names]


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exports of one architecture under the names that `simulated` knows."""
    root = tmp_path_factory.mktemp("exports")
    made = [*cases_of(root, "Qwen2"), *cases_of(root, "Qwen2", variant=HALF)]
    for case in made:
        export(case)
    for case in cases_of(root, "crash", "hang", "raise", "memory", "parse", "wrong"):
        shutil.copytree(made[0].folder, case.folder)
    return root


def run(cases: list[Case], output: Path, **options: Any) -> dict[str, dict[str, Any]]:
    options = {"work": simulated, "before": None, "seconds": 300, "options": {"timing_cache": "cache"}, **options}
    return run_cases(cases, output, workers=2, exporters=1, **options)


def test_every_failure_is_one_line_and_the_rest_goes_on(exports: Path, tmp_path: Path) -> None:
    cases = [
        *cases_of(exports, "crash", "hang", "raise", "memory", "parse", "wrong", "Mamba", "Qwen2"),
        *cases_of(exports, "Qwen2", variant=HALF),
    ]
    found = run(cases, tmp_path, task_seconds=20)
    assert list(found) == [case.id for case in cases]
    by_name = {record["name"]: record for record in found.values() if record["dtype"] == "float32"}
    stages = {name: record.get("stage") for name, record in by_name.items()}
    assert stages == {
        "crash": "process", "hang": "process", "raise": "process", "memory": "load", "parse": "parse",
        "wrong": "compare", "Mamba": "export", "Qwen2": None,
    }  # fmt: skip
    assert "exit code 3" in by_name["crash"]["error"]
    assert "stopped after 20 s" in by_name["hang"]["error"]
    assert by_name["raise"]["error"] == "ValueError: of the work itself"
    assert "recurrent state" in by_name["Mamba"]["error"]
    assert "out of device memory" in by_name["memory"]["error"]
    assert "node 'layers.0.top' (TopK)" in by_name["parse"]["error"]
    assert by_name["parse"]["unsupported"] == [
        {"node": "layers.0.top", "operator": "TopK", "text": "is not known"},
        {"node": "layers.1.norm", "operator": "LayerNormalization", "text": "is not known"},
    ]
    assert by_name["wrong"]["logit_error"] > 100 * by_name["wrong"]["limit"]["logit_error"]
    good, half = by_name["Qwen2"], found[cases[-1].id]
    assert (good["outcome"], half["outcome"]) == ("passes", "passes")
    assert good["limit"] == {"logit_error": architecture_engines.LOGIT_LIMIT["hugging-face"]}
    assert good["logit_error"] < 1e-6
    assert half["limit"]["kl"] >= 4 * half["rounding"] > 0
    assert 0 <= half["kl"] < 1e-6
    assert good["operators"]["HqmqAttention"] == 2
    assert len((tmp_path / RESULTS).read_text().splitlines()) == len(cases)


def test_what_is_there_is_not_done_again(exports: Path, tmp_path: Path) -> None:
    cases = cases_of(exports, "Qwen2", "raise")
    kept = {"case": cases[1].id, "outcome": "passes", "seconds": 1.0}
    (tmp_path / RESULTS).write_text(json.dumps(kept) + '\n{"case": "cut o')
    assert run(cases, tmp_path)[cases[1].id] == kept
    assert run(cases, tmp_path, seconds=0)[cases[0].id]["outcome"] == "passes"


def test_nothing_begins_when_the_time_is_up(exports: Path, tmp_path: Path) -> None:
    assert run(cases_of(exports, "Qwen2", "crash"), tmp_path, seconds=0) == {}
    assert not (tmp_path / RESULTS).exists()


def test_case_ids_differ() -> None:
    cases = all_cases(Path())
    assert len({case.id for case in cases}) == len(cases) > 60
