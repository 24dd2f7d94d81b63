"""The oracle and the native codec write the committed bytes."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from hqmq_trt import codebooks, native
from hqmq_trt.format import FORMAT_VERSION
from hqmq_trt.scheme import PRESETS, ROLES, Scheme
from tests.codec_cases import lengths, oracle_quantize
from tests.make_golden import SCHEMES, TOKENS, full_pages, golden_cache, golden_file, golden_input


def test_every_packed_preset_has_golden_vectors() -> None:
    assert {name for name, (key, _) in PRESETS.items() if key.packed} <= set(SCHEMES)
    assert sum(golden_file(name, role).stat().st_size for name in SCHEMES for role in ROLES) < 60_000


@pytest.mark.parametrize("writer", ["oracle", "native"])
@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", SCHEMES)
def test_bytes_are_the_golden_ones(name: str, role: str, writer: str) -> None:
    scheme = Scheme.parse(name)
    cache, book = golden_cache(scheme, role)
    codec = scheme.role(role)
    if writer == "oracle":
        cache = oracle_quantize(golden_input(), lengths(0), lengths(TOKENS), codec, book, cache)
    else:
        native.append(golden_input(), lengths(0), lengths(TOKENS), codec, book, list(cache.values()))
    page, tail = scheme.page_size, cache["tail"][0, 0]
    for t in range(TOKENS):
        if t >= TOKENS - page:
            assert torch.equal(tail[t % page], golden_input()[0, 0, t])
    assert torch.equal(tail[page:], golden_input()[0, 0, : codec.sink_tokens])
    with np.load(golden_file(name, role)) as golden:
        assert int(golden["format_version"]) == FORMAT_VERSION
        assert golden["codebook"].tolist() == [codebooks.digest(part.numpy()) for part in book]
        found = full_pages(cache, scheme.page_size)
        assert set(found) == set(golden.files) - {"format_version", "codebook"}
        for tensor, array in found.items():
            assert array.tobytes() == golden[tensor].tobytes(), tensor
