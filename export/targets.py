"""What a graph is for: the operators and opsets that each runtime imports."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from hqmq_trt import contract
from hqmq_trt.errors import HqmqError

TARGETS = ("ort", "tensorrt-10", "tensorrt-11")

_NAMES = """
Abs Acos Acosh Add And ArgMax ArgMin Asin Asinh Atan Atanh AveragePool BatchNormalization BlackmanWindow Cast CastLike
Ceil Celu Clip Concat Constant ConstantOfShape Conv ConvTranspose Cos Cosh CumSum DeformConv DepthToSpace
DequantizeLinear Div Dropout Einsum Elu Equal Erf Exp Expand EyeLike Flatten Floor GRU Gather GatherElements GatherND
Gelu Gemm GlobalAveragePool GlobalLpPool GlobalMaxPool Greater GreaterOrEqual GridSample GroupNormalization
HammingWindow HannWindow HardSigmoid HardSwish Hardmax Identity If InstanceNormalization IsInf IsNaN LRN LSTM
LayerNormalization LeakyRelu Less LessOrEqual Log LogSoftmax Loop LpNormalization LpPool MatMul Max MaxPool Mean
MeanVarianceNormalization Min Mish Mod Mul Neg NonMaxSuppression NonZero Not OneHot Or PRelu Pad Pow QuantizeLinear RNN
RandomNormal RandomNormalLike RandomUniform RandomUniformLike Range Reciprocal ReduceL1 ReduceL2 ReduceLogSum
ReduceLogSumExp ReduceMax ReduceMean ReduceMin ReduceProd ReduceSum ReduceSumSquare Relu Reshape Resize ReverseSequence
RoiAlign Round STFT Scan Scatter ScatterElements ScatterND Selu Shape Shrink Sigmoid Sign Sin Sinh Size Slice Softmax
Softplus Softsign SpaceToDepth Split Sqrt Squeeze Sub Sum Tan Tanh ThresholdedRelu Tile TopK Transpose Trilu Unsqueeze
Upsample Where Xor
"""
_TENSORRT_10 = frozenset(_NAMES.split())
"""Standard operators that the ONNX parser library of TensorRT 10.6.0, the oldest version we support, says it imports
(IParser::supportsOperator, asked for every operator of ONNX 1.23; tests/test_targets.py asks again). Restrictions of
types and constant inputs are not in it: building tells."""
_TENSORRT_11 = _TENSORRT_10 | {"Attention", "DFT", "RMSNormalization", "RotaryEmbedding", "Swish", "TensorScatter"}
"""The same of TensorRT 11.2.1."""
OPERATORS = {"tensorrt-10": _TENSORRT_10, "tensorrt-11": _TENSORRT_11}
_OPSET = {"tensorrt-10": 23, "tensorrt-11": 24}
"""The highest opset: of graphs from which engines of 10.x were built in tests/gpu; for 11.x the one before 25, which
NVIDIA's release notes add in 11.5. Parsers go by the names of operators and say nothing about a higher opset."""


def check_target(target: str | None) -> None:
    """Raise HqmqError unless this is None or one of TARGETS."""
    if target is not None and target not in TARGETS:
        raise HqmqError(f"unknown target '{target}': use {', '.join(TARGETS)}")


def wants_bodies(target: str | None) -> bool:
    """Whether function bodies of our operators may stay: TensorRT before 10.13 takes them for the plugins."""
    return target != "tensorrt-10"


def check_graph(model: ir.Model, target: str | None) -> None:
    """Refuse a graph that a version of TensorRT does not import.

    Raises:
        HqmqError: the opset is too high, or an operator is not imported; names the node.
    """
    if target not in OPERATORS:
        return
    opset = model.graph.opset_imports[""]
    if opset > _OPSET[target]:
        raise HqmqError(
            f"the graph has opset {opset}; --target {target} goes up to {_OPSET[target]}: export the decoder with a "
            "lower opset, or leave --target out"
        )
    for node in model.graph.all_nodes():
        if node.domain == contract.DOMAIN:
            continue
        if node.domain or node.op_type not in OPERATORS[target]:
            kind = f"{node.domain}::{node.op_type}" if node.domain else node.op_type
            raise HqmqError(
                f"node '{node.name}': {target} does not import the operator {kind}; for a runtime that does, leave "
                "--target out or name another"
            )


def try_file(path: Path, target: str | None) -> None:
    """Open a written file in ONNX Runtime, on the CPU, if that is the target.

    Raises:
        HqmqError: the ONNX Runtime of this machine refuses it; the message is its own, which names the node.
    """
    if target == "ort":
        import onnxruntime

        from hqmq_trt import ort_library

        level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL  # no second copy of the weights
        try:
            ort_library.session(path, threads=1, log_severity=4, graph_optimization_level=level)
        except HqmqError as error:
            raise HqmqError(f"--target ort: {str(error).removeprefix(f'{path}: ')}") from error
