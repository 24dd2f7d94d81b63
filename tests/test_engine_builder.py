"""The engine builder without a GPU: limits, profiles, refusals, and the whole course with a stand-in for TensorRT."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import onnx
import pytest

from hqmq_trt.engine import (
    EngineManifest,
    build_engine,
    builder,
    device,
    polygraphy_network,
    timing_cache,
)
from hqmq_trt.engine.device import Gpu
from hqmq_trt.engine.network import engine_model, read_graph
from hqmq_trt.engine.polygraphy_arguments import arguments
from hqmq_trt.engine.profiles import Limits, profile_shapes
from hqmq_trt.engine.refit import refit_engine
from hqmq_trt.engine.versions import check_tensorrt
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest
from hqmq_trt.runtime import trt_engine
from tests.fake_tensorrt import CACHE, EMPTY_CACHE, PLAN, FakeTensorRT
from tests.test_manifest import write_folder

GPU = Gpu("NVIDIA H100 80GB HBM3", "9.0", 80 * 10**9)


@pytest.fixture
def export(tiny_export: Callable[..., Path], tmp_path: Path) -> Path:
    """A copy of an exported folder with function bodies in it."""
    return Path(shutil.copytree(tiny_export("hq4@p16", "qdq"), tmp_path / "model"))


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., FakeTensorRT]]:
    """Puts a stand-in for TensorRT, the GPU and the plugin library in place."""

    def install(**options: Any) -> FakeTensorRT:
        module = FakeTensorRT(**options)
        monkeypatch.setitem(sys.modules, "tensorrt", module)
        monkeypatch.setattr(builder, "current_gpu", lambda: GPU)
        monkeypatch.setattr(builder, "load_plugin_library", lambda log: Path("libhqmq_trt.so"))
        trt_engine.trt_log.cache_clear()
        return module

    yield install
    trt_engine.trt_log.cache_clear()


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def refused(word: str, model: Path, output: Path, **options: Any) -> str:
    """The message of a refused build, which must leave nothing behind."""
    before = names(output.parent)
    with pytest.raises(HqmqError, match=word) as info:
        build_engine(model, output, timing_cache=output.parent / "timing.cache", **options)
    assert "\n" not in str(info.value)
    assert names(output.parent) == before
    return str(info.value)


def test_limits(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path)
    page = manifest.page_size
    limits = Limits.of(manifest, 3, 2 * page + 1, 10**6)
    assert (limits.max_context, limits.num_pages, limits.prefill_chunk) == (3 * page, 3, 3 * page)
    for name in ("max_batch", "max_context", "prefill_chunk"):
        given = {"max_batch": 1, "max_context": 64, "prefill_chunk": 8, name: 0}
        with pytest.raises(HqmqError, match=name):
            Limits.of(manifest, **given)
    with pytest.raises(HqmqError, match=r"cache tensor .*--max-context") as info:
        Limits.of(manifest, 8, 10**9, 1)
    most = int(str(info.value).split("at most ")[1].split(" for")[0].replace(",", ""))
    assert Limits.of(manifest, 8, most, 1).max_context == most
    with pytest.raises(HqmqError, match="cache tensor"):
        Limits.of(manifest, 8, most + 1, 1)
    with pytest.raises(HqmqError, match="prefill-chunk"):
        Limits.of(manifest, 2**12, 2**13, 2**13)


def test_profiles() -> None:
    limits = Limits(max_batch=4, max_context=96, prefill_chunk=24, page_size=32)
    inputs: dict[str, tuple[int | str, ...]] = {
        "input_ids": ("batch", "sequence"),
        "logits_index": ("batch", "num_logits"),
        "past.0.key.codes": ("batch", 2, "capacity", 8),
        "past.0.key.mean": ("batch", 2, "pages", 64),
        "fixed": (1, 2),
    }
    assert profile_shapes(inputs, limits.dimensions(decode=True)) == {
        "input_ids": ([1, 1], [4, 1], [4, 1]),
        "logits_index": ([1, 1], [4, 1], [4, 1]),
        "past.0.key.codes": ([1, 2, 32, 8], [4, 2, 96, 8], [4, 2, 96, 8]),
        "past.0.key.mean": ([1, 2, 1, 64], [4, 2, 3, 64], [4, 2, 3, 64]),
    }
    prefill = profile_shapes(inputs, limits.dimensions(decode=False))
    assert prefill["input_ids"] == ([1, 1], [4, 24], [4, 24])
    assert prefill["logits_index"] == ([1, 1], [4, 1], [4, 24])
    with pytest.raises(HqmqError, match="unknown dimension 'rows'"):
        profile_shapes({"x": ("rows",)}, limits.dimensions(decode=True))


def test_build(export: Path, tmp_path: Path, fake: Callable[..., FakeTensorRT]) -> None:
    """Flags, profiles, what the parser gets, and the folder."""
    trt = fake()
    engine = build_engine(export, tmp_path / "e", max_batch=2, max_context=100, timing_cache=tmp_path / "t.cache")
    assert names(tmp_path) == {"model", "e", "t.cache"}
    assert names(tmp_path / "e") == {"engine.plan", "engine.json", "manifest.json"} | set(
        Manifest.load(export).tokenizer_files
    )
    assert engine == EngineManifest.load(tmp_path / "e", hashes=True)
    assert (engine.max_batch, engine.max_context, engine.prefill_chunk) == (2, 112, 112)
    assert (engine.tensorrt_version, engine.gpu_name) == ("10.6.0", GPU.name)
    assert engine.device_memory_bytes == [1000, 2000]
    model, manifest = Manifest.load(export), Manifest.load(tmp_path / "e", hashes=True)
    assert {**dict(manifest), "files": 0} == {**dict(model), "files": 0}
    assert (tmp_path / "e" / str(manifest.engine_file)).read_bytes() == PLAN
    assert [file.sha256 for file in engine.source_model] == [f.sha256 for f in model.files if f.purpose == "model"]
    assert trt.networks[0].flags == 1 << 1
    assert not trt.models[0].functions
    assert {node.op_type for node in trt.models[0].graph.node if node.domain} == {"HqmqQuantize", "HqmqDequantize"}
    config = trt.configs[0]
    assert config.preview == {"ALIASED_PLUGIN_IO_10_03": True}
    assert not config.flags  # TF32 off, nothing else on
    assert [profile.shapes["input_ids"][2] for profile in config.profiles] == [[2, 1], [2, 112]]
    assert all(set(profile.shapes) == set(trt.networks[0].inputs) for profile in config.profiles)
    assert (tmp_path / "t.cache").read_bytes() == CACHE


def test_options(export: Path, tmp_path: Path, fake: Callable[..., FakeTensorRT]) -> None:
    trt = fake()
    stripped = build_engine(
        export, tmp_path / "e", timing_cache=tmp_path / "t", strip_weights=True, workspace_limit=5, optimization_level=2
    )
    assert (stripped.weight_stripped, stripped.model_folder) == (True, "../model")
    assert trt.configs[0].flags == {"STRIP_PLAN", "REFIT_IDENTICAL"}
    assert (trt.configs[0].pools, trt.configs[0].builder_optimization_level) == ({"WORKSPACE": 5}, 2)
    build_engine(export, tmp_path / "e", timing_cache=tmp_path / "t", version_compatible=True, overwrite=True)
    assert trt.configs[1].flags == {"VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME"}
    lean = build_engine(export, tmp_path / "f", timing_cache=tmp_path / "t", version_compatible=True, lean_runtime=True)
    assert lean.lean_runtime
    assert trt.configs[2].flags == {"VERSION_COMPATIBLE"}
    refused("version_compatible", export, tmp_path / "g", lean_runtime=True)
    refused("optimization_level", export, tmp_path / "g", optimization_level=6)
    refused("workspace_limit", export, tmp_path / "g", workspace_limit=0)


def test_timing_cache(export: Path, tmp_path: Path, fake: Callable[..., FakeTensorRT]) -> None:
    """Reused when TensorRT takes it, replaced with a note when it does not."""
    trt = fake()
    notes: list[str] = []
    path = tmp_path / "folder" / "timing.cache"
    for content, taken in ((None, b""), (CACHE, CACHE), (b"damaged", b""), (CACHE[:-1], b""), (EMPTY_CACHE, b"")):
        if content is not None:
            path.write_bytes(content)
        notes.clear()
        build_engine(export, tmp_path / "e", timing_cache=path, overwrite=True, note=notes.append)
        assert trt.configs[-1].taken[-1] == taken
        assert len(notes) == (content in (b"damaged", CACHE[:-1]))
        assert all("replacing it" in note for note in notes)
        assert path.read_bytes() == CACHE
        assert names(path.parent) == {"timing.cache"}
    path.unlink()
    path.mkdir()  # the file cannot be read
    with pytest.raises(HqmqError, match="timing cache cannot be read"):
        build_engine(export, tmp_path / "f", timing_cache=path)
    assert not (tmp_path / "f").exists()


def test_default_timing_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    path = timing_cache.default_path("10.6.0", "NVIDIA H100 80GB/HBM3")
    assert path == tmp_path / "hqmq-trt" / "timing-10.6.0-NVIDIA_H100_80GB_HBM3.cache"


def test_failures_of_tensorrt(export: Path, tmp_path: Path, fake: Callable[..., FakeTensorRT]) -> None:
    fake(failure="parse")
    message = refused("cannot parse", export, tmp_path / "e")
    assert "node 'layers.0.attention' (HqmqAttention): Plugin not found, are" in message
    fake(failure="memory")
    message = refused("too little free memory", export, tmp_path / "e", max_batch=3)
    assert "max_batch=3" in message
    assert "out of memory" in message


def test_interrupt(export: Path, tmp_path: Path, fake: Callable[..., FakeTensorRT]) -> None:
    """Ctrl-C in a progress display ends the build, and nothing is left."""

    events: list[tuple[Any, ...]] = []

    class Impatient:
        def start(self, *arguments: Any) -> None:
            events.append(("start", *arguments))

        def step(self, *arguments: Any) -> None:
            raise KeyboardInterrupt

        def finish(self, phase: str) -> None:
            events.append(("finish", phase))

    fake()
    with pytest.raises(KeyboardInterrupt):
        build_engine(export, tmp_path / "e", timing_cache=tmp_path / "t", progress=Impatient())
    assert events[:2] == [("start", "Building", None, 2), ("start", "Timing", "Building", 1)]
    assert names(tmp_path) == {"model"}


def test_refusals_before_tensorrt(export: Path, tmp_path: Path, fake: Callable[..., FakeTensorRT]) -> None:
    fake()
    refused("no such folder", tmp_path / "absent", tmp_path / "e")
    refused("max_batch", export, tmp_path / "e", max_batch=0)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("")
    refused("not empty", export, tmp_path / "full")
    refused("not a folder that hqmq-trt wrote", export, tmp_path / "full", overwrite=True)
    refused("own folder", export, export, overwrite=True)
    build_engine(export, tmp_path / "e", timing_cache=tmp_path / "t")
    refused("is an engine already", tmp_path / "e", tmp_path / "f")
    content = json.loads((export / "manifest.json").read_text())
    (export / "manifest.json").write_text(json.dumps({**content, "plugin_version": "0"}))
    refused("plugin_version", export, tmp_path / "f")


def test_graph_of_another_manifest(export: Path, tmp_path: Path, tiny_export: Callable[..., Path]) -> None:
    other = tiny_export("fp16@p16", "fused")
    manifest = Manifest.load(other)
    shutil.copyfile(export / "model.onnx", tmp_path / manifest.model_file)
    with pytest.raises(HqmqError, match=r"inputs are not those of the manifest \(past\.0\.key"):
        read_graph(tmp_path, manifest)


@pytest.mark.parametrize("damage", ["name", "type", "shape"])
def test_graph_without_logits(export: Path, damage: str) -> None:
    model = onnx.load(export / "model.onnx", load_external_data=False)
    (logits,) = [value for value in model.graph.output if value.name == "logits"]
    if damage == "name":
        logits.name = "present_length_again"
    elif damage == "type":
        logits.type.tensor_type.elem_type = onnx.TensorProto.INT32
    else:
        del logits.type.tensor_type.shape.dim[1]
    onnx.save(model, export / "model.onnx")
    with pytest.raises(HqmqError, match=r"model\.onnx: has no output logits \[batch, num_logits, vocabulary\]; export"):
        engine_model(export / "model.onnx")


def test_refit_parses_the_graph_of_the_build(
    export: Path, tmp_path: Path, fake: Callable[..., FakeTensorRT], monkeypatch: pytest.MonkeyPatch
) -> None:
    trt = fake()
    build_engine(export, tmp_path / "e", timing_cache=tmp_path / "t", strip_weights=True)
    parsed: list[onnx.ModelProto] = []

    def parser(refitter: Any, log: Any) -> Any:
        def refit(content: bytes, path: str) -> bool:
            assert path == str((export / "model.onnx").resolve())
            parsed.append(onnx.ModelProto.FromString(content))
            return True

        return SimpleNamespace(refit_from_bytes=refit)

    trt.OnnxParserRefitter = parser
    trt.Refitter = lambda engine, log: SimpleNamespace(refit_cuda_engine=lambda: True)
    refit_engine(None, tmp_path / "e", EngineManifest.load(tmp_path / "e"))
    assert parsed == trt.models
    assert {"logits", "logits_sum"} < {value.name for value in parsed[0].graph.output}


@pytest.mark.parametrize(
    ("version", "word"),
    [("10.5.0", "too old"), ("8.6.1", "too old"), ("12.0.0", "major version"), ("x", "calls itself")],
)
def test_tensorrt_versions(fake: Callable[..., FakeTensorRT], version: str, word: str) -> None:
    fake(version=version)
    with pytest.raises(HqmqError, match=word):
        check_tensorrt()


def test_tensorrt_is_missing(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", None)
    assert "hqmq-trt[tensorrt]" in refused("TensorRT is not installed", export, tmp_path / "e")


def test_no_gpu(export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Asked before TensorRT's builder, which would end the process."""
    monkeypatch.setitem(sys.modules, "tensorrt", FakeTensorRT())
    monkeypatch.setattr(device, "DRIVER", "libcuda-that-is-not-there.so.1")
    refused("no GPU", export, tmp_path / "e")


