"""hqmq-trt: an LLM KV cache of quaternion codes for TensorRT and ONNX Runtime (HQMQ, arXiv 2605.27646)."""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("hqmq-trt")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
