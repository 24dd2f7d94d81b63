"""Choosing the next token from logits."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn.

    Attributes:
        temperature: 0 takes the most likely token.
        top_k: keep the k most likely tokens (all of equal logit with the k-th); 0 keeps all.
        top_p: then keep the smallest set of tokens whose probability reaches p, in (0, 1].
        seed: of this request's own random stream.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < float("inf"):
            raise HqmqError(f"temperature {self.temperature} is not a number of at least 0")
        if self.top_k < 0:
            raise HqmqError(f"top_k {self.top_k} is negative; 0 keeps all tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise HqmqError(f"top_p {self.top_p} is outside (0, 1]")
        if self.seed < 0:
            raise HqmqError(f"seed {self.seed} is negative")


class Sampler:
    """Draws the tokens of one request; equal settings and logits give equal tokens."""

    def __init__(self, sampling: Sampling) -> None:
        self.sampling = sampling
        self._random = np.random.Generator(np.random.Philox(np.random.SeedSequence(sampling.seed)))

    def __call__(self, logits: NDArray[np.float32]) -> int:
        """The next token for logits [V]."""
        if self.sampling.temperature == 0:
            return int(logits.argmax())
        tokens, probability = kept_tokens(logits, self.sampling)
        drawn = int(np.searchsorted(probability.cumsum(), self._random.random(), side="right"))
        return int(tokens[min(drawn, len(tokens) - 1)])  # rounding may leave the sum below the number drawn


def kept_tokens(logits: NDArray[np.float32], sampling: Sampling) -> tuple[NDArray[np.intp], NDArray[np.float64]]:
    """Tokens that may be drawn, most likely first, and their probabilities (sum 1), for temperature > 0."""
    score = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-score, kind="stable")
    if 0 < sampling.top_k < len(order):
        order = order[score[order] >= score[order[sampling.top_k - 1]]]
    weight = np.exp(score[order] - score[order[0]])
    probability = weight / weight.sum()
    if sampling.top_p < 1.0:
        before = probability.cumsum() - probability
        order, probability = order[before < sampling.top_p], probability[before < sampling.top_p]
    return order, probability / probability.sum()
