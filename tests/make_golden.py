"""Golden vectors: cache bytes of every preset, so that no change of code can change the format unnoticed.

``python -m tests.make_golden`` rewrites tests/golden from the oracle; only a new FORMAT_VERSION may need that.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hqmq_trt import codebooks, oracle
from hqmq_trt.format import FORMAT_VERSION
from hqmq_trt.scheme import ROLES, Scheme
from tests.codec_cases import codebook, lengths, oracle_quantize

FOLDER = Path(__file__).parent / "golden"
SCHEMES = ("hq2.5", "hq3", "hq3.5", "hq4", "hq5", "paper:s96_r4+med3@p32")
TOKENS, HEAD_DIM, LAYER = 70, 64, 3


def golden_file(scheme: str, role: str) -> Path:
    """The file of one scheme and role."""
    return FOLDER / f"{scheme.replace(':', '_').replace('+', '_').replace('@', '_')}.{role}.npz"


def golden_input() -> Tensor:
    """x [1, 1, TOKENS, HEAD_DIM]: sums of integers, exact in fp16 on every platform; every ninth chunk is larger."""
    raw = np.random.Philox(np.random.SeedSequence(2026)).random_raw(TOKENS * HEAD_DIM)
    parts = np.stack([(raw >> np.uint64(8 * i)) & np.uint64(255) for i in range(4)]).astype(np.int64)
    x = (parts.sum(0) - 510) / 128.0
    x = x.reshape(-1, 4)
    x[::9] *= 8.0
    return torch.from_numpy(x.reshape(1, 1, TOKENS, HEAD_DIM).astype(np.float16))


def golden_cache(scheme: Scheme, role_name: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """An empty cache that fits the input, and the codebook."""
    role, pages = scheme.role(role_name), -(-TOKENS // scheme.page_size)
    cache = oracle.empty_cache(role, scheme.page_size, HEAD_DIM, 1, 1, pages)
    return cache, codebook(role, 1, role_name, LAYER)


def full_pages(cache: dict[str, Tensor], page_size: int) -> dict[str, np.ndarray]:
    """What the cache stores of the full pages; the tail is the input itself."""
    full = TOKENS // page_size
    rows = {"codes": full * page_size}
    return {name: tensor[0, 0, : rows.get(name, full)].numpy() for name, tensor in cache.items() if name != "tail"}


def main() -> None:
    """Write every golden file."""
    FOLDER.mkdir(exist_ok=True)
    for name in SCHEMES:
        scheme = Scheme.parse(name)
        for role in ROLES:
            cache, book = golden_cache(scheme, role)
            present = oracle_quantize(golden_input(), lengths(0), lengths(TOKENS), scheme.role(role), book, cache)
            arrays = full_pages(present, scheme.page_size)
            digests = [codebooks.digest(part.numpy()) for part in book]
            file = golden_file(name, role)
            np.savez_compressed(file, format_version=FORMAT_VERSION, codebook=digests, **arrays)  # type: ignore[arg-type]
            print(f"{file.name}: {file.stat().st_size} bytes")


if __name__ == "__main__":
    main()
