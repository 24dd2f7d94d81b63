"""ONNX function bodies of HqmqQuantize and HqmqDequantize."""

from __future__ import annotations

from .bodies import attach

__all__ = ["attach"]
