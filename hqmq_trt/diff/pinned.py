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
from hqmq_trt.oracle.codec import hadamard
from hqmq_trt.scheme import ROLES


@dataclass
class Recording:
    """What the cache of a PyTorch run held, feed by feed, for one sequence.

    Attributes:
        tails: before each feed, the tails [1, H, P, D] of every layer by role.
        final: after the last feed, all tensors of every layer by role (hqmq_trt.format.cache_tensors). Rows of full
            pages never change, so they serve for every feed.
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
        before = self._by_role() if self._cache.layers[0].is_initialized else []
        self._recording.tails.append([{role: parts[role][-1].clone() for role in ROLES} for parts in before])
        logits = super().logits(input_ids)
        self._recording.final = self._by_role()
        return logits

    def _by_role(self) -> list[dict[str, list[Tensor]]]:
        return [{role: layer.role_tensors(role) for role in ROLES} for layer in self._cache.layers]


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
        tails = self._recording.tails[self._feed]
        self._feed += 1
        for index, layer_tails in enumerate(tails):
            folded = session.manifest.layers[index].value_rotation_folded
            for role in ROLES:
                buffers = session.cache_buffers(index, role)
                for buffer, tensor in zip(buffers[:-1], self._recording.final[index][role], strict=False):
                    buffer[:1] = tensor[:, :, : buffer.shape[2]].numpy()
                tail = layer_tails[role]
                if role == "value" and folded and session.scheme.value.hadamard:
                    tail = hadamard(tail.float()).half()
                buffers[-1][:1] = tail.numpy()
        first = int(session.lengths[0]) // session.scheme.page_size
        logits = super().logits(input_ids)
        self._count(range(first, int(session.lengths[0]) // session.scheme.page_size))
        return logits

    def _count(self, pages: range) -> None:
        session = self._active
        for index, tensors in enumerate(self._recording.final):
            for role in ROLES:
                codec = session.scheme.role(role)
                rows = slice(pages.start * session.scheme.page_size, pages.stop * session.scheme.page_size)
                words = [x[0, :, rows] for x in (session.cache_buffers(index, role)[0], tensors[role][0].numpy())]
                if codec.packed:
                    head_dim = session.manifest.layers[index].head_dim
                    words = [native.unpack(x.reshape(-1, x.shape[-1]), codec, head_dim) for x in words]
                self.chunks[role] += words[0].size
                self.changed[role] += int((words[0] != words[1]).sum())

    def cached(self) -> Mapping[str, NDArray[np.float32]]:
        """Nothing: K and V are the reference's."""
        return {}
