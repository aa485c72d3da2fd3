"""Arrays as bytes: what is written comes back, and anything else is one of three errors."""

from __future__ import annotations

import numpy as np
import pytest

from paceline.net.collective import ARRAY, array_parts, read_array


@pytest.mark.parametrize("kind", ["<f4", ">i8", "|u1", "|b1", "<c8", "<U3", "|S5", "<M8[s]"])
def test_a_type_comes_back(kind: str) -> None:
    array = np.zeros((2, 3), np.dtype(kind))
    read = read_array(b"".join(bytes(part) for part in array_parts(array)))
    assert (read.dtype, read.shape) == (array.dtype, array.shape)


# NumPy evaluates repeats and commas, and raises a SyntaxError where they are none.
@pytest.mark.parametrize("name", [b"(1,f4,f4", b"((f4,f4", b"f4,f4", b"O", b"|O8", b"\xff", b"<f4junk"])
def test_a_name_that_is_no_type_is_refused(name: bytes) -> None:
    with pytest.raises((ValueError, TypeError)):
        read_array(ARRAY.pack(name, 0) + bytes(64))
