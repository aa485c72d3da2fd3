"""Requests with a deadline, and tenants where the queue is full: what is refused as it comes, what while it waits."""

from __future__ import annotations

import pytest

from paceline.core.binding import Ask, Shares, Withdraw
from paceline.core.frontend import events
from paceline.core.frontend.deadlines import TIDY_FROM
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, LoadView, Member, Members, RankView
from paceline.core.requests import Output, Outputs, SamplingParams
from paceline.core.routing import LeastLoad
from tests.core.harness import find, said

IDENTITY, LIFE = 1, 10
COSTS = Load(0, 2, 2, step_s=0.01, prompt_token_s=0.001, answer_token_s=0.0, answer_tokens=50)


def frontend(load: Load = COSTS, *, late_binding: bool = True, max_waiting: int | None = None) -> Frontend:
    """With one rank of this load, and a queue where nothing is granted by itself."""
    machine = Frontend(IDENTITY, LeastLoad(), late_binding=late_binding, max_waiting=max_waiting)
    members = Members(PROTOCOL_VERSION, 1, 0, False, [Member(0, LIFE, "tcp://a")])
    machine.handle(events.CoordinatorSaid(members), 0.0)
    shares = [Shares(IDENTITY, 1, [])] if late_binding else None
    view = LoadView(1, 1, 0, False, [RankView(0, LIFE, 1, load, {}, [])], shares=shares)
    machine.handle(events.CoordinatorSaid(view), 0.0)
    return machine


def submit(machine: Frontend, request: int, now: float = 0.0, *, tokens: int = 10, answer: int = 100,
           deadline: float = float("inf"), tenant: int = 0, weight: float = 1.0) -> list[events.Effect]:  # fmt: skip
    asked = events.Submit(
        request, [7] * tokens, SamplingParams(answer), deadline=deadline, tenant=tenant, weight=weight
    )
    return machine.handle(asked, now)


def refusals(effects: list[events.Effect]) -> list[tuple[int, str]]:
    return [(one.request, one.reason) for one in find(effects, events.Refuse)]


def test_what_cannot_be_answered_in_time_is_refused_at_once_and_told_when_it_could() -> None:
    machine = frontend()
    # 10 tokens of prompt take 10 ms, and an answer of 50 tokens, as they are there, half a second.
    (refusal,) = find(submit(machine, 1, deadline=0.4), events.Refuse)
    assert (refusal.reason, refusal.retry_after_s) == ("late", 1)
    assert refusal.text == "X-Request-Deadline-Ms: it would take about 510 ms now, and 400 are left"
    assert not refusals(submit(machine, 2, deadline=0.6))
    assert not refusals(submit(machine, 3, deadline=0.1, answer=2))


def test_an_answer_that_must_be_long_is_not_taken_for_a_usual_one() -> None:
    short = Load(0, 2, 2, step_s=0.01, prompt_token_s=0.001, answer_tokens=2)
    machine = frontend(short)
    assert not refusals(submit(machine, 1, deadline=0.2))
    for request, params in ((2, SamplingParams(100, ignore_eos=True)), (3, SamplingParams(100, min_tokens=90))):
        asked = events.Submit(request, [7] * 10, params, deadline=0.2)
        assert refusals(machine.handle(asked, 0.0)) == [(request, "late")]


def test_nothing_is_refused_before_anything_is_known() -> None:
    assert not refusals(submit(frontend(Load()), 1, deadline=0.001))


def test_what_waits_is_refused_when_it_could_not_be_in_time_any_more() -> None:
    machine = frontend()
    submit(machine, 1, deadline=2.0)
    submit(machine, 2)
    assert machine.deadline <= 1.49
    assert not refusals(machine.handle(events.Tick(), 0.4))
    machine.handle(events.CoordinatorSaid(LoadView(1, 2, 0, False, [], shares=[Shares(IDENTITY, 1, [])])), 1.4)
    effects = machine.handle(events.Tick(), 1.5)
    assert refusals(effects) == [(1, "late")]
    assert [message.requests for message in said(effects, Withdraw)] == [[1]]
    assert machine.waiting_for_grant() == [2]
    assert not refusals(machine.handle(events.Tick(), 1.6))


def test_one_whose_client_has_gone_is_not_refused() -> None:
    machine = frontend()
    submit(machine, 1, deadline=2.0)
    machine.handle(events.Abandon([1]), 0.1)
    assert not refusals(machine.handle(events.Tick(), 5.0))
    assert machine.deadline == float("inf")


def test_nothing_is_kept_of_those_that_have_gone() -> None:
    machine = frontend()
    submit(machine, 1, deadline=1000.0)
    for request in range(2, 5 * TIDY_FROM):
        submit(machine, request, deadline=2000.0)
        machine.handle(events.Abandon([request]), 0.1)
    assert len(machine._placement._deadlines._waiting) <= 2 * TIDY_FROM
    assert machine._placement._deadlines.due < 1000.0


def test_the_wait_is_reckoned_from_how_fast_requests_end() -> None:
    machine = frontend(late_binding=False, load=Load(4, 2, 2, step_s=0.001, prompt_token_s=0.0001, answer_tokens=5))
    for request in (1, 2, 3):
        submit(machine, request)
    machine.handle(events.RankSaid(Outputs(0, LIFE, [Output(1, [5], finish_reason="stop")])), 4.0)
    # Six wait, two are under way here, and one takes four seconds.
    (refusal,) = find(submit(machine, 4, 4.0, deadline=6.0), events.Refuse)
    assert (refusal.reason, refusal.retry_after_s > 5) == ("late", True)
    assert not refusals(submit(machine, 5, 4.0, deadline=60.0))


def test_who_fills_the_queue_fills_it_for_itself_alone() -> None:
    machine = frontend(max_waiting=4)
    for request in range(4):
        submit(machine, request + 1, tenant=1)
    assert refusals(submit(machine, 10, tenant=1)) == [(10, "overloaded")]
    assert not refusals(submit(machine, 11, tenant=2))
    assert not refusals(submit(machine, 12, tenant=2))
    assert refusals(submit(machine, 13, tenant=1)) == [(13, "overloaded")]
    # It has as many as the other by now.
    assert not refusals(submit(machine, 14, tenant=2))
    assert not refusals(submit(machine, 15, tenant=2))
    assert refusals(submit(machine, 16, tenant=2)) == [(16, "overloaded")]
    machine.handle(events.Abandon([1, 2, 3, 4]), 0.1)
    assert not machine._binding.tenants.get(1)


@pytest.mark.parametrize(("weight", "allowed"), [(1.0, 2), (2.0, 4), (0.5, 1)])
def test_its_part_is_by_weight(weight: float, allowed: int) -> None:
    machine = frontend(max_waiting=2)
    submit(machine, 1, tenant=1)
    submit(machine, 2, tenant=1)
    answers = [refusals(submit(machine, 10 + number, tenant=2, weight=weight)) for number in range(8)]
    assert answers.index([(10 + allowed, "overloaded")]) == allowed


def test_the_coordinator_is_told_whose_they_are() -> None:
    (ask,) = said(submit(frontend(), 1, tenant=5, weight=2.5), Ask)
    assert [(one.tenant, one.weight) for one in ask.descriptors] == [(5, 2.5)]
