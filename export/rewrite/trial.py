"""Trying the model itself: the rows of a call must not know of each other but through the cache.

The new graph takes sequences of different lengths, padded, and prompts in chunks. That is sound only for a decoder
whose every row depends on its own token, its position and the cache; a node that mixes rows in another way (a
convolution, a norm over tokens, state that is not in the cache) shows here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
from numpy.typing import NDArray

from hqmq_trt.errors import HqmqError

from .evaluate import Case, _as
from .interface import Interface
from .layer import Layer

_TOKENS, _FIRST = 7, 4


def try_rows(path: Path, interface: Interface, layers: list[Layer]) -> None:
    """Run the model at `path` whole, in chunks, and with other neighbours in its batch.

    A model that runs for one sequence only is tried with one. Models in bfloat16 are not tried: ONNX Runtime's CPU
    kernels do not run them.

    Raises:
        HqmqError: ONNX Runtime cannot run the model, or rows depend on each other.
    """
    if interface.past[0].dtype == ir.DataType.BFLOAT16:
        return
    run = _Model(path, interface, {id(j.past): str(j.full.name) for x in layers for j in (x.key, x.value)})
    vocabulary = int(interface.logits.shape[2])
    ids = np.random.default_rng(0).integers(0, vocabulary, (2, _TOKENS))
    ids[1, :2] = ids[0, :2]
    try:
        whole, _ = run(ids, {})
    except HqmqError:  # exporters' rotary embeddings without position_ids work for one sequence only
        ids = ids[:1]
        whole, _ = run(ids, {})
    limit = (2e-2 if interface.past[0].dtype == ir.DataType.FLOAT16 else 1e-3) * max(float(np.abs(whole).max()), 1e-3)
    first, cache = run(ids[:, :_FIRST], {})
    rest, _ = run(ids[:, _FIRST:], cache)
    alone, _ = run(ids[:1], {})
    parts = np.concatenate([first, rest], 1)
    for what, off in (
        ("a prompt in two parts gives other logits than in one", np.abs(parts - whole).max()),
        ("a sequence gives other logits alone than in a batch", np.abs(alone - whole[:1]).max()),
    ):
        if not float(off) <= limit:
            raise HqmqError(f"{what} (they differ by {float(off):.2g}): the model keeps state outside its cache")


class _Model:
    def __init__(self, path: Path, interface: Interface, full: dict[int, str]) -> None:
        self._interface = interface
        options = ort.SessionOptions()
        options.log_severity_level = 4
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        options.add_session_config_entry("session.disable_prepacking", "1")  # it would copy the weights
        try:
            self._session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime raises a type per status code
            raise HqmqError(f"ONNX Runtime cannot load it: {' '.join(str(error).split())[:240]}") from error
        self._given = {value.name for value in self._session.get_inputs()}
        outputs = {value.name for value in interface.present}
        self._present = {str(past.name): full[id(past)] for past in interface.past if full[id(past)] in outputs}
        if len(self._present) != len(interface.past):  # renamed on the way out
            order = [str(value.name) for value in interface.present]
            self._present = {str(past.name): name for past, name in zip(interface.past, order, strict=True)}

    def __call__(self, ids: NDArray[Any], cache: dict[str, Any]) -> tuple[NDArray[Any], dict[str, Any]]:
        """Logits [B, T, V] and the cache after a call."""
        face = self._interface
        held = next(iter(cache.values())).shape[2] if cache else 0
        case = Case(len(ids), ids.shape[1], held)
        slots = np.arange(held, held + ids.shape[1])
        feed: dict[str, Any] = {str(face.ids.name): _as(ids, face.ids.dtype)}
        for value, array in ((face.mask, case.mask), (face.positions, case.positions), (face.slots, slots)):
            if value is not None:
                feed[str(value.name)] = _as(array, value.dtype)
        for past in face.past:
            empty = np.zeros((len(ids), past.shape[1], 0, past.shape[3]), np.float32)
            feed[str(past.name)] = cache.get(str(past.name), _as(empty, past.dtype))
        feed = {name: array for name, array in feed.items() if name in self._given}
        names = [str(face.logits.name), *self._present.values()]
        try:
            logits, *present = self._session.run(names, feed)
        except Exception as error:  # see __init__
            raise HqmqError(f"ONNX Runtime cannot run it: {' '.join(str(error).split())[:240]}") from error
        return np.asarray(logits, np.float32), dict(zip(self._present, present, strict=True))
