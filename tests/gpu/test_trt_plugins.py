"""The TensorRT plugins, one operator at a time: bytes against the host library, attention against the oracle."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_kernels import FUSED, PLAIN, by_short_name, kernels
from benchmarks.gpu_paths import DECODE, attention_path
from hqmq_trt import native, native_attention, oracle
from hqmq_trt.scheme import ROLES
from tests.attention_cases import Attention, bits, relative_error
from tests.codec_cases import activations, codebook, lengths
from tests.gpu.requirements import missing
from tests.gpu.trt_networks import Engine, Node, Run, Sizes

Record = Callable[[str, object], None]
_MISSING = missing("tensorrt")
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(bool(_MISSING), reason=_MISSING)]

ATTENTION = (
    Node("hq3", 128, 2, 4),
    Node("hq3.5", 64, 2, 2),
    Node("hq4", 128, 1, 8),
    Node("hq5", 64, 2, 3),
    Node("fp16", 128, 2, 4),
    Node("paper:s96_r4+med3", 80, 2, 2),
    Node("k=hq4,v=hq3@p32", 64, 1, 1),
    Node("hq4", 64, 2, 3, window=50),
    Node("hq4", 64, 2, 4, softcap=5.0, sinks=True),
    Node("hq3", 64, 1, 2, window=700, sinks=True),
)
ATTENTION_LIMITS = Sizes(batch=6, tokens=128, capacity=1664)
_PAST = (0, 62, 63, 64, 199, 1500)
RUNS: dict[str, tuple[tuple[int, ...], tuple[int, ...], int]] = {
    "decode": (_PAST, (1,) * 6, 1664),
    "prefill": (_PAST, (100, 5, 0, 64, 1, 128), 1664),
    "random": ((391, 0, 1023), (17, 65, 40), 1152),
    "single": ((63,), (65,), 128),
}
"""Tokens held, tokens added, capacity."""
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)

CODECS = [
    *[
        (name, head_dim)
        for name, head_dim in (("hq3", 128), ("hq3.5", 64), ("hq4", 128), ("hq4@p16", 64), ("hq5", 256))
    ],
    *[("fp16", 80), ("paper:s96_r4+med3", 128), ("paper:s24_r3+med3@p8", 20), ("paper:s1_r1", 100)],
]
CODEC_NODES = tuple(Node(name, head_dim, role=role) for name, head_dim in CODECS for role in ROLES)
CODEC_LENGTHS = (1, 63, 64, 65, 200, 1000)
CODEC_CHUNKS = (1, 62, 201, 1, 1, 512, 222)
CODEC_LIMITS = Sizes(batch=len(CODEC_LENGTHS), tokens=512, capacity=1024)


@lru_cache(maxsize=4)
def attention_engine(dtype: torch.dtype) -> Engine:
    """All nodes of ATTENTION in one engine."""
    return Engine(ATTENTION, dtype, ATTENTION_LIMITS)


def _sinks(node: Node) -> Tensor:
    return torch.linspace(-1, 4, node.heads * node.group)


def _case(node: Node, past: tuple[int, ...], capacity: int, dtype: torch.dtype) -> Attention:
    return Attention(node.scheme, node.head_dim, node.heads, node.group, past, capacity, dtype=dtype)


def _named(node: Node, side: str, caches: list[list[Tensor]], sizes: Sizes) -> dict[str, Tensor]:
    """Both roles' tensors by the names of the network."""
    return {
        f"{node.name}.{side}.{key}": tensor
        for role, cache in zip(node.roles, caches, strict=True)
        for key, tensor in zip(node.past(role, sizes), cache, strict=True)
    }


def _inputs(
    cases: dict[Node, Attention], new: tuple[int, ...], rows: slice = slice(None)
) -> tuple[Sizes, dict[str, Tensor]]:
    """Sizes and inputs of a run over `cases`; `rows` of the max(new) new rows."""
    first = next(iter(cases.values()))
    found = {"past_length": lengths(*first.past), "new_length": lengths(*new)}
    sizes = Sizes(len(new), max(new), first.capacity)
    for node, case in cases.items():
        q, k, v = (x[:, :, rows] for x in case.inputs(max(new)))
        sizes = Sizes(len(new), q.shape[2], case.capacity)
        found |= {f"{node.name}.{key}": x for key, x in zip("qkv", (q, k, v), strict=True)}
        if node.sinks:
            found[f"{node.name}.sinks"] = _sinks(node).to(case.dtype)
        found |= _named(node, "past", case.clone(), sizes)
    return sizes, found


def _attention(dtype: torch.dtype, run: str, aliased: bool = True) -> tuple[Run, dict[str, Tensor]]:
    past, new, capacity = RUNS[run]
    cases = {node: _case(node, past, capacity, dtype) for node in ATTENTION}
    running = Run(attention_engine(dtype), *_inputs(cases, new), aliased)
    return running, running()


@lru_cache(maxsize=16)
def attention_outputs(dtype: torch.dtype, run: str) -> dict[str, Tensor]:
    """Outputs of one run in place, by name."""
    return _attention(dtype, run)[1]


