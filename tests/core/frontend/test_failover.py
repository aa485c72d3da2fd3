"""Requests whose rank is lost: where they go on, with what, and what still comes of the life that had them."""

from __future__ import annotations

from typing import Any

import pytest

from paceline.core.binding import Ask, Shares
from paceline.core.frontend import events
from paceline.core.frontend.failover import HOLD_S, MOST_LOSSES
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, LoadView, Member, Members, RankView, Stall, SuspensionState
from paceline.core.requests import AbortRequests, AddRequest, Output, Outputs, SamplingParams
from paceline.core.routing import LeastLoad

IDENTITY = 7
LIVES = {0: 10, 1: 11}


def members(*lives: tuple[int, int], ended: tuple[tuple[int, int], ...] = ()) -> events.CoordinatorSaid:
    known = [Member(rank, life, f"address {life}") for rank, life in lives]
    return events.CoordinatorSaid(Members(PROTOCOL_VERSION, 1, 0, False, known, ended=list(ended)))


def frontend(**settings: Any) -> Frontend:
    machine = Frontend(IDENTITY, LeastLoad(), **{"resumes": True, **settings})
    machine.handle(members(*LIVES.items()), 0.0)
    return machine


def submit(machine: Frontend, request: int, rank: int | None = 0, tokens: int = 4, max_tokens: int = 9) -> AddRequest:
    effects = machine.handle(events.Submit(request, [7] * tokens, SamplingParams(max_tokens), rank), 0.0)
    return adds(effects)[0][1]


def adds(effects: list[events.Effect]) -> list[tuple[int, AddRequest]]:
    sent = [(effect.rank, effect.message) for effect in effects if isinstance(effect, events.ToRank)]
    return [(rank, message) for rank, message in sent if isinstance(message, AddRequest)]


def aborts(effects: list[events.Effect]) -> list[tuple[int, list[int]]]:
    sent = [(effect.rank, effect.message) for effect in effects if isinstance(effect, events.ToRank)]
    return [(rank, message.requests) for rank, message in sent if isinstance(message, AbortRequests)]


def say(machine: Frontend, add: AddRequest, *tokens: int, rank: int = 0, finish: Any = None) -> list[Output]:
    """A rank's output for a request; returns what is delivered."""
    output = Output(add.request, list(tokens), "".join(f" {token}" for token in tokens), finish)
    effects = machine.handle(events.RankSaid(Outputs(rank, add.incarnation, [output])), 0.0)
    return [delivered for effect in effects if isinstance(effect, events.Deliver) for delivered in effect.outputs]


def test_a_request_goes_on_at_another_rank_with_the_tokens_that_its_client_has() -> None:
    machine = frontend()
    first = submit(machine, 1)
    say(machine, first, 50)
    say(machine, first, 51, 52)
    effects = machine.handle(events.LinkDown(0), 1.0)
    ((rank, again),) = adds(effects)
    assert (rank, again.incarnation, again.number) == (1, 11, 1)
    assert (again.prompt_token_ids, again.made_token_ids, again.params) == ([7] * 4, [50, 51, 52], first.params)
    # Its client has been told of a rank once.
    assert not [effect for effect in effects if isinstance(effect, events.Placed)]
    (delivered,) = say(machine, again, 53, rank=1)
    assert (delivered.request, delivered.token_ids) == (1, [53])
    (last,) = say(machine, again, 54, rank=1, finish="length")
    assert (last.request, last.finish_reason) == (1, "length")
    assert machine.in_flight() == 0
    assert machine.statistics()["moved"] == 1


@pytest.mark.parametrize("moved", [False, True])
def test_a_request_that_its_rank_does_not_read_is_refused_also_one_that_was_moved(moved: bool) -> None:
    machine = frontend()
    add, rank = submit(machine, 1), 0
    if moved:
        ((rank, add),) = adds(machine.handle(events.LinkDown(0), 1.0))
    effects = machine.handle(events.Unsent(add.request), 2.0)
    assert effects[-1] == events.Refuse(1, "overloaded", f"rank {rank} takes no more requests now")
    assert aborts(effects) == [(rank, [add.request])]
    assert machine.in_flight() == 0
    assert not machine.handle(events.Unsent(add.request), 2.0), "its client has been told"


def test_what_still_comes_of_the_lost_life_is_void() -> None:
    machine = frontend()
    first = submit(machine, 1)
    say(machine, first, 50)
    ((_, again),) = adds(machine.handle(events.LinkDown(0), 1.0))
    assert say(machine, first, 51) == []
    machine.handle(events.LinkUp(0), 2.0)
    assert say(machine, first, 51) == []
    assert [output.token_ids for output in say(machine, again, 51, rank=1)] == [[51]]


