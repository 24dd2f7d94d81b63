"""What is measured: a model with a codec for its KV cache, in PyTorch or in an exported folder's own runtime.

A codec is spelled as a scheme of hqmq_trt.scheme (runs through the packed HqmqCache), as a baseline of
hqmq_trt.eval.baselines, or ``reference``: the model with transformers' own cache and attention. Our schemes run with
K balanced from the weights (hqmq_trt.balance), as the exporter does it; everything else with the weights as they are.
``unbalanced:`` or ``balanced:`` before a spelling says otherwise.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hqmq_trt.balance import applies_to
from hqmq_trt.cache import HqmqCache
from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.baseline_cache import BaselineCache
from hqmq_trt.eval.baselines import Baseline, parse_baseline
from hqmq_trt.eval.baselines import names as baseline_names
from hqmq_trt.format import FORMAT_VERSION, paper_bits, stored_bits
from hqmq_trt.scheme import DEFAULT_PAGE_SIZE, Scheme, preset_spelling

REFERENCE = "reference"
BALANCED, UNBALANCED = "balanced", "unbalanced"
MODES = ("fused", "qdq")
"""``fused``: page-causal attention, as decoding token by token does. ``qdq``: every full page is read decoded."""
_ROWS = 256
"""Rows of logits turned into probabilities at a time."""


PACKED_CACHE: Mapping[str, Any] = MappingProxyType({"cache_format": FORMAT_VERSION})
"""Circumstances of codecs that run through the packed cache."""


@dataclass(frozen=True)
class Scores:
    """How likely the tokens of a sequence are, each after those before it.

    Attributes:
        nll: -log p in nats of tokens 1…T-1, float64 [T-1].
        greedy: whether each is the most likely token, bool [T-1].
    """

    nll: NDArray[np.float64]
    greedy: NDArray[np.bool_]


@dataclass(frozen=True)
class Bits:
    """Bits an element of K and V (mean of both) in coded pages.

    Attributes:
        stored: all that is stored: whole words, scales, means, flags and outlier slots.
        paper: as arXiv 2605.27646 counts; None for codecs that are not quaternion codes.
        tail: tokens of a sequence that stay in float16, at its end (up to a page) and its beginning (sink tokens); not
            counted above.
    """

    stored: float
    paper: float | None
    tail: int


class Subject(ABC):
    """A model that reads tokens through a cache of one codec.

    Attributes:
        model_name, model_sha256: what is measured.
        codec: canonical spelling.
        mode: ``fused`` or ``qdq`` (``reference`` has no mode: empty).
        where: runtime and device, for instance ``torch cpu float32``.
        max_context: tokens a sequence may have, or 0 if unknown.
        tokenizer: of transformers.
        circumstances: what a result depends on beside all this and may change with the program, kept with it: the
            cache format, for packed caches. Results of other ones are measured again.
    """

    model_name: str
    model_sha256: str
    codec: str
    mode: str
    where: str
    max_context: int
    tokenizer: Any
    circumstances: Mapping[str, Any] = MappingProxyType({})

    @abstractmethod
    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scores]:
        """Scores of sequences of two tokens and more, each with a cache of its own."""

    @abstractmethod
    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """At most `new_tokens` greedy tokens after each prompt; stops after the model's end-of-sequence token."""

    @abstractmethod
    def bits(self) -> Bits:
        """Bits an element, after at least one call for codecs whose size depends on the data."""


