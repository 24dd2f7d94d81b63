"""The operators on ONNX Runtime's CUDA execution provider against its CPU kernels, and OrtSession on a GPU."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest
import torch
from torch import Tensor

from hqmq_trt import contract, cuda, native_attention, ort_library
from hqmq_trt.errors import HqmqError
from hqmq_trt.runtime import OrtSession
from tests.attention_cases import CASES, Attention, assert_same_caches, bits, relative_error
from tests.codec_cases import lengths
from tests.gpu.device_memory import lost_each_round
from tests.test_ort_ops import TYPES, OneNode, attention_model, books_of, caches_of, halves, names_of
from tests.test_runtime import all_logits, kl, text

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ort_library.CUDA not in ort.get_available_providers(), reason="this is not onnxruntime-gpu"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.skipif(not cuda.available(), reason="libhqmq_cuda.so is not built"),
]
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
GPU_CASES = [case for case in CASES if case[1] <= 256 and case[1] % 4 == 0]


class GpuNode:
    """A one-node model on the GPU alone: a node that would run on the CPU is an error."""

    def __init__(self, node: OneNode) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = 3
        options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
        ort_library.register(options)
        self.session = ort.InferenceSession(
            node.model.SerializeToString(), options, providers=[ort_library.CUDA], enable_fallback=0
        )
        assert ort_library.CUDA in self.session.get_providers()
        self.outputs = node.outputs

    def run(self, inputs: dict[str, Tensor], outputs: list[Tensor]) -> None:
        """Inputs by name and outputs in order, all on the GPU; outputs are written."""
        binding = self.session.io_binding()
        for name, t in inputs.items():
            binding.bind_input(name, "cuda", 0, TYPES[t.dtype], list(t.shape), t.data_ptr())
        for name, t in zip(self.outputs, outputs, strict=True):
            binding.bind_output(name, "cuda", 0, TYPES[t.dtype], list(t.shape), t.data_ptr())
        torch.cuda.synchronize()  # what torch wrote
        self.session.run_with_iobinding(binding)
        assert [value.data_ptr() for value in binding.get_outputs()] == [t.data_ptr() for t in outputs]


def gpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the GPU."""
    return {name: tensor.cuda() for name, tensor in tensors.items()}


def attend(node: OneNode, in_place: bool) -> tuple[Tensor, list[Tensor]]:
    """y and present tensors of an attention model on the GPU, copied to the host."""
    inputs = gpu(node.inputs)
    cache = [name.removeprefix("present_") for name in node.outputs[1:]]
    y = torch.full_like(inputs["q"], 7)
    present = [inputs[name] if in_place else torch.full_like(inputs[name], 7) for name in cache]
    GpuNode(node).run(inputs, [y, *present])
    if not in_place:
        for name in cache:
            assert torch.equal(bits(inputs[name].cpu()), bits(node.inputs[name])), f"past {name} was written"
    return y.cpu(), [tensor.cpu() for tensor in present]


@pytest.mark.parametrize(("name", "head_dim", "heads", "group"), GPU_CASES)
def test_attention_equals_the_cpu(name: str, head_dim: int, heads: int, group: int) -> None:
    case = Attention(name, head_dim, heads, group, (0, 37))
    node = attention_model(case, 40, (40, 30))
    want, *cpu = node.run()
    y, present = attend(node, in_place=False)
    assert relative_error(y, want) < 1e-4
    assert_same_caches(halves(case, present), halves(case, cpu))
    again, same = attend(node, in_place=True)
    assert torch.equal(y, again)
    assert_same_caches(halves(case, same), halves(case, present))


@pytest.mark.parametrize("dtype", list(LIMITS), ids=str)
@pytest.mark.parametrize("tokens", [1, 6])
def test_sinks_window_softcap_and_types(dtype: torch.dtype, tokens: int) -> None:
    case = Attention("hq4@p32", 64, 2, 2, (90, 5), dtype=dtype)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(0)).to(dtype)
    node = attention_model(case, tokens, (tokens, tokens), sinks, window=40, softcap=8.0)
    y, present = attend(node, in_place=True)
    want, caches = case.oracle(*case.inputs(tokens), lengths(tokens, tokens), 64**-0.5, 40, 8.0, sinks.float())
    assert y.dtype == dtype
    assert relative_error(y, want) < LIMITS[dtype]
    assert_same_caches(halves(case, present), caches)
    without, _ = attend(attention_model(case, tokens, (tokens, tokens), window=40, softcap=8.0), in_place=True)
    assert relative_error(without, want) > 10 * relative_error(y, want)


def test_long_caches_use_the_workspace() -> None:
    case = Attention("hq3", 128, 1, 4, (4096, 3000), capacity=4352)
    y, _ = attend(attention_model(case, 1, (1, 1)), in_place=True)
    want, _ = case.oracle(*case.inputs(1), lengths(1, 1), 128**-0.5)
    assert relative_error(y, want) < 1e-4


