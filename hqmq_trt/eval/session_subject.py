"""A Subject that is an exported folder or an engine, run by its own runtime (ONNX Runtime or TensorRT)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.subject import PACKED_CACHE, Bits, Codec, Scores, Subject, join_scores, score_rows
from hqmq_trt.runtime import Request, TrtSession, generate, open_session
from hqmq_trt.runtime.session import Session

_ROWS = 128
"""Tokens whose logits travel at a time."""


class SessionSubject(Subject):
    """See Subject. One sequence at a time.

    Args:
        folder: what `hqmq-trt export` or `hqmq-trt build` wrote.
        max_context: tokens a sequence may have; None: the engine's limit, or that of an OrtSession.
        tokenizer: of transformers; None: the folder's own.

    Raises:
        HqmqError: as the session's constructor.
    """

    def __init__(self, folder: str | Path, max_context: int | None = None, tokenizer: Any = None) -> None:
        self._session: Session = open_session(folder, max_batch=1, max_context=max_context, prefill_chunk=None)
        manifest = self._session.manifest
        self._codec = Codec.of(self._session.scheme)
        self.model_name, self.model_sha256 = manifest.source, self._session.model_sha256()
        self.codec, self.circumstances = self._codec.name, PACKED_CACHE
        self.mode, self.max_context = manifest.mode, self._session.max_context
        runtime = "tensorrt" if isinstance(self._session, TrtSession) else "onnxruntime"
        self.where = f"{runtime} {manifest.dtype}"
        self.tokenizer = tokenizer or _tokenizer(folder)

    def score(self, sequences: Sequence[Sequence[int]]) -> list[Scores]:
        """See Subject."""
        return [self._score(row) for row in sequences]

    def _score(self, row: Sequence[int]) -> Scores:
        if len(row) < 2:
            raise HqmqError("a sequence to score needs two tokens or more")
        self._session.reset(0)
        parts = []
        step = min(_ROWS, self._session.prefill_chunk)
        for start in range(0, len(row) - 1, step):
            # Every token goes in but the last, whose logits nobody asks for.
            ids = np.array(row[start : min(start + step, len(row) - 1)], np.int64)
            index = np.arange(len(ids), dtype=np.int64)[None]
            logits = self._session.step(ids[None], np.array([len(ids)], np.int32), index)[0]
            following = torch.tensor(row[start + 1 : start + 1 + len(ids)])
            parts.append(score_rows(torch.from_numpy(np.asarray(logits, np.float32)), following))
        return join_scores(parts)

    def generate(self, prompts: Sequence[Sequence[int]], new_tokens: int) -> list[list[int]]:
        """See Subject."""
        stops = frozenset(self._session.manifest.eos_token_ids)
        requests = [Request(prompt, new_tokens, stop_tokens=stops) for prompt in prompts]
        return [completion.tokens for completion in generate(self._session, requests).completions]

    def bits(self) -> Bits:
        """See Subject."""
        found = self._codec.bits(self._session.manifest.layers[0].head_dim)
        assert found is not None
        return found


def _tokenizer(folder: str | Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # transformers and tokenizers raise types of their own
        raise HqmqError(f"{folder}: its tokenizer cannot be read ({error}); export a model that has one") from error
