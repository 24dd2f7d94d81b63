"""Statistics of K and V and errors of codecs, against plain numpy on K and V of transformers' own cache."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
import torch
import typer
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from typer.testing import CliRunner

from hqmq_trt.cache import HqmqCache
from hqmq_trt.cli.eval_kv import kv
from hqmq_trt.errors import HqmqError
from hqmq_trt.eval import kv_capture
from hqmq_trt.eval.baselines import parse_baseline
from hqmq_trt.eval.kv_statistics import ERRORS, STATISTICS, CodecErrors, KvReport, Summary, measure_kv
from hqmq_trt.eval.subject import Codec
from hqmq_trt.format import paper_bits, stored_bits
from hqmq_trt.scheme import ROLES, Scheme
from tests.architectures import EXPORTED
from tests.conftest import tiny_config

LENGTH, PAGE, HEADS, GROUP, D = 150, 64, 2, 2, 64
FULL = LENGTH // PAGE * PAGE
Arrays = dict[str, list[NDArray[np.float32]]]


@pytest.fixture(scope="module")
def model() -> Any:
    """A tiny Llama whose K has large channels: two chunks of layer 1, head 0, and their partners under RoPE."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(tiny_config("llama")).eval()
    with torch.no_grad():
        for layer in model.model.layers:
            for name in ("q_proj", "k_proj", "v_proj"):
                getattr(layer.self_attn, name).weight.mul_(4)
        model.model.layers[1].self_attn.k_proj.weight[4:12] *= 30
    return model


@pytest.fixture(scope="module")
def rows() -> list[list[int]]:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 250, (2, LENGTH), generator=generator).tolist()


@pytest.fixture(scope="module")
def report(model: Any, rows: list[list[int]]) -> KvReport:
    names = ("fp16", "hq3", "hq5", "paper:s96_r4+med3", "kivi-4", "int4+med3")
    return measure_kv(model, [Codec.parse(name) for name in names], rows)


@pytest.fixture(scope="module")
def arrays(model: Any, rows: list[list[int]]) -> list[Arrays]:
    """By window: q, K and V of each layer [heads, T, D]: K and V from transformers' cache, q by a hook and its RoPE."""
    found = []
    for row in rows:
        q: list[NDArray[np.float32]] = []
        ids = torch.tensor([row])
        cosine, sine = model.model.rotary_emb(torch.zeros(1), torch.arange(LENGTH)[None])

        def rotate(_: Any, __: Any, out: torch.Tensor, q: Any = q, turn: Any = (cosine, sine)) -> None:
            heads = out.unflatten(-1, (-1, D)).transpose(1, 2)
            q.append(apply_rotary_pos_emb(heads, heads, *turn)[0][0].numpy())

        hooks = [layer.self_attn.q_proj.register_forward_hook(rotate) for layer in model.model.layers]
        with torch.no_grad():
            cache = model(ids, use_cache=True).past_key_values
        for hook in hooks:
            hook.remove()
        keys = [layer.keys[0].numpy() for layer in cache.layers]
        found.append({"q": q, "key": keys, "value": [layer.values[0].numpy() for layer in cache.layers]})
    return found


def codec(report: KvReport, name: str) -> CodecErrors:
    return next(item for item in report.codecs if item.name == name)


