"""Text to tokens and back with the tokenizer of an exported folder. Does not need torch."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest


class Tokenizer:
    """The tokenizer that lies in an exported folder.

    Raises:
        HqmqError: the folder holds none, or it cannot be read.
    """

    def __init__(self, folder: str | Path, manifest: Manifest) -> None:
        if not manifest.tokenizer_files:
            raise HqmqError(f"{folder}: was exported without a tokenizer; export a model that has one")
        from transformers import AutoTokenizer

        try:
            self._tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        except Exception as error:  # transformers and tokenizers raise types of their own
            raise HqmqError(f"{folder}: its tokenizer cannot be read ({error}); export the model again") from error

    @property
    def has_chat_template(self) -> bool:
        """Whether prompts can be put as a user's message."""
        return bool(self._tokenizer.chat_template)

    def encode(self, text: str, chat: bool = False) -> list[int]:
        """Token ids of plain text, or of a user's message put by the chat template."""
        if not chat:
            return [int(token) for token in self._tokenizer(text).input_ids]
        if not self.has_chat_template:
            raise HqmqError("this model has no chat template; use --raw")
        framed = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": text}], tokenize=False, add_generation_prompt=True
        )
        return [int(token) for token in self._tokenizer(framed, add_special_tokens=False).input_ids]

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special tokens left out."""
        text: str = self._tokenizer.decode(list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text


class TextStream:
    """Text of a growing list of tokens, piece by piece, never half a character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._tokens: list[int] = []
        self._context = self._shown = 0

    def push(self, token: int) -> str:
        """Text that `token` completes; empty while a character is unfinished."""
        self._tokens.append(token)
        before = self._tokenizer.decode(self._tokens[self._context : self._shown])
        now = self._tokenizer.decode(self._tokens[self._context :])
        if len(now) <= len(before) or now.endswith("�"):
            return ""
        # The pieces shown last stay as context: some tokenizers write a word differently at the start of a text.
        self._context, self._shown = self._shown, len(self._tokens)
        return now[len(before) :]

    def finish(self) -> str:
        """What is left when no token follows."""
        before = self._tokenizer.decode(self._tokens[self._context : self._shown])
        return self._tokenizer.decode(self._tokens[self._context :])[len(before) :]
