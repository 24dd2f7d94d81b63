"""Decoders with operators of com.microsoft: made by ONNX Runtime GenAI's own builder, or here in the same form."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import torch
import transformers
from onnx import TensorProto, helper, numpy_helper
from tokenizers import Tokenizer, models

from hqmq_trt.export.rewrite.reading import read
from tests import rewrite_cases as cases
from tests.tiny_decoders import BASE, MODELS

INSTALLED = importlib.util.find_spec("onnxruntime_genai") is not None
OLD_KERNELS = tuple(int(part) for part in onnxruntime.__version__.split(".")[:2]) < (1, 31)
"""ONNX Runtime 1.23, the last for Python 3.10: GroupQueryAttention sees one key more than local_window_size says, so
that windows are refused, and knows neither window-sized caches nor norms of q and k."""
SINGLE = ([19, 11, 3], [1, 1, 0], *[[1, 0, 0]] * 5, *[[1, 1, 1]] * 32)
"""cases.LENGTHS with its chunk token by token: the builder's MultiHeadAttention takes no chunks."""
ROOM = 64
"""Rows of a cache whose size is fixed."""

CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**BASE),
    "qwen2": lambda: transformers.Qwen2Config(**BASE),
    "qwen3": lambda: transformers.Qwen3Config(**BASE),
    "gemma2": MODELS["gemma2"],
    "phi": lambda: transformers.PhiConfig(
        **{key: size for key, size in BASE.items() if key != "head_dim"} | {"hidden_size": 128}
    ),
    "gptoss": lambda: transformers.GptOssConfig(**BASE, num_local_experts=4, num_experts_per_tok=2, sliding_window=8),
}


def make_model(name: str) -> Any:
    """A tiny model of transformers with random weights."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(CONFIGS[name](), attn_implementation="eager").eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias"):
                parameter.normal_(0, 0.3)
    return model


def build(name: str, folder: Path, precision: str = "fp32", multi_head: bool = False, provider: str = "cpu") -> Path:
    """Run onnxruntime_genai.models.builder on a tiny model; the ONNX file. `multi_head`: MultiHeadAttention, which the
    builder takes where GroupQueryAttention has no kernel."""
    source = folder / "hf"
    make_model(name).save_pretrained(source)
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(97)}, unk_token="w0"))
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, bos_token="w1", eos_token="w2", pad_token="w0"
    ).save_pretrained(source)
    package = importlib.util.find_spec("onnxruntime_genai")
    assert package is not None
    assert package.origin is not None
    scripts = str(Path(package.origin).parent / "models")  # they import each other as top-level modules
    if scripts not in sys.path:
        sys.path.append(scripts)
    builder = importlib.import_module("builder")
    base = importlib.import_module("builders.base").Model
    kept = base.is_gqa_supported, base.is_packed_attn_supported
    where = (None, str(source), str(folder / "onnx"), precision, provider, str(folder / "cache"))
    try:
        if multi_head:
            base.is_gqa_supported = base.is_packed_attn_supported = lambda self: False
        builder.create_model(*where, **builder.parse_extra_options(*where, []))
    finally:
        base.is_gqa_supported, base.is_packed_attn_supported = kept
    return folder / "onnx" / "model.onnx"


class Graph:
    """Nodes of a decoder, written one after another."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.rng = np.random.default_rng(3)
        self.nodes: list[Any] = []
        self.weights: list[Any] = []

    def weight(self, *shape: int, name: str = "", array: Any = None) -> str:
        """A random initialiser."""
        made = 0.15 * self.rng.standard_normal(shape).astype(np.float32) if array is None else array
        self.weights.append(numpy_helper.from_array(made, name or f"w{len(self.weights)}"))
        return str(self.weights[-1].name)

    def node(self, op: str, inputs: list[str], outputs: int | list[str] = 1, **attributes: Any) -> str:
        """A node; its first output."""
        label = f"{op}.{len(self.nodes)}"
        names = [f"{label}:{i}" for i in range(outputs)] if isinstance(outputs, int) else outputs
        ours = op.startswith(("Group", "Multi", "Skip", "Rotary", "MatMulN", "Fast"))
        domain = "com.microsoft" if ours else ""
        self.nodes.append(helper.make_node(op, inputs, names, label, domain=domain, **attributes))
        return next(name for name in names if name)

    def model(self, inputs: list[Any], outputs: list[Any]) -> Any:
        graph = helper.make_graph(self.nodes, "decoder", inputs, outputs, self.weights)
        opsets = [helper.make_opsetid("", self.opset), helper.make_opsetid("com.microsoft", 1)]
        return helper.make_model(graph, opset_imports=opsets, ir_version=10)