def test_a_life_that_is_back_forgets_what_went_on_elsewhere_and_its_numbers_go_on() -> None:
    machine = frontend()
    first, second = submit(machine, 1), submit(machine, 2)
    machine.handle(events.LinkDown(0), 1.0)
    assert machine.ready_ranks() == [1]
    assert aborts(machine.handle(events.LinkUp(0), 2.0)) == [(0, [first.request, second.request])]
    assert machine.ready_ranks() == [0, 1]
    # What was on the wire is not there any more, whether it had arrived or not.
    assert machine.believed(0) == Load()
    assert submit(machine, 3).number == 3
    assert machine.handle(events.LinkUp(0), 3.0) == []


def test_a_request_that_comes_back_to_the_rank_it_was_taken_from_is_another_request_to_it() -> None:
    machine = frontend()
    machine.handle(events.LinkDown(1), 0.5)
    first = submit(machine, 1)
    say(machine, first, 50)
    assert adds(machine.handle(events.LinkDown(0), 1.0)) == []
    assert machine.in_flight() == 1
    effects = machine.handle(events.LinkUp(0), 2.0)
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
    ((_, second),) = adds(machine.handle(events.LinkDown(0), 1.0))
    say(machine, second, 51, rank=1)
    machine.handle(members((0, 99), (1, 11)), 2.0)
    ((rank, third),) = adds(machine.handle(events.LinkDown(1), 3.0))
    assert (rank, third.incarnation, third.made_token_ids) == (0, 99, [50, 51])
    assert say(machine, second, 52, rank=1) == []
    assert [output.request for output in say(machine, third, 52)] == [1]


def test_a_client_that_goes_is_gone_wherever_its_request_is() -> None:
    machine = frontend()
    submit(machine, 1)
    ((_, again),) = adds(machine.handle(events.LinkDown(0), 1.0))
    assert aborts(machine.handle(events.Abandon([1]), 1.0)) == [(1, [again.request])]
    submit(machine, 2, rank=1)
    machine.handle(events.LinkDown(1), 2.0)
    assert machine.handle(events.Abandon([2]), 2.0) == []
    assert machine.in_flight() == 0
    assert adds(machine.handle(events.LinkUp(1), 3.0)) == []


def test_without_any_rank_it_waits_for_the_first_and_not_for_ever() -> None:
    machine = frontend()
    for request in (1, 2):
        submit(machine, request, rank=request - 1)
    machine.handle(events.LinkDown(0), 1.0)
    assert adds(machine.handle(events.LinkDown(1), 2.0)) == []
    assert machine.deadline == 2.0 + HOLD_S
    effects = machine.handle(members((0, 99), ended=((1, 11),)), 3.0)
    assert [rank for rank, _ in adds(effects)] == [0, 0]
    assert [effect.rank for effect in effects if isinstance(effect, events.Disconnect)] == [0, 1]
    for _, again in adds(effects):
        say(machine, again, 50)
    machine.handle(events.LinkDown(0), 4.0)
    assert machine.handle(events.Tick(), 4.0 + HOLD_S - 1) == []
    refusals = machine.handle(events.Tick(), 4.0 + HOLD_S)
    over = [(effect.request, effect.reason) for effect in refusals if isinstance(effect, events.Refuse)]
    assert sorted(over) == [(1, "rank-lost"), (2, "rank-lost")]
    assert machine.deadline == float("inf")


def test_new_requests_wait_with_the_others_while_ranks_are_on_their_way() -> None:
    machine = frontend(late_binding=True, hold_s=5.0)
    queue = LoadView(1, 1, 0, False, [], shares=[Shares(IDENTITY, 1, [])])
    machine.handle(events.CoordinatorSaid(queue), 0.0)
    for rank in LIVES:
        machine.handle(events.LinkDown(rank), 1.0)
    asked = machine.handle(events.Submit(1, [7] * 4, SamplingParams(9)), 2.0)
    assert [type(effect.message) for effect in asked if isinstance(effect, events.ToCoordinator)] == [Ask]
    assert machine.waiting_for_grant() == [1]
    assert not [one for one in machine.handle(events.Tick(), 5.9) if isinstance(one, events.Refuse)]
    over = machine.handle(events.Tick(), 6.0)
    assert [(one.request, one.reason) for one in over if isinstance(one, events.Refuse)] == [(1, "no-rank")]
    late = machine.handle(events.Submit(2, [7] * 4, SamplingParams(9)), 7.0)
    assert [(one.request, one.reason) for one in late if isinstance(one, events.Refuse)] == [(2, "no-rank")]


