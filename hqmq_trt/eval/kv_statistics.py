"""Statistics of K and V, and what a codec does to them: ``hqmq-trt eval kv``.

K (after RoPE) and V are taken where attention reads them, layer by layer while the model runs, so that only one
layer's are held at a time. Each goes through the real packed cache of every codec; errors are those of full pages
(a tail would be exact). Shapes: H KV heads, Hq query heads, T tokens, D head_dim, P page_size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hqmq_trt.cache import HqmqCache, HqmqLayer
from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.baseline_cache import BaselineCache, BaselineLayer
from hqmq_trt.eval.kv_capture import LayerInput, attend, listening, logit_error
from hqmq_trt.eval.subject import Codec, model_head_dim
from hqmq_trt.format import paper_bits, stored_bits
from hqmq_trt.scheme import DEFAULT_PAGE_SIZE, OUTLIER_FACTOR, ROLES
from hqmq_trt.torch_ops import tensor_names

STATISTICS = {
    "max_over_median": "largest |x| / median |x|",
    "norm_max_over_median": "largest chunk norm / median",
    "kurtosis": "kurtosis of elements (Gaussian: 3)",
    "outliers_page": "outlier chunks, median of a page",
    "outliers_token": "outlier chunks, median of a token",
    "outliers_window": "outlier chunks, median of a window",
    "mean_energy": "energy of the page mean",
}
"""Statistics of a KV head, and what they are called in tables.

An outlier chunk is one whose norm exceeds 3 times the median norm (arXiv 2605.27646, Med3x); the entries are shares
of all chunks. ``mean_energy`` is the share of the sum of squares that lies in the means of pages. Medians are lower
medians; of |x| and of norms over several windows the mean of the windows' medians counts.
"""
SHARES = ("outliers_page", "outliers_token", "outliers_window", "mean_energy")
ERRORS = {
    "key": "K: ‖x - x̂‖² / ‖x‖²",
    "value": "V: ‖x - x̂‖² / ‖x‖²",
    "logits": "attention logits, RMS error (nats)",
    "output": "attention output, ‖o - ô‖ / ‖o‖",
}
"""Errors of a codec, by KV head; x̂ is what the cache returns, in the model's type.

