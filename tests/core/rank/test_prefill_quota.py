"""The common prefill quota: one for all, never above a budget, never 0 for long; what a rank does with it."""

from __future__ import annotations

import random
from typing import Any

import pytest
from hypothesis import given, strategies as st
from msgspec.structs import replace

from paceline.core.load import Load
from paceline.core.messages import Admit
from paceline.core.rank import events
from paceline.core.rank.machine import Rank
from paceline.core.rank.prefill_quota import (
    AUTO,
    LARGEST,
    OFF,
    PART_REDUCTIONS,
    PATIENCE,
    UNLIMITED,
    Outcome,
    Part,
    RankQuota,
    agreed,
    decide,
    fixed,
    made,
    pending,
    reduced,
    setting_of,
)
from paceline.core.requests import AddRequest, SamplingParams
from paceline.engines.group import MAX_REDUCED
from tests.core.harness import find, one
from tests.sim.traces import LOCKSTEP, finished, mixed

MS = 1_000_000

parts = st.builds(
    Part, budget=st.one_of(st.just(0), st.integers(1, 100_000)),
    pending=st.one_of(st.just(0), st.integers(0, 1_000_000)), decoding=st.integers(0, 256), slots=st.integers(1, 256),
    decode_ns=st.one_of(st.just(0), st.integers(0, 10**10)), token_ns=st.one_of(st.just(0), st.integers(0, 10**9)),
    waited=st.integers(0, PATIENCE), prefilled=st.integers(0, 10**6), decoded=st.integers(0, 10**3),
)  # fmt: skip
groups = st.lists(parts, min_size=1, max_size=12)


def rank(pending: int = 0, decoding: int = 16, budget: int = 2048, **others: int) -> Part:
    """One with 16 slots and the costs of an 8B-class model."""
    values = {"slots": 16, "decode_ns": 6 * MS, "token_ns": 90_000} | others
    return Part(budget, pending, decoding, **values)


def outcome(*ranks: Part) -> Outcome:
    return decide(reduced(one.packed() for one in ranks))


def smallest_budget(ranks: list[Part]) -> int:
    return min(min(one.budget or LARGEST, LARGEST) for one in ranks)


def test_it_fits_into_one_all_reduce() -> None:
    packed = rank(10**9, 10**6, decode_ns=10**12, token_ns=10**9).packed()
    assert len(packed) == len(PART_REDUCTIONS) == len(UNLIMITED) <= MAX_REDUCED
    assert all(abs(value) * 65_536 < 2**63 for value in packed), "the sum over any number of ranks is a 64-bit integer"


@given(groups, st.randoms())
def test_all_ranks_decide_the_same_in_whatever_order_their_numbers_are_reduced(
    ranks: list[Part], chance: random.Random
) -> None:
    packed = [one.packed() for one in ranks]
    expected = decide(reduced(packed))
    chance.shuffle(packed)
    cut = chance.randrange(len(packed))
    halves = [reduced(half) for half in (packed[:cut], packed[cut:]) if half]
    assert decide(reduced(halves)) == expected


@given(groups)
def test_never_above_any_budget_nor_below_zero(ranks: list[Part]) -> None:
    quota = outcome(*ranks).quota
    assert quota is not None
    assert 0 <= quota <= smallest_budget(ranks)


@given(groups)
def test_it_is_never_zero_for_long_while_anyone_has_a_prompt(ranks: list[Part]) -> None:
    waited, zeros = 0, 0
    for _ in range(3 * PATIENCE):
        made_now = outcome(*[one._replace(waited=waited) for one in ranks])
        waited = made_now.waited
        zeros = 0 if made_now.quota else zeros + 1
        assert made_now.pending == any(one.pending for one in ranks)
        assert zeros <= PATIENCE or not made_now.pending


@given(groups)
def test_whole_budget_when_nobody_decodes_or_costs_are_unknown(ranks: list[Part]) -> None:
    idle = [one._replace(decoding=0) for one in ranks]
    assert outcome(*idle).quota == smallest_budget(ranks)
    unknown = [one._replace(token_ns=0) for one in ranks]
    assert outcome(*unknown).quota == smallest_budget(ranks)


@given(groups)
def test_a_rank_that_has_not_measured_leaves_it_to_the_others(ranks: list[Part]) -> None:
    new = rank(0, 0, ranks[0].budget, decode_ns=0, token_ns=0)
    measured = [one._replace(token_ns=max(1, one.token_ns)) for one in ranks]
    if not any(one.decoding for one in measured):
        return
    by_hand = [*measured, new._replace(decode_ns=0)]
    assert outcome(*measured, new) == outcome(*by_hand)


def test_one_that_prefills_alone_among_many_that_decode_gets_little() -> None:
    quotas = []
    ranks, waited = [rank(2000), *[rank()] * 15], 0
    for _ in range(18):
        now = outcome(*[one._replace(waited=waited) for one in ranks])
        waited = now.waited
        quotas.append(now.quota)
    assert quotas == ([0] * PATIENCE + [256]) * 2


