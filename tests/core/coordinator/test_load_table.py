"""The load table: whose loads are shown, when they are published, and what is sent and not yet in a report."""

from __future__ import annotations

import random

import pytest

from paceline.core.binding import Send
from paceline.core.coordinator.load_table import STEP_WAIT_S, LoadTable, PublishClock, UnackedSends
from paceline.core.dispatch.capacity import Amount
from paceline.core.load import Load
from paceline.core.messages import Member, OnTheWire, RankReport, RankView
from tests.core.harness import find, one

FIRST, SECOND = 100, 200
MEMBERS = [Member(0, 10, "a"), Member(1, 11, "b")]


def report(rank: int, step: int, waiting: int = 0, incarnation: int | None = None, **taken: int) -> RankReport:
    by_identity = {int(name[1:]): number for name, number in taken.items()}
    return RankReport(rank, incarnation or 10 + rank, step, 0, False, Load(waiting), by_identity)


def view(load_table: LoadTable, rank: int) -> RankView:
    return one(find(load_table.views(MEMBERS), RankView, rank=rank))


def test_the_latest_report_of_each_rank_is_shown() -> None:
    load_table = LoadTable()
    assert load_table.report(report(0, 1, waiting=5))
    assert load_table.report(report(1, 900, waiting=6))
    assert load_table.report(report(0, 2, waiting=7, f100=3))
    header = view(load_table, 0)
    assert (header.step, header.load.waiting, header.taken) == (2, 7, {FIRST: 3})
    assert view(load_table, 1).load.waiting == 6


def test_a_new_life_begins_its_steps_anew() -> None:
    load_table = LoadTable()
    load_table.report(report(0, 50))
    assert load_table.report(report(0, 1, waiting=2, incarnation=99))
    assert one(load_table.views([Member(0, 99, "a")])).load.waiting == 2


def test_what_an_old_life_reported_is_not_shown_for_the_new_one() -> None:
    load_table = LoadTable()
    load_table.report(report(0, 50, waiting=9))
    assert not find(load_table.views([Member(0, 99, "a")]), RankView, load=Load(9))


def test_only_ready_ranks_are_shown_in_their_order() -> None:
    load_table = LoadTable()
    for rank in (2, 1, 0):
        load_table.report(report(rank, 1))
    assert [entry.rank for entry in load_table.views(MEMBERS)] == [0, 1]


def test_a_send_that_was_taken_before_word_of_it_came_is_not_unacked() -> None:
    load_table = LoadTable()
    load_table.report(report(0, 1, f100=2))
    load_table.sent(FIRST, Send(0, 10, 2, 10))
    assert view(load_table, 0).on_the_wire == []
    load_table.sent(FIRST, Send(0, 10, 3, 10))
    assert find(view(load_table, 0).on_the_wire, OnTheWire, requests=1)


def test_a_send_to_another_life_is_not_measured_by_this_ones_report() -> None:
    load_table = LoadTable()
    load_table.report(report(0, 1, f100=9))
    load_table.sent(FIRST, Send(0, 99, 1, 10))
    load_table.report(report(0, 1, incarnation=99))
    assert find(one(load_table.views([Member(0, 99, "a")])).on_the_wire, OnTheWire, requests=1)


def test_who_is_gone_is_forgotten() -> None:
    load_table = LoadTable()
    for rank in (0, 1):
        load_table.report(report(rank, 1, waiting=3))
        for frontend in (FIRST, SECOND):
            load_table.sent(frontend, Send(rank, 10 + rank, 1, 10))
    load_table.forget_frontend(FIRST)
    assert [unacked.frontend for unacked in view(load_table, 0).on_the_wire] == [SECOND]
    load_table.forget_rank(0)
    assert not find(load_table.views(MEMBERS), RankView, rank=0, load=Load(3))
    assert view(load_table, 1).load.waiting == 3
    assert [unacked.frontend for unacked in view(load_table, 1).on_the_wire] == [SECOND]
    load_table.report(report(0, 1))
    assert view(load_table, 0).on_the_wire == []


def test_one_step_follows_every_report_and_every_change_of_the_members() -> None:
    chance, load_table = random.Random(3), LoadTable()
    members = [Member(rank, 10 + rank, "a") for rank in range(4)]
    steps: dict[int, int] = {}
    for _ in range(3000):
        rank = chance.randrange(4)
        if chance.random() < 0.03:
            load_table.forget_rank(rank)
            steps.pop(rank, None)
        elif chance.random() < 0.03:
            members = [Member(rank, 10 + rank, "a") for rank in range(4) if chance.random() < 0.8]
        else:
            steps[rank] = max(steps.get(rank, 0) + chance.randrange(2), max(steps.values(), default=0) - 1)
            assert load_table.report(report(rank, steps[rank]))
        header = {steps[member.rank] for member in members if member.rank in steps}
        assert load_table.one_step(members) == (len(header) <= 1)


