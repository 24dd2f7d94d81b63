"""The CUDA library (plugins/cuda): the three operators on CUDA tensors, on torch's current stream.

The library is ``libhqmq_cuda.so`` beside the host library. Calls never wait for the GPU, so that they can be captured
in a CUDA graph that serves changing lengths; nothing is raised for what only the GPU knows. NaN or infinity in a page
gives NaN when it is read, tokens that find no page are not cached and their rows of y are NaN, and :func:`status`
counts both.
"""

from __future__ import annotations

from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int32, c_size_t, c_void_p
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hqmq_trt import native
from hqmq_trt.errors import HqmqError
from hqmq_trt.library_files import library_dir, library_path
from hqmq_trt.native import RoleCache, RoleParams, Rows
from hqmq_trt.native_attention import AttentionCall, AttentionParams, AttentionRole
from hqmq_trt.scheme import RoleScheme, Scheme

CUDA_LIBRARY = "libhqmq_cuda.so"
BUILD = (
    "build it with: cmake --preset cuda-release && cmake --build build/cuda-release && cmake --install "
    "build/cuda-release --prefix ."
)


class Pages(Structure):
    """hqmq_cuda_pages of plugins/cuda/hqmq_cuda.h."""

    _fields_ = [("table", c_void_p), ("pool_pages", c_int32)]


_SIZES = [c_int32] * 4
_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "hqmq_cuda_version": (c_char_p, []),
    "hqmq_cuda_last_error": (c_char_p, []),
    "hqmq_cuda_append_workspace": (c_int, [POINTER(RoleParams), *_SIZES[:3], POINTER(c_size_t)]),
    "hqmq_cuda_append_paged": (
        c_int,
        [
            *[POINTER(Pages), POINTER(RoleParams), *_SIZES, POINTER(Rows), *[c_void_p] * 4],
            *[POINTER(RoleCache), c_void_p, c_void_p, c_size_t, c_void_p],
        ],
    ),
    "hqmq_cuda_load_paged": (
        c_int,
        [
            POINTER(Pages),
            POINTER(RoleParams),
            *_SIZES[:3],
            *[c_void_p] * 3,
            POINTER(RoleCache),
            POINTER(Rows),
            c_void_p,
        ],
    ),
    "hqmq_cuda_batch_invariant": (None, [c_int32]),
    "hqmq_cuda_attention_workspace": (
        c_int,
        [POINTER(AttentionParams), POINTER(RoleParams), POINTER(RoleParams), POINTER(c_size_t)],
    ),
    "hqmq_cuda_attention_paged": (
        c_int,
        [
            *[POINTER(Pages), POINTER(AttentionParams), POINTER(Rows), POINTER(AttentionRole), POINTER(AttentionRole)],
            *[c_void_p, c_void_p, c_void_p, POINTER(Rows), c_void_p, c_void_p, c_size_t, c_void_p],
        ],
    ),
}


class Status(NamedTuple):
    """What kernels could not raise, counted since :func:`clear_status` (hqmq_cuda_status)."""

    not_finite: int
    """New tokens, of a sequence, head and role, that hold NaN, Inf or a value beyond float16."""
    no_page: int
    """Tokens that found no page: beyond the cache, or of pages that filled without a valid entry of the page table."""
    dropped: int
    """Med3x outliers that found no slot."""


def available() -> bool:
    """Whether the library lies where it is looked for."""
    return (library_dir() / CUDA_LIBRARY).is_file()


@lru_cache(maxsize=1)
def library() -> Any:
    """The CUDA library, loaded once.

    Raises:
        HqmqError: missing, foreign, or built for another format version.
    """
    if not available():
        raise HqmqError(f"CUDA library {library_dir() / CUDA_LIBRARY} is missing; {BUILD}")
    return native.load_library(library_path(CUDA_LIBRARY), prefix="hqmq_cuda", signatures=_SIGNATURES)


def _check(code: int) -> None:
    if code:
        raise HqmqError(library().hqmq_cuda_last_error().decode())


@lru_cache(maxsize=64)
def _counters(device: torch.device) -> Tensor:
    return torch.zeros(3, dtype=torch.int32, device=device)


def status(device: torch.device | str = "cuda") -> Status:
    """Counters of a device; waits for the GPU."""
    return Status(*_counters(_indexed(device)).tolist())


def batch_invariant(on: bool) -> None:
    """Whether the fused decode kernel gives a sequence the same bits whatever the other sequences in the call.

    At first it does not, unless the environment has HQMQ_BATCH_INVARIANT: their number and lengths then decide into
    how many parts each sequence is cut, which makes batches faster, most of all where lengths differ. Of the whole
    process.
    """
    library().hqmq_cuda_batch_invariant(int(on))


def clear_status(device: torch.device | str = "cuda") -> None:
    """Set the counters of a device to 0."""
    _counters(_indexed(device)).zero_()


