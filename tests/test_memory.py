"""Sizes against arithmetic done here, independently of hqmq_trt.format."""

from __future__ import annotations

import json
from math import ceil, log2
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from hqmq_trt.cli import app
from hqmq_trt.errors import HqmqError
from hqmq_trt.shapes import KNOWN_MODELS, CacheShape, cache_shape


def memory(*arguments: str) -> dict[str, Any]:
    result = CliRunner().invoke(app, ["memory", "--json", *arguments], catch_exceptions=False)
    assert result.exit_code == 0
    document: dict[str, Any] = json.loads(result.stdout)
    return document


def test_llama_70b_at_128k_takes_43_gb() -> None:
    document = memory("--model", "llama-3-70b", "--context", "131072")
    assert document["fp16_bytes"] == 80 * 2 * 8 * 128 * 131072 * 2 == 42_949_672_960
    assert document["schemes"][0]["scheme"] == "fp16"
    assert document["schemes"][0]["by_kind"]["codes"] == document["fp16_bytes"]


@pytest.mark.parametrize(("scheme", "secondaries", "radius"), [("hq3", 21, 3), ("hq4", 170, 4), ("hq5", 682, 6)])
def test_hq_bytes(scheme: str, secondaries: int, radius: int) -> None:
    layers, heads, dim, context, batch, page = 3, 2, 64, 1000, 5, 64
    shape = ["--layers", "3", "--kv-heads", "2", "--head-dim", "64"]
    row = memory(*shape, "--context", "1000", "--batch", "5", "--scheme", scheme)["schemes"][0]
    pages = ceil(context / page)
    vectors = layers * heads * batch
    bits = ceil(log2(12 * secondaries)) + radius + 1
    words = ceil(bits * (dim // 4) / 32)
    assert row["by_kind"] == {
        "codes": 2 * vectors * pages * page * words * 4,
        "scales": 2 * vectors * pages * page,
        "mean": vectors * pages * dim * 2,
        "tail": 2 * vectors * (page + 4) * dim * 2,
        "codebooks": 2 * layers * (heads * secondaries * 16 + 4 * 2**radius),
    }
    assert row["bytes"] == sum(row["by_kind"].values())
    assert row["ratio"] == pytest.approx(4 * vectors * dim * context / row["bytes"])
    assert row["paper_bits"] == pytest.approx((log2(24 * secondaries) + radius) / 4 + 8 / dim)
    assert row["stored_bits"] == pytest.approx(words * 32 / dim + 8 / dim + 0.5 * 16 / page)


def test_outliers_are_counted() -> None:
    dim, context, page = 128, 6400, 64
    shape = ["--layers", "1", "--kv-heads", "1", "--head-dim", "128", "--context", "6400"]
    name = "paper:s96_r4+med3"
    row = memory(*shape, "--scheme", name, "--outlier-share", "0.05")["schemes"][0]
    pages, chunks = context // page, page * dim // 4
    assert row["by_kind"]["outlier_value"] == 2 * pages * (chunks // 8) * 4 * 2
    assert row["by_kind"]["outlier_mask"] == 2 * pages * (chunks // 32 + 1) * 4
    assert row["paper_bits"] == pytest.approx((log2(24 * 96) + 4) / 4 + 16 / dim + 0.25 + 16 * 0.05)
    assert row["stored_bits"] > 6


def test_roles_may_differ() -> None:
    shape = ["--layers", "1", "--kv-heads", "1", "--head-dim", "128", "--context", "64"]
    mixed, high, low = memory(*shape, "-s", "k=hq4,v=hq3.5", "-s", "hq4", "-s", "hq3.5")["schemes"]
    assert mixed["stored_bits"] == pytest.approx((4.0625 + 0.25 + 3.5625) / 2)
    assert low["bytes"] < mixed["bytes"] < high["bytes"]


def test_shape_from_config(tmp_path: Path) -> None:
    config = {"num_hidden_layers": 7, "num_attention_heads": 8, "hidden_size": 512, "num_key_value_heads": 2}
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert cache_shape(str(tmp_path)) == CacheShape(7, 2, 64)
    assert memory("--model", str(tmp_path), "--context", "10")["fp16_bytes"] == 7 * 2 * 2 * 64 * 10 * 2
    gpt2 = {"n_layer": 12, "n_head": 12, "n_embd": 768}
    (tmp_path / "config.json").write_text(json.dumps(gpt2))
    assert cache_shape(str(tmp_path / "config.json")) == CacheShape(12, 12, 64)


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"num_hidden_layers": "x", "num_attention_heads": 1}'])
def test_bad_config(tmp_path: Path, content: str) -> None:
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(HqmqError, match=r"config\.json"):
        cache_shape(str(tmp_path))


def test_known_models() -> None:
    listed = memory("--known")["models"]
    assert set(listed) == set(KNOWN_MODELS)
    assert listed["llama-3-70b"] == {"layers": 80, "kv_heads": 8, "head_dim": 128}
