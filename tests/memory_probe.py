"""Run as a script: peak memory of one HqmqAttention node over a long packed cache, in bytes, as JSON.

Linux keeps the peak of a process in VmHWM; writing 5 to clear_refs resets it.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper
from onnx.numpy_helper import from_array

from hqmq_trt import codebooks, ort_library
from hqmq_trt.contract import ATTENTION, DOMAIN, attention_attributes
from hqmq_trt.format import cache_tensors
from hqmq_trt.scheme import ROLES, Scheme

HEADS, HEAD_DIM, PAGES, CHUNK = 8, 128, 512, 64


def attention_model(scheme: Scheme) -> tuple[onnx.ModelProto, dict[str, np.ndarray]]:
    """One node over a cache of PAGES pages, and its cache arrays, every byte touched."""
    types = {"int32": TensorProto.INT32, "float16": TensorProto.FLOAT16}
    inputs = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [1, HEADS, "T", HEAD_DIM]) for n in "qkv"]
    inputs += [helper.make_tensor_value_info(n, TensorProto.INT32, [1]) for n in ("past_length", "new_length")]
    outputs = [helper.make_tensor_value_info("y", TensorProto.FLOAT, [1, HEADS, "T", HEAD_DIM])]
    books, arrays = [], {}
    for role_name in ROLES:
        role = scheme.role(role_name)
        books += [
            onnx.numpy_helper.from_array(
                codebooks.secondaries(role, 0, 0, HEADS, role_name), f"{role_name}_secondaries"
            ),
            from_array(codebooks.levels(role), f"{role_name}_levels"),
        ]
        for spec in cache_tensors(role, scheme.page_size, HEAD_DIM, HEADS, 1, PAGES):
            name = f"{role_name}.{spec.name}"
            inputs.append(helper.make_tensor_value_info(name, types[spec.dtype], spec.shape))
            outputs.append(helper.make_tensor_value_info(f"present.{name}", types[spec.dtype], spec.shape))
            arrays[name] = np.full(spec.shape, 1, spec.dtype)
    names = [*"qkv", "past_length", "new_length", *(b.name for b in books), *arrays]
    attributes = attention_attributes(scheme, HEAD_DIM, HEAD_DIM**-0.5)
    node = helper.make_node(ATTENTION, names, [o.name for o in outputs], domain=DOMAIN, **attributes)
    graph = helper.make_graph([node], "probe", inputs, outputs, books)
    opsets = [helper.make_opsetid("", 23), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=10), arrays


def peak(reset: bool = False) -> int:
    """Peak resident bytes of this process, since the last reset."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return 1024 * int(re.findall(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())[0])


def run(session: ort.InferenceSession, cache: dict[str, ort.OrtValue], past: int, new: int) -> None:
    """Append `new` tokens after `past`, in place."""
    rng = np.random.default_rng(past)
    binding = session.io_binding()
    for name in "qkv":
        binding.bind_cpu_input(name, rng.standard_normal((1, HEADS, new, HEAD_DIM)).astype(np.float32))
    binding.bind_cpu_input("past_length", np.array([past], np.int32))
    binding.bind_cpu_input("new_length", np.array([new], np.int32))
    for name, value in cache.items():
        binding.bind_ortvalue_input(name, value)
        binding.bind_ortvalue_output(f"present.{name}", value)
    binding.bind_output("y")
    session.run_with_iobinding(binding)


def main() -> None:
    scheme = Scheme.parse(sys.argv[1])
    model, arrays = attention_model(scheme)
    session = ort_library.session(model.SerializeToString(), threads=2)
    cache = {name: ort.OrtValue.ortvalue_from_numpy(array) for name, array in arrays.items()}
    packed = sum(array.nbytes for array in arrays.values())
    del arrays
    run(session, cache, 0, 1)  # threads, arenas, tables
    length = (PAGES - 4) * scheme.page_size
    before = peak(reset=True)
    run(session, cache, length, CHUNK)
    for step in range(4):
        run(session, cache, length + CHUNK + step, 1)
    full = 2 * 2 * HEADS * HEAD_DIM * length
    json.dump({"grown": peak() - before, "packed": packed, "fp16": full}, sys.stdout)


if __name__ == "__main__":
    main()
