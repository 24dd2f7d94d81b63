"""What every runtime offers: sequences of a batch that grow in a packed cache, and logits of the rows asked for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError
from hqmq_trt.format import codebook_bytes
from hqmq_trt.manifest import Manifest

DEFAULT_PREFILL_CHUNK = 512
Logits = NDArray[np.float32]


class Session(ABC):
    """A model of an exported folder with a cache for `max_batch` sequences of up to `max_context` tokens.

    A subclass owns the cache and implements `_run`; this class owns the lengths. All arrays are host numpy.

    Attributes:
        folder, manifest: what is run.
        max_batch, max_context: capacity; `max_context` is what was asked for, rounded up to whole pages.
        lengths: int32 [max_batch], tokens each sequence holds.
        prefill_chunk: most tokens of a sequence that one run takes.
    """

    def __init__(
        self,
        folder: str | Path,
        max_batch: int = 1,
        max_context: int = 2048,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
    ) -> None:
        for name, value in (("max_batch", max_batch), ("max_context", max_context), ("prefill_chunk", prefill_chunk)):
            if value < 1:
                raise HqmqError(f"{name} must be at least 1, not {value}")
        self.folder = Path(folder)
        self.manifest = Manifest.load(self.folder)
        self.scheme = self.manifest.parsed_scheme
        self.num_pages = -(-max_context // self.manifest.page_size)
        self.max_batch, self.max_context = max_batch, self.num_pages * self.manifest.page_size
        self.prefill_chunk = prefill_chunk
        self.lengths: NDArray[np.int32] = np.zeros(max_batch, np.int32)

    @abstractmethod
    def _run(
        self, input_ids: NDArray[np.int64], new_length: NDArray[np.int32], logits_index: NDArray[np.int64]
    ) -> Logits:
        """Append the first new_length[b] tokens of input_ids [B, T] to sequences 0…B-1 and return logits [B, N, V]
        of the rows logits_index [B, N]. Must not change `lengths`."""

    @abstractmethod
    def cache_nbytes(self) -> dict[str, int]:
        """Bytes the cache takes in memory, by kind of tensor (codes, scales, …)."""

    def codebook_nbytes(self) -> int:
        """Bytes of all layers' codebooks."""
        roles = (self.scheme.key, self.scheme.value)
        return sum(codebook_bytes(role, layer.num_kv_heads) for layer in self.manifest.layers for role in roles)

    def reset(self, sequence: int | None = None) -> None:
        """Empty one sequence, or all of them. Nothing is cleared: tokens past a length are never read."""
        self.lengths[slice(None) if sequence is None else sequence] = 0

    def step(
        self,
        input_ids: NDArray[np.int64],
        new_length: NDArray[np.int32],
        logits_index: NDArray[np.int64],
    ) -> Logits:
        """One run over sequences 0…B-1 (B ≤ max_batch); see `_run`. new_length[b] may be 0.

        Raises:
            HqmqError: shapes or values out of range, a cache too small, the runtime's own errors, logits of a
                sequence that grew not finite.
        """
        batch, width = input_ids.shape
        if not 1 <= batch <= self.max_batch:
            raise HqmqError(f"{batch} sequences do not fit a session of max_batch={self.max_batch}; raise max_batch")
        if new_length.shape != (batch,) or new_length.min() < 0 or new_length.max() > width:
            raise HqmqError(f"new_length must be [{batch}] with values in 0…{width}")
        if logits_index.shape[0] != batch or logits_index.min(initial=0) < 0 or logits_index.max(initial=0) >= width:
            raise HqmqError(f"logits_index must be [{batch}, N] with values in 0…{width - 1}")
        if input_ids.min() < 0 or input_ids.max() >= self.manifest.vocab_size:
            raise HqmqError(f"a token is outside the vocabulary of {self.manifest.vocab_size}")
        self.check_capacity(self.lengths[:batch] + new_length)
        logits = self._run(
            np.ascontiguousarray(input_ids, np.int64),
            np.ascontiguousarray(new_length, np.int32),
            np.ascontiguousarray(logits_index, np.int64),
        )
        bad = ~np.isfinite(logits).all((1, 2)) & (new_length > 0)
        if bad.any():
            raise HqmqError(
                f"{self.folder}: logits of sequence {int(bad.argmax())} are not finite; the weights or activations "
                f"overflow {self.manifest.dtype}: export with --dtype float32"
            )
        self.lengths[:batch] += new_length
        return logits

    def check_capacity(self, tokens: Sequence[int] | NDArray[np.int32]) -> None:
        """Raise HqmqError when sequences of so many tokens do not fit the cache."""
        needed = max((int(count) for count in tokens), default=0)
        if needed > self.max_context:
            raise HqmqError(
                f"the cache holds {self.max_context} tokens a sequence but {needed} are needed; "
                f"raise max_context (--max-context {needed})"
            )

    def append(
        self,
        tokens: Sequence[Sequence[int]],
        on_progress: Callable[[int], None] | None = None,
    ) -> Logits:
        """Append tokens[b] (lengths may differ, and be 0) to sequence b in chunks; logits [B, V] after the last.

        The row of a sequence that got no tokens is zero. `on_progress` is called with the tokens done so far.
        """
        counts = np.array([len(row) for row in tokens], np.int32)
        self.check_capacity(self.lengths[: len(counts)] + counts)
        result = np.zeros((len(counts), self.manifest.vocab_size), np.float32)
        for start in range(0, int(counts.max(initial=0)), self.prefill_chunk):
            new = np.clip(counts - start, 0, self.prefill_chunk).astype(np.int32)
            batch = int(np.flatnonzero(new)[-1]) + 1
            ids = np.zeros((batch, int(new.max())), np.int64)
            for b in range(batch):
                ids[b, : new[b]] = tokens[b][start : start + new[b]]
            logits = self.step(ids, new[:batch], np.maximum(new[:batch] - 1, 0).astype(np.int64)[:, None])
            last = np.flatnonzero((new[:batch] > 0) & (counts[:batch] <= start + self.prefill_chunk))
            result[last] = logits[last, 0]
            if on_progress:
                on_progress(int(np.minimum(counts, start + self.prefill_chunk).sum()))
        return result

    def decode(self, tokens: Sequence[int | None]) -> Logits:
        """Append one token to each sequence (None: leave it as it is); logits [B, V], zero for None."""
        return self.append([[] if token is None else [token] for token in tokens])
