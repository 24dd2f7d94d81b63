"""Graph capture: a causal language model behind the graph interface of docs/export.md, with hqmq operators inside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hqmq_trt import codebooks, torch_ops
from hqmq_trt.hf_attention import AttentionParameters
from hqmq_trt.scheme import ROLES, Scheme

from .interface import PassThroughCache, Step
from .layers import AttentionLayer


class _RoleBook(nn.Module):
    def __init__(self, secondaries: Tensor, levels: Tensor) -> None:
        super().__init__()
        self.register_buffer("secondaries", secondaries)
        self.register_buffer("levels", levels)


class CaptureModule(nn.Module):
    """A language model as a pure function of ids, lengths and cache.

    forward(input_ids int64 [B, T], past_length int32 [B], new_length int32 [B], logits_index int64 [B, N], past)
    → (logits [B, N, V], present_length int32 [B], present). `past` and `present`: for each layer the cache tensors
    of hqmq_trt.format.cache_tensors, key's before value's. `mode`: ``fused`` or ``qdq``.
    """

    def __init__(self, model: Any, scheme: Scheme, mode: str, layers: Sequence[AttentionLayer]) -> None:
        super().__init__()
        self.model, self.scheme, self.mode, self.layers = model, scheme, mode, layers
        self._logits_index: Tensor | None = None
        books = {}
        for layer in layers:
            roles = {}
            for role in ROLES:
                codec = scheme.role(role)
                if codec.packed:
                    secondaries = codebooks.secondaries(codec, scheme.seed, layer.index, layer.num_kv_heads, role)
                    roles[role] = _RoleBook(torch.from_numpy(secondaries), torch.from_numpy(codebooks.levels(codec)))
            books[str(layer.index)] = nn.ModuleDict(roles)
        self.codebook = nn.ModuleDict(books)

    def codebooks(self, index: int) -> dict[str, list[Tensor]]:
        """[secondaries, levels] of one layer by role; [] for storage fp16."""
        books: Any = self.codebook[str(index)]
        return {role: [books[role].secondaries, books[role].levels] if role in books else [] for role in ROLES}

    def _select_rows(self, module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Before the output layer: hidden states [B, T, F] → the wanted rows [B*N, F].

        Two dimensions turn the layer into a Gemm, which takes tied weights without a transposed copy.
        """
        hidden, index = args[0], self._logits_index
        assert index is not None
        first = torch.arange(hidden.shape[0], device=index.device)[:, None] * hidden.shape[1]
        return (hidden.flatten(0, 1)[(first + index).flatten()], *args[1:])

    def forward(
        self, input_ids: Tensor, past_length: Tensor, new_length: Tensor, logits_index: Tensor, past: list[list[Tensor]]
    ) -> tuple[Tensor, Tensor, list[list[Tensor]]]:
        """See the class."""
        step = _GraphStep(self, input_ids.shape[1], past_length, new_length, past)
        self._logits_index = logits_index
        hook = self.model.get_output_embeddings().register_forward_pre_hook(self._select_rows)
        try:
            with step.activate():
                output = self.model(
                    input_ids=input_ids,
                    position_ids=step.table_positions(),
                    past_key_values=PassThroughCache(),
                    use_cache=True,
                )
        finally:
            hook.remove()
            self._logits_index = None
        logits = output.logits.reshape(logits_index.shape[0], logits_index.shape[1], output.logits.shape[-1])
        return logits, step.present_length, step.present


