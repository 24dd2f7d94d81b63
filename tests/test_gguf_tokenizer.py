"""Tokenizers that transformers makes of GGUF files: words of the vocabulary must stay whole."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from hqmq_trt.errors import HqmqError
from hqmq_trt.export.source import check_words

WORDS = ("hello", "world", "quaternion", "cache", "attention", "page")


def tokenizer(broken: int) -> Any:
    """A byte-level BPE of WORDS; merges beyond two letters of the first `broken` are missing."""
    alphabet = sorted({"Ġ"} | {letter for word in WORDS for letter in word})
    vocab = {letter: index for index, letter in enumerate(alphabet)}
    merges = []
    for number, word in enumerate(WORDS):
        for length in range(1, len(word) + 1):
            begin, end = "Ġ" + word[: length - 1], word[length - 1]
            vocab.setdefault(begin + end, len(vocab))
            if number >= broken or length < 3:
                merges.append((begin, end))
    core = Tokenizer(models.BPE(vocab, merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    return PreTrainedTokenizerFast(tokenizer_object=core)


def test_whole_words_pass() -> None:
    made = tokenizer(0)
    assert len(made(" hello")["input_ids"]) == 1
    check_words(made, "tiny.gguf")


def test_most_words_in_pieces_are_refused() -> None:
    with pytest.raises(
        HqmqError, match=r"tiny\.gguf: transformers [\d.]+ cuts words .* \(\d+ of \d+; '.*' into .*5\.19"
    ):
        check_words(tokenizer(len(WORDS)), "tiny.gguf")


def test_a_vocabulary_without_words_passes() -> None:
    core = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    check_words(PreTrainedTokenizerFast(tokenizer_object=core), "bytes.gguf")
