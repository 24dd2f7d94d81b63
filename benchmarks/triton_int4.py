"""A baseline for decode attention: a 4-bit KV cache in Triton, as TurboQuant (arXiv 2504.19874) stores it.

Tokens are rotated (Walsh-Hadamard), scaled by their RMS and cut to 16 levels: 4 + 16/D bits an element. It is meant to
be a fair rival: one fused kernel over packed bytes with tensor cores, split over the context, tuned on the spot. What
could slow it down is left out: the rotations of q and y and the append of the new token are not timed, and the levels
follow a polynomial instead of a table, within 1.1 % of the Lloyd-Max levels of a Gaussian variable (the mean squared
error grows by 0.2 %).

Byte d of a token holds elements d (low half) and D/2 + d (high half).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import triton  # type: ignore[import-untyped]
import triton.language as tl  # type: ignore[import-untyped]
from torch import Tensor

from benchmarks.gpu_cases import Shape
from benchmarks.gpu_timing import copies_for

ROWS = 16
"""Query rows of a program: the least that tl.dot takes."""
MOST_SPLITS = 64
# level(u) = u * (A + w * (B + w * C)) with u = code - 7.5 and w = (u / 8)^2.
_A, _B, _C = tl.constexpr(0.257929), tl.constexpr(0.031684), tl.constexpr(0.098548)


@triton.jit
def level(codes):  # type: ignore[no-untyped-def]  # Triton reads annotations
    """Levels of codes 0…15, float16."""
    u = codes.to(tl.float16) - 7.5
    w = (u * 0.125) * (u * 0.125)
    return (u * (w * (w * _C + _B) + _A)).to(tl.float16)


@triton.jit
def attend_kernel(  # type: ignore[no-untyped-def]
    q, k, k_scale, v, v_scale, part, stat, context, per_split, scale,
    D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """One split of one sequence and KV head: outputs, maximum and sum. scale: of scores, times log2 e."""
    split, lane = tl.program_id(0), tl.program_id(1).to(tl.int64)
    first = split * per_split
    end = tl.minimum(first + per_split, context)
    d, rows = tl.arange(0, D // 2), tl.arange(0, ROWS)
    query = q + (lane * ROWS + rows)[:, None] * D + d[None, :]
    q_low, q_high = tl.load(query), tl.load(query + D // 2)
    most = tl.full([ROWS], -1e30, tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    low, high = tl.zeros([ROWS, D // 2], tl.float32), tl.zeros([ROWS, D // 2], tl.float32)
    for start in range(first, end, BLOCK):
        tokens = start + tl.arange(0, BLOCK)
        there = tokens < end
        at = lane * context + tokens
        codes = tl.load(k + at[None, :] * (D // 2) + d[:, None], mask=there[None, :], other=0)
        score = tl.dot(q_low, level(codes & 15)) + tl.dot(q_high, level(codes >> 4))
        score *= tl.load(k_scale + at, mask=there, other=0.0).to(tl.float32)[None, :] * scale
        score = tl.where(there[None, :], score, -1e30)
        larger = tl.maximum(most, tl.max(score, 1))
        shrink = tl.exp2(most - larger)
        weight = tl.exp2(score - larger[:, None])
        total = total * shrink + tl.sum(weight, 1)
        most = larger
        weight = (weight * tl.load(v_scale + at, mask=there, other=0.0).to(tl.float32)[None, :]).to(tl.float16)
        codes = tl.load(v + at[:, None] * (D // 2) + d[None, :], mask=there[:, None], other=0)
        low = low * shrink[:, None] + tl.dot(weight, level(codes & 15))
        high = high * shrink[:, None] + tl.dot(weight, level(codes >> 4))
    row = (lane * SPLITS + split) * ROWS + rows
    tl.store(part + row[:, None] * D + d[None, :], low)
    tl.store(part + row[:, None] * D + D // 2 + d[None, :], high)
    tl.store(stat + row * 2, most)
    tl.store(stat + row * 2 + 1, total)


@triton.jit
def join_kernel(  # type: ignore[no-untyped-def]
    part, stat, y, SPLITS: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr
):  # fmt: skip
    """One query row: the splits' outputs as one."""
    lane, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    d, splits = tl.arange(0, D), tl.arange(0, SPLITS)
    at = (lane * SPLITS + splits) * ROWS + row
    most, total = tl.load(stat + at * 2), tl.load(stat + at * 2 + 1)
    factor = tl.exp2(most - tl.max(most, 0))
    sums = tl.sum(tl.load(part + at[:, None] * D + d[None, :]) * factor[:, None], 0)
    tl.store(y + (lane * ROWS + row) * D + d, (sums / tl.sum(total * factor, 0)).to(tl.float16))


