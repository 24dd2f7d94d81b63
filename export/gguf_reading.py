"""Loading a GGUF file through transformers without reading its metadata three times."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache


@contextmanager
def reading_once() -> Iterator[None]:
    """Within the block, the package gguf gives one reader per file and one table of tensor names per architecture.

    transformers opens the file anew for the config, the weights and the tokenizer, and makes the table for every
    module of the model; a vocabulary of 150,000 tokens takes half a minute to read.
    """
    import gguf

    reader, names = gguf.GGUFReader, gguf.get_tensor_name_map
    gguf.GGUFReader, gguf.get_tensor_name_map = lru_cache(maxsize=1)(reader), lru_cache(maxsize=1)(names)
    try:
        yield
    finally:
        gguf.GGUFReader, gguf.get_tensor_name_map = reader, names
