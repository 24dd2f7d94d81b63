"""One reader of a GGUF file a load, and the package gguf as before afterwards."""

from __future__ import annotations

from pathlib import Path

import gguf
import pytest

from hqmq_trt.export.gguf_reading import reading_once


def write(path: Path, name: str) -> Path:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return path


def test_a_file_is_read_once(tmp_path: Path) -> None:
    one, two = write(tmp_path / "one.gguf", "first"), write(tmp_path / "two.gguf", "second")
    before = gguf.GGUFReader, gguf.get_tensor_name_map
    with reading_once():
        reader = gguf.GGUFReader(one)
        assert gguf.GGUFReader(one) is reader
        other = gguf.GGUFReader(two)
        assert [r.fields["general.name"].contents() for r in (reader, other)] == ["first", "second"]
        names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2)
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 2) is names
        assert gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 3) is not names
    assert (gguf.GGUFReader, gguf.get_tensor_name_map) == before


def test_the_package_is_restored_after_an_error(tmp_path: Path) -> None:
    before = gguf.GGUFReader
    with pytest.raises(FileNotFoundError), reading_once():
        gguf.GGUFReader(tmp_path / "absent.gguf")
    assert gguf.GGUFReader is before
