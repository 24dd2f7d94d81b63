"""Parts of a graph as sessions of ONNX Runtime: weights stay on disk, bfloat16 is computed as float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort

_FOLDER = "session.model_external_initializers_file_folder_path"
_MAPPED = 64 << 10
"""Bytes of an external weight from which ONNX Runtime maps it instead of getting a copy."""
_HALF, _SINGLE = onnx.TensorProto.BFLOAT16, onnx.TensorProto.FLOAT


def open_session(
    model: ir.Model,
    nodes: Sequence[ir.Node],
    inputs: Sequence[ir.Value],
    weights: Sequence[ir.Value],
    outputs: Sequence[str],
    extra: Sequence[onnx.NodeProto] = (),
    threads: int = 1,
) -> ort.InferenceSession:
    """A session that runs `nodes`, in their order, then `extra`.

    Nothing is optimised, and no weight is packed anew, which would copy it. ONNX Runtime's CPU kernels lack bfloat16:
    its values become float32, its weights one by one as they are used.

    Args:
        model: holds the opsets. inputs, weights: what the nodes read. outputs: names of what is wanted.

    Raises:
        Exception: ONNX Runtime raises a type per status code.
    """
    infos = [onnx.helper.make_tensor_value_info(str(v.name), _wide(v.dtype), None) for v in inputs]
    tensors, made, folder = [], [], ""
    for value in weights:
        tensor = value.const_value
        assert tensor is not None
        if not isinstance(tensor, ir.ExternalTensor) or tensor.nbytes < _MAPPED:
            tensors.append(_inline(tensor, str(value.name)))
            continue
        folder = str(tensor.base_dir)
        half = tensor.dtype == ir.DataType.BFLOAT16
        stored = f"{value.name}.stored" if half else str(value.name)
        tensors.append(_external(tensor, stored))
        if half:
            made.append(onnx.helper.make_node("Cast", [stored], [str(value.name)], to=_SINGLE))
    graph = onnx.helper.make_graph(
        [*made, *(_node(node) for node in nodes), *extra],
        "part",
        infos,
        [onnx.helper.make_empty_tensor_value_info(name) for name in outputs],
        tensors,
    )
    opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in model.opset_imports.items()]
    proto = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=model.ir_version)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.intra_op_num_threads = threads
    options.enable_cpu_mem_arena = False
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.add_session_config_entry("session.disable_prepacking", "1")
    if folder:
        options.add_session_config_entry(_FOLDER, folder)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


def _wide(dtype: ir.DataType | None) -> int:
    return _SINGLE if dtype is None or dtype == ir.DataType.BFLOAT16 else int(dtype)


def _inline(tensor: ir.TensorProtocol, name: str) -> onnx.TensorProto:
    array = np.asarray(tensor.numpy())
    return onnx.numpy_helper.from_array(
        array.astype(np.float32) if tensor.dtype == ir.DataType.BFLOAT16 else array, name
    )


def _external(tensor: ir.ExternalTensor, name: str) -> onnx.TensorProto:
    proto = onnx.TensorProto(name=name, data_type=int(tensor.dtype), dims=[int(dim) for dim in tensor.shape])
    proto.data_location = onnx.TensorProto.EXTERNAL
    place = {"location": str(tensor.location), "offset": str(tensor.offset or 0), "length": str(tensor.nbytes)}
    for key, text in place.items():
        proto.external_data.add(key=key, value=text)
    return proto


def _node(node: ir.Node) -> onnx.NodeProto:
    proto = ir.serde.serialize_node(node)
    for attribute in proto.attribute:
        if attribute.name in ("to", "dtype", "stash_type") and attribute.i == _HALF:
            attribute.i = _SINGLE
    return proto