def test_who_was_behind_in_a_view_is_not_waited_for_until_it_reports() -> None:
    members = [Member(rank, 10 + rank, "a") for rank in range(3)]
    load_table = LoadTable()
    for rank in range(3):
        load_table.report(report(rank, 5))
    load_table.report(report(0, 6))
    load_table.report(report(1, 6))
    assert not load_table.one_step(members)
    load_table.pass_over()
    # Rank 2 has nothing to say; the other two are waited for as ever.
    load_table.report(report(0, 7))
    assert not load_table.one_step(members)
    load_table.report(report(1, 7))
    assert load_table.one_step(members)
    load_table.pass_over()
    load_table.report(report(2, 7))
    load_table.report(report(0, 8))
    load_table.report(report(1, 8))
    assert not load_table.one_step(members)
    load_table.report(report(2, 8))
    assert load_table.one_step(members)


# The clock ------------------------------------------------------------------------------------
def test_the_first_view_is_due_at_once() -> None:
    assert PublishClock(0.1).due(0.0)


def test_a_whole_step_may_go_out_early_and_moves_no_later_view() -> None:
    clock = PublishClock(0.1)
    clock.published(1.0)
    for count in range(1, 50):
        on_time = 1.0 + count * 0.1
        early = on_time - STEP_WAIT_S
        clock.changed(early - 0.05)
        assert clock.deadline() == pytest.approx(early)
        assert not clock.due(early - 1e-6)
        assert clock.due(early + 1e-6)
        clock.published(early + 1e-6)


def test_half_a_step_waits_until_its_time_and_no_longer() -> None:
    """Ranks that are never at one step, and as fast as they can be."""
    clock = PublishClock(0.1)
    clock.published(1.0)
    for count in range(1, 50):
        on_time = 1.0 + count * 0.1
        clock.changed(on_time - 0.0999)
        assert clock.due(on_time - STEP_WAIT_S / 2)
        assert clock.hold(on_time - STEP_WAIT_S / 2)
        assert clock.deadline() == pytest.approx(on_time)
        assert not clock.hold(on_time + 1e-9)
        clock.published(on_time)


def test_half_a_step_that_comes_late_has_the_whole_wait() -> None:
    clock = PublishClock(0.1)
    clock.published(1.0)
    clock.changed(1.099)
    assert clock.due(1.099)
    assert clock.hold(1.1)
    assert clock.deadline() == pytest.approx(1.099 + STEP_WAIT_S)


@pytest.mark.parametrize("interval_s", [0.0, 0.001, 0.005])
def test_a_short_interval_is_kept_on_average(interval_s: float) -> None:
    clock, now, views = PublishClock(interval_s), 0.0, 0
    while views < 200:
        clock.changed(now)
        now = max(now, clock.deadline())
        assert clock.due(now)
        clock.published(now)
        views += 1
    assert now >= (views - 2) * interval_s


def test_a_hold_ends_and_begins_anew_with_each_view() -> None:
    clock = PublishClock(0.1)
    for begin in (1.0, 2.0):
        clock.changed(begin)
        assert clock.hold(begin)
        assert clock.deadline() == begin + STEP_WAIT_S
        assert clock.hold(begin + STEP_WAIT_S / 2)
        assert not clock.hold(begin + STEP_WAIT_S)
        clock.published(begin + STEP_WAIT_S)


def test_further_changes_do_not_move_the_deadline() -> None:
    for seed in range(50):
        chance, clock, now = random.Random(seed), PublishClock(0.1, 0.0), 0.0
        clock.published(0.0)
        clock.changed(0.01)
        while now < 0.1:
            assert clock.deadline() == 0.1
            now += chance.random() * 0.02
            clock.changed(now)
        assert clock.due(now)


# What is on the wire to a rank: the sum is the sum of the accountings, whatever is told in whatever -----


def test_the_sum_is_the_sum_of_the_accountings() -> None:
    chance = random.Random(3)
    unacked, numbers = UnackedSends(), dict.fromkeys(range(5), 0)
    for _ in range(3000):
        frontend = chance.randrange(5)
        what = chance.random()
        if what < 0.5:
            numbers[frontend] += chance.choice([0, 1, 1, 2])
            unacked.sent(frontend, Send(0, 10, numbers[frontend], chance.randrange(9), chance.randrange(9)), {})
        elif what < 0.97:
            unacked.reported({one: chance.randint(0, number) for one, number in numbers.items()})
        else:
            unacked.forget(frontend)
        accountings = unacked.accountings.values()
        assert unacked.total == Amount(
            sum(one.requests for one in accountings),
            sum(one.tokens for one in accountings),
            sum(one.kv for one in accountings),
        )
