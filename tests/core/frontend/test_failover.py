"""Requests whose rank is lost: where they go on, with what, and what still comes of the life that had them."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.core.frontend.events import (
    Abandon,
    CoordinatorSaid,
    Deliver,
    Disconnect,
    Effect,
    LinkDown,
    LinkUp,
    Placed,
    RankSaid,
    Refuse,
    Submit,
    Tick,
    ToRank,
)
from paceline.core.frontend.failover import MOST_LOSSES, PATIENCE_S
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, LoadView, Member, Members, RankView, SuspensionState
from paceline.core.requests import AbortRequests, AddRequest, Output, Outputs, SamplingParams
from paceline.core.routing import LeastLoad

IDENTITY = 7
LIVES = {0: 10, 1: 11}


def members(*lives: tuple[int, int], ended: tuple[tuple[int, int], ...] = ()) -> CoordinatorSaid:
    known = [Member(rank, life, f"address {life}") for rank, life in lives]
    return CoordinatorSaid(Members(PROTOCOL_VERSION, 1, 0, False, known, ended=list(ended)))


def frontend(**settings: Any) -> Frontend:
    """It knows ranks 0 and 1."""
    machine = Frontend(IDENTITY, LeastLoad(), **{"resumes": True, **settings})
    machine.handle(members(*LIVES.items()), 0.0)
    return machine


def submit(machine: Frontend, request: int, rank: int | None = 0, tokens: int = 4, max_tokens: int = 9) -> AddRequest:
    effects = machine.handle(Submit(request, [7] * tokens, SamplingParams(max_tokens), rank), 0.0)
    return adds(effects)[0][1]


def adds(effects: list[Effect]) -> list[tuple[int, AddRequest]]:
    """The requests that are sent, each with its rank."""
    sent = [(effect.rank, effect.message) for effect in effects if isinstance(effect, ToRank)]
    return [(rank, message) for rank, message in sent if isinstance(message, AddRequest)]


def aborts(effects: list[Effect]) -> list[tuple[int, list[int]]]:
    sent = [(effect.rank, effect.message) for effect in effects if isinstance(effect, ToRank)]
    return [(rank, message.requests) for rank, message in sent if isinstance(message, AbortRequests)]


def say(machine: Frontend, add: AddRequest, *tokens: int, rank: int = 0, finish: Any = None) -> list[Output]:
    """A rank's output for a request; returns what is delivered."""
    output = Output(add.request, list(tokens), "".join(f" {token}" for token in tokens), finish)
    effects = machine.handle(RankSaid(Outputs(rank, add.incarnation, [output])), 0.0)
    return [delivered for effect in effects if isinstance(effect, Deliver) for delivered in effect.outputs]


def test_a_request_goes_on_at_another_rank_with_the_tokens_that_its_client_has() -> None:
    machine = frontend()
    first = submit(machine, 1)
    say(machine, first, 50)
    say(machine, first, 51, 52)
    effects = machine.handle(LinkDown(0), 1.0)
    ((rank, again),) = adds(effects)
    assert (rank, again.incarnation, again.number) == (1, 11, 1)
    assert (again.prompt_token_ids, again.made_token_ids, again.params) == ([7] * 4, [50, 51, 52], first.params)
    # Its client has been told of a rank once.
    assert not [effect for effect in effects if isinstance(effect, Placed)]
    (delivered,) = say(machine, again, 53, rank=1)
    assert (delivered.request, delivered.token_ids) == (1, [53])
    (last,) = say(machine, again, 54, rank=1, finish="length")
    assert (last.request, last.finish_reason) == (1, "length")
    assert machine.in_flight() == 0
    assert machine.statistics()["moved"] == 1


def test_what_still_comes_of_the_lost_life_is_void() -> None:
    machine = frontend()
    first = submit(machine, 1)
    say(machine, first, 50)
    ((_, again),) = adds(machine.handle(LinkDown(0), 1.0))
    assert say(machine, first, 51) == []
    machine.handle(LinkUp(0), 2.0)
    assert say(machine, first, 51) == []
    assert [output.token_ids for output in say(machine, again, 51, rank=1)] == [[51]]


def test_a_life_that_is_back_forgets_what_went_on_elsewhere_and_its_numbers_go_on() -> None:
    machine = frontend()
    first, second = submit(machine, 1), submit(machine, 2)
    machine.handle(LinkDown(0), 1.0)
    assert machine.ready_ranks() == [1]
    assert aborts(machine.handle(LinkUp(0), 2.0)) == [(0, [first.request, second.request])]
    assert machine.ready_ranks() == [0, 1]
    # What was on the wire is not there any more, whether it had arrived or not.
    assert machine.believed(0) == Load()
    assert submit(machine, 3).number == 3
    assert machine.handle(LinkUp(0), 3.0) == []


