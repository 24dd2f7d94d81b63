"""What hqmq_trt.balance must know of a layer: its q and K, how RoPE pairs their channels, and the scales that follow.

Nothing is decided by a model's name. Layers whose parts are not all understood are left alone, with the reason.
"""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

LARGEST_SCALE = 1e3
"""Scales lie between 1/LARGEST_SCALE and LARGEST_SCALE: half-precision weights must hold them."""
_FLOOR = 1e-12
"""Least w and σ² of a pair as a share of the head's largest: a pair without weight has no best scale."""
_NEUTRAL = 1.37
"""No power of two, so that the weights are rounded anew."""
_PARTS = {"q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj", "dense", "q_norm", "k_norm", "rotary_emb"}
"""Children of an attention module that are understood; others may stand between q or K and the scores."""


class LeftAlone(Exception):
    """Why a layer is not balanced."""


Change = tuple[Tensor, Tensor, float]
"""Parameter, scale of its rows, offset: the new value is (old + offset) * scale - offset."""


@dataclass(frozen=True)
class Plan:
    """How one layer is balanced.

    Attributes:
        ratios: predicted variance of the error of q·k as a share of the unbalanced one, for each KV head.
        changes: what balances it.
        neutral: one scale for all of K, and its inverse for q: no more than another rounding of the weights.
    """

    ratios: tuple[float, ...]
    changes: list[Change]
    neutral: list[Change]


def attention_modules(model: Any) -> list[tuple[int, nn.Module]]:
    """Attention modules by the index of their caches, in that order."""
    found = [
        (module.layer_idx, module)
        for module in model.modules()
        if isinstance(getattr(module, "layer_idx", None), int) and "Attention" in type(module).__name__
    ]
    return sorted(found, key=lambda item: item[0])


def plan(model: Any, attention: nn.Module, index: int, page_size: int) -> Plan:
    """The scales of one layer; nothing is changed.

    Raises:
        LeftAlone: something in it is not understood.
    """
    config = model.config.get_text_config()
    q, k, shape = _projections(model, attention, config)
    kv_heads, group, head_dim = shape
    frequencies, half = _frequencies(model, attention, config, index, head_dim)
    pair = pair_index(head_dim, half)
    norms: list[Any] = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
    normed = any(norm is not None for norm in norms)
    if normed:
        gains = [_head_norm(norm, head_dim) for norm in norms]
        variances = [gain.square()[None] for gain, _, _ in gains]
        constants = [bias.square()[None] for _, _, bias in gains]
    else:
        gain, shift = _input_norm(model, attention, q.weight.shape[1])
        variances = [(q.rows(q.weight) * gain).square().sum(1), (k.rows(k.weight) * gain).square().sum(1)]
        constants = [(q.bias + q.rows(q.weight) @ shift).square(), (k.bias + k.rows(k.weight) @ shift).square()]
        variances = [variances[0].reshape(kv_heads, group, head_dim).sum(1), variances[1].reshape(kv_heads, head_dim)]
        constants = [constants[0].reshape(kv_heads, group, head_dim).sum(1), constants[1].reshape(kv_heads, head_dim)]
    w = _pair_sums(variances[0] + constants[0], pair)
    sigma2 = _pair_sums(variances[1], pair) + _pair_sums(constants[1], pair) * page_remainder(frequencies, page_size)
    if not (w.isfinite().all() and sigma2.isfinite().all()):
        raise LeftAlone("weights of q or K are not finite")
    w, sigma2 = _floored(w), _floored(sigma2)
    ratios = (w * sigma2).sqrt().sum(-1).square() / (w.sum(-1) * sigma2.sum(-1))

    def changes(scale: Tensor) -> list[Change]:
        if normed:
            return _norm_changes(norms, [offset for _, offset, _ in gains], scale[0])
        by_query = scale[:, None].expand(kv_heads, group, head_dim)
        return _projection_changes(q, k, (1 / by_query).reshape(-1), scale.reshape(-1))

    scale = scales(w, sigma2)[:, pair]
    return Plan(tuple(ratios.expand(kv_heads).tolist()), changes(scale), changes(torch.full_like(scale, _NEUTRAL)))


def scales(w: Tensor, sigma2: Tensor) -> Tensor:
    """s = (w/σ²)^(1/4), its geometric mean 1 a head, within LARGEST_SCALE; all [heads, pairs]."""
    s = (w / sigma2).pow(0.25)
    s = s / s.log().mean(-1, keepdim=True).exp()
    return s.clamp(1 / LARGEST_SCALE, LARGEST_SCALE)


def page_remainder(frequencies: Tensor, page_size: int) -> Tensor:
    """r: what subtracting the mean of `page_size` tokens leaves of the square of vectors that turn by θ a token."""
    angles = torch.arange(page_size, dtype=torch.float64)[:, None] * frequencies
    return 1 - torch.polar(torch.ones_like(angles), angles).mean(0).abs().square()


