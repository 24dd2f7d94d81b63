"""The strict comparison: before each feed the session takes over the bytes of the PyTorch reference's cache.

Left to themselves, two runtimes that differ by rounding code a few chunks differently, each flip is as large as the
codec's own error, and the layers above see it. Here every feed begins from the same bytes and fills at most one page,
so what is left is how well the session reads the cache and how often it writes other bytes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from hqmq_trt import native
from hqmq_trt.diff.runners import SessionRunner, TorchRunner
from hqmq_trt.format import cache_tensors
from hqmq_trt.manifest import Layer
from hqmq_trt.oracle.codec import hadamard
from hqmq_trt.scheme import ROLES, RoleScheme


@dataclass
class Recording:
    """What the cache of a PyTorch run held, feed by feed, for one sequence.

    Attributes:
        tails: before each feed, the tails [1, H, P+N, D] of every layer by role.
        final: after the last feed, all tensors of every layer by role (hqmq_trt.format.cache_tensors). Rows of full
            pages never change, so they serve for every feed.

    All of them lie in host memory.
    """

    tails: list[list[dict[str, Tensor]]] = field(default_factory=list)
    final: list[dict[str, list[Tensor]]] = field(default_factory=list)


class RecordingRunner(TorchRunner):
    """A model with an HqmqCache that fills `recording`."""

    def __init__(self, recording: Recording, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recording = recording

    def start(self) -> None:
        """A fresh cache and an empty recording."""
        super().start()
        self._recording.tails.clear()

    def logits(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of a forward pass; the tails before it are kept."""
        before = self._cache.layers if self._cache.layers[0].is_initialized else []
        self._recording.tails.append(
            [{role: layer.role_tensors(role)[-1].to("cpu", copy=True) for role in ROLES} for layer in before]
        )
        return super().logits(input_ids)

    def deactivate_impl(self) -> None:
        """Keep what the cache holds, then free it."""
        if self._cache is not None:
            self._recording.final = [
                {role: [tensor.cpu() for tensor in layer.role_tensors(role)] for role in ROLES}
                for layer in self._cache.layers
            ]
        super().deactivate_impl()


class PinnedRunner(SessionRunner):
    """A session that begins every feed with the bytes of a finished recording.

    Attributes:
        chunks, changed: chunks it coded, by role, and how many got another code than the reference's.
    """

    def __init__(self, recording: Recording, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._recording = recording
        self.chunks = dict.fromkeys(ROLES, 0)
        self.changed = dict.fromkeys(ROLES, 0)

    def start(self) -> None:
        """Empty the cache."""
        super().start()
        self._feed = 0

    def logits(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of one run from the reference's bytes."""
        session = self._active
        page_size = session.scheme.page_size
        first = int(session.lengths[0]) // page_size
        self._write(self._recording.tails[self._feed], first)
        self._feed += 1
        logits = super().logits(input_ids)
        self._count(range(first, int(session.lengths[0]) // page_size))
        return logits

    def _write(self, tails: list[dict[str, Tensor]], pages: int) -> None:
        """Put the reference's first full pages and its tails into the session's cache."""
        session = self._active
        for index, layer_tails in enumerate(tails):
            layer = session.manifest.layers[index]
            for role in ROLES:
                codec = session.scheme.role(role)
                specs = cache_tensors(codec, session.scheme.page_size, layer.head_dim, layer.num_kv_heads, 1, pages)
                for spec, tensor in zip(specs[:-1], self._recording.final[index][role], strict=False):
                    session._write_cache(f"{index}.{role}.{spec.name}", 0, tensor[0, :, : spec.shape[2]].numpy())
                tail = layer_tails[role][0]
                if role == "value" and layer.value_rotation_folded and codec.hadamard:
                    tail = hadamard(tail.float()).half()
                session._write_cache(f"{index}.{role}.{specs[-1].name}", 0, tail.numpy())

    def _count(self, pages: range) -> None:
        """Compare the codes of the pages that this feed has filled."""
        if not pages:
            return
        session = self._active
        rows = slice(pages.start * session.scheme.page_size, pages.stop * session.scheme.page_size)
        for index, tensors in enumerate(self._recording.final):
            for role in ROLES:
                ours, theirs = session.cache_arrays(index, role)[0], tensors[role][0].numpy()
                chunks, changed = differing_chunks(
                    ours[0, :, rows], theirs[0, :, rows], session.scheme.role(role), session.manifest.layers[index]
                )
                self.chunks[role] += chunks
                self.changed[role] += changed

    def cached(self) -> Mapping[str, NDArray[np.float32]]:
        """Nothing: K and V are the reference's."""
        return {}


def differing_chunks(ours: NDArray[Any], theirs: NDArray[Any], codec: RoleScheme, layer: Layer) -> tuple[int, int]:
    """(chunks, how many differ) of two arrays [H, rows, words] of codes; words, where `codec` packs none."""
    found = [ours, theirs]
    if codec.packed:
        found = [native.unpack(np.ascontiguousarray(x).reshape(-1, x.shape[-1]), codec, layer.head_dim) for x in found]
    return found[0].size, int((found[0] != found[1]).sum())
