"""The GPU side of a TrtSession: engine, execution contexts, buffers and CUDA graphs."""

from __future__ import annotations

import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hqmq_trt.engine.manifest import DECODE_PROFILE, LOGITS_SUM, PREFILL_PROFILE, EngineManifest
from hqmq_trt.errors import HqmqError
from hqmq_trt.manifest import Manifest
from hqmq_trt.runtime.cuda_driver import Device, Graph
from hqmq_trt.runtime.trt_buffers import CacheArena, StepInputs, StepOutputs
from hqmq_trt.runtime.trt_engine import load_engine, take_errors, tensorrt

STEP_INPUTS = ("input_ids", "past_length", "new_length", "logits_index")


class TrtExecutor:
    """Runs an engine on one stream. All contexts share one block of working memory, as runs never overlap.

    TensorRT wants one context for each captured graph: decode has one for every batch size that occurs, made at
    its first step; prefill has one, bound anew when the batch changes.

    Attributes:
        device, arena: where it runs, and the cache.
        sums: float32 [B, N], sums over the vocabulary of the logits that the last run brought to the host; overwritten
            by the next.
        wait_seconds: time spent waiting for the GPU so far.
        prepared: decode contexts made and graphs captured so far.

    Raises:
        HqmqError: see load_engine; too little device memory; an engine whose tensors are not the manifest's.
    """

    def __init__(
        self,
        folder: Path,
        limits: EngineManifest,
        manifest: Manifest,
        max_batch: int,
        num_pages: int,
        device: int,
        cuda_graph: bool,
        verify: bool,
    ) -> None:
        self._folder, self._vocab, self._cuda_graph = folder, manifest.vocab_size, cuda_graph
        self.device = Device.get(device)
        self._runtime, self._engine = load_engine(folder, limits, self.device, verify)
        self._decode_contexts: dict[int, Any] = {}
        self._graphs: dict[tuple[int, bool], Graph] = {}
        self._memory: dict[str, Any] = {}
        self._many_rows: StepOutputs | None = None
        self.sums: NDArray[np.float32] = np.empty((0, 0), np.float32)
        self._sizes: dict[str, int] = {}
        self._prefill: Any = None
        self._prefill_batch = 0
        self.wait_seconds, self.prepared = 0.0, 0
        self.closed = False
        try:
            with self.device:
                self.stream = self.device.stream()
                self.arena = CacheArena(self.device, self.stream, manifest.cache(max_batch, num_pages))
                self._check_interface()
                chunk = limits.prefill_chunk
                self._decode_inputs = StepInputs(self.device, max_batch, 1, 1)
                self._prefill_inputs = StepInputs(self.device, max_batch, chunk, chunk)
                self._outputs = StepOutputs(self.device, max_batch, self._vocab, "the logits", pinned=True)
                self._allocate("working memory", self._engine.device_memory_size_v2)
                self._allocate("lengths", 4 * max_batch)
                self._prefill = self._context(PREFILL_PROFILE)
        except self.device.driver.Error as error:
            self.close()
            raise HqmqError(f"{folder}: {self.device.failure(error)}") from error
        except BaseException:
            self.close()
            raise

    def decode(
        self, ids: NDArray[Any], past: NDArray[Any], new: NDArray[Any], to_host: bool
    ) -> NDArray[Any] | tuple[int, tuple[int, ...]]:
        """One token of each sequence: logits [B, 1, V] in pinned memory that the next run overwrites, or their
        device address and shape. ids [B, 1], past and new [B]."""
        batch = len(past)
        host = self._inputs(self._decode_inputs)
        host["input_ids"][:batch] = ids[:, 0]
        host["past_length"][:batch] = past
        host["new_length"][:batch] = new
        key = (batch, to_host)
        graph = self._graphs.get(key)
        try:
            with self.device:
                if graph is not None:
                    graph.launch()
                    self._wait()
                else:
                    self._first_decode(key)
        except self.device.driver.Error as error:
            raise HqmqError(f"{self._folder}: {self.device.failure(error)}") from error
        if not to_host:
            return self._outputs.address["logits"], (batch, 1, self._vocab)
        return self._first_rows(batch)

    def prefill(
        self, ids: NDArray[Any], past: NDArray[Any], new: NDArray[Any], index: NDArray[Any], to_host: bool
    ) -> NDArray[Any] | tuple[int, tuple[int, ...]]:
        """Any number of tokens ids [B, T] up to the engine's chunk: logits of the rows index [B, N], as `decode`."""
        inputs, (batch, count) = self._prefill_inputs, index.shape
        host = self._inputs(inputs)
        for name, values in zip(STEP_INPUTS, (ids, past, new, index), strict=True):
            host[name][: values.size] = values.ravel()
        shape = (batch, count, self._vocab)
        try:
            with self.device:
                outputs = self._outputs if count == 1 else self._outputs_of(batch * count)
                if self._prefill_batch != batch:
                    self._prefill_batch = 0
                    self._bind(self._prefill, inputs, batch)
                    self._prefill_batch = batch
                self._shapes(self._prefill, batch, ids.shape[1], count)
                self._bind_outputs(self._prefill, outputs)
                inputs.upload(self.stream)
                self._call(self._prefill.execute_async_v3(self.stream.handle), "run the engine")
                if not to_host:
                    self._wait()
                    return outputs.address["logits"], shape
                if count == 1:
                    outputs.download(self.stream, batch)
                    self._wait()
                    return self._first_rows(batch)
                self.sums, out = np.empty((batch, count), np.float32), np.empty(shape, np.float32)
                outputs.download_to(self.stream, self.sums, out)
                self._wait()
                return out
        except self.device.driver.Error as error:
            raise HqmqError(f"{self._folder}: {self.device.failure(error)}") from error

    def download(self, address: int, shape: Sequence[int], dtype: Any) -> NDArray[Any]:
        """Host copy of contiguous device memory."""
        if self.closed:
            raise HqmqError(f"{self._folder}: the session is closed; open it again")
        out = np.empty(tuple(shape), dtype)
        with self.device:
            if out.size:
                self.device.driver.memcpy_dtoh(out, address)
        return out

    def device_bytes(self) -> dict[str, int]:
        """Device memory this session allocated itself, by use; TensorRT holds the weights besides."""
        many = {} if self._many_rows is None else {"logits of many rows": self._many_rows.nbytes}
        return {"cache": self.arena.nbytes, "logits": self._outputs.nbytes, **many, **self._sizes}

    def addresses(self, batch: int) -> dict[str, tuple[int, int]]:
        """Address bound to past.* and present.* of each cache tensor in the decode context of a batch size."""
        context = self._decode_contexts[batch]
        return {
            name: (context.get_tensor_address(f"past.{name}"), context.get_tensor_address(f"present.{name}"))
            for name in self.arena.address
        }

    def close(self) -> None:
        """Free everything; a second call does nothing."""
        if self.closed:
            return
        self.closed = True
        with self.device:
            for graph in self._graphs.values():
                graph.close()
            self._graphs.clear()
            # Contexts before their engine, the engine before its runtime.
            self._decode_contexts.clear()
            self._prefill = None
            self._engine = None
            self._runtime = None
            for part in ("arena", "_decode_inputs", "_prefill_inputs", "_outputs", "_many_rows"):
                if (block := getattr(self, part, None)) is not None:
                    block.free()
            for name in list(self._memory):
                self._free(name)
            self.sums = np.empty((0, 0), np.float32)
            self.stream = None

    def _inputs(self, inputs: StepInputs) -> dict[str, NDArray[Any]]:
        if self.closed:
            raise HqmqError(f"{self._folder}: the session is closed; open it again")
        return inputs.host

    def _first_decode(self, key: tuple[int, bool]) -> None:
        batch, to_host = key
        context = self._decode_contexts.get(batch)
        if context is None:
            context = self._context(DECODE_PROFILE)
            self._bind(context, self._decode_inputs, batch)
            self._shapes(context, batch, 1, 1)
            self._bind_outputs(context, self._outputs)
            self._decode_contexts[batch] = context
            self.prepared += 1
        enqueue = partial(self._enqueue_decode, context, batch, to_host)
        enqueue()  # TensorRT prepares itself in the first run after a change of shapes, which cannot be captured
        self._wait()
        if self._cuda_graph:
            self._graphs[key] = Graph(self.device, self.stream, enqueue)
            self.prepared += 1

    def _enqueue_decode(self, context: Any, batch: int, to_host: bool) -> None:
        self._decode_inputs.upload(self.stream)
        self._call(context.execute_async_v3(self.stream.handle), "run the engine")
        if to_host:
            self._outputs.download(self.stream, batch)

    def _first_rows(self, batch: int) -> NDArray[np.float32]:
        """Logits [B, 1, V] that lie in pinned memory, and `sums` with them."""
        sums, logits = self._outputs.sums, self._outputs.logits
        assert sums is not None
        assert logits is not None
        self.sums = sums[:batch, None]
        return logits[:batch, None]

    def _outputs_of(self, rows: int) -> StepOutputs:
        """Device memory for that many rows of logits, kept until more are asked for."""
        if self._many_rows is None or self._many_rows.rows < rows:
            if self._many_rows is not None:
                self._many_rows.free()
                self._many_rows = None
            self._many_rows = StepOutputs(self.device, rows, self._vocab, "the logits of many rows", pinned=False)
        return self._many_rows

    def _wait(self) -> None:
        start = time.perf_counter()
        self.stream.synchronize()
        self.wait_seconds += time.perf_counter() - start

    def _context(self, profile: int) -> Any:
        strategy = tensorrt().ExecutionContextAllocationStrategy.USER_MANAGED
        context = self._engine.create_execution_context(strategy)
        if context is None:
            raise HqmqError(f"{self._folder}: TensorRT cannot make an execution context ({take_errors()})")
        self._call(context.set_optimization_profile_async(profile, self.stream.handle), "select a profile")
        self.stream.synchronize()
        context.set_device_memory(int(self._memory["working memory"]), self._sizes["working memory"])
        return context

    def _bind(self, context: Any, inputs: StepInputs, batch: int) -> None:
        """Bind everything but logits and their sums; the front of each cache tensor for sequences 0…batch-1."""
        for name, address in self.arena.address.items():
            shape = (batch, *self.arena.specs[name].shape[1:])
            self._call(context.set_input_shape(f"past.{name}", shape), f"give past.{name} the shape {shape}")
            for end in ("past", "present"):
                self._call(context.set_tensor_address(f"{end}.{name}", address), f"bind {end}.{name}")
        for name, address in inputs.address.items():
            self._call(context.set_tensor_address(name, address), f"bind {name}")
        self._call(context.set_tensor_address("present_length", int(self._memory["lengths"])), "bind present_length")

    def _bind_outputs(self, context: Any, outputs: StepOutputs) -> None:
        for name, address in outputs.address.items():
            self._call(context.set_tensor_address(name, address), f"bind {name}")

    def _shapes(self, context: Any, batch: int, tokens: int, rows: int) -> None:
        shapes = ((batch, tokens), (batch,), (batch,), (batch, rows))
        for name, shape in zip(STEP_INPUTS, shapes, strict=True):
            self._call(context.set_input_shape(name, shape), f"give {name} the shape {shape}")

    def _call(self, done: bool, action: str) -> None:
        if not done:
            raise HqmqError(f"{self._folder}: TensorRT could not {action} ({take_errors()})")

    def _allocate(self, what: str, nbytes: int) -> None:
        nbytes = max(int(nbytes), 1)
        self._memory[what] = self.device.allocate(nbytes, f"the {what}")
        self._sizes[what] = nbytes

    def _free(self, what: str) -> None:
        self._sizes.pop(what, None)
        if what in self._memory:
            self._memory.pop(what).free()

    def _check_interface(self) -> None:
        """Compare the engine's tensors with the manifest's."""
        engine, trt = self._engine, tensorrt()
        io_names = [engine.get_tensor_name(i) for i in range(engine.num_io_tensors)]
        found = {name: engine.get_tensor_dtype(name) for name in io_names}
        types = {"int32": trt.DataType.INT32, "float16": trt.DataType.HALF}
        cache = self.arena.specs.items()
        wanted = {f"{end}.{name}": types[spec.dtype] for name, spec in cache for end in ("past", "present")}
        wanted |= {"input_ids": trt.DataType.INT64, "logits_index": trt.DataType.INT64}
        wanted |= dict.fromkeys(("past_length", "new_length", "present_length"), trt.DataType.INT32)
        wanted |= dict.fromkeys(("logits", LOGITS_SUM), trt.DataType.FLOAT)
        odd = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if odd:
            raise HqmqError(
                f"{self._folder}: the engine's tensor '{odd[0]}' is missing, unknown or of another type than the "
                "manifest says; build the engine again"
            )
