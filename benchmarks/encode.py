"""Encoding speed: the native codec on every core against the torch oracle (structured search) on the same cores.

``python benchmarks/encode.py [--json]``: microseconds a token and KV head, and the ratio, for the key codec of every
preset. The requirement is a ratio of at least 40 on two cores.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table

from hqmq_trt import codebooks, native, oracle
from hqmq_trt.scheme import PRESETS, Scheme

REQUIRED_RATIO = 40


def median_seconds(run: Callable[[], object], repeats: int) -> float:
    """Median wall time of `repeats` runs after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def measure(name: str, head_dim: int, heads: int, pages: int, repeats: int) -> dict[str, float | str]:
    """Time one scheme's key codec: native over `pages` pages of each head, the oracle over one page of each head."""
    scheme = Scheme.parse(name)
    role, page_size = scheme.key, scheme.page_size
    tokens = pages * page_size
    secondaries = torch.from_numpy(codebooks.secondaries(role, 0, 0, heads, "key"))
    levels = torch.from_numpy(codebooks.levels(role))
    x = torch.randn(1, heads, tokens, head_dim, generator=torch.Generator().manual_seed(0)).half()
    cache = list(oracle.empty_cache(role, page_size, head_dim, heads, 1, pages).values())
    past, new = torch.zeros(1, dtype=torch.int32), torch.full((1,), tokens, dtype=torch.int32)
    book = [secondaries, levels]

    def oracle_pages() -> None:
        for head in range(heads):
            oracle.encode_page(x[0, head, :page_size].float(), role, secondaries[head], levels)

    fast = median_seconds(lambda: native.append(x, past, new, role, book, cache), repeats) / (heads * tokens)
    slow = median_seconds(oracle_pages, repeats) / (heads * page_size)
    return {"scheme": name, "native_us": fast * 1e6, "oracle_us": slow * 1e6, "ratio": slow / fast}


def main(
    head_dim: Annotated[int, typer.Option(help="Elements of a head.")] = 128,
    heads: Annotated[int, typer.Option(help="KV heads.")] = 8,
    pages: Annotated[int, typer.Option(help="Pages of each head that the native codec fills.")] = 8,
    repeats: Annotated[int, typer.Option(help="Timed runs; the median counts.")] = 9,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")] = False,
) -> None:
    """Compare the encoding speed of the native codec and the torch oracle."""
    names = [name for name, (key, _) in PRESETS.items() if key.packed]
    rows = [measure(name, head_dim, heads, pages, repeats) for name in names]
    setting = {
        "head_dim": head_dim,
        "native_threads": native.num_threads(),
        "torch_threads": torch.get_num_threads(),
        "isa": native.versions()["isa"],
        "required_ratio": REQUIRED_RATIO,
    }
    if as_json:
        print(json.dumps({**setting, "rows": rows}, indent=1))
        return
    table = Table(
        "scheme",
        "native µs",
        "oracle µs",
        "ratio",
        title=f"Encoding one token of one KV head (D={head_dim}), {native.num_threads()} threads, {setting['isa']}",
        caption=f"required: {REQUIRED_RATIO} times",
    )
    for row in rows:
        table.add_row(
            str(row["scheme"]), *(f"{row[key]:.2f}" for key in ("native_us", "oracle_us")), f"{row['ratio']:.0f}"
        )
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
