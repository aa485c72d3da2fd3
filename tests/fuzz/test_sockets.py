"""Real processes flooded over all their sockets while requests go on; `make fuzz` has more of it."""

from __future__ import annotations

import pytest

from tests.fuzz.sockets import flood_sockets
from tests.fuzz.vllm_sockets import flood_vllm

pytestmark = pytest.mark.slow

INPUTS = 400


@pytest.mark.parametrize("engine", ["timed", "moe"])
def test_streams_go_on_right_while_garbage_comes_on_every_socket(engine: str) -> None:
    rows = flood_sockets(engine, INPUTS, seed=1)
    assert [row.first_error for row in rows if row.first_error] == []
    assert all(row.inputs >= INPUTS for row in rows)
    assert len(rows) == (6 if engine == "moe" else 5)


def test_the_coordinator_under_vllm_goes_on() -> None:
    rows = flood_vllm(INPUTS, seed=1)
    assert [row.first_error for row in rows if row.first_error] == []
    assert len(rows) == 4
