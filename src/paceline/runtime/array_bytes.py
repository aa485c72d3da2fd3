"""NumPy arrays as bytes, for the groups that send them."""

from __future__ import annotations

import re
import struct

import numpy as np

from paceline.engines.group import Array

MAX_PAYLOAD_BYTES = 1 << 30
"""For one member in one collective."""
ALIGNMENT_BYTES = 16
"""Elements begin at a multiple of this after the payload's first byte: NumPy copies what is not aligned."""

# The type's name, the number of dimensions; the shape follows.
ARRAY = struct.Struct("<8sB")


PLAIN_TYPE = re.compile(r"[<>|=][a-zA-Z]\d{1,6}(\[\w+\])?")


def array_parts(array: Array) -> list[bytes | memoryview]:
    """An array as bytes: its type and shape, then its elements. Raises ValueError for an array of objects."""
    if array.dtype.hasobject:
        raise ValueError("arrays of Python objects cannot be sent")
    flat = np.ascontiguousarray(array)
    head = ARRAY.pack(flat.dtype.str.encode(), flat.ndim) + struct.pack(f"<{flat.ndim}Q", *flat.shape)
    head += bytes(-len(head) % ALIGNMENT_BYTES)
    return [head, flat.reshape(-1).view(np.uint8).data if flat.size else b""]


def read_array(payload: bytes | memoryview) -> Array:
    """The array that `array_parts` wrote, over the same memory.

    Raises ValueError, TypeError or struct.error on anything else.
    """
    name, dimensions = ARRAY.unpack_from(payload)
    shape = struct.unpack_from(f"<{dimensions}Q", payload, ARRAY.size)
    named = name.rstrip(b"\0").decode("ascii")
    # NumPy would evaluate more than names.
    if not PLAIN_TYPE.fullmatch(named):
        raise ValueError(f"{named!r} is no type of an array")
    kind = np.dtype(named)
    if kind.hasobject:
        raise ValueError("an array of Python objects")
    head = ARRAY.size + 8 * dimensions
    return np.frombuffer(payload, kind, offset=head + -head % ALIGNMENT_BYTES).reshape(shape)
