"""Perplexity through the packed cache: windows, scores, kept results and the summary."""

from __future__ import annotations

import copy
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from hqmq_trt.cache import HqmqCache
from hqmq_trt.cli import app
from hqmq_trt.errors import HqmqError
from hqmq_trt.eval.perplexity import Windows, measure, parse_range, read_windows, summaries, window_key
from hqmq_trt.eval.session_subject import SessionSubject
from hqmq_trt.eval.statistics import paired_mean, wilson
from hqmq_trt.eval.store import FILE, Store
from hqmq_trt.eval.subject import REFERENCE, Codec, TorchSubject, open_subjects
from hqmq_trt.export import export_model, source
from hqmq_trt.format import FORMAT_VERSION
from tests.cache_cases import VOCAB, model_of, prompt


class Letters:
    """A tokenizer: a letter a token; `begin` goes before a text if it is not None."""

    def __init__(self, begin: int | None = None) -> None:
        self.bos_token_id = begin

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> dict[str, list[int]]:
        start = [self.bos_token_id] if add_special_tokens and self.bos_token_id is not None else []
        return {"input_ids": [*start, *(ord(letter) for letter in text)]}


def subject_of(codec: str, mode: str = "fused", name: str = "llama") -> TorchSubject:
    return TorchSubject(model_of(name), Letters(), Codec.parse(codec), mode, "tiny", "digest")


def windows_of(count: int, length: int = 100) -> Windows:
    rows = prompt(*[length] * count, seed=3)
    return Windows(tuple(range(count)), tuple(tuple(row[0].tolist()) for row in rows), length, "text")


def direct(ids: list[int], cache: Any, implementation: str) -> np.ndarray:
    model = model_of("llama", implementation)
    kwargs = {} if cache is None else {"past_key_values": cache, "use_cache": True}
    with torch.no_grad():
        logits = model(torch.tensor([ids]), **kwargs).logits[0].double()
    return -logits.log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()


@pytest.mark.parametrize("codec", [REFERENCE, "hq3@p16", "paper:s8_r3+med3@p8", "int4@p16"])
@pytest.mark.parametrize("mode", ["fused", "qdq"])
def test_scores_are_those_of_the_model_with_that_cache(codec: str, mode: str) -> None:
    ids = windows_of(1).tokens[0]
    found = subject_of(codec, mode).score([ids])[0]
    exact = direct(list(ids), None, "eager")
    if codec == REFERENCE:
        wanted = exact
    elif codec == "int4@p16":
        assert 1e-6 < np.abs(found.nll - exact).max() < 0.5
        return
    else:
        wanted = direct(list(ids), HqmqCache(model_of("llama").config, codec), "hqmq" if mode == "fused" else "eager")
        assert np.abs(wanted - exact).max() > 1e-5, "the codec changes something"
    np.testing.assert_allclose(found.nll, wanted, atol=2e-4)
    assert found.greedy.shape == found.nll.shape


def test_a_padded_batch_scores_like_its_sequences() -> None:
    subject = subject_of("hq4@p16")
    rows = [row[0].tolist() for row in prompt(60, 37, 5, seed=5)]
    for both, row in zip(subject.score(rows), rows, strict=True):
        np.testing.assert_allclose(both.nll, subject.score([row])[0].nll, atol=2e-4)


def test_attention_comes_back_after_a_call() -> None:
    subject = subject_of("hq4@p16")
    before = subject.model.config._attn_implementation
    subject.score([[3, 4, 5]])
    assert subject.model.config._attn_implementation == before


def test_greedy_text_is_that_of_generate() -> None:
    subject = subject_of(REFERENCE)
    prompts = [row[0].tolist() for row in prompt(20, 9, seed=7)]
    model = model_of("llama")
    for made, ids in zip(subject.generate(prompts, 6), prompts, strict=True):
        want = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :].tolist()
        assert made == [token for token in want if token != model.generation_config.eos_token_id][: len(made)]
        assert 1 <= len(made) <= 6


