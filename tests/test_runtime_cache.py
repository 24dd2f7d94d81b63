"""Caches in files, and more requests than sequences, with ONNX Runtime."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from hqmq_trt import cli
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import cache_tensors
from hqmq_trt.runtime import OrtSession, Request, Sampling, generate
from tests.trt_session_cases import PAGE, caches, same_share, text

Export = Callable[..., Path]
SCHEMES = ("hq4@p16", "fp16@p16", "paper:s8_r3+med3@p16")


@pytest.fixture
def saved(tiny_export: Export, tmp_path: Path) -> tuple[OrtSession, Path]:
    """A session with 40, 0, 3 and 16 tokens, and its cache."""
    session = OrtSession(tiny_export(), 4, 128)
    session.append([text(40), [], text(3, 1), text(16, 2)])
    session.save_cache(tmp_path / "cache")
    return session, tmp_path / "cache"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_loaded_cache_goes_on_as_if_never_saved(tiny_export: Export, tmp_path: Path, scheme: str) -> None:
    session = OrtSession(tiny_export(scheme), 3, 128)
    session.append([text(40), text(7, 1), text(32, 2)])
    session.save_cache(tmp_path / "cache")
    other = OrtSession(tiny_export(scheme), 5, 256)
    other.append([text(99, 5 + b) for b in range(5)])
    other.load_cache(tmp_path / "cache")
    assert other.lengths.tolist() == [40, 7, 32, 0, 0]
    for tokens in ([text(30, 3), [], [1]], [[2], [3], text(40, 4)]):
        np.testing.assert_allclose(other.append(tokens), session.append(tokens), rtol=0, atol=1e-5)
    for b, length in enumerate(session.lengths.tolist()):
        for ours, theirs in zip(caches(other, b, length), caches(session, b, length), strict=True):
            if ours.shape[1]:
                assert same_share([ours], [theirs]) > 0.999


def test_only_pages_in_use_are_written(saved: tuple[OrtSession, Path]) -> None:
    session, path = saved
    arrays = load_file(path)
    assert {int(name.split(".")[0]) for name in arrays} == {0, 2, 3}
    assert arrays["0.0.key.codes"].shape[1] == 2 * PAGE
    assert arrays["2.0.key.codes"].shape[1] == 0
    assert arrays["3.1.value.codes"].shape[1] == PAGE
    assert arrays["2.0.key.tail"].shape[1] == PAGE + session.scheme.key.sink_tokens == PAGE + 4
    layer = session.manifest.layers[0]
    expected = sum(
        tensor.nbytes
        for pages in (2, 0, 1)
        for role in (session.scheme.key, session.scheme.value)
        for tensor in cache_tensors(role, PAGE, layer.head_dim, layer.num_kv_heads, 1, pages)
    )
    assert sum(array.nbytes for array in arrays.values()) == 2 * expected
    assert [entry.name for entry in path.parent.iterdir()] == ["cache"]


def test_an_empty_session_is_saved_and_loaded(tiny_export: Export, tmp_path: Path) -> None:
    session = OrtSession(tiny_export(), 2, 64)
    session.save_cache(tmp_path / "cache")
    session.append([text(5), text(6)])
    session.load_cache(tmp_path / "cache")
    assert session.lengths.tolist() == [0, 0]


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"scheme": "hq3@p16"}, "another scheme: 'hq4@p16' instead of 'hq3@p16'"),
        ({"scheme": "hq4"}, "another scheme: 'hq4@p16' instead of 'hq4'"),
        ({"mode": "qdq"}, "another model"),
        ({"max_batch": 3}, "holds 4 sequences, the session max_batch=3; raise max_batch"),
        ({"max_context": 32}, "holds 32 tokens a sequence but 40 are needed; raise max_context"),
    ],
)
def test_a_cache_that_does_not_fit(
    tiny_export: Export, saved: tuple[OrtSession, Path], other: dict[str, Any], message: str
) -> None:
    export = tiny_export(other.get("scheme", "hq4@p16"), other.get("mode", "fused"))
    session = OrtSession(export, other.get("max_batch", 4), other.get("max_context", 128))
    session.append([text(9)])
    before = caches(session, 0, 9)
    with pytest.raises(HqmqError, match=message) as info:
        session.load_cache(saved[1])
    assert "\n" not in str(info.value)
    assert session.lengths.tolist()[:2] == [9, 0]
    assert same_share(caches(session, 0, 9), before) == 1.0


def test_damage_is_noticed(saved: tuple[OrtSession, Path]) -> None:
    session, path = saved
    before = [caches(session, b, length) for b, length in enumerate([40, 0, 3, 16])]
    good = path.read_bytes()
    arrays = load_file(path)
    with safe_open(path, "np") as file:
        metadata = file.metadata()

    def flip(at: int) -> bytes:
        return good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :]

    def changed(name: str, array: Any) -> dict[str, Any]:
        kept = {**arrays, name: array}
        return {key: value for key, value in kept.items() if value is not None}

    name = "0.0.key.codes"
    cases: list[tuple[str, bytes | tuple[dict[str, Any], dict[str, str]]]] = [
        ("sha256 differs", flip(len(good) - 1)),
        ("sha256 differs", flip(len(good) // 2)),
        ("cannot be read as a cache", good[:-1]),
        ("cannot be read as a cache", good[:100]),
        ("cannot be read as a cache", b""),
        ("cannot be read as a cache", b"\xff" * 200),
        ("is not a cache", (arrays, {})),
        ("another format_version: '1' instead of '3'", (arrays, {**metadata, "format_version": "1"})),
        ("another cache_file_version: none", (arrays, {k: v for k, v in metadata.items() if k[:6] != "cache_"})),
        ("another seed: '7'", (arrays, {**metadata, "seed": "7"})),
        ("states no lengths", (arrays, {**metadata, "lengths": "[-1]"})),
        ("states no lengths", (arrays, {**metadata, "lengths": "{"})),
        ("tensor '0.0.key.codes' is missing", (changed(name, None), metadata)),
        ("tensor 'x' is unknown", (changed("x", np.zeros(3, np.int32)), metadata)),
        ("is float32 .*, not int32", (changed(name, arrays[name].astype(np.float32)), metadata)),
        ("sha256 differs", (changed(name, arrays[name] + 1), metadata)),
    ]
    for message, content in cases:
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            save_file(*content[:1], path, content[1])
        with pytest.raises(HqmqError, match=message) as info:
            session.load_cache(path)
        assert str(info.value).startswith(str(path))
        assert "\n" not in str(info.value)
        assert session.lengths.tolist() == [40, 0, 3, 16]
    path.unlink()
    with pytest.raises(HqmqError, match="no such file"):
        session.load_cache(path)
    for b, length in enumerate([40, 0, 3, 16]):
        assert same_share(caches(session, b, length), before[b]) == 1.0


def test_a_failed_save_leaves_the_old_file(saved: tuple[OrtSession, Path], tmp_path: Path) -> None:
    session, path = saved
    with pytest.raises(HqmqError, match="cannot be written"):
        session.save_cache(tmp_path / "none" / "cache")
    (tmp_path / "folder").mkdir()
    with pytest.raises(HqmqError, match="cannot be written"):
        session.save_cache(tmp_path / "folder")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["cache", "folder"]
    session.load_cache(path)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_more_requests_than_sequences(tiny_export: Export, temperature: float) -> None:
    requests = [Request(text(3 + 11 * i, i), 2 + i % 5, Sampling(temperature, seed=i)) for i in range(7)]
    session = OrtSession(tiny_export(), 3, 128, prefill_chunk=20)
    together = generate(session, requests).completions
    assert together == [generate(session, [request]).completions[0] for request in requests]


def test_run_with_a_small_batch(
    tiny_export: Export, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    documents = []
    for limit in ([], ["--max-batch", "2"]):
        prompts = [part for i in range(5) for part in ("-p", f"prompt {i}" * (i + 1))]
        monkeypatch.setattr(sys, "argv", ["hqmq-trt", "run", str(tiny_export()), *prompts, "-n", "6", "--json", *limit])
        capsys.readouterr()
        with suppress(SystemExit):
            cli.main()
        documents.append(json.loads(capsys.readouterr().out))
    whole, small = documents
    assert small["completions"] == whole["completions"]
    assert len({tuple(completion["tokens"]) for completion in whole["completions"]}) > 1
    assert small["cache_bytes"] * 5 == whole["cache_bytes"] * 2


def test_append_checks_before_it_runs(tiny_export: Export) -> None:
    session = OrtSession(tiny_export(), 2, 128, prefill_chunk=8)
    bad: list[tuple[str, Any]] = [
        ("token 260 of sequence 1 is outside the vocabulary", [text(20), [*text(20), 260]]),
        ("must be one row", [np.zeros((2, 3), np.int64)]),
        ("must hold integers", [np.zeros(3, np.float32)]),
        ("3 sequences do not fit", [[1], [1], [1]]),
        ("holds 128 tokens a sequence but 129", [text(129)]),
    ]
    for message, tokens in bad:
        with pytest.raises(HqmqError, match=message):
            session.append(tokens)
        assert session.lengths.tolist() == [0, 0]

    class OnDevice:
        __cuda_array_interface__ = {"shape": (3,), "typestr": "<i8", "data": (1, False), "version": 3}  # noqa: RUF012

    with pytest.raises(HqmqError, match="lies on a GPU; this runtime takes host arrays"):
        session.append([OnDevice()])  # type: ignore[list-item]
    with pytest.raises(HqmqError, match="there is no sequence 2"):
        session.reset(2)