def _indexed(device: torch.device | str) -> torch.device:
    device = torch.device(device)
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _stream(device: torch.device) -> int:
    """torch's current stream of a device, which must be the current device: kernels run there."""
    if device.type != "cuda":
        raise HqmqError(f"the CUDA library takes CUDA tensors, not tensors on {device}")
    return int(torch.cuda.current_stream(device).cuda_stream)


def _pages(page_table: Tensor | None, cache: Sequence[Tensor]) -> Any:
    """A pointer to hqmq_cuda_pages, which reads the table when it is used; null without a table."""
    return None if page_table is None else byref(Pages(page_table.data_ptr(), len(cache[0])))


def append(
    x: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    role: RoleScheme,
    codebook: Sequence[Tensor],
    cache: Sequence[Tensor],
    name: str = "x",
    page_table: Tensor | None = None,
) -> None:
    """HqmqQuantize in place; arguments as hqmq_trt.native.append, all on one GPU.

    page_table: int32 [B, M], with a cache of hqmq_trt.format.paged_cache_tensors (hqmq_trt.page_table).

    Raises:
        HqmqError: tensors that do not fit, or a failing CUDA call.
    """
    device, lib = cache[-1].device, library()
    arguments, keep = native.append_arguments(
        x, past_length, new_length, role, codebook, cache, name, device, page_table
    )
    bytes_needed = c_size_t()
    _check(lib.hqmq_cuda_append_workspace(*arguments[:4], byref(bytes_needed)))
    with torch.cuda.device_of(cache[-1]):
        workspace = _workspace(bytes_needed.value, device)
        _check(
            lib.hqmq_cuda_append_paged(
                _pages(page_table, cache),
                *arguments,
                _counters(device).data_ptr(),
                workspace.data_ptr(),
                bytes_needed.value,
                _stream(device),
            )
        )
    del keep


def load(
    length: Tensor,
    role: RoleScheme,
    codebook: Sequence[Tensor],
    cache: Sequence[Tensor],
    dtype: torch.dtype,
    page_table: Tensor | None = None,
) -> Tensor:
    """HqmqDequantize; arguments as hqmq_trt.native_attention.load, all on one GPU. Lengths beyond the cache are cut.

    page_table: as in :func:`append`; entries of full pages outside the pool give NaN.

    Raises:
        HqmqError: tensors that do not fit, or a failing CUDA call.
    """
    device = cache[-1].device
    pointers, params, num_pages = native.role_cache(role, cache, device, page_table)
    batch, heads, _, head_dim = cache[-1].shape
    out = torch.empty(batch, heads, num_pages * params.page_size, head_dim, dtype=dtype, device=device)
    target, out = native.rows(out, "x", device)
    held = native.tensor(length, torch.int32, (batch,), "length", device)
    books, keep = native.codebook_pointers(role, codebook, heads, device)
    with torch.cuda.device_of(out):
        _check(
            library().hqmq_cuda_load_paged(
                _pages(page_table, cache),
                byref(params),
                batch,
                heads,
                num_pages,
                held.data_ptr(),
                *books,
                byref(pointers),
                byref(target),
                _stream(device),
            )
        )
    del keep
    return out


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    sinks: Tensor | None,
    scheme: Scheme,
    codebooks: Sequence[Sequence[Tensor]],
    caches: Sequence[Sequence[Tensor]],
    scale: float,
    window: int = 0,
    softcap: float = 0.0,
    page_table: Tensor | None = None,
) -> Tensor:
    """HqmqAttention in place; arguments as hqmq_trt.native_attention.attend, all on one GPU.

    page_table: as in :func:`append`, of K and V alike. Rows of y that see an entry outside the pool are NaN.

    Raises:
        HqmqError: tensors that do not fit, or a failing CUDA call.
    """
    device, lib = caches[0][-1].device, library()
    call = AttentionCall(
        *(q, k, v, past_length, new_length, sinks, scheme, codebooks, caches, scale, window, softcap),
        device=device,
        page_table=page_table,
    )
    bytes_needed = c_size_t()
    roles = (byref(call.key.role), byref(call.value.role))
    _check(lib.hqmq_cuda_attention_workspace(byref(call.params), *roles, byref(bytes_needed)))
    with torch.cuda.device_of(q):
        workspace = _workspace(bytes_needed.value, device)
        _check(
            lib.hqmq_cuda_attention_paged(
                _pages(page_table, caches[0]),
                *call.arguments(),
                _counters(device).data_ptr(),
                workspace.data_ptr(),
                bytes_needed.value,
                _stream(device),
            )
        )
    return call.y


def _workspace(size: int, device: torch.device) -> Tensor:
    # From torch's allocator: freed on return, it is reused in stream order only.
    return torch.empty(size, dtype=torch.uint8, device=device)
