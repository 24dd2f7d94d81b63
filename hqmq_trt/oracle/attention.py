"""Oracle of HqmqAttention: page-causal attention over a packed cache (docs/semantics.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from hqmq_trt.oracle.cache import Cache, dequantize, quantize
from hqmq_trt.scheme import Scheme


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    scheme: Scheme,
    codebooks: tuple[Tensor, Tensor],
    levels: tuple[Tensor, Tensor],
    past: tuple[Cache, Cache],
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
) -> tuple[Tensor, tuple[Cache, Cache]]:
    """Output float32 [B, Hq, T, D] and the present (key, value) caches.

    The query at position t sees pages before its own page as the cache codes them, but the first N tokens of the
    sequence (sink_tokens) and the tokens of its own page up to t exactly (as fp16). q: [B, Hq, T, D]; k, v:
    [B, Hkv, T, D]; lengths: int32 [B]; sinks: [Hq].
    window > 0 keeps keys j > t - window. Rows at and past new_length are 0.
    """
    page_size = scheme.page_size
    roles = (scheme.key, scheme.value)
    present, coded, exact = [], [], []
    for x, role, codebook, level, cache in zip((k, v), roles, codebooks, levels, past, strict=True):
        present.append(quantize(x, past_length, new_length, role, codebook, level, cache))
        coded.append(dequantize(present[-1], past_length + new_length, role, codebook, level))
        exact.append((cache["tail"].float(), x.half().float()))
    out = torch.zeros(q.shape[0], q.shape[1], q.shape[2], v.shape[3])
    group = q.shape[1] // k.shape[1]
    for b in range(q.shape[0]):
        first = int(past_length[b])
        for i in range(int(new_length[b])):
            t = first + i
            page_start = t // page_size * page_size
            seen = []
            for dense, (tail, new) in zip(coded, exact, strict=True):
                own = [
                    tail[b, :, j % page_size] if j < first else new[b, :, j - first] for j in range(page_start, t + 1)
                ]
                seen.append(torch.cat([dense[b, :, :page_start], torch.stack(own, 1)], 1))
            keys, values = (x.repeat_interleave(group, 0) for x in seen)
            score = torch.einsum("hd,htd->ht", q[b, :, i].float(), keys) * scale
            if softcap > 0:
                score = softcap * torch.tanh(score / softcap)
            if window > 0:
                score[:, : max(t - window + 1, 0)] = -torch.inf
            if sinks is not None:
                score = torch.cat([score, sinks.float()[:, None]], 1)
            weight = score.softmax(1)[:, : t + 1]
            out[b, :, i] = torch.einsum("ht,htd->hd", weight, values)
    return out, (present[0], present[1])
