"""A call of the engine that does not return: said once a timeout, taken back, and the end of the rank."""

from __future__ import annotations

from typing import Any

from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, Admit, Identify, RankHello, StallReport
from paceline.core.rank import events
from paceline.core.rank.hang import Limits
from paceline.core.rank.machine import Rank
from paceline.core.requests import AddRequest, SamplingParams
from tests.core.harness import find, said

LIFE = 8


def rank_in_a_step(stall_s: float = 2.0, step_s: float = 0.0) -> Rank:
    """Its first step begins at 10."""
    rank = Rank(1, LIFE, "address", limits=Limits(stall_s, step_s))
    rank.handle(events.Loaded(), 0.0)
    rank.handle(events.CoordinatorSaid(Admit(1, LIFE, 0)), 0.0)
    rank.handle(events.Turn(Load(), False), 0.0)
    rank.handle(events.FrontendSaid(7, AddRequest(1, 1, LIFE, 0, [5], SamplingParams(4))), 10.0)
    assert find(rank.handle(events.Turn(Load(), True), 10.0), events.Step)
    return rank


def reports(effects: list[events.Effect]) -> list[tuple[Any, ...]]:
    return [(report.ranks, report.kind, report.seconds) for report in said(effects, StallReport)]


def test_it_names_itself_once_a_timeout_and_takes_it_back() -> None:
    rank = rank_in_a_step()
    look = lambda now: reports(rank.handle(events.Looked(), now))  # noqa: E731
    assert look(11.9) == []
    assert look(12.0) == [([1], "step", 2.0)]
    assert look(13.9) == []
    assert look(14.0) == [([1], "step", 4.0)]
    assert reports(rank.handle(events.Stepped((), Load(), False), 15.0)) == [([], "", 0.0)]
    assert look(99.0) == []


def test_whoever_does_nothing_or_gets_on_or_waits_for_others_does_not_hang() -> None:
    rank = rank_in_a_step(step_s=3.0)
    for second in range(11, 30):
        assert rank.handle(events.Looked(progress=second), second) == []
    for second in range(30, 40):
        assert rank.handle(events.Looked(progress=29, waits=True), second) == []
    rank.handle(events.Stepped((), Load(), False), 40.0)
    assert find(rank.handle(events.Turn(Load(), False), 40.0), events.Wait)
    assert rank.handle(events.Looked(), 99.0) == []


def test_one_that_was_named_and_gets_on_says_so() -> None:
    rank = rank_in_a_step()
    assert reports(rank.handle(events.Looked(), 12.0))
    assert reports(rank.handle(events.Looked(progress=1), 12.5)) == [([], "", 0.0)]
    assert reports(rank.handle(events.Looked(progress=1), 14.5)) == [([1], "step", 2.0)]


def test_what_a_new_coordinator_asks_is_answered_in_mid_step() -> None:
    rank = rank_in_a_step()
    ask = events.CoordinatorSaid(Identify(PROTOCOL_VERSION, 3))
    assert not reports(rank.handle(ask, 11.0))
    rank.handle(events.Looked(), 12.0)
    effects = rank.handle(ask, 13.0)
    assert isinstance(effects[0].message, RankHello)  # type: ignore[union-attr]
    assert reports(effects) == [([1], "step", 3.0)]


def test_taking_a_request_in_may_hang_too() -> None:
    rank = rank_in_a_step()
    rank.handle(events.Stepped((), Load(), False), 10.1)
    rank.handle(events.Turn(Load(), False), 10.1)
    assert find(
        rank.handle(events.FrontendSaid(7, AddRequest(2, 2, LIFE, 0, [5], SamplingParams(4))), 20.0), events.Take
    )
    assert reports(rank.handle(events.Looked(), 22.0)) == [([1], "step", 2.0)]


def test_at_the_limit_it_is_ended() -> None:
    rank = rank_in_a_step(stall_s=30.0, step_s=5.0)
    assert rank.handle(events.Looked(), 14.9) == []
    (end,) = find(rank.handle(events.Looked(), 15.0), events.StartAgain)
    assert end.why == "its step 0 has not returned for 5.0 s"
