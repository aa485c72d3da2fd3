"""A few thousand inputs for every decoder and the machine behind it; `make fuzz` has the million."""

from __future__ import annotations

import pytest

from paceline.core import codec
from paceline.core.codec import UNIONS
from tests.core.test_codec import DECODERS
from tests.fuzz.blind import fuzz
from tests.fuzz.corpus import DIRECTIONS, classes_of, frames_of
from tests.fuzz.targets import TARGETS

pytestmark = pytest.mark.slow

INPUTS = 4000


@pytest.mark.parametrize("name", TARGETS)
def test_nothing_that_comes_stops_it(name: str) -> None:
    row = fuzz(TARGETS[name], INPUTS, seed=1)
    assert (row.inputs, row.first_error) == (INPUTS, "")


@pytest.mark.parametrize("direction", UNIONS)
def test_the_corpus_has_every_message(direction: str) -> None:
    found = set()
    for frame in frames_of(DIRECTIONS[direction]):
        try:
            found.add(type(DECODERS[direction].decode(frame)))
        except codec.BadMessage:
            continue
    assert found >= set(classes_of(direction))
