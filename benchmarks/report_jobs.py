"""Single jobs of benchmarks/gpu_report.py, each in a process of its own, so that one failure stays one failure.

``python -m benchmarks.report_jobs JOB ARGUMENTS.json RESULT.json``; arguments and result are JSON objects. Jobs with
``cases`` load a model once for several results, and write each as soon as it is there.
"""

from __future__ import annotations

import gc
import json
import os
import resource
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Result = dict[str, Any]
DTYPE = "float16"
MEMORY_CASES = ((1, 2048), (4, 4096), (8, 32768))
"""Sequences and tokens at which the cache's device memory is compared with the prediction."""


def convert(model: str, gguf_file: str | None, output: str) -> Result:
    """A checkpoint as float16 safetensors with its tokenizer, loaded once for all exports."""
    from hqmq_trt.export.source import load

    started = time.monotonic()
    source = load(model, DTYPE, gguf_file)
    # A GGUF model is de-quantised on loading, but transformers keeps refusing to save it.
    source.model.hf_quantizer = None
    if hasattr(source.model.config, "quantization_config"):
        del source.model.config.quantization_config
    source.model.save_pretrained(output)
    if source.tokenizer is not None:
        source.tokenizer.save_pretrained(output)
    return {"seconds": time.monotonic() - started, "parameters": source.model.num_parameters()}


Case = dict[str, Any]
"""Arguments of one case of a batch; ``result``: the file for its result, which appears when the case is done."""


def finish(case: Case, started: float, result: Result) -> None:
    """Write the result of a case, with ``ok`` and ``seconds``, as a whole."""
    path = Path(case["result"])
    part = path.with_suffix(".part")
    part.write_text(json.dumps({"ok": True, **result, "seconds": time.monotonic() - started}), encoding="utf-8")
    part.replace(path)


def attempt(case: Case, work: Callable[[], Result]) -> bool:
    """Do the work of a case and write its result or its exception; whether it went well."""
    started = time.monotonic()
    try:
        result = work()
    except Exception as error:
        traceback.print_exc()
        finish(case, started, {"ok": False, "error": f"{type(error).__name__}: {' '.join(str(error).split())[:600]}"})
        return False
    finish(case, started, result)
    return True


def export(model: str, cases: list[Case], jobs: int) -> Result:
    """ONNX folders of one model, `jobs` at a time: the work is Python on one core, so each has a fork of this process,
    which has imported torch and loaded the model. Nothing here may start a thread pool before: forks would hang."""
    import torch

    from hqmq_trt.export import export_model
    from hqmq_trt.export.source import load

    torch.set_num_threads(1)
    source = load(model, DTYPE)
    source.model.config.name_or_path = source.name

    def work(case: Case) -> Result:
        options = {"mode": case["mode"], "dtype": DTYPE, "overwrite": True, "tokenizer": source.tokenizer}
        manifest = export_model(source.model, case["output"], case["scheme"], **options)
        used = resource.getrusage(resource.RUSAGE_SELF)
        size = sum(file.size for file in manifest.files)
        return {"bytes": size, "peak_bytes": used.ru_maxrss << 10, "cpu_seconds": used.ru_utime + used.ru_stime}

    gc.freeze()  # what forks share is not to be touched by their collections
    waiting, running = list(cases), dict[int, Case]()
    while waiting or running:
        while waiting and len(running) < jobs:
            case = waiting.pop(0)
            sys.stdout.flush()
            sys.stderr.flush()
            if (child := os.fork()) == 0:
                status = 1
                try:
                    status = int(not attempt(case, partial(work, case)))
                finally:
                    sys.stderr.flush()
                    os._exit(status)
            running[child] = case
        child, status = os.wait()
        case = running.pop(child)
        if not Path(case["result"]).is_file():
            finish(case, time.monotonic(), {"ok": False, "error": f"the export ended with status {status}"})
    return {"cases": len(cases)}