def _differing(a: Tensor, b: Tensor) -> int:
    return int((bits(a) != bits(b)).sum())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("node", ATTENTION, ids=lambda node: node.name)
def test_attention_follows_the_oracle(node: Node, run: str, dtype: torch.dtype, record_property: Record) -> None:
    past, new, capacity = RUNS[run]
    case = _case(node, past, capacity, dtype)
    q, k, v = case.inputs(max(new))
    sinks = _sinks(node).to(dtype).float() if node.sinks else None
    expected, _ = case.oracle(q, k, v, lengths(*new), node.head_dim**-0.5, node.window, node.softcap, sinks)
    outputs = attention_outputs(dtype, run)
    y = outputs[f"{node.name}.y"]
    error = relative_error(y, expected)
    record_property("relative_error", error)
    assert error < LIMITS[dtype]
    for b, count in enumerate(new):
        assert not y[b, :, count:].any(), "rows past new_length must be zero"
        assert not count or relative_error(y[b], expected[b]) < LIMITS[dtype]
    sizes, host = Sizes(len(new), max(new), capacity), case.clone()
    for x, role, book, cache in zip((k, v), ROLES, case.books, host, strict=True):
        native.append(x, lengths(*past), lengths(*new), case.scheme.role(role), book, cache)
    different = {key: _differing(outputs[key], x) for key, x in _named(node, "present", host, sizes).items()}
    record_property("differing_words", sum(different.values()))
    assert not any(different.values()), f"words that differ from the host's: {different}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_engines_run_the_kernels_that_the_library_names(dtype: torch.dtype, record_property: Record) -> None:
    """hqmq_cuda_attention_path says which kernel attends; torch's profiler sees which one TensorRT launched."""
    running, _ = _attention(dtype, "decode")
    past, _, capacity = RUNS["decode"]
    paths = []
    for node in ATTENTION:
        q, k, _ = _case(node, past, capacity, dtype).inputs(1)
        pages = capacity // node.parsed.page_size
        paths.append(attention_path(q, k, pages, node.parsed, node.window, node.softcap)[0])
    fused = paths.count(DECODE)
    assert (fused == 0) == (dtype == torch.float32)
    seen = {name: kernel.launches for name, kernel in by_short_name(kernels(running)).items()}
    for name, count in seen.items():
        record_property(name, count)
    assert seen.get(FUSED, 0) == fused
    assert seen.get(PLAIN, 0) == len(paths) - fused


@pytest.mark.parametrize("run", ["decode", "prefill"])
def test_other_addresses_for_present_give_the_same_and_leave_past_alone(run: str) -> None:
    running, outputs = _attention(torch.float16, run, aliased=False)
    past, _, capacity = RUNS[run]
    for name, tensor in attention_outputs(torch.float16, run).items():
        assert _differing(outputs[name], tensor) == 0, name
    for node in ATTENTION:
        sizes = Sizes(len(past), 1, capacity)
        for name, tensor in _named(node, "past", _case(node, past, capacity, torch.float16).clone(), sizes).items():
            assert _differing(running.inputs[name].cpu(), tensor) == 0, f"{name} was written"


def test_every_present_tensor_is_its_past() -> None:
    engine = attention_engine(torch.float16).engine
    if not hasattr(engine, "get_aliased_input_tensor"):
        pytest.skip("this TensorRT's Python bindings do not tell which input an output aliases")
    for node in ATTENTION:
        for name in node.outputs(ATTENTION_LIMITS, torch.float16):
            expected = name.replace(".present.", ".past.") if ".present." in name else ""
            assert engine.get_aliased_input_tensor(name) == expected


def test_a_captured_graph_serves_changing_lengths() -> None:
    past, steps, capacity = (60, 0, 190), 70, 512
    cases = {node: _case(node, past, capacity, torch.float16) for node in ATTENTION}
    host = {node: case.clone() for node, case in cases.items()}
    running = Run(attention_engine(torch.float16), *_inputs(cases, (steps,) * 3, slice(0, 1)))
    held = torch.tensor(past, dtype=torch.int32)
    running.inputs["new_length"].copy_(lengths(0, 0, 0))  # the first enqueue is not captured and must write nothing
    running()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=running.stream):
        running.enqueue()
    inputs = {node: case.inputs(steps) for node, case in cases.items()}
    for step in range(steps):
        new = lengths(1, 1, step % 2)
        running.inputs["past_length"].copy_(held)
        running.inputs["new_length"].copy_(new)
        rows = {
            node: {key: x[:, :, step : step + 1].contiguous() for key, x in zip("qkv", found, strict=True)}
            for node, found in inputs.items()
        }
        for node, row in rows.items():
            for key, x in row.items():
                running.inputs[f"{node.name}.{key}"].copy_(x)
        torch.cuda.synchronize()
        graph.replay()
        torch.cuda.synchronize()
        for node, case in cases.items():
            y = running.outputs[f"{node.name}.y"].cpu()
            sinks = _sinks(node).half() if node.sinks else None
            q, k, v = rows[node].values()
            given = (held, new, sinks, case.scheme, case.books, host[node])
            expected = native_attention.attend(q, k, v, *given, node.head_dim**-0.5, node.window, node.softcap)
            assert relative_error(y, expected) < LIMITS[torch.float16], (node.name, step)
        held = held + new
    sizes = Sizes(len(past), 1, capacity)
    for node, caches in host.items():
        for name, tensor in _named(node, "present", caches, sizes).items():
            assert _differing(running.outputs[name].cpu(), tensor) == 0, name


