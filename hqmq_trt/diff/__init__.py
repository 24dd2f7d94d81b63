"""Comparison of an exported model with its PyTorch source: logits by position, K and V by layer."""

from hqmq_trt.diff.comparison import DiffResult, compare
from hqmq_trt.diff.measures import LayerError, LogitComparison

__all__ = ["DiffResult", "LayerError", "LogitComparison", "compare"]
