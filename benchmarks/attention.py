"""One decode step in ONNX Runtime: HqmqAttention over packed codes against attention over an uncompressed cache.

``python benchmarks/attention.py [--json] [--plot speed.png]``: median milliseconds of one step, one layer, batch 1, for
each context. Baselines, over an fp32 cache of the same length: ``Attention`` of ONNX opset 23, and GroupQueryAttention
of com.microsoft with past and present in one buffer. HqmqAttention also appends the new token, in place: "ms" is the
mean over a page of tokens, of which the last ("fill ms") codes the page. Every case of a context is timed in turn,
round after round, so that all see the same machine. "MB read" is what a step must read of its cache; GB/s is that over
the time. The requirement: hq3 and hq4 at 16k are not slower than Attention.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import onnxruntime as ort
import torch
import typer
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from hqmq_trt import codebooks, contract, native, ort_library
from hqmq_trt.format import cache_tensors
from hqmq_trt.scheme import DEFAULT_PAGE_SIZE, ROLES, Scheme

SCHEMES = ("hq3", "hq3.5", "hq4", "hq5", "fp16")
TYPES = {torch.float32: TensorProto.FLOAT, torch.float16: TensorProto.FLOAT16, torch.int32: TensorProto.INT32}
APPEND_AT_ONCE = 1024

Step = Callable[[], None]
Row = dict[str, Any]


def _session(
    op: str,
    domain: str,
    inputs: dict[str, Tensor | None],
    outputs: dict[str, Tensor],
    fixed: dict[str, Tensor],
    attributes: dict[str, Any],
    threads: int,
) -> Step:
    """A step of a one-node model with every input and output bound to a torch tensor; None skips an input."""
    names = [name if tensor is not None else "" for name, tensor in inputs.items()]
    given = {name: tensor for name, tensor in inputs.items() if tensor is not None and name not in fixed}
    node = helper.make_node(op, names, list(outputs), name=op, domain=domain, **attributes)
    graph = helper.make_graph(
        [node],
        op,
        [helper.make_tensor_value_info(name, TYPES[t.dtype], list(t.shape)) for name, t in given.items()],
        [helper.make_tensor_value_info(name, TYPES[t.dtype], list(t.shape)) for name, t in outputs.items()],
        [numpy_helper.from_array(tensor.numpy(), name) for name, tensor in fixed.items()],
    )
    imports = [helper.make_opsetid(name, version) for name, version in (("", 23), (contract.DOMAIN, 1))]
    imports.append(helper.make_opsetid("com.microsoft", 1))
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    # Idle threads of one session must not take the processors from the session being timed.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    ort_library.register(options)
    session = ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for bind, tensors in ((binding.bind_input, given), (binding.bind_output, outputs)):
        for name, t in tensors.items():
            bind(name, "cpu", 0, TYPES[t.dtype], list(t.shape), t.data_ptr())

    def step(keep: object = (given, outputs)) -> None:  # the binding holds addresses only
        session.run_with_iobinding(binding)

    return step


class Layer:
    """Inputs of one layer's decode step at one context."""

    def __init__(self, context: int, heads: int, group: int, head_dim: int, threads: int) -> None:
        g = torch.Generator().manual_seed(0)
        self.context, self.heads, self.group, self.head_dim, self.threads = context, heads, group, head_dim, threads
        self.keys = torch.randn(1, heads, context, head_dim, generator=g)
        self.values = torch.randn(1, heads, context, head_dim, generator=g)
        self.q = torch.randn(1, heads * group, 1, head_dim, generator=g)
        self.y = torch.empty_like(self.q)
        self.scale = head_dim**-0.5

    def attention(self) -> tuple[Step, int]:
        """Opset 23 Attention over fp32 K and V of the context."""
        inputs: dict[str, Tensor | None] = {"q": self.q, "k": self.keys, "v": self.values}
        attributes = {"scale": self.scale}
        step = _session("Attention", "", inputs, {"y": self.y}, {}, attributes, self.threads)
        return step, 2 * self.keys.nbytes

    def group_query_attention(self) -> tuple[Step, int]:
        """com.microsoft GroupQueryAttention, the new token written to the shared past and present buffer."""
        flat = (1, 1, -1)
        inputs: dict[str, Tensor | None] = {
            "q": self.q.reshape(flat),
            "k": self.keys[:, :, -1].reshape(flat),
            "v": self.values[:, :, -1].reshape(flat),
            "past_k": self.keys,
            "past_v": self.values,
            "seqlens_k": torch.tensor([self.context - 1], dtype=torch.int32),
            "total": torch.tensor([self.context], dtype=torch.int32),
        }
        outputs = {"y": torch.empty(1, 1, self.q.numel()), "present_k": self.keys, "present_v": self.values}
        attributes = {"num_heads": self.heads * self.group, "kv_num_heads": self.heads, "scale": self.scale}
        step = _session("GroupQueryAttention", "com.microsoft", inputs, outputs, {}, attributes, self.threads)
        return step, 2 * self.keys.nbytes

    def hqmq(self, name: str, fill: bool) -> tuple[Step, int]:
        """HqmqAttention over the same K and V, coded; the token appended fills a page, or is in the middle of one."""
        scheme = Scheme.parse(name)
        past = self.context - (1 if fill else scheme.page_size // 2)
        pages = -(-self.context // scheme.page_size)
        books: dict[str, Tensor] = {}
        caches: dict[str, Tensor] = {}
        read = 0
        for role_name, x in zip(ROLES, (self.keys, self.values), strict=True):
            role, book = scheme.role(role_name), []
            if role.packed:
                secondaries = codebooks.secondaries(role, 0, 0, self.heads, role_name)
                book = [torch.from_numpy(secondaries), torch.from_numpy(codebooks.levels(role))]
                books |= {f"{role_name}_secondaries": book[0], f"{role_name}_levels": book[1]}
            specs = cache_tensors(role, scheme.page_size, self.head_dim, self.heads, 1, pages)
            cache = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs]
            for start in range(0, past, APPEND_AT_ONCE):
                rows = x[:, :, start : min(start + APPEND_AT_ONCE, past)]
                lengths = [torch.tensor([n], dtype=torch.int32) for n in (start, rows.shape[2])]
                native.append(rows, lengths[0], lengths[1], role, book, cache)
            caches |= {f"{role_name}_{spec.name}": tensor for spec, tensor in zip(specs, cache, strict=True)}
            read += sum(tensor.nbytes for tensor in cache)
        inputs: dict[str, Tensor | None] = {
            "q": self.q,
            "k": self.keys[:, :, -1:].contiguous(),
            "v": self.values[:, :, -1:].contiguous(),
            "past_length": torch.tensor([past], dtype=torch.int32),
            "new_length": torch.tensor([1], dtype=torch.int32),
            **books,
            **caches,
        }
        outputs = {"y": self.y, **{f"present_{key}": tensor for key, tensor in caches.items()}}
        attributes = contract.attention_attributes(scheme, self.head_dim, self.scale)
        step = _session(contract.ATTENTION, contract.DOMAIN, inputs, outputs, books, attributes, self.threads)
        return step, read


def measure(context: int, heads: int, group: int, head_dim: int, threads: int, rounds: int) -> list[Row]:
    """Median times of every case at one context, interleaved."""
    layer = Layer(context, heads, group, head_dim, threads)
    cases = {"Attention fp32": layer.attention(), "GroupQueryAttention fp32": layer.group_query_attention()}
    cases |= {name: layer.hqmq(name, False) for name in SCHEMES}
    cases |= {f"{name} fill": layer.hqmq(name, True) for name in SCHEMES}
    times: dict[str, list[float]] = {name: [] for name in cases}
    for attempt in range(rounds + 1):
        for name, (step, _) in cases.items():
            start = time.perf_counter()
            step()
            if attempt:  # the first warms up
                times[name].append(time.perf_counter() - start)
    median = {name: statistics.median(values) for name, values in times.items()}
    rows = []
    for name, (_, read) in cases.items():
        if name.endswith("fill"):
            continue
        seconds, fill = median[name], median.get(f"{name} fill")
        if fill is not None:
            seconds += (fill - seconds) / DEFAULT_PAGE_SIZE
        rows.append(
            {
                "case": name,
                "context": context,
                "ms": 1e3 * seconds,
                "fill_ms": None if fill is None else 1e3 * fill,
                "bytes": read,
                "gb_per_s": read / seconds / 1e9,
                "over_attention": median["Attention fp32"] / seconds,
                "over_gqa": median["GroupQueryAttention fp32"] / seconds,
            }
        )
    return rows


def plot(rows: list[Row], path: Path) -> None:
    """Milliseconds over context, a line for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    for name in dict.fromkeys(row["case"] for row in rows):
        points = [(row["context"], row["ms"]) for row in rows if row["case"] == name]
        axes.plot(*np.transpose(points), marker="o", linestyle="--" if "fp32" in name else "-", label=name)
    axes.set(xscale="log", yscale="log", xlabel="tokens in the cache", ylabel="one decode step, ms")
    axes.set_xscale("log", base=2)
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=150)


def main(
    contexts: Annotated[str, typer.Option(help="Tokens in the cache, separated by commas.")] = "2048,16384,65536",
    heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    group: Annotated[int, typer.Option(help="Query heads of a KV head.")] = 4,
    head_dim: Annotated[int, typer.Option(help="Elements of a head.")] = 128,
    threads: Annotated[int, typer.Option(help="ONNX Runtime threads.")] = 2,
    rounds: Annotated[int, typer.Option(help="Timed steps of each case; the median counts.")] = 15,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
    plot_path: Annotated[Path | None, typer.Option("--plot", help="Write a PNG here.")] = None,
) -> None:
    """Compare one decode step over packed codes with attention over an fp32 cache."""
    sizes = [int(text) for text in contexts.split(",")]
    rows: list[Row] = []
    for size in track(sizes, "measuring", console=Console(stderr=True), transient=True):
        rows += measure(size, heads, group, head_dim, threads, rounds)
    if plot_path:
        plot(rows, plot_path)
    setting = {
        "kv_heads": heads,
        "group": group,
        "head_dim": head_dim,
        "threads": threads,
        "rounds": rounds,
        "onnxruntime": ort.__version__,
        "isa": native.versions()["isa"],
    }
    if as_json:
        print(json.dumps({**setting, "rows": rows}, indent=1))
        return
    table = Table(
        "context",
        "case",
        "ms",
        "fill ms",
        "MB read",
        "GB/s",
        "x Attention",
        "x GQA",
        title=f"One decode step, {heads} KV heads x {group}, D={head_dim}, {threads} threads, ORT {ort.__version__}",
    )
    for index, row in enumerate(rows):
        table.add_row(
            f"{row['context']}",
            row["case"],
            f"{row['ms']:.2f}",
            "" if row["fill_ms"] is None else f"{row['fill_ms']:.2f}",
            f"{row['bytes'] / 1e6:.1f}",
            f"{row['gb_per_s']:.1f}",
            f"{row['over_attention']:.2f}",
            f"{row['over_gqa']:.2f}",
            end_section=index + 1 < len(rows) and rows[index + 1]["context"] != row["context"],
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
