"""Caches, inputs and the oracle's answer, shared by the tests of attention."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from hqmq_trt import native, oracle
from hqmq_trt.oracle.cache import Cache
from hqmq_trt.scheme import ROLES, Scheme
from tests.codec_cases import codebook, lengths

LIMITS = {torch.float16: 2e-3, torch.bfloat16: 4e-3}
"""Of the relative error. Rounding y to bfloat16 alone gives 1.7e-3."""
CASES = (
    *[(name, head_dim, 2, 2) for name in ("hq3", "hq3.5", "hq4", "hq5", "fp16") for head_dim in (64, 128)],
    ("hq4@p16", 256, 1, 3),
    ("hq3@p128", 64, 2, 1),
    ("k=hq4,v=hq3@p32", 64, 1, 4),
    ("k=fp16,v=hq3@p32", 64, 2, 2),
    ("k=hq3,v=hq:s10_r2@p32", 64, 2, 2),
    ("k=paper:s24_r3,v=hq4@p8", 64, 1, 2),  # sink tokens of V only
    ("hq:s170_r4-sinks@p16", 64, 2, 1),
    ("paper:s96_r4+med3@p32", 80, 2, 2),
    ("paper:s24_r3@p8", 96, 3, 1),
    ("paper:s5_r8+med3@p16", 20, 1, 2),
)
"""(scheme, head_dim, KV heads, query heads of each)."""
SHARES = (0.0, 0.03, 0.3)
"""Of the chunks of pages 0, 1, 2, …, in turn, that are outliers: none, the usual share, more than there are slots."""


@dataclass
class Attention:
    """One layer's cache with what it was made of; `past` tokens a sequence are appended at once."""

    name: str
    head_dim: int
    heads: int
    group: int
    past: tuple[int, ...]
    capacity: int = 256
    seed: int = 0
    dtype: torch.dtype = torch.float32
    scheme: Scheme = field(init=False)
    books: list[list[Tensor]] = field(init=False)
    caches: list[list[Tensor]] = field(init=False)

    def __post_init__(self) -> None:
        self.scheme = Scheme.parse(self.name)
        roles = (self.scheme.key, self.scheme.value)
        self.books = [codebook(role, self.heads, name) for role, name in zip(roles, ("key", "value"), strict=True)]
        self.caches = [list(cache.values()) for cache in self.empty()]
        if max(self.past):
            _, k, v = self.inputs(max(self.past), seed=self.seed + 1000)
            for x, role, book, cache in zip((k, v), roles, self.books, self.caches, strict=True):
                native.append(x, lengths(*[0] * len(self.past)), lengths(*self.past), role, book, cache)

    def empty(self) -> tuple[Cache, Cache]:
        """New caches of zeros."""
        pages = -(-self.capacity // self.scheme.page_size)
        shape = (self.scheme.page_size, self.head_dim, self.heads, len(self.past), pages)
        return oracle.empty_cache(self.scheme.key, *shape), oracle.empty_cache(self.scheme.value, *shape)

    def inputs(self, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v for `tokens` new rows; K has channels far from zero, as real models do."""
        g = torch.Generator().manual_seed(self.seed + seed)
        batch, dim = len(self.past), self.head_dim
        q = torch.randn(batch, self.heads * self.group, tokens, dim, generator=g)
        k = torch.randn(batch, self.heads, tokens, dim, generator=g) + 2 * torch.randn(dim, generator=g)
        v = torch.randn(batch, self.heads, tokens, dim, generator=g)
        return q.to(self.dtype), k.to(self.dtype), v.to(self.dtype)

    def clone(self) -> list[list[Tensor]]:
        """Copies of the caches."""
        return [[tensor.clone() for tensor in cache] for cache in self.caches]

    def oracle(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        new: Tensor,
        scale: float,
        window: int = 0,
        softcap: float = 0.0,
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, list[list[Tensor]]]:
        """The oracle's output and present caches."""
        past = tuple(
            dict(zip(names, cache, strict=True)) for names, cache in zip(self.empty(), self.caches, strict=True)
        )
        none = [torch.zeros(self.heads, 0, 4), torch.zeros(0)]
        key, value = (book or none for book in self.books)
        y, present = oracle.attention(
            q.float(), k.float(), v.float(), lengths(*self.past), new, self.scheme, (key[0], value[0]),
            (key[1], value[1]), (past[0], past[1]), scale, window, softcap, sinks,
        )  # fmt: skip
        return y, [list(cache.values()) for cache in present]


@dataclass
class OutlierAttention(Attention):
    """K and V about zero, with chunks of six times the size, SHARES of each page."""

    def inputs(self, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v for `tokens` new rows."""
        q, k, v = super().inputs(tokens, seed)
        g = torch.Generator().manual_seed(self.seed + seed + 500)
        page = torch.arange(tokens) // self.scheme.page_size % len(SHARES)
        share = torch.tensor(SHARES)[page]

        def spread(x: Tensor) -> Tensor:
            chosen = torch.rand(*x.shape[:3], self.head_dim // 4, generator=g) < share[:, None]
            return x * (1 + 5 * chosen.repeat_interleave(4, -1))

        return q, spread(torch.randn(k.shape, generator=g).to(k.dtype)), spread(v)


def attention_of(name: str) -> type[Attention]:
    """The cases of a scheme: with outliers if it keeps any."""
    return OutlierAttention if Scheme.parse(name).key.med3 else Attention


def with_sinks(case: Attention, counts: tuple[int, int]) -> None:
    """Give K and V that many sink tokens. Their exact rows get values of their own and page 0 other codes of these
    tokens, so that it shows where a kernel reads."""
    g, page = torch.Generator().manual_seed(1), case.scheme.page_size
    key, value = (replace(case.scheme.role(name), sink_tokens=n) for name, n in zip(ROLES, counts, strict=True))
    case.scheme = replace(case.scheme, key=key, value=value)
    for role, cache in zip((key, value), case.caches, strict=True):
        count, tail = role.sink_tokens, cache[-1]
        exact = 2 * torch.randn(*tail.shape[:2], count, case.head_dim, generator=g)
        cache[-1] = torch.cat([tail[:, :, :page], exact.half()], 2)
        cache[0][:, :, :count] = cache[0][:, :, 3 : 3 + count].clone()
        if role.packed:
            short = role.scale_bits == 8
            scales = cache[1].view(torch.uint8 if short else torch.float16)[:, :, 0, :count]
            scales[:] = scales + 12 if short else scales * 3  # 8 a power of two


def bits(tensor: Tensor) -> Tensor:
    """The tensor's bits as integers: equal NaNs and zeros of one sign only."""
    return tensor.contiguous().view(torch.int16 if tensor.element_size() == 2 else torch.int32)


def assert_same_caches(a: list[list[Tensor]], b: list[list[Tensor]]) -> None:
    """Assert that two pairs of caches hold identical bytes."""
    for left, right in zip(a, b, strict=True):
        for x, y in zip(left, right, strict=True):
            assert torch.equal(bits(x), bits(y))


def relative_error(a: Tensor, b: Tensor) -> float:
    """Of a against b, in the Frobenius norm."""
    return float((a.float() - b.float()).norm() / b.float().norm())


def assert_close(y: Tensor, expected: Tensor, new: Tensor, limit: float) -> None:
    """Assert that every sequence follows the reference and that rows without a token are 0."""
    assert y.isfinite().all()
    row = torch.arange(y.shape[2], device=y.device)
    given = (row < new[:, None])[:, None, :, None]
    assert not (y * ~given).any()
    error = ((y.float() - expected) * given).flatten(1).norm(dim=1)
    size = (expected * given).flatten(1).norm(dim=1)
    assert (error <= limit * size).all(), f"relative errors by sequence: {(error / size).tolist()}"
