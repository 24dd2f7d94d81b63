"""engine.json and the manifest of an engine folder: round trip, and one line of error for all that can be wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from hqmq_trt.engine.manifest import EngineManifest
from hqmq_trt.engine.refit import model_folder
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest, ModelFile, file_digest, record_file
from tests.test_manifest import edit as edit_manifest
from tests.test_manifest import write_folder

PLAN = b"a plan of TensorRT" * 10


def write_engine(folder: Path, **changes: Any) -> EngineManifest:
    folder.mkdir(exist_ok=True)
    (folder / "engine.plan").write_bytes(PLAN)
    values: dict[str, Any] = {
        "hqmq_trt_version": "0",
        "tensorrt_version": "10.6.0",
        "gpu_name": "NVIDIA H100 80GB HBM3",
        "compute_capability": "9.0",
        "max_batch": 2,
        "max_context": 4096,
        "prefill_chunk": 512,
        "page_size": 32,
        "build_seconds": 1.5,
        "device_memory_bytes": [1 << 20, 1 << 24],
        "plan_size": len(PLAN),
        "plan_sha256": file_digest(folder / "engine.plan"),
        "source_model": [ModelFile(name="model.onnx", purpose="model", size=3, sha256="0" * 64)],
    }
    manifest = EngineManifest(**{**values, **changes})
    manifest.save(folder)
    return manifest


def edit(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "engine.json").read_text())
    (folder / "engine.json").write_text(json.dumps({**content, **changes}))


def refuse(folder: Path, *words: str, hashes: bool = False) -> None:
    with pytest.raises(HqmqError) as info:
        EngineManifest.load(folder, hashes)
    assert "\n" not in str(info.value)
    for word in words:
        assert word in str(info.value)


def test_round_trip(tmp_path: Path) -> None:
    assert not EngineManifest.is_engine(tmp_path)
    manifest = write_engine(tmp_path)
    assert EngineManifest.is_engine(tmp_path)
    assert EngineManifest.load(tmp_path, hashes=True) == manifest
    assert manifest.num_pages == 128


def test_missing_and_foreign_files(tmp_path: Path) -> None:
    refuse(tmp_path, "engine.json", "hqmq-trt build")
    write_engine(tmp_path)
    for text in ("", "{", "[]", '{"kind": "hqmq_trt"}', "\x00"):
        (tmp_path / "engine.json").write_text(text)
        refuse(tmp_path, "engine.json", "build the engine again")
    write_engine(tmp_path)
    (tmp_path / "engine.plan").unlink()
    refuse(tmp_path, "engine.plan", "missing")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_engine(tmp_path)
    whole = (tmp_path / "engine.json").read_bytes()
    for size in range(0, len(whole) - 3, 41):
        (tmp_path / "engine.json").write_bytes(whole[:size])
        refuse(tmp_path, "engine.json")


def test_damaged_plan(tmp_path: Path) -> None:
    write_engine(tmp_path)
    (tmp_path / "engine.plan").write_bytes(PLAN[:-1])
    refuse(tmp_path, "179 bytes", "180")
    (tmp_path / "engine.plan").write_bytes(b"A" + PLAN[1:])
    EngineManifest.load(tmp_path)  # sizes agree; only the hash tells
    refuse(tmp_path, "sha256", hashes=True)


@pytest.mark.parametrize("field", ["engine_version", "format_version", "plugin_version"])
def test_other_versions(tmp_path: Path, field: str) -> None:
    write_engine(tmp_path)
    edit(tmp_path, **{field: 99})
    refuse(tmp_path, field, "99", "build the engine again")


def test_engines_without_sums_of_logits(tmp_path: Path) -> None:
    write_engine(tmp_path)
    edit(tmp_path, engine_version=1)
    refuse(tmp_path, "engine_version is 1, this library knows 2", "build the engine again with `hqmq-trt build`")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"max_batch": 0}, "max_batch"),
        ({"max_context": 4100}, "multiple of page_size"),
        ({"max_context": "4096"}, "max_context"),
        ({"device_memory_bytes": [1]}, "device_memory_bytes"),
        ({"plan_sha256": "x"}, "plan_sha256"),
        ({"compute_capability": "nine"}, "compute_capability"),
        ({"source_model": []}, "source_model"),
        ({"surprise": 1}, "surprise"),
    ],
)
def test_wrong_fields(tmp_path: Path, changes: dict[str, Any], word: str) -> None:
    write_engine(tmp_path)
    edit(tmp_path, **changes)
    refuse(tmp_path, word)


@pytest.mark.parametrize(
    ("compatible", "version", "capability", "word"),
    [
        (False, "10.6.0", "9.0", None),
        (False, "10.6.0.26", "9.0", None),
        (False, "10.6.1", "9.0", "10.6.1"),
        (False, "10.15.1.29", "9.0", "only on the release that built it"),
        (False, "10.6.0", "8.6", "compute capability 9.0"),
        (True, "10.15.1.29", "9.0", None),
        (True, "10.5.0", "9.0", "or a later one"),
        (True, "11.2.1", "9.0", "or a later one"),
        (True, "10.15.1", "8.9", "8.9"),
        (False, "unknown", "9.0", "not a version"),
    ],
)
def test_check_runtime(tmp_path: Path, compatible: bool, version: str, capability: str, word: str | None) -> None:
    manifest = write_engine(tmp_path, version_compatible=compatible)
    if word is None:
        manifest.check_runtime(version, capability)
        return
    with pytest.raises(HqmqError, match=word.replace(".", r"\.")):
        manifest.check_runtime(version, capability)


def engine_folder(folder: Path) -> Manifest:
    """A whole engine folder: the model's manifest with the plan in the place of the ONNX file."""
    model = write_folder(folder)
    (folder / "model.onnx").unlink()
    write_engine(folder)
    files = [record_file(folder, "engine.plan", "engine"), record_file(folder, "tokenizer.json", "tokenizer")]
    manifest = Manifest.model_validate({**dict(model), "files": files})
    manifest.save(folder)
    return manifest


