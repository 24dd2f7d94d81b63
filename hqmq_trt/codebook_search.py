"""Search the optimised codebooks once, offline and without data: ``python -m hqmq_trt.codebook_search``.

``--check`` compares with the data file instead of writing it; ``--extend`` searches only what the file lacks and leaves
every array that it holds as it is, so that the format keeps its version.

Secondaries: Lloyd iterations on uniform unit quaternions folded by 2T. Each iteration draws fresh directions u, finds
their nearest codewords p*q_s and moves q_s to the mean of conj(p)*u in its cell, weighted by the projection: the fixed
point has the largest mean cos², which is the least squared error of a Gaussian chunk. Over-relaxation speeds it up; the
last iterations average without it. The best of several starts stays.

Levels: Lloyd-Max quantiser of the projected gain ⟨x, codeword⟩ of a chunk x of four unit Gaussians.

The result is hqmq_trt/data/codebooks.npz: ``secondaries_{S}`` float64 [S, 4] and ``levels_{S}_{r}`` float64 [2^r]
(values of float32). Directions and sums are exact IEEE arithmetic in a fixed order, so that every platform finds the
same secondaries; levels also need exp, and agree to about 1e-6.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import numpy as np
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from hqmq_trt import native
from hqmq_trt.codebooks import F64, HALF_PRIMARIES, haar, multiply
from hqmq_trt.errors import HqmqError
from hqmq_trt.scheme import OPTIMISED_RADIUS_BITS as RADIUS_BITS
from hqmq_trt.scheme import OPTIMISED_SECONDARIES, PRESETS, Gain

DATA = Path(__file__).parent / "data" / "codebooks.npz"
STARTS = {5: 16, 10: 16, 21: 8, 42: 4, 85: 3, 170: 3, 341: 2, 682: 2}
ITERATIONS = 90
_AVERAGING = 12  # of them, at the end, without over-relaxation and with more directions
_RELAX = 0.9
_SEED = 20260527
_LEVEL_TOLERANCE = 1e-5
_CONJUGATE = np.array([1.0, -1.0, -1.0, -1.0])


def _unit(q: F64) -> F64:
    square = q * q
    return q / np.sqrt((square[:, 0] + square[:, 1]) + (square[:, 2] + square[:, 3]))[:, None]


def lloyd_step(secondaries: F64, directions: F64, relax: float) -> F64:
    """One Lloyd iteration: secondaries [S, 4] moved by 1 + relax times the way to the centroids of their cells."""
    count = len(secondaries)
    word, negative, projection = native.search(directions.astype(np.float32), secondaries.astype(np.float32))
    weight = np.where(negative, -projection, projection).astype(np.float64)
    sums = [np.bincount(word, weight * directions[:, i], 12 * count) for i in range(4)]
    cells = np.stack(sums, axis=-1, dtype=np.float64).reshape(count, 12, 4)
    centroid = np.zeros_like(secondaries)
    for primary in range(12):
        centroid += multiply(HALF_PRIMARIES[primary] * _CONJUGATE, cells[:, primary])
    empty = np.abs(centroid).max(1) == 0
    centroid = np.where(empty[:, None], secondaries, centroid)
    centroid = _unit(centroid)
    return _unit(centroid + relax * (centroid - secondaries))


def direction_error(secondaries: F64, directions: F64) -> float:
    """Mean of 1 - cos² between directions [N, 4] and their nearest codewords."""
    _, _, projection = native.search(directions.astype(np.float32), secondaries.astype(np.float32))
    return float(1.0 - np.mean(projection.astype(np.float64) ** 2))


def run_start(count: int, start: int) -> F64:
    """Secondaries [count, 4] of unit norm that Lloyd's iterations reach from the `start`-th random start."""
    draw = max(60_000, 400 * count)
    q = haar(count, _SEED, count, 0, start)
    for iteration in range(ITERATIONS):
        averaging = iteration >= ITERATIONS - _AVERAGING
        u = haar(4 * draw if averaging else draw, _SEED, count, 1, start, iteration)
        q = lloyd_step(q, u, 0.0 if averaging else _RELAX)
    return q


def search_secondaries(count: int) -> F64:
    """The best [count, 4] of STARTS[count] starts."""
    judge = haar(200_000, _SEED, count)
    found = [run_start(count, start) for start in range(STARTS[count])]
    return min(found, key=lambda q: direction_error(q, judge))


def search_levels(secondaries: F64, radius_bits: int) -> F64:
    """Lloyd-Max levels [2^radius_bits] of the projected gain, rounded to float32.

    The gain is R cos θ: R has the chi distribution of four degrees, cos θ that of uniform directions on this codebook
    (a histogram). Cells are integrated on a grid.
    """
    _, _, cosine = native.search(
        haar(400_000, _SEED, len(secondaries), 2).astype(np.float32), secondaries.astype(np.float32)
    )
    share, edges = np.histogram(cosine, 200)
    centres = (edges[1:] + edges[:-1]) / 2
    step = 2.0**-12
    grid = (np.arange(int(7.0 / step)) + 0.5) * step
    density = np.zeros_like(grid)
    for weight, c in zip(share, centres, strict=True):
        r = grid / c
        density += weight * (r * r * r * np.exp(-r * r / 2)) / c
    mass = np.concatenate([[0.0], np.cumsum(density)])
    moment = np.concatenate([[0.0], np.cumsum(density * grid)])
    border = np.concatenate([[0.0], grid + step / 2])
    count = 2**radius_bits
    levels = np.interp((np.arange(count) + 0.5) / count * mass[-1], mass, border)
    for _ in range(60 * count):
        middle = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, border[-1:]])
        moved = np.diff(np.interp(middle, border, moment)) / np.diff(np.interp(middle, border, mass))
        change = np.abs(moved - levels).max()
        levels = moved
        if change < 1e-9:
            break
    return levels.astype(np.float32).astype(np.float64)


