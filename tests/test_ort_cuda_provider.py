"""The ONNX Runtime operators for the CUDA execution provider, as far as a machine without a GPU can tell."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import onnxruntime as ort
import pytest

from hqmq_trt import contract, ort_library
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import FORMAT_VERSION, cache_tensors
from hqmq_trt.library_files import library_path
from hqmq_trt.scheme import Scheme
from tests.attention_cases import Attention
from tests.ort_stub import API_VERSION, StubRuntime
from tests.test_ort_ops import attention_model

NAMES = (contract.QUANTIZE, contract.DEQUANTIZE, contract.ATTENTION)
CUDA_LIBRARY = "libhqmq_cuda.so"
VERSION = ort_library.library_version()


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """A copy of the operator library with no CUDA library beside it; loads apart from the one in use."""
    return Path(shutil.copy(library_path(ort_library.ORT_LIBRARY), tmp_path))


def quantize_node(scheme: str = "hq4") -> tuple[str, int, int, dict[str, contract.Attribute]]:
    """Name, counts of inputs and outputs, and attributes of an HqmqQuantize node."""
    parsed = Scheme.parse(scheme)
    cache = len(cache_tensors(parsed.key, parsed.page_size, 64, 2, 1, 1))
    role = contract.role_attributes(parsed.key, 64, parsed.page_size)
    return contract.QUANTIZE, 5 + cache, cache, {**role, **contract.common_attributes(parsed.page_size)}


def problem(library: Path) -> str:
    loaded = ctypes.CDLL(str(library))
    loaded.hqmq_ort_cuda_problem.restype = ctypes.c_char_p
    said = loaded.hqmq_ort_cuda_problem()
    return str(said.decode()) if said else ""


def build_stub(folder: Path, **changed: str) -> None:
    """A libhqmq_cuda.so that has every function and tells the versions and sizes given; its operators fail."""
    names = ("append_workspace", "append", "load", "attention_workspace", "attention", "copy", "to_float")
    values = {"format_version": str(FORMAT_VERSION), "version": f'"{VERSION}"', "role_params_size": "40"}
    values |= {"role_cache_size": "48", "last_error": '"stub"', **changed}
    kinds = {"format_version": "int", "version": "const char*", "last_error": "const char*"}
    source = [f"{kinds.get(n, 'unsigned long')} hqmq_cuda_{n}(void) {{ return {v}; }}" for n, v in values.items()]
    source += [f"int hqmq_cuda_{name}(void) {{ return 1; }}" for name in names]
    (folder / "stub.c").write_text("\n".join(source))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", folder / CUDA_LIBRARY, folder / "stub.c"], check=True)


needs_compiler = pytest.mark.skipif(not shutil.which("cc"), reason="no C compiler")


def test_each_operator_is_registered_for_both_providers(library: Path) -> None:
    runtime = StubRuntime(library)
    assert runtime.register() == ""
    found = [(op.text("GetName"), op.text("GetExecutionProviderType")) for op in runtime.ops]
    assert sorted(found) == sorted(
        (name, provider) for name in NAMES for provider in (ort_library.CPU, ort_library.CUDA)
    )


def test_an_old_runtime_is_told(library: Path) -> None:
    runtime = StubRuntime(library, "1.17.3")
    assert runtime.register(API_VERSION - 1) == "libhqmq_ort needs ONNX Runtime 1.18 or newer, this is 1.17.3"
    assert not runtime.ops


def test_kernels_for_cuda_need_the_library_and_those_for_the_cpu_do_not(library: Path) -> None:
    runtime = StubRuntime(library)
    runtime.register()
    name, _, cache, attributes = quantize_node("fp16")
    assert runtime.make_kernel(name, ort_library.CPU, 3 + cache, cache, attributes) == ""
    said = runtime.make_kernel(name, ort_library.CUDA, 3 + cache, cache, attributes)
    assert said.startswith("HqmqQuantize node 'layer0': CUDAExecutionProvider needs libhqmq_cuda.so: ")
    assert str(library.parent / CUDA_LIBRARY) in said
    assert "CMake preset cuda-release" in said


def test_a_node_that_does_not_fit_is_refused_for_cuda_too(library: Path) -> None:
    runtime = StubRuntime(library)
    runtime.register()
    name, inputs, outputs, attributes = quantize_node()
    said = runtime.make_kernel(name, ort_library.CUDA, inputs + 1, outputs, attributes)
    assert f"has {inputs + 1} inputs" in said
    said = runtime.make_kernel(name, ort_library.CUDA, inputs, outputs, attributes | {"format_version": 99})
    assert "made for cache format version 99" in said


def test_a_file_that_is_no_cuda_library_is_refused(library: Path) -> None:
    assert "No such file" in problem(library)
    (library.parent / CUDA_LIBRARY).write_bytes(b"not a library")
    assert "CUDAExecutionProvider needs libhqmq_cuda.so" in problem(library)
    shutil.copy(library_path("libhqmq_host.so"), library.parent / CUDA_LIBRARY)
    assert "it has no function hqmq_cuda_format_version" in problem(library)


@needs_compiler
@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"format_version": "99"}, f"made for cache format version 99, not {FORMAT_VERSION}"),
        ({"version": '"0.0.9"'}, f"its version is 0.0.9, not {VERSION}"),
        ({"role_params_size": "36"}, "its structs have other sizes"),
    ],
)
def test_a_cuda_library_of_another_version_is_refused(library: Path, changed: dict[str, str], text: str) -> None:
    build_stub(library.parent, **changed)
    said = problem(library)
    assert text in said
    assert str(library.parent / CUDA_LIBRARY) in said


@needs_compiler
def test_a_fitting_cuda_library_is_taken(library: Path) -> None:
    assert problem(library)
    build_stub(library.parent)
    assert problem(library) == ""  # tried again after the failure


@pytest.mark.skipif(ort_library.CUDA in ort.get_available_providers(), reason="this is onnxruntime-gpu")
def test_an_onnxruntime_without_cuda_is_named() -> None:
    model = attention_model(Attention("hq4", 64, 2, 1, (0,)), 1, (1,)).model.SerializeToString()
    for providers in (ort_library.providers("cuda"), [ort_library.CUDA], [ort_library.TENSORRT]):
        with pytest.raises(HqmqError, match=r"has no \w+ExecutionProvider; install onnxruntime-gpu"):
            ort_library.session(model, providers)
    with pytest.raises(HqmqError, match="has no CUDAExecutionProvider"):
        ort_library.check_cuda()


def test_provider_names() -> None:
    assert ort_library.providers("cpu") == [ort_library.CPU]
    cuda, cpu = ort_library.providers("cuda")
    assert (cuda[0], cpu) == (ort_library.CUDA, ort_library.CPU)
    with pytest.raises(HqmqError, match="provider 'tpu' is none of: cpu, cuda"):
        ort_library.providers("tpu")