def test_a_request_that_comes_back_to_the_rank_it_was_taken_from_is_another_request_to_it() -> None:
    machine = frontend()
    machine.handle(LinkDown(1), 0.5)
    first = submit(machine, 1)
    say(machine, first, 50)
    assert adds(machine.handle(LinkDown(0), 1.0)) == []
    assert machine.in_flight() == 1
    effects = machine.handle(LinkUp(0), 2.0)
    ((rank, again),) = adds(effects)
    assert aborts(effects) == [(0, [first.request])]
    assert (rank, again.number, again.made_token_ids) == (0, 2, [50])
    assert again.request != first.request
    assert say(machine, first, 51) == []
    assert [output.token_ids for output in say(machine, again, 51)] == [[51]]


def test_it_moves_more_than_once() -> None:
    machine = frontend()
    first = submit(machine, 1)
    say(machine, first, 50)
    ((_, second),) = adds(machine.handle(LinkDown(0), 1.0))
    say(machine, second, 51, rank=1)
    machine.handle(members((0, 99), (1, 11)), 2.0)
    ((rank, third),) = adds(machine.handle(LinkDown(1), 3.0))
    assert (rank, third.incarnation, third.made_token_ids) == (0, 99, [50, 51])
    assert say(machine, second, 52, rank=1) == []
    assert [output.request for output in say(machine, third, 52)] == [1]


def test_a_client_that_goes_is_gone_wherever_its_request_is() -> None:
    machine = frontend()
    submit(machine, 1)
    ((_, again),) = adds(machine.handle(LinkDown(0), 1.0))
    assert aborts(machine.handle(Abandon([1]), 1.0)) == [(1, [again.request])]
    submit(machine, 2, rank=1)
    machine.handle(LinkDown(1), 2.0)
    assert machine.handle(Abandon([2]), 2.0) == []
    assert machine.in_flight() == 0
    assert adds(machine.handle(LinkUp(1), 3.0)) == []


def test_without_any_rank_it_waits_for_the_first_and_not_for_ever() -> None:
    machine = frontend()
    for request in (1, 2):
        submit(machine, request, rank=request - 1)
    machine.handle(LinkDown(0), 1.0)
    assert adds(machine.handle(LinkDown(1), 2.0)) == []
    assert machine.deadline == 2.0 + PATIENCE_S
    effects = machine.handle(members((0, 99), ended=((1, 11),)), 3.0)
    assert [rank for rank, _ in adds(effects)] == [0, 0]
    assert [effect.rank for effect in effects if isinstance(effect, Disconnect)] == [0, 1]
    for _, again in adds(effects):
        say(machine, again, 50)
    machine.handle(LinkDown(0), 4.0)
    assert machine.handle(Tick(), 4.0 + PATIENCE_S - 1) == []
    refusals = machine.handle(Tick(), 4.0 + PATIENCE_S)
    over = [(effect.request, effect.reason) for effect in refusals if isinstance(effect, Refuse)]
    assert sorted(over) == [(1, "rank-lost"), (2, "rank-lost")]
    assert machine.deadline == float("inf")


def test_an_engine_that_cannot_go_on_serves_anew_what_nobody_has_seen_and_says_so_of_the_rest() -> None:
    machine = frontend(resumes=False)
    seen, unseen = submit(machine, 1), submit(machine, 2)
    say(machine, seen, 50, 51)
    effects = machine.handle(LinkDown(0), 1.0)
    (refusal,) = [effect for effect in effects if isinstance(effect, Refuse)]
    assert (refusal.request, refusal.reason) == (1, "rank-lost")
    assert refusal.text == "rank 0 ended after 2 tokens of the answer; this engine cannot go on with it"
    ((rank, again),) = adds(effects)
    assert (rank, again.made_token_ids, again.params) == (1, [], unseen.params)


@pytest.mark.parametrize("most", [1, MOST_LOSSES, 5])
def test_a_request_that_loses_one_rank_after_the_other_without_a_token_is_given_up(most: int) -> None:
    machine = frontend(most_losses=most)
    say(machine, submit(machine, 1), 50)
    effects: list[Effect] = []
    for life in range(20, 20 + most):
        assert not [effect for effect in effects if isinstance(effect, Refuse)]
        effects += machine.handle(members((0, life), (1, life)), 1.0)
    (refusal,) = [effect for effect in effects if isinstance(effect, Refuse)]
    assert refusal.text.endswith(f"ended while it served this request, the last of {most} in a row")
    assert machine.in_flight() == 0


