"""The two optimisation profiles of an engine, as plain arithmetic over the graph's named dimensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest

MAX_ELEMENTS = 2**31 - 1
"""Elements TensorRT allows in a tensor, and what 32-bit positions of a cache can address."""

Range = tuple[int, int, int]
"""(least, optimal, most)."""


@dataclass(frozen=True)
class Limits:
    """What an engine is built for: sequences, tokens a sequence, tokens of a sequence in one prefill run."""

    max_batch: int
    max_context: int
    prefill_chunk: int
    page_size: int

    @property
    def num_pages(self) -> int:
        """Pages of a sequence at most."""
        return self.max_context // self.page_size

    @staticmethod
    def of(manifest: Manifest, max_batch: int, max_context: int, prefill_chunk: int) -> Limits:
        """Limits for a model. max_context is rounded up to whole pages, prefill_chunk down to max_context.

        Raises:
            HqmqError: a value below 1, or one for which a cache tensor or the logits have more than MAX_ELEMENTS.
        """
        given = {"max_batch": max_batch, "max_context": max_context, "prefill_chunk": prefill_chunk}
        for name, value in given.items():
            if value < 1:
                raise HqmqError(f"{name} must be at least 1, not {value} (--{name.replace('_', '-')})")
        page = manifest.page_size
        pages = -(-max_context // page)
        limits = Limits(max_batch, pages * page, min(prefill_chunk, pages * page), page)
        for name, spec in manifest.cache(max_batch, pages):
            elements = _product(spec.shape)
            if elements > MAX_ELEMENTS:
                raise HqmqError(
                    f"cache tensor '{name}' {list(spec.shape)} would have {elements:,} elements, TensorRT allows "
                    f"{MAX_ELEMENTS:,}; lower --max-context (at most {_fitting(manifest, max_batch):,} for "
                    f"{max_batch} sequences) or --max-batch"
                )
        logits = max_batch * limits.prefill_chunk * manifest.vocab_size
        if logits > MAX_ELEMENTS:
            raise HqmqError(
                f"logits [{max_batch}, {limits.prefill_chunk}, {manifest.vocab_size}] would have {logits:,} elements, "
                f"TensorRT allows {MAX_ELEMENTS:,}; lower --prefill-chunk (at most "
                f"{MAX_ELEMENTS // (max_batch * manifest.vocab_size):,} for {max_batch} sequences) or --max-batch"
            )
        return limits

    def dimensions(self, decode: bool) -> dict[str, Range]:
        """Range of each named dimension of the graph in the decode or the prefill profile."""
        rows: Range = (1, 1, 1) if decode else (1, self.prefill_chunk, self.prefill_chunk)
        logits: Range = (1, 1, 1) if decode else (1, 1, self.prefill_chunk)
        return {
            "batch": (1, self.max_batch, self.max_batch),
            "sequence": rows,
            "num_logits": logits,
            "capacity": (self.page_size, self.max_context, self.max_context),
            "pages": (1, self.num_pages, self.num_pages),
        }


def profile_shapes(
    inputs: Mapping[str, Sequence[int | str]], dimensions: Mapping[str, Range]
) -> dict[str, tuple[list[int], list[int], list[int]]]:
    """(least, optimal, most) shape of every graph input with named dimensions, by input name.

    Raises:
        HqmqError: an input has a dimension that is neither fixed nor known.
    """
    shapes = {}
    for name, dims in inputs.items():
        if not any(isinstance(dim, str) for dim in dims):
            continue
        ranges = []
        for dim in dims:
            if isinstance(dim, int):
                ranges.append((dim, dim, dim))
            elif dim in dimensions:
                ranges.append(dimensions[dim])
            else:
                raise HqmqError(f"input '{name}' has the unknown dimension '{dim}'; export the model again")
        least, best, most = (list(column) for column in zip(*ranges, strict=True))
        shapes[name] = (least, best, most)
    return shapes


def _product(shape: Sequence[int]) -> int:
    result = 1
    for dim in shape:
        result *= dim
    return result


def _fitting(manifest: Manifest, max_batch: int) -> int:
    """Largest max_context, in whole pages, for which no cache tensor has more than MAX_ELEMENTS."""
    most = max(
        _product(two.shape) - _product(one.shape)
        for (_, one), (_, two) in zip(manifest.cache(max_batch, 1), manifest.cache(max_batch, 2), strict=True)
    )
    return MAX_ELEMENTS // most * manifest.page_size
