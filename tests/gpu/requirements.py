"""What tests need of a machine with a GPU."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from hqmq_trt import cuda
from hqmq_trt.errors import HqmqError

KERNEL_TESTS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.skipif(not cuda.available(), reason="libhqmq_cuda.so is not built"),
]
"""Marks of tests that call the kernels through libhqmq_cuda.so."""

QUICK = 1
"""TensorRT's optimisation level for engines of tests: what they compute is tried, not how fast."""


def missing(*packages: str) -> str:
    """Why tests that need a GPU, these Python packages and the plugin library cannot run here; empty if they can."""
    if not torch.cuda.is_available():
        return "no NVIDIA GPU"
    for package in packages:
        if importlib.util.find_spec(package) is None:
            return f"the Python package {package} is not installed"
    try:
        from hqmq_trt.engine.plugin_library import find_plugin_library

        find_plugin_library()
    except (ImportError, HqmqError) as error:
        return str(error)
    return ""
