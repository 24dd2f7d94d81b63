"""How far a model's logits and codes depend on how its tokens arrive and on what shares their batch.

``python benchmarks/invariance.py models/SmolLM2-135M-Instruct-hq4``: KL against one prefill, code words that differ.
"""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from numpy.typing import NDArray

from hqmq_trt.diff.measures import LogitComparison
from hqmq_trt.manifest import Manifest
from hqmq_trt.runtime.ort_session import OrtSession
from hqmq_trt.runtime.tokenizer import Tokenizer
from hqmq_trt.scheme import ROLES

Arrays = list[NDArray[Any]]


def run(session: OrtSession, ids: NDArray[np.int64], splits: list[int]) -> tuple[NDArray[np.float32], Arrays]:
    """Logits [T, V] of ids read in `splits`, and the codes of every layer and role."""
    session.reset()
    parts, start = [], 0
    for count in splits:
        rows = np.arange(count, dtype=np.int64)[None]
        parts.append(session.step(ids[None, start : start + count], np.array([count], np.int32), rows)[0].copy())
        start += count
    layers = range(len(session.manifest.layers))
    codes = [session.cache_buffers(layer, role)[0][:1].copy() for layer in layers for role in ROLES]
    return np.concatenate(parts), codes


def main(
    folder: Annotated[Path, typer.Argument(help="An export.")],
    tokens: Annotated[int, typer.Option(min=256, help="Tokens of the sample text.")] = 320,
) -> None:
    """Print a line for each way to cut the text, and one for a batch."""
    tokenizer = Tokenizer(folder, Manifest.load(folder))
    text = resources.files("hqmq_trt").joinpath("data/sample.txt").read_text(encoding="utf-8")
    ids = np.asarray(tokenizer.encode(text)[:tokens], np.int64)
    tokens = len(ids)
    session = OrtSession(folder, 3, tokens, tokens)
    logits, codes = run(session, ids, [tokens])
    cuts = {str(n): [n] * (tokens // n) + [tokens % n] * (tokens % n > 0) for n in (160, 64, 7, 1)}
    cuts["all but 20, then single"] = [tokens - 20] + [1] * 20
    for name, splits in cuts.items():
        found, other = run(session, ids, splits)
        kl = LogitComparison.of(logits, found, ids[1:]).mean_kl
        words = sum(int((a != b).sum()) for a, b in zip(codes, other, strict=True))
        print(f"chunks of {name}: mean KL {kl:.2e}, {words} of {sum(a.size for a in codes)} code words differ")

    lengths = np.array([150, 200, 70], np.int32)
    batch = np.stack([np.pad(part, (0, 200 - len(part))) for part in (ids[:150], ids[50:250], ids[100:170])])
    rows = np.tile(np.arange(150), (3, 1))
    session.reset()
    together = session.step(batch, lengths, rows)[0].copy()
    session.reset()
    alone = session.step(batch[:1, :150], lengths[:1], rows[:1])[0]
    print(f"batch of three against alone: largest difference of a logit {np.abs(together - alone).max():.2e}")


if __name__ == "__main__":
    typer.run(main)
