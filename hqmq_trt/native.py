"""The native host library (plugins/host): finding, checking and calling it from Python.

The library is ``libhqmq_host.so`` in the folder named by the environment variable HQMQ_LIBRARY_DIR, or else in
``hqmq_trt/_lib``. Arrays are CPU torch tensors or numpy arrays; every mistake is an HqmqError.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char_p, c_int, c_int32, c_int64, c_size_t, c_void_p
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from hqmq_trt.errors import HqmqError
from hqmq_trt.format import FORMAT_VERSION, cache_tensors, paged_cache_tensors, words_per_token
from hqmq_trt.library_files import LIBRARY_DIR_VARIABLE, REBUILD, library_dir, library_path  # noqa: F401
from hqmq_trt.page_table import check_table
from hqmq_trt.scheme import RoleScheme

HOST_LIBRARY = "libhqmq_host.so"

Array = Tensor | NDArray[np.generic]


class RoleParams(Structure):
    """hqmq_role_params of plugins/host/hqmq_host.h."""

    _fields_ = [
        (name, c_int32)
        for name in (
            "storage",
            "gain",
            "head_dim",
            "page_size",
            "secondaries",
            "radius_bits",
            "hadamard",
            "page_mean",
            "outlier_capacity",
            "sink_tokens",
        )
    ]


class RoleCache(Structure):
    """hqmq_role_cache: pointers to the tensors of one layer and role; None where the scheme has none."""

    _fields_ = [(name, c_void_p) for name in ("codes", "scales", "mean", "outlier_mask", "outlier_value", "tail")]


class Rows(Structure):
    """hqmq_rows: activations [B, H, T, D] with strides in elements."""

    _fields_ = [
        ("data", c_void_p),
        ("dtype", c_int32),
        ("batch_stride", c_int64),
        ("head_stride", c_int64),
        ("token_stride", c_int64),
        ("name", c_char_p),
    ]


class Layout(Structure):
    """hqmq_layout: the bit layout of one token as C++ computes it."""

    _fields_ = [
        ("index_bits", c_int32),
        ("code_bits", c_int32),
        ("words", c_int32),
        ("mask_words", c_int32),
        ("num_planes", c_int32),
        ("plane_width", c_int32 * 5),
        ("plane_shift", c_int32 * 5),
        ("plane_offset", c_int32 * 5),
    ]


DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""enum hqmq_dtype."""

_SIGNATURES: dict[str, tuple[object, list[object]]] = {
    "hqmq_version": (c_char_p, []),
    "hqmq_isa": (c_char_p, []),
    "hqmq_last_error": (c_char_p, []),
    "hqmq_set_num_threads": (c_int, [c_int32]),
    "hqmq_num_threads": (c_int32, []),
    "hqmq_get_layout": (c_int, [POINTER(RoleParams), POINTER(Layout)]),
    "hqmq_pack": (c_int, [POINTER(RoleParams), c_int64, c_void_p, c_void_p]),
    "hqmq_unpack": (c_int, [POINTER(RoleParams), c_int64, c_void_p, c_void_p]),
    "hqmq_search": (c_int, [c_void_p, c_int64, c_void_p, c_int32, c_void_p, c_void_p, c_void_p]),
    "hqmq_append": (
        c_int,
        [
            POINTER(RoleParams),
            *[c_int32] * 4,
            POINTER(Rows),
            *[c_void_p] * 4,
            POINTER(RoleCache),
            POINTER(c_int64),
            c_void_p,
            c_void_p,
        ],
    ),
}


