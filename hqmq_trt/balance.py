"""Key balancing: a scale for each channel pair of K, found from the weights, that makes K easier to code.

Our codecs store K minus its page's mean, rotated by a Hadamard matrix. Their error is spread evenly over the channels
of a head, and its variance is proportional to the mean of the channels' variances σ². The error of a score q·k is then
proportional to (Σ w)(Σ σ²), with w_i = E[q_i²] summed over the query heads that share K. RoPE rotates the channels i
and i + rotary_dim/2 together, so it commutes with a scale that the two share. Multiplying K's pair by s_i and q's by
1/s_i changes no score in exact arithmetic, and with s_i = (w_i/σ_i²)^(1/4) the error becomes (Σ √(w σ²))², which is
never more (Cauchy-Schwarz). The scales move into the weights; running the model costs nothing more.

w and σ² come from the weights alone: squares of a projection's row, times the gains of the norm before it (its outputs
are taken to have unit variance and no correlation), plus the bias squared. A page mean removes what is constant along
a page, so K's bias counts by the share that it leaves of a vector that turns by θ_i a token:
r_i = 1 - |1/P Σ_{p<P} exp(i p θ_i)|². Behind norms of q and K, w and σ² are their squared gains.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hqmq_trt import balance_layers
from hqmq_trt.balance_layers import Change, LeftAlone
from hqmq_trt.manifest import Manifest
from hqmq_trt.scheme import DEFAULT_PAGE_SIZE, Scheme

NOTHING_TO_GAIN = 0.95
"""Predicted ratio from which on balancing is not worth it; a layer with all heads above it is left alone."""
TOLERANCE = 1e-3
"""How far logits of the balanced model may be from the original's, as a share of their spread (see difference)."""
_ROUNDING = 2.0
"""In half precision: how far in terms of what another rounding of the weights does, which is measured. Right scales
give 0.9 to 1.1 of that, wrongly paired ones 3 to 20 in bfloat16, 20 to 170 in float16 (tests/test_balance.py)."""
_TOKENS = 96
"""Tokens that the two models are compared on: rotary embedding must have turned far."""


@dataclass(frozen=True)
class LayerBalance:
    """What was done to one attention layer.

    Attributes:
        index: of its cache.
        ratios: predicted variance of the error of q·k as a share of the unbalanced one, for each KV head; empty where
            it could not be predicted.
        reason: why the layer was left alone; empty: it was balanced.
    """

    index: int
    ratios: tuple[float, ...] = ()
    reason: str = ""

    @property
    def balanced(self) -> bool:
        """Whether its weights were changed."""
        return not self.reason


@dataclass(frozen=True)
class BalanceReport:
    """What was done to a model.

    Attributes:
        layers: its attention layers.
        difference: of the logits with and without balancing, as `difference` says; None: not tried.
    """

    layers: tuple[LayerBalance, ...]
    difference: float | None = None

    @property
    def balanced(self) -> int:
        """Layers that were balanced."""
        return sum(layer.balanced for layer in self.layers)

    @property
    def ratio(self) -> float | None:
        """Mean predicted ratio of the balanced layers' heads; None if there are none."""
        found = [ratio for layer in self.layers if layer.balanced for ratio in layer.ratios]
        return sum(found) / len(found) if found else None

    def __str__(self) -> str:
        head = f"K balanced in {self.balanced} of {len(self.layers)} layers"
        if self.ratio is not None:
            head += f": variance of the scores' error predicted to be {self.ratio:.2g} of before"
        reasons = sorted({layer.reason for layer in self.layers if layer.reason})
        return head + (f" (left alone: {'; '.join(reasons)})" if reasons else "")


def applies_to(scheme: Scheme) -> bool:
    """Whether a scheme codes K as this module assumes: packed, minus a page mean, rotated."""
    return scheme.key.packed and scheme.key.page_mean and scheme.key.hadamard


def balance_keys(model: Any, page_size: int = DEFAULT_PAGE_SIZE, verify: bool = True) -> BalanceReport:
    """Balance K in a transformers model, for good.

    Args:
        model: a causal language model; parameters are replaced in place and keep their types.
        page_size: P, tokens of one page of the cache.
        verify: run the model before and after; all layers are put back if the logits differ by more than rounding
            explains: TOLERANCE in float32, in half precision what scales that cannot be wrong change.

    Returns:
        What was done and, for every layer left alone, why.
    """
    return _Balancing(model, page_size).apply(verify)


