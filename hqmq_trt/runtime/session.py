"""What every runtime offers: sequences of a batch that grow in a packed cache, and logits of the rows asked for."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError
from hqmq_trt.format import CacheTensor, codebook_bytes
from hqmq_trt.manifest import Manifest

DEFAULT_CONTEXT, DEFAULT_PREFILL_CHUNK = 2048, 512
Logits = NDArray[np.float32]
AnySession = TypeVar("AnySession", bound="Session")


class Session(ABC):
    """A model of an exported folder with a cache for `max_batch` sequences of up to `max_context` tokens.

    A subclass owns the cache and implements `_run`; this class owns the lengths. Arrays are host numpy unless a
    runtime says that it takes others. After a run that raised, reset the sequences that took part in it; after bad
    arguments nothing has changed. A session is a context manager that closes itself.

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
        max_context: int = DEFAULT_CONTEXT,
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
        of the rows logits_index [B, N]. Must not change `lengths`. A result that does not own its data may be
        overwritten by the next run."""

    @abstractmethod
    def cache_nbytes(self) -> dict[str, int]:
        """Bytes the cache takes in memory, by kind of tensor (codes, scales, …)."""

    @abstractmethod
    def _read_cache(self, name: str, sequence: int, rows: int) -> NDArray[Any]:
        """Host copy [H, rows, …] of the first rows (dim 2) of one sequence in a tensor such as ``0.key.codes``."""

    @abstractmethod
    def _write_cache(self, name: str, sequence: int, values: NDArray[Any]) -> None:
        """Overwrite those rows with values [H, rows, …]."""

    @abstractmethod
    def model_sha256(self) -> str:
        """Digest of the exported model that is run; the same for the model's folder and engines built from it."""

    def cache_specs(self) -> dict[str, CacheTensor]:
        """Every cache tensor of the session by name (``0.key.codes``), in the order of the graph."""
        return dict(self.manifest.cache(self.max_batch, self.num_pages))

    def cache_arrays(self, layer: int, role: str) -> list[NDArray[Any]]:
        """Host copies of one layer's and role's (``key`` or ``value``) tensors, in the order of
        format.cache_tensors."""
        return [
            np.stack([self._read_cache(name, b, spec.shape[2]) for b in range(self.max_batch)])
            for name, spec in self.cache_specs().items()
            if name.startswith(f"{layer}.{role}.")
        ]

    def save_cache(self, path: str | Path) -> None:
        """Write the pages in use, tails and lengths of all sequences to a file; see hqmq_trt.runtime.cache_file."""
        from hqmq_trt.runtime.cache_file import save_cache

        save_cache(self, Path(path))

    def load_cache(self, path: str | Path) -> None:
        """Replace all sequences by those of a file that any runtime of the same model wrote.

        Raises:
            HqmqError: a damaged or foreign file, or a cache of another model, scheme or size; the session is then
                as it was.
        """
        from hqmq_trt.runtime.cache_file import load_cache

        load_cache(self, Path(path))

    def close(self) -> None:  # noqa: B027 - a runtime with nothing to free need not override it
        """Free what the session holds; a second call does nothing."""

    def __enter__(self: AnySession) -> AnySession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def codebook_nbytes(self) -> int:
        """Bytes of all layers' codebooks."""
        roles = (self.scheme.key, self.scheme.value)
        return sum(codebook_bytes(role, layer.num_kv_heads) for layer in self.manifest.layers for role in roles)

    def reset(self, sequence: int | None = None) -> None:
        """Empty one sequence, or all of them. Nothing is cleared: tokens past a length are never read."""
        if sequence is not None and not 0 <= sequence < self.max_batch:
            raise HqmqError(f"there is no sequence {sequence}; this session has 0…{self.max_batch - 1}")
        self.lengths[slice(None) if sequence is None else sequence] = 0

    def step(
        self,
        input_ids: NDArray[np.int64],
        new_length: NDArray[np.int32],
        logits_index: NDArray[np.int64],
    ) -> Logits:
        """One run over sequences 0…B-1 (B ≤ max_batch); see `_run`. new_length[b] may be 0.

        Raises:
            HqmqError: shapes, types or values out of range, a cache too small, the runtime's own errors, logits of
                a sequence that grew not finite.
        """
        ids = self._check_step(input_ids, new_length, logits_index)
        new = np.ascontiguousarray(new_length, np.int32)
        logits = self._run(ids, new, np.ascontiguousarray(logits_index, np.int64))
        self._grow(logits, new)
        return logits if logits.flags.owndata else logits.copy()

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
        tokens: Sequence[Sequence[int]] | NDArray[Any],
        on_progress: Callable[[int], None] | None = None,
    ) -> Logits:
        """Append tokens[b] (lengths may differ, and be 0) to sequence b in chunks; logits [B, V] after the last.

        The row of a sequence that got no tokens is zero. `on_progress` is called with the tokens done so far.

        Raises:
            HqmqError: as `step`; tokens and lengths are checked before anything runs.
        """
        self._check_batch(len(tokens))
        rows = [self._token_row(b, row) for b, row in enumerate(tokens)]
        counts = np.array([len(row) for row in rows], np.int32)
        self.check_capacity(self.lengths[: len(counts)] + counts)
        result = np.zeros((len(counts), self.manifest.vocab_size), np.float32)
        for start in range(0, int(counts.max(initial=0)), self.prefill_chunk):
            new = np.clip(counts - start, 0, self.prefill_chunk).astype(np.int32)
            batch = int(np.flatnonzero(new)[-1]) + 1
            new = new[:batch]
            ids = np.zeros((batch, int(new.max())), np.int64)
            for b in range(batch):
                ids[b, : new[b]] = rows[b][start : start + new[b]]
            logits = self._run(ids, new, np.maximum(new - 1, 0).astype(np.int64)[:, None])
            self._grow(logits, new)
            last = np.flatnonzero((new > 0) & (counts[:batch] <= start + self.prefill_chunk))
            result[last] = logits[last, 0]
            if on_progress:
                on_progress(int(np.minimum(counts, start + self.prefill_chunk).sum()))
        return result

    def decode(self, tokens: Sequence[int | None]) -> Logits:
        """Append one token to each sequence (None: leave it as it is); logits [B, V], zero for None.

        The array may be memory that the next run overwrites: copy what is to be kept.
        """
        ids, new, index = self._decode_arrays(tokens)
        batch = len(new)
        if not batch:
            return np.zeros((len(tokens), self.manifest.vocab_size), np.float32)
        logits = self._run(ids, new, index)
        self._grow(logits, new)
        result: Logits = logits[:, 0]
        if batch < len(tokens):
            result = np.zeros((len(tokens), self.manifest.vocab_size), np.float32)
            result[:batch] = logits[:, 0]
        for b, token in enumerate(tokens[:batch]):
            if token is None:
                result[b] = 0
        return result

    def _decode_batch(self, tokens: Sequence[int | None]) -> int:
        """Sequences a decode step runs over: up to the last that gets a token."""
        batch = len(tokens)
        while batch and tokens[batch - 1] is None:
            batch -= 1
        return batch

    def _decode_arrays(
        self, tokens: Sequence[int | None]
    ) -> tuple[NDArray[np.int64], NDArray[np.int32], NDArray[np.int64]]:
        """input_ids [B, 1], new_length [B] and logits_index [B, 1] of a decode step, checked. B may be 0."""
        self._check_batch(len(tokens))
        batch, vocabulary = self._decode_batch(tokens), self.manifest.vocab_size
        ids, new = [0] * batch, [0] * batch  # quicker than numpy for so few
        for b in range(batch):
            token = tokens[b]
            if token is None:
                continue
            if not 0 <= token < vocabulary:
                raise HqmqError(f"token {token} of sequence {b} is outside the vocabulary of {vocabulary}")
            ids[b], new[b] = token, 1
        grown = np.array(new, np.int32)
        if batch and max(self.lengths.tolist()[:batch]) >= self.max_context:
            self.check_capacity(self.lengths[:batch] + grown)
        return np.array(ids, np.int64).reshape(batch, 1), grown, np.zeros((batch, 1), np.int64)

    def _host_array(self, array: Any, name: str) -> NDArray[Any]:
        """Integers as a host array. A runtime with a device overrides this to take device arrays."""
        if hasattr(array, "__cuda_array_interface__"):
            raise HqmqError(f"{name} lies on a GPU; this runtime takes host arrays: copy it first")
        host = np.asarray(array)
        if host.dtype.kind not in "iu" and host.size:
            raise HqmqError(f"{name} must hold integers (int64), not {host.dtype}")
        return host

    def _token_row(self, sequence: int, tokens: Any) -> NDArray[np.int64]:
        row = self._host_array(tokens, f"the tokens of sequence {sequence}")
        if row.ndim != 1:
            raise HqmqError(f"the tokens of sequence {sequence} must be one row, not of shape {list(row.shape)}")
        self._check_tokens(row, f"of sequence {sequence} ")
        return np.ascontiguousarray(row, np.int64)

    def _check_tokens(self, tokens: NDArray[Any], where: str = "") -> None:
        vocabulary = self.manifest.vocab_size
        if tokens.size and (tokens.min() < 0 or tokens.max() >= vocabulary):
            wrong = tokens[(tokens < 0) | (tokens >= vocabulary)].flat[0]
            raise HqmqError(
                f"token {wrong} {where}is outside the vocabulary of {vocabulary}; use the model's tokenizer"
            )

    def _check_batch(self, batch: int) -> None:
        if not 1 <= batch <= self.max_batch:
            raise HqmqError(f"{batch} sequences do not fit a session of max_batch={self.max_batch}; raise max_batch")

    def _check_step(self, input_ids: Any, new_length: Any, logits_index: Any) -> NDArray[np.int64]:
        """input_ids as contiguous int64 on the host, all arguments checked."""
        ids = self._host_array(input_ids, "input_ids")
        new = self._host_array(new_length, "new_length")
        index = self._host_array(logits_index, "logits_index")
        if ids.ndim != 2 or not ids.shape[1]:
            raise HqmqError(f"input_ids must be [batch, tokens], not of shape {list(ids.shape)}")
        batch, width = ids.shape
        self._check_batch(batch)
        if new.shape != (batch,) or new.min() < 0 or new.max() > width:
            raise HqmqError(f"new_length must be [{batch}] with values in 0…{width}")
        shaped = index.ndim == 2 and index.shape[0] == batch
        if not shaped or index.min(initial=0) < 0 or index.max(initial=0) >= width:
            raise HqmqError(f"logits_index must be [{batch}, N] with values in 0…{width - 1}")
        self._check_tokens(ids)
        self.check_capacity(self.lengths[:batch] + new)
        return np.ascontiguousarray(ids, np.int64)

    def _grow(self, logits: Logits, new_length: NDArray[np.int32]) -> None:
        """Take over a run's tokens, once its logits are known to be finite."""
        if not self._finite(logits):
            bad = ~np.isfinite(logits).all((1, 2)) & (new_length > 0)
            if bad.any():
                raise HqmqError(
                    f"{self.folder}: logits of sequence {int(bad.argmax())} are not finite; the weights or "
                    f"activations overflow {self.manifest.dtype}: export with --dtype float32"
                )
        self.lengths[: len(new_length)] += new_length

    def _finite(self, logits: Logits) -> bool:
        """Whether all logits of the last run are finite; a runtime that is not sure says no, and they are looked at."""
        # min and max hand NaN on, and are quicker than isfinite.
        return not logits.size or (math.isfinite(logits.max()) and math.isfinite(logits.min()))
