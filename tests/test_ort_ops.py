"""The ONNX Runtime operators in one-node models: bytes, outputs, in place, types, errors."""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor

from hqmq_trt import contract, native_attention, ort_library
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import FORMAT_VERSION, cache_tensors
from hqmq_trt.scheme import RoleScheme
from tests.attention_cases import CASES, Attention, assert_same_caches, bits, relative_error
from tests.codec_cases import lengths, oracle_quantize

TYPES = {
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.int32: TensorProto.INT32,
}


class OneNode:
    """A model of one node; graph inputs are named tensors, codebooks are initializers, no value_info but the inputs'.

    Batch and capacity are symbolic, as in an exported model.
    """

    def __init__(
        self,
        op: str,
        inputs: dict[str, Tensor],
        outputs: list[str],
        attributes: dict[str, Any],
        constants: tuple[str, ...] = ("k_s", "k_l", "v_s", "v_l"),
        threads: int = 2,
        functions: tuple[onnx.FunctionProto, ...] = (),
        overload: str = "",
    ) -> None:
        self.inputs = {name: tensor for name, tensor in inputs.items() if name not in constants}
        node = helper.make_node(op, list(inputs), outputs, name="layer0", domain=contract.DOMAIN, **attributes)
        node.overload = overload
        values = [
            helper.make_tensor_value_info(
                name,
                TYPES[t.dtype],
                [f"d{n}_{size}" if t.dim() in (1, 4) and n in (0, 2) else size for n, size in enumerate(t.shape)],
            )
            for name, t in self.inputs.items()
        ]
        fixed = [numpy_helper.from_array(inputs[name].numpy(), name) for name in constants if name in inputs]
        empty = [helper.make_empty_tensor_value_info(name) for name in outputs]
        graph = helper.make_graph([node], "one", values, empty, fixed)
        imports = [helper.make_opsetid("", 21), helper.make_opsetid(contract.DOMAIN, contract.OPSET_VERSION)]
        self.model = helper.make_model(graph, opset_imports=imports, functions=list(functions), ir_version=10)
        self.session = ort_library.session(self.model.SerializeToString(), threads=threads)
        self.outputs = outputs

    def run(self, **changed: Tensor) -> list[Tensor]:
        """Outputs for the inputs given at first, some of them changed."""
        binding = self.session.io_binding()
        inputs = {**self.inputs, **changed}
        for name, t in inputs.items():
            binding.bind_input(name, "cpu", 0, TYPES[t.dtype], list(t.shape), t.data_ptr())
        for name in self.outputs:
            binding.bind_output(name)
        self.session.run_with_iobinding(binding)
        return [as_tensor(value) for value in binding.get_outputs()]

    def run_in_place(self, y: Tensor | None, cache: dict[str, Tensor], **changed: Tensor) -> None:
        """Run with each present bound to the buffer of its past; `y` receives the first output, if there is one."""
        binding = self.session.io_binding()
        inputs = {**self.inputs, **changed, **cache}
        for name, t in inputs.items():
            binding.bind_input(name, "cpu", 0, TYPES[t.dtype], list(t.shape), t.data_ptr())
        targets = [] if y is None else [y]
        for name, t in zip(self.outputs, [*targets, *cache.values()], strict=True):
            binding.bind_output(name, "cpu", 0, TYPES[t.dtype], list(t.shape), t.data_ptr())
        self.session.run_with_iobinding(binding)
        written = [value.data_ptr() for value in binding.get_outputs()]
        assert written == [t.data_ptr() for t in (*targets, *cache.values())]


def as_tensor(value: ort.OrtValue) -> Tensor:
    """A torch copy of an output of any of our types."""
    dtype = {name: torch_type for torch_type, name in TYPES.items()}[value.element_type()]
    size = int(np.prod(value.shape())) * dtype.itemsize
    raw = (ctypes.c_uint8 * size).from_address(value.data_ptr())
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(value.shape()) if size else torch.empty(value.shape())


