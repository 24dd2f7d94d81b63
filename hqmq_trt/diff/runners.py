"""Polygraphy runners with a KV cache: each feed continues the sequence that the feed with position 0 began.

Feeds: ``input_ids`` int64 [1, T], ``position`` int64 [1] (tokens before this feed), ``want_cache`` bool [1].
Outputs: ``logits`` float32 [T, V] and, where asked for, ``key.{layer}`` and ``value.{layer}`` float32 [H, tokens, D].
"""

from __future__ import annotations

import time
from abc import abstractmethod
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from polygraphy.backend.base import BaseRunner
from polygraphy.common import TensorMetadata

from hqmq_trt import codebooks
from hqmq_trt.oracle.codec import hadamard
from hqmq_trt.runtime.session import Session
from hqmq_trt.scheme import ROLES, RoleScheme

Arrays = OrderedDict[str, NDArray[Any]]


class CachedRunner(BaseRunner):
    """What the runners share: the feed's metadata, and resetting at position 0."""

    def __init__(self, name: str, on_feed: Callable[[int], None] | None = None) -> None:
        super().__init__(name=name, prefix=name)
        self._on_feed = on_feed

    @abstractmethod
    def start(self) -> None:
        """Forget the sequence."""

    @abstractmethod
    def logits(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Append input_ids [1, T] and return logits [T, V]."""

    @abstractmethod
    def cached(self) -> Mapping[str, NDArray[np.float32]]:
        """K and V of the sequence by ``role.layer``."""

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Names and types of a feed."""
        metadata = TensorMetadata()
        metadata.add("input_ids", np.int64, (1, None))
        metadata.add("position", np.int64, (1,))
        metadata.add("want_cache", np.bool_, (1,))
        return metadata

    def infer_impl(self, feed_dict: Mapping[str, NDArray[Any]]) -> Arrays:
        """One feed."""
        if int(feed_dict["position"][0]) == 0:
            self.start()
        start = time.perf_counter()
        outputs: Arrays = OrderedDict(logits=self.logits(np.asarray(feed_dict["input_ids"])))
        self.inference_time = time.perf_counter() - start
        if bool(feed_dict["want_cache"][0]):
            outputs.update(self.cached())
        if self._on_feed:
            self._on_feed(feed_dict["input_ids"].shape[1])
        return outputs


class TorchRunner(CachedRunner):
    """A transformers model with a cache made by `new_cache`; its own K and V are reported if it is a DynamicCache.

    `attention` is the attention implementation to use while the runner is active; None keeps the model's. `weights`
    makes the context in which it is active.
    """

    def __init__(
        self,
        name: str,
        model: Any,
        new_cache: Callable[[], Any],
        attention: str | None = None,
        on_feed: Callable[[int], None] | None = None,
        weights: Callable[[], AbstractContextManager[None]] | None = None,
    ) -> None:
        super().__init__(name, on_feed)
        self._weights, self._inside = weights, ExitStack()
        self._model, self._new_cache, self._attention = model, new_cache, attention
        self._before = model.config._attn_implementation
        self._cache: Any = None

    def activate_impl(self) -> None:
        """Switch the model's attention and weights."""
        if self._weights:
            self._inside.enter_context(self._weights())
        self._model.set_attn_implementation(self._attention or self._before)

    def deactivate_impl(self) -> None:
        """Free the cache and switch attention and weights back."""
        self._cache = None
        self._inside.close()
        self._model.set_attn_implementation(self._before)

    def start(self) -> None:
        """A fresh cache."""
        self._cache = self._new_cache()

    @torch.inference_mode()
    def logits(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of a forward pass."""
        ids = torch.from_numpy(input_ids).to(self._model.device)
        out = self._model(input_ids=ids, past_key_values=self._cache, use_cache=True)
        result: NDArray[np.float32] = out.logits[0].float().cpu().numpy()
        return result

    def cached(self) -> Mapping[str, NDArray[np.float32]]:
        """K and V of a DynamicCache."""
        from transformers import DynamicCache

        if not isinstance(self._cache, DynamicCache):
            return {}
        return {
            f"{role}.{index}": getattr(layer, f"{role}s")[0].float().cpu().numpy()
            for index, layer in enumerate(self._cache.layers)
            for role in ROLES
        }


class SessionRunner(CachedRunner):
    """A session of any runtime; K and V are what its cache decodes to, in the basis of the unfolded model.

    Attributes:
        cache_nbytes: bytes of the session's cache by kind, once the runner was active.
    """

    def __init__(
        self, name: str, new_session: Callable[[], Session], on_feed: Callable[[int], None] | None = None
    ) -> None:
        super().__init__(name, on_feed)
        self._new_session = new_session
        self._session: Session | None = None
        self.cache_nbytes: dict[str, int] = {}

    def activate_impl(self) -> None:
        """Load the model."""
        self._session = self._new_session()
        self.cache_nbytes = self._session.cache_nbytes()

    def deactivate_impl(self) -> None:
        """Free the model and its cache."""
        if self._session is not None:
            self._session.close()
        self._session = None

    @property
    def _active(self) -> Session:
        assert self._session is not None, "the runner is not active"
        return self._session

    def start(self) -> None:
        """Empty the cache."""
        self._active.reset()

    def logits(self, input_ids: NDArray[np.int64]) -> NDArray[np.float32]:
        """Logits of one run."""
        count = input_ids.shape[1]
        rows = np.arange(count, dtype=np.int64)[None]
        return self._active.step(input_ids, np.array([count], np.int32), rows)[0]

    def cached(self) -> Mapping[str, NDArray[np.float32]]:
        """Decoded K and V."""
        session = self._active
        length = int(session.lengths[0])
        found = {}
        for index, layer in enumerate(session.manifest.layers):
            for name in ROLES:
                role = session.scheme.role(name)
                rotate = not (name == "value" and layer.value_rotation_folded)
                x = torch.ops.hqmq.dequantize(
                    torch.from_numpy(session.lengths[:1].copy()),
                    codebook_tensors(role, session.scheme.seed, index, layer.num_kv_heads, name),
                    [torch.from_numpy(buffer[:1]) for buffer in session.cache_arrays(index, name)],
                    session.scheme.name,
                    name,
                    torch.float32,
                    rotate,
                )[0, :, :length]
                # Folded weights give V rotated, pages and tail alike; the rotation is its own inverse.
                x = x if rotate or not role.hadamard else hadamard(x)
                found[f"{name}.{index}"] = x.numpy()
        return found


def codebook_tensors(role: RoleScheme, seed: int, layer: int, num_kv_heads: int, name: str) -> list[torch.Tensor]:
    """The operators' codebook argument: secondaries [H, S, 4] and levels [2^r], or nothing for fp16."""
    if not role.packed:
        return []
    secondaries = codebooks.secondaries(role, seed, layer, num_kv_heads, name)
    return [torch.from_numpy(secondaries), torch.from_numpy(codebooks.levels(role))]
