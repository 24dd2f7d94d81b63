"""Exports every architecture of tests.architectures, runs it in ONNX Runtime beside PyTorch, and writes the table.

    python -m tests.architecture_runs --markdown
    python -m tests.architecture_runs --engines engines.jsonl

write into docs/models.md what this machine finds, and what benchmarks.architectures_trt found on one with a GPU.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import tempfile
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
import transformers
from torch import Tensor

from hqmq_trt.balance import balanced_like
from hqmq_trt.cache import HqmqCache
from hqmq_trt.engine.network import engine_model
from hqmq_trt.errors import HqmqError
from hqmq_trt.export import export_model
from tests import test_engine_graphs as tensorrt_checks
from tests.architecture_tables import MODES, VERDICTS, Document, read_records
from tests.architectures import BY_NAME, VOCABULARY, Architecture
from tests.test_export import Exported, divergence

STEPS = ([19, 11, 3], [6, 1, 0], *([1, 1, 1],) * 32)
"""Tokens that each of three sequences gets in each call: prefill, a chunk, 32 single tokens."""
LOGIT_TOLERANCE, KL_TOLERANCE = 1e-4, 1e-4
_PAGE = 8


@dataclass
class Outcome:
    """What became of one architecture.

    Attributes:
        refused: the exporter's message, empty if it exported.
        logit_error: by mode, scheme fp16: largest |difference| of a logit from the original model, whose cache is
            rounded to float16 as ours is.
        rounding: by mode, scheme fp16: mean KL from the original model as it is, which shows what the rounding does.
        kl: by mode, scheme hq4: mean KL from PyTorch with the HqmqCache of the same mode.
        spread: standard deviation of the original's logits; a flat distribution would hide mistakes.
        tensorrt: by mode, what TensorRT 10.6 could not take, empty if nothing.
    """

    refused: str = ""
    logit_error: dict[str, float] = field(default_factory=dict)
    rounding: dict[str, float] = field(default_factory=dict)
    kl: dict[str, float] = field(default_factory=dict)
    spread: float = 0.0
    tensorrt: dict[str, str] = field(default_factory=dict)

    def verdicts(self) -> dict[str, str]:
        """``passes``, ``fails`` or ``refused`` by column of the table."""
        if self.refused:
            return dict.fromkeys(VERDICTS, "refused")
        ort = {
            f"ONNX Runtime, {mode}": self.logit_error[mode] < LOGIT_TOLERANCE and self.kl[mode] < KL_TOLERANCE
            for mode in MODES
        }
        trt = {f"TensorRT 10.6 parser, {mode}": not self.tensorrt[mode] for mode in MODES}
        return {name: "passes" if ok else "fails" for name, ok in {**ort, **trt}.items()}


class RoundedCache(transformers.DynamicCache):
    """The cache of transformers, holding K and V rounded to float16: all that scheme fp16 may change."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As DynamicCache."""
        return super().update(key_states.half().float(), value_states.half().float(), *args, **kwargs)


def tokens() -> np.ndarray:
    """Ids [3, most tokens of a sequence]."""
    return np.random.default_rng(5).integers(3, VOCABULARY, (len(STEPS[0]), np.sum(STEPS, 0).max()))


def run_exported(folder: Path) -> Tensor:
    """Logits [all tokens, V], sequence by sequence, of an export in ONNX Runtime: one batch, right-padded."""
    return torch.cat(Exported(folder).run(tokens(), STEPS))


def run_torch(model: Any, cache_of: Callable[[], Any]) -> Tensor:
    """The same through PyTorch, each sequence on its own and without padding."""
    parts, ids = [], tokens()
    for b in range(len(ids)):
        cache, done = cache_of(), 0
        for new in STEPS:
            if new[b]:
                piece = torch.from_numpy(ids[b : b + 1, done : done + new[b]])
                with torch.no_grad():
                    parts.append(model(input_ids=piece, past_key_values=cache, use_cache=True).logits[0])
                done += new[b]
    return torch.cat(parts)


def tensorrt_problem(path: Path) -> str:
    """What the checks of tests.test_engine_graphs say about a graph, as the engine builder hands it on."""
    model = onnx.shape_inference.infer_shapes(engine_model(path), check_type=True, strict_mode=False)
    for name in dir(tensorrt_checks):
        if name.startswith("test_"):
            try:
                getattr(tensorrt_checks, name)(model)
            except AssertionError as error:
                return f"{name}: {error}"
    return ""


