"""Late binding by real machines on fake links: nobody waits behind a rank, and nothing is lost or sent twice."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings, strategies as st

from paceline.core import binding, messages  # fmt: skip
from paceline.core.coordinator import events as coordinator
from paceline.core.dispatch.dispatcher import UNANSWERED_S
from paceline.core.frontend.dispatch import SILENCE_S
from paceline.core.requests import ControlAction
from paceline.sim.deployment import Deployment
from paceline.sim.processes import FrontendProcess
from tests.pace import examples
from tests.sim.deployments import DELAY_S, STEP_S, placed, ready, rest as rest_of, seen

SLOTS = 4


def late_binding(ranks: int = 2, frontends: int = 2, **settings: bool) -> Deployment:
    """Ready, and idle for long enough that shares were handed out."""
    deployment = ready(ranks, frontends, late_binding=True, slots=SLOTS, **settings)
    deployment.world.run_for(1.0)
    return deployment


def held(deployment: Deployment) -> int:
    return sum(int(str(frontend.machine.statistics()["held"])) for frontend in deployment.frontends.values())


def queued(deployment: Deployment) -> int:
    assert deployment.coordinator is not None
    return len(list(deployment.coordinator.machine.dispatcher.descriptors()))


LONG = 4 * SLOTS
"""Tokens of answers so long that no rank gets a request for a slot that is about to be free (`STEPS_AHEAD`)."""


def never_behind_a_full_rank(deployment: Deployment) -> Callable[[], None]:
    def check() -> None:
        for rank in deployment.ranks.values():
            load = rank.engine.load()
            assert load.waiting + load.running <= SLOTS, f"{rank.name} has more than it can run"

    return check


def rest(deployment: Deployment) -> None:
    """Everything is answered, nothing waits anywhere, and all is counted exactly."""
    rest_of(deployment)
    assert (held(deployment), queued(deployment)) == (0, 0)


# Several queues ---------------------------------------------------------------------------------
def test_a_nodes_full_queue_is_no_other_nodes() -> None:
    """Hybrid mode: or one that is overloaded would have all others refuse, whose ranks are free."""
    deployment = late_binding(2, 2, lockstep=False, hybrid=True)
    busy, idle = deployment.frontends.values()
    for _ in range(SLOTS + 10):
        busy.submit(max_tokens=100)
    # Until they have heard of it by grants and by views.
    for _ in range(3):
        deployment.world.run_for(0.1)
        assert (busy.machine.queued(), idle.machine.queued()) == (10, 0)
        assert idle.machine.waiting() == 0
    deployment.finish()
    assert busy.machine.queued() == 0


# Idle -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("frontends", [1, 2, 3])
def test_no_hop_is_added_while_ranks_are_free(frontends: int) -> None:
    deployment = late_binding(4, frontends, lockstep=False)
    for index, frontend in deployment.frontends.items():
        for _ in range(2):
            request = frontend.submit(max_tokens=3)
            assert request in placed(frontend), f"front-end {index} asks although ranks are free"
    deployment.finish()
    rest(deployment)


def test_one_frontend_has_the_whole_capacity_as_its_credit() -> None:
    deployment = late_binding(2, 1, lockstep=False)
    for _ in range(2 * SLOTS):
        deployment.frontends[0].submit(max_tokens=3)
    assert len(placed(deployment.frontends[0])) == 2 * SLOTS
    deployment.frontends[0].submit()
    assert held(deployment) == 1
    rest(deployment)


def test_who_has_used_up_its_credit_is_answered_at_once_where_ranks_are_free() -> None:
    deployment = late_binding(2, 2, lockstep=False)
    frontend = deployment.frontends[0]
    while len(placed(frontend)) == len(frontend.answers):
        frontend.submit(max_tokens=50)
    deployment.world.run_for(2.5 * DELAY_S)
    assert held(deployment) == 0
    rest(deployment)


def test_what_lies_idle_at_others_is_had_after_a_recall() -> None:
    deployment = late_binding(2, 4, lockstep=False)
    deployment.world.after_each = never_behind_a_full_rank(deployment)
    for _ in range(2 * SLOTS):
        deployment.frontends[0].submit(max_tokens=50)
    deployment.world.run_for(6 * DELAY_S)
    assert held(deployment) == 0
    rest(deployment)


def test_a_recall_that_was_lost_comes_again() -> None:
    deployment = late_binding(1, 2, lockstep=False)
    deployment.world.after_each = never_behind_a_full_rank(deployment)
    deployment.frontends[1].broadcasts.lose(binding.Grants, times=2)
    for _ in range(SLOTS):
        deployment.frontends[0].submit(max_tokens=100)
    deployment.world.run_for(0.4)
    assert held(deployment) == 0
    rest(deployment)


# Full -------------------------------------------------------------------------------------------
@pytest.mark.parametrize("lockstep", [False, True])
@pytest.mark.parametrize("frontends", [1, 2, 4])
def test_a_burst_far_above_the_slots_is_served_in_order_and_nobody_waits_behind_a_rank(
    frontends: int, lockstep: bool
) -> None:
    deployment = late_binding(4, frontends, lockstep=lockstep)
    deployment.world.after_each = never_behind_a_full_rank(deployment)
    asked: list[tuple[FrontendProcess, int]] = []
    for number in range(80):
        frontend = deployment.frontends[number % frontends]
        asked.append((frontend, frontend.submit(max_tokens=LONG + number % 7)))
        deployment.world.run_for(0.0002)
    deployment.finish()
    rest(deployment)
    when = seen(deployment).placed_at
    order = sorted(range(80), key=lambda number: when[asked[number][0].name, asked[number][1]])
    # By shares a front-end may go a little before one that has none left.
    assert max(abs(place - number) for place, number in enumerate(order)) <= 2 * frontends
    ranks = [rank for frontend in deployment.frontends.values() for rank in placed(frontend).values()]
    level = [ranks.count(number) for number in range(4)]
    assert max(level) - min(level) <= 6


def test_a_better_priority_goes_first() -> None:
    deployment = late_binding(1, 2, lockstep=False)
    for _ in range(SLOTS):
        deployment.frontends[0].submit(max_tokens=20)
    deployment.world.run_for(0.01)
    last = [deployment.frontends[0].submit(max_tokens=2, priority=5) for _ in range(2)]
    first = deployment.frontends[1].submit(max_tokens=2, priority=-5)
    deployment.world.run_until(lambda: first in placed(deployment.frontends[1]))
    assert not placed(deployment.frontends[0]).keys() & set(last)
    rest(deployment)


def test_a_request_that_names_its_rank_goes_there_though_it_is_full() -> None:
    deployment = late_binding(2, 1, lockstep=False)
    for _ in range(3 * SLOTS):
        deployment.frontends[0].submit(max_tokens=10)
    request = deployment.frontends[0].submit(rank=1)
    assert placed(deployment.frontends[0])[request] == 1
    rest(deployment)


def test_in_lockstep_a_granted_request_wakes_the_ranks() -> None:
    deployment = late_binding(3, 2)
    frontend = deployment.frontends[0]
    assert deployment.coordinator is not None
    deployment.coordinator.feed(coordinator.FrontendSaid(binding.ReturnShares(frontend.machine.identity, 1)))
    frontend.broadcasts.lose(messages.LoadView, times=1000)
    while not held(deployment):
        frontend.submit(max_tokens=4)
    deployment.finish(limit_s=1.0)
    frontend.broadcasts.lose_no_more()
    rest(deployment)


# Losses -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("lost", [binding.Ask, binding.SendNotice, messages.FrontendHello, binding.ReturnShares])
def test_what_a_frontend_says_may_be_lost(lost: type) -> None:
    deployment = late_binding(1, 2, lockstep=False)
    deployment.frontends[0].to_coordinator.lose(lost, times=2)
    for _ in range(3 * SLOTS):
        deployment.frontends[0].submit(max_tokens=3)
        deployment.frontends[1].submit(max_tokens=3)
    deployment.finish(limit_s=3.0)
    deployment.frontends[0].to_coordinator.lose_no_more()
    rest(deployment)


@pytest.mark.parametrize("lost", [binding.Grants, messages.LoadView])
def test_what_the_coordinator_says_may_be_lost(lost: type) -> None:
    deployment = late_binding(1, 2, lockstep=False)
    deployment.world.after_each = never_behind_a_full_rank(deployment)
    for _ in range(3 * SLOTS):
        deployment.frontends[0].submit(max_tokens=LONG)
        deployment.frontends[1].submit(max_tokens=LONG)
    deployment.frontends[0].broadcasts.lose(lost, times=3)
    deployment.finish(limit_s=3.0)
    deployment.frontends[0].broadcasts.lose_no_more()
    rest(deployment)


# Aborts and ends --------------------------------------------------------------------------------
def full(deployment: Deployment, waiting: int = 6) -> list[int]:
    """Fill all ranks through front-end 0, and let so many wait there; returns those."""
    frontend = deployment.frontends[0]
    for _ in range(SLOTS * deployment.shape.ranks):
        frontend.submit(max_tokens=40)
    deployment.world.run_for(20 * DELAY_S)
    requests = [frontend.submit(max_tokens=2) for _ in range(waiting)]
    deployment.world.run_for(5 * DELAY_S)
    assert (held(deployment), queued(deployment)) == (waiting, waiting)
    return requests


def test_what_is_abandoned_leaves_the_queue() -> None:
    deployment = late_binding(lockstep=False)
    waiting = full(deployment)
    deployment.frontends[0].abandon(*waiting[:4])
    deployment.world.run_for(5 * DELAY_S)
    assert (held(deployment), queued(deployment)) == (2, 2)
    rest(deployment)
    assert not placed(deployment.frontends[0]).keys() & set(waiting[:4])


def test_a_withdrawal_that_was_lost_is_made_up_for() -> None:
    deployment = late_binding(lockstep=False)
    waiting = full(deployment)
    deployment.frontends[0].to_coordinator.lose(binding.Withdraw)
    deployment.frontends[0].abandon(*waiting)
    rest(deployment)


def test_a_frontend_that_ends_leaves_nothing_in_the_queue() -> None:
    deployment = late_binding(lockstep=False)
    full(deployment)
    deployment.crash_frontend(0)
    deployment.world.run_for(2 * DELAY_S)
    assert queued(deployment) == 0
    request = deployment.frontends[1].submit()
    deployment.world.run_until(lambda: request in placed(deployment.frontends[1]))
    deployment.finish()


def test_when_the_last_frontend_has_gone_nothing_is_due() -> None:
    deployment = late_binding(frontends=1, lockstep=False)
    full(deployment)
    assert deployment.coordinator is not None
    deployment.coordinator.feed(coordinator.FrontendGone(deployment.frontends[0].machine.identity))
    deployment.coordinator.feed(coordinator.Tick())
    assert deployment.coordinator.machine.dispatcher.due is None


def hang(frontend: FrontendProcess) -> None:
    """It neither reads nor says anything, and its connections hold."""
    frontend.broadcasts.hold()
    frontend.to_coordinator.hold()


def goes_on(deployment: Deployment) -> None:
    """The one that has hung goes on, and has its requests brokered again."""
    frontend = deployment.frontends[0]
    frontend.to_coordinator.release()
    frontend.broadcasts.release()
    rest(deployment)
    full(deployment, waiting=2)
    rest(deployment)


def test_nobody_waits_for_the_grants_of_a_frontend_that_hangs() -> None:
    deployment = late_binding(lockstep=False)
    full(deployment, waiting=3 * SLOTS)
    hang(deployment.frontends[0])
    for _ in range(SLOTS):
        deployment.frontends[1].submit()
    deployment.world.run_until(deployment.frontends[1].finished, limit_s=UNANSWERED_S + 2.0)
    goes_on(deployment)


def test_nobody_waits_for_the_credits_of_a_frontend_that_hangs() -> None:
    deployment = late_binding(1, lockstep=False)
    hang(deployment.frontends[0])
    for _ in range(SLOTS):
        deployment.frontends[1].submit(max_tokens=300)
    deployment.world.run_for(UNANSWERED_S / 2)
    assert held(deployment) == 1
    deployment.world.run_for(UNANSWERED_S)
    assert held(deployment) == 0
    goes_on(deployment)


# The coordinator goes -----------------------------------------------------------------------------
def test_without_a_coordinator_what_waits_is_bound_after_a_silence_and_the_rest_at_once() -> None:
    deployment = late_binding(lockstep=False)
    waiting = full(deployment)
    deployment.crash_coordinator()
    frontend = deployment.frontends[0]
    deployment.world.run_for(SILENCE_S + STEP_S)
    assert held(deployment) == 0
    assert placed(frontend).keys() >= set(waiting)
    assert frontend.submit() in placed(frontend)
    deployment.finish()


def test_a_new_coordinator_is_asked_for_all_that_waits_and_the_queue_goes_on() -> None:
    deployment = late_binding(lockstep=False)
    deployment.world.after_each = never_behind_a_full_rank(deployment)
    waiting = full(deployment)
    deployment.crash_coordinator()
    deployment.world.run_for(SILENCE_S / 3)
    deployment.start_coordinator()
    deployment.world.run_for(10 * DELAY_S)
    assert (held(deployment), queued(deployment)) == (len(waiting), len(waiting))
    rest(deployment)


def test_after_a_silence_a_new_coordinator_has_the_queue_again() -> None:
    deployment = late_binding(lockstep=False)
    full(deployment)
    deployment.crash_coordinator()
    deployment.world.run_for(2 * SILENCE_S)
    deployment.start_coordinator()
    deployment.finish()
    deployment.world.run_for(0.5)
    full(deployment)
    rest(deployment)


@pytest.mark.parametrize("lost", [messages.Members, messages.LoadView, messages.FrontendHello, binding.Ask])
def test_losses_while_the_coordinator_changes(lost: type) -> None:
    deployment = late_binding(lockstep=False)
    full(deployment)
    deployment.crash_coordinator()
    for frontend in deployment.frontends.values():
        frontend.broadcasts.lose(lost)
        frontend.to_coordinator.lose(lost)
    deployment.start_coordinator()
    deployment.finish()
    for frontend in deployment.frontends.values():
        frontend.broadcasts.lose_no_more()
        frontend.to_coordinator.lose_no_more()
    rest(deployment)


def test_a_grant_of_a_coordinator_that_is_no_more_counts_no_more() -> None:
    deployment = late_binding(1, 1, lockstep=False)
    waiting = full(deployment, waiting=1)
    frontend = deployment.frontends[0]
    frontend.broadcasts.hold()
    deployment.world.run_until(lambda: deployment.coordinator.machine.dispatcher.granted > 0)  # type: ignore[union-attr]
    deployment.crash_coordinator()
    deployment.world.run_for(2 * SILENCE_S)
    assert waiting[0] in placed(frontend)
    frontend.broadcasts.release()
    deployment.start_coordinator()
    rest(deployment)


# A suspension -------------------------------------------------------------------------------------
@pytest.mark.parametrize("mode", ["keep", "wait"])
def test_a_paused_deployment_grants_nothing_until_it_is_resumed(mode: ControlAction) -> None:
    deployment = late_binding()
    frontend = deployment.frontends[0]
    frontend.control(mode)
    deployment.world.run_until(deployment.controlled)
    deployment.world.run_for(0.2)
    for each in deployment.frontends.values():
        each.submit()
    deployment.world.run_for(5.0)
    assert held(deployment) == 2
    frontend.control("resume")
    deployment.finish()


def test_a_pause_that_aborts_ends_what_waits() -> None:
    deployment = late_binding()
    waiting = full(deployment)
    frontend = deployment.frontends[0]
    frontend.control("abort")
    deployment.world.run_until(frontend.finished)
    assert {frontend.answers[request].finish_reason for request in waiting} == {"abort"}
    assert held(deployment) == 0
    deployment.world.run_for(1.0)
    assert queued(deployment) == 0


# Anything -----------------------------------------------------------------------------------------

ACTS = st.lists(
    st.tuples(
        st.sampled_from([
            "submit", "submit", "submit", "wait", "wait", "abandon", "lose down", "lose up", "crash", "start",
        ]),
        st.integers(0, 99),
    ),
    max_size=60,
)  # fmt: skip
DOWN, UP = (
    [binding.Grants, messages.LoadView, messages.Members],
    [binding.Ask, binding.Withdraw, binding.SendNotice, binding.ReturnShares, messages.FrontendHello],
)


@settings(max_examples=examples(60))
@given(ACTS, st.booleans())
def test_whatever_happens_every_request_has_one_place_and_an_end(acts: list[tuple[str, int]], lockstep: bool) -> None:
    deployment = late_binding(2, 2, lockstep=lockstep)
    for what, number in acts:
        frontend = deployment.frontends[number % 2]
        if what == "submit":
            rank = number % 2 if number % 9 == 0 else None
            frontend.submit(1 + number, 1 + number % 5, rank, number % 3)
        elif what == "wait":
            deployment.world.run_for(number * 0.003)
        elif what == "abandon" and frontend.answers:
            frontend.abandon(random.Random(number).choice(list(frontend.answers)))
        elif what == "lose down":
            frontend.broadcasts.lose(DOWN[number % len(DOWN)])
        elif what == "lose up":
            frontend.to_coordinator.lose(UP[number % len(UP)])
        elif what == "crash":
            deployment.crash_coordinator()
        elif what == "start" and deployment.coordinator is None:
            deployment.start_coordinator()
    if deployment.coordinator is None:
        deployment.start_coordinator()
    deployment.finish()
    for frontend in deployment.frontends.values():
        frontend.broadcasts.lose_no_more()
        frontend.to_coordinator.lose_no_more()
    rest(deployment)
    answers = [answer for frontend in deployment.frontends.values() for answer in frontend.answers.values()]
    assert all(answer.finish_reason or answer.refused or answer.abandoned for answer in answers)
