"""Reading an ONNX file that others wrote: checked, normalised, weights left on disk."""

from __future__ import annotations

import logging
from pathlib import Path, PurePosixPath

import onnx
import onnx_ir as ir
import onnxscript.optimizer
from onnx_ir.passes import common
from onnxscript import version_converter

from hqmq_trt import contract
from hqmq_trt.errors import HqmqError

from ..graph import IR_VERSION, OPSET, _quiet
from . import microsoft
from .inline import read_light

OPSETS = range(18, 26)
"""Opsets of the default domain that are read."""
_FOLD_LIMIT = 1 << 12
"""Bytes of a constant up to which arithmetic on constants is done beforehand."""

logger = logging.getLogger(__name__)


def read(path: Path) -> ir.Model:
    """The model of an ONNX file, functions inlined, arithmetic on small constants done, shapes inferred.

    Weights are not read, external ones or those of inline.LARGE bytes and more in the file itself.

    Raises:
        HqmqError: not an ONNX file, an invalid or cyclic graph, an opset outside OPSETS, missing weights, or a file
            that hqmq-trt wrote.
    """
    model = _load(path)
    graph = model.graph
    if any(node.domain == contract.DOMAIN for node in graph):
        raise HqmqError(f"{path}: holds operators of {contract.DOMAIN} already; there is nothing to do")
    _check_weights(path, model)
    _check_order(path, model)
    try:
        microsoft.write_out(model)
    except HqmqError as error:
        raise HqmqError(f"{path}: {error}") from error
    opset = model.opset_imports.get("", 0)
    if opset not in OPSETS:
        raise HqmqError(
            f"{path}: opset {opset or 'none'}; opsets {OPSETS.start} to {OPSETS.stop - 1} are read: export it again"
        )
    _check_valid(path, model)
    try:
        with _quiet():
            common.InlinePass()(model)
            onnxscript.optimizer.fold_constants(
                model, onnx_shape_inference=True, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT
            )
            common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0)(model)
            common.ShapeInferencePass()(model)
            common.RemoveUnusedNodesPass()(model)
            common.NameFixPass()(model)
            if opset < OPSET:
                version_converter.convert_version(model, OPSET)
    except Exception as error:  # the passes raise what they like for graphs that make no sense
        raise HqmqError(f"{path}: its graph cannot be read: {_one_line(error)}") from error
    if model.opset_imports[""] < OPSET:
        raise HqmqError(f"{path}: cannot be converted from opset {opset} to {OPSET}")
    model.ir_version = max(IR_VERSION, model.ir_version or 0)
    return model


def _load(path: Path) -> ir.Model:
    if not path.is_file():
        raise HqmqError(f"{path}: no such file")
    try:
        model = _light(path)
    except Exception as error:  # protobuf and onnx_ir raise their own types
        raise HqmqError(f"{path}: is not an ONNX file, or is damaged: {_one_line(error)}") from error
    if not len(model.graph):
        raise HqmqError(f"{path}: is not an ONNX file, or its graph is empty")
    return model


def _light(path: Path) -> ir.Model:
    """The model; its large weights are external tensors, of the file itself if they lie in it."""
    real = path.resolve()
    proto = read_light(real)
    outside = [t for t in proto.graph.initializer if t.external_data and t.external_data[0].value != real.name]
    if real.stat().st_nlink > 1 or (outside and real.parent != path.parent.resolve()):
        # onnx_ir follows no hard links, and ONNX Runtime looks for external weights in one folder only.
        return ir.load(path)
    model = ir.from_proto(proto)
    ir.external_data.set_base_dir(model.graph, real.parent)
    return model


def _check_weights(path: Path, model: ir.Model) -> None:
    """External tensors must lie in files beside the model, as long as the graph says."""
    for value in model.graph.initializers.values():
        tensor = value.const_value
        if tensor is None:
            raise HqmqError(f"{path}: initialiser '{value.name}' has no value")
        if not isinstance(tensor, ir.ExternalTensor):
            continue
        file = Path(tensor.path)
        if not file.is_file():
            raise HqmqError(f"{path}: weights of '{value.name}' are missing: {file} does not exist")
        end = (tensor.offset or 0) + tensor.nbytes
        if file.stat().st_size < end:
            raise HqmqError(f"{path}: {file} has {file.stat().st_size} bytes, '{value.name}' ends at {end}")
        if file == path.resolve():
            continue
        location = PurePosixPath(str(tensor.location))
        if location.is_absolute() or ".." in location.parts:
            raise HqmqError(f"{path}: weights of '{value.name}' lie outside its folder, in {file}; do not trust it")
        if not file.resolve().is_relative_to(path.parent.resolve()):
            raise HqmqError(
                f"{path}: weights of '{value.name}' are a link to {file.resolve()}; links out of the folder are not "
                "followed: copy the model with its files (cp -rL)"
            )
        if file.stat().st_nlink > 1:
            raise HqmqError(f"{path}: {file} has several hard links, which ONNX readers refuse: copy it (cp)")


def _check_order(path: Path, model: ir.Model) -> None:
    """Every value must come from somewhere before it is used; control flow is not read."""
    made = {id(value) for value in (*model.graph.inputs, *model.graph.initializers.values())}
    for node in model.graph:
        if any(isinstance(a.value, ir.Graph) for a in node.attributes.values()):
            raise HqmqError(
                f"{path}: node '{node.name}' ({node.op_type}) is control flow; export the decoder without branches "
                "(merged decoders: export the one with past)"
            )
        for value in node.inputs:
            if value is not None and id(value) not in made:
                raise HqmqError(
                    f"{path}: node '{node.name}' ({node.op_type}) uses '{value.name}', which nothing makes before it: "
                    "the graph is invalid or cyclic"
                )
        made.update(id(value) for value in node.outputs)
    for value in model.graph.outputs:
        if id(value) not in made:
            raise HqmqError(f"{path}: nothing makes the output '{value.name}'")


def _check_valid(path: Path, model: ir.Model) -> None:
    proto = ir.to_proto(_without_weights(model))
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as error:
        raise HqmqError(f"{path}: is no valid ONNX model: {_one_line(error)}") from error


def _without_weights(model: ir.Model) -> ir.Model:
    """A copy whose large initialisers are inputs, for checks that need no values."""
    graph = model.clone().graph if hasattr(model, "clone") else ir.from_proto(ir.to_proto(model)).graph
    for name, value in list(graph.initializers.items()):
        tensor = value.const_value
        if tensor is not None and (tensor.nbytes > _FOLD_LIMIT or isinstance(tensor, ir.ExternalTensor)):
            del graph.initializers[name]
            if not any(value is given for given in graph.inputs):
                value.shape, value.type = tensor.shape, ir.TensorType(tensor.dtype)
                graph.inputs.append(value)
            value.const_value = None
    return ir.Model(graph, ir_version=model.ir_version or IR_VERSION, functions=tuple(model.functions.values()))


def _one_line(error: Exception) -> str:
    causes: list[BaseException] = [error]
    while causes[-1].__cause__ is not None:
        causes.append(causes[-1].__cause__)
    return " ".join(str(causes[-1]).split())[:300]