@dataclass(frozen=True)
class Codec:
    """A parsed codec: `scheme` or `baseline`, or neither for the reference; `balanced`: with K balanced."""

    name: str
    scheme: Scheme | None = None
    baseline: Baseline | None = None
    balanced: bool = False

    @staticmethod
    def parse(text: str, seed: int = 0) -> Codec:
        """Parse a spelling; `seed` of the codebooks of a scheme.

        Raises:
            HqmqError: neither a scheme nor a baseline.
        """
        prefix, colon, rest = text.partition(":")
        if colon and prefix in (BALANCED, UNBALANCED):
            codec = Codec.parse(rest, seed)
            if codec.balanced == (prefix == BALANCED):
                return codec
            return replace(codec, name=f"{prefix}:{codec.name}", balanced=prefix == BALANCED)
        if text == REFERENCE:
            return Codec(text)
        try:
            baseline = parse_baseline(text)
            return Codec(baseline.name, baseline=baseline)
        except HqmqError as not_baseline:
            if text.split("+")[0].split(":")[0].split("-")[0] in {n.split("-")[0] for n in baseline_names()}:
                raise
            try:
                scheme = Scheme.parse(text, seed)
            except HqmqError as error:
                raise HqmqError(f"{error}; or a baseline: {', '.join(baseline_names())}") from not_baseline
        return Codec.of(scheme)

    @staticmethod
    def of(scheme: Scheme) -> Codec:
        """The codec of a scheme, which goes by presets' names; codebooks of another seed than 0 show in its name."""
        name = preset_spelling(scheme.name) + (f"#{scheme.seed}" if scheme.seed else "")
        return Codec(name, scheme=scheme, balanced=applies_to(scheme))

    @property
    def page_size(self) -> int:
        """P, tokens that are coded together."""
        coder = self.scheme or self.baseline
        return coder.page_size if coder else DEFAULT_PAGE_SIZE

    def bits(self, head_dim: int, outlier_shares: tuple[float, float] = (0.0, 0.0)) -> Bits | None:
        """Bits an element, or None where they depend on the data; `outlier_shares`: of K and V, for the paper bits."""
        if self.scheme is None:
            return None if self.baseline else Bits(16.0, None, 0)
        roles, page = (self.scheme.key, self.scheme.value), self.scheme.page_size
        return Bits(
            sum(stored_bits(role, head_dim, page) for role in roles) / 2,
            sum(paper_bits(*pair) for pair in zip(roles, (head_dim,) * 2, outlier_shares, strict=True)) / 2,
            page + max(role.sink_tokens for role in roles),
        )


def model_head_dim(config: Any) -> int:
    """head_dim of a transformers configuration."""
    decoder = config.get_text_config(decoder=True)
    return int(getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads)


class TorchSubject(Subject):
    """A transformers model in PyTorch, on the device it is on.

    Args:
        model: a causal language model in eval mode; its attention is switched for each call and switched back.
        tokenizer: of transformers, or None.
        codec: see the module.
        mode: ``fused`` or ``qdq``.
        name, sha256: what to call the model.

    Raises:
        HqmqError: unknown codec or mode, or a head_dim the codec cannot code.
    """

    def __init__(
        self, model: Any, tokenizer: Any, codec: Codec, mode: str = "fused", name: str = "", sha256: str = ""
    ) -> None:
        if mode not in MODES:
            raise HqmqError(f"mode '{mode}' is neither fused nor qdq")
        self.model, self.tokenizer, self._codec = model, tokenizer, codec
        self.model_name = name or str(model.config.name_or_path or type(model).__name__)
        self.model_sha256, self.codec = sha256, codec.name
        self.mode = "" if codec.name == REFERENCE else mode
        device = model.device
        card = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
        self.where = f"torch {card} {str(model.dtype).removeprefix('torch.')}"
        self.max_context = int(getattr(model.config.get_text_config(), "max_position_embeddings", 0) or 0)
        self._measured: float | None = None
        self._outliers = (0.0, 0.0)
        if codec.scheme is not None:
            self.circumstances = PACKED_CACHE
            codec.scheme.check_head_dim(model_head_dim(model.config))

    def _cache(self) -> Any:
        scheme = self._codec.scheme
        if scheme is not None:
            fused = self.mode == "fused"
            return HqmqCache.for_model(self.model, scheme) if fused else HqmqCache(self.model.config, scheme)
        if self._codec.baseline is not None:
            return BaselineCache.for_model(self.model, self._codec.baseline, self.mode)
        return None

    @contextmanager
    def _running(self) -> Any:
        """A cache for one call, with the attention it needs; the model's own attention comes back."""
        before = self.model.config._attn_implementation
        try:
            with torch.no_grad():
                yield self._cache()
        finally:
            self.model.set_attn_implementation(before)

    def _padded(self, sequences: Sequence[Sequence[int]], left: bool) -> tuple[Tensor, Tensor]:
        """ids and attention mask, int64 [B, longest]."""
        width = max(len(row) for row in sequences)
        ids = np.zeros((len(sequences), width), np.int64)
        mask = np.zeros_like(ids)
        for b, row in enumerate(sequences):
            part = slice(width - len(row), width) if left else slice(0, len(row))
            ids[b, part], mask[b, part] = row, 1
        device = self.model.device
        return torch.from_numpy(ids).to(device), torch.from_numpy(mask).to(device)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scores]:
        """See Subject; the sequences of a call form one padded batch."""
        if any(len(row) < 2 for row in sequences):
            raise HqmqError("a sequence to score needs two tokens or more")
        ids, mask = self._padded(sequences, left=False)
        with self._running() as cache:
            inputs = {} if bool(mask.all()) else {"attention_mask": mask}
            if cache is not None:
                inputs["past_key_values"] = cache
            hidden = self.model(ids, use_cache=cache is not None, **inputs).logits
            self._measure(cache)
            return [_scores(hidden[b], ids[b, : len(row)]) for b, row in enumerate(sequences)]

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """See Subject; the prompts of a call form one padded batch."""
        ids, mask = self._padded(prompts, left=True)
        with self._running() as cache:
            inputs = {} if cache is None else {"past_key_values": cache}
            end = self.model.generation_config.eos_token_id
            made = self.model.generate(
                ids,
                attention_mask=mask,
                max_new_tokens=new_tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=(end[0] if isinstance(end, list) else end) or 0,
                **inputs,
            )
            self._measure(cache)
        ends = set(end if isinstance(end, list) else [end])
        return [_until(row, ends) for row in made[:, ids.shape[1] :].tolist()]

    def _measure(self, cache: Any) -> None:
        if isinstance(cache, BaselineCache):
            self._measured = cache.stored_bits()
        elif isinstance(cache, HqmqCache):
            self._outliers = (cache.outlier_share("key"), cache.outlier_share("value"))

    def bits(self) -> Bits:
        """See Subject."""
        known = self._codec.bits(model_head_dim(self.model.config), self._outliers)
        if known is not None:
            return known
        baseline = self._codec.baseline
        if self._measured is None or baseline is None:
            raise HqmqError(f"{self.codec}: how many bits it takes depends on the data; score a sequence first")
        return Bits(self._measured, None, baseline.page_size)


