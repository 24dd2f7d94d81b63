"""Weights for a weight-stripped engine, from the ONNX file it was built of."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hqmq_trt.engine.manifest import EngineManifest
from hqmq_trt.engine.network import engine_model
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import file_digest


def model_folder(engine_folder: str | Path, manifest: EngineManifest) -> Path:
    """Folder of the ONNX file that a weight-stripped engine takes its weights from.

    Raises:
        HqmqError: the files are not there, or are not those that the engine was built of.
    """
    folder = (Path(engine_folder).resolve() / (manifest.model_folder or ".")).resolve()
    for file in manifest.source_model:
        path = folder / file.name
        if not path.is_file():
            raise HqmqError(
                f"{engine_folder}: the engine holds no weights and {path} is missing; put the exported model there, or "
                "build the engine again without --strip-weights"
            )
        if path.stat().st_size != file.size or file_digest(path) != file.sha256:
            raise HqmqError(
                f"{path}: is not the file that the engine {engine_folder} was built of; build the engine again"
            )
    return folder


def refit_engine(engine: Any, engine_folder: str | Path, manifest: EngineManifest) -> None:
    """Give a deserialised weight-stripped engine its weights. Contexts must be made afterwards.

    Raises:
        HqmqError: the ONNX file is missing or another one, or TensorRT refuses it.
    """
    import tensorrt as trt

    from hqmq_trt.runtime.trt_engine import take_errors, trt_log

    folder = model_folder(engine_folder, manifest)
    path = folder / next(file.name for file in manifest.source_model if file.purpose == "model")
    model = engine_model(path)
    log = trt_log()
    log.errors.clear()
    refitter = trt.Refitter(engine, log)
    parser = trt.OnnxParserRefitter(refitter, log)
    done = parser.refit_from_bytes(model.SerializeToString(), str(path))
    if not done or not refitter.refit_cuda_engine():
        raise HqmqError(f"{engine_folder}: TensorRT cannot take the weights of {path}: {take_errors()}")