def test_manifest_of_an_engine_folder(tmp_path: Path) -> None:
    manifest = engine_folder(tmp_path)
    loaded = Manifest.load(tmp_path, hashes=True)
    assert loaded == manifest
    assert loaded.engine_file == "engine.plan"
    assert loaded.tokenizer_files == ["tokenizer.json"]
    with pytest.raises(HqmqError, match="TensorRT engine"):
        assert loaded.model_file
    (tmp_path / "engine.plan").write_bytes(b"")
    with pytest.raises(HqmqError, match="build the engine again"):
        Manifest.load(tmp_path)


@pytest.mark.parametrize("purposes", [["engine", "model"], ["engine", "engine"], ["tokenizer", "tokenizer"]])
def test_exactly_one_of_model_and_engine(tmp_path: Path, purposes: list[str]) -> None:
    engine_folder(tmp_path)

    def change(content: dict[str, Any]) -> None:
        for file, purpose in zip(content["files"], purposes, strict=True):
            file["purpose"] = purpose

    edit_manifest(tmp_path, change)
    with pytest.raises(HqmqError, match="exactly one"):
        Manifest.load(tmp_path)


def test_weights_of_a_stripped_engine(tmp_path: Path) -> None:
    """The model is found by its relative place, and must be the very file."""
    (tmp_path / "model").mkdir()
    write_folder(tmp_path / "model")
    source = record_file(tmp_path / "model", "model.onnx", "model")
    manifest = write_engine(tmp_path / "engine", weight_stripped=True, model_folder="../model", source_model=[source])
    assert model_folder(tmp_path / "engine", manifest) == tmp_path / "model"
    content = (tmp_path / "model" / "model.onnx").read_bytes()
    (tmp_path / "model" / "model.onnx").write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(HqmqError, match="not the file that the engine"):
        model_folder(tmp_path / "engine", manifest)
    (tmp_path / "model" / "model.onnx").unlink()
    with pytest.raises(HqmqError, match="holds no weights"):
        model_folder(tmp_path / "engine", manifest)