class _GraphStep(Step):
    """The step that is captured. `present[i]`: cache tensors of layer i, key's before value's."""

    def __init__(
        self, graph: CaptureModule, rows: Any, past_length: Tensor, new_length: Tensor, past: list[list[Tensor]]
    ) -> None:
        self.graph, self.past = graph, past
        self.past_length, self.new_length = past_length, new_length
        self.present_length = past_length + new_length
        self.present: list[list[Tensor]] = [[] for _ in past]
        row = torch.arange(rows, device=past_length.device)[None]
        self._positions = past_length.long()[:, None] + row
        self._valid = row < new_length.long()[:, None]
        self._visible: dict[int, Tensor] = {}

    def table_positions(self) -> Tensor:
        """Position ids [B, T]; padding rows repeat the last position, so as not to run past a table of positions."""
        last = (self.present_length.long() - 1).clamp_min(0)[:, None]
        return torch.minimum(self._positions, last)

    def mask(self, mask_function: Any) -> None:
        """None: hqmq operators know their mask."""

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, parameters: AttentionParameters, mask: Any
    ) -> Tensor:
        """HqmqAttention, or HqmqQuantize, HqmqDequantize and ordinary attention."""
        index = int(module.layer_idx)  # type: ignore[arg-type]
        run = self._fused if self.graph.mode == "fused" else self._qdq
        return run(index, q, k, v, parameters)

    def _fused(self, index: int, q: Tensor, k: Tensor, v: Tensor, parameters: AttentionParameters) -> Tensor:
        books = self.graph.codebooks(index)
        y, *self.present[index] = torch.ops.hqmq.attention(
            q,
            k,
            v,
            self.past_length,
            self.new_length,
            parameters.sinks,
            [*books["key"], *books["value"]],
            self.past[index],
            self.graph.scheme.name,
            parameters.scale,
            parameters.window,
            parameters.softcap,
            self.graph.layers[index].rotate_value,
        )
        return y

    def _qdq(self, index: int, q: Tensor, k: Tensor, v: Tensor, parameters: AttentionParameters) -> Tensor:
        books, scheme = self.graph.codebooks(index), self.graph.scheme
        count = len(torch_ops.tensor_names(scheme.key))
        dense = []
        for role, x, past in zip(ROLES, (k, v), (self.past[index][:count], self.past[index][count:]), strict=True):
            rotate = role == "key" or self.graph.layers[index].rotate_value
            present = torch.ops.hqmq.quantize(
                x, self.past_length, self.new_length, books[role], past, scheme.name, role, rotate
            )
            self.present[index] += present
            dense.append(
                torch.ops.hqmq.dequantize(
                    self.present_length, books[role], present, scheme.name, role, torch.float32, rotate
                )
            )
        return self._ordinary(q, dense[0], dense[1], parameters)

    def _ordinary(self, q: Tensor, keys: Tensor, values: Tensor, parameters: AttentionParameters) -> Tensor:
        """Attention of q [B, Hq, T, D] over a dense cache float32 [B, H, R, D], decomposed: TensorRT before 10.14 has
        no Attention operator. The query heads of a group become rows, so that K and V are not repeated. In float32:
        scores of models with large key biases (Qwen2.5) exceed what float16 holds."""
        batch, heads, rows, head_dim = q.shape
        kv_heads, capacity = keys.shape[1], keys.shape[2]
        grouped = q.float().reshape(batch, kv_heads, heads // kv_heads * rows, head_dim)
        score = (grouped @ keys.transpose(2, 3)) * parameters.scale
        score = score.reshape(batch, heads, rows, capacity)
        if parameters.softcap > 0:
            score = torch.tanh(score / parameters.softcap) * parameters.softcap
        # A finite bound instead of -inf: a padding row may see no key at all.
        score = torch.where(self._seen(parameters.window, capacity), score, -3.0e38)
        if parameters.sinks is None:
            weight = score.softmax(3)
        else:
            sinks = parameters.sinks.float().reshape(1, -1, 1, 1).expand(batch, -1, rows, 1)
            weight = torch.cat([score, sinks], 3).softmax(3)[..., :capacity]
        y = weight.reshape(batch, kv_heads, heads // kv_heads * rows, capacity) @ values
        return y.to(q.dtype).reshape(batch, heads, rows, head_dim) * self._valid[:, None, :, None].to(q.dtype)

    def _seen(self, window: int, capacity: Any) -> Tensor:
        """Keys a query sees, bool [B, 1, T, R]."""
        if window not in self._visible:
            key = torch.arange(capacity, device=self._positions.device)
            query = self._positions[:, :, None]
            seen = (key <= query) & (key < self.present_length.long()[:, None, None])
            if window > 0:
                seen = seen & (key > query - window)
            self._visible[window] = seen[:, None]
        return self._visible[window]
