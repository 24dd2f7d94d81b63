"""``hqmq-trt run``: generate text from an exported folder."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Group
from rich.live import Live
from rich.text import Text

from hqmq_trt.cli.output import JsonFlag, Output, QuietFlag, VerboseFlag, size
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest


def run(
    folder: Annotated[Path, typer.Argument(help="Folder that `hqmq-trt export` or `build` wrote.")],
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="Repeatable: a batch.")] = None,
    prompt_file: Annotated[
        list[Path] | None, typer.Option("--prompt-file", help="A text file that is one prompt; repeatable.")
    ] = None,
    chat: Annotated[
        bool | None, typer.Option("--chat/--raw", help="Put prompts by the chat template [default: if there is one].")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=0)] = 128,
    temperature: Annotated[float, typer.Option(help="0: the most likely token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="0: all tokens.")] = 0,
    top_p: Annotated[float, typer.Option()] = 1.0,
    seed: Annotated[int, typer.Option(help="Prompt i draws from seed + i.")] = 0,
    max_context: Annotated[int | None, typer.Option(help="Tokens of a sequence [default: what is needed].")] = None,
    max_batch: Annotated[
        int | None, typer.Option(help="Prompts at a time; others wait [default: all, or the engine's limit].")
    ] = None,
    prefill_chunk: Annotated[
        int | None, typer.Option(help="Prompt tokens of a sequence in one run [default: 512, or the engine's limit].")
    ] = None,
    threads: Annotated[int, typer.Option(help="0: let ONNX Runtime choose; an engine has no use for it.")] = 0,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Generate text; several prompts run as one batch, with ONNX Runtime or on an engine with TensorRT."""
    from hqmq_trt.engine.manifest import EngineManifest
    from hqmq_trt.runtime import open_session
    from hqmq_trt.runtime.generate import Request, generate
    from hqmq_trt.runtime.sampling import Sampling
    from hqmq_trt.runtime.tokenizer import Tokenizer

    output = Output(json_mode, quiet, verbose)
    sampling = Sampling(temperature, top_k, top_p, seed)
    manifest = Manifest.load(folder)
    tokenizer = Tokenizer(folder, manifest)
    texts = _prompts(prompt, prompt_file)
    framed = tokenizer.has_chat_template if chat is None else chat
    stop = frozenset(manifest.eos_token_ids)
    requests = [
        Request(tokenizer.encode(text, framed), max_new_tokens, replace(sampling, seed=seed + i), stop)
        for i, text in enumerate(texts)
    ]
    needed = max(request.cache_tokens for request in requests)
    if max_context is not None and max_context < 1:
        raise HqmqError(f"--max-context {max_context} must be at least 1")
    if needed > manifest.max_position:
        output.note(f"note: {needed} tokens exceed the {manifest.max_position} this model was trained for")

    batch = len(requests) if max_batch is None else max_batch
    if max_batch is None and EngineManifest.is_engine(folder):
        batch = min(batch, EngineManifest.load(folder).max_batch)
    with open_session(folder, batch, max_context or max(needed, 1), prefill_chunk, threads) as session:
        screen = _Screen(output, tokenizer, session, len(requests), sum(len(r.prompt) for r in requests))
        with screen:
            generation = generate(session, requests, screen.on_token, screen.on_prefill)
        cache = session.cache_nbytes()
    timing = generation.timing
    output.result(
        {
            "folder": str(folder),
            "scheme": manifest.scheme,
            "completions": [
                {
                    "prompt_tokens": len(request.prompt),
                    "tokens": completion.tokens,
                    "text": tokenizer.decode(completion.tokens),
                    "finish_reason": completion.finish_reason,
                }
                for request, completion in zip(requests, generation.completions, strict=True)
            ],
            "cache_bytes": sum(cache.values()),
            "cache_bytes_by_kind": cache,
            "codebook_bytes": session.codebook_nbytes(),
            "max_context": session.max_context,
            "prefill_tokens_per_second": timing.prefill_rate,
            "decode_tokens_per_second": timing.decode_rate,
        }
    )
    output.note(
        f"{manifest.scheme}: {timing.prompt_tokens} prompt tokens at {timing.prefill_rate:.0f}/s, "
        f"{sum(len(c.tokens) for c in generation.completions)} new at {timing.decode_rate:.1f}/s, "
        f"cache {size(sum(cache.values()))} for {session.max_batch} x {session.max_context} tokens"
    )


def _prompts(prompts: list[str] | None, files: list[Path] | None) -> list[str]:
    texts = list(prompts or ())
    for path in files or ():
        try:
            texts.append(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise HqmqError(f"--prompt-file {path}: cannot be read as UTF-8 text ({error})") from None
    if texts:
        return texts
    if sys.stdin.isatty():
        raise HqmqError("no prompt: give --prompt, --prompt-file, or text on standard input")
    return [sys.stdin.read()]


class _Screen:
    """Streams text to stdout: at once for one prompt, in order once complete for a batch; status on stderr."""

    def __init__(self, output: Output, tokenizer: Any, session: Any, batch: int, prompt_tokens: int) -> None:
        from hqmq_trt.runtime.tokenizer import TextStream

        self._output, self._session, self._batch, self._prompt_tokens = output, session, batch, prompt_tokens
        self._streams = [TextStream(tokenizer) for _ in range(batch)]
        self._texts = [""] * batch
        self._read = self._new = 0
        self._start = 0.0
        shown = output.err.is_terminal and not output.quiet and not output.json_mode
        # While a live display runs, text goes through it; otherwise straight to stdout.
        self._live = Live(console=output.err, refresh_per_second=8, transient=True) if shown else None

    def __enter__(self) -> _Screen:
        if self._live:
            self._live.start()
        return self

    def __exit__(self, failed: type[BaseException] | None, *_: object) -> None:
        if self._live:
            self._live.stop()
        for b, stream in enumerate(self._streams):
            self._write(b, stream.finish())
        if failed or self._output.json_mode:
            return
        if self._batch > 1 or self._live:
            for b, text in enumerate(self._texts):
                if self._batch > 1:
                    sys.stdout.write(f"--- prompt {b} ---\n")
                sys.stdout.write(text + "\n")
        else:
            sys.stdout.write("\n")
        sys.stdout.flush()

    def on_prefill(self, tokens: int) -> None:
        self._read = tokens
        self._refresh()

    def on_token(self, request: int, token: int) -> None:
        self._start = self._start or time.perf_counter()
        self._new += 1
        self._write(request, self._streams[request].push(token))
        self._refresh()

    def _write(self, request: int, piece: str) -> None:
        self._texts[request] += piece
        if self._batch == 1 and not self._live and not self._output.json_mode:
            sys.stdout.write(piece)
            sys.stdout.flush()

    def _refresh(self) -> None:
        if not self._live:
            return
        seconds = time.perf_counter() - self._start if self._start else 0.0
        rate = f"{(self._new - self._batch) / seconds:.1f} tokens/s" if self._new > self._batch else "…"
        status = Text(
            f"prompt {self._read}/{self._prompt_tokens}   new {self._new}   {rate}   "
            f"cache {size(sum(self._session.cache_nbytes().values()))}",
            style="dim",
        )
        room = max(max(self._output.err.size.height - 2, 4) // self._batch, 1)
        tails = [Text("\n".join(text.splitlines()[-room:])) for text in self._texts if text]
        self._live.update(Group(*tails, status))