def test_tokens_without_a_page_are_not_cached() -> None:
    past, new, fitting, capacity = (120, 3), (40, 40), (8, 40), 128
    outputs = []
    for count in (new, fitting):
        cases = {node: _case(node, past, capacity, torch.float16) for node in ATTENTION}
        sizes, inputs = _inputs(cases, new)
        inputs["new_length"] = lengths(*count)
        outputs.append(Run(attention_engine(torch.float16), sizes, inputs)())
    for name, tensor in outputs[0].items():
        if name.endswith(".y"):
            assert tensor[0, :, 8:].isnan().all(), name
            assert _differing(tensor[0, :, :8], outputs[1][name][0, :, :8]) == 0
            assert _differing(tensor[1], outputs[1][name][1]) == 0
        else:
            assert _differing(tensor, outputs[1][name]) == 0, name


@lru_cache(maxsize=2)
def codec_outputs(dtype: torch.dtype) -> dict[str, Tensor]:
    """Caches and dense K or V after CODEC_CHUNKS were appended one after the other in place."""
    engine = Engine(CODEC_NODES, dtype, CODEC_LIMITS)
    running: Run | None = None
    outputs: dict[str, Tensor] = {}
    start = 0
    for chunk in CODEC_CHUNKS:
        past = [min(start, n) for n in CODEC_LENGTHS]
        new = [max(min(chunk, n - start), 0) for n in CODEC_LENGTHS]
        total = [a + b for a, b in zip(past, new, strict=True)]
        inputs = {"past_length": lengths(*past), "new_length": lengths(*new), "length": lengths(*total)}
        sizes = Sizes(len(new), chunk, CODEC_LIMITS.capacity)
        for node in CODEC_NODES:
            inputs[f"{node.name}.x"] = _codec_x(node, dtype)[:, :, start : start + chunk]
            if running is None:
                inputs |= _named(node, "past", [_empty(node)], sizes)
        if running is None:
            running = Run(engine, sizes, inputs)
        else:
            running.set(sizes, inputs)
        outputs = running()
        start += chunk
    assert start == max(CODEC_LENGTHS)
    return outputs


def _codec_x(node: Node, dtype: torch.dtype) -> Tensor:
    x = activations(len(CODEC_LENGTHS), node.heads, max(CODEC_LENGTHS), node.head_dim)
    return x.clamp(-6e4, 6e4).to(dtype)


def _empty(node: Node) -> list[Tensor]:
    role, page = node.parsed.role(node.role), node.parsed.page_size
    pages = CODEC_LIMITS.capacity // page
    return list(oracle.empty_cache(role, page, node.head_dim, node.heads, len(CODEC_LENGTHS), pages).values())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("node", CODEC_NODES, ids=lambda node: node.name)
def test_bytes_and_values_are_those_of_the_host(node: Node, dtype: torch.dtype, record_property: Record) -> None:
    """A chunk may be coded otherwise only at a tie: both codes must lie equally far from x."""
    outputs, x, host = codec_outputs(dtype), _codec_x(node, dtype), _empty(node)
    role, book, held = node.parsed.role(node.role), codebook(node.parsed.role(node.role), 2, node.role), CODEC_LENGTHS
    native.append(x, lengths(*[0] * len(held)), lengths(*held), role, book, host)
    device = [outputs[f"{node.name}.present.{key}"] for key in node.past(node.role, CODEC_LIMITS)]
    different = [_differing(a, b) for a, b in zip(host, device, strict=True)]
    words = sum(tensor.numel() for tensor in host)
    record_property("words", words)
    record_property("differing_words", sum(different))
    ours, theirs = (native_attention.load(lengths(*held), role, book, cache, torch.float32) for cache in (device, host))
    ties = 0
    if different[0] and role.packed:
        changed = (bits(device[0]) != bits(host[0])).any(-1)[:, :, : x.shape[2]]
        errors = [(dense[:, :, : x.shape[2]] - x.float()).square().sum(-1)[changed] for dense in (ours, theirs)]
        tied = (errors[0] - errors[1]).abs() <= 1e-5 * errors[1]
        ties = int(tied.sum())
        assert tied.all(), f"{int((~tied).sum())} tokens are coded worse or better than on the host"
    record_property("tied_tokens", ties)
    assert not any(different[1:]), f"scales, means, outliers or tails differ: {different}"
    assert different[0] <= words // 10_000, f"{different[0]} of {words} words differ"
    dense = outputs[f"{node.name}.dense"]
    assert _differing(dense, ours) == 0, "HqmqDequantize reads its own bytes otherwise than the host"
