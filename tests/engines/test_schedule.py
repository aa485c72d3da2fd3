"""The schedule alone, without a model: any requests, any aborts, nobody lost, nothing leaked."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import given, strategies as st

from paceline.core.requests import SamplingParams
from paceline.engines.base import EngineRequest
from paceline.engines.scheduler import Schedule, TextSequence, counts

SLOTS, KV_TOKENS, BUDGET = 3, 40, 5


@dataclass
class Arrival:
    """One request: when it comes, how large it is, and when its client leaves."""

    step: int
    prompt: int
    room: int
    priority: int
    leaves: int


arrivals = st.lists(
    st.builds(
        Arrival, st.integers(0, 20), st.integers(1, 20), st.integers(1, 20), st.integers(-1, 1), st.integers(0, 60)
    ),
    max_size=12,
)


def figures(schedule: Schedule) -> tuple[int, int, int, int]:
    load = schedule.load()
    return load.waiting, load.running, load.kv_used, load.prefill_tokens


def sequence(key: int, arrival: Arrival) -> TextSequence:
    params = SamplingParams(max_tokens=arrival.room)
    return TextSequence(EngineRequest(key, [7] * arrival.prompt, params, arrival.priority), arrival.room)


def check_memory(schedule: Schedule) -> None:
    """Slots are held once, and the KV room promised is there."""
    running = schedule.running
    slots = [one.slot for one in running]
    assert sorted([*slots, *schedule._free_slots]) == list(range(SLOTS))
    assert sum(one.reserved for one in running) == schedule.kv_reserved <= KV_TOKENS


@given(arrivals=arrivals, preempt_at=st.integers(0, 60))
def test_everybody_finishes_or_leaves_within_the_memory_and_the_budget(
    arrivals: list[Arrival], preempt_at: int
) -> None:
    schedule = Schedule(SLOTS, KV_TOKENS, BUDGET)
    finished: set[int] = set()
    for step in range(20 + 3 * sum(one.prompt + one.room for one in arrivals)):
        for key, arrival in enumerate(arrivals):
            if arrival.step == step:
                schedule.queue(sequence(key, arrival))
            if arrival.leaves == step and key not in finished and schedule.remove(key) is not None:
                finished.add(key)
        chunks = schedule.chunks()
        check_memory(schedule)
        assert sum(count for _, count in chunks) <= BUDGET
        assert bool(chunks) == bool(schedule.running)
        if step == preempt_at and len(chunks) > 1:
            schedule.preempt(chunks[-1][0])
            continue
        _, answers = counts(chunks)
        complete = schedule.done(chunks)
        assert len(complete) == answers
        for one in complete:
            one.push(8)
            if one.made == one.room:
                assert schedule.remove(one.key) is one
                finished.add(one.key)
    assert finished == set(range(len(arrivals)))
    assert figures(schedule) == (0, 0, 0, 0)
    check_memory(schedule)


def test_decoding_goes_before_prefill_and_prefill_by_arrival() -> None:
    schedule = Schedule(SLOTS, KV_TOKENS, BUDGET)
    first, second, third = (sequence(key, Arrival(0, 4, 2, 0, 99)) for key in range(3))
    for one in (first, second, third):
        schedule.queue(one)
    assert schedule.chunks() == [(first, 4), (second, 1)]
    assert schedule.done(schedule.chunks()) == [first]
    first.push(8)
    assert schedule.chunks() == [(first, 1), (second, 3), (third, 1)]
    assert schedule.load().prefill_tokens == 7


def test_prompts_stay_within_a_limit_that_decoding_does_not_count_for() -> None:
    schedule = Schedule(SLOTS, KV_TOKENS, BUDGET)
    first, second = (sequence(key, Arrival(0, 4, 2, 0, 99)) for key in range(2))
    for one in (first, second):
        schedule.queue(one)
    assert schedule.chunks(0) == []
    assert schedule.running == []
    assert schedule.chunks(3) == [(first, 3)]
    schedule.done([(first, 4)])
    first.push(8)
    assert schedule.chunks(0) == [(first, 1)]
    assert schedule.chunks(2) == [(first, 1), (second, 2)]
    assert schedule.chunks(100) == schedule.chunks()


@given(arrivals)
def test_what_can_start_is_what_the_next_step_starts(arrivals: list[Arrival]) -> None:
    schedule = Schedule(SLOTS, KV_TOKENS, 10_000)
    for key, arrival in enumerate(arrivals):
        schedule.queue(sequence(key, arrival))
    startable = schedule.load().startable_tokens
    assert startable == sum(count for _, count in schedule.chunks()) == schedule.load().startable_tokens


def test_a_large_one_at_the_head_lets_nobody_pass() -> None:
    schedule = Schedule(SLOTS, KV_TOKENS, BUDGET)
    small = [sequence(key, Arrival(0, 5, 5, 0, 99)) for key in range(3)]
    large = sequence(9, Arrival(0, 20, 15, 0, 99))
    for one in (small[0], large, small[1], small[2]):
        schedule.queue(one)
    schedule.chunks()
    assert (len(schedule.running), len(schedule.waiting)) == (1, 3)
    schedule.remove(0)
    schedule.chunks()
    assert [one.key for one in schedule.running] == [9]


def test_what_was_preempted_waits_until_somebody_leaves() -> None:
    schedule = Schedule(SLOTS, KV_TOKENS, BUDGET)
    first, second = (sequence(key, Arrival(0, 4, 2, 0, 99)) for key in range(2))
    schedule.queue(first)
    schedule.queue(second)
    schedule.chunks()
    schedule.done([(first, 4), (second, 4)])
    assert schedule.preempt(second) == 1
    assert second.to_prefill == 4
    schedule.chunks()
    assert (schedule.running, schedule.waiting) == ([first], [second])
    schedule.remove(0)
    schedule.chunks()
    assert (schedule.running, schedule.waiting, second.slot) == ([second], [], 0)


def test_the_load_tells_what_a_prediction_needs() -> None:
    schedule = Schedule(SLOTS, KV_TOKENS, BUDGET)
    for key, (prompt, room) in enumerate([(2, 6), (3, 10), (4, 20)], start=1):
        schedule.queue(sequence(key, Arrival(0, prompt, room, 0, 60)))
    assert schedule.load().answer_tokens == 12
    first = schedule.chunks()[0][0]
    schedule.done([(first, 2)])
    first.push(7)
    load = schedule.load()
    assert (load.running, load.waiting, load.decoding, load.step_tokens) == (2, 1, 1, BUDGET)
    assert load.kv_reserved == 2 + 6 + 3 + 10
