"""The prefill quota in a rank's machine: what it steps with, when it agrees anew, when it urges the others to."""

from __future__ import annotations

from typing import Any

import pytest
from msgspec.structs import replace

from paceline.core.load import Load
from paceline.core.messages import Admit
from paceline.core.rank.events import (
    Agree,
    Agreed,
    CoordinatorSaid,
    Effect,
    Formed,
    FrontendSaid,
    Loaded,
    Step,
    Stepped,
    Turn,
    Urge,
)
from paceline.core.rank.machine import Rank
from paceline.core.rank.prefill_quota import (
    AUTO,
    OFF,
    PATIENCE,
    UNLIMITED,
    Outcome,
    Part,
    RankQuota,
    agreed,
    decide,
    fixed,
    pending,
)
from paceline.core.requests import AddRequest, SamplingParams
from tests.core.harness import find, one

BUDGET, INTERVAL = 800, 4
STEP_S, TOKEN_S = 0.02, 0.001
DECODING = Load(0, 8, 8, 0, step_tokens=BUDGET, decoding=8, startable_tokens=0)
PENDING = replace(DECODING, waiting=1, prefill_tokens=500, startable_tokens=500)


def running(setting: int = AUTO, group: str = "") -> Rank:
    """A rank that has just begun to run in a wave."""
    machine = Rank(0, 1, "address", lockstep=True, sync_interval=INTERVAL, prefill_quota=setting, group_address=group)
    machine.handle(Loaded(), 0.0)
    machine.handle(CoordinatorSaid(Admit(0, 1, 0)), 0.0)
    machine.handle(FrontendSaid(7, AddRequest(1, 1, 1, 0, [1] * 9, SamplingParams(5))), 0.0)
    return machine


def step(machine: Rank, before: Load, after: Load, prefilled: int = 0, urged: bool = False) -> tuple[Any, list[Effect]]:
    """A turn, its step, and what follows the step."""
    turn = machine.handle(Turn(before, True), 0.0)
    seconds = STEP_S + TOKEN_S * prefilled
    done = machine.handle(Stepped((), after, True, prefilled, after.decoding, seconds, urged), 1.0)
    return turn, done


def agree(machine: Rank, done: list[Effect], *others: Agree) -> Outcome:
    """The ranks agree; the other ones put in what is given, or the same."""
    result = agreed([one(find(done, Agree)), *others])
    machine.handle(result, 1.0)
    return decide(result.quota)


def other(load: Load, **changes: int) -> Agree:
    """What another rank puts in that has measured the same costs."""
    part = Part(BUDGET, pending(load), load.decoding, load.slots, 20_000_000, 1_000_000)._replace(**changes)
    return Agree(True, 0, 0, part.packed())


def settled(load: Load = DECODING, others: int = 3) -> Rank:
    """A rank that has agreed once with others that decode, its costs known."""
    machine = running()
    _, done = step(machine, PENDING, DECODING, 500)
    agree(machine, done, *[other(DECODING)] * others)
    for _ in range(INTERVAL):
        _, done = step(machine, load, load)
    agree(machine, done, *[other(load)] * others)
    return machine


def test_nothing_is_agreed_at_first_and_what_is_agreed_comes_with_the_next_step() -> None:
    machine = running()
    turn, done = step(machine, PENDING, PENDING, 100)
    assert find(turn, Step, prefill_quota=None)
    made = agree(machine, done, *[other(PENDING)] * 3)
    assert made.quota
    assert made.pending
    assert find(machine.handle(Turn(PENDING, True), 2.0), Step, prefill_quota=made.quota)


def test_while_anyone_has_a_prompt_they_agree_after_every_step_and_at_rest_at_the_interval() -> None:
    machine = running()
    _, done = step(machine, DECODING, DECODING)
    agree(machine, done, other(PENDING))
    for _ in range(3):
        _, done = step(machine, DECODING, DECODING)
        assert find(done, Agree), "the other one has"
        agree(machine, done, other(PENDING))
    _, done = step(machine, DECODING, DECODING)
    agree(machine, done, other(DECODING))
    pattern = []
    for _ in range(2 * INTERVAL):
        _, done = step(machine, DECODING, DECODING)
        pattern.append(bool(find(done, Agree)))
        if pattern[-1]:
            agree(machine, done, other(DECODING))
    assert pattern.count(True) == 2


