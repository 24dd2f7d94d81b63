"""BaselineCache: a transformers Cache that reads K and V as a published quantiser would return them.

    cache = BaselineCache.for_model(model, parse_baseline("kivi-4"))                # page-causal, as HqmqCache fused
    cache = BaselineCache.for_model(model, parse_baseline("kivi-4"), mode="qdq")    # any attention
    model.generate(**inputs, past_key_values=cache)

It measures quality, not memory: pages are coded and at once decoded again, and the decoded float32 kept. The modes
are those of :mod:`hqmq_trt.cache` (docs/semantics.md): a full page is coded once from its own tokens, the open page
stays exact in float16, and in mode ``fused`` the query at t reads the pages before its own decoded and the tokens of
its own page up to t exactly, however the tokens arrived.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hqmq_trt import hf_attention
from hqmq_trt.cache import _STATEFUL_LAYERS
from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.baselines import Baseline
from hqmq_trt.hf_attention import AttentionParameters, hqmq_attention, hqmq_mask, tie

IMPLEMENTATION = "hqmq_baseline"
"""Name under which transformers knows page-causal attention over a BaselineCache."""
MODES = ("fused", "qdq")

_QUERY_ROWS = 512
"""Query rows scored at a time, to bound the memory of the scores."""


class _Rows:
    """K or V of one sequence in one layer: full pages as decoded, and the open page.

    Attributes:
        coded: the full pages, decoded, float32 [H, N·P, D].
        tail: the open page, float16 [H, less than P, D].
        bits, elements: stored bits and coded numbers of the full pages.

    Tensors are replaced, never written to: copies of a sequence may share them.
    """

    def __init__(self, baseline: Baseline, role: str, like: Tensor) -> None:
        self.baseline, self.role = baseline, role
        self.coded = like.new_zeros((like.shape[0], 0, like.shape[2]), dtype=torch.float32)
        self.tail = self.coded.half()
        self.bits = self.elements = 0

    @property
    def length(self) -> int:
        """Tokens held."""
        return int(self.coded.shape[1] + self.tail.shape[1])

    def append(self, x: Tensor) -> Tensor:
        """Take x [H, T, D]; the exact rows float16 from the start of the page that was open on."""
        new = x.half()
        if not bool(new.isfinite().all()):
            raise HqmqError(f"{self.role} holds NaN, infinity or numbers beyond float16; run the model in float32")
        exact = torch.cat([self.tail, new], 1)
        full = exact.shape[1] // self.baseline.page_size * self.baseline.page_size
        if full:
            fields = self.baseline.encode(exact[:, :full].float(), self.role)
            self.coded = torch.cat([self.coded, self.baseline.decode(fields, self.role)], 1)
            self.bits += sum(field.values.numel() * field.bits for field in fields)
            self.elements += exact[:, :full].numel()
        self.tail = exact[:, full:].clone()  # a view would keep all of `exact`
        return exact

    def dense(self, dtype: torch.dtype) -> Tensor:
        """All tokens [H, length, D]: pages decoded, the tail exact."""
        return torch.cat([self.coded, self.tail.float()], 1).to(dtype)


def page_causal_attention(
    q: Tensor,
    coded: tuple[Tensor, Tensor],
    exact: tuple[Tensor, Tensor],
    first: int,
    page_size: int,
    parameters: AttentionParameters,
) -> Tensor:
    """Attention of the queries at positions first, first + 1, … of one sequence: float32 [Hq, T, Dv].

    Args:
        q: [Hq, T, D].
        coded: K and V of all full pages, decoded, float32 [H, N·P, D].
        exact: K and V, float16 [H, R, D], of the positions from the page of `first` to the last query.
        first: position of the first query.
        page_size: P.
        parameters: scale, window, soft-cap and sinks.
    """
    heads, start = coded[0].shape[0], first // page_size * page_size
    grouped = q.float().unflatten(0, (heads, -1))
    sinks = None if parameters.sinks is None else parameters.sinks.float().reshape(heads, -1, 1, 1)
    out = []
    for row in range(0, q.shape[1], _QUERY_ROWS):
        queries = grouped[:, :, row : row + _QUERY_ROWS]
        time = torch.arange(first + row, first + row + queries.shape[2], device=q.device)[:, None]
        begin, end = first + row, first + row + queries.shape[2]
        oldest = max(begin - parameters.window + 1, 0) if parameters.window else 0
        pages = slice(oldest, max((end - 1) // page_size * page_size, oldest))
        own = slice(max(begin // page_size * page_size, oldest), end)
        keys, values = (
            torch.cat([c[:, pages], e[:, own.start - start : own.stop - start].float()], 1)[:, None]
            for c, e in zip(coded, exact, strict=True)
        )
        open_page = time // page_size * page_size
        before = torch.arange(pages.start, pages.stop, device=q.device)
        inside = torch.arange(own.start, own.stop, device=q.device)
        seen = torch.cat([before < open_page, (inside >= open_page) & (inside <= time)], 1)
        if parameters.window:
            seen &= torch.cat([before, inside]) > time - parameters.window
        out.append(_softmax_attention(queries, keys, values, seen, parameters, sinks))
    return torch.cat(out, 2).flatten(0, 1)


def _softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, seen: Tensor, parameters: AttentionParameters, sinks: Tensor | None
) -> Tensor:
    """q [H, G, N, D] over k, v [H, 1, M, D] where seen [N, M]; sinks [H, G, 1, 1]: float32 [H, G, N, Dv]."""
    if parameters.softcap == 0 and sinks is None:
        k, v = (x.expand(-1, q.shape[1], -1, -1) for x in (k, v))
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen, scale=parameters.scale)
    score = q @ k.transpose(-1, -2) * parameters.scale
    if parameters.softcap > 0:
        score = parameters.softcap * torch.tanh(score / parameters.softcap)
    score = score.masked_fill(~seen, -torch.inf)
    if sinks is not None:
        score = torch.cat([score, sinks.expand(*score.shape[:-1], 1)], -1)
    return score.softmax(-1)[..., : seen.shape[1]] @ v


class BaselineLayer(CacheLayerMixin):
    """The cache of one layer.

    Attributes:
        rows: (K, V) of each sequence.
        length: tokens each sequence holds, int32 [B]; padding is not counted in mode fused.
        seen: rows the model has passed, padding included: what transformers calls the sequence length.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, baseline: Baseline, index: int, mode: str, implementation: Callable[[], str]) -> None:
        super().__init__()
        self.baseline, self.index, self.mode = baseline, index, mode
        self.rows: list[tuple[_Rows, _Rows]] = []
        self.length: Tensor | None = None
        self.seen = 0
        self._implementation = implementation
        self._waiting = False

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Begin with K and V of shape [B, H, any, D]."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self.rows = [
            (_Rows(self.baseline, "key", k), _Rows(self.baseline, "value", v))
            for k, v in zip(key_states, value_states, strict=True)
        ]
        self._count()
        self.is_initialized = True

    def _count(self) -> None:
        lengths = [key.length for key, _ in self.rows]
        self.length = torch.tensor(lengths, dtype=torch.int32, device=self.device)

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new K and V [B, H, T, D]; K and V for the attention that follows.

        Fused: the same tensors, which attention ``hqmq_baseline`` appends. qdq: they are appended here, and all the
        cache holds comes back, full pages decoded, [B, H, seen, D] in their type.

        Raises:
            HqmqError: the model's attention does not fit the mode, or K or V is not finite in float16.
        """
        if (self.mode == "fused") != (self._implementation() == IMPLEMENTATION):
            raise HqmqError(
                f"BaselineCache in mode {self.mode} over attention '{self._implementation()}': "
                "make it with BaselineCache.for_model, which switches the model"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._waiting:
            raise HqmqError(
                f"layer {self.index}: earlier tokens never reached attention '{IMPLEMENTATION}' (a forward pass "
                "failed); call cache.reset() or make a new BaselineCache"
            )
        self._waiting = True
        if self.mode == "fused":
            return tie(key_states, self), value_states
        for (key, value), k, v in zip(self.rows, key_states, value_states, strict=True):
            key.append(k)
            value.append(v)
        self._advance(key_states.shape[2])
        keys = torch.stack([key.dense(key_states.dtype) for key, _ in self.rows])
        return keys, torch.stack([value.dense(value_states.dtype) for _, value in self.rows])

    def _advance(self, rows: int) -> None:
        self.seen += rows
        self._count()
        self._waiting = False

    def attend(self, q: Tensor, k: Tensor, v: Tensor, count: Tensor | None, parameters: AttentionParameters) -> Tensor:
        """Append the first count[b] rows (None: all) of k and v [B, H, T, D] and attend: [B, Hq, T, Dv]."""
        rows = k.shape[2]
        counts = [rows] * len(self.rows) if count is None else count.tolist()
        out = q.new_zeros((*q.shape[:3], v.shape[3]))
        for b, ((key, value), new) in enumerate(zip(self.rows, counts, strict=True)):
            if new:
                first = key.length
                exact = key.append(k[b, :, :new]), value.append(v[b, :, :new])
                page_size, coded = self.baseline.page_size, (key.coded, value.coded)
                y = page_causal_attention(q[b, :, :new], coded, exact, first, page_size, parameters)
                out[b, :, :new] = y.to(q.dtype)
        self._advance(rows)
        return out

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens the mask covers, offset of the first)."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Rows seen, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """-1: the cache grows."""
        return -1

    get_max_cache_shape = get_max_length  # its name up to transformers 5.2

    def reset(self) -> None:
        """Forget all tokens."""
        self.rows, self.length, self.seen, self._waiting, self.is_initialized = [], None, 0, False, False

    def _select(self, indices: list[int]) -> None:
        if self.is_initialized:
            self.rows = [(copy.copy(self.rows[i][0]), copy.copy(self.rows[i][1])) for i in indices]
            self._count()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence beam_idx[b] was."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times in a row."""
        self._select([i for i in range(len(self.rows)) for _ in range(repeats)])

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (integers, or one bool a sequence)."""
        self._select((indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices).tolist())

    def crop(self, tokens_to_remove: int) -> None:
        """Not offered: exact tokens of coded pages are gone."""
        raise HqmqError("BaselineCache cannot be cropped; make a new one")

    def offload(self) -> None:
        """Not offered."""
        raise HqmqError("BaselineCache cannot be offloaded; it stays where the model runs")

    prefetch = offload


class BaselineCache(Cache):
    """A KV cache for ``model(..., past_key_values=...)`` that answers as `baseline` would.

    Args:
        config: the model's config; decoder self-attention.
        baseline: see hqmq_trt.eval.baselines.
        mode: ``fused``: page-causal attention (attention ``hqmq_baseline``); ``qdq``: any other attention, over K
            and V whose full pages are decoded.

    Batches may be padded in mode fused as with HqmqCache; in mode qdq padding is coded like any token.

    Raises:
        HqmqError: unknown mode, a head_dim the baseline cannot code, or a model with other state than K and V.
    """

    def __init__(self, config: Any, baseline: Baseline, mode: str = "fused") -> None:
        if mode not in MODES:
            raise HqmqError(f"mode '{mode}' is neither fused nor qdq")
        if getattr(config, "is_encoder_decoder", False):
            raise HqmqError(f"{config.model_type} is an encoder-decoder; BaselineCache serves decoder-only models")
        decoder = config.get_text_config(decoder=True)
        stateful = sorted(set(getattr(decoder, "layer_types", None) or ()) & set(_STATEFUL_LAYERS))
        if stateful:
            raise HqmqError(f"{decoder.model_type} has {', '.join(stateful)} layers, whose state is not K and V")
        baseline.check_head_dim(
            getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
        )
        self.baseline, self.mode = baseline, mode

        def implementation() -> str:
            return str(decoder._attn_implementation)

        super().__init__(
            layers=[BaselineLayer(baseline, i, mode, implementation) for i in range(decoder.num_hidden_layers)]
        )

    @classmethod
    def for_model(cls, model: Any, baseline: Baseline, mode: str = "fused") -> BaselineCache:
        """A cache for `model`, whose attention is switched to what `mode` needs.

        Fused: ``hqmq_baseline``; every call then needs a BaselineCache, until ``model.set_attn_implementation``.
        qdq: the model keeps its attention, but ``sdpa`` where that was one over packed or coded pages.
        """
        cache = cls(model.config, baseline, mode)
        current = model.config.get_text_config(decoder=True)._attn_implementation
        if mode == "fused":
            model.set_attn_implementation(IMPLEMENTATION)
        elif current in (IMPLEMENTATION, hf_attention.IMPLEMENTATION):
            model.set_attn_implementation("sdpa")
        return cache

    def _rows(self) -> list[_Rows]:
        return [rows for layer in self.layers for pair in layer.rows for rows in pair]

    def stored_bits(self) -> float | None:
        """Measured bits per element of the coded pages over layers, K and V; None while no page is full."""
        elements = sum(rows.elements for rows in self._rows())
        return sum(rows.bits for rows in self._rows()) / elements if elements else None

    def nbytes(self) -> dict[str, int]:
        """Bytes a packed store of the same contents would take: ``coded`` pages and the float16 ``tail``."""
        coded = sum(rows.bits for rows in self._rows())
        return {"coded": -(-coded // 8), "tail": sum(rows.tail.nbytes for rows in self._rows())}


def baseline_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention function for transformers: as hqmq_trt.hf_attention.hqmq_attention, over a BaselineCache."""
    if not isinstance(getattr(key, hf_attention.LAYER, None), BaselineLayer):
        raise HqmqError(
            f"attention '{IMPLEMENTATION}' of layer {getattr(module, 'layer_idx', '?')} found no BaselineCache: call "
            "the model with past_key_values=BaselineCache.for_model(model, baseline) and use_cache=True"
        )
    return hqmq_attention(module, query, key, value, attention_mask, scaling, **kwargs)


def register() -> None:
    """Make ``hqmq_baseline`` known to transformers (done when this module is imported)."""
    ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, baseline_attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, hqmq_mask)


register()