def engine(model: str, output: str, max_batch: int, max_context: int, prefill_chunk: int, timing_cache: str) -> Result:
    """An engine folder; parallel builds share the timing cache, which is replaced as a whole."""
    from hqmq_trt.engine.builder import build_engine

    started = time.monotonic()
    made = build_engine(
        model,
        output,
        max_batch=max_batch,
        max_context=max_context,
        prefill_chunk=prefill_chunk,
        timing_cache=timing_cache,
        overwrite=True,
    )
    return {
        "seconds": time.monotonic() - started,
        "build_seconds": made.build_seconds,
        "plan_bytes": made.plan_size,
        "scratch_bytes": made.device_memory_bytes,
        "tensorrt": made.tensorrt_version,
    }


class TorchModel:
    """A model on the GPU with an HqmqCache of its own."""

    def __init__(self, model: Any, scheme: str, fused: bool, max_length: int) -> None:
        from hqmq_trt.cache import HqmqCache

        self._model = model
        if fused:
            self._cache = HqmqCache.for_model(model, scheme, max_length=max_length)
        else:
            self._cache = HqmqCache(model.config, scheme, max_length=max_length)

    def __call__(self, tokens: Sequence[int]) -> NDArray[np.float32]:
        """Logits [V] after appending tokens."""
        import torch

        with torch.no_grad():
            ids = torch.tensor([list(tokens)], device=self._model.device)
            logits = self._model(ids, past_key_values=self._cache, use_cache=True, logits_to_keep=1).logits
        found: NDArray[np.float32] = logits[0, -1].float().cpu().numpy()
        return found


def follow(
    step: Callable[[Sequence[int]], NDArray[np.float32]],
    prompt: Sequence[int],
    count: int,
    given: Sequence[int] | None = None,
) -> tuple[list[int], NDArray[np.float32]]:
    """`count` tokens after the prompt, the likeliest each time, and the logits [count, V] they were drawn from.

    With `given` (teacher forcing) those tokens are fed instead; what is returned is still the likeliest.
    """
    logits = np.array(step(prompt), np.float32)
    tokens, rows = [], []
    for i in range(count):
        rows.append(logits)
        tokens.append(int(logits.argmax()))
        if i + 1 < count:
            logits = np.array(step([tokens[-1] if given is None else given[i]]), np.float32)
    return tokens, np.stack(rows)


def compare_logits(reference: NDArray[np.float32], found: NDArray[np.float32]) -> Result:
    """Largest difference, mean KL divergence and share of equal likeliest tokens; both [N, V], of the same tokens."""
    # in float64: a mean KL of 1e-7 is below what float32 can tell
    p, q = (x.astype(np.float64) - x.max(1, keepdims=True) for x in (reference, found))
    p, q = (x - np.log(np.exp(x).sum(1, keepdims=True)) for x in (p, q))
    return {
        "max_abs_difference": float(np.abs(found - reference).max()),
        "mean_kl": float((np.exp(p) * (p - q)).sum(1).mean()),
        "top1": float((found.argmax(1) == reference.argmax(1)).mean()),
    }


def text(model: str, prompt: str, count: int, cases: list[Case]) -> Result:
    """Greedy texts of engines of one model against PyTorch, which is loaded once."""
    import torch

    from hqmq_trt import cuda
    from hqmq_trt.export.source import load
    from hqmq_trt.torch_ops import TORCH_CUDA_VARIABLE

    if not cuda.available():
        os.environ[TORCH_CUDA_VARIABLE] = "1"  # plain torch kernels: slow, the same operators
    network = load(model, DTYPE).model.cuda().eval()
    for case in cases:
        attempt(case, partial(one_text, case["engine"], network, prompt, count))
        gc.collect()
        torch.cuda.empty_cache()  # a float32 copy of the model may have been there
    return {"cases": len(cases)}


