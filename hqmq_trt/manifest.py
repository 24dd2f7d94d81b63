"""manifest.json: what an exported folder or an engine folder holds and which library may run it.

The exporter writes it last; every runtime reads it first and refuses what it does not understand. docs/export.md
lists the fields. An engine folder has the manifest of its model, with the engine's plan in the place of the ONNX file.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Literal

import onnx
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hqmq_trt import codebooks
from hqmq_trt.contract import OPSET_VERSION, PLUGIN_VERSION
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import FORMAT_VERSION, CacheTensor, cache_tensors
from hqmq_trt.scheme import ROLES, Scheme

MANIFEST_VERSION = 1
MANIFEST_FILE = "manifest.json"
KIND = "hqmq_trt"

Count = Annotated[int, Field(gt=0)]
Purpose = Literal["model", "weights", "tokenizer", "engine"]
Digest = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


class CodebookDigest(_Record):
    """sha256 (hqmq_trt.codebooks.digest) of the initialisers ``codebook.{layer}.{role}.{secondaries,levels}``."""

    secondaries: Digest
    levels: Digest


class Layer(_Record):
    """One attention layer.

    Attributes:
        num_heads, num_kv_heads, head_dim: query heads, K and V heads, elements of one head.
        scale: factor of the attention scores.
        window: tokens a sliding window sees, the query's own included; 0: no window.
        softcap: bound of the scores (tanh); 0: none.
        has_sinks: whether attention has learned sinks.
        value_rotation_folded: whether v_proj and o_proj hold the Hadamard rotation of V.
        codebooks: digests by role; a role of storage fp16 has none.
    """

    num_heads: Count
    num_kv_heads: Count
    head_dim: Count
    scale: float
    window: Annotated[int, Field(ge=0)] = 0
    softcap: Annotated[float, Field(ge=0)] = 0.0
    has_sinks: bool = False
    value_rotation_folded: bool = False
    codebooks: dict[str, CodebookDigest] = {}

    @model_validator(mode="after")
    def _heads(self) -> Layer:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(f"num_heads {self.num_heads} is not a multiple of num_kv_heads {self.num_kv_heads}")
        return self


class ModelFile(_Record):
    """One file of the folder: POSIX path relative to it, bytes, sha256, and what it is for."""

    name: str
    purpose: Purpose
    size: Annotated[int, Field(ge=0)]
    sha256: Digest


class Manifest(_Record):
    """The content of manifest.json. All counts are tokens, elements or bytes as named.

    Attributes:
        kind: always ``hqmq_trt``.
        manifest_version, format_version, plugin_version, operator_opset: must equal the library's.
        hqmq_trt_version: version that exported the model (information).
        opset: ONNX opset of the graph.
        source, architecture: where the model came from, and its transformers class (information).
        scheme, seed, page_size: hqmq_trt.scheme.Scheme; the canonical spelling.
        mode: ``fused`` (HqmqAttention) or ``qdq`` (HqmqQuantize, HqmqDequantize, ordinary attention).
        dtype: type of weights and activations; `logits_dtype`: type of the output ``logits``.
        vocab_size, hidden_size, max_position: of the model; max_position is the longest context it knows.
        bos_token_id, eos_token_ids, pad_token_id: of the generation config.
        key_balance: whether the weights hold scales that make K easier to code (hqmq_trt.balance).
        layers: attention layers in the order of their caches.
        files: every file of the folder but manifest.json itself (and engine.json, which describes the engine). Exactly
            one has the purpose ``model`` (an exported folder) or ``engine`` (an engine folder).
    """

    kind: Literal["hqmq_trt"] = "hqmq_trt"
    manifest_version: int = MANIFEST_VERSION
    format_version: int = FORMAT_VERSION
    plugin_version: str = PLUGIN_VERSION
    operator_opset: int = OPSET_VERSION
    hqmq_trt_version: str
    opset: Count
    source: str
    architecture: str
    scheme: str
    seed: Annotated[int, Field(ge=0)]
    page_size: Count
    mode: Literal["fused", "qdq"]
    dtype: Literal["float32", "float16", "bfloat16"]
    logits_dtype: Literal["float32", "float16", "bfloat16"]
    vocab_size: Count
    hidden_size: Count
    max_position: Count
    bos_token_id: int | None = None
    eos_token_ids: list[int] = []
    pad_token_id: int | None = None
    key_balance: bool = False
    layers: Annotated[list[Layer], Field(min_length=1)]
    files: list[ModelFile]

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        try:
            scheme = self.parsed_scheme
            for layer in self.layers:
                scheme.check_head_dim(layer.head_dim)
        except HqmqError as error:
            raise ValueError(str(error)) from error
        if scheme.name != self.scheme or scheme.page_size != self.page_size:
            raise ValueError(f"scheme '{self.scheme}' and page_size {self.page_size} disagree")
        packed = {role for role in ROLES if scheme.role(role).packed}
        for index, layer in enumerate(self.layers):
            if set(layer.codebooks) != packed:
                raise ValueError(f"layer {index} has codebooks of {sorted(layer.codebooks)}, not {sorted(packed)}")
        if sum(file.purpose in ("model", "engine") for file in self.files) != 1:
            raise ValueError("exactly one file must have the purpose 'model' or 'engine'")
        if len({file.name for file in self.files}) != len(self.files):
            raise ValueError("a file is listed twice")
        return self

    @property
    def parsed_scheme(self) -> Scheme:
        """The scheme with its seed."""
        return Scheme.parse(self.scheme, self.seed)

    @property
    def engine_file(self) -> str | None:
        """Name of the TensorRT plan; None for an exported folder."""
        return next((file.name for file in self.files if file.purpose == "engine"), None)

    @property
    def model_file(self) -> str:
        """Name of the ONNX file.

        Raises:
            HqmqError: this is the manifest of an engine folder, which has none.
        """
        if self.engine_file is not None:
            raise HqmqError(f"this is the folder of a TensorRT engine ({self.engine_file}), not of an ONNX model")
        return next(file.name for file in self.files if file.purpose == "model")

    @property
    def tokenizer_files(self) -> list[str]:
        """Names of the tokenizer's files; empty when the source had no tokenizer."""
        return [file.name for file in self.files if file.purpose == "tokenizer"]

    def cache(self, batch: int, num_pages: int) -> Iterator[tuple[str, CacheTensor]]:
        """Every cache tensor in the order of the graph: its name without ``past.``/``present.``, and its spec."""
        scheme = self.parsed_scheme
        for index, layer in enumerate(self.layers):
            for role in ROLES:
                specs = cache_tensors(
                    scheme.role(role), self.page_size, layer.head_dim, layer.num_kv_heads, batch, num_pages
                )
                for spec in specs:
                    yield f"{index}.{role}.{spec.name}", spec

    def save(self, folder: Path) -> None:
        """Write manifest.json into `folder`."""
        (folder / MANIFEST_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def load(folder: str | Path, hashes: bool = False) -> Manifest:
        """Read and check manifest.json of an exported folder, the presence and size of its files and, with
        `hashes`, their sha256.

        Raises:
            HqmqError: anything that is missing, foreign, truncated, of another version, or outside the folder.
        """
        folder = Path(folder)
        path = folder / MANIFEST_FILE
        if not folder.is_dir():
            raise HqmqError(f"{folder}: no such folder; give a folder that `hqmq-trt export` wrote")
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            raise HqmqError(f"{folder}: holds no {MANIFEST_FILE}; export the model with `hqmq-trt export`") from None
        except (OSError, UnicodeDecodeError) as error:
            raise HqmqError(f"{path}: cannot be read ({error}); export the model again") from error
        _check_versions(path, _parse(path, text))
        try:
            manifest = Manifest.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "manifest"
            message = " ".join(str(first["msg"]).split())
            raise HqmqError(f"{path}: {where}: {message}; export the model again") from None
        for file in manifest.files:
            _check_file(folder, file, hashes)
        return manifest

    def verify_codebooks(self, model_path: str | Path) -> None:
        """Compare the codebooks inside an ONNX file with the digests recorded here.

        Raises:
            HqmqError: an initialiser is missing, or differs from its digest.
        """
        model_path = Path(model_path)
        try:
            graph = onnx.load(model_path, load_external_data=False).graph
        except Exception as error:  # protobuf raises its own types on damage
            raise HqmqError(f"{model_path}: not an ONNX file ({_one_line(error)}); export the model again") from error
        tensors = {tensor.name: tensor for tensor in graph.initializer}
        for index, layer in enumerate(self.layers):
            for role, digest in layer.codebooks.items():
                for part in ("secondaries", "levels"):
                    name = codebook_name(index, role, part)
                    if name not in tensors:
                        raise HqmqError(f"{model_path}: has no initialiser '{name}'; export the model again")
                    array = onnx.numpy_helper.to_array(tensors[name], str(model_path.parent))
                    if codebooks.digest(array) != getattr(digest, part):
                        raise HqmqError(
                            f"{model_path}: codebook '{name}' does not match its hash in {MANIFEST_FILE}: "
                            "the two come from different exports; export the model again"
                        )


def codebook_name(layer: int, role: str, part: str) -> str:
    """Name of a codebook initialiser; `part` is ``secondaries`` or ``levels``."""
    return f"codebook.{layer}.{role}.{part}"


def record_file(folder: Path, name: str, purpose: Purpose) -> ModelFile:
    """Size and sha256 of ``folder/name``."""
    path = folder / name
    return ModelFile(name=name, purpose=purpose, size=path.stat().st_size, sha256=file_digest(path))


def file_digest(path: Path) -> str:
    """sha256 of a file."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            state.update(block)
    return state.hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200]


def _parse(path: Path, text: str) -> dict[str, Any]:
    try:
        content = json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        raise HqmqError(f"{path}: is not JSON or was cut off ({_one_line(error)}); export the model again") from None
    if not isinstance(content, dict) or content.get("kind") != KIND:
        raise HqmqError(f"{path}: is not a manifest of hqmq-trt; give a folder that `hqmq-trt export` wrote")
    return content


def _check_versions(path: Path, content: dict[str, Any]) -> None:
    ours = {
        "manifest_version": MANIFEST_VERSION,
        "format_version": FORMAT_VERSION,
        "plugin_version": PLUGIN_VERSION,
        "operator_opset": OPSET_VERSION,
    }
    for name, version in ours.items():
        if content.get(name) != version:
            raise HqmqError(
                f"{path}: {name} is {content.get(name)!r}, this library knows {version!r}; "
                "export the model again, or install the hqmq-trt that exported it"
            )


def _check_file(folder: Path, file: ModelFile, hashes: bool) -> None:
    name = PurePosixPath(file.name)
    path = folder / name
    inside = not name.is_absolute() and ".." not in name.parts and name.parts and "\\" not in file.name
    if not inside or not path.resolve().is_relative_to(folder.resolve()):
        raise HqmqError(f"{folder / MANIFEST_FILE}: file '{file.name}' lies outside the folder; do not trust it")
    mend = "build the engine again" if file.purpose == "engine" else "export the model again"
    if not path.is_file():
        raise HqmqError(f"{path}: is missing though {MANIFEST_FILE} lists it; {mend}")
    if path.stat().st_size != file.size:
        raise HqmqError(f"{path}: has {path.stat().st_size} bytes, {MANIFEST_FILE} says {file.size}; {mend}")
    if hashes and file_digest(path) != file.sha256:
        raise HqmqError(f"{path}: sha256 differs from {MANIFEST_FILE}; {mend}")
