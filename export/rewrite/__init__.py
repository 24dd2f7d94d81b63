"""From an existing ONNX decoder to one with an HQMQ cache (docs/export.md)."""

from __future__ import annotations

from .rewriting import Analysis, analyse, rewrite_model

__all__ = ["Analysis", "analyse", "rewrite_model"]
