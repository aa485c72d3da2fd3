"""How much each rank can still start, and which rank takes a request."""

from __future__ import annotations

import random

from msgspec.structs import replace

from paceline.core.dispatch.capacity import ANY, RUNNING_TOKENS, STEPS_AHEAD, Amount, Capacities, Capacity
from paceline.core.load import Load


def load(running: int = 0, prefill: int = 0, *, slots: int = 4, budget: int = 100, kv: int = 0, total: int = 0) -> Load:
    return Load(0, running, slots, prefill, 0, total, step_tokens=budget, kv_reserved=kv)


def capacities(*loads: Load) -> Capacities:
    made = Capacities()
    for rank, one in enumerate(loads):
        made.heard(rank, 10 + rank, one, Amount())
    return made


def best(made: Capacities, kv: int = 1) -> int | None:
    capacity = made.best(kv)
    return None if capacity is None else capacity.rank


def test_the_least_loaded_rank_that_can_start_it_is_taken() -> None:
    assert best(capacities(load(3), load(1), load(2))) == 1
    assert best(capacities(load(1), load(1, 50))) == 0
    assert best(Capacities()) is None


def test_never_behind_a_full_rank() -> None:
    assert best(capacities(load(4), load(3, 140))) == 1
    assert best(capacities(load(4), load(4))) is None


def test_not_where_one_and_a_half_steps_of_prompts_are_ahead() -> None:
    assert best(capacities(load(1, 150), load(2, 149))) == 1
    assert best(capacities(load(1, 150), load(2, 250))) is None
    # Rounded down, for the limit of a share as for the queue.
    assert best(capacities(load(0, 4, budget=3))) is None
    assert capacities(load(0, 4, budget=3))[0].free_tokens() == 0
    # An engine that has no budget, or does not say.
    assert best(capacities(load(1, 10**6, budget=0))) == 0


def test_prompts_ahead_weigh_more_than_answers_under_way() -> None:
    assert best(capacities(load(0, 99), load(3, 0))) == 1
    assert best(capacities(load(0, 95), load(3, 0))) == 0


def test_kv_fits_with_two_percent_to_spare() -> None:
    made = capacities(*(Load(0, running, 4, 0, kv, 1000, kv_reserved=kv) for running, kv in ((1, 500), (2, 100))))
    assert best(made, 480) == 0
    assert best(made, 481) == 1
    assert best(made, 880) == 1
    assert best(made, 881) is None


def test_where_whole_answers_are_reserved_no_memory_is_spared() -> None:
    # Four answers of the whole context fit: three run.
    made = capacities(load(3, kv=750, total=1000))
    assert best(made, 250) == 0
    assert best(made, 251) is None


def test_a_request_may_wait_for_each_slot_that_is_about_to_be_free() -> None:
    full = Load(0, 16, 16, decoding=16, answer_tokens=16)
    assert capacities(full)[0].free_requests() == STEPS_AHEAD
    assert capacities(replace(full, answer_tokens=16 * STEPS_AHEAD + 1))[0].free_requests() == 0


def test_an_engine_without_slots_has_no_limit() -> None:
    assert best(capacities(Load(0, 500, 0))) == 0


def test_an_empty_rank_takes_anything() -> None:
    assert best(capacities(load(total=1000)), 5000) == 0
    assert best(capacities(load(1, total=1000)), 5000) is None


def test_the_roomiest_is_found_behind_many_that_are_less_loaded() -> None:
    made = capacities(*[load(1, kv=900, total=1000) for _ in range(100)], load(3, 10, kv=0, total=1000))
    assert best(made, 200) == 100


def test_waiting_requests_and_the_wire_count() -> None:
    made = Capacities()
    made.heard(
        0, 10, Load(waiting=1, running=1, slots=4, kv_total=1000, kv_reserved=100, kv_waiting=50), Amount(1, 0, 300)
    )
    capacity = made[0]
    assert (capacity.free_requests(), capacity.free_kv()) == (1, 550)
    capacity.promised.add(1, 10, 100)
    made.changed(capacity)
    assert best(made) is None


def test_what_was_promised_stays_while_the_life_lasts_and_no_longer() -> None:
    made = capacities(load())
    made[0].promised.add(4, 0, 0)
    made.heard(0, 10, load(), Amount())
    assert best(made) is None
    made.heard(0, 99, load(), Amount())
    assert best(made) == 0
    made.forget(0)
    assert (best(made), made.of(0)) == (None, None)


def test_a_rank_that_is_kept_for_somebody_is_not_taken() -> None:
    made = capacities(load(), load(1))
    made[0].reserved = True
    made.changed(made[0])
    assert best(made) == 1
    capacity = made.most_free()
    assert capacity is not None
    assert capacity.rank == 1


def slowly(made: Capacities, kv: int) -> set[int]:

    def weight(capacity: Capacity) -> int:
        has, promised = capacity.load, capacity.promised
        return has.prefill_tokens + promised.tokens + RUNNING_TOKENS * (has.running + promised.requests)

    fitting = [capacity for capacity in made if capacity.takes(kv) and not capacity.reserved]
    least = min((weight(capacity) for capacity in fitting), default=0)
    return {capacity.rank for capacity in fitting if weight(capacity) == least}


def test_the_kept_order_is_the_order_that_looking_at_all_gives() -> None:
    chance = random.Random(5)
    made = Capacities()
    for _ in range(3000):
        rank = chance.randrange(20)
        if chance.random() < 0.02:
            made.forget(rank)
        elif chance.random() < 0.6:
            one = load(chance.randrange(5), chance.choice([0, 30, 150, 250]), kv=chance.randrange(900), total=1000)
            made.heard(rank, 1, one, Amount())
        elif (capacity := made.of(rank)) is not None:
            capacity.promised.add(1, 5, 20)
            made.changed(capacity)
        kv = chance.choice([1, 100, 400])
        found, right = made.best(kv), slowly(made, kv)
        assert (found is None) == (not right)
        if found is not None and len(right) < len(made):
            assert found.takes(kv)
            # Where memory is short everywhere the roomiest may be taken in place of the least loaded.
            assert found.rank in right or found.startable_kv() == max(
                one.startable_kv() for one in made if one.takes(1)
            )


def test_no_limit_is_more_than_there_ever_is() -> None:
    capacity = capacities(load(1, budget=0))[0]
    assert capacity.free_tokens() == capacity.free_kv() == ANY
