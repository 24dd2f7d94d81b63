"""Every architecture of docs/models.md, exported and run beside PyTorch, or refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from hqmq_trt.errors import HqmqError
from hqmq_trt.export import export_model
from hqmq_trt.export.experts import all_experts
from hqmq_trt.export.interface import attention_implementation
from tests.architecture_runs import KL_TOLERANCE, LOGIT_TOLERANCE, MODES, document_cells, engine_cases, examine
from tests.architecture_tables import DOCUMENT, VERDICTS, Document, read_records
from tests.architectures import BY_NAME, EXPORTED, REFUSED, Architecture


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EXPORTED, ids=lambda a: a.id)
def test_exported(architecture: Architecture) -> None:
    """Prefill, a chunk, 32 single tokens of an uneven batch: the model with scheme fp16, PyTorch's cache with hq4."""
    outcome = examine(architecture.name)
    assert not outcome.refused
    assert outcome.spread > 0.15  # a flat distribution would hide every mistake
    for mode in MODES:
        assert outcome.logit_error[mode] < LOGIT_TOLERANCE, mode
        assert outcome.rounding[mode] < 1e-5, mode
        assert outcome.kl[mode] < KL_TOLERANCE, mode
        assert not outcome.tensorrt[mode], mode
    assert document_cells(architecture, outcome) == Document().verdicts()[architecture.name]


@pytest.mark.parametrize("architecture", REFUSED, ids=lambda a: a.id)
def test_refused(architecture: Architecture) -> None:
    """One line that says why, the one in docs/models.md, and nothing left behind."""
    outcome = examine(architecture.name)
    assert architecture.refused in outcome.refused
    assert "\n" not in outcome.refused
    assert document_cells(architecture, outcome) == Document().verdicts()[architecture.name]


def test_the_document_lists_what_is_tested() -> None:
    assert list(Document().verdicts()) == list(BY_NAME)


def test_engines_fill_their_columns(tmp_path: Path) -> None:
    """Results of a GPU go into the columns of engines, a second run in the place of the first; the rest stays."""
    path = tmp_path / "models.md"
    path.write_text(DOCUMENT.read_text(encoding="utf-8"), encoding="utf-8")
    wanted, first = engine_cases(), 1 + len(VERDICTS)
    none = Document(path)
    none.write_engines([], wanted)
    assert {cell for a in EXPORTED for cell in none.cells()[a.name][first : first + 2]} == {"not run"}
    assert [len(ids) for (road, *_), ids in wanted.items() if road == "hugging-face"] == [2] * 2 * len(EXPORTED)

    def record(case: str, **more: object) -> str:
        road, name, mode = next(key for key, ids in wanted.items() if case in ids)
        made = {"case": case, "road": road, "name": name, "mode": mode, "dtype": "float16", "scheme": "hq4@p16"}
        return json.dumps({**made, "tensorrt": "10.6.0", "outcome": "passes", **more})

    whole, part = wanted["hugging-face", "Gemma 2", "fused"], wanted["hugging-face", "GPT-2", "qdq"]
    file = wanted["onnx", "traced", "fused"]
    failure = {"outcome": "fails", "stage": "parse", "error": "no", "tensorrt": None}
    failure["unsupported"] = [{"node": "layers.0.x", "operator": "Erf", "text": "not known"}]  # type: ignore[assignment]
    lines = [record(whole[0], **failure), record(whole[0]), record(whole[1]), record(part[0])]
    results = tmp_path / "engines.jsonl"
    results.write_text("\n".join([*lines, record(file[0]), record(file[1], **failure)]) + "\n")
    Document(path).write_engines(read_records(results), wanted)
    made = Document(path)
    assert made.cells()["Gemma 2"][first : first + 2] == ["passes (10.6.0)", "not run"]
    assert made.cells()["GPT-2"][first : first + 2] == ["not run", "passes 1 of 2 (10.6.0)"]
    assert "| traced | fails (float16 hq4: parse) |" in made.section("engines")
    assert "- traced, fused, float16 hq4: parse: layers.0.x (Erf): not known" in made.section("engines")
    assert "| dynamo18 | not run |" in made.section("engines")
    assert made.verdicts() == Document().verdicts()
    made.write_runs({"Gemma 2": (made.verdicts()["Gemma 2"], ["1e-05", "2e-06"])})
    assert made.cells()["Gemma 2"][first:] == ["passes (10.6.0)", "not run", "1e-05", "2e-06"]
    Document(path).write_engines([], wanted)
    assert [line for line in Document(path).text.splitlines() if "10.6.0)" in line] == []
    results.write_text("{}\n")
    with pytest.raises(ValueError, match="line 1"):
        read_records(results)


@pytest.mark.parametrize("name", ["Mixtral", "gpt-oss"])
def test_experts_are_the_models_own(name: str) -> None:
    """All experts weighted, against the loop of transformers; one that overflows does no harm where it is not asked."""
    block = next(m for m in BY_NAME[name].model().modules() if hasattr(m, "is_transposed"))
    block.config._experts_implementation = "eager"
    x = torch.randn(9, 64)
    index = torch.stack([torch.randperm(3)[:2] for _ in x])  # nobody asks the fourth
    weights = torch.rand(9, 2)
    with torch.no_grad():
        block.down_proj[3].fill_(float("inf"))
        torch.testing.assert_close(all_experts(block, x, index, weights), block(x, index, weights))


def test_longrope_chooses_for_each_sequence() -> None:
    """In one batch, a sequence within the original length and one beyond it: each as on its own."""
    model = BY_NAME["Phi-4-mini"].model()
    rope, x = model.model.rotary_emb, torch.zeros(2, 1, 64)
    positions = torch.tensor([[31], [32]])
    alone = [rope(x[b : b + 1], positions[b : b + 1]) for b in range(2)]
    with attention_implementation(model):
        cos, sin = rope(x, positions)
    assert not torch.equal(rope(x, positions)[0], cos)  # transformers goes by the longest
    for b, (one_cos, one_sin) in enumerate(alone):
        torch.testing.assert_close(cos[b], one_cos[0])
        torch.testing.assert_close(sin[b], one_sin[0])


def test_positions_that_follow_the_cache_are_noticed(tmp_path: Path) -> None:
    """A model that ignores position_ids would be wrong for all but the first tokens."""
    model = BY_NAME["Llama tied"].model()
    inner, forward = model.model, model.model.forward

    def by_cache(*args: object, **kwargs: object) -> object:
        start = kwargs["past_key_values"].get_seq_length()  # type: ignore[attr-defined]
        return forward(*args, **{**kwargs, "position_ids": torch.arange(2)[None] + start})

    inner.forward = by_cache
    with pytest.raises(HqmqError, match="by the length of its cache"):
        export_model(model, tmp_path / "m")
