"""FlashInfer's attention as a baseline for benchmarks/gpu_attention.py: paged K and V in float16 or float8 e4m3.

Optional: ``pip install flashinfer-python``. It compiles its kernels at their first use, with nvcc and ninja; that is
not timed, nor is `plan`, which an engine calls once a step for all layers. It gets its best case: pages that follow
each other in memory, layout HND, a workspace that all launches share, and of the settings in `kernels` the fastest one
at each shape, which the tables name. float8 takes scales of 1. No token is appended.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_cases import CHECKED, Shape, int32
from benchmarks.gpu_timing import Step, copies_for
from benchmarks.machine import log
from hqmq_trt.errors import HqmqError

INSTALL = "pip install flashinfer-python"
DTYPES = {"fp16": torch.float16, "fp8": torch.float8_e4m3fn}
"""Kinds of rows, and how they store K and V; q and y are float16."""
PAGES = (16, 64)
"""Tokens of a page."""
WORKSPACE = 256 << 20
"""Bytes for the splits of a sequence."""
MOST_ERROR = 0.15
"""A kernel whose output is off by more is not timed. XQA rounds q and the weights to float8 too: some 5 %."""
SLOW_PLAN = 2.0
"""Seconds from which on the log says that kernels were compiled."""


@dataclass(frozen=True)
class Setting:
    """One of FlashInfer's kernels over pages of `page_size` tokens.

    kernel: "fa2" or "fa3": BatchDecodeWithPagedKVCacheWrapper on tensor cores with that backend; "cuda_cores": the same
    without tensor cores; "xqa": TensorRT-LLM's kernel, xqa_batch_decode_with_kv_cache.
    """

    kernel: str
    page_size: int

    def __str__(self) -> str:
        return f"{self.kernel}, pages of {self.page_size}"


CASES = ("flashinfer", "flashinfer_xqa")
PARTS = ("fa2", "fa3", "cuda_cores", "xqa", "prefill")
"""What can be left out: kernels of Setting, and prefill."""


def kernels(case: str, kind: str, without: Sequence[str] = ()) -> list[Setting]:
    """Settings to try of one of CASES and a kind of DTYPES; `without`: PARTS to leave out."""
    if case == "flashinfer_xqa":
        found = [Setting("xqa", PAGES[-1])]  # each page size is a library of its own to compile
    else:
        names = ["fa2", "fa3", "cuda_cores"] if kind == "fp16" else ["fa2", "cuda_cores"]  # fa3: no fp16 q over fp8
        found = [Setting(name, page_size) for name in names for page_size in PAGES]
    return [setting for setting in found if setting.kernel not in without]


def missing(device: torch.device) -> str | None:
    """Why FlashInfer cannot be timed on a device; None if it can."""
    try:
        importlib.import_module("flashinfer")
    except ModuleNotFoundError as error:
        return f"not installed ({INSTALL})" if error.name == "flashinfer" else f"does not import: {_line(error)}"
    except Exception as error:  # an import can fail with anything when a shared library is missing
        return f"does not import: {_line(error)}"
    return None if device.type == "cuda" else "needs a GPU"


def _line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:120]


@dataclass
class Found:
    """What :meth:`Decode.fastest` found.

    setting, steps: the fastest setting and its steps, None and [] if none ran. error: relative, of a step's output.
    tried: microseconds of each setting, or why it failed.
    """

    setting: Setting | None = None
    steps: list[Step] = field(default_factory=list)
    error: float = 0.0
    tried: dict[str, float | str] = field(default_factory=dict)


class Decode:
    """FlashInfer's decode of a shape over copies of K and V that lie in different memory.

    The layers of a model: one plan, one page table and one workspace for all copies. Raises torch.OutOfMemoryError.

    Args:
        shape: with one token a sequence.
        device: a GPU.
        dtype: of K and V, float16 or float8_e4m3fn.
    """

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype) -> None:
        self.shape, self.device, self.dtype = shape, device, dtype
        self.held = -(-shape.context // PAGES[-1]) * PAGES[-1]  # tokens with room for, a multiple of both page sizes
        elements = shape.batch * self.held * 2 * shape.heads * shape.head_dim
        copies = copies_for(elements * dtype.itemsize, device)
        g = torch.Generator(device=device).manual_seed(3)
        self.memory = torch.empty(copies, elements, dtype=dtype, device=device)
        for copy in self.memory:  # float8 has no normal_
            copy.copy_(torch.empty(elements, dtype=torch.float16, device=device).normal_(generator=g))
        size = (copies, shape.batch, shape.query_heads, shape.head_dim)
        self.q = torch.randn(size, generator=g, device=device).half()
        self.workspace = torch.zeros(WORKSPACE, dtype=torch.uint8, device=device)
        self._expected: dict[int, Tensor] = {}

    def cache(self, copy: int, page_size: int) -> Tensor:
        """[pages, 2, H, page_size, D]: K and V of a copy."""
        return self.memory[copy].view(-1, 2, self.shape.heads, page_size, self.shape.head_dim)

    def page_table(self, page_size: int) -> Tensor:
        """int32 [B, pages of a sequence]."""
        room, used = self.held // page_size, -(-self.shape.context // page_size)
        first = room * torch.arange(self.shape.batch, device=self.device)[:, None]
        return (first + torch.arange(used, device=self.device)).to(torch.int32)

    def bytes_read(self, page_size: int) -> int:
        """Bytes a step must move: K and V, the page table, q, y."""
        shape = self.shape
        tokens = shape.batch * shape.context * shape.heads
        table = 4 * shape.batch * -(-shape.context // page_size)
        return 2 * tokens * shape.head_dim * self.dtype.itemsize + table + shape.rows_bytes

    def steps(self, setting: Setting) -> list[Step]:
        """A step for each copy; each returns y, float16 [B, Hq, D]. Plans, and compiles what is not there yet."""
        if setting.kernel == "xqa":
            return self._xqa(setting.page_size)
        run = self._plan(setting)
        return [partial(run, q, self.cache(copy, setting.page_size)) for copy, q in enumerate(self.q)]

    def _plan(self, setting: Setting) -> Callable[[Tensor, Tensor], Tensor]:
        flashinfer: Any = importlib.import_module("flashinfer")
        shape, page, on_tensor_cores = self.shape, setting.page_size, setting.kernel != "cuda_cores"
        table = self.page_table(page)
        used = table.shape[1]
        starts = int32(range(0, shape.batch * used + 1, used), self.device)
        last = int32([shape.context - (used - 1) * page] * shape.batch, self.device)
        indices = table.flatten()
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
            self.workspace,
            "HND",
            use_cuda_graph=True,
            use_tensor_cores=on_tensor_cores,
            paged_kv_indptr_buffer=torch.empty_like(starts),
            paged_kv_indices_buffer=torch.empty_like(indices),
            paged_kv_last_page_len_buffer=torch.empty_like(last),
            **({"backend": setting.kernel} if on_tensor_cores else {}),
        )
        wrapper.plan(
            starts,
            indices,
            last,
            shape.query_heads,
            shape.heads,
            shape.head_dim,
            page,
            q_data_type=torch.float16,
            kv_data_type=self.dtype,
            sm_scale=shape.scale,
        )
        run: Callable[[Tensor, Tensor], Tensor] = wrapper.run
        return run

    def _xqa(self, page: int) -> list[Step]:
        decode: Any = importlib.import_module("flashinfer.decode")
        if not hasattr(decode, "xqa_batch_decode_with_kv_cache"):
            raise HqmqError("this FlashInfer has no XQA")
        table = self.page_table(page)
        lengths = int32([self.shape.context] * self.shape.batch, self.device).view(torch.uint32)
        self.workspace.zero_()  # its first bytes are counters, which each launch leaves at 0

        def step(q: Tensor, cache: Tensor) -> Tensor:
            y: Tensor = decode.xqa_batch_decode_with_kv_cache(
                q,
                cache,
                self.workspace,
                table,
                lengths,
                table.shape[1] * page,
                bmm1_scale=self.shape.scale,
                bmm2_scale=1.0,
                kv_layout="HND",
            )
            return y

        return [partial(step, q, self.cache(copy, page)) for copy, q in enumerate(self.q)]

    def expected(self, page_size: int) -> Tensor:
        """float32 attention over the same bytes, [CHECKED, Hq, D] of the first copy, or less where B is less."""
        if page_size not in self._expected:
            count = min(CHECKED, self.shape.batch)
            pages = self.cache(0, page_size).unflatten(0, (self.shape.batch, -1))[:count]
            # [count, pages, 2, H, page_size, D] to [2, count, H, tokens, D]
            k, v = pages.permute(2, 0, 3, 1, 4, 5).float().flatten(3, 4)[:, :, :, : self.shape.context]
            self._expected[page_size] = _attention(self.q[0, :count], k, v, self.shape.scale)
        return self._expected[page_size]

    def error(self, steps: Sequence[Step], page_size: int) -> float:
        """Relative error of the first step's output."""
        expected, y = self.expected(page_size), steps[0]()
        assert isinstance(y, Tensor)
        return _relative(y[: len(expected)], expected)

    def fastest(self, settings: Sequence[Setting], microseconds: Callable[[list[Step]], float]) -> Found:
        """Try settings; one that fails or computes something else is passed over and kept in `tried`.

        Args:
            settings: to try.
            microseconds: times a launch of steps.
        """
        found, least = Found(), float("inf")
        for setting in settings:
            try:
                begin = time.monotonic()
                steps = self.steps(setting)
                error = self.error(steps, setting.page_size)
                if time.monotonic() - begin > SLOW_PLAN:
                    log(f"FlashInfer {setting}: {time.monotonic() - begin:.0f} s until its first launch had run")
                if not error < MOST_ERROR:
                    raise HqmqError(f"its output is off by {error:.2g}")
                us = microseconds(steps)
            except Exception as why:  # FlashInfer raises what its compilers, bindings and checks raise
                found.tried[str(setting)] = f"{type(why).__name__}: {_line(why)}"
                continue
            found.tried[str(setting)] = us
            if us < least:
                least, found.setting, found.steps, found.error = us, setting, steps, error
        return found


