"""A stand-in for ONNX Runtime's C API: what libhqmq_ort registers, and what it says to nodes, without a GPU build."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import CFUNCTYPE, POINTER, Structure, byref, c_char_p, c_float, c_int, c_int64, c_size_t, c_uint32, c_void_p
from pathlib import Path
from typing import Any

API_VERSION = 18
TABLE_SIZE = 300
_OP_FIELDS = (
    *("CreateKernel", "GetName", "GetExecutionProviderType", "GetInputType", "GetInputTypeCount", "GetOutputType"),
    *("GetOutputTypeCount", "KernelCompute", "KernelDestroy", "GetInputCharacteristic", "GetOutputCharacteristic"),
    *("GetInputMemoryType", "GetVariadicInputMinArity", "GetVariadicInputHomogeneity", "GetVariadicOutputMinArity"),
    *("GetVariadicOutputHomogeneity", "CreateKernelV2"),
)


class CustomOp(Structure):
    """The front part of OrtCustomOp."""

    _fields_ = [("version", c_uint32), *((name, c_void_p) for name in _OP_FIELDS)]

    def text(self, function: str) -> str:
        """What a function without arguments says."""
        said = CFUNCTYPE(c_char_p, POINTER(CustomOp))(getattr(self, function))(byref(self))
        return str(said.decode())


class Api(Structure):
    """OrtApiBase."""

    _fields_ = [("get_api", c_void_p), ("get_version", c_void_p)]


class StubRuntime:
    """Registers a library's operators and makes kernels of nodes that have given attributes.

    A Status is a number here: index + 1 of its message in `messages`.
    """

    def __init__(self, library: Path, version: str = "1.99") -> None:
        self.library, self.version = ctypes.CDLL(str(library)), ctypes.create_string_buffer(version.encode())
        self.ops: list[CustomOp] = []
        self.messages: list[str] = []
        self.attributes: dict[str, float] = {}
        self.counts = (0, 0)
        self._table = (c_void_p * TABLE_SIZE)()
        self._keep: list[Any] = []
        self._fill()

    def _function(self, index: int, arguments: list[Any], body: Callable[..., int | None]) -> None:
        function = CFUNCTYPE(c_void_p, *arguments)(lambda *given: body(*given))
        self._keep.append(function)
        self._table[index] = ctypes.cast(function, c_void_p).value

    def _fail(self, text: str) -> int:
        self.messages.append(text)
        return len(self.messages)

    def _fill(self) -> None:
        def add(_: int, op: Any) -> None:
            self.ops.append(op.contents)

        def attribute(_: int, name: bytes, out: Any) -> int | None:
            if name.decode() not in self.attributes:
                return self._fail("no such attribute")
            out[0] = self.attributes[name.decode()]
            return None

        def count(which: int) -> Callable[..., None]:
            def answer(_: int, out: Any) -> None:
                out[0] = self.counts[which]

            return answer

        def domain(name: bytes, out: Any) -> None:
            out[0] = 1

        def node_name(_: int, out: Any, size: Any) -> None:
            ctypes.memmove(out, b"layer0\0", 7)
            size[0] = 7

        self._function(0, [c_int, c_char_p], lambda _, text: self._fail(text.decode()))
        self._function(26, [c_char_p, POINTER(c_void_p)], domain)
        self._function(27, [c_void_p, POINTER(CustomOp)], add)
        self._function(28, [c_void_p, c_void_p], lambda *_: None)
        self._function(85, [c_void_p, c_char_p, POINTER(c_float)], attribute)
        self._function(86, [c_void_p, c_char_p, POINTER(c_int64)], attribute)
        self._function(93, [c_void_p], lambda _: None)
        self._function(230, [c_void_p, POINTER(c_size_t)], count(0))
        self._function(231, [c_void_p, POINTER(c_size_t)], count(1))
        self._function(244, [c_void_p, c_void_p, POINTER(c_size_t)], node_name)

    def _address(self, kind: Any, body: Callable[..., Any]) -> int | None:
        function = kind(body)
        self._keep.append(function)
        return ctypes.cast(function, c_void_p).value

    def register(self, newest: int = 24) -> str:
        """Call RegisterCustomOps of a runtime that knows API versions up to `newest`; the error or nothing."""
        table = ctypes.addressof(self._table)
        base = Api(
            self._address(CFUNCTYPE(c_void_p, c_uint32), lambda version: table if version <= newest else None),
            self._address(CFUNCTYPE(c_void_p), lambda: ctypes.addressof(self.version)),
        )
        self._keep.append(base)
        self.library.RegisterCustomOps.restype = c_void_p
        return self._text(self.library.RegisterCustomOps(None, byref(base)))

    def make_kernel(self, name: str, provider: str, inputs: int, outputs: int, attributes: dict[str, Any]) -> str:
        """Make (and forget) the kernel of a node; the error or nothing."""
        self.attributes = {key: value for key, value in attributes.items() if not isinstance(value, str)}
        self.counts = (inputs, outputs)
        op = next(
            op for op in self.ops if (op.text("GetName"), op.text("GetExecutionProviderType")) == (name, provider)
        )
        create = CFUNCTYPE(c_void_p, POINTER(CustomOp), c_void_p, c_void_p, POINTER(c_void_p))(op.CreateKernelV2)
        kernel = c_void_p()
        return self._text(create(byref(op), None, None, byref(kernel)))

    def _text(self, status: int | None) -> str:
        return self.messages[status - 1] if status else ""