def pair_index(head_dim: int, half: int) -> Tensor:
    """Pair of each channel, int64 [head_dim]: i and i + half share one, channels from 2·half on have their own."""
    channels = torch.arange(head_dim)
    return torch.where(channels < 2 * half, channels % max(half, 1), channels - half)


def _pair_sums(x: Tensor, pair: Tensor) -> Tensor:
    """[heads, head_dim] to [heads, pairs]."""
    return torch.zeros(x.shape[0], int(pair.max()) + 1, dtype=x.dtype).index_add(1, pair, x)


def _floored(x: Tensor) -> Tensor:
    return torch.maximum(x, _FLOOR * x.amax(-1, keepdim=True)).clamp_min(1e-30)


@dataclass(frozen=True)
class _Projection:
    """Rows first…last of an nn.Linear that make q or K; statistics are float64 on the CPU, the same on any device."""

    linear: nn.Linear
    first: int
    last: int

    @property
    def weight(self) -> Tensor:
        """Of the whole nn.Linear."""
        return self.linear.weight

    @property
    def bias(self) -> Tensor:
        """float64 [rows]; zeros if there is none."""
        if self.linear.bias is None:
            return torch.zeros(self.last - self.first, dtype=torch.float64)
        return self.rows(self.linear.bias)

    def rows(self, parameter: Tensor) -> Tensor:
        """float64 rows of q or K."""
        return parameter.detach()[self.first : self.last].to("cpu", torch.float64)


