"""What a comparison found, by runtime and by reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hqmq_trt.diff.measures import LayerError, LogitComparison
from hqmq_trt.diff.stateless import StatelessCheck
from hqmq_trt.manifest import Manifest


@dataclass
class RuntimeDiff:
    """One runtime against PyTorch.

    Attributes:
        logits: comparison by reference (of REFERENCES).
        layers: error of K and V by layer, against PyTorch with an unpacked cache; empty without that reference.
        cache_bytes: bytes of the session's cache by kind.
        changed: by role, the share of chunks that got another code than in PyTorch, from K and V that differ by
            rounding alone; empty without the reference ``pinned``.
    """

    logits: dict[str, LogitComparison] = field(default_factory=dict)
    layers: list[LayerError] = field(default_factory=list)
    cache_bytes: dict[str, int] = field(default_factory=dict)
    changed: dict[str, float] = field(default_factory=dict)

    def document(self) -> dict[str, Any]:
        """For --json."""
        return {
            "cache_bytes": self.cache_bytes,
            "changed_chunks": self.changed,
            "logits": {name: found.summary() for name, found in self.logits.items()},
            "layers": [vars(error) for error in self.layers],
        }


@dataclass
class DirectDiff:
    """TensorRT against ONNX Runtime, each with a cache of its own.

    Attributes:
        logits: with ONNX Runtime's as the reference.
        layers: difference of K and V as the two caches decode them.
    """

    logits: LogitComparison
    layers: list[LayerError]


@dataclass
class DiffResult:
    """What `compare` found.

    Attributes:
        manifest: of the folder.
        tokens, decode_steps: tokens read in chunks, and then one by one.
        runtimes: by name, ``onnxruntime`` before ``tensorrt``.
        direct: TensorRT against ONNX Runtime, where both ran.
        stateless: one prefill step of the engine in Polygraphy's own runner, where there is an engine.
    """

    manifest: Manifest
    tokens: int
    decode_steps: int
    runtimes: dict[str, RuntimeDiff]
    direct: DirectDiff | None = None
    stateless: StatelessCheck | None = None

    @property
    def _first(self) -> RuntimeDiff:
        return next(iter(self.runtimes.values()))

    @property
    def logits(self) -> dict[str, LogitComparison]:
        """Of the first runtime."""
        return self._first.logits

    @property
    def layers(self) -> list[LayerError]:
        """Of the first runtime."""
        return self._first.layers

    @property
    def cache_bytes(self) -> dict[str, int]:
        """Of the first runtime."""
        return self._first.cache_bytes

    @property
    def changed(self) -> dict[str, float]:
        """Of the first runtime."""
        return self._first.changed

    def columns(self) -> Iterator[tuple[str, str, LogitComparison]]:
        """(runtime, reference, comparison) of all logits; the reference is of REFERENCES, or ``onnxruntime``."""
        for runtime, found in self.runtimes.items():
            for reference, comparison in found.logits.items():
                yield runtime, reference, comparison
        if self.direct:
            yield "tensorrt", "onnxruntime", self.direct.logits

    def within(self, max_kl: float | None, min_top1: float | None) -> bool:
        """Whether every comparison keeps to the limits."""
        return all(found.within(max_kl, min_top1) for _, _, found in self.columns())

    def document(self) -> dict[str, Any]:
        """For --json: the first runtime's numbers at the top, those of all under ``runtimes``."""
        return {
            "scheme": self.manifest.scheme,
            "mode": self.manifest.mode,
            "tokens": self.tokens,
            "decode_steps": self.decode_steps,
            **self._first.document(),
            "runtimes": {name: found.document() for name, found in self.runtimes.items()},
            "tensorrt_against_onnxruntime": {
                "logits": self.direct.logits.summary(),
                "layers": [vars(error) for error in self.direct.layers],
            }
            if self.direct
            else None,
            "stateless": self.stateless.document() if self.stateless else None,
        }
