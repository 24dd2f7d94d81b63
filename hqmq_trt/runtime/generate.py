"""Generation for a batch of requests on any Session. numpy only."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from hqmq_trt.errors import HqmqError
from hqmq_trt.runtime.sampling import Sampler, Sampling
from hqmq_trt.runtime.session import Session


@dataclass(frozen=True)
class Request:
    """One prompt and how to go on from it.

    Attributes:
        prompt: token ids, at least one.
        max_new_tokens: most tokens to generate.
        sampling: how tokens are drawn.
        stop_tokens: tokens that end the request; they are not part of the result.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 128
    sampling: Sampling = field(default_factory=Sampling)
    stop_tokens: frozenset[int] = frozenset()

    @property
    def cache_tokens(self) -> int:
        """Tokens the cache must hold: the last token drawn is never appended."""
        return len(self.prompt) + max(self.max_new_tokens - 1, 0)


@dataclass
class Completion:
    """Tokens generated for one request, and whether it met a stop token (``stop``) or its limit (``length``)."""

    tokens: list[int] = field(default_factory=list)
    finish_reason: str = "length"


@dataclass
class Timing:
    """Tokens over all requests and seconds of both phases; decode counts the tokens that took a step of their own."""

    prompt_tokens: int = 0
    prefill_seconds: float = 0.0
    decoded_tokens: int = 0
    decode_seconds: float = 0.0

    @property
    def prefill_rate(self) -> float:
        """Prompt tokens per second."""
        return self.prompt_tokens / self.prefill_seconds if self.prefill_seconds else 0.0

    @property
    def decode_rate(self) -> float:
        """Generated tokens per second, all requests together."""
        return self.decoded_tokens / self.decode_seconds if self.decode_seconds else 0.0


@dataclass
class Generation:
    """What `generate` returns: a completion a request, in order, and the time it took."""

    completions: list[Completion]
    timing: Timing


def generate(
    session: Session,
    requests: Sequence[Request],
    on_token: Callable[[int, int], None] | None = None,
    on_prefill: Callable[[int], None] | None = None,
) -> Generation:
    """Prefill all prompts, then decode until every request has ended. The session is emptied first.

    A request that has ended gets no more tokens; its tokens do not depend on the other requests of the batch.
    `on_token(request, token)` is called for each token kept; `on_prefill(tokens)` as the prompts are read.

    Raises:
        HqmqError: no request, an empty prompt, more requests than max_batch, or a cache too small.
    """
    _check(session, requests)
    session.reset()
    timing = Timing(prompt_tokens=sum(len(request.prompt) for request in requests))
    completions = [Completion() for _ in requests]
    samplers = [Sampler(request.sampling) for request in requests]
    active = {b for b, request in enumerate(requests) if request.max_new_tokens > 0}

    start = time.perf_counter()
    logits = session.append([request.prompt for request in requests], on_prefill)
    timing.prefill_seconds = time.perf_counter() - start
    start = time.perf_counter()
    while active:
        following: list[int | None] = [None] * len(requests)
        for b in sorted(active):
            token = samplers[b](logits[b])
            if token in requests[b].stop_tokens:
                completions[b].finish_reason = "stop"
                active.discard(b)
                continue
            completions[b].tokens.append(token)
            if on_token:
                on_token(b, token)
            if len(completions[b].tokens) == requests[b].max_new_tokens:
                active.discard(b)
            else:
                following[b] = token
        if active:
            logits = session.decode(following)
            timing.decoded_tokens += sum(token is not None for token in following)
    timing.decode_seconds = time.perf_counter() - start
    return Generation(completions, timing)


def _check(session: Session, requests: Sequence[Request]) -> None:
    if not requests:
        raise HqmqError("no prompt was given")
    if len(requests) > session.max_batch:
        raise HqmqError(f"{len(requests)} requests do not fit max_batch={session.max_batch}; raise max_batch")
    for b, request in enumerate(requests):
        if not len(request.prompt):
            raise HqmqError(f"prompt {b} has no tokens; give it some text")
        if request.max_new_tokens < 0:
            raise HqmqError(f"max_new_tokens {request.max_new_tokens} is negative")
        outside = [t for t in request.prompt if not 0 <= t < session.manifest.vocab_size]
        if outside:
            raise HqmqError(f"prompt {b} holds token {outside[0]}, outside the vocabulary; use the model's tokenizer")
    session.check_capacity(np.array([request.cache_tokens for request in requests], np.int32))