def test_an_export_scores_like_pytorch_with_the_same_cache(tmp_path: Path) -> None:
    model = model_of("llama")
    export_model(model, tmp_path, "hq4@p16", fold=False, tokenizer=None)
    with pytest.raises(HqmqError, match="tokenizer"):
        SessionSubject(tmp_path, 128)
    ids = list(windows_of(1).tokens[0])
    subject = SessionSubject(tmp_path, 128, Letters())
    assert (subject.codec, subject.mode, subject.where) == ("hq4@p16", "fused", "onnxruntime float32")
    found = subject.score([ids])[0]
    np.testing.assert_allclose(found.nll, subject_of("hq4@p16").score([ids])[0].nll, atol=1e-3)


def test_windows_are_cut_from_the_text(tmp_path: Path) -> None:
    file = tmp_path / "text"
    file.write_text("abcdefghijk")
    cut = read_windows(file, Letters(), range(1, 3), 3)
    assert (cut.numbers, cut.tokens) == ((1, 2), ((100, 101, 102), (103, 104, 105)))
    begun = read_windows(file, Letters(7), range(1, 3), 3)
    assert begun.tokens == ((7, 101, 102), (7, 104, 105))
    assert (parse_range("3"), parse_range("2:4")) == (range(3), range(2, 4))


@pytest.mark.parametrize(
    ("text", "numbers", "length", "message"),
    [
        ("", range(1), 4, "is empty"),
        ("  \n", range(1), 4, "is empty"),
        ("abc", range(1), 4, "3 tokens make 0 windows of 4"),
        ("abcdefgh", range(1, 3), 4, "2 windows of 4; windows 1…2 were"),
        ("abcdefgh", range(1), 1, "--length 2"),
    ],
)
def test_a_text_that_does_not_do(tmp_path: Path, text: str, numbers: range, length: int, message: str) -> None:
    (tmp_path / "text").write_text(text)
    with pytest.raises(HqmqError, match=message):
        read_windows(tmp_path / "text", Letters(), numbers, length)


def test_a_file_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "text").write_bytes(b"ab\xff\xfe")
    with pytest.raises(HqmqError, match="is not UTF-8"):
        read_windows(tmp_path / "text", Letters(), range(1), 2)


@pytest.mark.parametrize("text", ["0", "x", "5:5", "-1:4", "3:1"])
def test_a_range_that_does_not_do(text: str) -> None:
    with pytest.raises(HqmqError, match="--windows"):
        parse_range(text)