def levels() -> Tensor:
    """The 16 levels as the kernel computes them, float32 [16]."""
    u = torch.arange(16, dtype=torch.float32).half() - 7.5
    w = (u * 0.125) * (u * 0.125)
    return (u * (w * (w * _C.value + _B.value) + _A.value)).float()


def quantise(x: Tensor) -> tuple[Tensor, Tensor]:
    """Rotated tokens [..., D] → codes uint8 [..., D/2] and scales float16 [...]."""
    scale = x.float().square().mean(-1).sqrt().half()
    table = levels().to(x.device)
    codes = torch.bucketize(x.float() / scale[..., None].float().clamp_min(1e-6), (table[1:] + table[:-1]) / 2)
    low, high = codes.to(torch.uint8).chunk(2, -1)
    return low | high << 4, scale


def dequantise(codes: Tensor, scale: Tensor) -> Tensor:
    """What :func:`quantise` keeps, float32 [..., D]."""
    table = levels().to(codes.device)
    return torch.cat([table[(codes & 15).long()], table[(codes >> 4).long()]], -1) * scale[..., None].float()


class Int4:
    """Codes of K and V, and steps that attend to them.

    Args:
        q: rotated queries of one new token, float16 [B, Hq, D], Hq / H up to 16.
        k, v: rotated tokens, [B, H, T, D]; kept as codes only.
    """

    def __init__(self, q: Tensor, k: Tensor, v: Tensor) -> None:
        batch, heads, self.context, self.head_dim = k.shape
        self.group = q.shape[1] // heads
        if not 1 <= self.group <= ROWS or self.head_dim & (self.head_dim - 1):
            raise ValueError(
                f"groups of {self.group} and head_dim {self.head_dim}: it takes up to {ROWS}, powers of two"
            )
        self.lanes = batch * heads
        self.q = torch.zeros(self.lanes, ROWS, self.head_dim, dtype=torch.float16, device=q.device)
        self.q[:, : self.group] = q.reshape(self.lanes, self.group, self.head_dim)
        self.codes = [*quantise(k), *quantise(v)]
        self.y = torch.empty_like(self.q)
        self._scale = self.head_dim**-0.5 * math.log2(math.e)

    @property
    def nbytes(self) -> int:
        """Bytes of codes and scales that a step reads."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.codes)

    def launch(self, block: int, splits: int, **options: int) -> Tensor:
        """y float16 [B * H, group, D]. options: num_warps and num_stages of Triton."""
        per_split = -(-self.context // (splits * block)) * block
        rows, device = self.lanes * splits * ROWS, self.q.device
        part, stat = torch.empty(rows, self.head_dim, device=device), torch.empty(rows, 2, device=device)
        shape = {"D": self.head_dim, "ROWS": ROWS}
        sizes = (self.context, per_split, self._scale)
        attend_kernel[splits, self.lanes](
            self.q, *self.codes, part, stat, *sizes, BLOCK=block, SPLITS=splits, **shape, **options
        )
        join_kernel[self.lanes, self.group](part, stat, self.y, SPLITS=splits, **shape)
        return self.y[:, : self.group]

    def configurations(self, multiprocessors: int) -> list[dict[str, int]]:
        """What is worth trying: one to four programs a multiprocessor."""
        found = []
        for block, warps, stages in ((64, 2, 3), (64, 4, 3), (128, 4, 2)):
            for programs in (1, 2, 4):
                splits = 1 << max(round(math.log2(programs * multiprocessors / self.lanes)), 0)
                splits = min(splits, MOST_SPLITS, 1 << (self.context // block).bit_length() - 1)
                found.append({"block": block, "splits": splits, "num_warps": warps, "num_stages": stages})
        return [dict(case) for case in dict.fromkeys(tuple(case.items()) for case in found)]

    def fastest(self, time: Callable[[Callable[[], Any]], float], multiprocessors: int) -> dict[str, int]:
        """The configuration of the least time(step), in any unit."""
        return min(self.configurations(multiprocessors), key=lambda case: time(lambda: self.launch(**case)))


def random_caches(shape: Shape, device: torch.device) -> list[Int4]:
    """As many caches of Gaussian tokens as launches in turn need to find nothing in L2."""
    g = torch.Generator(device=device).manual_seed(3)
    size = (shape.batch, shape.heads, shape.context, shape.head_dim)
    made: list[Int4] = []
    while len(made) < (copies_for(made[0].nbytes, device) if made else 1):
        q = torch.randn(shape.batch, shape.query_heads, shape.head_dim, generator=g, device=device).half()
        k, v = (torch.empty(size, dtype=torch.float16, device=device).normal_(generator=g) for _ in range(2))
        made.append(Int4(q, k, v))
        del k, v
    return made
