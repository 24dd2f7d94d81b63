"""The CUDA library against the host library (bytes) and the oracle (attention)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.gpu_paths import plain_attention
from hqmq_trt import cuda, native, native_attention, oracle, torch_ops
from hqmq_trt.errors import HqmqError
from hqmq_trt.scheme import ROLES, Scheme
from tests.attention_cases import Attention, assert_same_caches, bits, relative_error, with_sinks
from tests.codec_cases import activations, codebook, lengths
from tests.gpu.graphs import captured
from tests.gpu.requirements import KERNEL_TESTS

pytestmark = KERNEL_TESTS

LENGTHS = (1, 63, 64, 65, 200, 4097)
CODECS = [
    *[(name, head_dim) for name in ("hq3", "hq3.5", "hq4", "hq5") for head_dim in (64, 128, 256)],
    *[(name, head_dim) for name in ("fp16", "paper:s96_r4+med3") for head_dim in (64, 80, 128, 256)],
    *[("hq4@p256", 128), ("hq4@p16", 64), ("paper:s24_r3+med3@p8", 20), ("paper:s8_r2+med3@p256", 96)],
    *[("paper:s1_r1", 100), ("paper:s1024_r8@p1024", 128)],
]
# With sink tokens of K and of V.
SINKS = [
    *[("hq4", 128, (4, 4)), ("hq3", 64, (4, 4)), ("hq5@p16", 256, (8, 8)), ("hq4@p128", 64, (1, 1))],
    *[("hq4", 128, (4, 0)), ("hq3@p8", 64, (0, 8)), ("k=fp16,v=hq3@p32", 64, (0, 4))],
    *[("paper:s96_r4+med3", 128, (2, 5)), ("paper:s24_r3+med3@p8", 20, (8, 3))],
]
LIMITS = {torch.float32: 1e-4, torch.float16: 2e-3, torch.bfloat16: 1e-2}
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)


def gpu(tensor: Tensor) -> Tensor:
    """A copy on the GPU."""
    return tensor.cuda()


def on_gpu(tensors: list[list[Tensor]]) -> list[list[Tensor]]:
    """Copies of both roles' tensors."""
    return [[gpu(tensor) for tensor in role] for role in tensors]


def on_cpu(tensors: list[list[Tensor]]) -> list[list[Tensor]]:
    """Both roles' tensors on the host."""
    return [[tensor.cpu() for tensor in role] for role in tensors]


@pytest.fixture(autouse=True)
def _clean_status() -> Iterator[None]:
    cuda.clear_status(gpu(torch.zeros(1)).device)
    yield
    torch.cuda.synchronize()


def status() -> cuda.Status:
    """What the kernels counted in this test."""
    return cuda.status(gpu(torch.zeros(1)).device)


def attend(
    case: Attention, inputs: Iterable[Tensor], past: Tensor, new: Tensor, caches: list[list[Tensor]],
    sinks: Tensor | None = None, window: int = 0, softcap: float = 0.0,
) -> Tensor:  # fmt: skip
    """cuda.attend of CPU inputs (q, k, v) on GPU caches, which it changes; y on the GPU."""
    q, k, v = inputs
    return cuda.attend(
        gpu(q), gpu(k), gpu(v), gpu(past), gpu(new), None if sinks is None else gpu(sinks), case.scheme,
        on_gpu(case.books), caches, case.head_dim**-0.5, window, softcap,
    )  # fmt: skip