def test_a_new_prompt_urges_unless_the_quota_holds_it_or_all_agree_anyway() -> None:
    machine = settled()
    assert machine.quota.tokens == 0
    turn, done = step(machine, PENDING, PENDING, urged=True)
    assert [type(effect) for effect in turn if isinstance(effect, Urge | Step)] == [Urge, Step]
    assert find(turn, Step, prefill_quota=0), "not beyond what was agreed"
    agree(machine, done, *[other(DECODING)] * 3)
    assert not find(machine.handle(Turn(PENDING, True), 2.0), Urge), "they agree after this step in any case"
    idle = settled(replace(DECODING, decoding=1))
    assert idle.quota.tokens
    small = replace(DECODING, startable_tokens=idle.quota.tokens, prefill_tokens=900)
    assert not find(idle.handle(Turn(small, True), 2.0), Urge)


def test_a_prompt_does_not_wait_for_ever() -> None:
    machine, quotas = settled(), []
    for _ in range(PATIENCE + 3):
        turn, done = step(machine, PENDING, PENDING, urged=True)
        quotas.append(one(find(turn, Step)).prefill_quota)
        agree(machine, done, *[other(DECODING)] * 3)
    assert quotas == [0] * (PATIENCE + 1) + [BUDGET // 8, 0]


def test_the_end_of_a_wave_or_generation_makes_it_void() -> None:
    machine = settled()
    _, done = step(machine, DECODING, DECODING, urged=True)
    machine.handle(Agreed(False, 0, 0, [*one(find(done, Agree)).quota]), 1.0)
    assert machine.quota.tokens is None
    joined = settled()
    joined.handle(Formed(3), 2.0)
    assert joined.quota.tokens is None
    assert find(step(joined, DECODING, DECODING)[1], Agree), "after the first step"


def test_costs_are_those_of_the_rank_that_had_the_most() -> None:
    mine = RankQuota(AUTO)
    for prompt in (0, 400, 0, 400, 0):
        # This rank decodes only; its step is long because of another one's prompt.
        done = Stepped((), DECODING, True, 0, 8, STEP_S + TOKEN_S * prompt)
        parts = [mine.contribution(done), other(DECODING, prefilled=prompt, decoded=8).quota]
        mine.agreed(agreed(Agree(True, 0, 0, part) for part in parts).quota, 0.0)
    contributed = mine.contribution(done)
    decode_ns, token_ns = contributed[9:11]
    assert decode_ns == pytest.approx(STEP_S * 1e9, rel=0.05)
    assert token_ns == pytest.approx(TOKEN_S * 1e9, rel=0.05)


@pytest.mark.parametrize(("setting", "quota"), [(OFF, None), (fixed(64), 64)])
def test_without_or_with_a_fixed_one_nothing_else_changes(setting: int, quota: int | None) -> None:
    machine = running(setting)
    pattern = []
    for _ in range(2 * INTERVAL):
        turn, done = step(machine, PENDING, PENDING)
        assert find(turn, Step, prefill_quota=quota)
        assert not find(turn, Urge)
        pattern.append(bool(find(done, Agree)))
        if pattern[-1]:
            agree(machine, done)
    assert pattern == [True, False, False, False] * 2


def test_a_rank_that_has_none_puts_in_the_same_whatever_it_does() -> None:
    assert RankQuota(OFF).contribution(Stepped((), PENDING, True, 9, 9, 1.0)) == UNLIMITED


def test_what_an_engine_does_not_say_is_taken_for_all_its_prompt_tokens() -> None:
    assert pending(Load(prefill_tokens=70)) == 70
    assert pending(Load(prefill_tokens=70, startable_tokens=0)) == 0
