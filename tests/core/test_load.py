"""The exact accounting: what a front-end believes is a report that it has, plus its sends that the report lacks."""

from __future__ import annotations

import random

import pytest
from hypothesis import given, settings, strategies as st
from msgspec.structs import replace

from paceline.core.load import MAX_ACCOUNTED_SENDS, Accounting, Load, SpeedMeter, believed, waiting_for_a_slot
from tests.core.accounting import ORDINARY, RARE, Walk

numbers = st.integers(0, 250)


STEPS = st.lists(st.tuples(st.sampled_from([*ORDINARY, *RARE]), numbers, numbers), min_size=20, max_size=150)


@settings(max_examples=150, deadline=None)
@given(STEPS)
def test_a_belief_is_a_report_and_the_sends_that_it_lacks(steps: list[tuple[str, int, int]]) -> None:
    walk = Walk()
    for step in steps:
        walk.act(*step)
    walk.drain()


def random_walk(seed: int, events: int) -> Walk:
    """Walk until the machines have handled so many events; one in 500 acts ends somebody."""
    print(f"seed {seed}")
    chance, walk = random.Random(seed), Walk(ranks=4)
    while walk.events < events:
        what = chance.choice(ORDINARY) if chance.random() > 0.002 else chance.choice(RARE)
        walk.act(what, chance.randrange(10_000), chance.randrange(10_000))
    walk.drain()
    return walk


@pytest.mark.slow
def test_the_accounting_is_exact_over_a_million_events() -> None:
    walk = random_walk(seed=1, events=1_000_000)
    # The walk is worth its time only if it did something.
    assert walk.requests > 50_000
    assert walk.finished > 20_000
    assert walk.lives_begun > 1_000


def test_the_accounting_is_exact_in_many_short_walks() -> None:
    for seed in range(20):
        random_walk(seed, events=3_000)


def test_a_ledger_holds_what_no_report_holds() -> None:
    ledger = Accounting()
    for number, tokens in ((1, 10), (2, 20), (3, 30)):
        ledger.sent(number, tokens)
    assert (ledger.requests, ledger.tokens, ledger.last) == (3, 60, 3)
    ledger.reported(2)
    assert (ledger.requests, ledger.tokens, ledger.last) == (1, 30, 3)
    ledger.reported(3)
    assert (ledger.requests, ledger.tokens) == (0, 0)


def test_a_ledger_takes_nothing_twice_and_nothing_back() -> None:
    ledger = Accounting()
    ledger.sent(1, 10)
    ledger.sent(1, 10)
    assert ledger.requests == 1
    ledger.reported(1)
    ledger.reported(0)
    ledger.sent(1, 10)
    assert (ledger.requests, ledger.tokens) == (0, 0)
    ledger.reported(3)
    ledger.reported(1)
    ledger.sent(2, 20)
    ledger.sent(3, 30)
    assert (ledger.requests, ledger.tokens) == (0, 0)


def test_a_report_may_come_before_word_of_the_send_that_it_holds() -> None:
    ledger = Accounting()
    ledger.reported(2)
    ledger.sent(1, 10)
    ledger.sent(2, 20)
    ledger.sent(3, 30)
    assert (ledger.requests, ledger.tokens, ledger.last) == (1, 30, 3)


def test_a_ledger_is_bounded() -> None:
    ledger = Accounting()
    for number in range(1, MAX_ACCOUNTED_SENDS + 11):
        ledger.sent(number, 1)
    assert (ledger.requests, ledger.tokens) == (MAX_ACCOUNTED_SENDS, MAX_ACCOUNTED_SENDS)
    ledger.reported(MAX_ACCOUNTED_SENDS + 9)
    assert (ledger.requests, ledger.tokens) == (1, 1)


def test_a_belief_adds_to_what_waits_and_to_the_prompts() -> None:
    load = Load(waiting=2, running=3, slots=4, prefill_tokens=100)
    assert believed(load, 0, 0) == load
    assert believed(load, 5, 70) == replace(load, waiting=7, prefill_tokens=170)


@pytest.mark.parametrize(
    ("waiting", "running", "slots", "expected"), [(0, 0, 4, 0), (4, 0, 4, 0), (5, 0, 4, 1), (3, 3, 4, 2), (2, 6, 4, 2)]
)
def test_only_what_no_slot_is_free_for_waits_for_one(waiting: int, running: int, slots: int, expected: int) -> None:
    assert waiting_for_a_slot(Load(waiting, running, slots)) == expected


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
