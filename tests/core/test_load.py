"""The exact accounting: what a front-end believes is a report that it has, plus its sends that the report lacks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings, strategies as st
from msgspec.structs import replace

from paceline.core.binding import SendNotice
from paceline.core.load import MAX_ACCOUNTED_SENDS, Accounting, Load, SpeedMeter, believed
from paceline.core.messages import LoadView
from paceline.sim.deployment import Deployment
from paceline.sim.processes import FrontendProcess
from tests.pace import examples
from tests.sim.deployments import ready, rest, seen

numbers = st.integers(0, 250)


class Walk:
    """Anything happens to a deployment whose `Checks` hold each belief against what was reported and sent.

    They count what went over the links, and never look into a accounting.
    """

    def __init__(self, ranks: int = 3, frontends: int = 3) -> None:
        self.deployment = ready(ranks, frontends, lockstep=False, slots=4, encode=False)
        self._size = (ranks, frontends)
        self._cut: set[tuple[int, int]] = set()
        self._views: list[LoadView] = []

    def act(self, what: str, a: int, b: int) -> None:
        """Let something happen to a front-end and a rank, and a little time pass."""
        self.deployment.world.run_for(0.002 * (a % 4))
        frontend, number = self.deployment.frontends[a % self._size[1]], b % self._size[0]
        getattr(self, what)(frontend, number, a % self._size[1], a * 31 + b)
        life = self.deployment.coordinator
        views = (one for one in seen(self.deployment).broadcasts if isinstance(one, LoadView))
        # What a life that is over has said comes before anything of the next.
        self._views = [one for one in views if life is not None and one.coordinator == life.machine.identity][-4:]
        seen(self.deployment).broadcasts[:] = self._views

    def submit(self, frontend: FrontendProcess, number: int, index: int, salt: int) -> None:
        named = number if salt % 3 == 0 and number in frontend.machine.ready_ranks() else None
        frontend.submit(1 + salt % 40, 1 + salt % 4, named)

    def abandon(self, frontend: FrontendProcess, number: int, index: int, salt: int) -> None:
        frontend.abandon(*list(frontend.answers)[-1 - salt % 3 :])

    def hold(self, frontend: FrontendProcess, number: int, index: int, salt: int) -> None:
        rank = self.deployment.ranks[number]
        link = (frontend.broadcasts, frontend.to_coordinator, rank.broadcasts, rank.to_coordinator)[salt % 4]
        if not link.held:
            link.hold()
            self.deployment.world.after(0.01 + 0.01 * (salt % 5), link.release)

    def view_again(self, frontend: FrontendProcess, number: int, index: int, salt: int) -> None:
        """An older view comes once more, or after a newer one."""
        view = self._views[salt % len(self._views)] if self._views else None
        # It has come once, so all from before has come.
        if view is not None and frontend.machine.statistics()["coordinator"] == view.coordinator:
            frontend.hear(view)

    def lose(self, frontend: FrontendProcess, number: int, index: int, salt: int) -> None:
        kind = (LoadView, SendNotice)[salt % 2]
        (frontend.broadcasts if kind is LoadView else frontend.to_coordinator).lose(kind)

    def cut_link(self, frontend: FrontendProcess, number: int, index: int, salt: int) -> None:
        up = (
            self.deployment.cut_link(number, index, severed=bool(salt % 3))
            if (index, number) not in self._cut
            else None
        )
        if up is not None:
            self._cut.add((index, number))
            self.deployment.world.after(0.01 * (1 + salt % 6), lambda: (self._cut.discard((index, number)), up()))

    def restart_rank(self, frontend: FrontendProcess, number: int, index: int, salt: int) -> None:
        self.deployment.crash_rank(number)
        self.deployment.world.run_for(0.001 * (salt % 9))
        self.deployment.start_rank(number)

    def restart_frontend(self, frontend: FrontendProcess, number: int, index: int, salt: int) -> None:
        self.deployment.crash_frontend(index)
        self.deployment.world.run_for(0.001 * (salt % 9))
        self.deployment.start_frontend(index)

    def restart_coordinator(self, frontend: FrontendProcess, number: int, index: int, salt: int) -> None:
        self.deployment.crash_coordinator()
        self.deployment.world.run_for(0.001 * (salt % 9))
        self.deployment.start_coordinator()

    def drain(self) -> None:
        """Let everything arrive and every rank finish; then every belief is the plain truth."""
        self.deployment.world.run_for(1.0)
        self.deployment.lose_no_more()
        self.deployment.ready()
        rest(self.deployment)


ORDINARY = ["submit", "submit", "submit", "abandon", "hold", "view_again", "lose"]
RARE = ["cut_link", "cut_link", "restart_rank", "restart_rank", "restart_frontend", "restart_coordinator"]
STEPS = st.lists(st.tuples(st.sampled_from([*ORDINARY, *RARE]), numbers, numbers), min_size=20, max_size=150)


@settings(max_examples=examples(60))
@given(STEPS)
def test_a_belief_is_a_report_and_the_sends_that_it_lacks(steps: list[tuple[str, int, int]]) -> None:
    walk = Walk()
    for step in steps:
        walk.act(*step)
    walk.drain()


def random_walk(seed: int, events: int) -> Deployment:
    """Walk until the machines have handled so many events; one in 50 acts ends somebody."""
    print(f"seed {seed}")
    chance, walk = random.Random(seed), Walk(ranks=4)
    while walk.deployment.world.journal.events < events:
        what = chance.choice(ORDINARY) if chance.random() > 0.02 else chance.choice(RARE)
        walk.act(what, chance.randrange(10_000), chance.randrange(10_000))
    walk.drain()
    return walk.deployment


@pytest.mark.slow
def test_the_accounting_is_exact_over_a_million_events() -> None:
    deployment = random_walk(seed=1, events=1_000_000)
    # The walk is worth its time only if it did something.
    assert len(deployment.coordinators) > 100
    assert len(deployment.retired) > 100
    assert sum(len(frontend.answers) for frontend in deployment.retired) > 10_000


def test_the_accounting_is_exact_in_many_short_walks() -> None:
    for seed in range(examples(10)):
        random_walk(seed, events=1_500)


def test_an_accounting_holds_what_no_report_holds() -> None:
    accounting = Accounting()
    for number, tokens in ((1, 10), (2, 20), (3, 30)):
        accounting.sent(number, tokens)
    assert (accounting.requests, accounting.tokens, accounting.last) == (3, 60, 3)
    accounting.reported(2)
    assert (accounting.requests, accounting.tokens, accounting.last) == (1, 30, 3)
    accounting.reported(3)
    assert (accounting.requests, accounting.tokens) == (0, 0)


def test_an_accounting_takes_nothing_twice_and_nothing_back() -> None:
    accounting = Accounting()
    accounting.sent(1, 10)
    accounting.sent(1, 10)
    assert accounting.requests == 1
    accounting.reported(1)
    accounting.reported(0)
    accounting.sent(1, 10)
    assert (accounting.requests, accounting.tokens) == (0, 0)
    accounting.reported(3)
    accounting.reported(1)
    accounting.sent(2, 20)
    accounting.sent(3, 30)
    assert (accounting.requests, accounting.tokens) == (0, 0)


def test_a_report_may_come_before_word_of_the_send_that_it_holds() -> None:
    accounting = Accounting()
    accounting.reported(2)
    accounting.sent(1, 10)
    accounting.sent(2, 20)
    accounting.sent(3, 30)
    assert (accounting.requests, accounting.tokens, accounting.last) == (1, 30, 3)


def test_an_accounting_is_bounded() -> None:
    accounting = Accounting()
    for number in range(1, MAX_ACCOUNTED_SENDS + 11):
        accounting.sent(number, 1)
    assert (accounting.requests, accounting.tokens) == (MAX_ACCOUNTED_SENDS, MAX_ACCOUNTED_SENDS)
    accounting.reported(MAX_ACCOUNTED_SENDS + 9)
    assert (accounting.requests, accounting.tokens) == (1, 1)


def test_a_belief_adds_to_what_waits_and_to_the_prompts() -> None:
    load = Load(waiting=2, running=3, slots=4, prefill_tokens=100)
    assert believed(load, 0, 0) == load
    assert believed(load, 5, 70) == replace(load, waiting=7, prefill_tokens=170)


def test_a_speed_is_unknown_at_first_and_weighted_by_time() -> None:
    meter = SpeedMeter()
    assert meter.rate == 0.0
    meter.add(100, 0.1)
    assert meter.rate == 1000
    meter.add(0, 0.1)
    assert 480 < meter.rate < 520


def test_a_speed_forgets_by_half_in_its_half_life() -> None:
    meter = SpeedMeter(half_life_s=1.0)
    meter.add(1000, 1.0)
    meter.add(0, 1.0)
    assert meter.rate == pytest.approx(500 / 1.5, rel=0.01)
    for _ in range(30):
        meter.add(70, 1.0)
    assert meter.rate == 70


def test_a_speed_has_three_digits_so_that_noise_is_no_change() -> None:
    meter = SpeedMeter()
    meter.add(123456, 1.0)
    assert meter.rate == 123_000