DECODERS: dict[str, dict[str, Any]] = {
    "interleaved": {"dim": 32, "turned": 16, "rotary": "inside", "positions": True, "packed": False, "opset": 14},
    "sinks": {"rotary": "inside", "group": {"local_window_size": 7, "softcap": 5.0, "scale": 0.3}, "sinks": True},
    "outside": {"rotary": "outside", "positions": True, "group": {"smooth_softmax": 1}, "opset": 21},
    "multi-head": {"rotary": "outside", "positions": True, "multi": True, "packed": False, "opset": 17},
}
"""Forms of attention that the builder of this version does not make for the CPU, or older ones did."""


def make_decoder(
    dim: int = 16,
    turned: int = 0,
    rotary: str = "inside",
    positions: bool = False,
    packed: bool = True,
    multi: bool = False,
    sinks: bool = False,
    group: dict[str, Any] | None = None,
    opset: int = 22,
    layers: int = 2,
) -> Any:
    """A decoder in the form of GenAI's: `rotary` ``inside`` or ``outside`` of attention, of `turned` elements a head;
    `packed` q, K and V; `multi`: MultiHeadAttention with a cache and a mask of columns."""
    heads, kv_heads, features, turned = 4, 4 if multi else 2, 64, turned or dim
    g = Graph(opset)
    last, total = ("", "") if multi else _lengths(g)
    angle = np.outer(np.arange(256), 10000.0 ** (-np.arange(0, turned, 2) / turned))
    tables = [g.weight(name=f"{f.__name__}_cache", array=f(angle).astype(np.float32)) for f in (np.cos, np.sin)]
    mask = g.node("Cast", ["attention_mask"], to=TensorProto.INT32) if multi else ""
    hidden = g.node(
        "Gather", [g.weight(97, features, array=g.rng.standard_normal((97, features)).astype("f")), "input_ids"]
    )
    normed = g.node("SimplifiedLayerNormalization", [hidden, g.weight(features)], axis=-1, epsilon=1e-6, stash_type=1)
    for i in range(layers):
        sizes = [heads * dim, kv_heads * dim, kv_heads * dim]
        parts = [g.node("MatMul", [normed, g.weight(features, sum(sizes) if packed else n)]) for n in sizes]
        if packed and rotary == "outside":
            split = g.weight(name=f"split{i}", array=np.array(sizes, np.int64))
            names = [f"split{i}.{p}" for p in range(3)]
            g.node("Split", [parts[0], split], names, axis=-1)
            parts = names
        if rotary == "outside":
            parts[:2] = [g.node("RotaryEmbedding", [p, "position_ids", *tables], interleaved=0) for p in parts[:2]]
        separate = not packed or rotary == "outside"
        past = [f"past_key_values.{i}.{role}" for role in ("key", "value")]
        present = [f"present.{i}.{role}" for role in ("key", "value")]
        out = f"attention.{i}"
        if multi:
            bias = g.weight(3 * heads * dim)
            g.node(
                "MultiHeadAttention", [*parts, bias, mask, "", *past], [out, *present], num_heads=heads,
                unidirectional=1, mask_filter_value=-3e38,
            )  # fmt: skip
        else:
            inside = [*tables, "position_ids" if positions else ""] if rotary == "inside" else ["", "", ""]
            more = ["", g.weight(heads)] if sinks else []
            attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "do_rotary": int(rotary == "inside")}
            g.node(
                "GroupQueryAttention",
                [*(parts if separate else [parts[0], "", ""]), *past, last, total, *inside, *more],
                [out, *present],
                **attributes,
                rotary_interleaved=int(turned != dim),
                **(group or {}),
            )
        projected = g.node("MatMul", [out, g.weight(heads * dim, features)])
        skip = f"sum.{i}"
        if multi:
            more = [g.weight(features), g.weight(features), g.weight(features)]
            normed = g.node("SkipLayerNormalization", [hidden, projected, *more], [f"n{i}", "", "", skip], epsilon=1e-5)
        else:
            normed = g.node(
                "SkipSimplifiedLayerNormalization", [hidden, projected, g.weight(features)], [f"n{i}", "", "", skip],
                epsilon=1e-6,
            )  # fmt: skip
        up = g.node("FastGelu", [g.node("MatMul", [normed, g.weight(features, 96)]), g.weight(96)])
        hidden = g.node("Add", [skip, g.node("MatMul", [up, g.weight(96, features)])])
        normed = g.node(
            "SimplifiedLayerNormalization", [hidden, g.weight(features)], axis=-1, epsilon=1e-6, stash_type=1
        )
    g.node("MatMul", [normed, g.weight(features, 97)], ["logits"])
    return g.model(*_interface(layers, kv_heads, positions))


