"""The production machines in the simulator: what front-ends believe is what there is, prompts and views included."""

from __future__ import annotations

from typing import Any

from paceline.core.messages import LoadView
from paceline.simulate.traffic.ours import Links, Paceline, prompt_of
from paceline.simulate.traffic.sequence import Sequence
from paceline.simulate.traffic.trace import BLOCK_TOKENS, Arrival
from tests.simulate.traffic.deployments import drawn, finished


def test_prompts_are_as_long_as_they_are_and_equal_where_their_blocks_are() -> None:
    one = Sequence(0, Arrival(0.0, 1300, 1, (5, 6, 7)), 0)
    two = Sequence(1, Arrival(0.0, 1100, 1, (5, 6, 8)), 0)
    assert len(prompt_of(one, contents=False)) == 1300
    first, second = prompt_of(one, contents=True), prompt_of(two, contents=True)
    assert (len(first), len(second)) == (1300, 1100)
    assert first[: 2 * BLOCK_TOKENS] == second[: 2 * BLOCK_TOKENS]
    assert first[2 * BLOCK_TOKENS] != second[2 * BLOCK_TOKENS]
    alone, other = (Sequence(number, Arrival(0.0, 700, 1), 0) for number in (2, 3))
    assert len(prompt_of(alone, contents=True)) == 700
    assert prompt_of(alone, contents=True)[0] != prompt_of(other, contents=True)[0]


def test_prefix_routing_finds_what_a_rank_has() -> None:
    arrivals = drawn(300, 30.0, shared=True)
    blind = finished(arrivals, ranks=4, frontends=1, routing="round-robin").outcome
    sighted = finished(arrivals, ranks=4, frontends=1, routing="prefix").outcome
    assert sighted.prefix_hit_rate > blind.prefix_hit_rate * 1.05


def test_views_tell_of_the_ranks_as_they_were_when_they_reported() -> None:
    done = finished(drawn(200, 50.0), ranks=3, frontends=2, links=Links(0.0002, 0.05))
    plane = done._plane_used
    assert isinstance(plane, Paceline)
    done.clock.now += 10.0
    # The clock goes on until all reports and views have come; then front-ends believe what is: nothing.
    for front in plane._fronts:
        plane._look(front)
    views = [said.message for _, said in plane._views]  # type: ignore[union-attr]
    assert isinstance(views[-1], LoadView)
    for front in plane._fronts:
        assert front.machine.in_flight() == 0


def test_what_waits_is_bound_when_a_rank_can_start_it() -> None:
    arrivals = drawn(400, 60.0)
    dispatcher, arrival = (
        finished(arrivals, ranks=4, frontends=4, bind=bind, slots=16).outcome for bind in ("broker", "arrival")
    )
    bound = finished(arrivals, ranks=4, routing="oracle", slots=16).outcome
    assert dispatcher.ttft_p99_ms < arrival.ttft_p99_ms
    assert dispatcher.ttft_p99_ms < bound.ttft_p99_ms * 1.1


def test_no_herd_forms_where_frontends_bind_at_arrival() -> None:
    # Lockstep shows it most: whoever gets too much holds all up.
    arrivals = drawn(1500, 56.0)
    settings: dict[str, Any] = {"ranks": 4, "lockstep": True, "slots": 64, "warm_up": 0.2}
    bound = finished(arrivals, routing="oracle", **settings).outcome
    for frontends in (4, 16):
        bind = finished(arrivals, frontends=frontends, bind="arrival", **settings).outcome
        assert bind.ttft_p99_ms < bound.ttft_p99_ms * 1.25


def test_frontends_share_their_sends() -> None:
    # A burst through four front-ends: nobody knows of the others' but by the relay, and still it is level.
    arrivals = [Arrival(0.001 * number, 1000, 50) for number in range(64)]
    done = finished(arrivals, ranks=8, frontends=4)
    each = [sum(one.rank == rank for one in done.sequences) for rank in range(8)]
    assert max(each) - min(each) <= 4
