"""Bit for bit: a row's result is the same in any company, and close to what textbooks say."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings, strategies as st

from paceline.engines.moe_model import MOST_ELEMENTS, Floats, attend, normalise, rows_times, softmax
from tests.pace import examples

RANDOM = np.random.default_rng(1)


def floats(*shape: int) -> Floats:
    return RANDOM.standard_normal(shape, np.float32)


ROWS = floats(70, 64)
MATRICES = [floats(64, columns) for columns in (8, 64, 128, 258)]


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda matrix: str(matrix.shape[1]))
@given(chosen=st.lists(st.integers(0, 69), max_size=70))
@settings(max_examples=examples(30))
def test_row_does_not_depend_on_its_company(matrix: Floats, chosen: list[int]) -> None:
    every = rows_times(ROWS, matrix)
    assert np.array_equal(rows_times(ROWS[chosen], matrix), every[chosen])
    assert np.array_equal(softmax(normalise(every))[chosen], softmax(normalise(every[chosen])))


@pytest.mark.parametrize("matrix", MATRICES, ids=lambda matrix: str(matrix.shape[1]))
def test_product(matrix: Floats) -> None:
    assert np.allclose(rows_times(ROWS, matrix), ROWS @ matrix, atol=1e-4)
    assert rows_times(ROWS[:0], matrix).shape == (0, matrix.shape[1])


def test_normalise_and_softmax() -> None:
    assert np.allclose((normalise(ROWS) ** 2).mean(axis=1), 1, atol=1e-4)
    assert np.allclose(softmax(ROWS).sum(axis=1), 1)
    assert np.isfinite(softmax(np.float32([[1e30, -1e30, 0]]))).all()


@pytest.mark.parametrize("positions", [1, 2, 511, 512, 513, 2000])
def test_attention(positions: int) -> None:
    # 16 numbers a head: from 513 positions on it is done in blocks.
    assert MOST_ELEMENTS // 16 == 512
    query, keys, values = floats(4, 16), floats(4, positions, 16), floats(4, positions, 16)
    scores = np.einsum("hd,hpd->hp", query, keys)
    expected = np.einsum("hp,hpd->hd", softmax(scores), values)
    assert np.allclose(attend(query, keys, values), expected, atol=1e-4)
