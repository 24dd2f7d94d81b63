"""As much of the module tensorrt as the engine builder touches, without a GPU. It records what it is told."""

from __future__ import annotations

from enum import Enum
from types import SimpleNamespace
from typing import Any

import onnx

PLAN = b"plan of the fake TensorRT"
CACHE = b"fake timing cache"
EMPTY_CACHE = b"fake"


class Severity(Enum):
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


class ILogger:
    Severity = Severity

    def __init__(self) -> None:
        pass


class IProgressMonitor:
    def __init__(self) -> None:
        pass


class TimingCache:
    def __init__(self, content: bytes) -> None:
        self.content = content

    def serialize(self) -> bytes:
        return self.content or EMPTY_CACHE


class Config:
    def __init__(self) -> None:
        self.flags: set[str] = {"TF32"}
        self.preview: dict[str, bool] = {}
        self.pools: dict[str, int] = {}
        self.profiles: list[Profile] = []
        self.progress_monitor: Any = None
        self.builder_optimization_level: int | None = None
        self.cache: TimingCache | None = None
        self.taken: list[bytes] = []

    def set_flag(self, flag: str) -> None:
        self.flags.add(flag)

    def clear_flag(self, flag: str) -> None:
        self.flags.discard(flag)

    def set_preview_feature(self, feature: str, on: bool) -> None:
        self.preview[feature] = on

    def set_memory_pool_limit(self, pool: str, size: int) -> None:
        self.pools[pool] = size

    def add_optimization_profile(self, profile: Profile) -> int:
        self.profiles.append(profile)
        return len(self.profiles) - 1

    def create_timing_cache(self, content: bytes) -> TimingCache | None:
        if content.startswith(CACHE[:4]):  # as of TensorRT 10.6: a damaged one is dropped without a word
            return TimingCache(content if content == CACHE else b"")
        return TimingCache(content) if content == b"" else None

    def set_timing_cache(self, cache: TimingCache, ignore_mismatch: bool) -> bool:
        self.cache = cache
        self.taken.append(cache.content)
        return not ignore_mismatch

    def get_timing_cache(self) -> TimingCache | None:
        return self.cache


class Profile:
    def __init__(self) -> None:
        self.shapes: dict[str, tuple[Any, Any, Any]] = {}

    def set_shape(self, name: str, least: Any, best: Any, most: Any) -> None:
        self.shapes[name] = (least, best, most)


class Network:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.inputs: list[str] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    def get_input(self, index: int) -> Any:
        return SimpleNamespace(name=self.inputs[index])


class FakeTensorRT(SimpleNamespace):
    """Stands in sys.modules for tensorrt. `failure`: None, or what goes wrong: ``parse``, ``memory``."""

    def __init__(self, version: str = "10.6.0", failure: str | None = None) -> None:
        self.failure = failure
        self.configs: list[Config] = []
        self.networks: list[Network] = []
        self.models: list[onnx.ModelProto] = []
        self.log: Any = None
        names = ("STRIP_PLAN", "REFIT_IDENTICAL", "VERSION_COMPATIBLE", "EXCLUDE_LEAN_RUNTIME", "TF32")
        super().__init__(
            __version__=version,
            ILogger=ILogger,
            IProgressMonitor=IProgressMonitor,
            BuilderFlag=SimpleNamespace(**{name: name for name in names}),
            PreviewFeature=SimpleNamespace(ALIASED_PLUGIN_IO_10_03="ALIASED_PLUGIN_IO_10_03"),
            MemoryPoolType=SimpleNamespace(WORKSPACE="WORKSPACE"),
            NetworkDefinitionCreationFlag=SimpleNamespace(STRONGLY_TYPED=1),
            Builder=self.builder,
            OnnxParser=self.parser,
            Runtime=self.runtime,
        )

    def builder(self, log: Any) -> Any:
        self.log = log

        def config() -> Config:
            self.configs.append(Config())
            return self.configs[-1]

        def network(flags: int) -> Network:
            self.networks.append(Network(flags))
            return self.networks[-1]

        return SimpleNamespace(
            create_builder_config=config,
            create_network=network,
            create_optimization_profile=Profile,
            build_serialized_network=self.build,
        )

    def build(self, network: Network, config: Config) -> bytes | None:
        watch = config.progress_monitor
        watch.phase_start("Building", None, 2)
        watch.phase_start("Timing", "Building", 1)
        going = watch.step_complete("Timing", 0)
        watch.phase_finish("Timing")
        watch.phase_finish("Building")
        if not going:
            return None
        if self.failure == "memory":
            self.log.log(Severity.ERROR, "[memory.cpp] Cuda Runtime (out of\nmemory)")
            return None
        if config.cache is not None:
            config.cache.content = CACHE
        return PLAN

    def parser(self, network: Network, log: Any) -> Any:
        def parse(content: bytes, path: str) -> bool:
            model = onnx.ModelProto.FromString(content)
            self.models.append(model)
            network.inputs = [value.name for value in model.graph.input]
            return self.failure != "parse"

        error = SimpleNamespace(
            node_name=lambda: "layers.0.attention",
            node_operator=lambda: "HqmqAttention",
            desc=lambda: "Plugin not found,\nare the plugin name, version, and namespace correct?",
        )
        return SimpleNamespace(parse=parse, num_errors=1, get_error=lambda index: error)

    def runtime(self, log: Any) -> Any:
        def load(plan: bytes) -> Any:
            assert bytes(plan) == PLAN
            return SimpleNamespace(
                num_optimization_profiles=2, get_device_memory_size_for_profile_v2=lambda profile: 1000 * (profile + 1)
            )

        return SimpleNamespace(deserialize_cuda_engine=load, engine_host_code_allowed=False)
