"""Generation and sampling on a session whose logits follow from the tokens alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError
from hqmq_trt.runtime.generate import Generation, Request, generate
from hqmq_trt.runtime.sampling import Sampler, Sampling, kept_tokens
from hqmq_trt.runtime.session import Session
from hqmq_trt.runtime.tokenizer import TextStream

VOCABULARY = 50


class _Manifest:
    vocab_size = VOCABULARY
    dtype = "float32"


class HashSession(Session):
    """Logits are noise seeded by all tokens of the sequence so far, so that a wrong token or length shows."""

    def __init__(self, max_batch: int = 4, max_context: int = 64, prefill_chunk: int = 8) -> None:
        self.folder, self.manifest = "test", _Manifest()  # type: ignore[assignment]
        self.max_batch, self.max_context, self.prefill_chunk = max_batch, max_context, prefill_chunk
        self.lengths = np.zeros(max_batch, np.int32)
        self.tokens = np.zeros((max_batch, max_context), np.int64)
        self.runs: list[tuple[int, ...]] = []

    def cache_nbytes(self) -> dict[str, int]:
        return {}

    def _read_cache(self, name: str, sequence: int, rows: int) -> NDArray[Any]:
        raise NotImplementedError

    def _write_cache(self, name: str, sequence: int, values: NDArray[Any]) -> None:
        raise NotImplementedError

    def model_sha256(self) -> str:
        return ""

    def _run(
        self, input_ids: NDArray[np.int64], new_length: NDArray[np.int32], logits_index: NDArray[np.int64]
    ) -> NDArray[np.float32]:
        self.runs.append(tuple(int(count) for count in new_length))
        logits = np.zeros((*logits_index.shape, VOCABULARY), np.float32)
        for b, count in enumerate(new_length):
            first = int(self.lengths[b])
            self.tokens[b, first : first + count] = input_ids[b, :count]
            for n, row in enumerate(logits_index[b]):
                seen = self.tokens[b, : first + row + 1]
                logits[b, n] = np.random.default_rng([*seen.tolist(), len(seen)]).normal(size=VOCABULARY)
        return logits


def run(requests: list[Request], **options: int) -> Generation:
    return generate(HashSession(**options), requests)


def tokens(generation: Generation) -> list[list[int]]:
    return [completion.tokens for completion in generation.completions]


PROMPTS = [[3, 1, 4], list(range(20)), [7], [9] * 11]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("chunk", [1, 3, 64])
def test_batch_equals_single(temperature: float, chunk: int) -> None:
    requests = [
        Request(prompt, 5 + i, Sampling(temperature, seed=i), frozenset({13, 17, 30}))
        for i, prompt in enumerate(PROMPTS)
    ]
    together = tokens(run(requests, prefill_chunk=chunk))
    assert together == [tokens(run([request]))[0] for request in requests]
    backwards = tokens(run(requests[::-1], prefill_chunk=chunk))
    assert backwards[::-1] == together


def test_greedy_follows_the_session() -> None:
    session = HashSession()
    found = generate(session, [Request([5, 6], 4)]).completions[0]
    seen = [5, 6]
    for token in found.tokens:
        noise = np.random.default_rng([*seen, len(seen)]).normal(size=VOCABULARY).astype(np.float32)
        assert token == int(noise.argmax())
        seen.append(token)
    assert found.finish_reason == "length"
    assert session.lengths[0] == 2 + 4 - 1


def test_a_request_that_ends_stops_growing() -> None:
    first = tokens(run([Request([1, 2, 3], 6)]))[0]
    session = HashSession()
    requests = [Request([1, 2, 3], 6, stop_tokens=frozenset({first[2]})), Request([4], 6)]
    generation = generate(session, requests)
    assert generation.completions[0].tokens == first[: first.index(first[2])]
    assert generation.completions[0].finish_reason == "stop"
    assert len(generation.completions[1].tokens) == 6
    assert session.lengths[0] == 3 + len(generation.completions[0].tokens)
    assert session.runs[-1] == (0, 1)
    assert generation.timing.decoded_tokens == len(generation.completions[0].tokens) + 5


def test_streaming_and_progress() -> None:
    streamed: list[tuple[int, int]] = []
    done: list[int] = []
    generation = generate(
        HashSession(prefill_chunk=8),
        [Request([1, 2], 3), Request(list(range(20)), 2)],
        lambda b, token: streamed.append((b, token)),
        done.append,
    )
    for b, found in enumerate(tokens(generation)):
        assert [token for request, token in streamed if request == b] == found
    assert done == [10, 18, 22]


def test_nothing_to_generate() -> None:
    generation = run([Request([1, 2], 0), Request([3], 2)])
    assert tokens(generation)[0] == []
    assert len(tokens(generation)[1]) == 2


@pytest.mark.parametrize(
    ("requests", "message"),
    [
        ([], "no prompt"),
        ([Request([])], "prompt 0 has no tokens"),
        ([Request([1] * 60, 6)], "holds 64 tokens a sequence but 65 are needed; raise max_context"),
        ([Request([1, VOCABULARY])], "outside the vocabulary"),
        ([Request([1], -1)], "negative"),
    ],
)
def test_bad_requests(requests: list[Request], message: str) -> None:
    with pytest.raises(HqmqError, match=message):
        run(requests)


def test_a_full_cache_is_enough() -> None:
    assert len(tokens(run([Request([1] * 60, 5)]))[0]) == 5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("max_batch", [1, 2, 3])
def test_more_requests_than_sequences(max_batch: int, temperature: float) -> None:
    requests = [
        Request([*prompt, i], new, Sampling(temperature, seed=i), frozenset(range(0, VOCABULARY, 5)))
        for i, (prompt, new) in enumerate(zip(PROMPTS * 3, [4, 9, 1, 0, 7, 2, 12, 3, 1, 5, 0, 6], strict=True))
    ]
    streamed: list[tuple[int, int]] = []
    done: list[int] = []
    session = HashSession(max_batch)
    found = generate(session, requests, lambda b, token: streamed.append((b, token)), done.append)
    alone = [generate(HashSession(1), [request]).completions[0] for request in requests]
    assert found.completions == alone
    assert {completion.finish_reason for completion in alone} == {"stop", "length"}
    for b, completion in enumerate(alone):
        assert [token for request, token in streamed if request == b] == completion.tokens
    assert done == sorted(done)
    assert done[-1] == found.timing.prompt_tokens == sum(len(request.prompt) for request in requests)


def test_a_free_sequence_is_filled_at_once() -> None:
    """The short requests pass through the second sequence while the first goes on; nothing is prefilled twice."""
    session = HashSession(2)
    generate(session, [Request([1] * 5, 8), *(Request([2] * 3, 2) for _ in range(3))])
    assert session.runs == [(5, 3), (1, 1), (0, 3), (1, 1), (0, 3), (1, 1), *[(1,)] * 4]


def test_logits_that_are_not_finite() -> None:
    class Broken(HashSession):
        def _run(self, *arguments: NDArray[np.int64]) -> NDArray[np.float32]:  # type: ignore[override]
            logits = super()._run(*arguments)  # type: ignore[arg-type]
            logits[1] = np.nan
            return logits

    with pytest.raises(HqmqError, match="sequence 1 are not finite"):
        generate(Broken(), [Request([1], 2), Request([2], 2)])


@pytest.mark.parametrize(
    "bad", [{"temperature": -1.0}, {"temperature": float("nan")}, {"top_k": -1}, {"top_p": 0.0}, {"seed": -1}]
)
def test_bad_sampling(bad: dict[str, float]) -> None:
    with pytest.raises(HqmqError, match=next(iter(bad))):
        Sampling(**bad)  # type: ignore[arg-type]


def test_kept_tokens() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    order, probability = kept_tokens(logits, Sampling(1.0))
    assert order.tolist() == [1, 3, 2, 0]
    assert probability == pytest.approx([0.4, 0.3, 0.2, 0.1])
    order, probability = kept_tokens(logits, Sampling(1.0, top_k=2))
    assert order.tolist() == [1, 3]
    assert probability == pytest.approx([4 / 7, 3 / 7])
    assert kept_tokens(logits, Sampling(1.0, top_p=0.69))[0].tolist() == [1, 3]
    assert kept_tokens(logits, Sampling(1.0, top_p=0.71))[0].tolist() == [1, 3, 2]
    assert kept_tokens(logits, Sampling(1.0, top_p=0.01))[0].tolist() == [1]
    assert kept_tokens(logits, Sampling(0.5))[1] == pytest.approx(np.array([16, 9, 4, 1]) / 30)
    assert kept_tokens(np.zeros(4, np.float32), Sampling(1.0, top_k=2))[0].tolist() == [0, 1, 2, 3]


def test_sampler_draws_the_distribution() -> None:
    logits = np.log(np.array([0.1, 0.4, 0.2, 0.3], np.float32))
    sampler = Sampler(Sampling(1.0, seed=3))
    counts = np.bincount([sampler(logits) for _ in range(20000)], minlength=4) / 20000
    assert counts == pytest.approx([0.1, 0.4, 0.2, 0.3], abs=0.015)
    draws = [[s(logits) for _ in range(30)] for s in (Sampler(Sampling(1.0, seed=seed)) for seed in (3, 3, 4))]
    assert draws[0] == draws[1]
    assert draws[0] != draws[2]


class _Bytes:
    """A tokenizer of UTF-8 bytes."""

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")


def test_text_stream_never_shows_half_a_character() -> None:
    text = "naïve – 漢字 🙂!"
    stream = TextStream(_Bytes())  # type: ignore[arg-type]
    pieces = [stream.push(token) for token in text.encode()]
    assert "".join(pieces) + stream.finish() == text
    assert all("�" not in piece for piece in pieces)
    cut = TextStream(_Bytes())  # type: ignore[arg-type]
    assert [cut.push(token) for token in "é".encode()[:1]] == [""]
    assert cut.finish() == "�"
