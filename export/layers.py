"""The attention layers of a model, found by running it on two tokens rather than by reading its configuration."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from hqmq_trt import hf_attention
from hqmq_trt.errors import HqmqError
from hqmq_trt.hf_attention import AttentionParameters
from hqmq_trt.scheme import Scheme

from .interface import PassThroughCache, Step


@dataclass(frozen=True)
class AttentionLayer:
    """One attention layer.

    Attributes:
        index: position of its cache.
        num_heads, num_kv_heads, head_dim: query heads, K and V heads, elements of a head.
        scale, window, softcap, has_sinks: see hqmq_trt.hf_attention.AttentionParameters.
        value_projection, output_projection: names of the nn.Linear that makes V and of the one that takes the
            attention's output, if nothing but reshapes lies between them and the attention; else empty.
        rotate_value: whether the operator applies the Hadamard rotation of V (False: the weights hold it).
    """

    index: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    scale: float
    window: int
    softcap: float
    has_sinks: bool
    value_projection: str = ""
    output_projection: str = ""
    rotate_value: bool = True

    @property
    def foldable(self) -> bool:
        """Whether a rotation of V can move into the weights."""
        return bool(self.value_projection and self.output_projection)


_MASK_LENGTH = 1 << 17
"""Tokens over which the pattern of a mask is looked at: more than any window or chunk in use."""


class _Probe(Step):
    """Records every attention call and answers it with random numbers, which are recognised further on.

    `seen`: q, k and v of all calls.
    """

    def __init__(self, outputs: dict[str, Tensor]) -> None:
        self.layers: list[AttentionLayer] = []
        self.results: list[Tensor] = []
        self.seen: list[Tensor] = []
        self._outputs = outputs
        self._windows: dict[int, int] = {}
        self._masks: list[Tensor] = []  # keeps their ids alive

    def mask(self, mask_function: Any) -> Tensor:
        """A token that stands for the mask; its window is noted."""
        window = hf_attention._window(mask_function, _MASK_LENGTH, _MASK_LENGTH, 0, 0, "cpu")
        if window < 0:
            raise HqmqError(
                "this model's attention mask is neither causal nor a sliding window (chunks, packed sequences or "
                "images); HqmqAttention has no such mask"
            )
        self._masks.append(torch.empty(0))
        self._windows[id(self._masks[-1])] = window
        return self._masks[-1]

    def attend(
        self, module: nn.Module, q: Tensor, k: Tensor, v: Tensor, parameters: AttentionParameters, mask: Any
    ) -> Tensor:
        """Record the layer."""
        index, name = getattr(module, "layer_idx", None), type(module).__name__
        if not isinstance(index, int):
            raise HqmqError(f"attention module {name} has no layer_idx, so it has no place in the cache")
        if q.shape[-1] != k.shape[-1] or k.shape[-1] != v.shape[-1]:
            raise HqmqError(
                f"attention layer {index} ({name}): head_dim is {k.shape[-1]} for K and {v.shape[-1]} for V: "
                "multi-head latent attention (MLA), and V of another size than K, are not supported"
            )
        if k.shape[2] != q.shape[2]:
            raise HqmqError(f"attention layer {index} ({name}) attends to other tokens than its own: not supported")
        masked = self._windows.get(id(mask))
        if masked is None:
            raise HqmqError(
                f"attention layer {index} ({name}) gets {'no mask' if mask is None else 'a mask of its own making'} "
                "rather than transformers' causal mask (position biases such as ALiBi come that way): not supported"
            )
        if masked != parameters.window and not (masked == 0 and parameters.window >= _MASK_LENGTH):
            raise HqmqError(
                f"attention layer {index} ({name}): its mask has a window of {masked or 'all'} tokens, the layer "
                f"says {parameters.window or 'all'}; HqmqAttention cannot serve it"
            )
        self.seen += [q, k, v]
        made = v.transpose(1, 2).reshape(1, v.shape[2], -1)
        self.layers.append(
            AttentionLayer(
                index,
                q.shape[1],
                k.shape[1],
                k.shape[-1],
                parameters.scale,
                parameters.window,
                parameters.softcap,
                parameters.sinks is not None,
                value_projection=_name_of(self._outputs, made),
            )
        )
        generator = torch.Generator().manual_seed(index)
        self.results.append(torch.randn(q.shape, generator=generator).to(q))
        return self.results[-1]


def find_layers(model: Any, scheme: Scheme) -> list[AttentionLayer]:
    """The attention layers of a causal language model (IMPLEMENTATION set), in the order of their caches.

    Raises:
        HqmqError: the model is not one HQMQ can serve; the message says why.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    owners = [id(module.weight) for module in linears.values()]
    inputs: dict[str, Tensor] = {}
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if owners.count(id(module.weight)) == 1 and args:
                inputs[name], outputs[name] = args[0], output

        return hook

    hooks = [module.register_forward_hook(record(name)) for name, module in linears.items()]
    try:
        probe, cache = _probe(model, _Probe(outputs), 0)
    finally:
        for hook in hooks:
            hook.remove()
    layers = [
        replace(layer, output_projection=_name_of(inputs, result.transpose(1, 2).reshape(1, result.shape[2], -1)))
        for layer, result in zip(probe.layers, probe.results, strict=True)
    ]
    layers.sort(key=lambda layer: layer.index)
    _check(model, layers, cache.updated, scheme)
    other, _ = _probe(model, _Probe({}), 3)
    pairs = zip(probe.seen, other.seen, strict=True)
    if not all(torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True) for a, b in pairs):
        raise HqmqError(
            f"{type(model).__name__} counts positions by the length of its cache; the graph gives it position_ids, as "
            "each sequence of a batch has a length of its own: not supported"
        )
    return layers


