"""Generation for a batch of requests on any Session. numpy only."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

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
    """Generate for any number of requests, at most max_batch at a time. The session is emptied first.

    Each request takes a free sequence of the session; when it ends, the next one is prefilled into its place while
    the others keep their caches. A request's tokens do not depend on what shares the batch.
    `on_token(request, token)` is called for each token kept; `on_prefill(tokens)` with the prompt tokens read so far.

    Raises:
        HqmqError: no request, an empty prompt, or a cache too small.
    """
    _check(session, requests)
    session.reset()
    batch = _Batch(session, requests)
    timing = Timing(prompt_tokens=sum(len(request.prompt) for request in requests))
    read = 0
    following: list[int | None] = [None] * batch.size
    while True:
        if joining := batch.join():
            start = time.perf_counter()
            base = read
            progress = (lambda done, base=base: on_prefill(base + done)) if on_prefill else None
            prompts = [requests[joining[b]].prompt if b in joining else [] for b in range(batch.size)]
            logits = session.append(prompts, progress)
            read += sum(len(prompt) for prompt in prompts)
            timing.prefill_seconds += time.perf_counter() - start
            start = time.perf_counter()
            for b in joining:
                following[b] = batch.sample(b, logits[b], on_token)
            timing.decode_seconds += time.perf_counter() - start
            continue  # a request may have ended with its first token
        if not batch.active:
            return Generation(batch.completions, timing)
        start = time.perf_counter()
        logits = session.decode(following)
        for b, token in enumerate(following):
            if token is not None:
                timing.decoded_tokens += 1
                following[b] = batch.sample(b, logits[b], on_token)
        timing.decode_seconds += time.perf_counter() - start


class _Batch:
    """Which request is in which sequence of the session.

    Attributes:
        size: sequences in use.
        active: sequence → request.
        completions: one a request.
    """

    def __init__(self, session: Session, requests: Sequence[Request]) -> None:
        self._session, self._requests = session, requests
        self._waiting = deque(range(len(requests)))
        self._samplers = [Sampler(request.sampling) for request in requests]
        self.size = min(len(requests), session.max_batch)
        self.active: dict[int, int] = {}
        self.completions = [Completion() for _ in requests]

    def join(self) -> dict[int, int]:
        """Give waiting requests the free sequences, emptied; sequence → request of those that joined."""
        joining: dict[int, int] = {}
        for b in range(self.size):
            if b not in self.active and self._waiting:
                joining[b] = self._waiting.popleft()
                self._session.reset(b)
        self.active.update(joining)
        return joining

    def sample(
        self, sequence: int, logits: NDArray[np.float32], on_token: Callable[[int, int], None] | None
    ) -> int | None:
        """Draw the next token of a sequence; None if its request has ended, and has left."""
        number = self.active[sequence]
        request, completion = self._requests[number], self.completions[number]
        if request.max_new_tokens > 0:
            token = self._samplers[number](logits)
            if token in request.stop_tokens:
                completion.finish_reason = "stop"
            else:
                completion.tokens.append(token)
                if on_token:
                    on_token(number, token)
                if len(completion.tokens) < request.max_new_tokens:
                    return token
        del self.active[sequence]
        return None


def _check(session: Session, requests: Sequence[Request]) -> None:
    if not requests:
        raise HqmqError("no prompt was given")
    for b, request in enumerate(requests):
        if not len(request.prompt):
            raise HqmqError(f"prompt {b} has no tokens; give it some text")
        if request.max_new_tokens < 0:
            raise HqmqError(f"max_new_tokens {request.max_new_tokens} is negative")
        outside = [t for t in request.prompt if not 0 <= t < session.manifest.vocab_size]
        if outside:
            raise HqmqError(f"prompt {b} holds token {outside[0]}, outside the vocabulary; use the model's tokenizer")
    session.check_capacity(np.array([request.cache_tokens for request in requests], np.int32))
