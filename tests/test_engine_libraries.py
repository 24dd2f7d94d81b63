"""What the engine builder asks of the NVIDIA driver and of the plugin library, with stand-ins compiled from C."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from hqmq_trt.engine import device, plugin_library
from hqmq_trt.engine.device import Gpu, current_gpu
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import FORMAT_VERSION


def compiled(folder: Path, source: str) -> Path:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler")
    (folder / "x.c").write_text(source)
    library = folder / "libhqmq_trt.so"
    subprocess.run([compiler, "-shared", "-fPIC", "-o", library, folder / "x.c"], check=True)
    return library


def test_gpu_as_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = r"""
    #include <stddef.h>
    #include <string.h>
    int cuInit(int flags) { return 0; }
    int cuDeviceGetCount(int* n) { *n = 1; return 0; }
    int cuDeviceGet(int* d, int i) { *d = i; return 0; }
    int cuDeviceGetName(char* name, int size, int d) { strncpy(name, "A GPU", size); return 0; }
    int cuDeviceGetAttribute(int* v, int a, int d) { *v = a == 75 ? 8 : a == 76 ? 6 : -1; return 0; }
    int cuDeviceTotalMem_v2(size_t* n, int d) { *n = (size_t)24 << 30; return 0; }
    int cuGetErrorString(int status, const char** text) { *text = "out of order"; return 0; }
    """
    monkeypatch.setattr(device, "DRIVER", str(compiled(tmp_path, source)))
    assert current_gpu() == Gpu("A GPU", "8.6", 24 << 30)
    with pytest.raises(HqmqError, match="no GPU 1: the driver sees 1"):
        current_gpu(1)
    (tmp_path / "b").mkdir()
    broken = compiled(
        tmp_path / "b", source.replace("cuInit(int flags) { return 0; }", "cuInit(int f) { return 999; }")
    )
    monkeypatch.setattr(device, "DRIVER", str(broken))
    with pytest.raises(HqmqError, match="out of order"):
        current_gpu()


@pytest.mark.parametrize(
    ("version", "format_version", "word"),
    [
        ("1.2.3", FORMAT_VERSION, None),
        ("1.2.3", FORMAT_VERSION + 1, "format version"),
        ("9.9", FORMAT_VERSION, "is of hqmq-trt 9.9"),
    ],
)
def test_plugin_library_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, version: str, format_version: int, word: str | None
) -> None:
    compiled(
        tmp_path,
        f"""
        int hqmq_trt_format_version(void) {{ return {format_version}; }}
        const char* hqmq_trt_version(void) {{ return "{version}"; }}
        const char* hqmq_trt_tensorrt_headers(void) {{ return "10.14.1"; }}
        """,
    )
    monkeypatch.setenv("HQMQ_LIBRARY_DIR", str(tmp_path))
    monkeypatch.setattr(plugin_library, "__version__", "1.2.3")
    if word is None:
        assert plugin_library.plugin_library_version() == f"{version} (TensorRT 10.14.1 headers)"
        return
    with pytest.raises(HqmqError, match=word):
        plugin_library.plugin_library_version()
    if "hqmq-trt" in word:  # a source tree knows no version
        monkeypatch.setattr(plugin_library, "__version__", "0+unknown")
        assert plugin_library.plugin_library_version().startswith(version)


def test_plugin_library_missing_and_foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HQMQ_LIBRARY_DIR", str(tmp_path))
    with pytest.raises(HqmqError, match=r"libhqmq_trt\.so is missing; rebuild"):
        plugin_library.find_plugin_library()
    (tmp_path / "libhqmq_trt.so").write_text("no library")
    with pytest.raises(HqmqError, match="is not a plugin library"):
        plugin_library.plugin_library_version()
