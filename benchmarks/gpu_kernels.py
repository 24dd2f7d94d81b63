"""Which kernels the GPU really runs, by torch's profiler (CUPTI): also those of TensorRT and of replayed CUDA graphs.

`hqmq_cuda_attention_path` says which kernel attention would take; this says which one ran, inside an engine too.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from benchmarks.gpu_paths import DECODE, attention_path
from hqmq_trt.manifest import Manifest

FUSED, PLAIN = "DecodeKernel", "AttendKernel"
"""Names of the fused decode kernel and of the plain attention kernel."""
OURS = re.compile(r"\bhqmq::")
ATTENTION = re.compile(
    r"DecodeKernel|AttendKernel|CombineKernel|PrefillKernel|sdpa|fmha|flash|attention", re.IGNORECASE
)
"""What attends, ours or cuDNN's."""


@dataclass(frozen=True)
class Seen:
    """Launches of a kernel and the microseconds they took together."""

    launches: int
    us: float


def short_name(name: str) -> str:
    """A kernel's name without return type, namespaces, template and call arguments."""
    text, plain = name.replace("(anonymous namespace)", ""), []
    depth = 0
    for char in text:
        depth += char in "<("
        if not depth:
            plain.append(char)
        depth -= char in ">)"
    return "".join(plain).split()[-1].rpartition("::")[2] if "".join(plain).split() else name


def kernels(run: Callable[[], Any]) -> dict[str, Seen]:
    """Kernels that `run` launches, by full name; it must have waited for the GPU when it returns.

    Raises:
        RuntimeError: the profiler saw nothing, as where CUPTI cannot be used.
    """
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        run()
        torch.cuda.synchronize()
    found: dict[str, Seen] = {}
    for event in seen.events():
        if event.device_type == DeviceType.CUDA and not event.name.startswith(("Memcpy", "Memset", "gpu_")):
            old = found.get(event.name, Seen(0, 0.0))
            found[event.name] = Seen(old.launches + 1, old.us + event.time_range.elapsed_us())
    if not found:
        raise RuntimeError("torch's profiler saw no kernel")
    return found


def by_short_name(found: dict[str, Seen], which: re.Pattern[str] = OURS) -> dict[str, Seen]:
    """Those whose full name matches `which`, added up by short name."""
    sums: dict[str, Seen] = {}
    for name, seen in found.items():
        if which.search(name):
            old = sums.get(short_name(name), Seen(0, 0.0))
            sums[short_name(name)] = Seen(old.launches + seen.launches, old.us + seen.us)
    return sums


def launches(run: Callable[[], Any]) -> dict[str, Any]:
    """Launches of our kernels by short name; ``{"unseen": reason}`` where they cannot be seen."""
    try:
        return {name: seen.launches for name, seen in by_short_name(kernels(run)).items()}
    except Exception as error:
        return {"unseen": " ".join(f"{type(error).__name__}: {error}".split())[:300]}


def expected_path(manifest: Manifest, batch: int, tokens: int, num_pages: int) -> tuple[int, str]:
    """gpu_paths.attention_path of the nodes of a model's first layer."""
    layer, dtype = manifest.layers[0], getattr(torch, manifest.dtype)
    q, k = (
        torch.empty(batch, heads, tokens, layer.head_dim, dtype=dtype, device="meta")
        for heads in (layer.num_heads, layer.num_kv_heads)
    )
    return attention_path(q, k, num_pages, manifest.parsed_scheme, layer.window, layer.softcap)


def decode_kernels(run: Callable[[], Any], manifest: Manifest, batch: int, num_pages: int) -> dict[str, Any]:
    """Our kernels of one decode step of an engine, beside what attention_path says of it.

    Returns:
        ``launches`` by short name, ``layers``, ``path`` and ``why`` as of attention_path, and ``as_said``: every layer
        ran the kernel it names (None in qdq mode, whose attention is TensorRT's). Or ``unseen``, a reason.
    """
    found = launches(run)
    if "unseen" in found:
        return found
    layers = len(manifest.layers)
    result: dict[str, Any] = {"launches": found, "layers": layers, "as_said": None}
    if manifest.mode == "fused":
        path, why = expected_path(manifest, batch, 1, num_pages)
        wanted, other = (FUSED, PLAIN) if path == DECODE else (PLAIN, FUSED)
        right = found.get(wanted, 0) == layers and not found.get(other, 0)
        result |= {"path": path, "why": why, "as_said": right}
    return result