def _lengths(g: Graph) -> tuple[str, str]:
    """seqlens_k and total_sequence_length, as the builder makes them of attention_mask."""
    one = g.weight(name="one", array=np.array([1], np.int64))
    count = g.node("ReduceSum", ["attention_mask", one], keepdims=0)
    last = g.node("Cast", [g.node("Sub", [count, one])], to=TensorProto.INT32)
    shape = g.node("Shape", ["attention_mask"])
    axis = g.weight(name="axis", array=np.array(1, np.int64))
    total = g.node("Cast", [g.node("Gather", [shape, axis])], to=TensorProto.INT32)
    return last, total


def _interface(layers: int, heads: int, positions: bool) -> tuple[list[Any], list[Any]]:
    value, single, rows = helper.make_tensor_value_info, TensorProto.FLOAT, ["batch_size", "sequence_length"]
    inputs = [value("input_ids", TensorProto.INT64, rows)]
    inputs.append(value("attention_mask", TensorProto.INT64, ["batch_size", "total_sequence_length"]))
    inputs += [value("position_ids", TensorProto.INT64, rows)] * positions
    outputs = [value("logits", single, [*rows, 97])]
    for role in ("key", "value"):  # all keys, then all values, as the builder has them
        for i in range(layers):
            for kind, names, length in (
                ("past_key_values", inputs, "past_sequence_length"),
                ("present", outputs, "total_sequence_length"),
            ):
                names.append(value(f"{kind}.{i}.{role}", single, ["batch_size", heads, length, "kv_cache_dim"]))
    return inputs, outputs


def written_out(path: Path) -> Any:
    """The model as the recogniser reads it: without operators of com.microsoft, with its own cache."""
    model = read(path)
    ir.external_data.load_to_model(model)
    return ir.to_proto(model)


def run_genai(path: Path, lengths: Any = cases.LENGTHS, dim: int = 16) -> list[torch.Tensor]:
    """Logits [tokens, V] of each of three sequences on its own: with a cache of ROOM rows, as GenAI's runtime shares
    it between past and present, or a growing one for MultiHeadAttention."""
    proto = onnx.load(path, load_external_data=False)
    growing = not any(node.op_type == "GroupQueryAttention" for node in proto.graph.node)
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    return cases.run_alone(session, lengths, 0 if growing else ROOM, dim)


def lone(op: str, inputs: list[Any], outputs: int = 1, domain: str = "com.microsoft", **attributes: Any) -> Any:
    """A model of one node (onnx_ir). `inputs`: arrays are constants, tuples (type, *sizes) are inputs, None is left
    out."""
    graph_inputs, weights, names = [], [], []
    for place, given in enumerate(inputs):
        names.append("" if given is None else f"x{place}")
        if isinstance(given, np.ndarray):
            weights.append(numpy_helper.from_array(given, names[-1]))
        elif given is not None:
            graph_inputs.append(helper.make_tensor_value_info(names[-1], given[0], given[1:]))
    made = [f"y{i}" for i in range(outputs)]
    node = helper.make_node(op, names, made, "lone", domain=domain, **attributes)
    graph = helper.make_graph(
        [node], "g", graph_inputs, [helper.make_empty_tensor_value_info(y) for y in made], weights
    )
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid("com.microsoft", 1)]
    return ir.from_proto(helper.make_model(graph, opset_imports=opsets, ir_version=10))
