"""The architectures of docs/models.md by the road from ONNX: exported by torch.onnx alone, then rewritten."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from hqmq_trt.errors import HqmqError
from hqmq_trt.export.rewrite import rewrite_model
from tests import rewrite_cases as cases
from tests.architectures import BY_NAME, EXPORTED, Architecture

NOT_BY_TORCH = {"gpt-oss", "Mixtral", "Qwen3 MoE"}
"""Mixtures of experts that torch.onnx cannot convert by itself."""
LONGROPE = "Phi-4-mini"
TRIED = [a for a in EXPORTED if a.name not in {*NOT_BY_TORCH, LONGROPE}]


@pytest.mark.parametrize("architecture", TRIED, ids=lambda a: str(a.id))
def test_rewritten_decoder_is_the_original(architecture: Architecture, tmp_path: Path) -> None:
    model, path = architecture.model(), tmp_path / "decoder.onnx"
    cases.export_dynamo(model, path, 18)
    rewrite_model(path, tmp_path / "fp16", "fp16@p8")
    found = cases.run_rewritten(tmp_path / "fp16")
    assert cases.mean_difference(cases.run_original(onnx.load(path)), found) < 1e-4
    rewrite_model(path, tmp_path / "hq4", "hq4@p8")
    packed = cases.run_rewritten(tmp_path / "hq4")
    assert cases.divergence(cases.run_torch(model, "hq4@p8"), packed) < 1e-4
    assert cases.mean_difference(found, packed) > 1e-4


def test_frequencies_that_depend_on_the_length_are_refused(tmp_path: Path) -> None:
    cases.export_dynamo(BY_NAME[LONGROPE].model(), tmp_path / "decoder.onnx", 18)
    with pytest.raises(HqmqError, match="depends on how long a sequence is"):
        rewrite_model(tmp_path / "decoder.onnx", tmp_path / "out")
    assert not (tmp_path / "out").exists()
