"""A GGUF file's header: enough to name the model, and to refuse a broken file before llama.cpp reads it.

llama.cpp ends the whole process on some broken files (an assertion is `abort()`), and a rank that dies
with a core dump tells its user nothing. So everything that can be known from the header is checked here
first: that every length and count stays inside the file, and that the file is long enough for every
tensor. Only the header is read, through a memory map: 60 ms for a vocabulary of 262,144 tokens.

Format: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import mmap
import os
import struct
from pathlib import Path

from msgspec import Struct

from paceline.engines.base import EngineError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_ENTRIES = 1_000_000
MAX_NAME_BYTES = 65_535
MAX_TENSOR_DIMENSIONS = 4
DEFAULT_ALIGNMENT = 32

SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
"""GGUF value type -> struct code."""
STRING = 8
ARRAY = 9

# Values in a block and bytes of it. Tensors of types that came later are checked by their offset alone.
BLOCKS: dict[int, tuple[int, int]] = {
    0: (1, 4), 1: (1, 2), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24), 8: (32, 34), 9: (32, 36),
    10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 15: (256, 292),
    16: (256, 66), 17: (256, 74), 18: (256, 98), 19: (256, 50), 20: (32, 18), 21: (256, 110), 22: (256, 82),
    23: (256, 136), 24: (1, 1), 25: (1, 2), 26: (1, 4), 27: (1, 8), 28: (1, 8), 29: (256, 56), 30: (1, 2),
}  # fmt: skip


class GGUFHeader(Struct, frozen=True):
    """What a GGUF file says of itself. `metadata`: its scalars and strings; of an array, its length."""

    metadata: dict[str, str | int | float | bool]
    array_lengths: dict[str, int]

    def text(self, key: str) -> str | None:
        """A string of the metadata, or None."""
        value = self.metadata.get(key)
        return value if isinstance(value, str) else None

    def own(self, key: str) -> str | int | float | bool | None:
        """What the metadata says of the model's architecture."""
        return self.metadata.get(f"{self.text('general.architecture')}.{key}")

    @property
    def train_context_tokens(self) -> int:
        """Tokens of context that the model was made for, 0 where the file does not say."""
        value = self.own("context_length")
        return value if isinstance(value, int) else 0


class _Broken(Exception):
    pass


def read_header(path: Path) -> GGUFHeader:
    """The header of the file, checked against the file's length. Raises EngineError naming the file."""
    try:
        if not path.exists():
            raise EngineError(f"{path}: there is no such model file")
        if not path.is_file():
            raise EngineError(f"{path}: is a {'folder' if path.is_dir() else 'special file'}, no GGUF model file")
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size == 0 or file.read(4) != MAGIC:
                raise EngineError(f"{path}: is no GGUF model file")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                return _Reader(data, size).header()
    except OSError as error:
        raise EngineError(f"{path}: cannot be read: {error.strerror}") from None
    except _Broken as error:
        raise EngineError(f"{path}: is a broken GGUF file: {error}") from None


class _Reader:
    def __init__(self, data: mmap.mmap, size: int) -> None:
        self._data = data
        self._size = size
        self._at = len(MAGIC)

    def header(self) -> GGUFHeader:
        version = self._number("I")
        if version not in VERSIONS:
            raise _Broken(f"its version is {version}; versions 2 and 3 are known")
        tensors, entries = self._number("Q"), self._number("Q")
        if not 0 < tensors <= MAX_ENTRIES or entries > MAX_ENTRIES:
            raise _Broken(f"it claims {tensors} tensors and {entries} metadata entries")
        metadata: dict[str, str | int | float | bool] = {}
        lengths: dict[str, int] = {}
        for _ in range(entries):
            key = self._string(MAX_NAME_BYTES)
            kind = self._number("I")
            if kind == ARRAY:
                lengths[key] = self._skip_array()
            else:
                metadata[key] = self._value(kind)
        if not isinstance(metadata.get("general.architecture"), str):
            raise _Broken("it does not name its architecture")
        if not lengths.get("tokenizer.ggml.tokens"):
            raise _Broken("it has no vocabulary")
        alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
        if not isinstance(alignment, int) or alignment <= 0 or alignment & (alignment - 1):
            raise _Broken(f"its alignment is {alignment}")
        self._check_tensors(tensors, alignment)
        return GGUFHeader(metadata, lengths)

    def _check_tensors(self, count: int, alignment: int) -> None:
        ends: list[tuple[str, int]] = []
        for _ in range(count):
            name = self._string(MAX_NAME_BYTES)
            dimensions = self._number("I")
            if not 0 < dimensions <= MAX_TENSOR_DIMENSIONS:
                raise _Broken(f"tensor {name!r} has {dimensions} dimensions")
            values = 1
            for _ in range(dimensions):
                values *= self._number("Q")
            kind, offset = self._number("I"), self._number("Q")
            if offset % alignment:
                raise _Broken(f"tensor {name!r} is not aligned")
            block, block_bytes = BLOCKS.get(kind, (1, 0))
            ends.append((name, offset + -(-values // block) * block_bytes))
        begin = -(-self._at // alignment) * alignment
        name, end = max(ends, key=lambda item: item[1])
        if begin + end > self._size:
            raise _Broken(f"it has {self._size} bytes where tensor {name!r} ends at {begin + end}: cut short")

    def _skip_array(self) -> int:
        kind, length = self._number("I"), self._number("Q")
        if kind in SCALARS:
            self._advance(length * struct.calcsize("<" + SCALARS[kind]))
        elif kind == STRING:
            self._skip_strings(length)
        elif kind == ARRAY:
            for _ in range(min(length, MAX_ENTRIES)):
                self._skip_array()
        else:
            raise _Broken(f"an array has values of the unknown type {kind}")
        return int(length)

    def _skip_strings(self, count: int) -> None:
        # A vocabulary has a quarter of a million strings: a loop without calls of our own.
        at, data, last = self._at, self._data, self._size - 8
        unpack = struct.Struct("<Q").unpack_from
        for _ in range(count):
            if at > last:
                raise _Broken(f"it ends inside its header, after {self._size} bytes: cut short")
            at += 8 + unpack(data, at)[0]
        self._at = at
        self._advance(0)

    def _value(self, kind: int) -> str | int | float | bool:
        if kind == STRING:
            return self._string(self._size)
        if kind not in SCALARS:
            raise _Broken(f"a value has the unknown type {kind}")
        value: int | float | bool = self._scalar(SCALARS[kind])
        return value

    def _string(self, longest: int) -> str:
        length = self._number("Q")
        if length > longest:
            raise _Broken(f"a name has {length} bytes")
        begin = self._at
        self._advance(length)
        return self._data[begin : self._at].decode("utf-8", "replace")

    def _number(self, code: str) -> int:
        return int(self._scalar(code))

    def _scalar(self, code: str) -> int | float | bool:
        begin = self._at
        self._advance(struct.calcsize("<" + code))
        value: int | float | bool = struct.unpack_from("<" + code, self._data, begin)[0]
        return value

    def _advance(self, count: int) -> None:
        self._at += count
        if self._at > self._size:
            raise _Broken(f"it ends inside its header, after {self._size} bytes: cut short")
