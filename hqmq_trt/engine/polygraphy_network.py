"""A network script for the `polygraphy` command: the TensorRT network of an exported folder, plugins loaded.

``HQMQ_MODEL=folder polygraphy run …/polygraphy_network.py --model-type trt-network-script --trt …``; docs/tensorrt.md
shows the whole command. Polygraphy's own ``--plugins`` opens a library and expects it to register itself, which ours
leaves to TensorRT's registry.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from hqmq_trt.engine.device import current_gpu
from hqmq_trt.engine.network import parse, read_graph
from hqmq_trt.engine.plugin_library import load_plugin_library
from hqmq_trt.engine.versions import check_tensorrt
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest

MODEL_VARIABLE = "HQMQ_MODEL"


def load_network() -> tuple[Any, Any, Any]:
    """(builder, network, parser) of the exported folder that the environment variable HQMQ_MODEL names.

    Raises:
        HqmqError: no such folder, no GPU, or whatever keeps TensorRT from parsing it.
    """
    from hqmq_trt.runtime.trt_engine import trt_log

    folder = os.environ.get(MODEL_VARIABLE)
    if not folder:
        raise HqmqError(f"set {MODEL_VARIABLE} to a folder that `hqmq-trt export` wrote")
    graph = read_graph(Path(folder), Manifest.load(folder))
    trt = check_tensorrt()
    current_gpu()  # TensorRT's builder would end the process without one
    log = trt_log()
    load_plugin_library(log)
    builder = trt.Builder(log)
    network, parser = parse(trt, builder, log, graph)
    return builder, network, parser
