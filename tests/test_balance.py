"""Key balancing: no change of the function, exact restoring, less error of the scores, and exports that do the same."""

from __future__ import annotations

import cmath
import json
import math
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.models.qwen2 import modeling_qwen2

from hqmq_trt import balance, balance_layers, cli
from hqmq_trt.balance import BalanceReport, applies_to, balance_keys, balanced, balanced_like
from hqmq_trt.cache import HqmqCache
from hqmq_trt.diff import compare, greedy
from hqmq_trt.export import export_model
from hqmq_trt.manifest import Manifest
from hqmq_trt.runtime import OrtSession
from hqmq_trt.scheme import Scheme
from tests.architectures import BY_NAME
from tests.test_export import Exported, divergence, run_exported, run_torch

PAGE = 16
SCHEME = f"hq4@p{PAGE}"
BALANCED = ("Llama 3", "Qwen2", "Qwen3", "Gemma 2", "Gemma 3 text", "Phi-3", "Phi-4-mini", "gpt-oss", "SmolLM3")
REFUSED = {
    "GPT-2": "no q_proj",
    "GPT-NeoX": "no q_proj",
    "OPT": "no rotary embedding",
    "Cohere": "interleaved",
}


def uneven(name: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Any:
    """A model of tests.architectures whose channels of q and K differ as trained ones do; Qwen2 has a large K bias."""
    architecture = BY_NAME[name]
    model = replace(architecture, settings={**architecture.settings, **settings}).model()
    generator = torch.Generator().manual_seed(3)

    def spread(like: Tensor, sigma: float) -> Tensor:
        return (torch.randn(like.shape[0], generator=generator) * sigma).exp().reshape(-1, *[1] * (like.dim() - 1))

    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith(("q_norm.weight", "k_norm.weight")):
                offset = float(type(model).__name__.startswith("Gemma"))
                parameter.copy_((parameter + offset) * spread(parameter, 0.7) - offset)
            elif key.endswith(("q_proj.weight", "k_proj.weight", "qkv_proj.weight")):
                parameter.mul_(spread(parameter, 0.7))
            elif key.endswith("input_layernorm.weight"):
                parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.5)
            elif key.endswith("k_proj.bias") and name == "Qwen2":
                parameter[3::16] += 12
                parameter[1::16] -= 9
    return model.to(dtype)


DIVERGENCE = 2e-6
"""Mean KL that runtimes which code (almost) the same bytes keep below."""


def ids(count: int = 90) -> Tensor:
    return torch.from_numpy(np.random.default_rng(8).integers(3, 97, (1, count)))


@torch.no_grad()
def logits(model: Any, cache: Any = None) -> Tensor:
    found: Tensor = model(input_ids=ids(), past_key_values=cache, use_cache=cache is not None).logits[0].float()
    return found


def snapshot(model: Any) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed(model: Any, before: dict[str, Tensor]) -> set[str]:
    return {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}


@pytest.mark.parametrize("name", BALANCED)
def test_balancing_changes_no_logit_and_is_undone(name: str) -> None:
    model = uneven(name)
    before, reference = snapshot(model), logits(model)
    identities = [id(parameter) for parameter in model.parameters()]
    with balanced(model, PAGE) as report:
        assert report.balanced == len(report.layers) == model.config.num_hidden_layers, str(report)
        assert report.ratio is not None
        assert 0.2 < report.ratio < 0.95
        assert report.difference is not None
        assert report.difference < 1e-5
        inside = changed(model, before)
        assert inside
        assert all(any(part in name for part in ("q_proj", "k_proj", "qkv_proj", "_norm.")) for name in inside)
        torch.testing.assert_close(logits(model), reference, rtol=1e-3, atol=1e-4)
    assert not changed(model, before)
    assert identities == [id(parameter) for parameter in model.parameters()]
    assert torch.equal(logits(model), reference)


@pytest.mark.parametrize(("name", "words"), REFUSED.items())
def test_what_is_not_understood_is_left_alone(name: str, words: str) -> None:
    model = BY_NAME[name].model()
    before = snapshot(model)
    report = balance_keys(model, PAGE)
    assert not changed(model, before)
    assert report.balanced == 0
    assert [words in layer.reason for layer in report.layers] == [True] * 2
    assert words in str(report)
    assert report.ratio is report.difference is None


def test_even_layers_have_nothing_to_gain() -> None:
    model = BY_NAME["Llama tied"].model()
    before = snapshot(model)
    report = balance_keys(model)
    assert not changed(model, before)
    assert all(layer.reason == "nothing to gain" and min(layer.ratios) > 0.95 for layer in report.layers)