def gaussian_mse(secondaries: F64, levels: F64, vectors: int = 8192, head_dim: int = 128) -> float:
    """Mean squared error per element of unit Gaussian vectors, with an fp16 RMS scale a vector."""
    x = np.random.Generator(np.random.Philox(_SEED)).standard_normal((vectors, head_dim), dtype=np.float32)
    scale = np.sqrt((x * x).mean(1)).astype(np.float16).astype(np.float64)
    _, _, projection = native.search(x.reshape(-1, 4), secondaries.astype(np.float32))
    gain = projection.reshape(vectors, -1).astype(np.float64)
    ratio = gain / scale[:, None]
    radius = levels[np.searchsorted((levels[1:] + levels[:-1]) / 2, ratio)] * scale[:, None]
    # |x - radius c|² with ⟨x, c⟩ = gain and |c| = 1
    return float((np.square(x, dtype=np.float64).sum() + (radius * radius - 2 * radius * gain).sum()) / x.size)


def search_all(console: Console, known: Mapping[str, F64] | None = None) -> dict[str, F64]:
    """Every array of the data file; those in `known` are taken as they are and come first."""
    arrays = dict(known or {})
    quiet = not console.is_terminal
    for count in track(OPTIMISED_SECONDARIES, "secondaries", console=console, transient=True, disable=quiet):
        if (name := f"secondaries_{count}") not in arrays:
            arrays[name] = search_secondaries(count)
    for count in OPTIMISED_SECONDARIES:
        for bits in RADIUS_BITS:
            if (name := f"levels_{count}_{bits}") not in arrays:
                arrays[name] = search_levels(arrays[f"secondaries_{count}"], bits)
    return arrays


def load(file: Path) -> dict[str, F64]:
    """The arrays of a data file, in its order."""
    with np.load(file) as stored:
        return {name: stored[name] for name in stored.files}


def mse_table(arrays: dict[str, F64]) -> Table:
    """MSE on unit Gaussian vectors by S and radius bits; presets are marked."""
    presets = {(v.secondaries, v.radius_bits): name for name, (_, v) in PRESETS.items() if v.gain is Gain.RMS}
    table = Table("S", *(f"r={bits}" for bits in RADIUS_BITS), title="MSE per element of a unit Gaussian, D=128")
    for count in OPTIMISED_SECONDARIES:
        cells = []
        for bits in RADIUS_BITS:
            mse = gaussian_mse(arrays[f"secondaries_{count}"], arrays[f"levels_{count}_{bits}"])
            cells.append(f"{mse:.5f}" + (f" {presets[count, bits]}" if (count, bits) in presets else ""))
        table.add_row(str(count), *cells)
    return table


def differences(found: dict[str, F64], stored: dict[str, F64]) -> list[str]:
    """What differs between two sets of arrays: secondaries in any bit, levels beyond rounding."""
    if missing := set(found) ^ set(stored):
        return [f"{name}: only in one of them" for name in sorted(missing)]
    result = []
    for name, array in found.items():
        tolerance = 0.0 if name.startswith("secondaries") else _LEVEL_TOLERANCE
        gap = np.inf if array.shape != stored[name].shape else np.abs(array - stored[name]).max()
        if gap > tolerance:
            result.append(f"{name}: differs by {gap:.3g}")
    return result


def main(
    check: Annotated[bool, typer.Option("--check", help="Compare with the data file instead of writing it.")] = False,
    extend: Annotated[
        bool, typer.Option("--extend", help="Search only what the data file lacks; keep what it holds.")
    ] = False,
    output: Annotated[Path, typer.Option(help="The data file.")] = DATA,
) -> None:
    """Search the optimised secondaries and radius levels (a few minutes)."""
    if check and extend:
        raise typer.BadParameter("--check searches everything; leave out --extend")
    console = Console()
    try:
        arrays = search_all(console, load(output) if extend else None)
    except HqmqError as error:
        print(error, file=sys.stderr)
        raise typer.Exit(2) from None
    console.print(mse_table(arrays))
    if not check:
        output.parent.mkdir(parents=True, exist_ok=True)
        np.savez(output, **arrays)  # type: ignore[arg-type]
        console.print(f"wrote {output}")
        return
    found = differences(arrays, load(output))
    for line in found:
        print(line, file=sys.stderr)
    if found:
        raise typer.Exit(1)
    console.print(f"{output} is reproduced")


if __name__ == "__main__":
    typer.run(main)
