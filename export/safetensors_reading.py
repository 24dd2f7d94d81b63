"""Loading safetensors through transformers into another type without the whole file in memory beside it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_NAMES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


@contextmanager
def reading_apart(dtype: Any) -> Iterator[None]:
    """Within the block, transformers reads files whose tensors are not `dtype` (a torch.dtype) tensor by tensor.

    It maps files into memory. That costs nothing where tensors stay as they are, but pages of tensors that are
    converted stay resident until the file is closed: a float16 checkpoint made float32 takes one and a half times the
    memory of the model.
    """
    from transformers import modeling_utils

    original = modeling_utils.safe_open
    wanted = _NAMES.get(dtype)

    def opened(*args: Any, **kwargs: Any) -> Any:
        mapped = original(*args, **kwargs)
        if wanted is None or all(mapped.get_slice(name).get_dtype() == wanted for name in mapped.keys()):  # noqa: SIM118
            return mapped
        try:
            return original(*args, **{**kwargs, "backend": "pread"})
        except TypeError:  # safetensors before 0.8
            return mapped

    modeling_utils.safe_open = opened
    try:
        yield
    finally:
        modeling_utils.safe_open = original