def load_library(
    path: Path,
    expected_format: int = FORMAT_VERSION,
    prefix: str = "hqmq",
    signatures: dict[str, tuple[object, list[object]]] | None = None,
) -> ctypes.CDLL:
    """Load a library with the C interface of hqmq_host.h and check that it fits this package.

    `prefix`: of the functions that tell its format version and struct sizes; `signatures`: of its other functions.

    Raises:
        HqmqError: not a library of ours, or one built for another format version.
    """
    try:
        lib = ctypes.CDLL(str(path))
        format_version = getattr(lib, f"{prefix}_format_version")
        format_version.restype, format_version.argtypes = c_int32, []
        found = format_version()
    except (OSError, AttributeError) as error:
        raise HqmqError(f"cannot load native library {path} ({error}); {REBUILD}") from None
    if found != expected_format:
        raise HqmqError(
            f"native library {path} is built for format version {found}, this package needs {expected_format}; "
            f"{REBUILD}"
        )
    for name, structure in (("role_params", RoleParams), ("role_cache", RoleCache)):
        size = getattr(lib, f"{prefix}_{name}_size")
        size.restype, size.argtypes = c_size_t, []
        if size() != ctypes.sizeof(structure):
            raise HqmqError(f"native library {path} has another hqmq_{name} than this package; {REBUILD}")
    declare(lib, _SIGNATURES if signatures is None else signatures)
    return lib


def declare(lib: ctypes.CDLL, signatures: dict[str, tuple[object, list[object]]]) -> None:
    """Give functions of a library their result and argument types."""
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name)
        function.restype, function.argtypes = result, arguments


@lru_cache(maxsize=1)
def library() -> ctypes.CDLL:
    """The host library, loaded once.

    Raises:
        HqmqError: missing, foreign, or built for another format version.
    """
    return load_library(library_path(HOST_LIBRARY))


def check(code: int) -> None:
    """Raise HqmqError with the library's own text for a result other than HQMQ_OK."""
    if code:
        raise HqmqError(library().hqmq_last_error().decode())


def versions() -> dict[str, str]:
    """Version and instruction set of the loaded library."""
    lib = library()
    return {"version": lib.hqmq_version().decode(), "isa": lib.hqmq_isa().decode()}


def set_num_threads(count: int) -> None:
    """Threads the library uses; 0: HQMQ_NUM_THREADS, or the processors this process may use."""
    check(library().hqmq_set_num_threads(count))


def num_threads() -> int:
    """Threads the library uses."""
    return int(library().hqmq_num_threads())


@lru_cache(maxsize=256)
def role_params(role: RoleScheme, head_dim: int, page_size: int) -> RoleParams:
    """The C++ description of a role's codec."""
    packed = role.packed
    return RoleParams(
        int(role.storage),
        int(role.gain),
        head_dim,
        page_size,
        role.secondaries,
        role.radius_bits,
        int(role.hadamard and packed),
        int(role.page_mean and packed),
        role.outlier_capacity(head_dim, page_size) if packed else 0,
        role.sink_tokens,
    )


CPU = torch.device("cpu")


def tensor(array: Array, dtype: torch.dtype, shape: Sequence[int], name: str, device: torch.device = CPU) -> Tensor:
    """`array` as a contiguous tensor on `device`, without a copy.

    Raises:
        HqmqError: another dtype, shape, device, or not contiguous.
    """
    t = torch.from_numpy(array) if isinstance(array, np.ndarray) else array
    if t.dtype != dtype or tuple(t.shape) != tuple(shape):
        raise HqmqError(f"{name} is {t.dtype} {list(t.shape)}, expected {dtype} {list(shape)}")
    if t.device != device or not t.is_contiguous():
        raise HqmqError(f"{name} is not a contiguous tensor on {device}; call .contiguous().to('{device}') first")
    return t


def rows(x: Tensor, name: str, device: torch.device = CPU) -> tuple[Rows, Tensor]:
    """Describe activations [B, H, T, D]; also returns the tensor to keep alive (a copy if D is strided)."""
    if x.dtype not in DTYPES or x.dim() != 4 or x.device != device:
        raise HqmqError(
            f"{name} is {x.dtype} {list(x.shape)} on {x.device}, expected float32, float16 or bfloat16 [B, H, T, D] "
            f"on {device}"
        )
    if x.stride(3) != 1 and x.shape[3] > 1:
        x = x.contiguous()
    return Rows(x.data_ptr(), DTYPES[x.dtype], x.stride(0), x.stride(1), x.stride(2), name.encode()), x