def _attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """float32 [B, Hq, D] of q [B, Hq, D] over all of k and v, float32 [B, H, T, D]."""
    rows = q.float().unflatten(1, (k.shape[1], -1))
    return ((rows @ k.transpose(-1, -2) * scale).softmax(-1) @ v).flatten(1, 2)


def _relative(y: Tensor, expected: Tensor) -> float:
    return float((y.float() - expected).norm() / expected.norm())


def prefill_step(shape: Shape, device: torch.device) -> Step:
    """float16 causal attention of one sequence's last `tokens` queries over `context` keys that include them.

    Raises HqmqError if the first or the last query's output differs from float32 attention.
    """
    flashinfer: Any = importlib.import_module("flashinfer")
    if shape.batch != 1:
        raise HqmqError("FlashInfer's prefill is timed with one sequence")
    g = torch.Generator(device=device).manual_seed(3)
    sizes = (shape.tokens, shape.query_heads), (shape.heads, shape.context), (shape.heads, shape.context)
    q, k, v = (
        torch.empty(*size, shape.head_dim, dtype=torch.float16, device=device).normal_(generator=g) for size in sizes
    )

    def step() -> Tensor:
        y: Tensor = flashinfer.single_prefill_with_kv_cache(q, k, v, causal=True, kv_layout="HND", sm_scale=shape.scale)
        return y

    y = step()
    for row in (0, shape.tokens - 1):
        seen = shape.context - shape.tokens + 1 + row
        keys, values = (x[None, :, :seen].float() for x in (k, v))
        error = _relative(y[row], _attention(q[row][None], keys, values, shape.scale)[0])
        if not error < MOST_ERROR:
            raise HqmqError(f"the output of query {row} is off by {error:.2g}")
    return step
