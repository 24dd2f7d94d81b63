"""The fused decode kernel on GPUs that give a block less shared memory, by taking memory away from this one.

Tables with fewer copies of the words, fewer stages and states in the workspace: the bits of y are the same.
"""

from __future__ import annotations

import pytest
import torch

from benchmarks.gpu_paths import DECODE, SHARED_MEMORY, attention_path, decode_plan, shared_memory
from hqmq_trt import cuda
from hqmq_trt.scheme import Scheme
from tests.attention_cases import assert_same_caches, bits
from tests.gpu import test_page_table as pages
from tests.gpu.decode_layer import CAPACITY, GROUPS, HEADS, MED3, TEN_BIT, Layer, held, layer
from tests.gpu.requirements import KERNEL_TESTS
from tests.gpu.test_decode_kernel import CASES

DEVICE = "cuda"
LESS = ("163 KB", "99 KB")
CALLS = ((1, 4, torch.float16), (1, 8, torch.bfloat16), (5, 1, torch.float16), (8, 3, torch.float16))
"""New tokens, query heads of a KV head and dtype: instances for up to 4 and up to 8 rows, one and more row blocks."""


def compact_is_built() -> bool:
    """Whether this library has the instances for less memory on every GPU."""
    return cuda.available() and decode_plan(Scheme.parse("hq4"), 128, 4, SHARED_MEMORY["99 KB"])[0].built == 2


pytestmark = [
    *KERNEL_TESTS,
    pytest.mark.usefixtures("clean_status"),
    pytest.mark.skipif(not compact_is_built(), reason="the library was built without -DHQMQ_DECODE_COMPACT=ON"),
]


def assert_same_bits(
    case: Layer, tokens: int, group: int, dtype: torch.dtype, sink: bool = False, window: int = 0, softcap: float = 0.0
) -> None:
    """Run a call with all memory and with less; whatever fits takes the fused kernel."""
    past, new = held(tokens, case.ends)
    q, k, v = case.inputs(tokens, dtype)
    rows = case.of_group(q, group)
    sinks = torch.linspace(-1, 4, HEADS * group, device=DEVICE) if sink else None
    present = case.clone()
    expected = case.attend((rows, k, v), past, new, present, sinks, window, softcap)
    assert expected.isfinite().all()
    for label in LESS:
        plan, why = decode_plan(case.scheme, case.head_dim, group * tokens, SHARED_MEMORY[label])
        with shared_memory(SHARED_MEMORY[label]):
            path, why_not = attention_path(rows, k, CAPACITY // case.scheme.page_size, case.scheme)
            if plan.stages == 0:
                assert path != DECODE
                assert why in why_not
                continue
            assert path == DECODE, why_not
            caches = case.clone()
            y = case.attend((rows, k, v), past, new, caches, sinks, window, softcap)
        assert torch.equal(bits(y), bits(expected)), f"{label}: {plan.copies[0]}, {plan.copies[1]} copies"
        assert_same_caches(caches, present)


@pytest.mark.parametrize(("name", "head_dim"), CASES)
def test_bits_do_not_depend_on_the_memory_of_a_block(name: str, head_dim: int) -> None:
    case = layer(name, head_dim)
    for tokens, group, dtype in CALLS:
        assert_same_bits(case, tokens, group, dtype)


@pytest.mark.parametrize(
    ("name", "head_dim"), [("hq4", 128), ("hq5", 128), ("hq3.5", 256), (MED3, 128), (TEN_BIT[0], 64)]
)
def test_window_softcap_and_sinks_give_the_same_bits(name: str, head_dim: int) -> None:
    case = layer(name, head_dim)
    for tokens, group, dtype in CALLS[:3]:
        assert_same_bits(case, tokens, group, dtype, sink=True, window=700, softcap=3.0)


@pytest.mark.parametrize("name", ["hq4", "hq3.5", "hq5"])
@pytest.mark.parametrize("head_dim", [128, 256])
def test_values_that_are_not_turned_keys_give_the_same_bits(name: str, head_dim: int) -> None:
    """V's words lie in half of the copies, or in a table of their own."""
    case = Layer(name, head_dim)
    g = torch.Generator().manual_seed(3)
    own = torch.randn(case.books[1][0].shape, generator=g)
    case.books[1][0] = (own / own.norm(dim=-1, keepdim=True)).to(DEVICE)
    for tokens, group, dtype in CALLS:
        assert_same_bits(case, tokens, group, dtype)


@pytest.mark.parametrize(("name", "head_dim"), [("hq4", 256), ("hq3", 128), ("hq5@p32", 256), (MED3, 128)])
def test_page_tables_give_the_same_bits(name: str, head_dim: int) -> None:
    """At head_dim 256 the mean of K is read from the pool, too."""
    case, plain, pool = pages.layer(name, head_dim)
    inputs, new = case.inputs(1), (1,) * len(pages.PAST)
    expected = pages.attend(case, inputs, pages.PAST, new, plain)
    with shared_memory(SHARED_MEMORY["99 KB"]):
        pages.expect_path(case, 1, plain=False)
        y = pages.attend(case, inputs, pages.PAST, new, pool.caches, pool.table)
    assert torch.equal(bits(y), bits(expected))


@pytest.mark.parametrize("limit", range(48 << 10, 232448, 23 << 10))
def test_any_limit_gives_the_same_bits(limit: int) -> None:
    """Each number of copies and stages, and what takes the call where nothing fits."""
    case = layer("hq4", 64)
    past, new = held(1)
    q, k, v = case.inputs(1, torch.float16)
    rows = case.of_group(q, GROUPS[3])
    expected = case.attend((rows, k, v), past, new, case.clone())
    plan, _ = decode_plan(case.scheme, 64, GROUPS[3], limit)
    with shared_memory(limit):
        path, _ = attention_path(rows, k, CAPACITY // case.scheme.page_size, case.scheme)
        y = case.attend((rows, k, v), past, new, case.clone())
    assert (path == DECODE) == (plan.stages > 0)
    if path == DECODE:
        assert torch.equal(bits(y), bits(expected))
    else:
        assert (y.float() - expected.float()).norm() < 2e-3 * expected.float().norm()
