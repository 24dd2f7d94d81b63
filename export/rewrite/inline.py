"""ONNX files whose weights lie inside them, read without those weights.

A parser of protobuf holds the whole file and a copy of it. Here the large tensors of the graph become external tensors
that point into the file itself.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import onnx

LARGE = 64 << 10
"""Bytes of a tensor from which it stays in the file."""

# Field numbers of onnx.proto: of ModelProto, GraphProto and TensorProto.
_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5


def read_light(path: Path) -> onnx.ModelProto:
    """The model of an ONNX file; raw data of LARGE bytes and more is external, at its place in the file itself.

    Raises:
        ValueError: the file is no protobuf message. (What onnx raises for other messages comes through.)
    """
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        light = bytearray()
        for field, start, first, end in _fields(data, 0, len(data)):
            light += _message(_GRAPH, _graph(data, first, end, path.name)) if field == _GRAPH else data[start:end]
    model = onnx.ModelProto()
    model.ParseFromString(bytes(light))
    return model


def _graph(data: mmap.mmap, start: int, end: int, location: str) -> bytes:
    light = bytearray()
    for field, at, first, last in _fields(data, start, end):
        if field == _INITIALIZER and last - first >= LARGE:
            light += _message(_INITIALIZER, _tensor(data, first, last, location))
        else:
            light += data[at:last]
    return bytes(light)


def _tensor(data: mmap.mmap, start: int, end: int, location: str) -> bytes:
    light, raw = bytearray(), None
    for field, at, first, last in _fields(data, start, end):
        if field == _RAW_DATA:
            raw = (first, last - first)
        else:
            light += data[at:last]
    if raw is None:  # its elements are in a field of their type
        return data[start:end]
    tensor = onnx.TensorProto()
    tensor.ParseFromString(bytes(light))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    for key, value in zip(("location", "offset", "length"), (location, *map(str, raw)), strict=True):
        tensor.external_data.add(key=key, value=value)
    return tensor.SerializeToString()


def _fields(data: mmap.mmap, start: int, end: int) -> Iterator[tuple[int, int, int, int]]:
    """(number, place of the field, place of its contents, its end) of the fields of a message."""
    at = start
    while at < end:
        tag, first = _varint(data, at, end)
        kind = tag & 7
        if kind == _VARINT:
            _, last = _varint(data, first, end)
        elif kind == _LENGTH:
            length, first = _varint(data, first, end)
            last = first + length
        elif kind in (_FIXED64, _FIXED32):
            last = first + (8 if kind == _FIXED64 else 4)
        else:
            raise ValueError(f"no protobuf message: field of kind {kind} at byte {at}")
        if last > end:
            raise ValueError(f"cut off: the field at byte {at} ends at {last}, its message at {end}")
        yield tag >> 3, at, first, last
        at = last


def _varint(data: mmap.mmap, at: int, end: int) -> tuple[int, int]:
    """(number, where it ends)."""
    value = shift = 0
    while at < end and shift < 64:
        byte = data[at]
        value |= (byte & 127) << shift
        at += 1
        if byte < 128:
            return value, at
        shift += 7
    raise ValueError(f"cut off, or no protobuf message, at byte {at}")


def _message(field: int, content: bytes) -> bytes:
    head, size = bytearray([field << 3 | _LENGTH]), len(content)
    while size >= 128:
        head.append(size & 127 | 128)
        size >>= 7
    head.append(size)
    return bytes(head) + content