Logits: before a soft-cap, over the coded keys that each query sees. Output: every full page is read decoded.
"""

Heads = NDArray[np.float64]
"""One value a KV head."""


@dataclass
class CodecErrors:
    """What one codec does to K, V and attention.

    Attributes:
        name: canonical spelling.
        errors: a list of layers, each one value a KV head, by key of ERRORS.
        outlier_share: of chunks kept in float16 or dropped, by role, like `errors`; roles with Med3x only.
        dropped: outliers that found no slot, over everything measured.
        stored_bits, paper_bits: an element, mean of K and V; paper_bits with the outliers that occurred.
    """

    name: str
    errors: dict[str, list[Heads]]
    outlier_share: dict[str, list[Heads]]
    dropped: int
    stored_bits: float
    paper_bits: float | None


@dataclass
class KvReport:
    """All that was measured.

    Attributes:
        statistics: by role, then by key of STATISTICS: a list of layers, each one value a KV head.
        codecs: in the order asked for.
        windows, length: windows measured and their tokens.
        page_size: P of the statistics (each codec has its own).
    """

    statistics: dict[str, dict[str, list[Heads]]]
    codecs: list[CodecErrors]
    windows: int
    length: int
    page_size: int = DEFAULT_PAGE_SIZE

    def document(self) -> dict[str, Any]:
        """For JSON: [layer][KV head] lists."""
        return {
            "windows": self.windows,
            "length": self.length,
            "page_size": self.page_size,
            "statistics": {role: _lists(found) for role, found in self.statistics.items()},
            "codecs": {
                codec.name: {
                    "stored_bits": codec.stored_bits,
                    "paper_bits": codec.paper_bits,
                    "errors": _lists(codec.errors),
                    "outlier_share": _lists(codec.outlier_share),
                    "dropped_outliers": codec.dropped,
                }
                for codec in self.codecs
            },
        }


@dataclass(frozen=True)
class Summary:
    """Mean over all layers and KV heads, and the worst (largest) with its place; NaN entries do not count."""

    mean: float
    worst: float
    layer: int
    head: int

    @staticmethod
    def of(layers: Sequence[Heads]) -> Summary:
        """Summary of a list of layers."""
        known = [np.nan_to_num(heads, nan=-np.inf) for heads in layers]
        worst = max(range(len(layers)), key=lambda i: float(known[i].max()))
        head, every = int(known[worst].argmax()), np.concatenate(list(layers))
        mean = math.nan if np.isnan(every).all() else float(np.nanmean(every))
        return Summary(mean, float(layers[worst][head]), worst, head)

    def document(self) -> dict[str, Any]:
        """For JSON."""
        return {"mean": _json(self.mean), "worst": _json(self.worst), "layer": self.layer, "head": self.head}


def _json(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _lists(named: dict[str, list[Heads]]) -> dict[str, list[list[float | None]]]:
    return {name: [[_json(x) for x in heads.tolist()] for heads in layers] for name, layers in named.items()}


def measure_kv(
    model: Any,
    codecs: Sequence[Codec],
    windows: Sequence[Sequence[int]],
    on_layer: Callable[[], None] = lambda: None,
) -> KvReport:
    """Run `model` over windows of token ids and measure.

    Args:
        model: a transformers causal language model in eval mode; its attention is switched and switched back.
        codecs: schemes and baselines.
        windows: rows of equally many tokens, each a sequence of its own.
        on_layer: called after each layer of each window.

    Raises:
        HqmqError: windows shorter than a page of a codec, the reference as codec, a head_dim that is not divisible
            by 4, or K and V that are not finite.
    """
    if not windows:
        raise HqmqError("no windows to measure")
    length, head_dim = len(windows[0]), model_head_dim(model.config)
    if head_dim % 4:
        raise HqmqError(f"head_dim {head_dim} is not divisible by 4: there are no chunks of four elements to look at")
    meters = [_Meter(codec, model.config, head_dim) for codec in codecs]
    longest = max([DEFAULT_PAGE_SIZE, *(meter.page_size for meter in meters)])
    if length < longest:
        raise HqmqError(f"windows of {length} tokens fill no page of {longest}; use --length {longest} or more")
    layers: dict[int, dict[str, _Moments]] = {}

    def listen(seen: LayerInput) -> Tensor:
        if seen.k.shape[0] != 1 or seen.k.shape[2] != length:
            raise HqmqError(f"layer {seen.layer} reads K {list(seen.k.shape)}, not one sequence of {length} tokens")
        moments = layers.setdefault(seen.layer, {role: _Moments() for role in ROLES})
        for role, x in zip(ROLES, (seen.k, seen.v), strict=True):
            if not bool(x.isfinite().all()):
                raise HqmqError(f"layer {seen.layer}: {role} is not finite; use another --dtype (float32 or bfloat16)")
            moments[role].add(x[0].float())
        q, k, v = (x[0].float() for x in (seen.q, seen.k, seen.v))
        exact = attend(q, k, v, seen.visible, seen.parameters)
        for meter in meters:
            meter.add(seen, exact)
        on_layer()
        return exact

    with torch.no_grad(), listening(model, listen):
        for row in windows:
            # The base model: logits over the vocabulary are not needed.
            model.base_model(torch.tensor([list(row)], device=model.device), use_cache=False)
    if not layers:
        raise HqmqError(f"{type(model).__name__} calls no attention function of transformers; K and V cannot be seen")
    order = sorted(layers)
    results = {role: [layers[layer][role].result() for layer in order] for role in ROLES}
    statistics = {role: {name: [found[name] for found in results[role]] for name in STATISTICS} for role in ROLES}
    return KvReport(statistics, [meter.result(order) for meter in meters], len(windows), length)


def _numpy(x: Tensor) -> Heads:
    return x.double().cpu().numpy()


def _lower_median(x: Tensor) -> Tensor:
    """Lower median of the last axis, kept as an axis of 1."""
    return x.median(-1, keepdim=True).values


class _Moments:
    """Running statistics of one layer and role."""

    def __init__(self) -> None:
        self._sums: dict[str, Heads] = {}
        self._windows = 0

    def _add(self, name: str, value: Tensor) -> None:
        self._sums[name] = self._sums.get(name, 0.0) + _numpy(value)

    def _largest(self, name: str, value: Tensor) -> None:
        found = _numpy(value)
        self._sums[name] = np.maximum(self._sums.get(name, found), found)

    def add(self, x: Tensor) -> None:
        """Take one window, float32 [H, T, D]."""
        self._windows += 1
        flat, size = x.flatten(1).double(), x.abs().flatten(1)
        for power in (1, 2, 3, 4):
            self._add(f"power{power}", flat.pow(power).sum(1))
        self._add("count", torch.full((len(x),), flat.shape[1]))
        self._largest("max", size.amax(1))
        self._add("median", _lower_median(size)[:, 0])
        square = x.unflatten(-1, (-1, 4)).square().sum(-1)  # [H, T, D/4]
        limit = OUTLIER_FACTOR * OUTLIER_FACTOR
        window = square.flatten(1)
        self._largest("norm_max", window.amax(1).sqrt())
        self._add("norm_median", _lower_median(window)[:, 0].sqrt())
        self._add("outliers_window", (window > limit * _lower_median(window)).double().mean(1))
        self._add("outliers_token", (square > limit * _lower_median(square)).double().mean((1, 2)))
        full = x.shape[1] // DEFAULT_PAGE_SIZE * DEFAULT_PAGE_SIZE
        page = square[:, :full].unflatten(1, (-1, DEFAULT_PAGE_SIZE)).flatten(2)
        self._add("outliers_page", (page > limit * _lower_median(page)).double().mean((1, 2)))
        pages = x[:, :full].double().unflatten(1, (-1, DEFAULT_PAGE_SIZE))
        self._add("mean_square", DEFAULT_PAGE_SIZE * pages.mean(2).square().sum((1, 2)))
        self._add("page_square", pages.square().sum((1, 2, 3)))

    def result(self) -> dict[str, Heads]:
        """By key of STATISTICS."""
        sums = self._sums
        mean, second, third, fourth = (sums[f"power{power}"] / sums["count"] for power in (1, 2, 3, 4))
        variance = second - mean**2
        central = fourth - 4 * mean * third + 6 * mean**2 * second - 3 * mean**4
        found = {
            "max_over_median": _ratio(sums["max"], sums["median"] / self._windows),
            "norm_max_over_median": _ratio(sums["norm_max"], sums["norm_median"] / self._windows),
            "kurtosis": _ratio(central, variance**2),
            "mean_energy": _ratio(sums["mean_square"], sums["page_square"]),
        }
        for name in ("outliers_page", "outliers_token", "outliers_window"):
            found[name] = sums[name] / self._windows
        return found


def _ratio(over: Heads, under: Heads) -> Heads:
    """over / under; NaN where under is 0 (a head that is zero throughout)."""
    return np.divide(over, under, out=np.full_like(over, np.nan), where=under != 0)


@dataclass
class _Layer:
    """Running sums of a codec in one layer; arrays over KV heads."""

    error: dict[str, Any] = field(default_factory=dict)
    energy: dict[str, Any] = field(default_factory=dict)
    outliers: dict[str, Any] = field(default_factory=dict)
    chunks: int = 0


class _Meter:
    """Sends K and V through the cache of one codec and adds up the errors."""

    def __init__(self, codec: Codec, config: Any, head_dim: int) -> None:
        coder = codec.scheme or codec.baseline
        if coder is None:
            raise HqmqError(f"codec '{codec.name}' changes nothing, so it has no errors; name a scheme or a baseline")
        self._codec, self._head_dim, self.page_size = codec, head_dim, coder.page_size
        self._layers: dict[int, _Layer] = {}
        self._dropped = self._bits = self._elements = 0
        # Made once for their checks of the model; the layers are made as they come, so that no window is held whole.
        if codec.scheme is not None:
            HqmqCache(config, codec.scheme)
        elif codec.baseline is not None:
            BaselineCache(config, codec.baseline, "qdq")

    def add(self, seen: LayerInput, exact: Tensor) -> None:
        """Take one layer of one window; `exact`: what its attention gives without the codec, float32 [Hq, T, D]."""
        sums = self._layers.setdefault(seen.layer, _Layer())
        heads, full = seen.k.shape[1], seen.k.shape[2] // self.page_size * self.page_size
        plain, coded = [x[0].float() for x in (seen.k, seen.v)], self._through_cache(seen, sums)
        for role, x, x_hat in zip(ROLES, plain, coded, strict=True):
            error = (x - x_hat)[:, :full].double().square().sum((1, 2))
            _add(sums, role, error, x[:, :full].double().square().sum((1, 2)))
        queries, pages = seen.q[0].float(), seen.visible.clone()
        pages[:, full:] = False
        error, pairs = logit_error(queries, plain[0] - coded[0], pages, seen.parameters.scale)
        _add(sums, "logits", error, torch.full_like(error, pairs))
        out = attend(queries, coded[0], coded[1], seen.visible, seen.parameters)
        difference, energy = (
            x.unflatten(0, (heads, -1)).double().square().sum((1, 2, 3)) for x in (out - exact, exact)
        )
        _add(sums, "output", difference, energy)
        sums.chunks += full * seen.k.shape[3] // 4

    def _through_cache(self, seen: LayerInput, sums: _Layer) -> list[Tensor]:
        """K and V as the cache returns them, float32 [H, T, D]."""
        scheme, baseline = self._codec.scheme, self._codec.baseline
        if scheme is not None:
            held = HqmqLayer(scheme, seen.layer, None, lambda: False)
            coded = held.update(seen.k, seen.v)
            for role in (name for name in ROLES if scheme.role(name).med3):
                sums.outliers[role] = sums.outliers.get(role, 0.0) + self._outliers(held, role, seen.k.shape[2])
            self._dropped += held.dropped_outliers()
        else:
            assert baseline is not None
            published = BaselineLayer(baseline, seen.layer, "qdq", lambda: "")
            coded = published.update(seen.k, seen.v)
            for rows in published.rows[0]:
                self._bits += rows.bits
                self._elements += rows.elements
        return [x[0].float() for x in coded]

    def _outliers(self, held: HqmqLayer, role: str, length: int) -> Heads:
        """Chunks [H] kept in float16, and those that should have been but found no slot."""
        place = tensor_names(held.scheme.role(role)).index("outlier_mask")
        mask = held.role_tensors(role)[place][0, :, : length // self.page_size].cpu()
        kept = (mask[..., :-1, None] >> torch.arange(32)) & 1
        return _numpy(kept.sum((1, 2, 3)) + mask[..., -1].sum(1))

    def result(self, order: Sequence[int]) -> CodecErrors:
        """What was added up, for layers in `order`."""
        layers = [self._layers[layer] for layer in order]
        errors = {name: [_ratio(sums.error[name], sums.energy[name]) for sums in layers] for name in ERRORS}
        for name in ("logits", "output"):
            errors[name] = [np.sqrt(heads) for heads in errors[name]]
        shares = {
            role: [sums.outliers[role] / sums.chunks for sums in layers] for role in ROLES if role in layers[0].outliers
        }
        scheme, paper = self._codec.scheme, None
        if scheme is None:
            stored = self._bits / self._elements
        else:
            roles = {role: scheme.role(role) for role in ROLES}
            stored = sum(stored_bits(role, self._head_dim, self.page_size) for role in roles.values()) / 2
            occurred = {role: Summary.of(found).mean for role, found in shares.items()}
            paper = sum(paper_bits(role, self._head_dim, occurred.get(name, 0.0)) for name, role in roles.items()) / 2
        return CodecErrors(self._codec.name, errors, shares, self._dropped, stored, paper)


def _add(sums: _Layer, name: str, error: Tensor, energy: Tensor) -> None:
    sums.error[name] = sums.error.get(name, 0.0) + _numpy(error)
    sums.energy[name] = sums.energy.get(name, 0.0) + _numpy(energy)