def test_codebooks_that_are_not_constant() -> None:
    case = Attention("hq4", 64, 2, 1, (100,))
    fixed, _ = attend(attention_model(case, 1, (1,)), in_place=True)
    given, _ = attend(attention_model(case, 1, (1,), constants=()), in_place=True)
    assert torch.equal(fixed, given)


@pytest.mark.parametrize("name", ["hq3", "paper:s96_r4+med3@p32", "fp16", "hq4@p16"])
def test_quantize_and_dequantize_equal_the_cpu(name: str) -> None:
    case = Attention(name, 64, 2, 1, (0, 37))
    past, new = lengths(0, 37), lengths(120, 100)
    _, k, _ = case.inputs(120)
    role, names = case.scheme.key, names_of(case, case.scheme.key, "k")
    books = {key: value for key, value in books_of(case).items() if key[0] == "k"}
    caches = {key: value for key, value in caches_of(case).items() if key in names}
    attributes = {
        **contract.role_attributes(role, 64, case.scheme.page_size),
        **contract.common_attributes(case.scheme.page_size),
    }
    inputs = {"x": k, "past_length": past, "new_length": new, **books, **caches}
    node = OneNode(contract.QUANTIZE, inputs, [f"present_{name}" for name in names], attributes)
    on_gpu = gpu(node.inputs)
    present = [torch.full_like(on_gpu[name], 7) for name in names]
    GpuNode(node).run(on_gpu, present)
    on_host = [tensor.cpu() for tensor in present]
    assert_same_caches([on_host], [node.run()])

    stored = {"length": past + new, **books, **dict(zip(names, on_host, strict=True))}
    dense = OneNode(contract.DEQUANTIZE, stored, ["dense"], attributes)
    want = native_attention.load(past + new, role, case.books[0], on_host, torch.float32)
    out = torch.full_like(want, 7).cuda()
    GpuNode(dense).run(gpu(dense.inputs), [out])
    assert torch.equal(bits(out.cpu()), bits(want))


def test_errors_name_node_and_tensor() -> None:
    case = Attention("hq4@p32", 64, 2, 2, (10,))
    node = attention_model(case, 6, (6,))
    inputs = gpu(node.inputs)
    outputs = [torch.empty_like(inputs["q"]), *(inputs[name[8:]] for name in node.outputs[1:])]
    with pytest.raises(Exception, match=r"HqmqAttention node 'layer0': 'past_length' is int32 \[2\]"):
        GpuNode(node).run(inputs | {"past_length": lengths(1, 2).cuda()}, outputs)


@pytest.mark.parametrize("mode", ["fused", "qdq"])
def test_a_session_on_the_gpu_follows_the_cpu(tiny_export: Callable[..., Path], mode: str) -> None:
    tokens, split = text(75), [40, 20, *[1] * 15]
    folder = tiny_export(mode=mode)
    host, device = OrtSession(folder, 2, 80), OrtSession(folder, 2, 80, provider="cuda")
    want, found = all_logits(host, tokens, split), all_logits(device, tokens, split)
    assert kl(want, found) < 1e-3
    assert kl(want, np.roll(found, 1, 0)) > 1e-2
    pointers = device.present_pointers()
    assert all(ours == written for ours, written in pointers.values())
    assert device.cache_nbytes() == host.cache_nbytes()
    codes, *_ = device.cache_arrays(0, "key")
    expected, *_ = host.cache_arrays(0, "key")
    assert (codes == expected).mean() > 0.97
    with pytest.raises(HqmqError, match="lies on the GPU"):
        device.cache_buffers(0, "key")


def test_a_cache_moves_between_cpu_and_gpu(tiny_export: Callable[..., Path], tmp_path: Path) -> None:
    host, device = OrtSession(tiny_export(), 2, 80), OrtSession(tiny_export(), 2, 80, provider="cuda")
    host.append([text(40), text(23, 1)])
    host.save_cache(tmp_path / "cache")
    device.load_cache(tmp_path / "cache")
    assert device.lengths.tolist() == [40, 23]
    want, found = host.decode([65, 66]), device.decode([65, 66])
    assert kl(want, found) < 1e-4


def test_a_batch_follows_single_sequences(tiny_export: Callable[..., Path]) -> None:
    # Not bit for bit: matrix products of other shapes are rounded otherwise.
    rows = [text(n, n) for n in (5, 30, 17)]
    together = OrtSession(tiny_export(), 3, 80, prefill_chunk=24, provider="cuda").append(rows)
    session = OrtSession(tiny_export(), 1, 80, prefill_chunk=24, provider="cuda")
    alone = []
    for row in rows:
        session.reset()
        alone.append(session.append([row])[0])
    assert kl(np.stack(alone), together) < 1e-3
    assert kl(np.stack(alone), np.roll(together, 1, 0)) > 1e-2


def test_sessions_give_their_memory_back(tiny_export: Callable[..., Path]) -> None:
    def open_and_close() -> None:
        OrtSession(tiny_export(), 8, 2048, provider="cuda").append([text(20)] * 8)

    open_and_close()
    assert abs(lost_each_round(lambda: int(torch.cuda.mem_get_info()[0]), open_and_close, 10)) < 4 << 20
