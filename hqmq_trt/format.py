"""The packed cache format: the owner of its version, bit layout, tensors and sizes.

C++ (plugins/codec/layout.h) follows this file; FORMAT_VERSION is compiled into every library from here, and the
tests compare the two layouts field by field. docs/format.md explains the same with pictures.

Bit layout of ``codes``. A chunk's code is ``index | level << index_bits | sign << (index_bits + radius_bits)``,
n = code_bits in all. It is cut, low bits first, into *planes* whose widths are the powers of two of n, widest
first (12 → 8+4, 14 → 8+4+2, 16 → 16, 20 → 16+4). A token stores plane after plane, chunk 0 in the lowest bits of
each: bit ``offset(plane) + chunk * width(plane)`` of a little-endian bit string in INT32 words. No field crosses
a word.

``scales`` of a page are such a string of bits, too, token 0 in the lowest: fp16 (gain MAX) or the 8 bits of a *short
scale* (gain RMS), fp16 without its sign and its 7 lowest bits.
"""

from __future__ import annotations

from dataclasses import dataclass

from hqmq_trt.scheme import RoleScheme, Scheme

FORMAT_VERSION = 3
LARGEST_SHORT_SCALE, SHORT_NAN = 247, 255
"""Short scales of 61440 and of a token that was not finite."""


@dataclass(frozen=True)
class Plane:
    """One plane: `width` bits of every chunk's code, from bit `shift` of the code, at bit `offset` of the token."""

    width: int
    shift: int
    offset: int


def planes(code_bits: int, head_dim: int) -> tuple[Plane, ...]:
    """Planes of one token of `head_dim` elements with codes of `code_bits` bits (≤ 31)."""
    chunks, shift, result = head_dim // 4, 0, []
    for width in (16, 8, 4, 2, 1):
        if code_bits & width:
            result.append(Plane(width, shift, chunks * shift))
            shift += width
    return tuple(result)


def words_per_token(role: RoleScheme, head_dim: int) -> int:
    """W: INT32 words one token and head take in ``codes``."""
    bits = role.code_bits * (head_dim // 4) if role.packed else 16 * head_dim
    return -(-bits // 32)


def scale_words(role: RoleScheme, page_size: int) -> int:
    """Z: INT32 words of a page's ``scales``."""
    return page_size * role.scale_bits // 32


def mask_words(head_dim: int, page_size: int) -> int:
    """INT32 words of a page's ``outlier_mask``: one bit a chunk, then one word counting the chunks dropped."""
    return -(-page_size * (head_dim // 4) // 32) + 1


@dataclass(frozen=True)
class CacheTensor:
    """One tensor of the cache of one layer and role.

    Attributes:
        name: ``codes``, ``scales``, ``mean``, ``outlier_mask``, ``outlier_value`` or ``tail``.
        dtype: ``int32`` or ``float16``.
        shape: (batch, heads, …) with static sizes.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes."""
        size = 4 if self.dtype == "int32" else 2
        for dim in self.shape:
            size *= dim
        return size


def cache_tensors(
    role: RoleScheme, page_size: int, head_dim: int, num_kv_heads: int, batch: int, num_pages: int
) -> tuple[CacheTensor, ...]:
    """Tensors of one layer and role, in the order in which operators take and return them.

    ========================  =======  =====================  ==================================================
    name                      dtype    shape                  holds
    ========================  =======  =====================  ==================================================
    codes                     int32    [B, H, M*P, W]         packed codes (or two fp16 a word for ``fp16``)
    scales (packed)           int32    [B, H, M, Z]           scales of a page's tokens, 8 bits (gain RMS) or fp16 each
    mean (page_mean)          float16  [B, H, M, D]           mean of a page, after the Hadamard rotation
    outlier_mask (med3)       int32    [B, H, M, ⌈P*D/128⌉+1]  bit t*D/4+c: chunk c of token t is an outlier;
                                                              last word: outliers that found no slot
    outlier_value (med3)      float16  [B, H, M, cap, 4]      the outliers, in the order of their bits
    tail                      float16  [B, H, P+N, D]         the last P tokens, token t in row t mod P; then the first
                                                              N of the sequence (sink_tokens); not rotated
    ========================  =======  =====================  ==================================================
    """
    rows, lead = num_pages * page_size, (batch, num_kv_heads)
    tensors = [CacheTensor("codes", "int32", (*lead, rows, words_per_token(role, head_dim)))]
    if role.packed:
        tensors.append(CacheTensor("scales", "int32", (*lead, num_pages, scale_words(role, page_size))))
    if role.page_mean:
        tensors.append(CacheTensor("mean", "float16", (*lead, num_pages, head_dim)))
    if role.med3:
        slots = role.outlier_capacity(head_dim, page_size)
        words = mask_words(head_dim, page_size)
        tensors.append(CacheTensor("outlier_mask", "int32", (*lead, num_pages, words)))
        tensors.append(CacheTensor("outlier_value", "float16", (*lead, num_pages, slots, 4)))
    tensors.append(CacheTensor("tail", "float16", (*lead, page_size + role.sink_tokens, head_dim)))
    return tuple(tensors)


def paged_cache_tensors(
    role: RoleScheme, page_size: int, head_dim: int, num_kv_heads: int, batch: int, pool_pages: int
) -> tuple[CacheTensor, ...]:
    """Tensors of one layer and role whose pages lie in a pool: those of ``pool_pages`` sequences of one page, but for
    the tail, which the ``batch`` running sequences have. A page table says which pages a sequence has."""
    *pages, _ = cache_tensors(role, page_size, head_dim, num_kv_heads, pool_pages, 1)
    return (*pages, cache_tensors(role, page_size, head_dim, num_kv_heads, batch, 1)[-1])


def paper_bits(role: RoleScheme, head_dim: int, outlier_share: float = 0.0, with_scale: bool = True) -> float:
    """Bits an element as the paper counts them: fractional index bits, flag and value of the outliers that occur."""
    if not role.packed:
        return 16.0
    from math import log2

    bits = (log2(24 * role.secondaries) + role.radius_bits) / 4 + (role.scale_bits / head_dim if with_scale else 0.0)
    return bits + (0.25 + 16 * outlier_share if role.med3 else 0.0)


def stored_bits(role: RoleScheme, head_dim: int, page_size: int) -> float:
    """Bits an element really takes in a full page: whole words, scales, means, outlier masks and slots."""
    page = cache_tensors(role, page_size, head_dim, 1, 1, 1)
    return 8 * sum(t.nbytes for t in page if t.name != "tail") / (page_size * head_dim)


def codebook_bytes(role: RoleScheme, num_kv_heads: int) -> int:
    """Bytes of one layer's float32 secondaries and levels."""
    return 16 * role.secondaries * num_kv_heads + 4 * 2**role.radius_bits if role.packed else 0


def cache_bytes(
    scheme: Scheme, num_layers: int, num_kv_heads: int, head_dim: int, context: int, batch: int = 1
) -> dict[str, int]:
    """Bytes of a model's cache for `context` tokens, by kind of tensor, codebooks included (key ``codebooks``)."""
    num_pages = -(-context // scheme.page_size)
    total: dict[str, int] = {}
    for role in (scheme.key, scheme.value):
        for tensor in cache_tensors(role, scheme.page_size, head_dim, num_kv_heads, batch, num_pages):
            total[tensor.name] = total.get(tensor.name, 0) + num_layers * tensor.nbytes
        total["codebooks"] = total.get("codebooks", 0) + num_layers * codebook_bytes(role, num_kv_heads)
    return total
