"""A Session on ONNX Runtime, on CPU or GPU: the cache lies in buffers of ours that every run updates in place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

from hqmq_trt import ort_library
from hqmq_trt.errors import HqmqError
from hqmq_trt.runtime.cache_file import model_digest
from hqmq_trt.runtime.ort_cache import NUMPY_TYPE, ONNX_TYPE, DeviceTensor, HostTensor
from hqmq_trt.runtime.session import DEFAULT_PREFILL_CHUNK, Logits, Session
from hqmq_trt.runtime.widen import widen

_NODE_ERROR = re.compile(r"running (\w+) node\. Name:'([^']*)' Status Message: (.*)", re.DOTALL)


class OrtSession(Session):
    """Runs an exported folder in ONNX Runtime.

    past.* and present.* of the graph are bound to the same memory, so that a run only writes new tokens. The cache
    is `max_batch` x `max_context`; a run over fewer sequences binds the front part of each tensor. After a run that
    raised, reset the sequences it took part in.

    Args:
        folder: what `hqmq-trt export` wrote.
        max_batch, max_context, prefill_chunk: see Session.
        threads: of ONNX Runtime; 0 leaves it the choice.
        provider: ``cpu``, or ``cuda`` for the first GPU (needs onnxruntime-gpu): the cache then lies there, and
            tokens, lengths and logits travel.

    Raises:
        HqmqError: a folder that is not ours or damaged, a missing library or provider, a model ONNX Runtime refuses,
            or no room on the GPU.
    """

    def __init__(
        self,
        folder: str | Path,
        max_batch: int = 1,
        max_context: int = 2048,
        prefill_chunk: int = DEFAULT_PREFILL_CHUNK,
        threads: int = 0,
        provider: str = "cpu",
    ) -> None:
        super().__init__(folder, max_batch, max_context, prefill_chunk)
        self._path = self.folder / self.manifest.model_file
        self.manifest.verify_codebooks(self._path)
        self.provider = provider
        self._session = ort_library.session(self._path, ort_library.providers(provider), threads)
        tensor = DeviceTensor if provider == "cuda" else HostTensor
        self._cache: dict[str, HostTensor | DeviceTensor] = {
            name: tensor(spec) for name, spec in self.manifest.cache(max_batch, self.num_pages)
        }
        self._check_interface()
        self._bindings: dict[int, ort.IOBinding] = {}
        self._logits = np.empty(0, NUMPY_TYPE[self.manifest.logits_dtype])

    def cache_nbytes(self) -> dict[str, int]:
        """Bytes of the cache buffers by kind of tensor."""
        total: dict[str, int] = {}
        for name, buffer in self._cache.items():
            kind = name.rsplit(".", 1)[1]
            total[kind] = total.get(kind, 0) + buffer.nbytes
        return total

    def cache_buffers(self, layer: int, role: str) -> list[NDArray[Any]]:
        """The live buffers of one layer and role (``key`` or ``value``), in the order of format.cache_tensors.

        Raises:
            HqmqError: the cache is not in host memory.
        """
        buffers = []
        for name, tensor in self._cache.items():
            if isinstance(tensor, DeviceTensor):
                raise HqmqError("the cache lies on the GPU: use cache_arrays, which copies it")
            if name.startswith(f"{layer}.{role}."):
                buffers.append(tensor.array)
        return buffers

    def _read_cache(self, name: str, sequence: int, rows: int) -> NDArray[Any]:
        return self._cache[name].read(sequence, rows)

    def _write_cache(self, name: str, sequence: int, values: NDArray[Any]) -> None:
        self._cache[name].write(sequence, values)

    def model_sha256(self) -> str:
        """As Session.model_sha256."""
        return model_digest(self.manifest.files)

    def _check_interface(self) -> None:
        steps = {"input_ids", "past_length", "new_length", "logits_index"}
        found = {value.name for value in self._session.get_inputs()}
        wanted = steps | {f"past.{name}" for name in self._cache}
        if found != wanted:
            odd = sorted(found ^ wanted)
            raise HqmqError(f"{self._path}: its inputs differ from manifest.json at '{odd[0]}'; export the model again")

    def _run(
        self, input_ids: NDArray[np.int64], new_length: NDArray[np.int32], logits_index: NDArray[np.int64]
    ) -> Logits:
        batch, count = logits_index.shape
        shape = (batch, count, self.manifest.vocab_size)
        size = int(np.prod(shape))
        if self._logits.size < size:
            self._logits = np.empty(size, self._logits.dtype)
        binding = self._binding(batch)
        binding.bind_cpu_input("input_ids", input_ids)
        binding.bind_cpu_input("past_length", self.lengths[:batch].copy())
        binding.bind_cpu_input("new_length", new_length)
        binding.bind_cpu_input("logits_index", logits_index)
        logits_type = ONNX_TYPE[self.manifest.logits_dtype]
        binding.bind_output("logits", "cpu", 0, logits_type, shape, self._logits.ctypes.data)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:  # ONNX Runtime raises a type per status code, with no base of their own
            raise HqmqError(f"{self._path}: {_one_line(error)}") from error
        return widen(self._logits[:size].reshape(shape))

    def _binding(self, batch: int) -> ort.IOBinding:
        """Binding of the cache for sequences 0…batch-1, made once for each batch size."""
        if batch not in self._bindings:
            binding = self._session.io_binding()
            for name, spec in self.manifest.cache(batch, self.num_pages):
                place = self._cache[name].place(spec)
                binding.bind_input(f"past.{name}", *place)
                binding.bind_output(f"present.{name}", *place)
            binding.bind_output("present_length", "cpu")
            self._bindings[batch] = binding
        return self._bindings[batch]

    def present_pointers(self) -> dict[str, tuple[int, int]]:
        """Address of each cache tensor's buffer and of the output ONNX Runtime wrote in the last run, by name."""
        written = self._bindings[max(self._bindings)].get_outputs()  # in the order in which they were bound
        pairs = zip(self._cache.items(), written[: len(self._cache)], strict=True)
        return {name: (buffer.pointer, output.data_ptr()) for (name, buffer), output in pairs}


def _one_line(error: Exception) -> str:
    """ONNX Runtime's message without its status codes: the node that failed, and why."""
    text = str(error)
    if match := _NODE_ERROR.search(text):
        text = f"{match[1]} node '{match[2]}': {match[3]}"
    return " ".join(text.split())