@DTYPES
@pytest.mark.parametrize("role_name", ROLES)
@pytest.mark.parametrize(("name", "head_dim"), CODECS)
def test_bytes_and_values_are_those_of_the_host(name: str, head_dim: int, role_name: str, dtype: torch.dtype) -> None:
    scheme, heads, batch = Scheme.parse(name), 2, len(LENGTHS)
    role = scheme.role(role_name)
    x = activations(batch, heads, max(LENGTHS), head_dim).clamp(-6e4, 6e4).to(dtype)
    book = codebook(role, heads, role_name)
    pages = -(-max(LENGTHS) // scheme.page_size)
    host = list(oracle.empty_cache(role, scheme.page_size, head_dim, heads, batch, pages).values())
    device = [gpu(tensor) for tensor in host]
    past, new = lengths(*[0] * batch), lengths(*LENGTHS)
    dropped = native.append(x, past, new, role, book, host)
    on_device = [gpu(tensor) for tensor in book]
    cuda.append(gpu(x), gpu(past), gpu(new), role, on_device, device)
    different = [int((bits(a) != bits(b.cpu())).sum()) for a, b in zip(host, device, strict=True)]
    assert sum(different) == 0, f"differing words by tensor: {different} of {[a.numel() for a in host]}"
    assert status() == (0, 0, dropped)
    dense = cuda.load(gpu(new), role, on_device, device, dtype).cpu()
    assert torch.equal(bits(dense), bits(native_attention.load(new, role, book, host, dtype)))


@pytest.mark.parametrize(
    ("name", "head_dim"),
    [("hq3", 128), ("hq4", 64), ("hq5@p16", 64), ("paper:s96_r4+med3", 80), ("fp16", 128), ("k=fp16,v=hq3@p32", 64)],
)
def test_splits_of_a_prefill_write_the_same_bytes(name: str, head_dim: int) -> None:
    case = Attention(name, head_dim, 2, 3, past=(0, 0), capacity=512)
    tokens = (333, 150)
    q, k, v = case.inputs(max(tokens))
    whole = on_gpu(case.clone())
    y = attend(case, (q, k, v), lengths(0, 0), lengths(*tokens), whole)
    parts, start, rows = on_gpu(case.clone()), 0, []
    for step in (1, 62, 2, 64, 1, 1, 130, 72):
        past, rest = [min(start, n) for n in tokens], [max(min(step, n - start), 0) for n in tokens]
        chunk = (x[:, :, start : start + step] for x in (q, k, v))
        rows.append(attend(case, chunk, lengths(*past), lengths(*rest), parts))
        start += step
    assert start == max(tokens)
    assert_same_caches(whole, parts)
    assert relative_error(torch.cat(rows, 2), y) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("name", "head_dim", "heads", "group"),
    [
        *[(name, head_dim, 2, 4) for name in ("hq3", "hq3.5", "hq4", "hq5") for head_dim in (64, 128, 256)],
        *[(name, head_dim, 2, 3) for name in ("paper:s96_r4+med3", "fp16") for head_dim in (64, 80, 128, 256)],
        *[("hq3", 128, 1, 1), ("hq4", 128, 1, 8), ("hq4", 64, 1, 40), ("hq4@p16", 64, 1, 8), ("hq3@p256", 64, 1, 2)],
        *[("k=hq4,v=hq3@p32", 64, 1, 4), ("k=fp16,v=paper:s24_r3+med3@p8", 20, 3, 5)],
    ],
)
def test_attention_follows_the_oracle(name: str, head_dim: int, heads: int, group: int, dtype: torch.dtype) -> None:
    past = (0, 62, 63, 64, 199, 4096)
    case = Attention(name, head_dim, heads, group, past=past, capacity=4352, dtype=dtype)
    for tokens, new in ((1, (1, 1, 1, 1, 1, 1)), (37, (37, 5, 0, 37, 1, 9))):
        q, k, v = case.inputs(tokens)
        caches = on_gpu(case.clone())
        y = attend(case, (q, k, v), lengths(*past), lengths(*new), caches).cpu()
        expected, present = case.oracle(q, k, v, lengths(*new), head_dim**-0.5)
        assert relative_error(y, expected) < LIMITS[dtype]
        for b, count in enumerate(new):
            assert not y[b, :, count:].any()
            assert not count or relative_error(y[b], expected[b]) < LIMITS[dtype]
        assert_same_caches(on_cpu(caches), present)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("group", [1, 3, 4, 8])
