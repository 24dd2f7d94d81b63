"""Bits against loss: families of codecs, their lower envelopes, and whether ours lies below that of the baselines.

The envelope at a budget of b bits is the smallest loss of all codecs that store b bits an element or less.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from hqmq_trt.eval.statistics import paired_mean

OURS = "HQMQ, ours (hq…)"
PAPER = "HQMQ, paper"
PAPER_MED3 = "HQMQ, paper + Med3×"
INT = "int, per token"
INT_MED3 = "int + Med3×"
LLAMA_CPP = "llama.cpp q4_0, q8_0"
KIVI = "KIVI"
TURBO = "TurboQuant-like"
FP8 = "fp8"
OTHER = "other"
FP16 = "fp16"
TRIAL = "trial"
FAMILIES = (OURS, PAPER, PAPER_MED3, INT, INT_MED3, LLAMA_CPP, KIVI, TURBO, FP8, OTHER)
"""Families in the order of legends. Not among them: FP16, which compresses nothing, and TRIAL, codecs with K balanced
that is not so by default, or the other way round."""

_PREFIXES = (("q4_0", LLAMA_CPP), ("q8_0", LLAMA_CPP), ("kivi", KIVI), ("turbo", TURBO), ("fp8", FP8))
BETTER, WITHIN, WORSE, NOTHING = "better", "within 2 s.e.", "worse", "nothing fits"
"""Verdicts of a comparison, from the side of ours."""
_EQUAL = 1e-6
"""Stored bits closer than this are the same budget (measured bits are means of floats)."""


def family(codec: str) -> str:
    """Family of a codec's spelling; a scheme with K or V of ours is ours."""
    if codec.startswith(("balanced:", "unbalanced:")):
        return TRIAL
    body = re.sub(r"@p\d+$", "", codec.split("#")[0])
    parts = [re.sub(r"^[kv]=", "", part) for part in body.split(",")]
    if any(part.startswith("hq") for part in parts):
        return OURS
    if any(part.startswith("paper:") for part in parts):
        return PAPER_MED3 if "+med3" in body else PAPER
    if all(part == "fp16" for part in parts):
        return FP16
    if re.fullmatch(r"int\d+(\+med3)?", body):
        return INT_MED3 if body.endswith("+med3") else INT
    return next((name for prefix, name in _PREFIXES if body.startswith(prefix)), OTHER)


@dataclass(frozen=True)
class Point:
    """A codec as a point of bits against loss.

    Attributes:
        codec: canonical spelling.
        bits: stored bits an element.
        change: of perplexity against the reference, in percent.
        error: standard error of `change`, percentage points; infinite for a single window.
        nll: mean -log p by window, for paired comparisons with other points; may be empty.
    """

    codec: str
    bits: float
    change: float
    error: float
    nll: Mapping[int, float] = field(default_factory=dict)

    @property
    def family(self) -> str:
        """See :func:`family`."""
        return family(self.codec)


@dataclass(frozen=True)
class Comparison:
    """The best codec of ours and the best baseline within a budget.

    Attributes:
        budget: stored bits an element.
        until: the budget up to which the same two are the best.
        baseline, ours: the best of each; ours is None when none is so small.
        excess: loss of ours minus loss of the baseline, percentage points of perplexity; positive: ours is worse;
            infinite when there is none of ours.
        error: standard error of `excess`: paired by window where both have windows in common, else as if independent.
    """

    budget: float
    until: float
    baseline: Point
    ours: Point | None
    excess: float
    error: float

    @property
    def verdict(self) -> str:
        """BETTER or WORSE by more than 2 standard errors, WITHIN, or NOTHING of ours within the budget."""
        return NOTHING if self.ours is None else judge(self.excess, self.error)


def judge(difference: float, error: float) -> str:
    """BETTER, WITHIN or WORSE for a difference of losses and its standard error; one without an error is WITHIN."""
    if not math.isfinite(error) or abs(difference) <= 2 * error:
        return WITHIN
    return WORSE if difference > 0 else BETTER


def envelope(points: Iterable[Point]) -> list[Point]:
    """The points with a smaller loss than all that store as little or less, by rising bits."""
    found: list[Point] = []
    for point in sorted(points, key=lambda point: (point.bits, point.change)):
        if not found or point.change < found[-1].change:
            found.append(point)
    return found


def best(points: Iterable[Point], budget: float) -> Point | None:
    """The point of the smallest loss within `budget` bits."""
    return min(
        (point for point in points if point.bits <= budget + _EQUAL),
        key=lambda point: (point.change, point.bits),
        default=None,
    )


def compare_envelopes(
    ours: Sequence[Point], baselines: Sequence[Point], low: float = 3.0, high: float = 5.5
) -> list[Comparison]:
    """Ours beside the baselines at every budget in [low, high] that some baseline reaches.

    Between the budgets where either envelope steps nothing changes, so one comparison stands for each stretch.
    """
    steps = {point.bits for point in (*envelope(ours), *envelope(baselines)) if low < point.bits <= high}
    found: list[Comparison] = []
    budgets = sorted({low, *steps})
    for budget, until in zip(budgets, [*budgets[1:], high], strict=True):
        baseline, own = best(baselines, budget), best(ours, budget)
        if baseline is None:
            continue
        if found and (found[-1].baseline, found[-1].ours) == (baseline, own):
            last = found.pop()
            found.append(Comparison(last.budget, until, baseline, own, last.excess, last.error))
            continue
        excess, error = (math.inf, math.nan) if own is None else excess_loss(own, baseline)
        found.append(Comparison(budget, until, baseline, own, excess, error))
    return found


def envelope_check(
    ours: Sequence[Point], baselines: Sequence[Point], low: float = 3.0, high: float = 5.5
) -> list[Comparison]:
    """The budgets in [low, high] at which the best baseline loses less than the best of ours; empty: none."""
    return [found for found in compare_envelopes(ours, baselines, low, high) if found.excess > 0]


def excess_loss(own: Point, other: Point) -> tuple[float, float]:
    """Loss of `own` minus that of `other` in percentage points, and its standard error (see Comparison)."""
    common = sorted(set(own.nll) & set(other.nll))
    if len(common) < 2:
        return own.change - other.change, math.hypot(own.error, other.error)
    difference = paired_mean([own.nll[item] - other.nll[item] for item in common])
    # Percent of perplexity: d exp(x) = exp(x) dx.
    return own.change - other.change, (100 + own.change) * difference.error