def _probe(model: Any, probe: _Probe, length: int) -> tuple[_Probe, PassThroughCache]:
    """Run two tokens at positions 0 and 1 with a cache that claims to hold `length` others."""
    name, cache = type(model).__name__, PassThroughCache(length)
    other = _other_state(model.config.get_text_config())
    if other:
        raise HqmqError(
            f"{name} is a hybrid model: beside attention it has {other} layers, whose state is not supported"
        )
    if "position_ids" not in inspect.signature(model.forward).parameters:
        raise HqmqError(f"{name} takes no position_ids, so sequences of a batch cannot differ in length: not supported")
    ids = torch.ones(1, 2, dtype=torch.long, device=model.device)
    positions = torch.arange(2, device=model.device)[None]
    try:
        with torch.no_grad(), probe.activate():
            model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True)
    except HqmqError:
        raise
    except Exception as error:
        raise HqmqError(
            f"{name} does not run with a plain key-value cache ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}); models with recurrent or convolution state are not supported"
        ) from error
    return probe, cache


def _other_state(config: Any) -> str:
    """Kinds of layers that a configuration names beside attention, e.g. ``mamba``; empty if there are none."""
    kinds: set[str] = set()
    for name in ("layer_types", "layers_block_type", "block_types"):
        kinds |= {kind for kind in getattr(config, name, None) or () if isinstance(kind, str)}
    named = {kind for kind in kinds if "attention" not in kind}
    return ", ".join(sorted(named or kinds & {"linear_attention"}))


def _name_of(seen: dict[str, Tensor], tensor: Tensor) -> str:
    """Name of the one layer that saw exactly `tensor`; empty if there is none."""
    names = [name for name, other in seen.items() if other.shape == tensor.shape and torch.equal(other, tensor)]
    return names[0] if len(names) == 1 else ""


def _check(model: Any, layers: list[AttentionLayer], updated: list[int], scheme: Scheme) -> None:
    name = type(model).__name__
    count = int(getattr(model.config.get_text_config(), "num_hidden_layers", len(layers)))
    indices = [layer.index for layer in layers]
    if not layers:
        raise HqmqError(f"{name} has no attention layer that uses the attention interface of transformers")
    if indices != list(range(count)):
        raise HqmqError(
            f"{name}: {len(layers)} of {count} layers are attention layers: hybrid models, which mix attention with "
            "other state, are not supported"
        )
    if sorted(updated) != indices:
        raise HqmqError(f"{name}: its layers share key-value caches ({len(updated)} for {count}): not supported")
    for layer in layers:
        scheme.check_head_dim(layer.head_dim)
