"""The Triton baseline of benchmarks/gpu_attention.py, by Triton's interpreter on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton")

CASE = """
import torch
from benchmarks import triton_int4 as rival

g = torch.Generator().manual_seed(1)
CASES = (2, 4, 64, 150, 32, 4), (1, 3, 128, 64, 64, 1), (1, 16, 64, 33, 32, 2)
for heads, group, head_dim, context, block, splits in CASES:
    q = torch.randn(2, heads * group, head_dim, generator=g).half()
    k, v = (torch.randn(2, heads, context, head_dim, generator=g) * 3 for _ in range(2))
    case = rival.Int4(q, k, v)
    assert case.nbytes == 2 * 2 * heads * context * (head_dim // 2 + 2)
    y = case.launch(block, splits).float()
    keys, values = (rival.dequantise(*case.codes[i : i + 2]) for i in (0, 2))
    for x, kept in ((k, keys), (v, values)):
        loss = float((x - kept).square().mean() / x.square().mean())
        assert 0.008 < loss < 0.0105, loss  # 0.0095 for Gaussian variables
    rows = q.reshape(2, heads, group, head_dim).float()
    weights = (rows @ keys.transpose(-1, -2) * head_dim**-0.5).softmax(-1)
    expected = (weights @ values).reshape(y.shape)
    error = float((y - expected).norm() / expected.norm())
    assert error < 2e-3, error
print("same")
"""


def test_it_attends_to_its_codes() -> None:
    """In a process of its own: Triton reads TRITON_INTERPRET when it is imported."""
    env = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", CASE], env=env, capture_output=True, text=True, check=False)
    assert done.stdout.endswith("same\n"), done.stderr[-3000:]


COMPILE = """
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from benchmarks import triton_int4 as rival

target = GPUTarget("cuda", 90, 32)
types = ["*fp16", "*u8", "*fp16", "*u8", "*fp16", "*fp32", "*fp32", "i32", "i32", "fp32", *["constexpr"] * 4]
signature = dict(zip(rival.attend_kernel.arg_names, types, strict=True))
values = {"D": 128, "ROWS": rival.ROWS, "BLOCK": 64, "SPLITS": 16}
aligned = {(i,): [["tt.divisibility", 16]] for i in range(9)}
made = compile(ASTSource(rival.attend_kernel, signature, values, aligned), target, {"num_warps": 4, "num_stages": 3})
assert made.asm["ptx"].count("mma.sync") >= 16 and made.metadata.shared < 100_000
types = ["*fp32", "*fp32", "*fp16", *["constexpr"] * 3]
signature = dict(zip(rival.join_kernel.arg_names, types, strict=True))
compile(ASTSource(rival.join_kernel, signature, {"SPLITS": 16, "D": 128, "ROWS": rival.ROWS}), target)
print("same")
"""


def test_it_compiles_for_a_gpu() -> None:
    """Triton's own compiler knows more rules than its interpreter."""
    done = subprocess.run([sys.executable, "-c", COMPILE], capture_output=True, text=True, check=False)
    assert done.stdout.endswith("same\n"), done.stderr[-3000:]


def test_configurations_cover_the_context() -> None:
    import torch

    from benchmarks.triton_int4 import MOST_SPLITS, Int4

    zeros = torch.zeros(8, 2, 3000, 64)
    case = Int4(torch.zeros(8, 8, 64).half(), zeros, zeros)
    found = case.configurations(132)
    assert len({tuple(one.items()) for one in found}) == len(found) > 5
    assert all(1 <= one["splits"] <= min(MOST_SPLITS, -(-3000 // one["block"])) for one in found)
    assert case.fastest(lambda step: 1.0, 132) == found[0]
    with pytest.raises(ValueError, match="groups of 32"):
        Int4(torch.zeros(8, 64, 64).half(), zeros, zeros)
