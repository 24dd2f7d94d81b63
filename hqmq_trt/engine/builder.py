"""`hqmq-trt build`: an exported model folder to a TensorRT engine folder, or nothing at all."""

from __future__ import annotations

import logging
import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqmq_trt import __version__
from hqmq_trt.engine import timing_cache as timing_cache_file
from hqmq_trt.engine.device import Gpu, current_gpu
from hqmq_trt.engine.manifest import PLAN_FILE, EngineManifest
from hqmq_trt.engine.network import Graph, parse, read_graph
from hqmq_trt.engine.plugin_library import load_plugin_library
from hqmq_trt.engine.profiles import Limits, profile_shapes
from hqmq_trt.engine.progress import BuildProgress, monitor
from hqmq_trt.engine.versions import check_tensorrt
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest, record_file
from hqmq_trt.output_folder import check_output, new_folder

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Options:
    strip_weights: bool
    version_compatible: bool
    lean_runtime: bool
    workspace_limit: int | None
    optimization_level: int | None


def build_engine(
    model_folder: str | Path,
    output: str | Path,
    *,
    max_batch: int = 1,
    max_context: int = 4096,
    prefill_chunk: int = 512,
    timing_cache: str | Path | None = None,
    overwrite: bool = False,
    strip_weights: bool = False,
    version_compatible: bool = False,
    lean_runtime: bool = False,
    workspace_limit: int | None = None,
    optimization_level: int | None = None,
    progress: BuildProgress | None = None,
    note: Callable[[str], None] | None = None,
) -> EngineManifest:
    """Build a TensorRT engine from an exported folder, on the GPU of this machine.

    Args:
        model_folder: a folder that `hqmq-trt export` wrote.
        output: the engine folder to make. It appears complete or not at all.
        max_batch: sequences at most.
        max_context: tokens a sequence at most; rounded up to whole pages.
        prefill_chunk: tokens of a sequence in one prefill run at most.
        timing_cache: file of TensorRT's timing cache; None: one per TensorRT version and GPU under ``~/.cache``.
        overwrite: replace `output` if hqmq-trt wrote it.
        strip_weights: leave the weights out of the plan; they are read from the ONNX file when the engine is loaded.
        version_compatible: let later TensorRT releases of the same major version run the plan.
        lean_runtime: put TensorRT's lean runtime into a version-compatible plan.
        workspace_limit: bytes of scratch memory that a layer may use; None: TensorRT's own limit.
        optimization_level: 0 (fast build) … 5 (longest search); None: TensorRT's default.
        progress: told of the build's phases.
        note: called with remarks for people; None: they go to the log.

    Raises:
        HqmqError: a folder, limit, library, TensorRT version or GPU that does not fit, or TensorRT's own reasons.
    """
    folder, output = Path(model_folder), Path(output)
    options = _Options(strip_weights, version_compatible, lean_runtime, workspace_limit, optimization_level)
    _check_options(options)
    manifest = Manifest.load(folder)
    if manifest.engine_file is not None:
        raise HqmqError(f"{folder}: is an engine already; give the folder that `hqmq-trt export` wrote")
    limits = Limits.of(manifest, max_batch, max_context, prefill_chunk)
    check_output(output, overwrite)
    if output.resolve() == folder.resolve():
        raise HqmqError(f"{output}: is the model's own folder; choose another output")
    trt = check_tensorrt()
    gpu = current_gpu()
    graph = read_graph(folder, manifest)
    cache = Path(timing_cache) if timing_cache else timing_cache_file.default_path(str(trt.__version__), gpu.name)
    with new_folder(output) as made:
        plan, seconds, memory = _build(trt, gpu, graph, limits, options, cache, progress, note or _LOG.warning)
        (made / PLAN_FILE).write_bytes(plan)
        engine = record_file(made, PLAN_FILE, "engine")
        tokenizer = [file for file in manifest.files if file.purpose == "tokenizer"]
        for file in tokenizer:
            (made / file.name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(folder / file.name, made / file.name)
        Manifest.model_validate({**dict(manifest), "files": [engine, *tokenizer]}).save(made)
        result = EngineManifest(
            hqmq_trt_version=__version__,
            tensorrt_version=str(trt.__version__),
            gpu_name=gpu.name,
            compute_capability=gpu.compute_capability,
            max_batch=limits.max_batch,
            max_context=limits.max_context,
            prefill_chunk=limits.prefill_chunk,
            page_size=limits.page_size,
            build_seconds=round(seconds, 3),
            device_memory_bytes=memory,
            plan_size=engine.size,
            plan_sha256=engine.sha256,
            source_model=[file for file in manifest.files if file.purpose in ("model", "weights")],
            weight_stripped=strip_weights,
            model_folder=os.path.relpath(folder.resolve(), output.resolve()) if strip_weights else None,
            version_compatible=version_compatible,
            lean_runtime=lean_runtime,
        )
        result.save(made)
    return result


def _check_options(options: _Options) -> None:
    level, workspace = options.optimization_level, options.workspace_limit
    if level is not None and not 0 <= level <= 5:
        raise HqmqError(f"optimization_level {level} is not in 0…5")
    if workspace is not None and workspace < 1:
        raise HqmqError(f"workspace_limit must be at least 1 byte, not {workspace}")
    if options.lean_runtime and not options.version_compatible:
        raise HqmqError("lean_runtime makes sense only with version_compatible")


def _build(
    trt: Any,
    gpu: Gpu,
    graph: Graph,
    limits: Limits,
    options: _Options,
    cache: Path,
    progress: BuildProgress | None,
    note: Callable[[str], None],
) -> tuple[Any, float, list[int]]:
    """(plan, seconds, scratch memory of the two profiles in bytes)."""
    from hqmq_trt.runtime.trt_engine import trt_log

    log = trt_log()
    log.errors.clear()
    load_plugin_library(log)
    builder = _made(trt.Builder(log), log, "make a builder")
    network, parser = parse(trt, builder, log, graph)
    config = _made(builder.create_builder_config(), log, "make a builder config")
    _configure(trt, config, options)
    for decode in (True, False):
        _add_profile(builder, config, graph, limits.dimensions(decode), log)
    watch = monitor(trt, progress)
    config.progress_monitor = watch
    attached = timing_cache_file.attach(config, cache, note)
    log.errors.clear()
    start = time.monotonic()
    plan = builder.build_serialized_network(network, config)
    seconds = time.monotonic() - start
    if watch.interrupted:
        raise KeyboardInterrupt
    if plan is None:
        raise HqmqError(_failure(gpu, limits, log))
    try:
        timing_cache_file.save(config, cache)
    except HqmqError as error:
        note(str(error))  # the engine is what was asked for
    del attached, config, parser, network, builder  # their memory is needed for the engine
    return plan, seconds, _scratch_memory(trt, plan, options, gpu, limits, log)


def _configure(trt: Any, config: Any, options: _Options) -> None:
    # Without it TensorRT refuses plugins whose outputs share the memory of inputs: the cache in place.
    config.set_preview_feature(trt.PreviewFeature.ALIASED_PLUGIN_IO_10_03, True)
    config.clear_flag(trt.BuilderFlag.TF32)  # float32 in the graph means float32
    if options.strip_weights:
        config.set_flag(trt.BuilderFlag.STRIP_PLAN)
        config.set_flag(trt.BuilderFlag.REFIT_IDENTICAL)
    if options.version_compatible:
        config.set_flag(trt.BuilderFlag.VERSION_COMPATIBLE)
        if not options.lean_runtime:
            config.set_flag(trt.BuilderFlag.EXCLUDE_LEAN_RUNTIME)
    if options.workspace_limit is not None:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace_limit)
    if options.optimization_level is not None:
        config.builder_optimization_level = options.optimization_level


