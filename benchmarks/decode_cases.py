"""What benchmarks/engine.py times: a decode step of an engine of ours, and the same model in PyTorch.

Both run one model of random weights and Llama's layer shapes. Caches are not prefilled: every sequence gets the same
real codes, those of BLOCK Gaussian tokens, written by the host codec and repeated up to the capacity; lengths are then
set by hand. A step appends a token, so codes, scales and means are what a running model has, and finite.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.host_time import Host, HostClock, timed
from hqmq_trt import codebooks, native
from hqmq_trt.runtime import Session

BLOCK = 1024
"""Tokens that are really coded; a multiple of every page size."""


@dataclass(frozen=True)
class Shape:
    """Layer shapes; the defaults are Llama-3-8B's but for `layers` (32) and `vocab` (128,256)."""

    layers: int = 8
    vocab: int = 8192
    hidden: int = 4096
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    intermediate: int = 14336

    def config(self) -> Any:
        """The transformers configuration."""
        from transformers import LlamaConfig

        return LlamaConfig(
            vocab_size=self.vocab,
            hidden_size=self.hidden,
            intermediate_size=self.intermediate,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.kv_heads,
            head_dim=self.head_dim,
            max_position_embeddings=1 << 18,
            rms_norm_eps=1e-5,
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
        )


def random_model(shape: Shape, device: str, dtype: torch.dtype = torch.float16) -> Any:
    """A LlamaForCausalLM with reproducible random weights on `device`."""
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    with torch.device(device):
        model = LlamaForCausalLM(shape.config())
    return model.to(dtype).eval()


class _DeviceArray:
    """Device memory that torch can wrap."""

    def __init__(self, address: int, shape: tuple[int, ...], dtype: str) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": {"int32": "<i4", "float16": "<f2"}[dtype],
            "version": 3,
            "strides": None,
        }


def cache_tensors_of(session: Session) -> Iterator[tuple[int, str, list[Tensor]]]:
    """(layer, role, tensors) of a session's cache as torch tensors over its own memory."""
    gpu = getattr(session, "_gpu", None)  # a TrtSession's; it offers copies only, and this is up to 34 GB
    names: dict[tuple[int, str], list[str]] = {}
    for name, _ in session.manifest.cache(1, 1):
        layer, role, _ = name.split(".")
        names.setdefault((int(layer), role), []).append(name)
    for (index, role), found in names.items():
        if gpu is None:
            buffers = session.cache_buffers(index, role)  # type: ignore[attr-defined]
            yield index, role, [torch.from_numpy(buffer) for buffer in buffers]
            continue
        specs = [gpu.arena.specs[name] for name in found]
        views = [_DeviceArray(gpu.arena.address[n], s.shape, s.dtype) for n, s in zip(found, specs, strict=True)]
        yield index, role, [torch.as_tensor(view, device=f"cuda:{gpu.device.index}") for view in views]


def fill_cache(session: Session) -> None:
    """Repeat the codes of BLOCK Gaussian tokens over every sequence, layer and page."""
    scheme, page = session.scheme, session.scheme.page_size
    for index, role_name, tensors in cache_tensors_of(session):
        layer, role = session.manifest.layers[index], scheme.role(role_name)
        heads, dim = layer.num_kv_heads, layer.head_dim
        pages = BLOCK // page
        sizes = {"codes": BLOCK, "tail": page + role.sink_tokens}
        block = [
            torch.zeros(1, heads, sizes.get(name, pages), *tensor.shape[3:]).to(tensor.dtype)
            for name, tensor in zip(_names(session, index, role_name), tensors, strict=True)
        ]
        book: list[Tensor] = []
        if role.packed:
            secondaries = codebooks.secondaries(role, scheme.seed, index, heads, role_name)
            book = [torch.from_numpy(secondaries), torch.from_numpy(codebooks.levels(role))]
        g = torch.Generator().manual_seed(2 * index + (role_name == "value"))
        x = torch.randn(1, heads, BLOCK, dim, generator=g)
        lengths = [torch.tensor([n], dtype=torch.int32) for n in (0, BLOCK)]
        native.append(x, lengths[0], lengths[1], role, book, block)
        for target, source in zip(tensors, block, strict=True):
            on_device = source.to(target.device)
            for start in range(0, target.shape[2], source.shape[2]):
                rows = min(source.shape[2], target.shape[2] - start)
                target[:, :, start : start + rows] = on_device[:, :, :rows]
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _names(session: Session, index: int, role: str) -> list[str]:
    prefix = f"{index}.{role}."
    return [name.removeprefix(prefix) for name, _ in session.manifest.cache(1, 1) if name.startswith(prefix)]


