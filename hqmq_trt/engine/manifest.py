"""engine.json: what an engine folder holds, and on which TensorRT and GPU it runs.

An engine folder holds ``engine.plan``, ``engine.json``, the model's ``manifest.json`` with engine.plan in the place of
the ONNX file, and the tokenizer's files.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from hqmq_trt.contract import PLUGIN_VERSION
from hqmq_trt.errors import HqmqError
from hqmq_trt.format import FORMAT_VERSION
from hqmq_trt.manifest import Count, Digest, ModelFile, file_digest

ENGINE_FILE = "engine.json"
PLAN_FILE = "engine.plan"
ENGINE_VERSION = 2
"""2: logits are float32, and the engine has the output logits_sum."""
KIND = "hqmq_trt.engine"
LOGITS_SUM = "logits_sum"
"""Output of an engine that its ONNX file lacks: see hqmq_trt.engine.network.engine_model."""
DECODE_PROFILE, PREFILL_PROFILE = 0, 1
"""Optimisation profiles: one token a sequence; up to `prefill_chunk` tokens a sequence."""

_REBUILD = "build the engine again with `hqmq-trt build`"


class EngineManifest(BaseModel):
    """The content of engine.json.

    Attributes:
        kind, engine_version: of this file.
        format_version, plugin_version: of the packed cache and of the plugins; must equal the library's.
        hqmq_trt_version: version that built the engine (information).
        tensorrt_version: TensorRT that built the plan; it must run it too, unless `version_compatible`.
        gpu_name: name of the GPU the plan was built on (information).
        compute_capability: its compute capability, such as ``9.0``; the plan runs on no other.
        max_batch, max_context, prefill_chunk: sequences; tokens a sequence, a multiple of page_size; tokens of a
            sequence in one prefill run.
        page_size: tokens of a page.
        build_seconds: time that TensorRT took.
        device_memory_bytes: scratch memory of an execution context, by profile (decode, prefill).
        plan_size, plan_sha256: of engine.plan, in bytes.
        source_model: files of the model that were compiled: the ONNX file and its weights.
        weight_stripped: the plan holds no weights; they come from the ONNX file when it is loaded.
        model_folder: where that ONNX file lay when the engine was built, relative to the engine folder; only with
            `weight_stripped`.
        version_compatible: later TensorRT releases of the same major version may run the plan.
        lean_runtime: a version-compatible plan carries TensorRT's lean runtime within it.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False, protected_namespaces=())

    kind: Literal["hqmq_trt.engine"] = "hqmq_trt.engine"
    engine_version: int = ENGINE_VERSION
    format_version: int = FORMAT_VERSION
    plugin_version: str = PLUGIN_VERSION
    hqmq_trt_version: str
    tensorrt_version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+")]
    gpu_name: str
    compute_capability: Annotated[str, Field(pattern=r"^\d+\.\d+$")]
    max_batch: Count
    max_context: Count
    prefill_chunk: Count
    page_size: Count
    build_seconds: Annotated[float, Field(ge=0)]
    device_memory_bytes: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=2, max_length=2)]
    plan_size: Count
    plan_sha256: Digest
    source_model: Annotated[list[ModelFile], Field(min_length=1)]
    weight_stripped: bool = False
    model_folder: str | None = None
    version_compatible: bool = False
    lean_runtime: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> EngineManifest:
        if self.max_context % self.page_size:
            raise ValueError(f"max_context {self.max_context} is not a multiple of page_size {self.page_size}")
        if [file.purpose for file in self.source_model].count("model") != 1:
            raise ValueError("source_model must name one ONNX file")
        return self

    @property
    def num_pages(self) -> int:
        """Pages of a sequence at most."""
        return self.max_context // self.page_size

    def save(self, folder: Path) -> None:
        """Write engine.json into `folder`."""
        (folder / ENGINE_FILE).write_text(self.model_dump_json(indent=2) + "\n", encoding="utf-8")

    @staticmethod
    def is_engine(folder: str | Path) -> bool:
        """Whether `folder` looks like an engine folder."""
        return (Path(folder) / ENGINE_FILE).is_file()

    @staticmethod
    def load(folder: str | Path, hashes: bool = False) -> EngineManifest:
        """Read and check engine.json, the presence and size of engine.plan and, with `hashes`, its sha256.

        Raises:
            HqmqError: anything that is missing, foreign, damaged, or of another version.
        """
        folder = Path(folder)
        path = folder / ENGINE_FILE
        try:
            text = path.read_text(encoding="utf-8")
            content = json.loads(text)
        except FileNotFoundError:
            raise HqmqError(f"{folder}: holds no {ENGINE_FILE}; build an engine with `hqmq-trt build`") from None
        except (OSError, UnicodeDecodeError, json.JSONDecodeError, RecursionError) as error:
            raise HqmqError(f"{path}: cannot be read ({' '.join(str(error).split())[:200]}); {_REBUILD}") from None
        if not isinstance(content, dict) or content.get("kind") != KIND:
            raise HqmqError(f"{path}: does not describe an engine of hqmq-trt; {_REBUILD}")
        ours = {"engine_version": ENGINE_VERSION, "format_version": FORMAT_VERSION, "plugin_version": PLUGIN_VERSION}
        for name, version in ours.items():
            if content.get(name) != version:
                raise HqmqError(f"{path}: {name} is {content.get(name)!r}, this library knows {version!r}; {_REBUILD}")
        try:
            manifest = EngineManifest.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(str(part) for part in first["loc"]) or "engine"
            raise HqmqError(f"{path}: {where}: {' '.join(str(first['msg']).split())}; {_REBUILD}") from None
        plan = folder / PLAN_FILE
        if not plan.is_file():
            raise HqmqError(f"{plan}: is missing; {_REBUILD}")
        if plan.stat().st_size != manifest.plan_size:
            raise HqmqError(
                f"{plan}: has {plan.stat().st_size} bytes, {ENGINE_FILE} says {manifest.plan_size}; {_REBUILD}"
            )
        if hashes and file_digest(plan) != manifest.plan_sha256:
            raise HqmqError(f"{plan}: sha256 differs from {ENGINE_FILE}; {_REBUILD}")
        return manifest

    def check_runtime(self, tensorrt_version: str, compute_capability: str) -> None:
        """Raise HqmqError unless this TensorRT on this GPU may run the plan.

        A plan runs on the TensorRT release that built it; a version-compatible one also on later releases of the same
        major version. It runs on the compute capability it was built for.
        """
        built, runs = _release(self.tensorrt_version), _release(tensorrt_version)
        fits = built[0] == runs[0] and runs >= built if self.version_compatible else built == runs
        if not fits:
            kind = (
                "this version-compatible engine needs it or a later one of its major version"
                if (self.version_compatible)
                else "an engine runs only on the release that built it"
            )
            raise HqmqError(
                f"the engine was built by TensorRT {self.tensorrt_version}, this is {tensorrt_version}: {kind}; "
                f"{_REBUILD}, or install tensorrt=={self.tensorrt_version}"
            )
        if compute_capability != self.compute_capability:
            raise HqmqError(
                f"the engine was built for compute capability {self.compute_capability} ({self.gpu_name}), this GPU "
                f"has {compute_capability}; {_REBUILD} on this machine"
            )


def _release(version: str) -> tuple[int, ...]:
    """(major, minor, patch) of a version such as ``10.15.1.29``."""
    try:
        return tuple(int(part) for part in version.split(".")[:3])
    except ValueError:
        raise HqmqError(f"'{version}' is not a version of TensorRT") from None
