"""HqmqAttention on the GPU in small calls beside the host library: few enough kernels, and none of torch's that
compute, for compute-sanitizer to see all of a call. Every call has sequences of several lengths, one of them idle."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_paths import attention_path
from hqmq_trt import cuda, native_attention
from tests.attention_cases import Attention, assert_same_caches, bits, relative_error
from tests.codec_cases import lengths
from tests.gpu.graphs import captured
from tests.gpu.requirements import KERNEL_TESTS

pytestmark = KERNEL_TESTS
PAST, CAPACITY = (0, 63, 64, 190, 2, 700), 896
CASES = [
    # A step: all lengths at once; pages that fill; several new tokens; more query rows than a block of them.
    ("hq3", 128, 4, (1, 1, 1, 1, 0, 1)),
    ("hq4", 128, 7, (5, 1, 5, 4, 0, 3)),
    ("hq3.5", 64, 3, (2, 2, 1, 2, 0, 2)),
    ("hq5", 256, 2, (8, 8, 8, 1, 0, 8)),
    ("k=hq4,v=hq3", 128, 1, (1, 1, 1, 1, 0, 1)),
    # A prefill: of part of a page, of several.
    ("hq3", 128, 4, (40, 3, 65, 66, 0, 17)),
    ("hq4", 64, 2, (130, 129, 64, 2, 0, 128)),
    ("fp16", 128, 2, (1, 1, 1, 1, 0, 1)),
    # Sink tokens that are partly new, in queries of later pages; of one role only; none.
    ("hq4", 128, 4, (130, 2, 1, 65, 70, 0)),
    ("k=hq4,v=paper:s24_r3", 128, 1, (1, 1, 1, 1, 0, 1)),
    ("k=paper:s24_r3,v=hq4", 64, 3, (130, 2, 1, 65, 70, 0)),
    ("hq:s170_r4-sinks", 128, 2, (1, 1, 1, 1, 0, 1)),
]
LIMIT = 2e-3


def _gpu(tensors: list[Tensor]) -> list[Tensor]:
    return [tensor.cuda() for tensor in tensors]


def _words(caches: list[list[Tensor]]) -> int:
    return sum(tensor.numel() for role in caches for tensor in role)


@pytest.mark.parametrize(("scheme", "head_dim", "group", "new"), CASES, ids=lambda x: str(x).replace(" ", ""))
def test_a_small_call_follows_the_host(
    scheme: str, head_dim: int, group: int, new: tuple[int, ...], record_property: Callable[[str, object], None]
) -> None:
    case = Attention(scheme, head_dim, 2, group, past=PAST, capacity=CAPACITY, dtype=torch.float16)
    q, k, v = case.inputs(max(new))
    caches, books = [_gpu(role) for role in case.clone()], [_gpu(role) for role in case.books]
    record_property("path", attention_path(q, k, CAPACITY // case.scheme.page_size, case.scheme)[0])
    past, count = lengths(*PAST), lengths(*new)
    on_gpu = (q.cuda(), k.cuda(), v.cuda(), past.cuda(), count.cuda())
    y = cuda.attend(*on_gpu, None, case.scheme, books, caches, head_dim**-0.5).cpu()
    present = case.clone()
    wide = (q.float(), k.float(), v.float(), past, count)
    expected = native_attention.attend(*wide, None, case.scheme, case.books, present, head_dim**-0.5)
    for b, rows in enumerate(new):
        assert not y[b, :, rows:].any(), "rows past new_length must be zero"
        assert not rows or relative_error(y[b, :, :rows], expected[b, :, :rows]) < LIMIT
    found = [[tensor.cpu() for tensor in role] for role in caches]
    record_property("words", _words(found))
    assert_same_caches(found, present)


def test_a_graph_of_a_small_call_serves_other_lengths() -> None:
    case = Attention("hq3", 128, 2, 4, past=PAST, capacity=CAPACITY, dtype=torch.float16)
    q, k, v = _gpu(list(case.inputs(1)))
    books = [_gpu(role) for role in case.books]
    past, new = lengths(*PAST).cuda(), lengths(*[1] * len(PAST)).cuda()
    caches = [_gpu(role) for role in case.clone()]

    def attend(held: Tensor, tensors: list[list[Tensor]]) -> Tensor:
        return cuda.attend(q, k, v, held, new, None, case.scheme, books, tensors, 128**-0.5)

    graph, y = captured(lambda: attend(past, caches))
    other = lengths(*(length // 2 for length in PAST))
    expected = attend(other.cuda(), [_gpu(role) for role in case.clone()]).cpu()
    for role, source in zip(caches, case.clone(), strict=True):
        for tensor, values in zip(role, source, strict=True):
            tensor.copy_(values)
    past.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(bits(y.cpu()), bits(expected))


@pytest.mark.parametrize("scheme", ["hq3", "paper:s96_r4+med3"])
def test_kernels_that_start_early_see_what_those_before_wrote(scheme: str) -> None:
    """Encoding kernels let the next one start and wait for the one before: tokens appended one by one, until pages
    fill, and attended to at once give the bytes and bits of calls that are waited for."""
    case = Attention(scheme, 128, 2, 4, past=(0, 30, 61), capacity=256, dtype=torch.float16)
    steps = 140
    q, *rows = _gpu(list(case.inputs(steps + 1)))
    roles, books = [case.scheme.key, case.scheme.value], [_gpu(role) for role in case.books]
    tokens = [[x[:, :, t : t + 1].contiguous() for t in range(steps + 1)] for x in rows]
    past = [(lengths(*case.past) + t).cuda() for t in range(steps + 1)]
    one, query = lengths(1, 1, 1).cuda(), q[:, :, -1:].contiguous()

    def run(wait: bool) -> tuple[Tensor, list[list[Tensor]]]:
        caches = [_gpu(role) for role in case.clone()]
        torch.cuda.synchronize()
        for t in range(steps):
            for role, book, cache, x in zip(roles, books, caches, tokens, strict=True):
                cuda.append(x[t], past[t], one, role, book, cache)
                if wait:
                    torch.cuda.synchronize()
        new = (query, tokens[0][steps], tokens[1][steps], past[steps], one)
        y = cuda.attend(*new, None, case.scheme, books, caches, 128**-0.5)
        torch.cuda.synchronize()
        return y, caches

    expected, written = run(wait=True)
    for _ in range(3):
        y, caches = run(wait=False)
        assert torch.equal(bits(y), bits(expected))
        assert_same_caches([[x.cpu() for x in role] for role in caches], [[x.cpu() for x in role] for role in written])
