"""Means with standard errors, and intervals of shares."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Estimate:
    """A mean, its standard error (infinite for a single value) and the number of values."""

    mean: float
    error: float
    count: int


def paired_mean(differences: NDArray[np.float64] | Sequence[float]) -> Estimate:
    """Mean of differences between two codecs on the same items, with its standard error."""
    values = np.asarray(differences, np.float64)
    error = float(values.std(ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.inf
    return Estimate(float(values.mean()), error, len(values))


def wilson(successes: int, count: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson score interval of a share (Wilson 1927); z = 1.96: 95 %."""
    if not 0 <= successes <= count or count == 0:
        raise ValueError(f"{successes} of {count} is no share")
    share, squared = successes / count, z * z
    middle = (share + squared / (2 * count)) / (1 + squared / count)
    half = z / (1 + squared / count) * math.sqrt(share * (1 - share) / count + squared / (4 * count * count))
    return max(0.0, middle - half), min(1.0, middle + half)


def score_interval(scores: NDArray[np.float64], binary: bool) -> tuple[float, float]:
    """95 % interval of the mean of scores in 0…1: Wilson's where all are 0 or 1 (`binary`), else mean ± 1.96 standard
    errors; 0…1 for a single score that is neither."""
    if binary:
        return wilson(int(scores.sum()), len(scores))
    mean = paired_mean(scores)
    half = 1.96 * mean.error
    return max(0.0, mean.mean - half), min(1.0, mean.mean + half)


def sign_test(better: int, worse: int) -> float:
    """Two-sided p of so uneven a split if both were equally likely (exact binomial; McNemar's test of flips)."""
    count = better + worse
    tail = sum(math.comb(count, i) for i in range(min(better, worse) + 1)) / 2**count
    return min(1.0, 2 * tail)
