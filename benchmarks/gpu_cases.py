"""What benchmarks/gpu_attention.py and gpu_encode.py time: HqmqAttention over coded caches, and fp16 attention.

Ours is the whole operator through the C interface: append the new token, code its page if it fills, attend. Caches
hold codes that the library's own encoder wrote for BLOCK tokens, pages in random order and scales changed at random,
so that no two pages of a cache are alike. Baselines read float16 K and V of `context` tokens and append nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_paths import attention_path
from benchmarks.gpu_timing import Step, copies_for
from hqmq_trt import codebooks, cuda, native, native_attention, torch_attention
from hqmq_trt.format import LARGEST_SHORT_SCALE, cache_tensors, stored_bits
from hqmq_trt.scheme import ROLES, RoleScheme, Scheme

BLOCK = 4096
"""Tokens that are really coded; a multiple of every page size."""
OUTLIERS = 0.03
"""Share of chunks of K and V made eight times larger for schemes with Med3x."""
CHECKED = 2
"""Sequences whose output is compared with float32 attention."""


@dataclass(frozen=True)
class Shape:
    """One attention call: `tokens` queries a sequence over `context` tokens in the cache."""

    batch: int
    context: int
    group: int = 4
    head_dim: int = 128
    heads: int = 8
    tokens: int = 1

    @property
    def query_heads(self) -> int:
        """Hq."""
        return self.heads * self.group

    @property
    def scale(self) -> float:
        """Of scores."""
        return float(self.head_dim**-0.5)

    @property
    def rows_bytes(self) -> int:
        """float16 bytes of q and y."""
        return 4 * self.batch * self.query_heads * self.tokens * self.head_dim

    @property
    def half_bytes(self) -> int:
        """Bytes an fp16 attention must move."""
        return 4 * self.batch * self.heads * self.context * self.head_dim + self.rows_bytes

    def values(self) -> dict[str, int]:
        """For rows of a table."""
        names = ("batch", "context", "group", "head_dim", "heads", "tokens")
        return {name: getattr(self, name) for name in names}


def codebook(role: RoleScheme, heads: int, name: str, device: torch.device) -> list[Tensor]:
    """[secondaries, levels], or [] for fp16."""
    if not role.packed:
        return []
    secondaries = torch.from_numpy(codebooks.secondaries(role, 0, 0, heads, name))
    return [secondaries.to(device), torch.from_numpy(codebooks.levels(role)).to(device)]


def tokens_like_a_model(
    role: RoleScheme, heads: int, tokens: int, head_dim: int, name: str, device: torch.device
) -> Tensor:
    """float16 [1, heads, tokens, head_dim]: Gaussian; K with channels far from zero; with outliers for Med3x."""
    g = torch.Generator(device=device).manual_seed(len(name))
    x = torch.randn(1, heads, tokens, head_dim, generator=g, device=device)
    if name == "key" and not role.med3:
        x += 2 * torch.randn(head_dim, generator=g, device=device)
    if role.med3:
        chosen = torch.rand(1, heads, tokens, head_dim // 4, 1, generator=g, device=device) < OUTLIERS
        x = (x.unflatten(-1, (-1, 4)) * (1 + 7 * chosen)).flatten(-2)
    return x.half()


def int32(values: Iterable[int], device: torch.device) -> Tensor:
    """An int32 vector."""
    return torch.tensor(list(values), dtype=torch.int32, device=device)


def append(x: Tensor, past: Tensor, new: Tensor, role: RoleScheme, book: list[Tensor], cache: list[Tensor]) -> None:
    """HqmqQuantize in place on the tensors' device."""
    (cuda if x.is_cuda else native).append(x, past, new, role, book, cache)


@lru_cache(maxsize=4)
def _coded_block(
    scheme: Scheme, name: str, heads: int, head_dim: int, device: torch.device
) -> tuple[list[Tensor], list[str]]:
    """A cache of one sequence of BLOCK tokens, and the names of its tensors."""
    role, pages = scheme.role(name), BLOCK // scheme.page_size
    specs = cache_tensors(role, scheme.page_size, head_dim, heads, 1, pages)
    cache = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in specs]
    x = tokens_like_a_model(role, heads, BLOCK, head_dim, name, device)
    book = codebook(role, heads, name, device)
    append(x, int32([0], device), int32([BLOCK], device), role, book, cache)
    return cache, [spec.name for spec in specs]