def test_polygraphy_takes_the_arguments(export: Path) -> None:
    """polygraphy's own parser reads the shapes we print."""
    from polygraphy.tools.args.util import parse_meta

    printed = arguments(export, max_batch=2, max_context=40, prefill_chunk=8)
    assert [word for word in printed if word.startswith("--")] == [
        *(f"--trt-{which}-shapes" for which in ("min", "opt", "max")),
        "--input-shapes",
    ]
    last = printed[printed.index("--input-shapes") + 1 :]
    shapes = {name: tuple(found.shape) for name, found in parse_meta(last, includes_dtype=False).items()}
    assert shapes["input_ids"] == (2, 8)
    assert shapes["past.1.value.codes"][2] == 48


def test_polygraphy_network_script(
    export: Path, fake: Callable[..., FakeTensorRT], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(polygraphy_network.MODEL_VARIABLE, raising=False)
    with pytest.raises(HqmqError, match="set HQMQ_MODEL"):
        polygraphy_network.load_network()
    trt = fake()
    monkeypatch.setattr(polygraphy_network, "current_gpu", lambda: GPU)
    monkeypatch.setattr(polygraphy_network, "load_plugin_library", lambda log: None)
    monkeypatch.setenv(polygraphy_network.MODEL_VARIABLE, str(export))
    _, network, _ = polygraphy_network.load_network()
    assert "past.0.key.codes" in network.inputs
    assert not trt.models[0].functions
