"""TensorRT engines: building an engine folder from an exported model, and what is recorded about it."""

from __future__ import annotations

from hqmq_trt.engine.builder import build_engine
from hqmq_trt.engine.manifest import ENGINE_FILE, PLAN_FILE, EngineManifest
from hqmq_trt.engine.plugin_library import find_plugin_library, load_plugin_library

__all__ = ["ENGINE_FILE", "PLAN_FILE", "EngineManifest", "build_engine", "find_plugin_library", "load_plugin_library"]
