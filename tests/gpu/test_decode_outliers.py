"""The fused decode kernel and outliers (Med3x); the cases of MED3 in test_decode_kernel.py go with them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.attention_cases import LIMITS, assert_close
from tests.gpu.decode_layer import MED3, Layer, fast, held, layer
from tests.gpu.requirements import KERNEL_TESTS

pytestmark = [*KERNEL_TESTS, pytest.mark.usefixtures("clean_status")]


def outliers(case: Layer) -> tuple[Tensor, Tensor]:
    """Outliers of the pages that all sequences hold in full, of K and V: kept, and without a slot."""
    kept, dropped = [], []
    for _, _, mask, _, _ in case.caches:
        words = mask[:, :, : max(case.ends) // case.scheme.page_size].cpu()
        bits_of = words[..., :-1].contiguous().view(torch.uint8)
        kept.append(sum((bits_of >> i & 1).sum(-1) for i in range(8)))
        dropped.append(words[..., -1])
    return torch.stack([torch.as_tensor(x) for x in kept]), torch.stack(dropped)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_layers_with_outliers_have_pages_of_all_kinds(head_dim: int) -> None:
    """What the tests of MED3 above rely on."""
    case = layer(MED3, head_dim)
    kept, dropped = outliers(case)
    chunks = case.scheme.page_size * head_dim // 4
    capacity = case.scheme.key.outlier_capacity(head_dim, case.scheme.page_size)
    assert (kept[..., ::3] == 0).any()
    usual = kept[..., 1::3].float().mean() / chunks
    assert 0.02 < usual < 0.05
    assert (kept[..., 2::3] == capacity).any()
    assert (dropped[..., 2::3] > 0).any()


@pytest.mark.parametrize("role", [0, 1])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_outliers_of_any_size(head_dim: int, role: int) -> None:
    """Values that are far beyond 65504 times their token's scale, beside tokens whose other chunks are 0."""
    case = layer(MED3, head_dim)
    caches = case.clone()
    values, scales = caches[role][3], caches[role][1].view(torch.float16).flatten(2)
    scales *= 2.0**-12
    scales[:, :, 5::9] = 0
    values *= 2.0**-6 if role == 0 else 2.0**9
    assert values.isfinite().all()
    for tokens, group in ((1, 4), (5, 7)):
        past, new = held(tokens)
        q, k, v = case.inputs(tokens, torch.float16)
        copies = [[tensor.clone() for tensor in each] for each in caches]
        expected = case.attend((q, k, v), past, new, copies, reference=True)
        q = case.of_group(q, group)
        assert fast(q, k, case.scheme)
        y = case.attend((q, k, v), past, new, [[tensor.clone() for tensor in each] for each in caches])
        assert_close(y, case.of_group(expected, group), new, LIMITS[torch.float16])