def test_where_all_ranks_end_with_one_only_the_first_is_held_against_its_requests() -> None:
    machine = frontend(together=True, most_losses=2)
    for request in (1, 2):
        submit(machine, request, rank=request - 1)
    refused: list[int] = []
    for turn in range(3):
        now = 100.0 * (turn + 1)
        # Rank 0 is killed each time, and rank 1 cannot go on without it.
        for rank in (0, 1):
            refused += [
                one.request
                for one in machine.handle(events.LinkDown(rank), now + rank)
                if isinstance(one, events.Refuse)
            ]
        lives = {rank: 20 + 10 * turn + rank for rank in LIVES}
        effects = machine.handle(members(*lives.items()), now + 5.0)
        refused += [one.request for one in effects if isinstance(one, events.Refuse)]
        if turn < 2:
            assert sorted(request.prompt_token_ids for _, request in adds(effects)) == [[7] * 4] * (2 - len(refused))
    assert len(refused) == 1, "what was with the one that was killed"


def test_an_engine_that_cannot_go_on_serves_anew_what_nobody_has_seen_and_says_so_of_the_rest() -> None:
    machine = frontend(resumes=False)
    seen, unseen = submit(machine, 1), submit(machine, 2)
    say(machine, seen, 50, 51)
    effects = machine.handle(events.LinkDown(0), 1.0)
    (refusal,) = [effect for effect in effects if isinstance(effect, events.Refuse)]
    assert (refusal.request, refusal.reason) == (1, "rank-lost")
    assert refusal.text == "rank 0 ended after 2 tokens of the answer; this engine cannot go on with it"
    ((rank, again),) = adds(effects)
    assert (rank, again.made_token_ids, again.params) == (1, [], unseen.params)


@pytest.mark.parametrize("most", [1, MOST_LOSSES, 5])
def test_a_request_that_loses_one_rank_after_the_other_without_a_token_is_given_up(most: int) -> None:
    machine = frontend(most_losses=most)
    say(machine, submit(machine, 1), 50)
    effects: list[events.Effect] = []
    for life in range(20, 20 + most):
        assert not [effect for effect in effects if isinstance(effect, events.Refuse)]
        effects += machine.handle(members((0, life), (1, life)), 1.0)
    (refusal,) = [effect for effect in effects if isinstance(effect, events.Refuse)]
    assert refusal.text.endswith(f"ended while it served this request, the last of {most} in a row")
    assert machine.in_flight() == 0


def test_ranks_whose_connections_come_back_were_killed_by_no_request() -> None:
    """A rank that was stopped, or silent, for a moment: `make chaos` with bad frames lost requests so."""
    machine = frontend()
    say(machine, submit(machine, 1), 50)
    for turn in range(3 * MOST_LOSSES):
        rank = turn % 2
        assert [at for at, _ in adds(machine.handle(events.LinkDown(rank), 1.0))] == [1 - rank]
        machine.handle(events.LinkUp(rank), 1.0)
    assert machine.in_flight() == 1


def many_down() -> Frontend:
    """A request that has just lost one rank after the other; nobody knows yet whether these are dead."""
    machine = frontend()
    lives = [(rank, 10 + rank) for rank in range(MOST_LOSSES + 1)]
    machine.handle(members(*lives), 0.0)
    ((rank, _),) = [(0, submit(machine, 1))]
    for _ in range(MOST_LOSSES):
        effects = machine.handle(events.LinkDown(rank), 1.0)
        assert not [effect for effect in effects if isinstance(effect, events.Refuse)]
        rank = adds(effects)[0][0] if adds(effects) else -1
    assert rank == -1, "it is kept from those that are left"
    return machine


def test_a_request_that_may_kill_ranks_waits_until_one_is_back() -> None:
    machine = many_down()
    assert len(adds(machine.handle(events.LinkUp(0), 2.0))) == 1
    assert machine.in_flight() == 1


def test_a_request_that_may_kill_ranks_is_given_up_once_these_are_known_to_be_dead() -> None:
    machine = many_down()
    dead = [(rank, life) for rank, life in ((rank, 10 + rank) for rank in range(MOST_LOSSES + 1))]
    up = [handle.rank for handle in machine._inflight.handles.values()]
    effects = machine.handle(members(ended=tuple(one for one in dead if one[0] not in up)), 2.0)
    (refusal,) = [effect for effect in effects if isinstance(effect, events.Refuse)]
    assert refusal.text.endswith(f"the last of {MOST_LOSSES} in a row")
    assert machine.in_flight() == 0