def role_cache(
    role: RoleScheme, cache: Sequence[Tensor], device: torch.device = CPU, page_table: Tensor | None = None
) -> tuple[RoleCache, RoleParams, int]:
    """Pointers, parameters and pages of a sequence of a cache in the order of hqmq_trt.format.cache_tensors.

    page_table: int32 [B, M]; the cache then has the tensors of hqmq_trt.format.paged_cache_tensors.

    Raises:
        HqmqError: tensors that do not fit the scheme.
    """
    codes, tail = cache[0], cache[-1]
    if codes.dim() != 4 or tail.dim() != 4:
        raise HqmqError(f"cache codes {list(codes.shape)} and tail {list(tail.shape)} must have four dimensions")
    batch, heads, tail_rows, head_dim = tail.shape
    page_size = tail_rows - role.sink_tokens
    if page_size < 1:
        raise HqmqError(
            f"cache tail {list(tail.shape)} holds no page beside the {role.sink_tokens} sink tokens of scheme "
            f"'{role.name}'"
        )
    if role.packed:
        role.check_head_dim(head_dim)
    if page_table is None:
        num_pages = codes.shape[2] // page_size
        specs = cache_tensors(role, page_size, head_dim, heads, batch, num_pages)
    else:
        check_table(page_table, batch, device)
        num_pages = page_table.shape[1]
        specs = paged_cache_tensors(role, page_size, head_dim, heads, batch, len(codes))
    if len(specs) != len(cache):
        names = ", ".join(spec.name for spec in specs)
        raise HqmqError(f"a cache of scheme '{role.name}' takes {names}, not {len(cache)} tensors")
    pointers = RoleCache()
    for spec, array in zip(specs, cache, strict=True):
        checked = tensor(array, getattr(torch, spec.dtype), spec.shape, f"cache tensor {spec.name}", device)
        setattr(pointers, spec.name, checked.data_ptr())
    return pointers, role_params(role, head_dim, page_size), num_pages


def codebook_pointers(
    role: RoleScheme, codebook: Sequence[Array], heads: int, device: torch.device = CPU
) -> tuple[list[int | None], list[Tensor]]:
    """Pointers to [secondaries, levels] (None, None for fp16) and the tensors to keep alive."""
    if not role.packed:
        return [None, None], []
    if len(codebook) != 2:
        raise HqmqError(f"scheme '{role.name}' needs a codebook of secondaries and levels, got {len(codebook)} arrays")
    secondaries = tensor(codebook[0], torch.float32, (heads, role.secondaries, 4), "codebook secondaries", device)
    levels = tensor(codebook[1], torch.float32, (2**role.radius_bits,), "codebook levels", device)
    return [secondaries.data_ptr(), levels.data_ptr()], [secondaries, levels]


def append(
    x: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    role: RoleScheme,
    codebook: Sequence[Array],
    cache: Sequence[Tensor],
    name: str = "x",
) -> int:
    """HqmqQuantize in place: append the first new_length[b] tokens of x to a cache; outliers that found no slot.

    Args:
        x: float32, float16 or bfloat16 [B, H, T, D], any strides.
        past_length, new_length: int32 [B], tokens the cache holds and tokens to append.
        codebook: secondaries float32 [H, S, 4] and levels float32 [2^r]; empty for fp16.
        cache: tensors in the order of hqmq_trt.format.cache_tensors, contiguous; written in place.
        name: what error messages call x.

    Raises:
        HqmqError: NaN or infinity in x (also once rounded to fp16), a cache with too few pages, or tensors that do
            not fit. The cache is then as it was.
    """
    arguments, keep = append_arguments(x, past_length, new_length, role, codebook, cache, name, CPU)
    dropped = c_int64(0)
    check(library().hqmq_append(*arguments, byref(dropped), None, None))
    del keep
    return dropped.value