class EngineDecoder:
    """A session with full caches; `measure` times a step at any context and batch up to its limits."""

    def __init__(self, folder: Path, batch: int, context: int) -> None:
        from hqmq_trt.runtime import open_session

        self.session = open_session(folder, max_batch=batch, max_context=context)
        try:
            fill_cache(self.session)
        except BaseException:
            self.session.close()
            raise

    def measure(self, batch: int, context: int, seconds: float) -> dict[str, Any]:
        """Milliseconds of a step: in the middle of a page, of one that fills a page, and their mean over a page."""
        session, page = self.session, self.session.scheme.page_size
        with HostClock(session) as clock:
            middle = timed(lambda: clock.of(self.step(batch, context - page // 2)), seconds * 0.7)
            fill = timed(lambda: clock.of(self.step(batch, context - 1)), seconds * 0.3)
        mean = middle.seconds + (fill.seconds - middle.seconds) / page
        return {
            "ms": 1e3 * mean,
            "fill_ms": 1e3 * fill.seconds,
            **middle.host_us(),
            "repeats": middle.repeats,
        }

    def step(self, batch: int, past: int) -> Callable[[], None]:
        """A decode step of `batch` sequences that hold `past` tokens."""
        session = self.session
        tokens = [7 * b % session.manifest.vocab_size for b in range(batch)]
        session.lengths[:] = 0
        session.lengths[:batch] = past

        def run() -> None:
            session.decode(tokens)

        return run

    def close(self) -> None:
        """Free the session."""
        self.session.close()


class TorchDecoder:
    """The same model in PyTorch: fp16 static cache, cuDNN attention, q/k/v and gate/up as one product each, and one
    CUDA graph a point that also holds the copies of ids and of logits (fp16; an engine of ours copies float32). On the
    CPU: no graph, PyTorch's own attention."""

    def __init__(self, model: Any, shape: Shape, batch: int, context: int) -> None:
        self.shape, self.weights, self.device = shape, _Weights(model), model.device
        self.cos, self.sin = _rotary(model, context)
        size = (2, batch, shape.kv_heads, context, shape.head_dim)
        # Allocated first, so that a lack of memory shows before anything is computed.
        self.caches = [torch.empty(size, dtype=model.dtype, device=model.device) for _ in range(shape.layers)]
        g = torch.Generator(device=model.device).manual_seed(1)
        rows = min(BLOCK, context)
        block = torch.randn(*size[:3], rows, shape.head_dim, generator=g, device=model.device).to(model.dtype)
        for cache in self.caches:
            for start in range(0, context, rows):
                count = min(rows, context - start)
                cache[:, :, :, start : start + count] = block[:, :, :, :count]

    def forward(self, ids: Tensor, past: int) -> Tensor:
        """Logits [B, V] after appending ids [B, 1] at position `past`."""
        w, s, batch = self.weights, self.shape, ids.shape[0]
        x = F.embedding(ids, w.embedding)
        cos, sin = self.cos[past], self.sin[past]
        for layer, cache in zip(w.layers, self.caches, strict=True):
            h = F.rms_norm(x, (s.hidden,), layer["norm1"], w.eps)
            split = (s.heads, s.kv_heads, s.kv_heads)
            found = F.linear(h, layer["qkv"]).view(batch, 1, sum(split), s.head_dim).transpose(1, 2)
            q, k, v = found.split(split, 1)
            cache[0, :batch, :, past : past + 1] = _rotate(k, cos, sin)
            cache[1, :batch, :, past : past + 1] = v
            keys, values = cache[:, :batch, :, : past + 1]
            y = F.scaled_dot_product_attention(_rotate(q, cos, sin), keys, values, enable_gqa=True)
            x = x + F.linear(y.transpose(1, 2).reshape(batch, 1, -1), layer["out"])
            h = F.rms_norm(x, (s.hidden,), layer["norm2"], w.eps)
            gate, up = F.linear(h, layer["gate_up"]).chunk(2, -1)
            x = x + F.linear(F.silu(gate) * up, layer["down"])
        x = F.rms_norm(x, (s.hidden,), w.norm, w.eps)
        return F.linear(x, w.head)[:, 0]

    @torch.no_grad()
    def measure(self, batch: int, context: int, seconds: float) -> dict[str, Any]:
        """Milliseconds of a step that sees `context` tokens."""
        found = timed(self.step(batch, context - 1), seconds)
        return {"ms": 1e3 * found.seconds, "fill_ms": None, **found.host_us(), "repeats": found.repeats}

    def step(self, batch: int, past: int) -> Callable[[], Host | None]:
        """A step of `batch` sequences at position `past`."""
        ids = torch.arange(batch)[:, None] * 7 % self.shape.vocab
        if self.device.type != "cpu":
            return self._capture(ids.pin_memory(), past)

        def plain() -> None:
            with torch.no_grad():
                self.forward(ids, past)

        return plain

    @torch.no_grad()
    def _capture(self, ids: Tensor, past: int) -> Callable[[], Host]:
        held = ids.to(self.device)
        logits = torch.empty(len(ids), self.shape.vocab, dtype=self.weights.head.dtype, pin_memory=True)

        def once() -> None:
            held.copy_(ids, non_blocking=True)
            logits.copy_(self.forward(held, past), non_blocking=True)

        stream = torch.cuda.Stream()
        graph = torch.cuda.CUDAGraph()
        with _cudnn_attention():
            with torch.cuda.stream(stream):
                once()
            stream.synchronize()
            with torch.cuda.graph(graph, stream=stream):
                once()

        def replay() -> Host:
            begin, begin_cpu = time.perf_counter(), time.thread_time()
            with torch.cuda.stream(stream):
                graph.replay()
            worked = Host(time.perf_counter() - begin, time.thread_time() - begin_cpu, 0.0, 0.0)
            stream.synchronize()
            return worked

        return replay

    def close(self) -> None:
        """Drop weights and cache."""
        self.caches.clear()
        self.weights.layers.clear()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()


@contextmanager
def _cudnn_attention() -> Iterator[None]:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        yield


class _Weights:
    """A LlamaForCausalLM's weights, products over one input joined."""

    def __init__(self, model: Any) -> None:
        body = model.model
        self.embedding, self.norm, self.head = body.embed_tokens.weight, body.norm.weight, model.lm_head.weight
        self.eps = float(model.config.rms_norm_eps)
        self.layers: list[dict[str, Tensor]] = []
        for layer in body.layers:
            attention, mlp = layer.self_attn, layer.mlp
            with torch.no_grad():
                self.layers.append(
                    {
                        "qkv": torch.cat([getattr(attention, f"{key}_proj").weight for key in "qkv"]),
                        "out": attention.o_proj.weight,
                        "gate_up": torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]),
                        "down": mlp.down_proj.weight,
                        "norm1": layer.input_layernorm.weight,
                        "norm2": layer.post_attention_layernorm.weight,
                    }
                )


def _rotary(model: Any, context: int) -> tuple[Tensor, Tensor]:
    positions = torch.arange(context, device=model.device)[None]
    like = torch.empty(0, dtype=model.dtype, device=model.device)
    with torch.no_grad():
        cos, sin = model.model.rotary_emb(like, positions)
    return cos[0], sin[0]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = x.chunk(2, -1)
    return x * cos + torch.cat([-high, low], -1) * sin


def plan_points(contexts: list[int], batches: list[int], focus: tuple[int, int] = (8, 32768)) -> list[tuple[int, int]]:
    """(batch, context) pairs, the most telling first: `focus`, then by distance from it, large batches first."""
    points = [(batch, context) for batch in batches for context in contexts]
    return sorted(points, key=lambda p: (p != focus, abs(np.log2(p[1] / focus[1])) + (p[0] != focus[0]), -p[0], p[1]))
