"""Half a minute of `make chaos`, over one node and over two: no stream is lost, none gets another text."""

from __future__ import annotations

import pytest
from bench.chaos import chaos

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("engine", ["timed", "moe"])
def test_no_stream_is_lost_or_wrong(engine: str) -> None:
    tally = chaos(engine, seed=11, minutes=0.5, clients=6)
    assert tally.lost == []
    assert tally.wrong == []
    assert tally.requests > 6
    assert tally.faults["kill a rank"]


@pytest.mark.parametrize("engine", ["timed", "moe"])
def test_nor_where_links_are_cut_and_nodes_die(engine: str) -> None:
    tally = chaos(engine, seed=4, minutes=0.5, clients=4, nodes=2)
    assert tally.lost == []
    assert tally.wrong == []
    assert tally.requests > tally.cut
    assert any(tally.faults[kind] for kind in ("kill a node", "kill the head", "cut a link"))
