"""Broken model files are refused in one line that names the file, before llama.cpp sees them."""

from __future__ import annotations

import contextlib
import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

from paceline.engines.base import EngineError
from paceline.engines.gguf import read_header

STRING, ARRAY, UINT32 = 8, 9, 4


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def small_file(*, version: int = 3, tensors: int = 1, offset: int = 0) -> bytes:
    """A whole GGUF file with one tensor of 64 floats."""
    entries = [
        text("general.architecture") + struct.pack("<I", STRING) + text("tiny"),
        text("tiny.context_length") + struct.pack("<II", UINT32, 2048),
        text("tokenizer.ggml.tokens") + struct.pack("<IIQ", ARRAY, STRING, 2) + text("a") + text("b"),
    ]
    head = b"GGUF" + struct.pack("<IQQ", version, tensors, len(entries)) + b"".join(entries)
    head += text("weights") + struct.pack("<IQIQ", 1, 64, 0, offset)
    return head + bytes(-len(head) % 32) + bytes(256)


def write(folder: Path, data: bytes) -> Path:
    path = folder / "model.gguf"
    path.write_bytes(data)
    return path


def test_a_whole_file_is_read(tmp_path: Path) -> None:
    header = read_header(write(tmp_path, small_file()))
    assert header.train_context_tokens == 2048
    assert header.array_lengths == {"tokenizer.ggml.tokens": 2}


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "is no GGUF model file"),
        (b"PK\x03\x04 a zip file", "is no GGUF model file"),
        (b"GGUF", "cut short"),
        (small_file(version=99), "version is 99"),
        (small_file(version=3 << 24), "version is"),
        (small_file(tensors=2**60), "claims 1152921504606846976 tensors"),
        (small_file(tensors=0), "claims 0 tensors"),
        (small_file(offset=3), "not aligned"),
        (small_file(offset=2**40), "cut short"),
        (small_file()[:-1], "cut short"),
    ],
)
def test_a_broken_file_is_named_with_the_reason(tmp_path: Path, data: bytes, reason: str) -> None:
    path = write(tmp_path, data)
    with pytest.raises(EngineError, match=reason) as caught:
        read_header(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match=r"absent.gguf: there is no such model file"):
        read_header(tmp_path / "absent.gguf")
    with pytest.raises(EngineError, match="is a folder"):
        read_header(tmp_path)


@given(length=st.integers(0, len(small_file()) - 1))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_cut_anywhere_it_is_refused(tmp_path: Path, length: int) -> None:
    with pytest.raises(EngineError):
        read_header(write(tmp_path, small_file()[:length]))


@given(place=st.integers(4, len(small_file()) - 257), byte=st.integers(0, 255))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_with_any_byte_of_the_header_changed_it_is_read_or_refused(tmp_path: Path, place: int, byte: int) -> None:
    data = bytearray(small_file())
    data[place] = byte
    with contextlib.suppress(EngineError):
        read_header(write(tmp_path, bytes(data)))
