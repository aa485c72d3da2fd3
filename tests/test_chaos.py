"""Two minutes of `make chaos`: no stream is lost, none gets another text."""

from __future__ import annotations

import pytest
from bench.chaos import chaos

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["timed", "moe"])
def test_no_stream_is_lost_or_wrong(engine: str) -> None:
    tally = chaos(engine, seed=11, minutes=1.0, clients=8)
    assert tally.lost == []
    assert tally.wrong == []
    assert tally.requests > 8
    assert tally.faults["kill a rank"]
