"""Numbers a comparison is made of. All logarithms are natural."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
_ROWS = 64


def log_softmax(logits: NDArray[np.floating]) -> Array:
    """Log-probabilities [N, V] of logits [N, V], in float64."""
    x = logits.astype(np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@dataclass
class LogitComparison:
    """Logits of a model against a reference, position by position.

    Attributes:
        kl: KL(reference || model) in nats, float64 [positions].
        agree: whether both have the same most likely token, bool [positions].
        nll_reference, nll: -log p of the token that really follows, float64 [positions where one follows].
    """

    kl: Array
    agree: NDArray[np.bool_]
    nll_reference: Array
    nll: Array

    @staticmethod
    def of(
        reference: NDArray[np.floating], logits: NDArray[np.floating], following: NDArray[np.int64]
    ) -> LogitComparison:
        """Compare logits [N, V]; `following` [≤ N] holds the token after each position."""
        kl, agree, nll_reference, nll = [], [], [], []
        for start in range(0, len(reference), _ROWS):
            a, b = (log_softmax(x[start : start + _ROWS]) for x in (reference, logits))
            kl.append((np.exp(a) * (a - b)).sum(-1))
            agree.append(a.argmax(-1) == b.argmax(-1))
            tokens = following[start : start + _ROWS]
            nll_reference.append(-a[np.arange(len(tokens)), tokens])
            nll.append(-b[np.arange(len(tokens)), tokens])
        return LogitComparison(*(np.concatenate(parts) for parts in (kl, agree, nll_reference, nll)))

    @staticmethod
    def join(parts: list[LogitComparison]) -> LogitComparison:
        """One comparison over the positions of several."""
        return LogitComparison(
            np.concatenate([part.kl for part in parts]),
            np.concatenate([part.agree for part in parts]),
            np.concatenate([part.nll_reference for part in parts]),
            np.concatenate([part.nll for part in parts]),
        )

    @property
    def mean_kl(self) -> float:
        """Mean KL over positions."""
        return float(self.kl.mean())

    @property
    def top1(self) -> float:
        """Share of positions with the same most likely token."""
        return float(self.agree.mean())

    def within(self, max_kl: float | None, min_top1: float | None) -> bool:
        """Whether the mean KL and the top-1 agreement keep to the limits; a NaN never does."""
        return (max_kl is None or self.mean_kl <= max_kl) and (min_top1 is None or self.top1 >= min_top1)

    def summary(self) -> dict[str, float]:
        """The numbers of the report."""
        return {
            "mean_kl": self.mean_kl,
            "median_kl": float(np.median(self.kl)),
            "p99_kl": float(np.quantile(self.kl, 0.99)),
            "max_kl": float(self.kl.max()),
            "top1": self.top1,
            "positions": len(self.kl),
            "perplexity_reference": float(np.exp(self.nll_reference.mean())) if len(self.nll) else float("nan"),
            "perplexity": float(np.exp(self.nll.mean())) if len(self.nll) else float("nan"),
        }


@dataclass
class LayerError:
    """Relative mean squared error of one layer's K or V, against those of the PyTorch model or of another runtime.

    Attributes:
        layer, role: which; role is ``key`` or ``value``.
        codec: of coding the true K or V of this layer alone; None where two runtimes are compared.
        in_run: of what the running model's cache holds: the codec's error and what earlier layers' errors did.
    """

    layer: int
    role: str
    codec: float | None
    in_run: float


def relative_mse(true: NDArray[np.floating], found: NDArray[np.floating]) -> float:
    """‖found - true‖² / ‖true‖², in float64."""
    a, b = true.astype(np.float64), found.astype(np.float64)
    return float(((a - b) ** 2).sum() / max((a * a).sum(), np.finfo(np.float64).tiny))