def _projections(
    model: Any, attention: nn.Module, config: Any
) -> tuple[_Projection, _Projection, tuple[int, int, int]]:
    """q, K and (KV heads, query heads of each, head_dim)."""
    parts = {name for name, child in attention.named_children() if next(child.parameters(), None) is not None}
    fused = "qkv_proj" in parts
    if not fused and not {"q_proj", "k_proj", "v_proj"} <= parts:
        raise LeftAlone(f"{type(attention).__name__} has no q_proj, k_proj and v_proj, and no qkv_proj")
    if unknown := sorted(parts - _PARTS):
        raise LeftAlone(f"{type(attention).__name__} has parts that are not understood: {', '.join(unknown)}")
    if getattr(config, "clip_qkv", None) is not None:
        raise LeftAlone("q and K are clipped")
    if getattr(config, "num_kv_shared_layers", 0):
        raise LeftAlone("layers share K")
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        raise LeftAlone("the configuration does not say how many heads there are")
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    head_dim = getattr(attention, "head_dim", None) or getattr(config, "head_dim", None) or config.hidden_size // heads
    sizes = [heads * head_dim, kv_heads * head_dim]
    linears = [_linear(model, attention, name) for name in (["qkv_proj"] if fused else ["q_proj", "k_proj"])]
    outputs = [linear.weight.shape[0] for linear in linears]
    if outputs != ([sizes[0] + 2 * sizes[1]] if fused else sizes) or heads % kv_heads:
        raise LeftAlone(
            f"projections of q and K give {outputs} channels for {heads} and {kv_heads} heads of {head_dim}"
        )
    first = sizes[0] if fused else 0
    q, k = _Projection(linears[0], 0, sizes[0]), _Projection(linears[-1], first, first + sizes[1])
    return q, k, (kv_heads, heads // kv_heads, head_dim)


def _linear(model: Any, attention: nn.Module, name: str) -> nn.Linear:
    linear = getattr(attention, name)
    if type(linear).forward is not nn.Linear.forward or "weight" not in linear._parameters:
        raise LeftAlone(f"{name} is {type(linear).__name__}, not a plain nn.Linear")
    if not linear.weight.is_floating_point() or linear.weight.is_meta:
        raise LeftAlone(f"weights of {name} are {'not loaded' if linear.weight.is_meta else linear.weight.dtype}")
    if sum(getattr(module, "weight", None) is linear.weight for module in model.modules()) > 1:
        raise LeftAlone(f"weights of {name} are shared")
    return linear


def _norm_changes(norms: list[Any], offsets: list[float], scale: Tensor) -> list[Change]:
    changes = []
    for norm, offset, by in zip(norms, offsets, (1 / scale, scale), strict=True):
        changes.append((norm.weight, by, offset))
        if getattr(norm, "bias", None) is not None:
            changes.append((norm.bias, by, 0.0))
    return changes


def _projection_changes(q: _Projection, k: _Projection, of_q: Tensor, of_k: Tensor) -> list[Change]:
    if q.linear is k.linear:
        rest = torch.ones(q.weight.shape[0] - k.last, dtype=of_q.dtype)
        pieces = [(q.linear, torch.cat([of_q, of_k, rest]))]
    else:
        pieces = [(q.linear, of_q), (k.linear, of_k)]
    return [
        (parameter, scale, 0.0)
        for linear, scale in pieces
        for parameter in (linear.weight, linear.bias)
        if parameter is not None
    ]


def _head_norm(norm: Any, head_dim: int) -> tuple[Tensor, float, Tensor]:
    """Gain, offset and bias of a norm of q or K over one head."""
    weight = getattr(norm, "weight", None)
    if not isinstance(weight, nn.Parameter) or tuple(weight.shape) != (head_dim,):
        raise LeftAlone("norms of q and K have no gain for each channel of a head")
    return _norm(norm, head_dim)


def _input_norm(model: Any, attention: nn.Module, width: int) -> tuple[Tensor, Tensor]:
    """Gain and bias of the norm before the projections; 1 and 0 where there is none."""
    parent = next(module for module in model.modules() if any(child is attention for child in module.children()))
    norm = getattr(parent, "input_layernorm", None)
    if norm is None or getattr(norm, "weight", None) is None:
        return torch.ones(width, dtype=torch.float64), torch.zeros(width, dtype=torch.float64)
    gain, _, bias = _norm(norm, width)
    return gain, bias


def _norm(norm: Any, width: int) -> tuple[Tensor, float, Tensor]:
    """Gain and bias, float64 [width], and offset of a norm: its gain is its weight + offset (1 in Gemma).

    The norm itself says which, from a vector of mean 0 and mean square 1.
    """
    weight = norm.weight.detach().to("cpu", torch.float64)
    bias = getattr(norm, "bias", None)
    bias = torch.zeros_like(weight) if bias is None else bias.detach().to("cpu", torch.float64)
    if weight.shape != (width,):
        raise LeftAlone(f"{type(norm).__name__} has a gain of shape {list(weight.shape)}, not [{width}]")
    x = torch.ones(width, dtype=torch.float64)
    x[1::2] = -1
    found = (norm(x.to(norm.weight)[None, None])[0, 0].to("cpu", torch.float64) - bias) * x
    for offset in (0.0, 1.0):
        if torch.allclose(found, weight + offset, rtol=0.02, atol=0.02):
            return weight + offset, offset, bias
    raise LeftAlone(f"{type(norm).__name__} is neither a LayerNorm nor an RMSNorm")


def _frequencies(model: Any, attention: nn.Module, config: Any, index: int, head_dim: int) -> tuple[Tensor, int]:
    """θ of each pair of channels, float64 [pairs], radians a token (0: not rotated), and the pairs rotated."""
    if not getattr(attention, "use_rope", True):
        return torch.zeros(head_dim, dtype=torch.float64), 0
    rotary = getattr(attention, "rotary_emb", None)
    if not isinstance(rotary, nn.Module):
        found = [module for name, module in model.named_modules() if "rotary_emb" in name.rsplit(".", 1)[-1]]
        if len(found) != 1:
            raise LeftAlone("no rotary embedding" if not found else "several rotary embeddings")
        rotary = found[0]
    kinds = getattr(config, "layer_types", None)
    takes_kind = "layer_type" in inspect.signature(rotary.forward).parameters
    kind = kinds[index] if kinds and takes_kind else None
    prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
    # Rope that depends on the length changes inv_freq as the model runs; the original stays.
    theta = getattr(rotary, f"{prefix}original_inv_freq", getattr(rotary, f"{prefix}inv_freq", None))
    if not isinstance(theta, Tensor) or theta.dim() != 1 or 2 * len(theta) > head_dim:
        raise LeftAlone(f"{type(rotary).__name__} has no frequencies of channel pairs")
    half = len(theta)
    _check_pairs(attention, rotary, [kind] if kind else [], half, head_dim)
    rest = torch.zeros(head_dim - 2 * half, dtype=torch.float64)
    return torch.cat([theta.detach().to("cpu", torch.float64), rest]), half


def _check_pairs(attention: nn.Module, rotary: nn.Module, kind: list[str], half: int, head_dim: int) -> None:
    """Turn unit vectors by one token: channel i must reach no other than i ± half."""
    apply = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        raise LeftAlone(f"how {type(attention).__name__} applies its rotary embedding is not understood")
    parameter = next(attention.parameters())
    reached = None
    for size in (head_dim, 2 * half):  # some models rotate a slice
        unit = torch.eye(size, device=parameter.device)[None, None]
        ones = torch.ones(1, size, dtype=torch.long, device=parameter.device)
        try:
            cos, sin = rotary(unit, ones, *kind)
            reached = apply(unit, unit, cos, sin)[0][0, 0] != 0
            break
        except Exception:  # other signatures, other sizes: not understood
            continue
    if reached is None:
        raise LeftAlone(f"how {type(attention).__name__} applies its rotary embedding is not understood")
    channels = torch.arange(len(reached), device=reached.device)
    apart = (channels[:, None] - channels).abs()
    rotated = channels < 2 * half
    allowed = (apart == 0) | ((apart == half) & rotated & rotated[:, None])
    if bool((reached & ~allowed).any()):
        raise LeftAlone("its rotary embedding pairs other channels than i and i + rotary_dim/2 (interleaved)")