def test_ranks_that_die_while_the_deployment_is_paused_are_not_killed_by_a_request() -> None:
    machine = frontend()
    say(machine, submit(machine, 1), 50)
    suspended = LoadView(9, 10**6, 0, False, [], suspension=SuspensionState(1, "keep"))
    machine.handle(events.CoordinatorSaid(suspended), 1.0)
    for life in range(20, 20 + 2 * MOST_LOSSES):
        effects = machine.handle(members((0, life), (1, life)), 1.0)
        assert adds(effects)
    assert machine.in_flight() == 1


def test_a_request_that_is_ended_twice_in_one_message_is_ended_once() -> None:
    machine = frontend()
    sent = submit(machine, 1)
    twice = [Output(sent.request, [7], finish_reason="stop")] * 2
    (delivered,) = machine.handle(events.RankSaid(Outputs(0, sent.incarnation, twice)), 1.0)
    assert isinstance(delivered, events.Deliver)
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
    machine.handle(events.LinkDown(0), 1.0)
    entry = RankView(0, 10, 5, Load(waiting=3), {IDENTITY: 1})
    machine.handle(events.CoordinatorSaid(LoadView(1, 1, 0, False, [entry])), 1.5)
    machine.handle(events.LinkUp(0), 2.0)
    assert machine.believed(0) == Load(waiting=3)


def test_links_of_nobody_change_nothing() -> None:
    machine = frontend()
    for event in (events.LinkUp(0), events.LinkUp(5), events.LinkDown(5), events.LinkDown(0), events.LinkDown(0)):
        assert machine.handle(event, 1.0) == []
    assert machine.ready_ranks() == [1]


def hung(*ranks: int, lives: dict[int, int] | None = None, ended: Any = ()) -> events.CoordinatorSaid:
    known = [Member(rank, life, f"address {life}") for rank, life in (lives or LIVES).items()]
    stalls = [Stall(rank, 3, 3, "step", 30.0, [rank]) for rank in ranks]
    return events.CoordinatorSaid(Members(PROTOCOL_VERSION, 1, 0, False, known, ended=list(ended), stalls=stalls))


def test_what_a_rank_has_that_hangs_goes_on_elsewhere_and_it_forgets_that_when_it_goes_on() -> None:
    machine = frontend()
    first = submit(machine, 1)
    say(machine, first, 50)
    ((rank, again),) = adds(machine.handle(hung(0), 1.0))
    assert (rank, again.made_token_ids) == (1, [50])
    assert machine.handle(hung(0), 1.5) == []
    assert submit(machine, 2, None).incarnation == LIVES[1], "nothing new goes there"
    assert say(machine, first, 51) == [], "the request is another rank's"
    assert aborts(machine.handle(hung(), 2.0)) == [(0, [first.request])]
    assert machine.ready_ranks() == [0, 1]


def test_a_request_that_only_its_rank_can_go_on_with_stays() -> None:
    machine = frontend(resumes=False)
    begun, waits = submit(machine, 1), submit(machine, 2)
    say(machine, begun, 50)
    ((rank, again),) = adds(machine.handle(hung(0), 1.0))
    assert (rank, again.request > 2) == (1, True)
    assert [output.request for output in say(machine, begun, 51)] == [1]
    assert aborts(machine.handle(hung(), 2.0)) == [(0, [waits.request])]
    assert [output.finish_reason for output in say(machine, begun, 52, finish="length")] == ["length"]
    assert machine.in_flight() == 1


def test_what_has_stayed_is_lost_with_its_rank() -> None:
    machine = frontend(resumes=False)
    say(machine, submit(machine, 1), 50)
    machine.handle(hung(0), 1.0)
    effects = machine.handle(hung(lives={1: LIVES[1]}, ended=[(0, LIVES[0])]), 2.0)
    assert [effect.reason for effect in effects if isinstance(effect, events.Refuse)] == ["rank-lost"]
    assert machine.in_flight() == 0


def test_a_rank_that_hangs_and_is_cut_off_is_back_when_both_are_over() -> None:
    machine = frontend()
    machine.handle(hung(0), 1.0)
    machine.handle(events.LinkDown(0), 1.0)
    machine.handle(hung(), 2.0)
    assert machine.ready_ranks() == [1]
    machine.handle(hung(0), 3.0)
    machine.handle(events.LinkUp(0), 3.0)
    assert machine.ready_ranks() == [1]
    machine.handle(hung(), 4.0)
    assert machine.ready_ranks() == [0, 1]


def test_the_next_life_of_a_rank_that_hung_is_up() -> None:
    machine = frontend()
    machine.handle(hung(0), 1.0)
    machine.handle(hung(lives={0: 20, 1: 11}), 2.0)
    assert machine.ready_ranks() == [0, 1]
