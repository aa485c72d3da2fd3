"""What other systems do with lockstep ranks, on cases made by hand."""

from __future__ import annotations

import pytest

from paceline.errors import ConfigError
from paceline.simulate.traffic.clock import Clock
from paceline.simulate.traffic.engine import EngineShape
from paceline.simulate.traffic.peers_lockstep import (
    BATCHING_WAIT_ITERS,
    LOCKSTEP_PEERS,
    TIMEOUT_ITERS,
    AdpBalance,
    BfIo,
    ContextGate,
    OneQueue,
)
from paceline.simulate.traffic.plane import ControlPlane
from paceline.simulate.traffic.prefill_quota import PrefillQuota
from paceline.simulate.traffic.rank import SimulatedRank
from paceline.simulate.traffic.recorder import Recorder
from tests.simulate.traffic.deployments import drawn, finished
from tests.simulate.traffic.test_engine import sequence


class Grown:
    """A fleet whose ranks have grown by nothing."""

    def grown(self, rank: SimulatedRank, when: float) -> int:
        return 0


def there(count: int, **shape: int) -> list[SimulatedRank]:
    return [SimulatedRank(number, EngineShape(**shape)) for number in range(count)]  # type: ignore[arg-type]


def placed(kind: type[OneQueue], ranks: list[SimulatedRank], *prompts: int) -> list[list[int]]:
    """Which prompts each rank got of those that waited."""
    plane = kind(Clock(), 0.0)
    plane.start(Grown())  # type: ignore[arg-type]
    before = [len(rank.engine.waiting) for rank in ranks]
    plane.queue.extend(sequence(number, prompt, 5) for number, prompt in enumerate(prompts))
    plane.pull(ranks)
    return [[one.prompt for one in list(rank.engine.waiting)[n:]] for rank, n in zip(ranks, before, strict=True)]


def decode(rank: SimulatedRank, prompt: int, answer: int = 50) -> None:
    rank.engine.add(sequence(90 + rank.number, prompt, answer))
    rank.engine.begin()
    rank.engine.end()


def test_bf_io_places_the_largest_first_on_the_least_loaded() -> None:
    assert placed(BfIo, there(2), 100, 400, 300, 250) == [[400, 100], [300, 250]]


def test_bf_io_counts_memory_in_use() -> None:
    ranks = there(2)
    decode(ranks[0], 500)
    assert placed(BfIo, ranks, 300, 100) == [[], [300, 100]]


def test_bf_io_fills_free_slots_alone() -> None:
    ranks = there(2, slots=1)
    decode(ranks[0], 10)
    assert placed(BfIo, ranks, 30, 40) == [[], [30]]


def test_adp_balance_gives_each_rank_its_share_of_requests() -> None:
    # Four requests on two ranks: two each, however long; the longest first to the rank with the fewest tokens.
    assert placed(AdpBalance, there(2), 1000, 10, 20, 30) == [[1000, 10], [30, 20]]


def test_adp_balance_levels_with_what_is_there() -> None:
    ranks = there(2)
    for _ in range(3):
        decode(ranks[0], 10)
    assert placed(AdpBalance, ranks, 500, 400) == [[], [500, 400]]


def test_the_gate_gathers_prompts_and_waits_for_every_rank() -> None:
    ranks, gate = there(2), ContextGate()
    for rank in ranks:
        decode(rank, 10)
    assert gate.tokens(ranks, ()) is None
    ranks[0].engine.add(sequence(1, 100, 5))
    assert [gate.tokens(ranks, [0]) for _ in range(TIMEOUT_ITERS)] == [0] * (TIMEOUT_ITERS - 1) + [None]
    ranks[1].engine.add(sequence(2, 100, 5))
    assert [gate.tokens(ranks, [0, 1]) for _ in range(BATCHING_WAIT_ITERS + 1)] == [0] * BATCHING_WAIT_ITERS + [None]


def test_the_gate_is_open_where_some_rank_writes_nothing() -> None:
    ranks, gate = there(2), ContextGate()
    decode(ranks[0], 10)
    ranks[0].engine.add(sequence(1, 100, 5))
    assert gate.tokens(ranks, [0]) is None


@pytest.mark.parametrize("routing", LOCKSTEP_PEERS)
def test_everything_ends(routing: str) -> None:
    done = finished(
        drawn(200, 60.0, shared=True), ranks=4, frontends=2, lockstep=True, routing=routing, slots=8, kv_tokens=9000
    )
    assert done.recorder.ended == 200
    assert all(one.rank >= 0 for one in done.sequences)
    assert max(rank.engine.kv_peak for rank in done._ranks) <= 9000


@pytest.mark.parametrize("routing", LOCKSTEP_PEERS)
def test_they_need_lockstep(routing: str) -> None:
    with pytest.raises(ConfigError, match=f"--routing: {routing}: only with --lockstep"):
        finished(drawn(5, 1.0), routing=routing)


def test_the_base_does_nothing() -> None:
    rank = there(1)[0]
    plane, quota = ControlPlane(), PrefillQuota()
    assert list(plane.pull([rank])) == []
    assert quota.tokens([rank], ()) is None
    assert Recorder((0.0, 1.0), 0.0).samples == []
