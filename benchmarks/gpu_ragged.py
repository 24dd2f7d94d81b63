"""Decode steps over batches whose sequences differ in length, in one run on one GPU.

``python -m benchmarks.gpu_ragged``: microseconds of one layer (8 KV heads, head_dim 128, group 4), by how the fused
decode kernel cuts the call: by count (each sequence into as many parts), as it chooses from the lengths, and
batch-invariant; "even": as it chooses, for as many tokens in sequences of one length. Beside them PyTorch's fp16
attention, sequence by sequence in its fastest backend, and FlashInfer's over fp16 pages of 16 tokens if it is
installed, whose plan, made on the host from the lengths, is not counted. Also checks y against float32 attention.
Needs torch and libhqmq_cuda.so.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Annotated

import torch
import torch.nn.functional as F
import typer
from rich.console import Console
from torch import Tensor

from benchmarks import gpu_flashinfer
from benchmarks.gpu_cases import Ours, Shape, chosen, int32
from benchmarks.gpu_paths import NEVER, WHERE_FASTER, batch_invariant, cut_by_work
from benchmarks.gpu_timing import Step, free, graph_time
from benchmarks.report_tables import Sheet
from hqmq_trt import cuda, torch_attention

PAGE = 16
"""Of FlashInfer."""


def _drawn(low: float, high: float, count: int, powers: bool) -> list[int]:
    rng = random.Random(count)
    draws = [rng.uniform(low, high) for _ in range(count)]
    return [int(2**x if powers else x) for x in draws]


BATCHES = {
    "1 x 128k, 15 x 1k": [131072, *[1024] * 15],
    "1 x 32k, 7 x 1k": [32768, *[1024] * 7],
    "16, 1k to 32k": _drawn(1024, 32768, 16, False),
    "64, 256 to 16k by powers": _drawn(8, 14, 64, True),
    "16 x 32k": [32768] * 16,
}
"""Tokens of each sequence before the step."""


def past_of(case: Ours, lengths: Sequence[int]) -> list[int]:
    """Tokens held before a step whose own page is half full, nearly `lengths`."""
    page = case.scheme.page_size
    return [length // page * page + page // 2 - 1 for length in lengths]


def step_of(case: Ours, lengths: Sequence[int]) -> Step:
    """A decode step."""
    arguments = case.arguments(0, int32(past_of(case, lengths), case.device))
    return lambda: cuda.attend(*arguments)


def error(case: Ours, lengths: Sequence[int]) -> float:
    """Relative error of y against float32 attention over the same bytes, of the shortest and the longest sequence."""
    step = step_of(case, lengths)
    y, found = step(), []
    assert isinstance(y, Tensor)
    for b in (lengths.index(min(lengths)), lengths.index(max(lengths))):
        one = slice(b, b + 1)
        caches = [[tensor[one].clone() for tensor in role] for role in case.caches]
        q, k, v = (x[one].float() for x in (case.q, case.k, case.v))
        rest = (int32(past_of(case, lengths)[one], case.device), case.new[one], None, case.scheme, case.books, caches)
        expected = torch_attention.attend(q, k, v, *rest, case.shape.scale, 0, 0.0)
        found.append(float((y[one].float() - expected).norm() / expected.norm()))
    return max(found)


def sdpa_time(shape: Shape, lengths: Sequence[int], device: torch.device) -> tuple[float, str]:
    """Microseconds of fp16 attention of all sequences, one call each, and the backend that was fastest."""
    from torch.nn.attention import SDPBackend

    g = torch.Generator(device=device).manual_seed(3)

    def rows(heads: int, tokens: int) -> Tensor:
        return torch.empty(1, heads, tokens, shape.head_dim, dtype=torch.float16, device=device).normal_(generator=g)

    inputs = [(rows(shape.query_heads, 1), rows(shape.heads, n), rows(shape.heads, n)) for n in lengths]
    found = []
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):
        for packed in (False, True):

            def step(backend: SDPBackend = backend, packed: bool = packed) -> list[Tensor]:
                with chosen(backend):
                    return [
                        F.scaled_dot_product_attention(
                            q.reshape(1, shape.heads, -1, shape.head_dim) if packed else q, k, v, enable_gqa=not packed
                        )
                        for q, k, v in inputs
                    ]

            found.append((graph_time([step], device).us, name + ("_packed" if packed else "")))
    return min(found)


def flashinfer_time(shape: Shape, lengths: Sequence[int], device: torch.device) -> float:
    """Microseconds of FlashInfer's decode over pages of all sequences."""
    import flashinfer  # type: ignore[import-not-found]

    pages = [-(-n // PAGE) for n in lengths]
    ends = [0]
    for count in pages:
        ends.append(ends[-1] + count)
    g = torch.Generator(device=device).manual_seed(3)
    size = (ends[-1], 2, shape.heads, PAGE, shape.head_dim)
    cache = torch.empty(size, dtype=torch.float16, device=device).normal_(generator=g)
    q = torch.randn(len(lengths), shape.query_heads, shape.head_dim, generator=g, device=device).half()
    workspace = torch.zeros(gpu_flashinfer.WORKSPACE, dtype=torch.uint8, device=device)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
    wrapper.plan(
        int32(ends, device),
        int32(range(ends[-1]), device),
        int32([n - PAGE * (count - 1) for n, count in zip(lengths, pages, strict=True)], device),
        shape.query_heads,
        shape.heads,
        shape.head_dim,
        PAGE,
        q_data_type=torch.float16,
        kv_data_type=torch.float16,
    )
    return graph_time([lambda: wrapper.run(q, cache)], device).us


def measure(lengths: Sequence[int], name: str, device: torch.device, heads: int = 8) -> list[str]:
    """Cells of a row."""
    shape = Shape(len(lengths), max(lengths), heads=heads)
    case = Ours(shape, name, device)
    even = [sum(lengths) // len(lengths)] * len(lengths)
    times = []
    with cut_by_work(NEVER):
        times.append(graph_time([step_of(case, lengths)], device).us)
    with cut_by_work(WHERE_FASTER):
        times.append(graph_time([step_of(case, lengths)], device).us)
        with batch_invariant():
            times.append(graph_time([step_of(case, lengths)], device).us)
        times.append(graph_time([step_of(case, even)], device).us)
        wrong = error(case, lengths)
    del case
    free(device)
    return [*[f"{time:.1f}" for time in times], f"{wrong:.1e}"]


def rivals(lengths: Sequence[int], device: torch.device) -> list[str]:
    """Cells of fp16 attention."""
    shape = Shape(len(lengths), max(lengths))
    time, backend = sdpa_time(shape, lengths, device)
    free(device)
    if why := gpu_flashinfer.missing(device):
        return [f"{time:.1f} ({backend})", why]
    try:
        other = f"{flashinfer_time(shape, lengths, device):.1f}"
    except RuntimeError as failed:
        other = str(failed).splitlines()[0][:60]
    free(device)
    return [f"{time:.1f} ({backend})", other]


def main(
    schemes: Annotated[str, typer.Option(help="Schemes, separated by spaces.")] = "hq3 hq4",
) -> None:
    """Print the table."""
    device = torch.device("cuda")
    rows = []
    for kind, lengths in BATCHES.items():
        others = rivals(lengths, device)
        rows += [[kind, name, *measure(lengths, name, device), *others] for name in schemes.split()]
    columns = ["tokens", "scheme", "by count, us", "chosen, us", "invariant, us", "even, us", "error", "SDPA, us"]
    Console(width=180).print(
        Sheet(f"Ragged batches, {torch.cuda.get_device_name(device)}", [*columns, "FlashInfer, us"], rows).markdown(),
        markup=False,
    )


if __name__ == "__main__":
    typer.run(main)
