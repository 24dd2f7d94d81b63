"""Every architecture of docs/models.md, exported and run beside PyTorch, or refused."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import pytest
import torch

from hqmq_trt.errors import HqmqError
from hqmq_trt.export import export_model
from hqmq_trt.export.experts import all_experts
from hqmq_trt.export.interface import attention_implementation
from tests.architecture_runs import (
    KL_TOLERANCE,
    LOGIT_TOLERANCE,
    MODES,
    Outcome,
    committed,
    document_cells,
    examine,
    examine_all,
)
from tests.architectures import BY_NAME, EXPORTED, REFUSED, Architecture


@pytest.fixture(scope="session")
def outcomes(request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Outcome]]]:
    """Outcomes of the architectures that this run asks for."""
    asked = [item.callspec.params.get("architecture") for item in request.session.items if hasattr(item, "callspec")]
    found = examine_all(dict.fromkeys(a.name for a in asked if isinstance(a, Architecture) and not a.refused))
    yield found
    for future in found.values():
        future.cancel()


@pytest.mark.slow
@pytest.mark.parametrize("architecture", EXPORTED, ids=lambda a: a.id)
def test_exported(architecture: Architecture, outcomes: dict[str, Future[Outcome]]) -> None:
    """Prefill, a chunk, 32 single tokens of an uneven batch: the model with scheme fp16, PyTorch's cache with hq4."""
    outcome = outcomes[architecture.name].result()
    assert not outcome.refused
    assert outcome.spread > 0.15  # a flat distribution would hide every mistake
    for mode in MODES:
        assert outcome.logit_error[mode] < LOGIT_TOLERANCE, mode
        assert outcome.rounding[mode] < 1e-5, mode
        assert outcome.kl[mode] < KL_TOLERANCE, mode
        assert not outcome.tensorrt[mode], mode
    assert document_cells(architecture, outcome) == committed()[architecture.name]


@pytest.mark.parametrize("architecture", REFUSED, ids=lambda a: a.id)
def test_refused(architecture: Architecture) -> None:
    """One line that says why, the one in docs/models.md, and nothing left behind."""
    outcome = examine(architecture.name)
    assert architecture.refused in outcome.refused
    assert "\n" not in outcome.refused
    assert document_cells(architecture, outcome) == committed()[architecture.name]


def test_the_document_lists_what_is_tested() -> None:
    assert list(committed()) == list(BY_NAME)


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