def test_ranks_whose_connections_come_back_were_killed_by_no_request() -> None:
    """A rank that was stopped, or silent, for a moment: `make chaos` with garbage on every socket lost requests so."""
    machine = frontend()
    say(machine, submit(machine, 1), 50)
    for turn in range(3 * MOST_LOSSES):
        rank = turn % 2
        assert [at for at, _ in adds(machine.handle(LinkDown(rank), 1.0))] == [1 - rank]
        machine.handle(LinkUp(rank), 1.0)
    assert machine.in_flight() == 1


def many_down() -> Frontend:
    """A request that has just lost one rank after the other; nobody knows yet whether these are dead."""
    machine = frontend()
    lives = [(rank, 10 + rank) for rank in range(MOST_LOSSES + 1)]
    machine.handle(members(*lives), 0.0)
    ((rank, _),) = [(0, submit(machine, 1))]
    for _ in range(MOST_LOSSES):
        effects = machine.handle(LinkDown(rank), 1.0)
        assert not [effect for effect in effects if isinstance(effect, Refuse)]
        rank = adds(effects)[0][0] if adds(effects) else -1
    assert rank == -1, "it is kept from those that are left"
    return machine


def test_a_request_that_may_kill_ranks_waits_until_one_is_back() -> None:
    machine = many_down()
    assert len(adds(machine.handle(LinkUp(0), 2.0))) == 1
    assert machine.in_flight() == 1


def test_a_request_that_may_kill_ranks_is_given_up_once_these_are_known_to_be_dead() -> None:
    machine = many_down()
    dead = [(rank, life) for rank, life in ((rank, 10 + rank) for rank in range(MOST_LOSSES + 1))]
    up = [handle.rank for handle in machine._inflight.handles.values()]
    effects = machine.handle(members(ended=tuple(one for one in dead if one[0] not in up)), 2.0)
    (refusal,) = [effect for effect in effects if isinstance(effect, Refuse)]
    assert refusal.text.endswith(f"the last of {MOST_LOSSES} in a row")
    assert machine.in_flight() == 0


def test_ranks_that_die_while_the_deployment_is_paused_are_not_killed_by_a_request() -> None:
    machine = frontend()
    say(machine, submit(machine, 1), 50)
    suspended = LoadView(9, 10**6, 0, False, [], suspension=SuspensionState(1, "keep"))
    machine.handle(CoordinatorSaid(suspended), 1.0)
    for life in range(20, 20 + 2 * MOST_LOSSES):
        effects = machine.handle(members((0, life), (1, life)), 1.0)
        assert adds(effects)
    assert machine.in_flight() == 1


def test_a_request_that_is_ended_twice_in_one_message_is_ended_once() -> None:
    machine = frontend()
    sent = submit(machine, 1)
    twice = [Output(sent.request, [7], finish_reason="stop")] * 2
    (delivered,) = machine.handle(RankSaid(Outputs(0, sent.incarnation, twice)), 1.0)
    assert isinstance(delivered, Deliver)
    assert machine.in_flight() == 0


def test_a_request_may_lose_any_number_of_ranks_while_it_gets_on() -> None:
    machine = frontend()
    sent = submit(machine, 1, max_tokens=100)
    rank = 0
    for life in range(20, 30):
        say(machine, sent, life, rank=rank)
        effects = machine.handle(members((0, life), (1, life)), 1.0)
        rank, sent = adds(effects)[-1]
    assert sent.made_token_ids == list(range(20, 30))


def test_a_view_of_a_life_that_is_away_is_taken_in() -> None:
    machine = frontend()
    submit(machine, 1)
    machine.handle(LinkDown(0), 1.0)
    entry = RankView(0, 10, 5, Load(waiting=3), {IDENTITY: 1})
    machine.handle(CoordinatorSaid(LoadView(1, 1, 0, False, [entry])), 1.5)
    machine.handle(LinkUp(0), 2.0)
    assert machine.believed(0) == Load(waiting=3)


def test_links_of_nobody_change_nothing() -> None:
    machine = frontend()
    for event in (LinkUp(0), LinkUp(5), LinkDown(5), LinkDown(0), LinkDown(0)):
        assert machine.handle(event, 1.0) == []
    assert machine.ready_ranks() == [1]
