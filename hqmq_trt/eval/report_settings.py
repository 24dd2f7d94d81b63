"""What a report names and judges: models, schemes of the summary, targets, ablations; a JSON file.

For instance::

    {
      "models": [{"sha256": "b179c9523d0e", "name": "SmolLM2", "head_dim": 64}],
      "summary": ["hq3", "hq4", "kivi-4:k128v64"],
      "targets": [
        {"model": "SmolLM2", "bits": 4.25, "percent": 2.0, "mode": "qdq"},
        {"model": "SmolLM2", "bits": 4.25, "better_than": "kivi-4:k128v64", "codec": "hq3.5"}
      ],
      "ablation": ["hq4"]
    }

Everything may be left out.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from hqmq_trt.errors import HqmqError
from hqmq_trt.scheme import preset_spelling

CodecName = Annotated[str, AfterValidator(preset_spelling)]
"""A codec as records name it (hqmq_trt.eval.store)."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class ModelSettings(_Strict):
    """A model of the report.

    Attributes:
        sha256: digest of its weights, or the first 8 digits and more.
        name: what tables call it.
        head_dim: D, groups stored bits in the summary.
    """

    sha256: str = Field(pattern="^[0-9a-f]{8,64}$")
    name: str
    head_dim: int | None = Field(None, gt=0)


class Target(_Strict):
    """A loss that ours should not exceed within a budget.

    Attributes:
        model: its name in the tables.
        bits: stored bits an element that the codec may have.
        percent: the largest change of perplexity, in percent.
        better_than: or the codec that ours should lose less than.
        mode: only this one; None: every mode.
        codec: the codec to judge; None: the best of ours within the budget, in each mode.
    """

    model: str
    bits: float = Field(gt=0)
    percent: float | None = None
    better_than: CodecName | None = None
    mode: Literal["fused", "qdq"] | None = None
    codec: CodecName | None = None

    @model_validator(mode="after")
    def _one_measure(self) -> Target:
        if (self.percent is None) == (self.better_than is None):
            raise ValueError("a target has either percent or better_than")
        return self


class Settings(_Strict):
    """See the module; an empty list of schemes (or ablations) means all that were measured."""

    models: tuple[ModelSettings, ...] = ()
    summary: tuple[CodecName, ...] = ()
    targets: tuple[Target, ...] = ()
    ablation: tuple[CodecName, ...] = ()


def read_settings(file: str | Path) -> Settings:
    """Read a settings file.

    Raises:
        HqmqError: no JSON, or not of this form; says which field.
    """
    try:
        return Settings.model_validate_json(Path(file).read_text(encoding="utf-8"))
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise HqmqError(f"{file}: {f'{where}: ' if where else ''}{first['msg']}") from error