def test_where_all_have_a_prompt_they_do_it_together() -> None:
    together = outcome(*[rank(5000, decoding=4)] * 16)
    assert together == Outcome(1024, True)
    alone = outcome(rank(5000, decoding=4), *[rank(decoding=4)] * 15)
    assert alone.quota is not None
    assert alone.quota < 128
    assert outcome(*[rank(50, decoding=4)] * 16).quota == 64, "no more than anyone has"


def test_of_quotas_that_are_worth_nearly_the_same_the_smallest_is_taken() -> None:
    # A full batch loses nothing by a prompt that all have: whatever they choose, none waits for another.
    assert outcome(*[rank(5000)] * 16) == Outcome(2048 // 64, True)


def test_empty_batches_are_filled() -> None:
    alone, full = outcome(rank(2000, decoding=1), *[rank(decoding=1)] * 3), outcome(rank(2000), *[rank()] * 3)
    assert alone.quota
    assert full.quota == 0


def test_a_lone_newcomer_is_what_counts_while_nobody_has_a_prompt() -> None:
    assert outcome(*[rank()] * 4) == Outcome(0, False, 0)
    assert outcome(*[rank(decoding=1)] * 4).quota == outcome(rank(10**6, decoding=1), *[rank(decoding=1)] * 3).quota


def test_a_budget_between_two_candidates_can_be_chosen_whole() -> None:
    assert outcome(*[rank(10**6, 1, 1500, decode_ns=600 * MS)] * 3).quota == 1500
    assert outcome(*[rank(10**6, 1, 1, decode_ns=600 * MS)] * 3).quota == 1


def test_the_smallest_budget_is_everybodys() -> None:
    ranks = [rank(10**6, 1, budget, decode_ns=600 * MS) for budget in (100, 0, 2048)]
    assert outcome(*ranks).quota == 100


@pytest.mark.slow
@pytest.mark.parametrize("long_share", [0.0, 0.1, 0.5])
def test_a_backlog_is_done_sooner_in_shorter_steps(long_share: float) -> None:
    """Where prompts are all there is to do, as in the last case, nothing can be gained, and next to nothing is lost."""
    coming = mixed(3, 1_000, 1e6, long_share)
    free, bound = (
        finished(coming, ranks=8, lockstep=True, bind="arrival", engine=LOCKSTEP, quota=quota).outcome
        for quota in (False, True)
    )
    print(f"all done {bound.duration_s:.2f} s, {free.duration_s:.2f} without")
    assert bound.duration_s < 1.01 * free.duration_s
    assert bound.tpot_p50_ms < free.tpot_p50_ms


def test_settings() -> None:
    some = rank(5000)

    def agreed(*settings: int) -> Outcome:
        return decide(reduced(some.packed(setting) for setting in settings))

    assert agreed(fixed(64), fixed(64)) == Outcome(64)
    assert agreed(fixed(64), AUTO, fixed(32)) == Outcome(32)
    assert agreed(fixed(64), OFF, AUTO) == Outcome(None)
    assert agreed(fixed(4096)).quota == 2048, "not above the budget"
    assert decide(reduced([UNLIMITED, some.packed()])) == Outcome(None)
    for wrong in (0, -1, LARGEST + 1):
        with pytest.raises(ValueError, match=f"must be 1 to 65536 tokens, not {wrong}"):
            fixed(wrong)


def test_settings_as_they_are_typed() -> None:
    assert [setting_of(text) for text in ("auto", "off", "64")] == [AUTO, OFF, fixed(64)]
    for wrong in ("", "on", "-1", "0", "1.5", "65537"):
        with pytest.raises(ValueError, match="must be "):
            setting_of(wrong)


def test_what_the_slowest_rank_computed_comes_out() -> None:
    assert made(reduced([rank(prefilled=3, decoded=9).packed(), rank(prefilled=5).packed()])) == (5, 9)


# The prefill quota in a rank's machine: what it steps with, when it agrees anew, when it urges ------


BUDGET, INTERVAL = 800, 4
STEP_S, TOKEN_S = 0.02, 0.001
DECODING = Load(0, 8, 8, 0, step_tokens=BUDGET, decoding=8, startable_tokens=0)
PENDING = replace(DECODING, waiting=1, prefill_tokens=500, startable_tokens=500)


def running(setting: int = AUTO, group: str = "") -> Rank:
    """A rank that has just begun to run in a wave."""
    machine = Rank(0, 1, "address", lockstep=True, sync_interval=INTERVAL, prefill_quota=setting, group_address=group)
    machine.handle(events.Loaded(), 0.0)
    machine.handle(events.CoordinatorSaid(Admit(0, 1, 0)), 0.0)
    machine.handle(events.FrontendSaid(7, AddRequest(1, 1, 1, 0, [1] * 9, SamplingParams(5))), 0.0)
    return machine


def step(
    machine: Rank, before: Load, after: Load, prefilled: int = 0, urged: bool = False
) -> tuple[Any, list[events.Effect]]:
    turn = machine.handle(events.Turn(before, True), 0.0)
    seconds = STEP_S + TOKEN_S * prefilled
    done = machine.handle(events.Stepped((), after, True, prefilled, after.decoding, seconds, urged), 1.0)
    return turn, done


def agree(machine: Rank, done: list[events.Effect], *others: events.Agree) -> Outcome:
    """The ranks agree; the other ones put in what is given, or the same."""
    result = agreed([one(find(done, events.Agree)), *others])
    machine.handle(result, 1.0)
    return decide(result.quota)


def other(load: Load, **changes: int) -> events.Agree:
    """What another rank puts in that has measured the same costs."""
    part = Part(BUDGET, pending(load), load.decoding, load.slots, 20_000_000, 1_000_000)._replace(**changes)
    return events.Agree(True, 0, 0, part.packed())


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
    assert find(turn, events.Step, prefill_quota=None)
    made = agree(machine, done, *[other(PENDING)] * 3)
    assert made.quota
    assert made.pending
    assert find(machine.handle(events.Turn(PENDING, True), 2.0), events.Step, prefill_quota=made.quota)


def test_while_anyone_has_a_prompt_they_agree_after_every_step_and_at_rest_at_the_interval() -> None:
    machine = running()
    _, done = step(machine, DECODING, DECODING)
    agree(machine, done, other(PENDING))
    for _ in range(3):
        _, done = step(machine, DECODING, DECODING)
        assert find(done, events.Agree), "the other one has"
        agree(machine, done, other(PENDING))
    _, done = step(machine, DECODING, DECODING)
    agree(machine, done, other(DECODING))
    pattern = []
    for _ in range(2 * INTERVAL):
        _, done = step(machine, DECODING, DECODING)
        pattern.append(bool(find(done, events.Agree)))
        if pattern[-1]:
            agree(machine, done, other(DECODING))
    assert pattern.count(True) == 2


def test_a_new_prompt_urges_unless_the_quota_holds_it_or_all_agree_anyway() -> None:
    machine = settled()
    assert machine.quota.tokens == 0
    turn, done = step(machine, PENDING, PENDING, urged=True)
    assert [type(effect) for effect in turn if isinstance(effect, events.Urge | events.Step)] == [
        events.Urge,
        events.Step,
    ]
    assert find(turn, events.Step, prefill_quota=0), "not beyond what was agreed"
    agree(machine, done, *[other(DECODING)] * 3)
    assert not find(machine.handle(events.Turn(PENDING, True), 2.0), events.Urge), (
        "they agree after this step in any case"
    )
    idle = settled(replace(DECODING, decoding=1))
    assert idle.quota.tokens
    small = replace(DECODING, startable_tokens=idle.quota.tokens, prefill_tokens=900)
    assert not find(idle.handle(events.Turn(small, True), 2.0), events.Urge)


def test_a_prompt_does_not_wait_for_ever() -> None:
    machine, quotas = settled(), []
    for _ in range(PATIENCE + 3):
        turn, done = step(machine, PENDING, PENDING, urged=True)
        quotas.append(one(find(turn, events.Step)).prefill_quota)
        agree(machine, done, *[other(DECODING)] * 3)
    assert quotas == [0] * (PATIENCE + 1) + [BUDGET // 8, 0]


def test_the_end_of_a_wave_or_epoch_makes_it_void() -> None:
    machine = settled()
    _, done = step(machine, DECODING, DECODING, urged=True)
    machine.handle(events.Agreed(False, 0, 0, [*one(find(done, events.Agree)).quota]), 1.0)
    assert machine.quota.tokens is None
    joined = settled()
    joined.handle(events.Formed(3), 2.0)
    assert joined.quota.tokens is None
    assert find(step(joined, DECODING, DECODING)[1], events.Agree), "after the first step"


def test_costs_are_those_of_the_rank_that_had_the_most() -> None:
    mine = RankQuota(AUTO)
    for prompt in (0, 400, 0, 400, 0):
        # This rank decodes only; its step is long because of another one's prompt.
        done = events.Stepped((), DECODING, True, 0, 8, STEP_S + TOKEN_S * prompt)
        parts = [mine.contribution(done), other(DECODING, prefilled=prompt, decoded=8).quota]
        mine.agreed(agreed(events.Agree(True, 0, 0, part) for part in parts).quota, 0.0)
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
        assert find(turn, events.Step, prefill_quota=quota)
        assert not find(turn, events.Urge)
        pattern.append(bool(find(done, events.Agree)))
        if pattern[-1]:
            agree(machine, done)
    assert pattern == [True, False, False, False] * 2


def test_a_rank_that_has_none_puts_in_the_same_whatever_it_does() -> None:
    assert RankQuota(OFF).contribution(events.Stepped((), PENDING, True, 9, 9, 1.0)) == UNLIMITED


def test_what_an_engine_does_not_say_is_taken_for_all_its_prompt_tokens() -> None:
    assert pending(Load(prefill_tokens=70)) == 70
    assert pending(Load(prefill_tokens=70, startable_tokens=0)) == 0
