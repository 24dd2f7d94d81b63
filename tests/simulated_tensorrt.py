"""The TensorRT of tests/simulated_gpu.py: an engine is what TensorRT would parse (hqmq_trt.engine.network), run by ONNX
Runtime on raw addresses."""

from __future__ import annotations

import enum
import json
import types
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hqmq_trt import ort_library

if TYPE_CHECKING:
    from tests.simulated_gpu import Gpu


class DataType(enum.Enum):
    FLOAT = "tensor(float)"
    HALF = "tensor(float16)"
    BF16 = "tensor(bfloat16)"
    INT32 = "tensor(int32)"
    INT64 = "tensor(int64)"


_ONNX_TYPE = {DataType.FLOAT: 1, DataType.HALF: 10, DataType.BF16: 16, DataType.INT32: 6, DataType.INT64: 7}


class Engine:
    def __init__(self, gpu: Gpu, plan: dict[str, Any]) -> None:
        self.gpu, self.limits = gpu, plan
        self.session = ort_library.session(Path(plan["model"]))
        self.types = {v.name: DataType(v.type) for v in (*self.session.get_inputs(), *self.session.get_outputs())}
        self.num_io_tensors = len(self.types)
        self.device_memory_size_v2 = 4096

    def get_tensor_name(self, index: int) -> str:
        return list(self.types)[index]

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.types[name]

    def create_execution_context(self, strategy: str) -> ExecutionContext:
        assert strategy == "user managed"
        self.gpu.need_context()
        return ExecutionContext(self)


class ExecutionContext:
    def __init__(self, engine: Engine) -> None:
        self._engine, self._profile, self._memory = engine, 0, 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._prepared = False

    def set_optimization_profile_async(self, profile: int, stream: int) -> bool:
        self._profile = profile
        return True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert size >= self._engine.device_memory_size_v2
        self._memory = memory

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        limits = self._engine.limits
        tokens = 1 if self._profile == 0 else limits["prefill_chunk"]
        wide = name in ("input_ids", "logits_index")
        if not 1 <= shape[0] <= limits["max_batch"] or (wide and not 1 <= shape[1] <= tokens):
            return False
        if self._shapes.get(name) != shape:
            self._prepared = False
        self._shapes[name] = shape
        return True

    def set_tensor_address(self, name: str, address: int) -> bool:
        self._addresses[name] = address
        return address % 256 == 0 and address != 0

    def get_tensor_address(self, name: str) -> int:
        return self._addresses[name]

    def execute_async_v3(self, stream: int) -> bool:
        engine = self._engine
        assert self._memory
        if engine.gpu.recorded is not None and not self._prepared:
            return False
        shapes, addresses = dict(self._shapes), dict(self._addresses)
        engine.gpu.do(lambda: self._execute(shapes, addresses))
        self._prepared = True
        return True

    def _execute(self, shapes: dict[str, tuple[int, ...]], addresses: dict[str, int]) -> None:
        engine = self._engine
        engine.gpu.runs += 1
        binding = engine.session.io_binding()
        outputs = {f"present.{n[5:]}": shape for n, shape in shapes.items() if n.startswith("past.")}
        outputs["present_length"] = shapes["past_length"]
        outputs["logits_sum"] = shapes["logits_index"]
        outputs["logits"] = (*shapes["logits_index"], engine.limits["vocab_size"])
        for name, shape in shapes.items():
            binding.bind_input(name, "cpu", 0, _ONNX_TYPE[engine.types[name]], shape, addresses[name])
        for name, shape in outputs.items():
            binding.bind_output(name, "cpu", 0, _ONNX_TYPE[engine.types[name]], shape, addresses[name])
        engine.session.run_with_iobinding(binding)


def tensorrt_module(gpu: Gpu) -> Any:
    """What TrtSession uses of tensorrt."""

    class ILogger:
        class Severity(enum.Enum):
            INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

    class Runtime:
        def __init__(self, log: Any) -> None:
            self._log = log

        def deserialize_cuda_engine(self, plan: Any) -> Engine | None:
            try:
                return Engine(gpu, json.loads(bytes(plan)))
            except ValueError:
                self._log.log(ILogger.Severity.ERROR, "Serialization assertion magicTagRead == kMAGIC_TAG failed")
                return None

    module: Any = types.ModuleType("tensorrt")
    module.__version__ = "10.6.0"
    module.ILogger, module.Runtime, module.DataType = ILogger, Runtime, DataType
    module.ExecutionContextAllocationStrategy = types.SimpleNamespace(USER_MANAGED="user managed")
    return module