@pytest.mark.parametrize(("window", "softcap", "sink"), [(50, 0.0, False), (700, 0.0, True), (0, 5.0, True)])
def test_window_softcap_and_sinks(window: int, softcap: float, sink: bool, group: int, dtype: torch.dtype) -> None:
    past = (0, 63, 130, 1500)
    case = Attention("hq4", 64, 2, group, past=past, capacity=1664, dtype=dtype)
    sinks = torch.linspace(-1, 4, 2 * group) if sink else None
    for new in ((1, 1, 1, 1), (100, 0, 90, 70)):
        q, k, v = case.inputs(max(new))
        y = attend(case, (q, k, v), lengths(*past), lengths(*new), on_gpu(case.clone()), sinks, window, softcap)
        expected, _ = case.oracle(q, k, v, lengths(*new), 64**-0.5, window, softcap, sinks)
        assert relative_error(y.cpu(), expected) < LIMITS[dtype]


@DTYPES
@pytest.mark.parametrize(("name", "head_dim", "counts"), SINKS)
def test_the_first_tokens_of_full_pages_come_from_their_exact_rows(
    name: str, head_dim: int, counts: tuple[int, int], dtype: torch.dtype
) -> None:
    page = Scheme.parse(name).page_size
    held = (1, 3, 5, page - 1, page, page + 1, 3 * page + 2)
    case = Attention(name, head_dim, 2, 1, past=held, capacity=4 * page)
    with_sinks(case, counts)
    for role_name, count, book, cache in zip(ROLES, counts, case.books, case.caches, strict=True):
        role = case.scheme.role(role_name)
        on_device = [gpu(tensor) for tensor in book], [gpu(tensor) for tensor in cache]
        dense = cuda.load(gpu(lengths(*held)), role, *on_device, dtype).cpu()
        for b, length in enumerate(held):
            rows = cache[-1][b, :, page:] if length >= page else cache[-1][b, :, : min(count, length)]
            assert torch.equal(bits(dense[b, :, : rows.shape[1]]), bits(rows.to(dtype)))
        assert torch.equal(bits(dense), bits(native_attention.load(lengths(*held), role, book, cache, dtype)))


@pytest.mark.parametrize(
    ("dtype", "plain"), [(torch.float16, False), (torch.float16, True), (torch.float32, True)], ids=str
)
@pytest.mark.parametrize(("beyond", "softcap", "sink"), [(None, 0.0, False), (2, 0.0, False), (6, 5.0, True)])
@pytest.mark.parametrize(("name", "head_dim", "counts"), SINKS)
def test_attention_sees_the_first_tokens_exactly(
    name: str, head_dim: int, counts: tuple[int, int], beyond: int | None, softcap: float, sink: bool,
    dtype: torch.dtype, plain: bool,
) -> None:  # fmt: skip
    """From the tail, or the call where they are new; by single tokens, a few, and more than a page; `beyond` a page a
    window that loses them one by one."""
    page = Scheme.parse(name).page_size
    window = 0 if beyond is None else page + beyond
    past = (0, 1, 2, 3, 4, 7, page - 1, page, 2 * page + 1, 1030)
    case = Attention(name, head_dim, 1, 3, past=past, capacity=1280, dtype=dtype)
    with_sinks(case, counts)
    logits = torch.linspace(-1, 2, 3) if sink else None
    many = page + 9
    for new in ([1] * 10, [5, 5, 1, 4, 0, 5, 5, 3, 5, 5], [many, many, many, page, 0, many, 2, 1, many, 9]):
        q, k, v = case.inputs(max(new))
        caches = on_gpu(case.clone())
        with plain_attention(plain):
            y = attend(case, (q, k, v), lengths(*past), lengths(*new), caches, logits, window, softcap).cpu()
        expected, present = case.oracle(q, k, v, lengths(*new), head_dim**-0.5, window, softcap, logits)
        for b, count in enumerate(new):
            assert not y[b, :, count:].any()
            assert not count or relative_error(y[b, :, :count], expected[b, :, :count]) < LIMITS[dtype]
        assert_same_caches(on_cpu(caches), present)