def lower_median(x: NDArray[Any]) -> Any:
    return np.sort(x, axis=None)[(x.size - 1) // 2]


def outliers(norms: NDArray[Any]) -> float:
    return float((norms > 3 * lower_median(norms)).mean())


def statistics(windows: list[NDArray[np.float32]]) -> dict[str, float]:
    """All statistics of one layer, role and head, from windows [T, D], as their definitions read."""
    flat = np.concatenate(windows).astype(np.float64).ravel()
    norms = [np.linalg.norm(x.reshape(LENGTH, -1, 4).astype(np.float64), axis=-1) for x in windows]
    pages = [page for x in windows for page in np.split(x[:FULL].astype(np.float64), FULL // PAGE)]
    page_norms = [page for norm in norms for page in np.split(norm[:FULL], FULL // PAGE)]
    return {
        "max_over_median": np.abs(flat).max() / np.mean([lower_median(np.abs(x)) for x in windows]),
        "norm_max_over_median": max(n.max() for n in norms) / np.mean([lower_median(n) for n in norms]),
        "kurtosis": ((flat - flat.mean()) ** 4).mean() / flat.var() ** 2,
        "outliers_page": float(np.mean([outliers(page) for page in page_norms])),
        "outliers_token": float(np.mean([outliers(token) for norm in norms for token in norm])),
        "outliers_window": float(np.mean([outliers(norm) for norm in norms])),
        "mean_energy": sum(PAGE * (p.mean(0) ** 2).sum() for p in pages) / sum((p**2).sum() for p in pages),
    }


def test_statistics_equal_their_definitions(report: KvReport, arrays: list[Arrays]) -> None:
    for role in ROLES:
        for layer in range(2):
            for head in range(HEADS):
                expected = statistics([window[role][layer][head] for window in arrays])
                found = {name: report.statistics[role][name][layer][head] for name in STATISTICS}
                assert found == pytest.approx(expected, rel=1e-4, abs=1e-9), (role, layer, head)


def test_planted_outliers_show(report: KvReport) -> None:
    share, largest = (report.statistics["key"][name] for name in ("outliers_page", "max_over_median"))
    assert share[1][0] > 0.15  # four of sixteen chunks, less what the turns of RoPE make small
    assert share[1][1] < 0.01
    assert max(report.statistics["value"]["outliers_page"][1]) < 0.01
    worst = Summary.of(largest)
    assert (worst.layer, worst.head) == (1, 0)
    assert worst.worst == largest[1][0] > 20


def attention(q: NDArray[Any], k: NDArray[Any], v: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Logits and output of causal attention with plain arrays, one query head each: [Hq, T, T], [Hq, T, D]."""
    logits = np.stack([q[h] @ k[h // GROUP].T for h in range(len(q))]).astype(np.float64) * D**-0.5
    hidden = np.where(np.tril(np.ones((LENGTH, LENGTH), bool)), logits, -np.inf)
    weights = np.exp(hidden - hidden.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return logits, np.stack([weights[h] @ v[h // GROUP] for h in range(len(q))])


def decoded(model: Any, name: str, window: Arrays, layer: int) -> list[NDArray[Any]]:
    """K and V of one layer as a whole HqmqCache, or a baseline's encode and decode, gives them back."""
    k, v = (torch.from_numpy(window[role][layer])[None] for role in ROLES)
    if name.startswith(("hq", "paper", "fp16")):
        return [x[0].numpy() for x in HqmqCache(model.config, name).layers[layer].update(k, v)]
    baseline, out = parse_baseline(name), []
    for role, x in zip(ROLES, (k[0], v[0]), strict=True):
        full = baseline.decode(baseline.encode(x[:, :FULL], role), role)
        out.append(torch.cat([full, x[:, FULL:].half().float()], 1).numpy())
    return out


@pytest.mark.parametrize("name", ["hq3", "paper:s96_r4+med3", "kivi-4"])
def test_errors_equal_direct_computation(model: Any, report: KvReport, arrays: list[Arrays], name: str) -> None:
    for layer in range(2):
        sums = {key: np.zeros((2, HEADS)) for key in ERRORS}
        seen = np.tril(np.ones((LENGTH, LENGTH), bool))
        seen[:, FULL:] = False
        for window in arrays:
            q, k, v = window["q"][layer], window["key"][layer], window["value"][layer]
            k_hat, v_hat = decoded(model, name, window, layer)
            logits, out = attention(q, k, v)
            logits_hat, out_hat = attention(q, k_hat, v_hat)
            for head in range(HEADS):
                queries = slice(head * GROUP, (head + 1) * GROUP)
                for role, x, x_hat in (("key", k, k_hat), ("value", v, v_hat)):
                    sums[role][:, head] += ((x - x_hat)[head, :FULL] ** 2).sum(), (x[head, :FULL] ** 2).sum()
                square = (logits - logits_hat)[queries] ** 2 * seen
                sums["logits"][:, head] += square.sum(), GROUP * seen.sum()
                sums["output"][:, head] += ((out - out_hat)[queries] ** 2).sum(), (out[queries] ** 2).sum()
        for key, (error, energy) in sums.items():
            expected = error / energy if key in ROLES else np.sqrt(error / energy)
            np.testing.assert_allclose(codec(report, name).errors[key][layer], expected, rtol=2e-3, err_msg=key)


def test_finer_codecs_err_less(report: KvReport) -> None:
    for name in ERRORS:
        coarse, fine, exact = (np.concatenate(codec(report, key).errors[name]) for key in ("hq3", "hq5", "fp16"))
        assert (fine < 0.5 * coarse).all(), name
        assert (exact < 0.05 * fine).all(), name


def test_fp16_scheme_loses_nothing_of_a_float16_model(model: Any, rows: list[list[int]]) -> None:
    half = copy.deepcopy(model).half()
    found = measure_kv(half, [Codec.parse("fp16"), Codec.parse("hq5")], rows[:1])
    for name in ERRORS:
        exact, coded = (np.concatenate(item.errors[name]) for item in found.codecs)
        assert (exact == 0).all(), name
        assert (coded > 0).all(), name


def test_med3_counts_outliers_kept_and_dropped(model: Any, report: KvReport, arrays: list[Arrays]) -> None:
    found = codec(report, "paper:s96_r4+med3")
    for role in ROLES:
        for share, expected in zip(found.outlier_share[role], report.statistics[role]["outliers_page"], strict=True):
            np.testing.assert_allclose(share, expected, atol=2e-3)  # the codec sees K and V rounded to float16
    dropped = 0
    for window in arrays:
        cache = HqmqCache(model.config, found.name)
        for layer in range(2):
            cache.update(*(torch.from_numpy(window[role][layer])[None] for role in ROLES), layer)
        dropped += cache.dropped_outliers()
    assert found.dropped == dropped > 0
    scheme = Scheme.parse(found.name).key
    assert found.stored_bits == stored_bits(scheme, D, PAGE)
    occurred = sum(Summary.of(found.outlier_share[role]).mean for role in ROLES) / 2
    assert found.paper_bits == pytest.approx(paper_bits(scheme, D, occurred))
    assert codec(report, "hq3").outlier_share == {}
    # int4 with scale and flags, and 16 bits an outlier element: 15 % and more of the chunks in one of eight heads.
    assert codec(report, "int4+med3").stored_bits > 4 + 16 / D + 0.25 + 16 * 0.15 / 8


@pytest.mark.parametrize("name", ["gemma-2", "gpt-oss", "mistral", "qwen2"])
def test_capture_attends_as_the_model_does(name: str) -> None:
    """Soft-cap, sinks, windows: logits of the model under capture equal those under transformers' eager attention."""
    model = next(item for item in EXPORTED if item.id.startswith(name)).model()
    ids = torch.randint(3, 90, (1, 40), generator=torch.Generator().manual_seed(0))

    def listen(seen: kv_capture.LayerInput) -> torch.Tensor:
        return kv_capture.attend(seen.q[0].float(), seen.k[0].float(), seen.v[0].float(), seen.visible, seen.parameters)

    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        with kv_capture.listening(model, listen):
            found = model(ids, use_cache=False).logits
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert expected.std() > 0.01
    assert model.config._attn_implementation == "eager"


def test_blocks_of_queries_change_nothing(
    model: Any, report: KvReport, rows: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kv_capture, "_LOGITS", 7 * LENGTH * HEADS * GROUP)
    found = measure_kv(model, [Codec.parse("hq3")], rows)
    for name, layers in codec(report, "hq3").errors.items():
        np.testing.assert_allclose(found.codecs[0].errors[name], layers, rtol=1e-5)


def test_progress_and_attention_come_back(model: Any, rows: list[list[int]]) -> None:
    before, calls = model.config._attn_implementation, []
    measure_kv(model, [], rows, lambda: calls.append(1))
    assert len(calls) == 2 * len(rows)
    assert model.config._attn_implementation == before
    with pytest.raises(HqmqError, match="fill no page of 64"):
        measure_kv(model, [Codec.parse("hq3")], [row[:63] for row in rows])
    with pytest.raises(HqmqError, match="fill no page of 256"):
        measure_kv(model, [Codec.parse("hq3@p256")], rows)
    with pytest.raises(HqmqError, match="'reference' changes nothing"):
        measure_kv(model, [Codec.parse("reference")], rows)
    with pytest.raises(HqmqError, match="no windows"):
        measure_kv(model, [Codec.parse("hq3")], [])


def test_values_that_are_not_finite(model: Any, rows: list[list[int]]) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.nan
    with pytest.raises(HqmqError, match="layer 1: value is not finite"):
        measure_kv(broken, [], rows)
    assert broken.config._attn_implementation == model.config._attn_implementation


def test_summary_leaves_out_heads_without_a_value() -> None:
    found = Summary.of([np.array([1.0, np.nan]), np.array([3.0, 2.0])])
    assert (found.mean, found.worst, found.layer, found.head) == (2.0, 3.0, 1, 0)


def test_command(tiny_model: Callable[[str], Path], tmp_path: Path) -> None:
    app = typer.Typer()
    app.command()(kv)
    text = tmp_path / "text.txt"
    text.write_text("The quick brown fox jumps over the lazy dog. " * 20, encoding="utf-8")
    arguments = [str(tiny_model("llama")), "-t", str(text), "-w", "1:3", "--length", "128", "-s", "hq4", "-s", "kivi-4"]
    result = CliRunner().invoke(
        app, [*arguments, "-s", "hq4", "-o", str(tmp_path / "out"), "--json", "--device", "cpu"]
    )
    assert result.exit_code == 0, result.output
    document = json.loads(result.stdout)
    assert document == json.loads((tmp_path / "out" / "kv.json").read_text(encoding="utf-8"))
    assert (document["windows"], document["length"], document["first_window"]) == (2, 128, 1)
    assert list(document["codecs"]) == ["hq4", "kivi-4"]
    errors = document["codecs"]["hq4"]["errors"]
    assert np.shape(errors["key"]) == (2, 2)
    worst = document["summary"]["codecs"]["hq4"]["key"]
    assert worst["worst"] == np.max(errors["key"]) == errors["key"][worst["layer"]][worst["head"]]
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "kv-hq4.png", "kv-kivi-4.png", "kv-statistics.png", "kv.json",
    ]  # fmt: skip
    for file in (tmp_path / "out").glob("*.png"):
        assert min(matplotlib.image.imread(file).shape[:2]) > 100
    result = CliRunner().invoke(app, [*arguments, "--device", "cpu"], env={"COLUMNS": "200"})
    assert result.exit_code == 0
    assert "energy of the page mean" in result.stdout
    assert f"{np.mean(errors['key']):.2e} / " in result.stdout
