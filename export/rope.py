"""Rotary embeddings whose frequencies depend on how long a sequence is."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from hqmq_trt.errors import HqmqError


@contextmanager
def rope_by_sequence(model: Any) -> Iterator[None]:
    """Let longrope choose between its short and long frequencies for each sequence on its own.

    transformers chooses once for the whole batch, by its longest sequence, and remembers the choice in a buffer: the
    answer to one sequence would depend on the others.

    Raises:
        HqmqError: frequencies that are computed anew from data (``dynamic``), or longrope that differs among layers.
    """
    patched = []
    for name, module in model.named_modules():
        kinds = getattr(module, "rope_type", None)
        kinds = set(kinds.values()) if isinstance(kinds, dict) else {kinds}
        found = sorted(kind for kind in kinds if isinstance(kind, str) and (kind == "longrope" or "dynamic" in kind))
        if not found:
            continue
        if found != ["longrope"] or isinstance(module.rope_type, dict):
            raise HqmqError(
                f"{type(model).__name__}: {name} has rope of type {', '.join(found)}, which computes its frequencies "
                "anew while it runs; a graph cannot"
            )
        patched.append(module)
    for module in patched:
        module.forward = _longrope(module)
    try:
        yield
    finally:
        for module in patched:
            del module.forward


def _longrope(module: Any) -> Any:
    limit = int(module.config.rope_parameters["original_max_position_embeddings"])
    device = module.inv_freq.device
    long, _ = ROPE_INIT_FUNCTIONS["longrope"](module.config, device, seq_len=limit + 1)
    tables = []
    for frequencies in (module.original_inv_freq.to(device), long.to(device)):
        table = copy.copy(module)
        table._buffers = {**module._buffers, "inv_freq": frequencies}
        tables.append(table)
    forward = inspect.unwrap(type(module).forward)  # without the decorator that chooses for the batch

    def by_sequence(x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        short, long = (forward(table, x, position_ids) for table in tables)
        beyond = (position_ids[:, -1:] >= limit)[:, :, None]  # positions ascend
        return torch.where(beyond, long[0], short[0]), torch.where(beyond, long[1], short[1])

    return by_sequence