def names_of(case: Attention, role: RoleScheme, prefix: str) -> list[str]:
    shape = (case.scheme.page_size, case.head_dim, case.heads, len(case.past), 1)
    return [f"{prefix}_{spec.name}" for spec in cache_tensors(role, *shape)]


def caches_of(case: Attention) -> dict[str, Tensor]:
    """Copies of the case's caches, by input name."""
    out: dict[str, Tensor] = {}
    for role, prefix, cache in zip((case.scheme.key, case.scheme.value), "kv", case.clone(), strict=True):
        out.update(zip(names_of(case, role, prefix), cache, strict=True))
    return out


def books_of(case: Attention) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for prefix, book in zip("kv", case.books, strict=True):
        out.update(zip((f"{prefix}_s", f"{prefix}_l"), book, strict=False))
    return out


def attention_model(
    case: Attention, tokens: int, new: tuple[int, ...], sinks: Tensor | None = None, **options: Any
) -> OneNode:
    make = {key: options.pop(key) for key in ("constants", "threads", "functions", "overload") if key in options}
    changed = options.pop("attributes", {})
    q, k, v = case.inputs(tokens)
    inputs = {"q": q, "k": k, "v": v, "past_length": lengths(*case.past), "new_length": lengths(*new)}
    if sinks is not None:
        inputs["sinks"] = sinks
    caches = caches_of(case)
    inputs |= books_of(case) | caches
    scale = case.head_dim**-0.5
    attributes = contract.attention_attributes(
        case.scheme, case.head_dim, scale, has_sinks=sinks is not None, **options
    )
    outputs = ["y", *(f"present_{name}" for name in caches)]
    return OneNode(contract.ATTENTION, inputs, outputs, {**attributes, **changed}, **make)


def halves(case: Attention, tensors: list[Tensor]) -> list[list[Tensor]]:
    count = len(case.caches[0])
    return [tensors[:count], tensors[count:]]