def examine(name: str) -> Outcome:
    """Export and run one architecture."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    architecture, outcome = BY_NAME[name], Outcome()
    with tempfile.TemporaryDirectory() as root:
        try:
            _run(architecture, Path(root), outcome)
        except HqmqError as error:
            outcome.refused = str(error)
            assert not list(Path(root).iterdir()), "a refused model left files"
    return outcome


def _run(architecture: Architecture, root: Path, outcome: Outcome) -> None:
    model = architecture.model()
    export_model(model, root / "first", f"fp16@p{_PAGE}", mode="fused")  # refuses at once what it refuses
    found = {("fp16", "fused"): run_exported(root / "first")}
    assert model.config._attn_implementation == "eager"
    for scheme, mode in (("fp16", "qdq"), ("hq4", "fused"), ("hq4", "qdq")):
        folder = root / f"{scheme}-{mode}"
        manifest = export_model(model, folder, f"{scheme}@p{_PAGE}", mode=mode)
        onnx.checker.check_model(onnx.load(folder / "model.onnx"), full_check=True)
        found[scheme, mode] = run_exported(folder)
    rounded = run_torch(model, lambda: RoundedCache(config=model.config))
    original = run_torch(model, lambda: transformers.DynamicCache(config=model.config))
    outcome.spread = float(original.std())
    for mode in MODES:
        outcome.logit_error[mode] = float((rounded - found["fp16", mode]).abs().max())
        outcome.rounding[mode] = divergence([original], [found["fp16", mode]])
        outcome.tensorrt[mode] = tensorrt_problem(root / f"hq4-{mode}" / "model.onnx")
    scheme = f"hq4@p{_PAGE}"
    with balanced_like(model, manifest):
        qdq = run_torch(model, lambda: HqmqCache(model.config, scheme))
        fused = run_torch(model, lambda: HqmqCache.for_model(model, scheme))
    outcome.kl |= {
        "qdq": divergence([qdq], [found["hq4", "qdq"]]),
        "fused": divergence([fused], [found["hq4", "fused"]]),
    }
    # In half precision, as engines are built, no two types may meet in a node.
    export_model(architecture.model().half(), root / "half", scheme, mode="fused")
    outcome.tensorrt["fused"] = outcome.tensorrt["fused"] or tensorrt_problem(root / "half" / "model.onnx")


def examine_all(names: Iterable[str], workers: int | None = None) -> dict[str, Future[Outcome]]:
    """Outcomes of architectures, found by processes side by side: a capture keeps one core busy."""
    count = workers or min(4, len(os.sched_getaffinity(0)))
    pool = ProcessPoolExecutor(
        count, multiprocessing.get_context("spawn"), initializer=torch.set_num_threads, initargs=(1,)
    )
    futures = {name: pool.submit(examine, name) for name in names}
    pool.shutdown(wait=False)
    return futures


def document_cells(architecture: Architecture, outcome: Outcome) -> list[str]:
    """What docs/models.md says of an architecture, after its name and without engines and measured numbers."""
    if architecture.refused:
        return [architecture.shows, outcome.refused or "exported"]
    return [architecture.shows, *outcome.verdicts().values()]


def measured_cells(architecture: Architecture, outcome: Outcome) -> list[str]:
    """The numbers of docs/models.md, the larger of both modes; [] for an architecture that must be refused."""
    if architecture.refused:
        return []
    return [f"{max(values.values()):.0e}" if values else "-" for values in (outcome.logit_error, outcome.kl)]


def engine_cases() -> dict[tuple[str, str, str], list[str]]:
    """Ids of all engines that benchmarks.architectures_trt builds, by road, name and mode."""
    from benchmarks.architectures_trt import all_cases

    wanted: dict[tuple[str, str, str], list[str]] = {}
    for case in all_cases(Path()):
        wanted.setdefault((case.road, case.name, case.mode), []).append(case.id)
    return wanted


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--markdown", action="store_true", help="write what is found into docs/models.md")
    parser.add_argument("--engines", type=Path, help="engines.jsonl, to write into docs/models.md; runs nothing")
    parser.add_argument("names", nargs="*", help="architectures (all)")
    options = parser.parse_args()
    if options.engines:
        Document().write_engines(read_records(options.engines), engine_cases())
        return
    outcomes = {}
    for name, future in examine_all(options.names or BY_NAME).items():
        outcomes[name] = future.result()
        print(name, outcomes[name], flush=True)
    if options.markdown:
        Document().write_runs(
            {
                name: (document_cells(BY_NAME[name], outcome), measured_cells(BY_NAME[name], outcome))
                for name, outcome in outcomes.items()
            }
        )


if __name__ == "__main__":
    main()