def append_arguments(
    x: Tensor,
    past_length: Tensor,
    new_length: Tensor,
    role: RoleScheme,
    codebook: Sequence[Array],
    cache: Sequence[Tensor],
    name: str,
    device: torch.device,
    page_table: Tensor | None = None,
) -> tuple[list[Any], list[object]]:
    """Checked arguments of hqmq_append, from role to cache, and what to keep alive during the call."""
    batch, heads, tail_rows, head_dim = cache[-1].shape
    pointers, params, num_pages = role_cache(role, cache, device, page_table)
    source, x = rows(x, name, device)
    if (x.shape[0], x.shape[1], x.shape[3]) != (batch, heads, head_dim):
        raise HqmqError(
            f"{name} {list(x.shape)} does not fit a cache of [{batch}, {heads}, {tail_rows}, {head_dim}] tails"
        )
    past = tensor(past_length, torch.int32, (batch,), "past_length", device)
    new = tensor(new_length, torch.int32, (batch,), "new_length", device)
    books, keep = codebook_pointers(role, codebook, heads, device)
    sizes = [batch, heads, x.shape[2], num_pages]
    lengths = [past.data_ptr(), new.data_ptr()]
    return [byref(params), *sizes, byref(source), *lengths, *books, byref(pointers)], [x, *keep]


def search(chunks: Array, secondaries: Array) -> tuple[NDArray[np.int32], NDArray[np.bool_], NDArray[np.float32]]:
    """Codeword nearest in angle to chunks float32 [N, 4] among those of secondaries float32 [S, 4].

    Returns (word [N] in 12*S, negative [N], projection [N]).
    """
    table = tensor(secondaries, torch.float32, (len(secondaries), 4), "secondaries")
    source = tensor(chunks, torch.float32, (len(chunks), 4), "chunks")
    count = len(source)
    word, projection = np.empty(count, np.int32), np.empty(count, np.float32)
    negative = np.empty(count, np.bool_)
    outputs = (word.ctypes.data, negative.ctypes.data, projection.ctypes.data)
    check(library().hqmq_search(source.data_ptr(), count, table.data_ptr(), len(table), *outputs))
    return word, negative, projection


def layout(role: RoleScheme, head_dim: int, page_size: int) -> Layout:
    """The bit layout as C++ computes it (hqmq_trt.format owns it)."""
    out = Layout()
    check(library().hqmq_get_layout(byref(role_params(role, head_dim, page_size)), byref(out)))
    return out


def pack(codes: NDArray[np.uint32], role: RoleScheme) -> NDArray[np.int32]:
    """Codes uint32 [T, D/4] to words int32 [T, W]."""
    source = np.ascontiguousarray(codes, np.uint32)
    words = np.empty((len(source), words_per_token(role, 4 * source.shape[1])), np.int32)
    params = role_params(role, 4 * source.shape[1], 8)
    check(library().hqmq_pack(byref(params), len(source), source.ctypes.data, words.ctypes.data))
    return words


def unpack(words: NDArray[np.int32], role: RoleScheme, head_dim: int) -> NDArray[np.uint32]:
    """Words int32 [T, W] to codes uint32 [T, D/4]."""
    source = np.ascontiguousarray(words, np.int32)
    if source.shape[1:] != (words_per_token(role, head_dim),):
        raise HqmqError(f"words {list(source.shape)} do not fit scheme '{role.name}' with head_dim {head_dim}")
    codes = np.empty((len(source), head_dim // 4), np.uint32)
    params = role_params(role, head_dim, 8)
    check(library().hqmq_unpack(byref(params), len(source), source.ctypes.data, codes.ctypes.data))
    return codes