@pytest.mark.parametrize(("name", "head_dim", "heads", "group"), CASES)
def test_attention_matches_the_oracle(name: str, head_dim: int, heads: int, group: int) -> None:
    case = Attention(name, head_dim, heads, group, (0, 37))
    model = attention_model(case, 40, (40, 30))
    y, *present = model.run()
    want, caches = case.oracle(*case.inputs(40), lengths(40, 30), head_dim**-0.5)
    assert relative_error(y, want) < 1e-5
    assert_same_caches(halves(case, present), caches)
    for name, given in zip(caches_of(case), [*case.caches[0], *case.caches[1]], strict=True):
        assert torch.equal(bits(model.inputs[name]), bits(given)), f"past {name} was written"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_attention_options_and_types(dtype: torch.dtype) -> None:
    case = Attention("hq4@p32", 64, 2, 2, (90, 5), dtype=dtype)
    sinks = torch.randn(4, generator=torch.Generator().manual_seed(0)).to(dtype)
    y, *_ = attention_model(case, 6, (6, 6), sinks, window=40, softcap=8.0).run()
    assert y.dtype == dtype
    want, _ = case.oracle(*case.inputs(6), lengths(6, 6), 64**-0.5, 40, 8.0, sinks.float())
    assert relative_error(y, want) < {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("name", ["hq3", "paper:s96_r4+med3@p32", "fp16"])
def test_attention_in_place(name: str, threads: int) -> None:
    case = Attention(name, 64, 2, 2, (0, 37))
    model = attention_model(case, 40, (40, 30), threads=threads)
    y, *present = model.run()
    again, cache = torch.empty_like(y), caches_of(case)
    model.run_in_place(again, cache)
    assert torch.equal(y, again)
    assert_same_caches(halves(case, list(cache.values())), halves(case, present))


def test_decode_steps_in_place_equal_one_prefill() -> None:
    case = Attention("hq4@p16", 64, 2, 2, (0,))
    q, k, v = case.inputs(50)
    whole, *present = attention_model(case, 50, (50,)).run()
    model, cache, out = attention_model(case, 1, (1,)), caches_of(case), []
    for t in range(50):
        y = torch.empty(1, 4, 1, 64)
        step = {name: x[:, :, t : t + 1].contiguous() for name, x in (("q", q), ("k", k), ("v", v))}
        model.run_in_place(y, cache, past_length=lengths(t), **step)
        out.append(y)
    assert torch.equal(torch.cat(out, 2), whole)
    assert_same_caches(halves(case, list(cache.values())), halves(case, present))


def test_codebooks_that_are_not_constant() -> None:
    case = Attention("hq4", 64, 2, 1, (100,))
    model = attention_model(case, 1, (1,), constants=())
    y, *_ = model.run()
    assert torch.equal(y, attention_model(case, 1, (1,)).run()[0])
    other, *_ = model.run(k_s=-case.books[0][0])
    assert not torch.equal(y, other)
    assert torch.equal(y, model.run()[0])


@pytest.mark.parametrize(("name", "head_dim", "heads", "group"), CASES)
def test_quantize_and_dequantize(name: str, head_dim: int, heads: int, group: int) -> None:
    case = Attention(name, head_dim, heads, group, (0, 37))
    past, new = lengths(0, 37), lengths(120, 100)
    _, k, v = case.inputs(120)
    for which, (role, x) in enumerate(((case.scheme.key, k), (case.scheme.value, v))):
        prefix = "kv"[which]
        names, book = names_of(case, role, prefix), case.books[which]
        books = {key: value for key, value in books_of(case).items() if key[0] == prefix}
        caches = dict(zip(names, case.clone()[which], strict=True))
        attributes = {
            **contract.role_attributes(role, head_dim, case.scheme.page_size),
            **contract.common_attributes(case.scheme.page_size),
        }
        inputs = {"x": x, "past_length": past, "new_length": new, **books, **caches}
        outputs = [f"present_{name}" for name in names]
        model = OneNode(contract.QUANTIZE, inputs, outputs, attributes)
        present = model.run()
        named = dict(zip(case.empty()[which], case.clone()[which], strict=True))
        want = list(oracle_quantize(x, past, new, role, book, named).values())
        assert_same_caches([present], [want])
        model.run_in_place(None, caches)
        assert_same_caches([list(caches.values())], [want])

        inputs = {"length": past + new, **books, **dict(zip(names, present, strict=True))}
        dense = OneNode(contract.DEQUANTIZE, inputs, ["dense"], attributes)
        expected = native_attention.load(past + new, role, book, present, torch.float32)
        assert torch.equal(bits(dense.run()[0]), bits(expected))
        output = dense.session.get_outputs()[0]
        assert output.type == "tensor(float)"
        assert [output.shape[1], output.shape[3]] == [heads, head_dim]


def test_types_and_shapes_are_inferred() -> None:
    case = Attention("hq4", 64, 2, 2, (0,), dtype=torch.float16)
    session = attention_model(case, 4, (4,)).session
    assert [output.type for output in session.get_outputs()] == [
        f"tensor({kind})" for kind in ("float16", "int32", "int32", "float16", "float16", "int32", "int32", "float16")
    ]
    assert session.get_outputs()[0].shape == ["d0_1", 4, "d2_4", 64]
    assert session.get_outputs()[1].shape == session.get_inputs()[5].shape


@pytest.mark.parametrize("overload", ["", "variant"])
def test_the_kernel_wins_over_a_local_function(overload: str) -> None:
    """A model may carry function bodies for runtimes without this library; with it, the kernel runs."""
    case = Attention("hq4", 64, 2, 2, (0,))
    plain = attention_model(case, 4, (4,))
    node = plain.model.graph.node[0]
    wrong = [helper.make_node("Identity", [node.input[0]], [node.output[0]])]
    wrong += [
        helper.make_node("Identity", [source], [target])
        for source, target in zip(node.input[-7:], node.output[1:], strict=True)
    ]
    imports, names = [helper.make_opsetid("", 21)], [attribute.name for attribute in node.attribute]
    body = helper.make_function(
        contract.DOMAIN, contract.ATTENTION, list(node.input), list(node.output), wrong, imports, names
    )
    body.overload = overload
    y, *_ = attention_model(case, 4, (4,), functions=(body,), overload=overload).run()
    assert torch.equal(y, plain.run()[0])


def failure(model: OneNode, **changed: Tensor) -> str:
    with pytest.raises(Exception, match="layer0") as caught:
        model.run(**changed)
    return str(caught.value)


def test_errors_name_node_and_tensor() -> None:
    case = Attention("hq4@p32", 64, 2, 2, (200,))
    model = attention_model(case, 60, (40,))
    assert "HqmqAttention node 'layer0': the cache is too small" in failure(model, new_length=lengths(60))
    for name in ("k", "v"):
        x = model.inputs[name].clone()
        x[0, 1, 3, 5] = float("inf")
        assert f"{name} holds NaN or infinity" in failure(model, **{name: x})
        x[0, 1, 3, 5], x[0, 1, 55, 5] = 0, float("nan")
        model.run(**{name: x})  # in the padding
    assert "'past_length' is int32 [2]" in failure(model, past_length=lengths(1, 2))
    assert "past_length of sequence 0 is -1" in failure(model, past_length=lengths(-1))
    assert "new_length of sequence 0 is 61" in failure(model, new_length=lengths(61))


def test_errors_write_nothing() -> None:
    case = Attention("hq4@p32", 64, 2, 2, (200,))
    model, cache = attention_model(case, 60, (60,)), caches_of(case)
    with pytest.raises(Exception, match="too small"):
        model.run_in_place(torch.empty(1, 4, 60, 64), cache)
    v = model.inputs["v"].clone()
    v[0, 0, 0, 0] = float("nan")
    with pytest.raises(Exception, match="v holds NaN"):
        model.run_in_place(torch.empty(1, 4, 60, 64), cache, v=v, new_length=lengths(10))
    assert_same_caches(halves(case, list(cache.values())), case.caches)


@pytest.mark.parametrize(
    ("attributes", "text"),
    [
        ({"format_version": FORMAT_VERSION + 1}, "format version"),
        ({"k_storage": 7}, "k_storage"),
        ({"k_page_mean": 0}, "type inference"),
        ({"v_radius_bits": 3}, "levels"),
        ({"page_size": 4}, "page_size"),
        ({"window": -1}, "window"),
        ({"softcap": -1.0}, "softcap"),
        ({"has_sinks": 1}, "type inference"),
    ],
)
def test_a_node_that_does_not_fit_is_refused_at_load(attributes: dict[str, Any], text: str) -> None:
    case = Attention("hq4", 64, 2, 2, (0,))
    with pytest.raises(HqmqError, match=rf"layer0.*{text}"):
        attention_model(case, 4, (4,), attributes=attributes)


def test_cache_of_other_page_size_is_refused() -> None:
    case = Attention("hq4@p32", 64, 2, 2, (0,))
    with pytest.raises(Exception, match=r"layer0.*pages of 64"):
        attention_model(case, 4, (4,), attributes={"page_size": 64}).run()


def test_library_checks(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert ort_library.library_version()
    with pytest.raises(HqmqError, match="format version"):
        ort_library._checked(ort_library.library_path(ort_library.ORT_LIBRARY), FORMAT_VERSION + 1)
    with pytest.raises(HqmqError, match="does not exist"):
        ort_library.session(tmp_path / "none.onnx")
    with pytest.raises(HqmqError, match="no option 'colour'"):
        ort_library.session(tmp_path / "none.onnx", colour=1)
    monkeypatch.setenv("HQMQ_LIBRARY_DIR", str(tmp_path))
    with pytest.raises(HqmqError, match="missing"):
        ort_library.register(ort.SessionOptions())
    (tmp_path / ort_library.ORT_LIBRARY).write_bytes(b"not a library")
    with pytest.raises(HqmqError, match="cannot load"):
        ort_library.register(ort.SessionOptions())
