"""Loads the plugin library into the TensorRT of this process, with no GPU; prints what it found as JSON.

What plugins serialise is checked by tests/cpp alone: the bindings cannot call getFieldsToSerialize of C++ plugins.

``trt_load_probe.py CASES``: CASES is JSON, a list of [operator, attributes]. Run by test_trt_plugins.py.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import tensorrt as trt

from hqmq_trt.contract import DOMAIN, PLUGIN_VERSION
from hqmq_trt.engine.plugin_library import load_plugin_library


class Logger(trt.ILogger):
    """Keeps errors and warnings."""

    def __init__(self) -> None:
        trt.ILogger.__init__(self)
        self.texts: list[str] = []

    def log(self, severity: Any, text: str) -> None:
        if severity in (trt.ILogger.INTERNAL_ERROR, trt.ILogger.ERROR, trt.ILogger.WARNING):
            self.texts.append(text)


def fields_of(attributes: dict[str, Any], keep: list[Any]) -> Any:
    """Plugin fields; `keep` holds what they point to."""
    fields = []
    for name, value in attributes.items():
        real = isinstance(value, float)
        keep.append(np.array([value], np.float32 if real else np.int32))
        kind = trt.PluginFieldType.FLOAT32 if real else trt.PluginFieldType.INT32
        fields.append(trt.PluginField(name, keep[-1], kind))
    return trt.PluginFieldCollection(fields)


def main() -> None:
    """Load, create a plugin of every case for both phases, and one with a wrong attribute."""
    logger = Logger()
    load_plugin_library(logger)
    registry = trt.get_plugin_registry()
    creators = [creator for creator in registry.all_creators if creator.plugin_namespace == DOMAIN]
    plugins: list[list[bool]] = []
    keep: list[Any] = []
    for op_type, attributes in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        creator = registry.get_creator(op_type, PLUGIN_VERSION, DOMAIN)
        for phase in (trt.TensorRTPhase.BUILD, trt.TensorRTPhase.RUNTIME):
            plugin = creator.create_plugin("layer", fields_of(attributes, keep), phase)
            wrong = creator.create_plugin("layer", fields_of({**attributes, "page_size": 48}, keep), phase)
            plugins.append([plugin is not None, wrong is None])
    print(
        json.dumps(
            {
                "version": trt.__version__,
                "creators": [[c.name, c.plugin_version, [f.name for f in c.field_names]] for c in creators],
                "plugins": plugins,
                "log": logger.texts,
            }
        )
    )


if __name__ == "__main__":
    main()