def test_an_interrupted_run_goes_on_where_it_was(tmp_path: Path) -> None:
    windows = windows_of(3, 40)

    class Interrupted(TorchSubject):
        calls = 0

        def score(self, sequences: Any) -> Any:
            self.calls += 1
            if self.calls == 2:
                raise KeyboardInterrupt
            return super().score(sequences)

    first = Interrupted(model_of("llama"), Letters(), Codec.parse("hq4@p16"), "fused", "tiny", "digest")
    with pytest.raises(KeyboardInterrupt):
        measure(first, windows, Store(tmp_path), {})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"key": {"task"')  # a line that the end of the machine cut off
    kept = Store(tmp_path)
    assert kept.get(window_key(first, windows, 0)) is not None
    again = Interrupted(model_of("llama"), Letters(), Codec.parse("hq4@p16"), "fused", "tiny", "digest")
    again.calls = 2
    measure(again, windows, kept, {})
    assert again.calls == 4, "two windows were left"
    whole = Store(tmp_path / "whole")
    subject = subject_of("hq4@p16")
    measure(subject, windows, whole, {})
    for i in range(3):
        key = window_key(subject, windows, i)
        assert Store(tmp_path).get(key) == whole.get(key)


def test_results_of_another_cache_format_are_measured_again(tmp_path: Path) -> None:
    windows, subject, store = windows_of(2, 40), subject_of("hq4@p16"), Store(tmp_path)
    measure(subject, windows, store, {})
    key = window_key(subject, windows, 0)
    store.add(key, {"nll": 99.0}, {"cache_format": FORMAT_VERSION - 1})
    before = [record["value"] for record in Store(tmp_path).records(item=1)]
    measure(subject, windows, Store(tmp_path), {})
    value = Store(tmp_path).get(key)
    assert value is not None
    assert value["nll"] < 99.0
    assert [record["value"] for record in Store(tmp_path).records(item=1)] == before
    assert len((tmp_path / FILE).read_text().splitlines()) == 4  # two, the old one, and that again


def test_reading_a_store_leaves_a_run_in_progress_alone(tmp_path: Path) -> None:
    Store(tmp_path).add({"task": "ppl", "item": 0}, {"nll": 1.0})
    with (tmp_path / FILE).open("a") as file:
        file.write('{"key": {"ta')
    text = (tmp_path / FILE).read_text()
    store = Store(tmp_path, read_only=True)
    assert store.get({"task": "ppl", "item": 0}) == {"nll": 1.0}
    assert (tmp_path / FILE).read_text() == text
    with pytest.raises(ValueError, match="read only"):
        store.add({"task": "ppl", "item": 1}, {})
    assert list(Store(tmp_path / "none", read_only=True).records()) == []
    assert not (tmp_path / "none").exists()


def test_results_of_parts_count_for_the_preset_they_became(tmp_path: Path) -> None:
    windows, subject = windows_of(2, 40), subject_of("k=hq3,v=hq2.5@p16")
    assert subject_of("k=hq3,v=hq:s10_r2@p16").codec == subject.codec == "k=hq3,v=hq2.5@p16"
    keys = [window_key(subject, windows, i) for i in range(2)]
    old = {"key": {**keys[0], "codec": "k=hq3,v=hq:s10_r2@p16"}, "value": {"nll": 1.25}}
    about = {"cache_format": FORMAT_VERSION}
    (tmp_path / FILE).write_text(json.dumps({**old, "about": about}) + "\n")
    store = Store(tmp_path)
    assert store.get(keys[0], about) == store.get(old["key"], about) == {"nll": 1.25}
    measure(subject, windows, store, {})
    assert (tmp_path / FILE).read_text().count("\n") == 2, "the other window only"
    for kept in (store, Store(tmp_path)):
        assert [record["key"] for record in kept.records(codec="k=hq3,v=hq:s10_r2@p16")] == keys
    store.add(old["key"], {"nll": 2.5})
    assert [record["value"] for record in Store(tmp_path).records(item=0)] == [{"nll": 2.5}]


def test_a_file_that_holds_no_results_is_refused(tmp_path: Path) -> None:
    (tmp_path / FILE).write_text('{"value": 3}\n')
    with pytest.raises(HqmqError, match=r"results.jsonl:1: not a result"):
        Store(tmp_path)


def test_the_summary_pairs_windows_with_the_reference(tmp_path: Path) -> None:
    store, windows, subject = Store(tmp_path), windows_of(3, 10), subject_of("hq4@p16")
    exact = subject_of(REFERENCE)
    base, worse = [2.0, 3.0, 2.5], [2.1, 3.3, 2.6]
    for i in range(3):
        bits = {"stored_bits": 4.25, "paper_bits": 4.0, "tail": 16}
        store.add(window_key(exact, windows, i), {"nll": base[i], **bits})
        store.add(window_key(subject, windows, i), {"nll": worse[i], **bits})
    store.add({**window_key(exact, windows, 7)}, {"nll": 99.0, "stored_bits": 16.0, "paper_bits": None, "tail": 0})
    found = {item.codec: item for item in summaries(store, subject, windows)}
    assert found[REFERENCE].perplexity == pytest.approx(math.exp(2.5))
    change = found["hq4@p16"].change
    assert change is not None
    mean = (0.1 + 0.3 + 0.1) / 3
    assert change.mean == pytest.approx(math.expm1(mean))
    assert change.error == pytest.approx(math.exp(mean) * np.std([0.1, 0.3, 0.1], ddof=1) / math.sqrt(3))
    assert found["hq4@p16"].windows == 3


def test_bits_count_all_that_is_stored() -> None:
    subject = subject_of("k=hq4,v=hq3@p16")
    head_dim = 16
    scale, mean = 8 / head_dim, 16 / 16
    # Whole words: four chunks of 16 and 12 bits take 64 and 48 bits, the latter rounded up to two words.
    assert subject.bits().stored == pytest.approx(((64 / 16 + scale + mean) + (64 / 16 + scale)) / 2)
    assert subject.bits().tail == 16 + 4
    subject = subject_of("paper:s24_r3+med3@p8")
    subject.score([windows_of(1).tokens[0]])
    share = 4 * (subject.bits().paper - (math.log2(24 * 24) + 3) / 4 - 1 - 0.25) / 4 / 16  # type: ignore[operator]
    assert 0 <= share < 0.2


def test_k_is_balanced_for_our_schemes_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    model = copy.deepcopy(model_of("qwen2"))
    projection = model.model.layers[0].self_attn.k_proj
    with torch.no_grad():
        projection.bias[:2] = 30.0
    before = projection.weight.clone()
    monkeypatch.setattr(source, "load", lambda *_: source.Source(model, Letters(), "tiny"))
    told: list[str] = []
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    subjects, _ = open_subjects(tmp_path, None, "cpu", "qdq", told.append)
    for name, changed in (("reference", False), ("hq4@p16", True), ("int4@p16", False), ("unbalanced:hq4@p16", False)):
        subject = subjects(Codec.parse(name))
        assert subject.codec == name
        assert torch.equal(projection.weight, before) is not changed
    assert len(told) == 1
    assert "K balanced in" in told[0]
    ids = windows_of(1).tokens[0]
    exact = subjects(Codec.parse(REFERENCE)).score([ids])[0].nll
    loss = {
        name: np.abs(subjects(Codec.parse(name)).score([ids])[0].nll - exact).mean()
        for name in ("hq4@p16", "unbalanced:hq4@p16")
    }
    assert loss["hq4@p16"] < 0.7 * loss["unbalanced:hq4@p16"]
    assert Codec.parse("balanced:hq4") == Codec.parse("hq4")
    assert Codec.parse("balanced:int4").balanced


def test_unknown_codecs_are_named() -> None:
    for name in ("hq9", "int99", "kivi-9", "turbo-9"):
        with pytest.raises(HqmqError, match=name):
            Codec.parse(name)
    with pytest.raises(HqmqError, match="neither fused nor qdq"):
        subject_of("hq4", "other")
    assert Codec.parse("hq4", seed=3).name == "hq4#3"


def test_intervals() -> None:
    low, high = wilson(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson(0, 5)[0] == 0.0
    assert wilson(5, 5)[1] == pytest.approx(1.0)
    assert paired_mean([1.0]).error == math.inf
    with pytest.raises(ValueError, match="no share"):
        wilson(3, 2)


def test_the_vocabulary_of_the_cases_is_large_enough() -> None:
    assert max(max(row) for row in windows_of(3).tokens) < VOCAB


@pytest.mark.slow
def test_perplexity_of_a_real_model(tmp_path: Path) -> None:
    """SmolLM2-135M over two windows of our own text, from the command line."""
    from samples.demo import fetch

    root = Path(__file__).parent.parent
    model = fetch(root / "models" / "SmolLM2-135M-Instruct")
    schemes = [item for name in ("fp16", "hq4", "hq3", "int3") for item in ("--scheme", name)]
    command = ["eval", "ppl", str(model), "--text", str(root / "hqmq_trt" / "data" / "sample.txt"), *schemes]
    command += ["--windows", "2", "--length", "512", "--device", "cpu", "--output", str(tmp_path), "--json"]
    result = CliRunner().invoke(app, command, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    found = {item["codec"]: item for item in json.loads(result.stdout)["codecs"]}
    assert 3 < found[REFERENCE]["perplexity"] < 40
    assert abs(found["fp16"]["change"]) < 1e-3
    assert abs(found["hq4"]["change"]) < 0.03
    assert found["hq4"]["change"] < found["hq3"]["change"] < found["int3"]["change"]
    assert len((tmp_path / FILE).read_text().splitlines()) == 10