@contextmanager
def balanced(model: Any, page_size: int = DEFAULT_PAGE_SIZE, verify: bool = True) -> Iterator[BalanceReport]:
    """As balance_keys, but the original weights come back, bit by bit, when the context ends."""
    balancing = _Balancing(model, page_size)
    try:
        yield balancing.apply(verify)
    finally:
        balancing.restore()


@contextmanager
def balanced_like(model: Any, manifest: Manifest) -> Iterator[None]:
    """The PyTorch model with the weights that its export has: balanced where ``key_balance`` says so."""
    if not manifest.key_balance:
        yield
        return
    with balanced(model, manifest.page_size, verify=False):  # the exporter did that
        yield


def difference(reference: Tensor, found: Tensor) -> float:
    """Median over the tokens of the RMS difference of logits [T, V], as a share of the reference's deviation.

    A median, because rounding sends a token of a mixture of experts to another expert now and then.
    """
    spread = reference.std(-1)
    return float(((found - reference).pow(2).mean(-1).sqrt() / spread).median())


class _Balancing:
    """The weights of one model: planned, swapped, put back."""

    def __init__(self, model: Any, page_size: int) -> None:
        self._model, self._page_size = model, page_size
        self._before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def apply(self, verify: bool) -> BalanceReport:
        """Swap the weights in; whatever goes wrong, the model is whole."""
        try:
            return self._apply(verify)
        except BaseException:
            self.restore()
            raise

    def _apply(self, verify: bool) -> BalanceReport:
        layers, plans = [], []
        for index, attention in balance_layers.attention_modules(self._model):
            try:
                plan = balance_layers.plan(self._model, attention, index, self._page_size)
            except LeftAlone as error:
                layers.append(LayerBalance(index, reason=str(error)))
                continue
            gain = any(ratio <= NOTHING_TO_GAIN for ratio in plan.ratios)
            layers.append(LayerBalance(index, plan.ratios, "" if gain else "nothing to gain"))
            plans += [plan] if gain else []
        if not plans:
            return BalanceReport(tuple(layers))
        reference = self._logits() if verify else None
        if isinstance(reference, str):
            return BalanceReport(_left_alone(layers, reference))
        tolerance = TOLERANCE
        if reference is not None and self._model.dtype.itemsize < 4:
            tolerance = _ROUNDING * self._gap(reference, [change for plan in plans for change in plan.neutral])
            self.restore()
        changes = [change for plan in plans for change in plan.changes]
        if reference is None:
            self._swap(changes)
            return BalanceReport(tuple(layers))
        gap = self._gap(reference, changes)
        if not gap <= tolerance:  # NaN, too
            self.restore()
            reason = (
                f"the balanced model's logits are {gap:.2g} of their spread from the original's, "
                f"rounding explains {tolerance:.2g}"
            )
            return BalanceReport(_left_alone(layers, reason), gap)
        return BalanceReport(tuple(layers), gap)

    def restore(self) -> None:
        """Put the original weights back."""
        for parameter, data in self._before:
            parameter.data = data
        self._before.clear()

    def _gap(self, reference: Tensor, changes: list[Change]) -> float:
        """Swap and run."""
        self._swap(changes)
        found = self._logits()
        return float("nan") if isinstance(found, str) else difference(reference, found)

    def _swap(self, changes: list[Change]) -> None:
        for parameter, scale, offset in changes:
            scale = scale.to(parameter.device, torch.float32).reshape(-1, *[1] * (parameter.dim() - 1))
            new = (parameter.data.float() + offset) * scale - offset
            self._before.append((parameter, parameter.data))
            parameter.data = new.to(parameter.dtype)

    def _logits(self) -> Tensor | str:
        """Logits [T, V] of random tokens in float32, or why there are none."""
        model = self._model
        limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or _TOKENS
        size = model.get_input_embeddings().weight.shape[0]
        ids = torch.randint(size, (1, min(_TOKENS, limit)), generator=torch.Generator().manual_seed(0))
        training = model.training
        model.eval()
        try:
            logits: Tensor = model(input_ids=ids.to(model.device), use_cache=False).logits[0].float()
        except Exception as error:  # a model that cannot run proves nothing; whoever needs it will say what is wrong
            return f"the model does not run on {ids.shape[1]} tokens ({type(error).__name__})"
        finally:
            model.train(training)
        return logits


def _left_alone(layers: list[LayerBalance], reason: str) -> tuple[LayerBalance, ...]:
    return tuple(LayerBalance(layer.index, layer.ratios, layer.reason or reason) for layer in layers)
