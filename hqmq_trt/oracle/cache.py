"""Oracle of HqmqQuantize and HqmqDequantize: a cache of pages and a tail, one role, by plain loops."""

from __future__ import annotations

import torch
from torch import Tensor

from hqmq_trt.format import cache_tensors, mask_words
from hqmq_trt.oracle.codec import EncodedPage, decode_page, encode_page, pack, pack_scales, unpack, unpack_scales
from hqmq_trt.scheme import RoleScheme

Cache = dict[str, Tensor]
"""Tensors of one role by name (hqmq_trt.format.cache_tensors)."""


def empty_cache(
    role: RoleScheme, page_size: int, head_dim: int, num_kv_heads: int, batch: int, num_pages: int
) -> Cache:
    """A cache of zeros for `num_pages` pages."""
    specs = cache_tensors(role, page_size, head_dim, num_kv_heads, batch, num_pages)
    return {spec.name: torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs}


def quantize(
    x: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    role: RoleScheme,
    codebook: Tensor,
    levels: Tensor,
    past: Cache,
) -> Cache:
    """Append `new_length[b]` tokens of x [B, H, T, D] to a cache that holds `past_length[b]`; the present cache.

    Pages that fill are coded from their own tokens; row t mod P of the tail always holds the last such token, row P + t
    token t of the first N (role.sink_tokens), which page 0 codes like any other.
    codebook: float32 [H, S, 4]; levels: float32 [2^r].
    """
    present = {name: tensor.clone() for name, tensor in past.items()}
    page_size = _page_size(past, role)
    for b in range(x.shape[0]):
        first, count = int(past_length[b]), int(new_length[b])
        for t in range(first, first + count):
            present["tail"][b, :, t % page_size] = x[b, :, t - first].half()
            if t < role.sink_tokens:
                present["tail"][b, :, page_size + t] = x[b, :, t - first].half()
            if t % page_size == page_size - 1:
                for head in range(x.shape[1]):
                    _store(present, b, head, t // page_size, role, codebook, levels)
    return present


def _page_size(cache: Cache, role: RoleScheme) -> int:
    return cache["tail"].shape[2] - role.sink_tokens


def _store(cache: Cache, b: int, head: int, page: int, role: RoleScheme, codebook: Tensor, levels: Tensor) -> None:
    tokens = cache["tail"][b, head, : _page_size(cache, role)]
    rows = slice(page * len(tokens), (page + 1) * len(tokens))
    if not role.packed:
        cache["codes"][b, head, rows] = tokens.contiguous().view(torch.int32)
        return
    coded = encode_page(tokens.float(), role, codebook[head], levels)
    cache["codes"][b, head, rows] = pack(coded.codes, role)
    cache["scales"][b, head, page] = pack_scales(coded.scales, role)
    if coded.mean is not None:
        cache["mean"][b, head, page] = coded.mean
    if coded.outlier is not None and coded.outlier_value is not None:
        flags = coded.outlier.flatten().long()
        flags = torch.nn.functional.pad(flags, (0, -len(flags) % 32)).reshape(-1, 32)
        words = (flags << torch.arange(32)).sum(1)
        words = torch.cat([torch.where(words >= 1 << 31, words - (1 << 32), words), torch.tensor([coded.dropped])])
        cache["outlier_mask"][b, head, page] = words.int()
        cache["outlier_value"][b, head, page] = 0
        cache["outlier_value"][b, head, page, : len(coded.outlier_value)] = coded.outlier_value


def _load(cache: Cache, b: int, head: int, page: int, role: RoleScheme, codebook: Tensor, levels: Tensor) -> Tensor:
    page_size, head_dim = _page_size(cache, role), cache["tail"].shape[3]
    rows = slice(page * page_size, (page + 1) * page_size)
    words = cache["codes"][b, head, rows]
    if not role.packed:
        return words.contiguous().view(torch.float16).float()
    outlier = outlier_value = None
    if role.med3:
        bits = cache["outlier_mask"][b, head, page, : mask_words(head_dim, page_size) - 1].long()
        flags = (bits[:, None] >> torch.arange(32)) & 1
        outlier = flags.flatten()[: page_size * (head_dim // 4)].reshape(page_size, -1).bool()
        outlier_value = cache["outlier_value"][b, head, page, : int(outlier.sum())]
    coded = EncodedPage(
        unpack(words, role, head_dim),
        unpack_scales(cache["scales"][b, head, page], role),
        cache["mean"][b, head, page] if role.page_mean else None,
        outlier,
        outlier_value,
        0,
    )
    return decode_page(coded, role, codebook[head], levels)


def dequantize(cache: Cache, length: Tensor, role: RoleScheme, codebook: Tensor, levels: Tensor) -> Tensor:
    """K or V as the cache stores it, float32 [B, H, M*P, D]: full pages from codes but for the first N tokens, the rest
    from the tail, then 0."""
    batch, heads, _, head_dim = cache["tail"].shape
    page_size = _page_size(cache, role)
    out = torch.zeros(batch, heads, cache["codes"].shape[2], head_dim)
    for b in range(batch):
        full, rest = divmod(int(length[b]), page_size)
        for head in range(heads):
            for page in range(full):
                rows = slice(page * page_size, (page + 1) * page_size)
                out[b, head, rows] = _load(cache, b, head, page, role, codebook, levels)
            start = full * page_size
            exact = min(role.sink_tokens, start)
            out[b, head, :exact] = cache["tail"][b, head, page_size : page_size + exact].float()
            out[b, head, start : start + rest] = cache["tail"][b, head, :rest].float()
    return out
