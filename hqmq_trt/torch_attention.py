"""The kernels of torch.ops.hqmq in vectorised torch, for devices the native library does not serve.

A role's cache is the list of hqmq_trt.format.cache_tensors. Lengths are small int32 tensors and are read on the host.
Attention decodes a range of pages at a time: no float copy of the whole cache exists.
"""

from __future__ import annotations

import torch
from torch import Tensor

from hqmq_trt.format import cache_tensors
from hqmq_trt.scheme import RoleScheme, Scheme
from hqmq_trt.torch_codec import Pages, decode_pages, encode_pages

_RANGE_TOKENS = 1024
"""Tokens decoded at a time."""
_QUERY_ROWS = 512
"""Query rows scored at a time."""


def _named(role: RoleScheme, tensors: list[Tensor]) -> dict[str, Tensor]:
    specs = cache_tensors(role, 8, 16, 1, 1, 1)
    return {spec.name: tensor for spec, tensor in zip(specs, tensors, strict=True)}


def append(
    x: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    role: RoleScheme,
    codebook: list[Tensor],
    tensors: list[Tensor],
) -> None:
    """hqmq::quantize_: append new_length[b] tokens of x [B, H, T, D] to a cache, in place."""
    cache = _named(role, tensors)
    tail = cache["tail"]
    page_size = _page_size(cache, role)
    for b, (first, count) in enumerate(zip(past_length.tolist(), new_length.tolist(), strict=True)):
        held = first % page_size
        full = (held + count) // page_size
        if full:
            tokens = torch.cat([tail[b, :, :held], x[b, :, : full * page_size - held].half()], 1)
            _store(cache, b, first // page_size, tokens.unflatten(1, (full, page_size)), role, codebook)
    row = torch.arange(x.shape[2], device=x.device)
    kept = (row < new_length[:, None]) & (row >= new_length[:, None] - page_size)
    b_index, i = kept.nonzero(as_tuple=True)
    tail[b_index, :, (past_length.long()[b_index] + i) % page_size] = x[b_index, :, i].half()
    is_sink = (row < new_length[:, None]) & (row < role.sink_tokens - past_length[:, None])  # tokens 0 … N - 1
    b_index, i = is_sink.nonzero(as_tuple=True)
    tail[b_index, :, page_size + past_length.long()[b_index] + i] = x[b_index, :, i].half()


def _page_size(cache: dict[str, Tensor], role: RoleScheme) -> int:
    return cache["tail"].shape[2] - role.sink_tokens


def _store(
    cache: dict[str, Tensor], b: int, first: int, tokens: Tensor, role: RoleScheme, codebook: list[Tensor]
) -> None:
    """Write pages first, first + 1, … of sequence b from tokens fp16 [H, N, P, D]."""
    count, page_size = tokens.shape[1:3]
    rows = slice(first * page_size, (first + count) * page_size)
    if not role.packed:
        cache["codes"][b, :, rows] = tokens.contiguous().view(torch.int32).flatten(1, 2)
        return
    for name, tensor in encode_pages(tokens, role, *codebook)._asdict().items():
        if tensor is None:
            continue
        if name == "codes":
            cache[name][b, :, rows] = tensor.flatten(1, 2)
        else:
            cache[name][b, :, first : first + count] = tensor


def _load_pages(
    cache: dict[str, Tensor], b: int, first: int, count: int, role: RoleScheme, codebook: list[Tensor]
) -> Tensor:
    """Full pages first … first + count - 1 of sequence b, the sink tokens exact, float32 [H, count*P, D]."""
    page_size, head_dim = _page_size(cache, role), cache["tail"].shape[3]
    rows = slice(first * page_size, (first + count) * page_size)
    codes = cache["codes"][b, :, rows].unflatten(1, (count, page_size))
    found = {n: cache[n][b, :, first : first + count] for n in Pages._fields[1:] if n in cache}
    pages = Pages(codes, *(found.get(name) for name in Pages._fields[1:]))
    secondaries, levels = codebook if codebook else (pages.codes, pages.codes)
    x = decode_pages(pages, role, secondaries, levels, head_dim).flatten(1, 2)
    if first == 0:
        x[:, : role.sink_tokens] = cache["tail"][b, :, page_size:].float()
    return x


def load(length: Tensor, role: RoleScheme, codebook: list[Tensor], tensors: list[Tensor], dtype: torch.dtype) -> Tensor:
    """hqmq::dequantize: a cache to [B, H, M*P, D] of `dtype`; rows past length[b] are 0."""
    cache = _named(role, tensors)
    tail = cache["tail"]
    batch, heads, _, head_dim = tail.shape
    page_size = _page_size(cache, role)
    out = tail.new_zeros((batch, heads, cache["codes"].shape[2], head_dim), dtype=dtype)
    step = max(_RANGE_TOKENS // page_size, 1)
    for b, held in enumerate(length.tolist()):
        full, rest = divmod(held, page_size)
        for page in range(0, full, step):
            count = min(step, full - page)
            rows = slice(page * page_size, (page + count) * page_size)
            out[b, :, rows] = _load_pages(cache, b, page, count, role, codebook).to(dtype)
        out[b, :, full * page_size : held] = tail[b, :, :rest].to(dtype)
    return out


class _Softmax:
    """Attention of queries [H, N, D] accumulated over blocks of keys, with a running maximum."""

    def __init__(self, q: Tensor, scale: float, softcap: float, sinks: Tensor | None) -> None:
        self.q, self.scale, self.softcap = q, scale, softcap
        # Finite, so that a block with nothing to see leaves exp(-inf - top) = 0 and no NaN.
        self.top = q.new_full(q.shape[:2], -1e30) if sinks is None else sinks
        self.total = torch.zeros_like(self.top) if sinks is None else torch.ones_like(self.top)
        self.sum: Tensor | None = None

    def add(self, k: Tensor, v: Tensor, hidden: Tensor, rows: slice) -> None:
        """Queries `rows` see keys k [H, M, D] and values v [H, M, D] but where hidden [rows, M] is True."""
        if self.sum is None:
            self.sum = self.q.new_zeros((*self.q.shape[:2], v.shape[2]))
        score = self.q[:, rows] @ k.transpose(1, 2) * self.scale
        if self.softcap > 0:
            score = self.softcap * torch.tanh(score / self.softcap)
        score = score.masked_fill_(hidden, -torch.inf)
        top = torch.maximum(self.top[:, rows], score.amax(-1))
        old, weight = (self.top[:, rows] - top).exp(), (score - top[..., None]).exp_()
        self.top[:, rows] = top
        self.total[:, rows] = self.total[:, rows] * old + weight.sum(-1)
        self.sum[:, rows] = self.sum[:, rows] * old[..., None] + weight @ v

    def result(self) -> Tensor:
        """[H, N, D]."""
        assert self.sum is not None
        return self.sum / self.total[..., None]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    sinks: Tensor | None,
    scheme: Scheme,
    books: list[list[Tensor]],
    caches: list[list[Tensor]],
    scale: float,
    window: int,
    softcap: float,
) -> Tensor:
    """hqmq::attention_: append k and v to their caches and attend page-causally; [B, Hq, T, D]."""
    roles, page_size, (batch, heads) = (scheme.key, scheme.value), scheme.page_size, k.shape[:2]
    named = [_named(role, tensors) for role, tensors in zip(roles, caches, strict=True)]
    lengths = list(zip(past_length.tolist(), new_length.tolist(), strict=True))
    # The tokens of the page that is open, as they are before the append overwrites the tail.
    open_page = [[cache["tail"][b, :, : lengths[b][0] % page_size].clone() for b in range(batch)] for cache in named]
    for x, role, book, tensors in zip((k, v), roles, books, caches, strict=True):
        append(x, past_length, new_length, role, book, tensors)

    out, group = q.new_zeros((*q.shape[:3], v.shape[3])), q.shape[1] // heads
    for b, (first, count) in enumerate(lengths):
        if not count:
            continue
        # Query rows of a KV head: time major, so that a page's rows are one slice.
        grouped = q[b, :, :count].float().unflatten(0, (heads, group)).transpose(1, 2).flatten(1, 2)
        sink = None
        if sinks is not None:
            sink = sinks.float().reshape(heads, 1, group).expand(heads, count, group).flatten(1).clone()
        softmax = _Softmax(grouped, scale, softcap, sink)
        time = torch.arange(first, first + count, device=q.device).repeat_interleave(group)
        own = [
            torch.cat([old[b], new[b, :, :count].half()], 1).float() for old, new in zip(open_page, (k, v), strict=True)
        ]
        start = first // page_size * page_size
        for page in range(start, first + count, page_size):
            keys = slice(page - start, page - start + page_size)
            rows = slice((max(page, first) - first) * group, (page + page_size - first) * group)
            softmax.add(own[0][:, keys], own[1][:, keys], _hidden(time[rows], page, own[0][:, keys], window), rows)
        last = (first + count - 1) // page_size
        step = max(_RANGE_TOKENS // page_size, 1)
        for page in range(max(first - window + 1, 0) // page_size if window else 0, last, step):
            pages = min(step, last - page)
            coded = [
                _load_pages(cache, b, page, pages, role, book)
                for cache, role, book in zip(named, roles, books, strict=True)
            ]
            # Queries of page `page` and before see none of these.
            skip = max((page + 1) * page_size - first, 0) * group
            for row in range(skip, count * group, _QUERY_ROWS):
                rows = slice(row, row + _QUERY_ROWS)
                hidden = _hidden(time[rows] // page_size * page_size - 1, page * page_size, coded[0], 0)
                if window:
                    hidden |= _hidden(time[rows], page * page_size, coded[0], window)
                softmax.add(coded[0], coded[1], hidden, rows)
        y = softmax.result().unflatten(1, (count, group)).transpose(1, 2).flatten(0, 1)
        out[b, :, :count] = y.to(q.dtype)
    return out


def _hidden(last: Tensor, first_key: int, keys: Tensor, window: int) -> Tensor:
    """bool [rows, M]: key first_key + m lies after last[row], or `window` or more before it."""
    position = torch.arange(first_key, first_key + keys.shape[1], device=last.device)
    hidden = position > last[:, None]
    if window:
        hidden = hidden | (position <= last[:, None] - window)
    return hidden
