"""manifest.json: round trip, and one line of error for everything that is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from hqmq_trt import codebooks
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import CodebookDigest, Layer, Manifest, codebook_name, record_file
from hqmq_trt.scheme import ROLES, Scheme

SCHEME = Scheme.parse("paper:s8_r3", seed=5)


def write_folder(folder: Path) -> Manifest:
    """A folder of one layer whose ONNX file holds nothing but the codebooks."""
    arrays, digests = [], {}
    for role in ROLES:
        parts = {
            "secondaries": codebooks.secondaries(SCHEME.role(role), SCHEME.seed, 0, 2, role),
            "levels": codebooks.levels(SCHEME.role(role)),
        }
        arrays += [onnx.numpy_helper.from_array(array, codebook_name(0, role, part)) for part, array in parts.items()]
        digests[role] = CodebookDigest(**{part: codebooks.digest(array) for part, array in parts.items()})
    graph = onnx.helper.make_graph([], "g", [], [], arrays)
    onnx.save(onnx.helper.make_model(graph), folder / "model.onnx")
    (folder / "tokenizer.json").write_text("{}")
    manifest = Manifest(
        hqmq_trt_version="0",
        opset=23,
        source="tiny",
        architecture="LlamaForCausalLM",
        scheme=SCHEME.name,
        seed=SCHEME.seed,
        page_size=SCHEME.page_size,
        mode="fused",
        dtype="float32",
        logits_dtype="float32",
        vocab_size=128,
        hidden_size=64,
        max_position=256,
        eos_token_ids=[2],
        layers=[Layer(num_heads=4, num_kv_heads=2, head_dim=64, scale=0.125, codebooks=digests)],
        files=[record_file(folder, "model.onnx", "model"), record_file(folder, "tokenizer.json", "tokenizer")],
    )
    manifest.save(folder)
    return manifest


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    content = json.loads((folder / "manifest.json").read_text())
    change(content)
    (folder / "manifest.json").write_text(json.dumps(content))


def refuse(folder: Path, *words: str, hashes: bool = False) -> None:
    with pytest.raises(HqmqError) as info:
        Manifest.load(folder, hashes)
    message = str(info.value)
    assert "\n" not in message
    for word in words:
        assert word in message


def test_round_trip(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path)
    loaded = Manifest.load(tmp_path, hashes=True)
    assert loaded == manifest
    assert loaded.parsed_scheme == SCHEME
    assert loaded.model_file == "model.onnx"
    assert loaded.tokenizer_files == ["tokenizer.json"]
    loaded.verify_codebooks(tmp_path / loaded.model_file)


def test_cache_names_and_shapes(tmp_path: Path) -> None:
    cache = dict(write_folder(tmp_path).cache(batch=3, num_pages=2))
    assert list(cache) == [f"0.{role}.{name}" for role in ROLES for name in ("codes", "scales", "tail")]
    assert cache["0.key.codes"].shape[:3] == (3, 2, 2 * SCHEME.page_size)


def test_no_folder_no_manifest(tmp_path: Path) -> None:
    refuse(tmp_path / "absent", "no such folder")
    refuse(tmp_path, "manifest.json", "hqmq-trt export")


@pytest.mark.parametrize("text", ["", "{", "[]", "3", '{"kind": "other"}', "{}"])
def test_foreign_text(tmp_path: Path, text: str) -> None:
    write_folder(tmp_path)
    (tmp_path / "manifest.json").write_text(text)
    refuse(tmp_path, "manifest.json")


def test_every_truncation_is_refused(tmp_path: Path) -> None:
    write_folder(tmp_path)
    whole = (tmp_path / "manifest.json").read_bytes()
    for size in range(0, len(whole) - 3, 97):
        (tmp_path / "manifest.json").write_bytes(whole[:size])
        refuse(tmp_path, "cut off")
    (tmp_path / "manifest.json").write_bytes(b"\xff\xfe" + whole)
    refuse(tmp_path, "cannot be read")


@pytest.mark.parametrize("field", ["manifest_version", "format_version", "plugin_version", "operator_opset"])
def test_other_versions(tmp_path: Path, field: str) -> None:
    write_folder(tmp_path)
    edit(tmp_path, lambda m: m.update({field: 99}))
    refuse(tmp_path, field, "99", "export the model again")


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (lambda m: m.update(extra=1), "extra"),
        (lambda m: m.pop("layers"), "layers"),
        (lambda m: m.update(layers=[]), "layers"),
        (lambda m: m.update(vocab_size="128"), "vocab_size"),
        (lambda m: m.update(vocab_size=0), "vocab_size"),
        (lambda m: m.update(scheme="hq9"), "hq9"),
        (lambda m: m.update(page_size=32), "disagree"),
        (lambda m: m.update(mode="other"), "mode"),
        (lambda m: m["layers"][0].update(num_kv_heads=3), "multiple"),
        (lambda m: m["layers"][0].update(head_dim=6), "head_dim 6"),
        (lambda m: m["layers"][0].update(codebooks={}), "codebooks"),
        (lambda m: m["layers"][0]["codebooks"]["key"].update(levels="00"), "levels"),
        (lambda m: m.update(files=[]), "model"),
        (lambda m: m["files"].append(m["files"][1]), "twice"),
    ],
)
def test_invalid_content(tmp_path: Path, change: Callable[[dict[str, Any]], Any], word: str) -> None:
    write_folder(tmp_path)
    edit(tmp_path, change)
    refuse(tmp_path, word, "export the model again")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "", ".", "..\\secret", "link"])
def test_files_outside_the_folder(tmp_path: Path, name: str) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    write_folder(folder)
    (tmp_path / "secret").write_text("{}")
    (folder / "link").symlink_to(tmp_path / "secret")
    edit(folder, lambda m: m["files"][1].update(name=name))
    refuse(folder, "outside")


def test_missing_resized_and_altered_files(tmp_path: Path) -> None:
    write_folder(tmp_path)
    path = tmp_path / "tokenizer.json"
    path.write_text("[]")
    Manifest.load(tmp_path)
    refuse(tmp_path, "sha256", hashes=True)
    path.write_text("{ }")
    refuse(tmp_path, "3 bytes", "says 2")
    path.unlink()
    refuse(tmp_path, "missing")


def test_codebooks_must_match(tmp_path: Path) -> None:
    manifest = write_folder(tmp_path)
    path = tmp_path / "model.onnx"
    model = onnx.load(path)
    tensor = next(t for t in model.graph.initializer if t.name == codebook_name(0, "value", "secondaries"))
    array = onnx.numpy_helper.to_array(tensor).copy()
    array[1, 3, 2] = np.nextafter(array[1, 3, 2], np.float32(2))
    tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    onnx.save(model, path)
    with pytest.raises(HqmqError, match=r"codebook\.0\.value\.secondaries.*hash"):
        manifest.verify_codebooks(path)
    model.graph.initializer.remove(tensor)
    onnx.save(model, path)
    with pytest.raises(HqmqError, match="no initialiser"):
        manifest.verify_codebooks(path)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(HqmqError, match="export the model again"):
        manifest.verify_codebooks(path)
