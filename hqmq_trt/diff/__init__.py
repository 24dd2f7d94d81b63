"""Comparison of an exported model and its engine with the PyTorch source: logits, K and V by layer, greedy text."""

from hqmq_trt.diff.comparison import compare, open_runtimes
from hqmq_trt.diff.greedy import GreedyCheck, greedy
from hqmq_trt.diff.measures import LayerError, LogitComparison
from hqmq_trt.diff.result import DiffResult, DirectDiff, RuntimeDiff
from hqmq_trt.diff.stateless import StatelessCheck

__all__ = [
    "DiffResult",
    "DirectDiff",
    "GreedyCheck",
    "LayerError",
    "LogitComparison",
    "RuntimeDiff",
    "StatelessCheck",
    "compare",
    "greedy",
    "open_runtimes",
]
