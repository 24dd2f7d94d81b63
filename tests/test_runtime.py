"""OrtSession on tiny exports: in place, chunked, batched, and equal to PyTorch with the same cache."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray

from hqmq_trt.cache import HqmqCache
from hqmq_trt.diff.measures import LogitComparison
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import cache_bytes
from hqmq_trt.runtime import OrtSession, Request, Sampling, generate
from hqmq_trt.scheme import Scheme

PAGE = 16
Export = Callable[..., Path]


def text(count: int, seed: int = 0) -> list[int]:
    tokens: list[int] = np.random.default_rng(seed).integers(0, 256, count).tolist()
    return tokens


def all_logits(session: OrtSession, tokens: list[int], split: list[int]) -> NDArray[np.float32]:
    """Logits [T, V] of every token, fed in pieces of the given lengths."""
    assert sum(split) == len(tokens)
    session.reset()
    parts, start = [], 0
    for count in split:
        ids = np.array([tokens[start : start + count]], np.int64)
        parts.append(session.step(ids, np.array([count], np.int32), np.arange(count, dtype=np.int64)[None])[0])
        start += count
    return np.concatenate(parts)


def kl(a: NDArray[np.float32], b: NDArray[np.float32]) -> float:
    return LogitComparison.of(a, b, np.empty(0, np.int64)).mean_kl


def test_past_and_present_are_one_buffer(tiny_export: Export) -> None:
    session = OrtSession(tiny_export(), 2, 100)
    before = [buffer.ctypes.data for buffer in session.cache_buffers(0, "key")]
    assert not any(buffer.any() for buffer in session.cache_buffers(0, "key"))
    session.append([text(40), text(7)])
    pointers = session.present_pointers()
    assert len(pointers) == 2 * (4 + 3)
    assert all(ours == written for ours, written in pointers.values())
    codes, scales, mean, tail = session.cache_buffers(0, "key")
    assert [buffer.ctypes.data for buffer in (codes, scales, mean, tail)] == before
    assert codes.shape[2] == session.max_context == 112
    assert codes[0, :, : 2 * PAGE].any((1, 2)).all()
    assert not codes[0, :, 2 * PAGE :].any()
    assert not codes[1].any()
    assert tail[1, :, :7].any(-1).all()
    assert np.array_equal(tail[1, :, PAGE:], tail[1, :, :4])  # 7 tokens: the first four are in both places
    assert session.lengths.tolist() == [40, 7]


def test_cache_is_as_large_as_the_format_says(tiny_export: Export) -> None:
    session = OrtSession(tiny_export(), 3, 100)
    expected = cache_bytes(Scheme.parse("hq4@p16"), 2, 2, 64, 112, 3)
    assert session.codebook_nbytes() == expected.pop("codebooks")
    assert session.cache_nbytes() == expected


@pytest.mark.parametrize("mode", ["fused", "qdq"])
def test_logits_equal_pytorch_with_the_same_cache(
    tiny_export: Export, tiny_model: Callable[[str], Path], mode: str
) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    tokens = text(75)
    split = [40, 20, *[1] * 15]
    scheme = Scheme.parse("hq4@p16")
    cache = HqmqCache.for_model(model, scheme) if mode == "fused" else HqmqCache(model.config, scheme)
    parts, start = [], 0
    with torch.inference_mode():
        for count in split:
            ids = torch.tensor([tokens[start : start + count]])
            parts.append(model(input_ids=ids, past_key_values=cache, use_cache=True).logits[0].numpy())
            start += count
    reference = np.concatenate(parts)
    found = all_logits(OrtSession(tiny_export(mode=mode), 1, 80), tokens, split)
    # Not the same bytes: V is rotated before it is rounded to fp16 where the weights hold the rotation.
    assert kl(reference, found) < 1e-4
    assert kl(reference, np.roll(found, 1, 0)) > 1e-2


@pytest.mark.parametrize("split", [[75], [16] * 4 + [11], [1] * 75, [33, 1, 1, 30, 10]])
def test_any_split_gives_the_same_logits(tiny_export: Export, split: list[int]) -> None:
    tokens = text(75)
    session = OrtSession(tiny_export(), 1, 80)
    reference = all_logits(session, tokens, [50, 25])
    assert kl(reference, all_logits(session, tokens, split)) < 1e-5


def test_fp16_scheme_compresses_nothing(tiny_export: Export, tiny_model: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    tokens = text(60)
    with torch.inference_mode():
        reference = model(input_ids=torch.tensor([tokens])).logits[0].numpy()
    plain = all_logits(OrtSession(tiny_export("fp16@p16"), 1, 64), tokens, [60])
    packed = all_logits(OrtSession(tiny_export(), 1, 64), tokens, [60])
    assert kl(reference, plain) < 1e-5
    assert kl(reference, packed) > 10 * kl(reference, plain)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_batch_equals_single(tiny_export: Export, temperature: float) -> None:
    requests = [
        Request(text(count, count), new, Sampling(temperature, seed=count))
        for count, new in ((3, 20), (50, 9), (17, 30), (16, 1))
    ]
    session = OrtSession(tiny_export(), 4, 80, prefill_chunk=24)
    together = [found.tokens for found in generate(session, requests).completions]
    assert together == [generate(session, [request]).completions[0].tokens for request in requests]
    assert [len(tokens) for tokens in together] == [20, 9, 30, 1]


def test_sequences_are_reset_one_by_one(tiny_export: Export) -> None:
    session = OrtSession(tiny_export(), 2, 80)
    first = session.append([text(20), text(30, 1)])
    session.reset(0)
    assert session.lengths.tolist() == [0, 30]
    again = session.append([text(20), []])
    assert session.lengths.tolist() == [20, 30]
    np.testing.assert_allclose(again[0], first[0], rtol=0, atol=1e-4)
    assert not again[1].any()
    longer = session.decode([None, 65])
    single = OrtSession(tiny_export(), 1, 80).append([[*text(30, 1), 65]])
    np.testing.assert_allclose(longer[1], single[0], rtol=0, atol=1e-4)


def test_cache_too_small(tiny_export: Export) -> None:
    session = OrtSession(tiny_export(), 1, 40)
    with pytest.raises(HqmqError, match=r"holds 48 tokens a sequence but 49 are needed; raise max_context"):
        session.append([text(49)])
    session.append([text(48)])
    with pytest.raises(HqmqError, match="49 are needed"):
        session.decode([1])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1]] * 2, [1, 1], [[0]] * 2), "2 sequences do not fit"),
        (([[1]], [2], [[0]]), "new_length"),
        (([[1]], [1], [[1]]), "logits_index"),
        (([[260]], [1], [[0]]), "outside the vocabulary"),
        (([[-1]], [1], [[0]]), "outside the vocabulary"),
    ],
)
def test_bad_steps(tiny_export: Export, arguments: tuple[Any, ...], message: str) -> None:
    session = OrtSession(tiny_export(), 1, 40)
    ids, new, index = arguments
    with pytest.raises(HqmqError, match=message):
        session.step(np.array(ids, np.int64), np.array(new, np.int32), np.array(index, np.int64))


@pytest.mark.parametrize("bad", [{"max_batch": 0}, {"max_context": 0}, {"prefill_chunk": 0}, {"threads": -1}])
def test_bad_sizes(tiny_export: Export, bad: dict[str, Any]) -> None:
    with pytest.raises(HqmqError, match=next(iter(bad))):
        OrtSession(tiny_export(), **bad)


def test_nan_is_an_error(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from hqmq_trt.export import export_model

    model = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).eval()
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    export_model(model, tmp_path / "nan", "hq4@p16")
    session = OrtSession(tmp_path / "nan", 1, 64)
    session.append([text(3, 1) + [6] * 20])
    session.reset()
    with pytest.raises(HqmqError) as info:
        session.append([[6, 7, *[6] * 20]])
    assert "\n" not in str(info.value)


def test_inputs_that_the_manifest_does_not_know(tiny_export: Export, tmp_path: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(tiny_export(), folder)
    path = folder / "model.onnx"
    model = onnx.load(path)
    for value in model.graph.input:
        if value.name == "past.0.key.tail":
            value.name = "past.0.key.tall"  # the same length: the manifest checks the file's size
    for node in model.graph.node:
        for i, name in enumerate(node.input):
            if name == "past.0.key.tail":
                node.input[i] = "past.0.key.tall"
    onnx.save(model, path)
    with pytest.raises(HqmqError, match=r"differ from manifest\.json at 'past\.0\.key\.ta"):
        OrtSession(folder)
