"""The bytes a GPU writes are those of the host: the same headers, compiled by nvcc."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from ctypes import byref, c_int, c_void_p
from pathlib import Path

import pytest
import torch

from hqmq_trt import codebooks, native
from hqmq_trt.format import cache_tensors
from hqmq_trt.scheme import Scheme

ROOT = Path(__file__).parents[2]
SCHEMES = ["hq3", "hq3.5", "hq4", "hq5", "hq:s10_r2", "paper:s96_r4+med3", "paper:s24_r3", "paper:s8_r8"]

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU"),
    pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc to compile the codec headers"),
]


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    path = tmp_path_factory.mktemp("gpu") / "libencode_pages.so"
    major, minor = torch.cuda.get_device_capability()
    command = ["nvcc", "-O2", "-std=c++17", f"-arch=sm_{major}{minor}", "-shared", "-Xcompiler", "-fPIC"]
    subprocess.run(
        [*command, "-I", str(ROOT / "plugins"), "-o", path, str(ROOT / "tests/gpu/encode_pages.cu")], check=True
    )
    return ctypes.CDLL(str(path))


@pytest.mark.parametrize("name", SCHEMES)
@pytest.mark.parametrize("role_name", ["key", "value"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_gpu_writes_the_bytes_of_the_host(library: ctypes.CDLL, name: str, role_name: str, head_dim: int) -> None:
    scheme = Scheme.parse(name)
    role, page, heads, pages = scheme.role(role_name), scheme.page_size, 4, 32
    torch.manual_seed(0)
    x = torch.randn(1, heads, pages * page, head_dim).half() * torch.rand(head_dim).mul(8)
    x = (x + torch.randn(1, heads, 1, head_dim)).half()
    codebook = [
        torch.from_numpy(codebooks.secondaries(role, 0, 0, heads, role_name)),
        torch.from_numpy(codebooks.levels(role)),
    ]
    specs = cache_tensors(role, page, head_dim, heads, 1, pages)
    host = [torch.zeros(spec.shape, dtype=getattr(torch, spec.dtype)) for spec in specs]
    lengths = torch.tensor([0], dtype=torch.int32), torch.tensor([pages * page], dtype=torch.int32)
    native.append(x, *lengths, role, codebook, host)

    device = [torch.zeros_like(tensor, device="cuda") for tensor in host]
    cache = native.RoleCache()
    for spec, tensor in zip(specs, device, strict=True):
        setattr(cache, spec.name, tensor.data_ptr())
    inputs = [tensor.cuda() for tensor in (x, *codebook)]
    scratch = [torch.empty(x.numel(), device="cuda"), torch.empty(x.numel() // 4, device="cuda")]
    decoded = torch.empty(x.numel(), device="cuda")
    pointers = [c_void_p(tensor.data_ptr()) for tensor in (*inputs, *scratch)]
    params = native.role_params(role, head_dim, page)
    code = library.hqmq_test_encode_pages(
        byref(params), c_int(heads), c_int(pages), *pointers, byref(cache), c_void_p(decoded.data_ptr())
    )
    assert code == 0, f"CUDA error {code}"
    for spec, ours, theirs in zip(specs[:-1], host[:-1], device[:-1], strict=True):
        different = int((ours != theirs.cpu()).sum())
        assert different == 0, f"{spec.name}: {different} of {ours.numel()} values differ"