def one_text(engine: str, network: Any, prompt: str, count: int) -> Result:
    """Greedy text of an engine against PyTorch with the same HqmqCache (hqmq_trt.diff.greedy)."""
    from benchmarks.gpu_kernels import decode_kernels, launches
    from hqmq_trt import cuda
    from hqmq_trt.balance import balanced_like
    from hqmq_trt.diff.greedy import greedy
    from hqmq_trt.manifest import Manifest
    from hqmq_trt.runtime.tokenizer import Tokenizer
    from hqmq_trt.runtime.trt_session import TrtSession

    manifest = Manifest.load(engine)
    tokenizer = Tokenizer(Path(engine), manifest)
    ids = list(tokenizer.encode(prompt))
    with TrtSession(engine, max_batch=1) as session:
        check = greedy(network, session, ids, count)

        def step(tokens: Sequence[int]) -> NDArray[np.float32]:
            return session.append([list(tokens)])[0]

        session.reset()
        started = time.perf_counter()
        free, _ = follow(step, ids, count)
        seconds = time.perf_counter() - started
        reference = TorchModel(network, manifest.scheme, manifest.mode == "fused", len(ids) + count)
        with balanced_like(network, manifest):
            wanted, logits = follow(reference, ids, count)
        session.reset()
        _, forced = follow(step, ids, count, wanted)
        # Kernels that ran, of a step by the CUDA graph and of a chunk: last, as the profiler stays in the process.
        ran = decode_kernels(lambda: session.append([[ids[0]]]), manifest, 1, session.num_pages)
        session.reset()
        ran["prefill"] = launches(lambda: session.append([ids]))
    problem = None if check.passed else str(check)
    if ran.get("as_said") is False:
        problem = f"attention ran in {ran['launches']} instead of one kernel a layer, path {ran['path']} {ran['why']}"
    return {
        **({} if problem is None else {"ok": False, "error": problem}),
        "kernels": ran,
        **check.document(),
        **compare_logits(logits, forced),
        "verdict": str(check),
        "prompt_tokens": len(ids),
        "torch_kernels": "libhqmq_cuda" if cuda.available() else "plain torch",
        "engine_seconds": seconds,
        "text": tokenizer.decode(free),
        "torch_text": tokenizer.decode(wanted),
    }


