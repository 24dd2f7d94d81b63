"""Published KV-cache quantisers, to compare with at equal stored bytes.

A baseline is written as

* ``int{b}[+med3]``, b in 2…8: one symmetric scale a token, the naive int of arXiv 2605.27646; with its Med3x,
* ``q4_0``, ``q8_0``: the block formats of llama.cpp,
* ``kivi-{b}[:k{Gk}v{Gv}]``, b in 2…4: arXiv 2402.02750, K per channel over Gk tokens, V per token over Gv elements,
* ``turbo-{b}[+mean]``, b in 2…4: arXiv 2504.19874; with our page mean of K,
* ``fp8``: a cast to e4m3,

each with an optional ``@p{page}`` at the end. Every one states its own bits by the tensors it stores: nothing that
decoding needs is left uncounted. ``fp16`` and our schemes are in :mod:`hqmq_trt.scheme`.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.baseline_parts import Field, lloyd_max_levels, measured_bits, rotate, unrotate
from hqmq_trt.oracle.codec import tree_sum
from hqmq_trt.scheme import DEFAULT_PAGE_SIZE, OUTLIER_FACTOR, ROLES

NOT_COMPARED = {
    "QuIP#": "quantises weights; it has no KV cache (arXiv 2402.04396)",
    "SmoothQuant": "needs activations of a calibration set for its channel factors (arXiv 2211.10438)",
    "KVQuant": "needs a calibration set for its levels and channel ranges (arXiv 2401.18079)",
    "GEAR": "adds a low-rank and a sparse part to another quantiser such as kivi; not written here (arXiv 2403.05527)",
    "TurboQuant with outlier channels": "its 2.5 and 3.5 bits give some channels a bit more; not written here",
}
"""Methods one may expect here: name to the reason why they are not."""

_LLAMA_BLOCK = 32
_FP8_MAX = 448.0
_HALF_MAX = 65504.0


def _half(x: Tensor) -> Tensor:
    return x.clamp(-_HALF_MAX, _HALF_MAX).half()


def _nearest(x: Tensor, step: Tensor, largest: int, smallest: int) -> Tensor:
    """round(x / step) within smallest…largest; 0 where step is 0."""
    return torch.where(step > 0, x / step, 0.0).round().clamp(smallest, largest)


@dataclass(frozen=True)
class Baseline(ABC):
    """A quantiser of pages of K or V.

    Attributes:
        name: canonical spelling.
        description: what it stores, in a line.
        source: the paper's section or the file it follows.
        page_size: P, tokens coded together; attention reads the tokens of the open page exactly.
    """

    name: str
    description: str
    source: str
    page_size: int

    @property
    def data_dependent(self) -> bool:
        """The number of stored bits depends on the data (outliers)."""
        return False

    def check_head_dim(self, head_dim: int) -> None:
        """Raises HqmqError when vectors of `head_dim` elements cannot be coded."""
        if head_dim < 1:
            raise HqmqError(f"head_dim {head_dim} must be positive")

    def encode(self, x: Tensor, role: str) -> list[Field]:
        """Code x float [..., T, D], T = N·P tokens, as float16 (what a cache holds); role ``"key"`` or ``"value"``.

        A page is coded from its own tokens only. Field shapes start with [..., N], but for outliers [n, 4].

        Raises:
            HqmqError: T is no multiple of P, a head_dim that does not fit, or numbers float16 cannot hold.
        """
        self._check_role(role)
        if x.dim() < 2 or not x.shape[-2] or x.shape[-2] % self.page_size:
            raise HqmqError(f"{self.name} codes whole pages: [..., N * {self.page_size}, D], not {list(x.shape)}")
        self.check_head_dim(x.shape[-1])
        stored = x.half().float()
        if not bool(stored.isfinite().all()):
            raise HqmqError(f"{self.name}: {role} holds NaN, infinity or numbers beyond float16; check the model")
        return self._encode(stored.unflatten(-2, (-1, self.page_size)).contiguous(), role)

    def decode(self, fields: Sequence[Field], role: str) -> Tensor:
        """What :meth:`encode` stored, float32 [..., T, D]."""
        self._check_role(role)
        return self._decode({field.name: field.values for field in fields}, role).flatten(-3, -2)

    def stored_bits(self, head_dim: int, role: str, outlier_share: float | None = None) -> float:
        """Bits per element of a page, everything included; `outlier_share` (0…1) where bits depend on the data.

        Raises:
            HqmqError: the share is needed and missing, or given and meaningless.
        """
        if self.data_dependent and outlier_share is None:
            raise HqmqError(f"the size of {self.name} depends on the data: pass outlier_share, or use measured_bits")
        if not self.data_dependent and outlier_share is not None:
            raise HqmqError(f"{self.name} stores no outliers; leave outlier_share out")
        page = torch.zeros(self.page_size, head_dim)  # zeros: no outliers
        return measured_bits(self.encode(page, role), page.numel()) + 16 * (outlier_share or 0.0)

    def _check_role(self, role: str) -> None:
        if role not in ROLES:
            raise HqmqError(f"unknown role '{role}': use one of {', '.join(ROLES)}")

    @abstractmethod
    def _encode(self, pages: Tensor, role: str) -> list[Field]:
        """Pages float32 [..., N, P, D] to fields."""

    @abstractmethod
    def _decode(self, stored: dict[str, Tensor], role: str) -> Tensor:
        """Fields by name to pages float32 [..., N, P, D]."""


@dataclass(frozen=True)
class TokenInt(Baseline):
    """Symmetric integers with one scale a token, optionally with Med3x outliers of 4 elements."""

    bits: int
    med3: bool

    @property
    def data_dependent(self) -> bool:
        """True with Med3x."""
        return self.med3

    def check_head_dim(self, head_dim: int) -> None:
        """Med3x cuts vectors into chunks of 4."""
        super().check_head_dim(head_dim)
        if self.med3 and head_dim % 4:
            raise HqmqError(f"{self.name} codes chunks of 4; head_dim {head_dim} is not divisible by 4")

    def _encode(self, pages: Tensor, role: str) -> list[Field]:
        largest = 2 ** (self.bits - 1) - 1
        x, extra = pages, []
        if self.med3:
            chunks = pages.unflatten(-1, (-1, 4))
            norm2 = tree_sum(chunks * chunks, -1)
            median = norm2.flatten(-2).median(-1).values[..., None, None]
            outlier = norm2 > OUTLIER_FACTOR * OUTLIER_FACTOR * median
            # Outliers leave the scale to the rest, and a zero code in their place.
            x = torch.where(outlier[..., None], 0.0, chunks).flatten(-2)
            extra = [Field("flags", outlier.to(torch.uint8), 1), Field("outliers", chunks[outlier].half(), 16)]
        scale = _half(x.abs().amax(-1, keepdim=True) / largest)
        codes = _nearest(x, scale.float(), largest, -largest) + 2 ** (self.bits - 1)
        return [Field("codes", codes.to(torch.uint8), self.bits), Field("scale", scale, 16), *extra]

    def _decode(self, stored: dict[str, Tensor], role: str) -> Tensor:
        x = (stored["codes"].float() - 2 ** (self.bits - 1)) * stored["scale"].float()
        if self.med3:
            chunks = x.unflatten(-1, (-1, 4))
            chunks[stored["flags"].bool()] = stored["outliers"].float()
        return x


@dataclass(frozen=True)
class LlamaBlock(Baseline):
    """q4_0 and q8_0: blocks of 32 elements with one float16 scale d; quantised with the float32 d, as ggml does."""

    bits: int

    def check_head_dim(self, head_dim: int) -> None:
        """A whole number of blocks."""
        if head_dim < 1 or head_dim % _LLAMA_BLOCK:
            raise HqmqError(f"{self.name} codes blocks of {_LLAMA_BLOCK}; head_dim {head_dim} is not divisible by it")

    def _encode(self, pages: Tensor, role: str) -> list[Field]:
        x = pages.unflatten(-1, (-1, _LLAMA_BLOCK))
        if self.bits == 4:
            d = x.gather(-1, x.abs().argmax(-1, keepdim=True)) / -8  # the first of equal sizes, with its sign
        else:
            d = x.abs().amax(-1, keepdim=True) / 127
        scaled = x * torch.where(d != 0, 1 / d, 0.0)
        if self.bits == 4:
            codes = (scaled + 8.5).trunc().clamp_max(15)
        else:
            whole = scaled.trunc()  # roundf: halves away from zero
            codes = whole + scaled.sign() * ((scaled - whole).abs() >= 0.5) + 128
        return [Field("codes", codes.to(torch.uint8), self.bits), Field("scale", d.half(), 16)]

    def _decode(self, stored: dict[str, Tensor], role: str) -> Tensor:
        return ((stored["codes"].float() - 2 ** (self.bits - 1)) * stored["scale"].float()).flatten(-2)


@dataclass(frozen=True)
class Kivi(Baseline):
    """Asymmetric integers with float16 scale and zero: K over groups of tokens, V over groups of elements.

    The paper keeps the last 128 tokens exact; here, as with every baseline, it is the open page.
    """

    bits: int
    key_group: int
    value_group: int

    def check_head_dim(self, head_dim: int) -> None:
        """A whole number of V groups."""
        if head_dim < 1 or head_dim % self.value_group:
            raise HqmqError(
                f"{self.name} codes V in groups of {self.value_group}; head_dim {head_dim} is not divisible by it; "
                f"choose groups as in kivi-{self.bits}:k{self.key_group}v{head_dim}"
            )

    def _encode(self, pages: Tensor, role: str) -> list[Field]:
        # The group is the last axis: K [..., D, P/Gk, Gk], V [..., P, D/Gv, Gv].
        key = role == "key"
        group = self.key_group if key else self.value_group
        x = (pages.transpose(-1, -2) if key else pages).unflatten(-1, (-1, group))
        zero = x.amin(-1, keepdim=True).half()
        scale = _half((x.amax(-1, keepdim=True) - zero.float()) / (2**self.bits - 1))
        codes = _nearest(x - zero.float(), scale.float(), 2**self.bits - 1, 0)
        return [Field("codes", codes.to(torch.uint8), self.bits), Field("scale", scale, 16), Field("zero", zero, 16)]

    def _decode(self, stored: dict[str, Tensor], role: str) -> Tensor:
        x = (stored["codes"].float() * stored["scale"].float() + stored["zero"].float()).flatten(-2)
        return x.transpose(-1, -2) if role == "key" else x


@dataclass(frozen=True)
class Turbo(Baseline):
    """Random rotation, one norm a token, Lloyd-Max levels an element; optionally K less its page mean."""

    bits: int
    page_mean: bool

    def check_head_dim(self, head_dim: int) -> None:
        """The Hadamard transform needs a power of two."""
        if head_dim < 1 or head_dim & (head_dim - 1):
            raise HqmqError(f"{self.name} rotates by Hadamard: head_dim {head_dim} must be a power of two")

    def _encode(self, pages: Tensor, role: str) -> list[Field]:
        x, extra = pages, []
        if self.page_mean and role == "key":
            mean = (tree_sum(x, -2) / self.page_size).half()
            x = x - mean[..., None, :].float()
            extra = [Field("mean", mean, 16)]
        x = rotate(x)
        # Squares of a scaled copy, since large numbers overflow; sums by halves do not depend on how many pages.
        top = x.abs().amax(-1, keepdim=True)
        unit = torch.where(top > 0, x / top, 0.0)
        scale = _half(top * (tree_sum(unit * unit, -1)[..., None] / x.shape[-1]).sqrt())
        levels = lloyd_max_levels(self.bits).to(x.device)
        step = scale.float()
        codes = torch.bucketize(torch.where(step > 0, x / step, 0.0), (levels[1:] + levels[:-1]) / 2)
        return [Field("codes", codes.to(torch.uint8), self.bits), Field("scale", scale, 16), *extra]

    def _decode(self, stored: dict[str, Tensor], role: str) -> Tensor:
        levels = lloyd_max_levels(self.bits).to(stored["codes"].device)
        x = unrotate(levels[stored["codes"].long()] * stored["scale"].float())
        return x + stored["mean"][..., None, :].float() if "mean" in stored else x


@dataclass(frozen=True)
class Float8(Baseline):
    """A cast to e4m3 without a scale, saturating at 448."""

    def _encode(self, pages: Tensor, role: str) -> list[Field]:
        # An explicit clamp: whether the cast saturates differs between versions of torch.
        return [Field("codes", pages.clamp(-_FP8_MAX, _FP8_MAX).to(torch.float8_e4m3fn).view(torch.uint8), 8)]

    def _decode(self, stored: dict[str, Tensor], role: str) -> Tensor:
        return stored["codes"].view(torch.float8_e4m3fn).float()


_SPELLING = re.compile(
    r"(?:int(?P<int>[2-8])(?P<med3>\+med3)?|q(?P<q>[48])_0|kivi-(?P<kivi>[2-4])(?::k(?P<gk>[1-9]\d*)v(?P<gv>[1-9]\d*))?"
    r"|turbo-(?P<turbo>[2-4])(?P<mean>\+mean)?|(?P<fp8>fp8))(?:@p(?P<page>[1-9]\d*))?"
)
_KIVI_GROUP = 32


def parse_baseline(text: str) -> Baseline:
    """The baseline of a spelling (see the module docstring).

    Raises:
        HqmqError: unknown spelling, or a page that does not hold whole groups.
    """
    match = _SPELLING.fullmatch(text.strip())
    if match is None:
        raise HqmqError(
            f"unknown baseline '{text}': choose one of {', '.join(_NAMES)}, or int2…int8[+med3], kivi-2…4[:k32v32], "
            "turbo-2…4[+mean], each with an optional @p64"
        )
    part = match.groupdict()
    key_group, value_group = (int(part[name] or _KIVI_GROUP) for name in ("gk", "gv"))
    default_page = -(-DEFAULT_PAGE_SIZE // key_group) * key_group if part["kivi"] else DEFAULT_PAGE_SIZE
    page = int(part["page"] or default_page)
    suffix = "" if page == default_page else f"@p{page}"
    if part["int"]:
        bits, med3 = int(part["int"]), bool(part["med3"])
        text = f"one symmetric {bits}-bit scale a token" + (", chunks of 4 above 3 medians in fp16" if med3 else "")
        name = f"int{bits}{'+med3' if med3 else ''}{suffix}"
        return TokenInt(name, text, "arXiv 2605.27646, naive int" + (" and Med3x" if med3 else ""), page, bits, med3)
    if part["q"]:
        name, text = f"q{part['q']}_0", f"{part['q']} bits and an fp16 scale for 32 elements"
        source = f"llama.cpp ggml/src/ggml-quants.c, quantize_row_{name}_ref"
        return LlamaBlock(name + suffix, text, source, page, int(part["q"]))
    if part["kivi"]:
        if page % key_group:
            raise HqmqError(f"'{match[0]}': a page of {page} tokens does not hold whole groups of {key_group} tokens")
        groups = "" if key_group == value_group == _KIVI_GROUP else f":k{key_group}v{value_group}"
        text = f"asymmetric, K a channel and {key_group} tokens, V a token and {value_group} elements"
        name, source = f"kivi-{part['kivi']}{groups}{suffix}", "arXiv 2402.02750, algorithm 1"
        return Kivi(name, text, source, page, int(part["kivi"]), key_group, value_group)
    if part["turbo"]:
        text = "random-sign Hadamard, norm a token, Lloyd-Max levels" + (
            ", K less its page mean" if part["mean"] else ""
        )
        source = "arXiv 2504.19874, algorithm 1 (TurboQuant_mse), its rotation replaced by random signs and Hadamard"
        name = f"turbo-{part['turbo']}{part['mean'] or ''}{suffix}"
        return Turbo(name, text, source, page, int(part["turbo"]), bool(part["mean"]))
    return Float8(f"fp8{suffix}", "a cast to e4m3, no scale", "vLLM and TensorRT-LLM fp8 KV cache, scale 1", page)


_NAMES = (
    "int3",
    "int4",
    "int8",
    "int3+med3",
    "int4+med3",
    "q4_0",
    "q8_0",
    "kivi-2",
    "kivi-3",
    "kivi-4",
    "kivi-3:k128v64",
    "kivi-4:k128v64",
    "turbo-2",
    "turbo-3",
    "turbo-4",
    "turbo-3+mean",
    "turbo-4+mean",
    "fp8",
)

BASELINES: dict[str, Baseline] = {name: parse_baseline(name) for name in _NAMES}
"""The baselines a comparison shows, by name; parse_baseline knows more spellings."""


def names() -> list[str]:
    """The keys of BASELINES."""
    return list(BASELINES)