def _add_profile(builder: Any, config: Any, graph: Graph, dimensions: dict[str, Any], log: Any) -> None:
    profile = builder.create_optimization_profile()
    for name, (least, best, most) in profile_shapes(graph.inputs, dimensions).items():
        try:
            profile.set_shape(name, least, best, most)
        except ValueError as error:
            raise HqmqError(f"TensorRT refuses the shapes {least}…{most} of '{name}': {error}") from error
    if config.add_optimization_profile(profile) < 0:
        raise HqmqError(f"TensorRT refuses an optimisation profile: {_reasons(log)}")


def _scratch_memory(trt: Any, plan: Any, options: _Options, gpu: Gpu, limits: Limits, log: Any) -> list[int]:
    """Scratch memory by profile, read off the engine: loading it once also shows that it can be loaded."""
    log.errors.clear()
    runtime = _made(trt.Runtime(log), log, "make a runtime")
    if options.version_compatible and options.lean_runtime:
        runtime.engine_host_code_allowed = True
    engine = runtime.deserialize_cuda_engine(plan)
    if engine is None:
        raise HqmqError(f"TensorRT built an engine that it cannot load: {_failure(gpu, limits, log)}")
    of_profile = getattr(engine, "get_device_memory_size_for_profile_v2", None)
    of_profile = of_profile or engine.get_device_memory_size_for_profile
    return [int(of_profile(profile)) for profile in range(engine.num_optimization_profiles)]


def _made(thing: Any, log: Any, what: str) -> Any:
    if thing is None:
        raise HqmqError(f"TensorRT cannot {what}: {_reasons(log)}")
    return thing


def _failure(gpu: Gpu, limits: Limits, log: Any) -> str:
    reasons = _reasons(log)
    if "memory" in reasons.lower():
        return (
            f"{gpu.name} ({gpu.memory / 1e9:.0f} GB) has too little free memory for max_batch={limits.max_batch}, "
            f"max_context={limits.max_context}, prefill_chunk={limits.prefill_chunk}: {reasons}; lower one of them, or "
            "free the GPU"
        )
    return f"TensorRT cannot build the engine: {reasons}"


def _reasons(log: Any) -> str:
    """TensorRT's errors since the last clear, in one line."""
    errors = list(dict.fromkeys(log.errors))
    log.errors.clear()
    return "; ".join(errors[-3:])[:1200] or "it gave no reason; see the log with --verbose"
