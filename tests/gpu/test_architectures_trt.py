"""Every architecture of docs/models.md, and rewritten ONNX files, as TensorRT engines beside ONNX Runtime.

All engines that this run of pytest asks for are built first, a few at a time (benchmarks/architectures_trt.py).
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from benchmarks.architectures_trt import all_cases, run_cases
from tests.gpu.requirements import missing

_MISSING = missing("tensorrt", "pycuda")
pytestmark = [pytest.mark.gpu, pytest.mark.slow, pytest.mark.skipif(bool(_MISSING), reason=_MISSING)]


@pytest.fixture(scope="module")
def records(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Results by case id."""
    output = tmp_path_factory.mktemp("engines")
    asked = {item.callspec.params.get("case") for item in request.session.items if hasattr(item, "callspec")}
    cases = [case for case in all_cases(output / "exports") if case.id in asked]
    exporters = max(1, len(os.sched_getaffinity(0)) // 2)
    options = {"timing_cache": output / "timing.cache"}
    return run_cases(cases, output, workers=4, exporters=exporters, seconds=1800, options=options)


@pytest.mark.parametrize("case", [case.id for case in all_cases(Path())])
def test_engine_is_onnx_runtime(case: str, records: dict[str, dict[str, Any]]) -> None:
    """Prefill, a chunk and 32 single tokens of a padded batch; limits: benchmarks/architecture_engines.py."""
    assert case in records, "the time was up"
    record = records[case]
    assert record["outcome"] == "passes", f"{record['stage']}: {record['error']} {record.get('unsupported', '')}"