def memory(engines: dict[str, str]) -> Result:
    """Device bytes of caches against `hqmq-trt memory`: as allocated, as a session says, and as CUDA counts them."""
    from hqmq_trt.format import cache_bytes
    from hqmq_trt.manifest import Manifest
    from hqmq_trt.runtime.cuda_driver import Device
    from hqmq_trt.runtime.trt_buffers import CacheArena
    from hqmq_trt.runtime.trt_session import TrtSession

    device = Device.get()
    stream = device.stream()
    rows: list[Result] = []
    for name, folder in engines.items():
        manifest = Manifest.load(folder)
        layer, scheme = manifest.layers[0], manifest.parsed_scheme

        def predicted(batch: int, context: int) -> int:
            sizes = (len(manifest.layers), layer.num_kv_heads, layer.head_dim, context, batch)  # noqa: B023
            by_kind = cache_bytes(scheme, *sizes)  # noqa: B023
            return sum(size for kind, size in by_kind.items() if kind != "codebooks")

        for batch, context in MEMORY_CASES:
            before = device.memory()[0]
            arena = CacheArena(device, stream, manifest.cache(batch, -(-context // manifest.page_size)))
            by_cuda = before - device.memory()[0]
            rows.append(
                {
                    "engine": name,
                    "batch": batch,
                    "context": context,
                    "predicted": predicted(batch, context),
                    "allocated": arena.nbytes,
                    "by_cuda": by_cuda,
                }
            )
            arena.free()
        with TrtSession(folder, verify=False) as session:
            expected = predicted(session.max_batch, session.max_context)
            sizes = session.device_nbytes()
        rows.append(
            {
                "engine": name,
                "batch": session.max_batch,
                "context": session.max_context,
                "predicted": expected,
                "allocated": sizes["cache"],
                "by_cuda": None,
                "session": sizes,
            }
        )
    for row in rows:
        row["error"] = row["allocated"] / row["predicted"] - 1
    fits = all(abs(row["error"]) <= 0.01 for row in rows)
    return {"rows": rows, "ok": fits, "error": None if fits else "more than 1 % from the prediction"}


def addresses(engine: str, steps: int) -> Result:
    """Addresses bound to past and present, and time of a decode step when only the capacity of the cache changes."""
    import statistics

    from hqmq_trt.engine.manifest import EngineManifest
    from hqmq_trt.runtime.trt_session import TrtSession

    rows: list[Result] = []
    same = True
    limit = EngineManifest.load(engine).max_context
    for share in (4, 2, 1):
        with TrtSession(engine, max_context=limit // share, verify=False) as session:
            batch = session.max_batch
            session.append([[1, 2, 3]] * batch)
            session.decode([1] * batch)  # the first of a batch size captures the graph
            times, host = [], []
            for _ in range(steps):
                session.lengths[:] = 3
                session.reset_host_time()
                start = time.perf_counter()
                session.decode([1] * batch)
                times.append(time.perf_counter() - start)
                host.append(session.host_seconds)
            pairs = session.cache_addresses(batch)
            same &= all(past == present for past, present in pairs.values())
            row: Result = {
                "capacity": session.max_context,
                "batch": batch,
                "cache_bytes": session.device_nbytes()["cache"],
            }
            row |= {"step_us": 1e6 * statistics.median(times), "tensors": len(pairs)}
            row["host_us"] = 1e6 * statistics.median(host)
            rows.append(row)
    return {"rows": rows, "ok": same, "error": None if same else "past and present have different addresses"}


def sample(engine: str, build: str, cmake: list[str], prompt: str, count: int) -> Result:
    """Build samples/cpp against the TensorRT that Python uses; its greedy tokens must be the session's."""
    import subprocess

    from hqmq_trt.engine.plugin_library import find_plugin_library
    from hqmq_trt.manifest import Manifest
    from hqmq_trt.runtime.tokenizer import Tokenizer
    from hqmq_trt.runtime.trt_engine import tensorrt_library
    from hqmq_trt.runtime.trt_session import TrtSession

    ids = list(Tokenizer(Path(engine), Manifest.load(engine)).encode(prompt))
    with TrtSession(engine, max_batch=1) as session:
        wanted, _ = follow(lambda tokens: session.append([list(tokens)])[0], ids, count)
    configure = ["cmake", "-S", "samples/cpp", "-B", build, f"-DTensorRT_LIBRARY={tensorrt_library()}", *cmake]
    for command in (configure, ["cmake", "--build", build]):
        subprocess.run(command, check=True, stdout=sys.stderr)
    program = [f"{build}/hqmq_decode", engine, str(find_plugin_library()), "-n", str(count)]
    done = subprocess.run([*program, "--tokens", ",".join(map(str, ids))], capture_output=True, text=True, check=False)
    sys.stderr.write(done.stderr)
    found = [int(word) for word in done.stdout.split()] if done.returncode == 0 else []
    same = found == wanted
    problem = None if same else f"exit code {done.returncode}, or tokens that differ from the Python session's"
    return {"ok": same, "error": problem, "tokens": len(found), "speed": done.stderr.strip()}


JOBS: dict[str, Callable[..., Result]] = {
    job.__name__: job for job in (convert, export, engine, text, memory, addresses, sample)
}


def main() -> None:
    """Run one job; the result file appears only if it succeeds."""
    name, arguments, result = sys.argv[1:]
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TQDM_DISABLE", "1")
    found = JOBS[name](**json.loads(Path(arguments).read_text(encoding="utf-8")))
    Path(result).write_text(json.dumps(found), encoding="utf-8")


if __name__ == "__main__":
    main()