def test_a_balanced_model_is_balanced() -> None:
    """For good; the second time nothing is left to gain. A page mean of another length leaves another share of K."""
    model = uneven("Qwen2")
    assert balance_keys(model, PAGE).balanced == 2
    again = balance_keys(model, PAGE)
    assert again.balanced == 0
    assert all(ratio == pytest.approx(1, abs=1e-6) for layer in again.layers for ratio in layer.ratios)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_is_restored_and_keeps_its_type(dtype: torch.dtype) -> None:
    model = uneven("Qwen2", dtype)
    before = snapshot(model)
    with balanced(model, PAGE) as report:
        assert report.balanced == 2, str(report)
        assert {parameter.dtype for parameter in model.parameters()} == {dtype}
        assert report.difference is not None
        assert 1e-5 < report.difference < 1e-2
    assert not changed(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["Llama 3", "Qwen2", "Qwen3", "Phi-3", "gpt-oss"])
def test_a_wrong_pairing_is_caught(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Scales that pair neighbouring channels do not commute with the rotation: running the model shows it."""
    monkeypatch.setattr(balance_layers, "pair_index", lambda head_dim, half: torch.arange(head_dim) // 2)
    model = uneven(name, dtype)
    before = snapshot(model)
    report = balance_keys(model, PAGE)
    assert report.difference is not None
    assert report.difference > 10 * balance.TOLERANCE
    assert report.balanced == 0
    assert "logits" in str(report)
    assert not changed(model, before)


def test_a_failure_leaves_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    model = uneven("Qwen2")
    before = snapshot(model)
    monkeypatch.setattr(balance, "difference", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        balance_keys(model, PAGE)
    assert not changed(model, before)
    monkeypatch.undo()

    def interrupted() -> None:
        with balanced(model, PAGE):
            assert changed(model, before)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not changed(model, before)


def test_parts_between_projection_and_scores_are_noticed() -> None:
    model = uneven("Llama 3")
    attention = model.model.layers[1].self_attn
    attention.key_layernorm = torch.nn.LayerNorm(16)
    model.model.layers[2].self_attn.k_proj.weight = model.model.layers[0].self_attn.k_proj.weight
    reasons = [layer.reason for layer in balance_keys(model).layers]
    for reason, word in zip(reasons, ("shared", "key_layernorm", "shared"), strict=True):
        assert word in reason


def test_the_predicted_ratio_by_hand() -> None:
    """KV head 1 of layer 0, number by number."""
    model = uneven("Qwen2", num_key_value_heads=2)
    layer, head_dim, half, head = model.model.layers[0], 16, 8, 1
    gains = layer.input_layernorm.weight.tolist()

    def variance(linear: Any, row: int) -> float:
        return math.fsum((w * g) ** 2 for w, g in zip(linear.weight[row].tolist(), gains, strict=True))

    q, k = layer.self_attn.q_proj, layer.self_attn.k_proj
    w, sigma2 = [0.0] * half, [0.0] * half
    for i in range(half):
        theta = model.config.rope_parameters["rope_theta"] ** (-2 * i / head_dim)
        left = 1 - abs(sum(cmath.exp(1j * p * theta) for p in range(PAGE)) / PAGE) ** 2
        for channel in (i, i + half):
            for query_head in (2, 3):
                row = query_head * head_dim + channel
                w[i] += variance(q, row) + q.bias[row].item() ** 2
            row = head * head_dim + channel
            sigma2[i] += variance(k, row) + left * k.bias[row].item() ** 2
    expected = sum(math.sqrt(a * b) for a, b in zip(w, sigma2, strict=True)) ** 2 / (sum(w) * sum(sigma2))
    before = k.weight.detach().clone()
    with balanced(model, PAGE) as report:
        assert report.layers[0].ratios[head] == pytest.approx(expected, rel=1e-5)
        scales = (k.weight[16:24] / before[16:24]).mean(1).detach().numpy()
    wanted = np.power(np.array(w) / np.array(sigma2), 0.25)
    np.testing.assert_allclose(scales, wanted / np.exp(np.log(wanted).mean()), rtol=1e-4)


def scores(model: Any, cache: Any, monkeypatch: pytest.MonkeyPatch) -> Tensor:
    """q·k of layer 0 as attention gets them, the keys from the cache."""
    found: list[Tensor] = []
    honest = modeling_qwen2.eager_attention_forward

    def attend(module: Any, query: Tensor, key: Tensor, *rest: Any, **options: Any) -> Any:
        if module.layer_idx == 0:
            found.append(query @ key.repeat_interleave(module.num_key_value_groups, 1).mT)
        return honest(module, query, key, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(modeling_qwen2, "eager_attention_forward", attend)
        logits(model, cache)
    return found[0].double()


def test_the_error_of_scores_and_logits_falls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five pages of a real HqmqCache; the scores' error falls about as predicted."""
    model = uneven("Qwen2", head_dim=32, num_key_value_heads=2)
    exact, reference = scores(model, DynamicCache(config=model.config), monkeypatch), logits(model)
    full = ids().shape[1] // PAGE * PAGE

    def errors() -> tuple[Tensor, float]:
        error = scores(model, HqmqCache(model.config, SCHEME), monkeypatch) - exact
        by_head = error[0, :, :, :full].square().mean((1, 2)).reshape(2, 2).sum(1)
        return by_head, divergence([reference], [logits(model, HqmqCache(model.config, SCHEME))])

    plain, plain_kl = errors()
    with balanced(model, PAGE) as report:
        found, found_kl = errors()
    assert torch.allclose(found / plain, torch.tensor(report.layers[0].ratios).double(), rtol=0.35)
    assert max(report.layers[0].ratios) < 0.6
    assert found_kl < 0.6 * plain_kl


def test_which_schemes_it_is_for() -> None:
    wanted = {"hq4": True, "hq3@p32": True, "k=hq4,v=fp16": True, "k=fp16,v=hq4": False, "fp16": False}
    wanted |= {"paper:s96_r4+med3": False, "hq:s170_r4-mean": False, "hq:s170_r4-hadamard": False}
    assert {name: applies_to(Scheme.parse(name)) for name in wanted} == wanted


@pytest.mark.parametrize(("name", "mode"), [("Qwen2", "fused"), ("Qwen2", "qdq"), ("Gemma 3 text", "fused")])
def test_an_export_is_the_balanced_model(name: str, mode: str, tmp_path: Path) -> None:
    model, seen = uneven(name), list[BalanceReport]()
    before = snapshot(model)
    manifest = export_model(model, tmp_path / "m", "hq4@p8", mode=mode, on_balance=seen.append)
    assert not changed(model, before)
    assert Manifest.load(tmp_path / "m").key_balance
    assert [report.balanced for report in seen] == [2]

    def cache() -> HqmqCache:
        return HqmqCache.for_model(model, "hq4@p8") if mode == "fused" else HqmqCache(model.config, "hq4@p8")

    found = run_exported(Exported(tmp_path / "m"))
    with balanced_like(model, manifest):
        reference = run_torch(model, cache)
    assert divergence(reference, found) < DIVERGENCE
    assert divergence(run_torch(model, cache), found) > DIVERGENCE, "the weights as they were code other bytes"


def test_other_exports_are_untouched(tmp_path: Path) -> None:
    model = uneven("Qwen2")

    def weights(scheme: str, balance: bool) -> dict[str, bytes]:
        manifest = export_model(model, tmp_path / "m", scheme, balance=balance, overwrite=True)
        assert manifest.key_balance == (balance and scheme == "hq4@p8")
        graph = onnx.load(tmp_path / "m" / "model.onnx").graph
        return {tensor.name: tensor.SerializeToString() for tensor in graph.initializer}

    for scheme in ("fp16@p8", "paper:s8_r3@p8"):
        assert weights(scheme, True) == weights(scheme, False)
    on, off = weights("hq4@p8", True), weights("hq4@p8", False)
    assert {name.split(".")[-2] for name in on if on[name] != off[name]} == {"q_proj", "k_proj"}


def test_diff_and_greedy_balance_pytorch_too(tmp_path: Path) -> None:
    """Both write the same bytes, K of a DynamicCache is what the folder decodes to, and the model is unchanged."""
    model = uneven("Qwen2")
    before = snapshot(model)
    export_model(model, tmp_path / "m", SCHEME)
    result = compare(tmp_path / "m", model, ids()[0].tolist(), decode_steps=8, chunk=40)
    assert result.logits["same"].mean_kl < 1e-5
    assert result.logits["pinned"].mean_kl < 1e-6
    assert max(result.changed.values()) < 0.02
    for error in result.layers:
        assert error.in_run < 0.1, error
    session = OrtSession(tmp_path / "m", 1, 128)
    check = greedy(model, session, ids(40)[0].tolist(), 24)
    assert check.first_divergence is None, str(check)
    assert not changed(model, before)


def test_rounding_is_measured_on_the_balanced_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """float16: the float32 reference of a greedy comparison has the balanced weights as float16 rounded them."""
    model = uneven("Qwen2", torch.float16)
    export_model(model, tmp_path / "m", SCHEME)
    honest = OrtSession.decode

    def decode(self: OrtSession, tokens: Any) -> Any:
        found = honest(self, tokens).copy()
        found[0, int(found[0].argmin())] = found[0].max() + 1
        return found

    monkeypatch.setattr(OrtSession, "decode", decode)
    check = greedy(model, OrtSession(tmp_path / "m", 1, 128), ids(40)[0].tolist(), 4)
    assert check.first_divergence == 1
    assert check.rounding is not None
    assert check.rounding < 0.1
    assert not check.passed


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    uneven("Qwen2").save_pretrained(tmp_path / "model")
    arguments = ["hqmq-trt", "export", str(tmp_path / "model"), "--scheme", SCHEME, "--json", "-o"]
    for folder, options, done in (("a", [], True), ("b", ["--no-balance"], False)):
        monkeypatch.setattr(sys, "argv", [*arguments, str(tmp_path / folder), *options])
        with suppress(SystemExit):
            cli.main()
        captured = capsys.readouterr()
        assert json.loads(captured.out)["key_balance"] == done == Manifest.load(tmp_path / folder).key_balance
        assert ("K balanced in 2 of 2 layers: variance" in " ".join(captured.err.split())) == done