def _until(tokens: list[int], ends: set[int | None]) -> list[int]:
    """`tokens` up to the first of `ends`, which is left out."""
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[:i]
    return tokens


def score_rows(logits: Tensor, following: Tensor) -> Scores:
    """Scores of the tokens `following` [N] under logits [N, V], by a float32 log-softmax.

    Raises:
        HqmqError: logits that are not finite.
    """
    rows = logits.float()
    nll = torch.nn.functional.cross_entropy(rows, following, reduction="none").double().cpu().numpy()
    if not np.isfinite(nll).all():
        raise HqmqError("the model's logits are not finite; run it in another --dtype (float32 or bfloat16)")
    return Scores(nll, (rows.argmax(-1) == following).cpu().numpy())


def join_scores(parts: Sequence[Scores]) -> Scores:
    """One sequence's scores from those of its parts in order."""
    return Scores(np.concatenate([part.nll for part in parts]), np.concatenate([part.greedy for part in parts]))


def _scores(logits: Tensor, ids: Tensor) -> Scores:
    """Scores of ids [T] under logits [≥ T, V], a few rows at a time."""
    starts = range(0, len(ids) - 1, _ROWS)
    following = [ids[start + 1 : start + 1 + _ROWS] for start in starts]
    return join_scores([score_rows(logits[s : s + len(f)], f) for s, f in zip(starts, following, strict=True)])


def open_subjects(
    source: str | Path,
    dtype: str | None,
    device: str,
    mode: str,
    on_balance: Callable[[str], None] = lambda text: None,
) -> tuple[Callable[[Codec], Subject], Any]:
    """Load a model once; returns a function that makes its subject for a codec, and its tokenizer. The subject made
    last is the one to use: the model's weights are balanced for it or not.

    Args:
        source: as hqmq_trt.export.source.load takes it.
        dtype: ``float32``, ``float16`` or ``bfloat16``; None: the checkpoint's own.
        device: ``cpu``, ``cuda``, or ``auto``.
        mode: ``fused`` or ``qdq``.
        on_balance: told in one line what was balanced, whenever the weights are.
    """
    from hqmq_trt.balance import balanced
    from hqmq_trt.eval.digests import model_digest
    from hqmq_trt.export.source import load

    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise HqmqError(f"--device {device}: torch finds no CUDA GPU; use --device cpu")
    found = load(source, dtype)
    if found.tokenizer is None:
        raise HqmqError(f"{source} has no tokenizer; put its files beside the weights")
    model, digest = found.model.to(device).eval(), model_digest(source)
    inside = ExitStack()
    pages = [0]  # page size that the weights are balanced for; 0: they are as they were

    def make(codec: Codec) -> Subject:
        page = codec.page_size if codec.balanced else 0
        if page != pages[0]:
            inside.close()
            pages[0] = 0
            if page:
                on_balance(str(inside.enter_context(balanced(model, page))))
            pages[0] = page
        return TorchSubject(model, found.tokenizer, codec, mode, found.name, digest)

    return make, found.tokenizer