def build_cache(
    scheme: Scheme, name: str, heads: int, head_dim: int, sequences: int, capacity: int, device: torch.device
) -> list[Tensor]:
    """A role's cache with valid codes everywhere."""
    role, page = scheme.role(name), scheme.page_size
    block, names = _coded_block(scheme, name, heads, head_dim, device)
    pages, source_pages = capacity // page, BLOCK // page
    specs = cache_tensors(role, page, head_dim, heads, sequences, pages)
    cache = [torch.empty(spec.shape, dtype=getattr(torch, spec.dtype), device=device) for spec in specs]
    g = torch.Generator(device=device).manual_seed(7)
    for s in range(sequences):
        order = torch.randint(source_pages, (pages,), generator=g, device=device)
        for part, target, source in zip(names, cache, block, strict=True):
            if part == "tail":
                target[s] = torch.randn(target.shape[1:], generator=g, device=device).half()
                continue
            rows = target[s].unflatten(1, (pages, -1)) if part == "codes" else target[s]
            from_rows = source[0].unflatten(1, (source_pages, -1)) if part == "codes" else source[0]
            torch.index_select(from_rows, 1, order, out=rows)
            if part == "scales":
                _change_scales(target[s], role, g)
    return cache


def _change_scales(words: Tensor, role: RoleScheme, g: torch.Generator) -> None:
    """Scales [H, M, Z] of pages, in place: short ones by -1, 0 or 1, an eighth at most; fp16 ones by 0.5 to 1.5."""
    if role.scale_bits == 16:
        scales = words.view(torch.float16)
        scales *= 0.5 + torch.rand(scales.shape, generator=g, device=words.device).half()
        return
    short = words.view(torch.uint8)
    change = torch.randint(-1, 2, short.shape, generator=g, device=words.device, dtype=torch.int16)
    changed = (short + change).clamp_(1, LARGEST_SHORT_SCALE)
    short.copy_(torch.where(short == 0, 0, changed))  # a token of zeros stays one


