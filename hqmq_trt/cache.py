"""HqmqCache: a transformers Cache that holds packed pages and an fp16 tail.

    cache = HqmqCache.for_model(model, "hq4")           # fused: attention reads the codes
    cache = HqmqCache(model.config, "hq4")              # qdq: any attention, over dequantised K and V
    model.generate(**inputs, past_key_values=cache)

docs/semantics.md explains the two modes.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from hqmq_trt import codebooks, torch_ops
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import cache_tensors
from hqmq_trt.hf_attention import IMPLEMENTATION, AttentionParameters, tie
from hqmq_trt.scheme import ROLES, RoleScheme, Scheme

_STATEFUL_LAYERS = ("linear_attention", "conv", "hybrid", "hybrid_sliding", "mamba")


@lru_cache(maxsize=4096)
def layer_codebook(
    role: RoleScheme, seed: int, layer: int, num_kv_heads: int, role_name: str, device: str = "cpu"
) -> tuple[Tensor, ...]:
    """``(secondaries [H, S, 4], levels [2^r])`` of one layer and role, float32, or ``()`` for fp16; read only."""
    if not role.packed:
        return ()
    secondaries = codebooks.secondaries(role, seed, layer, num_kv_heads, role_name)
    return tuple(torch.from_numpy(array).to(device) for array in (secondaries, codebooks.levels(role)))


class HqmqLayer(CacheLayerMixin):
    """The cache of one layer.

    Attributes:
        tensors: key tensors, then value tensors, as hqmq_trt.format.cache_tensors lists them.
        length: tokens each sequence holds, int32 [B]; padding is not counted in fused mode.
        seen: rows the model has passed, padding included: what transformers calls the sequence length.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, scheme: Scheme, index: int, max_length: int | None, fused: Callable[[], bool]) -> None:
        super().__init__()
        self.scheme = scheme
        self.index = index
        self.max_length = max_length
        self.tensors: list[Tensor] = []
        self.codebooks: list[Tensor] = []
        self.length: Tensor | None = None
        self.seen = 0
        self._tail_first: Tensor  # [B]: the tail holds the tokens from here on, also after crop()
        self._fused = fused
        self._waiting = False

    @property
    def batch_size(self) -> int:
        """Sequences held, or -1 before the first update."""
        return -1 if self.length is None else len(self.length)

    @property
    def capacity(self) -> int:
        """Tokens a sequence may reach before the cache has to grow."""
        return self.tensors[0].shape[2] if self.tensors else 0

    @property
    def _key_tensors(self) -> int:
        return len(torch_ops.tensor_names(self.scheme.key))

    def role_tensors(self, role: str) -> list[Tensor]:
        """The tensors of ``"key"`` or ``"value"``."""
        return self.tensors[: self._key_tensors] if role == "key" else self.tensors[self._key_tensors :]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate for K and V of shape [B, H, any, D]."""
        pages = -(-self.max_length // self.scheme.page_size) if self.max_length else 0
        self.dtype, self.device = key_states.dtype, key_states.device
        for name, x in zip(ROLES, (key_states, value_states), strict=True):
            role, (batch, heads, _, head_dim) = self.scheme.role(name), x.shape
            if role.packed:
                role.check_head_dim(head_dim)
            for spec in cache_tensors(role, self.scheme.page_size, head_dim, heads, batch, pages):
                self.tensors.append(torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=self.device))
            self.codebooks += layer_codebook(role, self.scheme.seed, self.index, heads, name, str(self.device))
        self.length = torch.zeros(len(key_states), dtype=torch.int32, device=self.device)
        self._tail_first = torch.zeros_like(self.length)
        self.is_initialized = True

    def _reserve(self, count: Tensor, rows: int) -> None:
        """Make room for count[b] <= rows more tokens."""
        assert self.length is not None
        if self.seen + rows <= min(self.capacity, self.max_length or self.capacity):
            return
        needed = int((self.length + count).max())
        if self.max_length is not None and needed > self.max_length:
            raise HqmqError(
                f"cache too small: {needed} tokens do not fit max_length={self.max_length}; "
                f"make HqmqCache with max_length={needed} or more"
            )
        if needed <= self.capacity:
            return
        page_size = self.scheme.page_size
        old = self.capacity // page_size
        # A quarter more than before: each token is copied a constant number of times.
        pages = max(-(-needed // page_size), old + old // 4)
        names = [name for role in ROLES for name in torch_ops.tensor_names(self.scheme.role(role))]
        for i, (name, tensor) in enumerate(zip(names, self.tensors, strict=True)):
            if name != "tail":
                rows_per_page = page_size if name == "codes" else 1
                shape = (*tensor.shape[:2], pages * rows_per_page, *tensor.shape[3:])
                grown = tensor.new_zeros(shape)
                grown[:, :, : tensor.shape[2]] = tensor
                self.tensors[i] = grown

    def _advance(self, count: Tensor, rows: int) -> None:
        assert self.length is not None
        self.length = self.length + count
        self.seen += rows

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Take new K and V [B, H, T, D]; K and V for the attention that follows.

        Fused: the same tensors; attention ``hqmq`` appends them. Otherwise they are appended here, and all the cache
        holds comes back dequantised, [B, H, seen, D] in their type: a transient copy.
        """
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self._waiting:
            raise HqmqError(
                f"layer {self.index}: earlier tokens never reached attention '{IMPLEMENTATION}' (a forward pass "
                "failed); call cache.reset() or make a new HqmqCache"
            )
        if self._fused():
            self._waiting = True
            return tie(key_states, self), value_states
        assert self.length is not None
        rows = key_states.shape[2]
        count = torch.full_like(self.length, rows)
        self._reserve(count, rows)
        split, books = self._key_tensors, 2 * self.scheme.key.packed
        parts = (
            ("key", key_states, self.codebooks[:books], self.tensors[:split]),
            ("value", value_states, self.codebooks[books:], self.tensors[split:]),
        )
        for role, x, book, tensors in parts:
            torch.ops.hqmq.quantize_(x, self.length, count, book, tensors, self.scheme.name, role)
        self._advance(count, rows)
        keys, values = (
            torch.ops.hqmq.dequantize(self.length, book, tensors, self.scheme.name, role, x.dtype)[:, :, : self.seen]
            for role, x, book, tensors in parts
        )
        return keys, values

    def attend(self, q: Tensor, k: Tensor, v: Tensor, count: Tensor | None, parameters: AttentionParameters) -> Tensor:
        """Append the first count[b] rows (None: all) of k and v [B, H, T, D] and attend: [B, Hq, T, D]."""
        assert self.length is not None
        rows = k.shape[2]
        if count is None:
            count = torch.full_like(self.length, rows)
        self._reserve(count, rows)
        y: Tensor = torch.ops.hqmq.attention_(
            q,
            k,
            v,
            self.length,
            count,
            parameters.sinks,
            self.codebooks,
            self.tensors,
            self.scheme.name,
            parameters.scale,
            parameters.window,
            parameters.softcap,
        )
        self._waiting = False
        self._advance(count, rows)
        return y

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """(tokens the mask covers, offset of the first)."""
        return self.seen + query_length, 0

    def get_seq_length(self) -> int:
        """Rows seen, padding included."""
        return self.seen

    def get_max_length(self) -> int:
        """max_length, or -1 when the cache grows."""
        return -1 if self.max_length is None else self.max_length

    get_max_cache_shape = get_max_length  # its name up to transformers 5.2

    def reset(self) -> None:
        """Forget all tokens; the memory stays."""
        self.seen, self._waiting = 0, False
        if self.length is not None:
            self.length = torch.zeros_like(self.length)
            self._tail_first = torch.zeros_like(self.length)

    def _select(self, indices: Tensor) -> None:
        if self.length is not None:
            indices = indices.to(self.length.device)
            self.tensors = [tensor.index_select(0, indices) for tensor in self.tensors]
            self.length = self.length.index_select(0, indices)
            self._tail_first = self._tail_first.index_select(0, indices)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Sequence b becomes what sequence beam_idx[b] was."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Each sequence `repeats` times in a row."""
        self._select(torch.arange(max(self.batch_size, 0)).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the sequences `indices` (integers, or one bool a sequence)."""
        self._select(indices.nonzero()[:, 0] if indices.dtype == torch.bool else indices)

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last -tokens_to_remove tokens (a number <= 0, as in transformers).

        Raises:
            HqmqError: the end would fall inside a page whose exact tokens are gone; codes cannot be turned back.
        """
        if tokens_to_remove > 0:
            raise HqmqError(f"crop({tokens_to_remove}): pass minus the number of tokens to remove")
        if tokens_to_remove == 0 or self.length is None:
            return
        page_size, oldest = self.scheme.page_size, []
        for held, known in zip(self.length.tolist(), self._tail_first.tolist(), strict=True):
            end = held + tokens_to_remove
            if end < 0:
                raise HqmqError(f"crop({tokens_to_remove}): a sequence holds only {held} tokens")
            # The tail must still have every token of the page that opens again.
            oldest.append(max(known, held - page_size))
            if end % page_size and end // page_size * page_size < oldest[-1]:
                raise HqmqError(
                    f"crop({tokens_to_remove}): token {end} lies in a page that is already coded (pages of "
                    f"{page_size}, {held} tokens held); crop to a multiple of {page_size} or reset the cache"
                )
        self._tail_first = torch.tensor(oldest, dtype=torch.int32, device=self.length.device)
        self.length = self.length + tokens_to_remove
        self.seen += tokens_to_remove

    def offload(self) -> None:
        """Not offered: the packed cache stays where the model runs."""
        raise HqmqError("HqmqCache cannot be offloaded; it is 3-5 times smaller already")

    prefetch = offload

    def nbytes(self) -> dict[str, int]:
        """Bytes allocated by kind of tensor, codebooks included (key ``codebooks``)."""
        names = [name for role in ROLES for name in torch_ops.tensor_names(self.scheme.role(role))]
        total: dict[str, int] = {}
        for name, tensor in zip(names if self.tensors else [], self.tensors, strict=True):
            total[name] = total.get(name, 0) + tensor.nbytes
        total["codebooks"] = sum(tensor.nbytes for tensor in self.codebooks)
        return total

    def dropped_outliers(self) -> int:
        """Med3x outliers of the full pages that found no slot and were coded like the rest."""
        if self.length is None:
            return 0
        names = [name for role in ROLES for name in torch_ops.tensor_names(self.scheme.role(role))]
        total = 0
        for name, tensor in zip(names, self.tensors, strict=True):
            if name == "outlier_mask":
                pages = torch.arange(tensor.shape[2], device=tensor.device)
                full = pages < (self.length // self.scheme.page_size)[:, None]
                total += int((tensor[..., -1] * full[:, None]).sum())
        return total

    def outlier_share(self, role: str) -> float:
        """Share of the chunks of full pages that are Med3x outliers of a role (``key``, ``value``), kept or dropped."""
        if self.length is None or not self.scheme.role(role).med3:
            return 0.0
        names = torch_ops.tensor_names(self.scheme.role(role))
        words = self.role_tensors(role)[names.index("outlier_mask")]
        mask, dropped = words[..., :-1], words[..., -1]
        pages = torch.arange(mask.shape[2], device=mask.device)
        full = pages < (self.length // self.scheme.page_size)[:, None]
        shifts = torch.arange(32, device=mask.device, dtype=torch.int32)
        found = (((mask[..., None] >> shifts) & 1).sum((-1, -2)) + dropped) * full[:, None]
        tail = self.role_tensors(role)[-1]
        chunks = int(full.sum()) * tail.shape[1] * self.scheme.page_size * tail.shape[3] // 4
        return float(found.sum()) / chunks if chunks else 0.0


class HqmqCache(Cache):
    """KV cache of HQMQ codes for ``model.generate(past_key_values=...)``.

    Args:
        config: the model's config; decoder self-attention of any head_dim the scheme takes.
        scheme: spelling (see hqmq_trt.scheme) or a Scheme.
        seed: seed of the codebooks, when `scheme` is a spelling.
        max_length: tokens to allocate for and never exceed; None: grow by pages.

    Which mode runs follows from the model: with attention ``hqmq`` (see :meth:`for_model`) page-causal attention
    reads the codes; with any other, update() returns K and V dequantised for the length of one layer's attention.

    Raises:
        HqmqError: unknown scheme, a head_dim it cannot code, or a model with other state than K and V.
    """

    def __init__(self, config: Any, scheme: str | Scheme = "hq4", seed: int = 0, max_length: int | None = None) -> None:
        if getattr(config, "is_encoder_decoder", False):
            raise HqmqError(f"{config.model_type} is an encoder-decoder; HqmqCache serves decoder-only models")
        if max_length is not None and max_length <= 0:
            raise HqmqError(f"max_length {max_length} must be positive, or None to grow")
        decoder = config.get_text_config(decoder=True)
        stateful = sorted(set(getattr(decoder, "layer_types", None) or ()) & set(_STATEFUL_LAYERS))
        if stateful:
            raise HqmqError(f"{decoder.model_type} has {', '.join(stateful)} layers, whose state HqmqCache cannot hold")
        self.scheme = scheme if isinstance(scheme, Scheme) else Scheme.parse(scheme, seed)
        head_dim = getattr(decoder, "head_dim", None) or decoder.hidden_size // decoder.num_attention_heads
        self.scheme.check_head_dim(head_dim)

        def fused() -> bool:
            return bool(decoder._attn_implementation == IMPLEMENTATION)

        layers = [HqmqLayer(self.scheme, i, max_length, fused) for i in range(decoder.num_hidden_layers)]
        super().__init__(layers=layers)

    @classmethod
    def for_model(
        cls, model: Any, scheme: str | Scheme = "hq4", seed: int = 0, max_length: int | None = None
    ) -> HqmqCache:
        """A cache for fused attention; switches `model` to attention ``hqmq``.

        The model then needs an HqmqCache in every call; ``model.set_attn_implementation("sdpa")`` switches it back.
        """
        cache = cls(model.config, scheme, seed, max_length)
        model.set_attn_implementation(IMPLEMENTATION)
        return cache

    @property
    def lengths(self) -> Tensor | None:
        """Tokens each sequence holds, int32 [B]; None before the first call."""
        length: Tensor | None = next((layer.length for layer in self.layers if layer.length is not None), None)
        return length

    def nbytes(self) -> dict[str, int]:
        """Bytes allocated by kind of tensor over all layers; the keys of hqmq_trt.format.cache_bytes."""
        total: dict[str, int] = {}
        for layer in self.layers:
            for name, size in layer.nbytes().items():
                total[name] = total.get(name, 0) + size
        return total

    def dropped_outliers(self) -> int:
        """Med3x outliers that found no slot, over all layers."""
        return sum(layer.dropped_outliers() for layer in self.layers)

    def outlier_share(self, role: str) -> float:
        """Share of the chunks of full pages that are Med3x outliers of a role, mean over all layers."""
        return sum(layer.outlier_share(role) for layer in self.layers) / len(self.layers)
