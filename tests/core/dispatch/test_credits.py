"""Credits: level, never more than there is capacity for, and given back when somebody waits."""

from __future__ import annotations

import pytest
from hypothesis import given, settings, strategies as st

from paceline.core.binding import Send
from paceline.core.dispatch.capacity import BUDGETS_AHEAD, KV_SHARE, Amount, Capacities
from paceline.core.dispatch.credits import ENTRIES, LEAST_RANKS, CreditBook
from paceline.core.load import Load
from tests.pace import examples

SLOTS, BUDGET, KV = 16, 512, 10_000


def capacities(count: int, running: int = 0, *, budget: int = BUDGET, total: int = KV) -> Capacities:
    made = Capacities()
    for rank in range(count):
        load = Load(0, running, SLOTS, 0, 100 * running, total, step_tokens=budget, kv_reserved=100 * running)
        made.heard(rank, 10 + rank, load, Amount())
    return made


def book(frontends: int) -> CreditBook:
    made = CreditBook()
    for frontend in range(frontends):
        made.join(frontend)
    return made


def held(shares: CreditBook, made: Capacities) -> list[list[tuple[int, int, int]]]:
    return [[(s.requests, s.tokens, s.kv_tokens) for s in one.shares] for one in shares.shares(made)]


def test_one_frontend_has_all_of_the_capacity() -> None:
    made, shares = capacities(3, running=4), book(1)
    shares.hand_out(made)
    assert held(shares, made) == [[(12, int(BUDGETS_AHEAD * BUDGET), int(KV_SHARE * KV) - 400)] * 3]
    assert [capacity.free_requests() for capacity in made] == [0, 0, 0]


@pytest.mark.parametrize("frontends", [2, 4])
def test_several_have_half_of_it_in_equal_parts(frontends: int) -> None:
    made, shares = capacities(4), book(frontends)
    shares.hand_out(made)
    each = SLOTS // 2 // frontends
    assert [[requests for requests, _, _ in one] for one in held(shares, made)] == [[each] * 4] * frontends
    assert [capacity.free_requests() for capacity in made] == [SLOTS // 2] * 4


def test_what_cannot_be_divided_evenly_goes_to_different_ones_at_different_ranks() -> None:
    made, shares = capacities(4, running=SLOTS - 2), book(4)
    shares.hand_out(made)
    # One of the two free slots of each rank is shared.
    assert [len(one) for one in held(shares, made)] == [1, 1, 1, 1]
    assert sorted(credit.rank for one in shares.shares(made) for credit in one.shares) == [0, 1, 2, 3]


def test_where_no_limit_is_known_there_is_none() -> None:
    made, shares = capacities(2, budget=0, total=0), book(3)
    shares.hand_out(made)
    for one in held(shares, made):
        for _, tokens, kv in one:
            assert tokens > 10**9
            assert kv > 10**9


def test_what_was_spent_is_made_up_for_and_nobody_loses_what_it_has() -> None:
    made, shares = capacities(1), book(2)
    shares.hand_out(made)
    assert [one[0][0] for one in held(shares, made)] == [4, 4]
    for number in range(3):
        shares.spent(0, Send(0, 10, number, 10, 5), made)
    assert [one[0] for one in held(shares, made)] == [
        (1, int(BUDGETS_AHEAD * BUDGET) // 4 - 30, held(shares, made)[0][0][2]),
        (4, int(BUDGETS_AHEAD * BUDGET) // 4, KV_SHARE * KV // 4),
    ]
    made.heard(0, 10, Load(0, 3, SLOTS, 30, 0, KV, step_tokens=BUDGET, kv_reserved=45), Amount())
    shares.hand_out(made)
    # 13 are free, of which 7 are shared; the other one's 4 are not taken back.
    assert [one[0][0] for one in held(shares, made)] == [3, 4]


def test_what_was_given_back_is_void_and_the_next_credit_epoch_is_another() -> None:
    made, shares = capacities(2), book(2)
    shares.hand_out(made)
    shares.returned(0, 1, made)
    assert held(shares, made)[0] == []
    assert [capacity.credited.requests for capacity in made] == [4, 4]
    shares.returned(0, 1, made)
    shares.hand_out(made)
    assert [one.edition for one in shares.shares(made)] == [2, 1]
    # This one was said before it came.
    shares.returned(0, 1, made)
    assert held(shares, made)[0] != []


def test_who_leaves_takes_nothing_along() -> None:
    made, shares = capacities(2), book(2)
    shares.hand_out(made)
    shares.leave(0, made)
    shares.leave(1, made)
    assert [capacity.credited for capacity in made] == [Amount(), Amount()]
    assert not shares.outstanding


def test_a_rank_that_is_lost_takes_its_credits_along() -> None:
    made, shares = capacities(2), book(2)
    shares.hand_out(made)
    shares.lost(1)
    made.forget(1)
    assert [credit.rank for one in shares.shares(made) for credit in one.shares] == [0, 0]
    shares.spent(0, Send(1, 11, 1, 10), made)


@pytest.mark.parametrize(("frontends", "ranks"), [(4, 128), (16, 128), (64, 1024)])
def test_many_frontends_at_many_ranks_get_credits_of_some(frontends: int, ranks: int) -> None:
    made, shares = capacities(ranks), book(frontends)
    shares.hand_out(made)
    each = max(LEAST_RANKS, ENTRIES // frontends)
    ranks_of = [{credit.rank for credit in one.shares} for one in shares.shares(made)]
    assert {len(one) for one in ranks_of} == {each}
    assert len(set.union(*ranks_of)) == min(ranks, each * frontends)


MOVES = st.lists(
    st.tuples(st.sampled_from(["hand out", "spend", "report", "return", "leave", "lose"]), st.integers(0, 99))
)


@settings(max_examples=examples(150))
@given(MOVES)
def test_together_they_cannot_send_more_than_there_is_capacity_for(moves: list[tuple[str, int]]) -> None:
    made, shares = capacities(3), book(3)
    running, numbers = dict.fromkeys(range(3), 0), 0
    for what, number in moves:
        frontend, rank = number % 3, number // 3 % 3
        shares.join(frontend)
        if what == "hand out":
            shares.hand_out(made)
        elif what == "spend":
            mine = next(one for one in shares.shares(made) if one.frontend == frontend)
            credit = next((credit for credit in mine.shares if credit.rank == rank), None)
            if credit is not None:
                numbers += 1
                running[rank] += 1
                send = Send(rank, credit.incarnation, numbers, min(credit.tokens, 10))
                made.heard(rank, 10 + rank, Load(0, running[rank], SLOTS, step_tokens=BUDGET), Amount())
                shares.spent(frontend, send, made)
        elif what == "report":
            running[rank] = max(0, running[rank] - number % 4)
            made.heard(rank, 10 + rank, Load(0, running[rank], SLOTS, step_tokens=BUDGET), Amount())
        elif what == "return":
            shares.returned(frontend, shares._holdings[frontend].epoch, made)
        elif what == "leave":
            shares.leave(frontend, made)
        elif what == "lose":
            shares.lost(rank)
            made.forget(rank)
            running[rank] = 0
            made.heard(rank, 10 + rank, Load(0, 0, SLOTS, step_tokens=BUDGET), Amount())
        for capacity in made:
            total = [s.requests for one in shares.shares(made) for s in one.shares if s.rank == capacity.rank]
            assert sum(total) == capacity.credited.requests
            assert capacity.promised == capacity.credited
            assert running[capacity.rank] + sum(total) <= SLOTS