class Ours:
    """HqmqAttention of one shape and scheme over `copies` caches that lie in different memory.

    A decode step (`tokens` small) sees `context` tokens and half a page more: the page its token goes to is half full
    and is read as float16. With `tokens` large, `context` includes them: a prefill of `tokens` over the rest.
    """

    def __init__(self, shape: Shape, name: str, device: torch.device, copies: int = 1, prefill: bool = False) -> None:
        self.shape, self.scheme, self.device, self.copies = shape, Scheme.parse(name), device, copies
        page, dim, heads = self.scheme.page_size, shape.head_dim, shape.heads
        self.past = shape.context - shape.tokens if prefill else shape.context + page // 2 - shape.tokens
        capacity = -(-(self.past + shape.tokens) // page) * page + (0 if prefill else page)
        self.books = [codebook(self.scheme.role(role), heads, role, device) for role in ROLES]
        sequences = copies * shape.batch
        self.caches = [build_cache(self.scheme, role, heads, dim, sequences, capacity, device) for role in ROLES]
        g = torch.Generator(device=device).manual_seed(11)
        size = (sequences, shape.query_heads, shape.tokens, dim)
        self.q = torch.randn(size, generator=g, device=device).half()
        new = [tokens_like_a_model(self.scheme.role(r), heads, shape.tokens, dim, r, device) for r in ROLES]
        self.k, self.v = (x.expand(shape.batch, -1, -1, -1) for x in new)
        self.new = int32([shape.tokens] * shape.batch, device)

    def arguments(self, copy: int, past: Tensor, count: int | None = None) -> list[Any]:
        """Arguments of attend, of the first `count` sequences of a copy."""
        count = self.shape.batch if count is None else count
        rows = slice(copy * self.shape.batch, copy * self.shape.batch + count)
        caches = [[tensor[rows] for tensor in role] for role in self.caches]
        inputs = (self.q[rows], self.k[:count], self.v[:count], past[:count], self.new[:count])
        return [*inputs, None, self.scheme, self.books, caches, self.shape.scale]

    def steps(self, fill: bool = False) -> list[Step]:
        """A step for each copy; `fill`: the new token is the last of its page, which is coded."""
        at = self.shape.context - self.shape.tokens if fill else self.past
        past = int32([at] * self.shape.batch, self.device)
        run = cuda.attend if self.device.type == "cuda" else native_attention.attend
        calls = [self.arguments(copy, past) for copy in range(self.copies)]

        def step_of(arguments: list[Any]) -> Step:
            return lambda: run(*arguments)

        return [step_of(arguments) for arguments in calls]

    def path(self) -> int | None:
        """The kernel that attends (gpu_paths.attention_path); None if the library cannot tell."""
        if self.device.type != "cuda" or not hasattr(cuda.library(), "hqmq_cuda_attention_path"):
            return None
        q, k = self.q[: self.shape.batch], self.k
        return attention_path(q, k, self.caches[0][0].shape[2] // self.scheme.page_size, self.scheme)[0]

    def outlier_share(self) -> float | None:
        """Share of chunks of both roles kept as outliers; None for schemes without."""
        found = []
        for name, cache in zip(ROLES, self.caches, strict=True):
            if self.scheme.role(name).med3:
                found.append(self._outliers(name, cache) / (self.scheme.page_size * self.shape.head_dim // 4))
        return sum(found) / len(found) if found else None

    def _outliers(self, name: str, cache: list[Tensor]) -> float:
        """Outliers of a page on average."""
        position = [spec.name for spec in cache_tensors(self.scheme.role(name), 8, 16, 1, 1, 1)].index("outlier_mask")
        mask = cache[position][:1, :, :, :-1].flatten().contiguous().view(torch.uint8).cpu()
        bits = sum(int((mask >> bit & 1).sum()) for bit in range(8))
        return bits / (cache[position].shape[1] * cache[position].shape[2])

    @staticmethod
    def copies_for(shape: Shape, name: str, device: torch.device) -> int:
        """Copies that launches in turn need to find nothing in L2."""
        scheme = Scheme.parse(name)
        bits = sum(stored_bits(scheme.role(role), shape.head_dim, scheme.page_size) for role in ROLES)
        return copies_for(int(shape.batch * shape.heads * shape.context * shape.head_dim * bits / 8), device)

    def bytes_read(self) -> int:
        """Bytes a decode step must move: full pages as stored (as many outliers as there are), exact tokens, q, y."""
        shape, page = self.shape, self.scheme.page_size
        full, rest = divmod(self.past + shape.tokens, page)
        total = 0
        for name, cache in zip(ROLES, self.caches, strict=True):
            role = self.scheme.role(name)
            specs = {spec.name: spec.nbytes for spec in cache_tensors(role, page, shape.head_dim, 1, 1, 1)}
            each = float(sum(size for part, size in specs.items() if part not in ("tail", "outlier_value")))
            if role.med3:
                each += 8 * self._outliers(name, cache)
            exact = rest + (role.sink_tokens if full else 0)
            total += int(full * each) + 2 * exact * shape.head_dim
        return total * shape.batch * shape.heads + shape.rows_bytes

    def error(self) -> float:
        """Relative error of a step's output against float32 attention over the same bytes, of a few sequences."""
        count = min(CHECKED, self.shape.batch)
        past = int32([self.past] * count, self.device)
        q, k, v, past, new, _, scheme, books, caches, scale = self.arguments(0, past, count)
        copied = [[tensor.clone() for tensor in role] for role in caches]
        inputs = (q.float(), k.float(), v.float(), past, new, None)
        expected = torch_attention.attend(*inputs, scheme, books, copied, scale, 0, 0.0)
        y: Any = self.steps()[0]()
        return float((y[:count].float() - expected).norm() / expected.norm())


class Half:
    """float16 attention of PyTorch over `copies` caches of `context` tokens."""

    def __init__(self, shape: Shape, device: torch.device, copies: int = 1) -> None:
        self.shape, self.device, self.copies = shape, device, copies
        g = torch.Generator(device=device).manual_seed(3)
        size = (copies * shape.batch, shape.heads, shape.context, shape.head_dim)
        self.k, self.v = (torch.empty(size, dtype=torch.float16, device=device).normal_(generator=g) for _ in range(2))
        rows = (copies * shape.batch, shape.query_heads, shape.tokens, shape.head_dim)
        self.q = torch.randn(rows, generator=g, device=device).half()

    def variants(self) -> dict[str, list[Step]]:
        """Steps of each implementation: cuDNN and Flash, with query heads as heads or ("packed") as rows of a head."""
        if self.device.type != "cuda":
            return {"torch_cpu": [self._step(copy, None, False) for copy in range(self.copies)]}
        from torch.nn.attention import SDPBackend

        backends = {"cudnn": SDPBackend.CUDNN_ATTENTION, "flash": SDPBackend.FLASH_ATTENTION}
        return {
            name + ("_packed" if packed else ""): [self._step(copy, backend, packed) for copy in range(self.copies)]
            for packed in (False, True)
            for name, backend in backends.items()
            if not packed or self.shape.group > 1
        }

    def _step(self, copy: int, backend: Any, packed: bool) -> Step:
        rows = slice(copy * self.shape.batch, (copy + 1) * self.shape.batch)
        q, k, v = self.q[rows], self.k[rows], self.v[rows]
        if packed:  # no mask: a few queries see all keys
            q = q.reshape(q.shape[0], self.shape.heads, -1, q.shape[3])

        def step() -> Tensor:
            with chosen(backend):
                return F.scaled_dot_product_attention(q, k, v, enable_gqa=not packed)

        return step


def chosen(backend: Any) -> Any:
    """Context in which scaled_dot_product_attention uses one backend, or any for None."""
    from contextlib import nullcontext

    from torch.nn.attention import sdpa_kernel

    return nullcontext() if backend is None else sdpa_kernel(backend)


def prefill_variants(shape: Shape, device: torch.device) -> dict[str, list[Step]]:
    """float16 attention of `tokens` queries over `context` keys that include them, causal.

    cuDNN's mask starts at the first key. Over a past it is timed in two calls, one over the past and one over the new
    tokens, without joining them: less work than it would need.
    """
    g = torch.Generator(device=device).manual_seed(3)

    def random(heads: int, tokens: int) -> Tensor:
        size = (shape.batch, heads, tokens, shape.head_dim)
        return torch.empty(size, dtype=torch.float16, device=device).normal_(generator=g)

    past = shape.context - shape.tokens
    q, k, v = (
        random(shape.query_heads, shape.tokens),
        random(shape.heads, shape.context),
        random(shape.heads, shape.context),
    )

    def attend(backend: Any, keys: slice, causal: bool) -> Callable[[], Tensor]:
        def step() -> Tensor:
            with chosen(backend):
                return F.scaled_dot_product_attention(
                    q, k[:, :, keys], v[:, :, keys], is_causal=causal, enable_gqa=True
                )

        return step

    if device.type != "cuda":
        return {"torch_cpu": [attend(None, slice(past, None), True)]}
    from torch.nn.attention import SDPBackend
    from torch.nn.attention.bias import causal_lower_right

    cudnn, flash = SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION
    if not past:
        return {"cudnn": [attend(cudnn, slice(None), True)], "flash": [attend(flash, slice(None), True)]}
    parts = [attend(cudnn, slice(0, past), False), attend(cudnn, slice(past, None), True)]
    mask: Any = causal_lower_right(shape.tokens, shape.context)
    # Its dispatch knows no grouped heads.
    wide_k, wide_v = (x.repeat_interleave(shape.group, 1) for x in (k, v))

    def lower_right() -> Tensor:
        with chosen(flash):
            out: Tensor = F.scaled_dot_product_attention(q, wide_k, wide_v, attn_mask=mask)
            return out

    return {"cudnn_two_parts": [lambda: [part() for part in parts]], "flash": [lower_right]}