@pytest.mark.parametrize("split", [1, 40])
def test_a_first_token_with_nan_is_counted_once(split: int) -> None:
    """It is written twice, by its own call (the first token) or with others; whoever sees it gets NaN."""
    case = Attention("hq4", 64, 2, 2, past=(0,), capacity=256)
    q, k, v = case.inputs(150)
    v[0, 1, 0, 3] = torch.nan
    caches, rows = on_gpu(case.clone()), []
    for past, new in ((0, split), (split, 150 - split)):
        chunk = (x[:, :, past : past + new] for x in (q, k, v))
        rows.append(attend(case, chunk, lengths(past), lengths(new), caches).cpu())
    y = torch.cat(rows, 2)
    assert status() == (1, 0, 0)
    assert y[:, :2].isfinite().all()
    assert y[:, 2:, :, 3].isnan().all()
    tail = caches[1][-1]
    assert tail[0, 1, 64, 3].isnan()
    assert tail[0, 1, 64:].isnan().sum() == 1


@pytest.mark.parametrize("name", ["hq3", "hq4", "paper:s96_r4+med3", "fp16"])
def test_a_sequence_does_not_depend_on_its_batch_and_runs_repeat(name: str) -> None:
    """The others make the batch so large that its rows are cut and run in another way."""
    others, count = (0, 1700, 64), 3
    case = Attention(name, 64, 2, 4, past=(1200, *others), capacity=6144)
    q, k, v = case.inputs(4096)
    past, new = lengths(1200, *others), lengths(count, 4096, 0, 700)
    runs = []
    for _ in range(2):
        caches = on_gpu(case.clone())
        runs.append((attend(case, (q, k, v), past, new, caches).cpu(), on_cpu(caches)))
    assert torch.equal(bits(runs[0][0]), bits(runs[1][0]))
    assert_same_caches(runs[0][1], runs[1][1])
    alone = [[tensor[:1].contiguous() for tensor in role] for role in on_gpu(case.clone())]
    rows = (x[:1, :, :count] for x in (q, k, v))
    y = attend(case, rows, past[:1], new[:1], alone)
    assert torch.equal(bits(y.cpu()), bits(runs[0][0][:1, :, :count]))
    assert_same_caches(on_cpu(alone), [[tensor[:1] for tensor in role] for role in runs[0][1]])


@pytest.mark.parametrize("name", ["hq3", "hq4@p16", "paper:s96_r4+med3", "fp16"])
def test_a_captured_graph_serves_changing_lengths(name: str) -> None:
    case = Attention(name, 128, 2, 4, past=(60, 0, 190), capacity=1024, dtype=torch.float16)
    steps = 70
    inputs = case.inputs(steps)
    eager, replayed = on_gpu(case.clone()), on_gpu(case.clone())
    q, k, v = (gpu(x[:, :, :1]) for x in inputs)
    past, new = gpu(lengths(*case.past)), gpu(lengths(0, 0, 0))
    cache, books = [*replayed[0], *replayed[1]], [book for role in on_gpu(case.books) for book in role]

    def step() -> Tensor:
        y: Tensor = torch.ops.hqmq.attention_(q, k, v, past, new, None, books, cache, name, 128**-0.5)
        return y

    graph, y = captured(step)
    for i in range(steps):
        row = tuple(x[:, :, i : i + 1].contiguous() for x in inputs)
        counts = lengths(1, 1, i % 2)
        for target, source in zip((q, k, v, new), (*row, counts), strict=True):
            target.copy_(source)
        expected = attend(case, row, past.cpu(), counts, eager)
        graph.replay()
        assert torch.equal(bits(y), bits(expected))
        past += new
    assert_same_caches(on_cpu(eager), on_cpu(replayed))
    assert status() == (0, 0, status().dropped)


