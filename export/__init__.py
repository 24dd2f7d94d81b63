"""The compiler: a Hugging Face causal language model to an ONNX graph with an HQMQ cache (docs/export.md)."""

from __future__ import annotations

from .compile import MODES, Progress, export_model

__all__ = ["MODES", "Progress", "export_model"]