@pytest.mark.parametrize("name", ["hq4", "paper:s96_r4+med3", "fp16"])
def test_nan_poisons_its_page_and_what_reads_it(name: str) -> None:
    case = Attention(name, 64, 2, 2, past=(10,), capacity=256)
    q, k, v = case.inputs(150)
    new, bad = lengths(150), 70
    clean = attend(case, (q, k, v), lengths(10), new, on_gpu(case.clone())).cpu()
    assert clean.isfinite().all()
    assert status()[:2] == (0, 0)
    v = v.clone()
    v[0, 1, bad - 10, 3], v[0, 1, bad - 9, 3] = torch.nan, 1e6  # positions 70 and 71, KV head 1
    caches = on_gpu(case.clone())
    y = attend(case, (q, k, v), lengths(10), new, caches).cpu()
    before, after = slice(0, bad - 10), slice(bad - 10, None)
    assert torch.equal(y[:, :2], clean[:, :2])
    assert torch.equal(y[:, 2:, before], clean[:, 2:, before])
    assert y[:, 2:, after, 3].isnan().all()
    assert status()[:2] == (2, 0)
    _, present = case.oracle(q, k, v, new, 64**-0.5)
    for ours, theirs in zip(on_cpu(caches), present, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            if a.dtype == torch.float16:
                assert torch.equal(a.isnan(), b.isnan())
            a, b = (x.float().nan_to_num(0, 1e9, -1e9) if x.dtype == torch.float16 else x for x in (a, b))
            assert name == "fp16" or torch.equal(a, b)


def test_tokens_without_a_page_are_counted_and_not_cached() -> None:
    case = Attention("hq3", 64, 2, 2, past=(100, 3), capacity=128)
    q, k, v = case.inputs(40)
    caches, fitting = on_gpu(case.clone()), on_gpu(case.clone())
    y = attend(case, (q, k, v), lengths(100, 3), lengths(40, 40), caches).cpu()
    assert status() == (0, 12, 0)
    expected = attend(case, (q, k, v), lengths(100, 3), lengths(28, 40), fitting).cpu()
    assert y[0, :, 28:].isnan().all()
    assert torch.equal(y[0, :, :28], expected[0, :, :28])
    assert torch.equal(y[1], expected[1])
    assert_same_caches(caches, fitting)


def test_strides_and_wrong_tensors() -> None:
    case = Attention("hq3", 64, 2, 2, past=(100,), capacity=256)
    q, k, v = case.inputs(30)
    expected = attend(case, (q, k, v), lengths(100), lengths(30), on_gpu(case.clone()))
    strided = [gpu(x.transpose(1, 2).contiguous()).transpose(1, 2) for x in (q, k, v)]

    def run(past: Tensor, window: int = 0) -> Tensor:
        q, k, v = strided
        rest = (None, case.scheme, on_gpu(case.books), on_gpu(case.clone()), 64**-0.5, window)
        return cuda.attend(q, k, v, past, gpu(lengths(30)), *rest)

    assert torch.equal(run(gpu(lengths(100))), expected)
    with pytest.raises(HqmqError, match=r"past_length is torch\.int64"):
        run(gpu(lengths(100)).long())
    with pytest.raises(HqmqError, match="window is negative"):
        run(gpu(lengths(100)), window=-1)
    wide = Attention("fp16", 288, 1, 1, past=(0,), capacity=64)
    with pytest.raises(HqmqError, match="up to 256, not 288"):
        attend(wide, wide.inputs(1), lengths(0), lengths(1), on_gpu(wide.clone()))


def test_operators_use_the_library_or_say_how_to_build_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    case = Attention("hq4", 64, 2, 2, past=(100,), capacity=256)
    q, k, v = (gpu(x) for x in case.inputs(30))
    books = [book for role in on_gpu(case.books) for book in role]

    def run() -> Tensor:
        cache = [tensor for role in on_gpu(case.clone()) for tensor in role]
        lens = gpu(lengths(100)), gpu(lengths(30))
        y: Tensor = torch.ops.hqmq.attention_(q, k, v, *lens, None, books, cache, "hq4", 64**-0.5)
        return y

    expected = attend(case, (q, k, v), lengths(100), lengths(30), on_gpu(case.clone()))
    assert torch.equal(run(), expected)
    v[0, 0, 3, 3] = torch.inf
    with pytest.raises(HqmqError, match="value of sequence 0, token 103"):
        run()
    v[0, 0, 3, 3] = 0
    monkeypatch.setenv("HQMQ_LIBRARY_DIR", str(tmp_path))
    cuda.library.cache_clear()
    with pytest.raises(HqmqError, match="cmake --preset cuda-release"):
        run()
    monkeypatch.setenv(torch_ops.TORCH_CUDA_VARIABLE, "1")
    assert run().isfinite().all()
    cuda.library.cache_clear()
