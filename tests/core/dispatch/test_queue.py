"""The queue before all ranks: who is granted what, and that nobody is passed over for ever."""

from __future__ import annotations

from typing import Any

from hypothesis import example, given, settings, strategies as st

from paceline.core.binding import Descriptor
from paceline.core.dispatch.capacity import KV_SHARE, Amount
from paceline.core.dispatch.line import COMPACT, PATIENCE, PRIORITY_PATIENCE, Entry, SortedQueue
from paceline.core.dispatch.queue import CentralQueue
from paceline.core.load import Load
from tests.pace import examples

KV = 1000


class Ranks:
    """Ranks that run what they are granted until told to end it. `slots` each, and KV memory for 1,000 tokens."""

    def __init__(self, count: int = 2, slots: int = 2, total: int = KV) -> None:
        self.queue = CentralQueue()
        self.slots, self.total = slots, total
        self.running: dict[int, list[Entry]] = {rank: [] for rank in range(count)}
        self.lives = {rank: 10 + rank for rank in range(count)}
        for rank in self.running:
            self.report(rank)

    def report(self, rank: int) -> None:
        running = self.running[rank]
        kv = sum(entry.kv for entry in running)
        load = Load(0, len(running), self.slots, kv_total=self.total, kv_reserved=kv)
        self.queue.capacities.heard(rank, self.lives[rank], load, Amount())

    def ask(self, request: int, *, tokens: int = 10, answer: int = 10, priority: int = 0, frontend: int = 1) -> None:
        self.queue.ask(frontend, Descriptor(request, tokens, answer, priority), float(request))

    def grant(self) -> list[Entry]:
        made = self.queue.grant()
        for entry in made:
            assert entry.capacity is not None
            self.running[entry.capacity.rank].append(entry)
            self.queue.drop(entry.frontend, entry.request)
            self.report(entry.capacity.rank)
        return made

    def end(self, rank: int) -> None:
        if self.running[rank]:
            del self.running[rank][0]
            self.report(rank)


def test_a_request_goes_where_it_can_start_and_waits_otherwise() -> None:
    ranks = Ranks(2, slots=1)
    for request in range(3):
        ranks.ask(request)
    made = ranks.grant()
    assert [(entry.request, entry.capacity.rank) for entry in made if entry.capacity] == [(0, 0), (1, 1)]
    assert list(ranks.queue.queued) == [(1, 2)]
    assert ranks.grant() == []
    ranks.end(1)
    assert [entry.request for entry in ranks.grant()] == [2]


def test_a_grant_counts_until_it_is_confirmed() -> None:
    ranks = Ranks(1, slots=2)
    for request in range(3):
        ranks.ask(request)
    assert len(ranks.queue.grant()) == 2
    ranks.report(0)
    assert ranks.queue.grant() == []
    ranks.queue.drop(1, 0)
    assert [entry.request for entry in ranks.queue.grant()] == [2]


def test_by_priority_then_arrival() -> None:
    ranks = Ranks(1, slots=1)
    for request, priority in ((0, 0), (1, 5), (2, -1), (3, 0), (4, -1)):
        ranks.ask(request, priority=priority)
    order = []
    while made := ranks.grant():
        order += [entry.request for entry in made]
        ranks.end(0)
    assert order == [2, 4, 0, 3, 1]


def test_how_long_it_has_waited_elsewhere_is_its_place() -> None:
    ranks = Ranks(1, slots=0)
    ranks.queue.ask(1, Descriptor(1, 10, 10), 100.0)
    ranks.queue.ask(2, Descriptor(1, 10, 10, waited_ms=5000), 101.0)
    ranks.slots = 1
    ranks.report(0)
    assert [entry.frontend for entry in ranks.queue.grant()] == [2]


def test_asking_twice_is_asking_once() -> None:
    ranks = Ranks(1, slots=1)
    for request in (0, 1, 1, 0):
        ranks.ask(request)
    assert len(ranks.queue) == 2
    assert len(ranks.queue.grant()) == 1
    ranks.ask(0)
    assert (len(ranks.queue.granted), len(ranks.queue.queued)) == (1, 1)


def test_a_rank_that_is_lost_gives_its_grants_back_to_their_places() -> None:
    ranks = Ranks(2, slots=2)
    for request in range(6):
        ranks.ask(request)
    made = ranks.queue.grant()
    assert [entry.request for entry in made] == [0, 1, 2, 3]
    ranks.queue.drop(1, 1)
    lost = [entry.request for entry in made if entry.capacity is not None and entry.capacity.rank == 0]
    ranks.queue.lost(0)
    ranks.lives[0] += 100
    ranks.report(0)
    assert [entry.request for entry in ranks.queue.grant()] == [*lost, 4]


def test_what_is_dropped_is_granted_no_more_and_frees_what_it_was_granted() -> None:
    ranks = Ranks(1, slots=1)
    for request in range(4):
        ranks.ask(request, frontend=1 + request % 2)
    ranks.queue.grant()
    ranks.queue.drop(1, 0)
    ranks.queue.drop(1, 0)
    ranks.queue.drop_frontend(2)
    assert [entry.request for entry in ranks.queue.grant()] == [2]
    assert ranks.queue.counts == {1: 1}


def test_a_smaller_one_passes_what_fits_nowhere() -> None:
    ranks = Ranks(1, slots=2)
    ranks.ask(0, answer=500)
    ranks.grant()
    ranks.ask(1, answer=800)
    ranks.ask(2, answer=50)
    assert [entry.request for entry in ranks.grant()] == [2]


def test_the_longest_wait_is_bounded_whatever_priority_the_others_have() -> None:
    ranks = Ranks(1, slots=1)
    ranks.ask(0)
    ranks.grant()
    for request in (1, 2, 3):
        ranks.ask(request, priority=9)
    granted: list[int] = []
    for request in range(10, 200):
        ranks.ask(request)
        ranks.end(0)
        granted += [entry.request for entry in ranks.grant()]
    for place, request in enumerate((1, 2, 3)):
        assert granted.index(request) == (place + 1) * (PRIORITY_PATIENCE + 1) - 1


def test_a_large_one_is_not_passed_by_small_ones_for_ever() -> None:
    """Both ranks are kept busy by small ones that never let so much memory be free at once."""
    ranks = Ranks(2, slots=4)
    number = 100
    for number in range(100, 106):
        ranks.ask(number, answer=200)
    ranks.grant()
    ranks.ask(number + 1, answer=850)
    large, granted = number + 1, []
    for turn in range(200):
        for _ in range(3):
            number += 1
            ranks.ask(number + 1, answer=200)
        ranks.end(turn % 2)
        granted += [entry.request for entry in ranks.grant()]
    passed = granted.index(large)
    # Until its turn, and while the rank that is kept for it ends its four the other goes on.
    assert PATIENCE <= passed <= PATIENCE + 1 + 2 * 4


def test_the_first_in_order_is_not_passed_by_small_ones_for_ever_either() -> None:
    """It is not the oldest: a hundred of a worse priority are."""
    ranks = Ranks(2, slots=4)
    for number in range(100):
        ranks.ask(number, answer=200, priority=5)
    ranks.grant()
    ranks.ask(200, answer=850, priority=0)
    granted: list[int] = []
    for turn in range(60):
        ranks.end(turn % 2)
        granted += [entry.request for entry in ranks.grant()]
    assert 200 in granted[: 2 * PATIENCE]


def passed_over(times: int) -> Ranks:
    """One rank that runs 0; 1 fits nowhere, and so many smaller ones have passed it, of which the last still runs."""
    ranks = Ranks(1, slots=4)
    ranks.ask(0, answer=500)
    ranks.grant()
    ranks.ask(1, answer=900)
    for number in range(2, 2 + times):
        del ranks.running[0][1:]
        ranks.report(0)
        ranks.ask(number, answer=5)
        ranks.grant()
    return ranks


def test_a_kept_rank_is_free_again_when_the_one_it_was_kept_for_has_gone() -> None:
    ranks = passed_over(PATIENCE)
    ranks.ask(50, answer=5)
    assert ranks.grant() == []
    assert ranks.queue.capacities[0].reserved
    ranks.queue.drop(1, 1)
    assert [entry.request for entry in ranks.grant()] == [50]
    assert not ranks.queue.capacities[0].reserved


def test_whose_turn_it_is_keeps_it_when_a_better_priority_comes() -> None:
    """The rank is kept for it, so nobody else is granted, and passing more often would wait for ever."""
    ranks = passed_over(PATIENCE)
    ranks.ask(50, answer=5, priority=-1)
    assert ranks.grant() == []
    ranks.running[0] = []
    ranks.report(0)
    assert [entry.request for entry in ranks.grant()] == [1, 50]


MOVES = st.lists(
    st.tuples(st.sampled_from(["ask", "ask", "grant", "end", "drop", "lose", "confirm"]), st.integers(0, 99))
)


@settings(max_examples=examples(200))
@given(MOVES)
@example([("ask", 0), ("ask", 50), ("grant", 0), ("ask", 0), ("ask", 47), ("confirm", 1), ("grant", 0)])
@example([*[("ask", 0)] * 5, ("grant", 0), ("lose", 0), ("confirm", 2), ("grant", 0), ("confirm", 0)])
def test_what_is_granted_is_never_more_than_there_is_capacity_for(moves: list[tuple[str, int]]) -> None:
    ranks = Ranks(3, slots=2)
    queue, asked, sent = ranks.queue, 0, set()
    for what, number in moves:
        rank = number % 3
        if what == "ask":
            asked += 1
            ranks.ask(asked, answer=10 * (number % 60), priority=number % 3, frontend=number % 2)
        elif what == "grant":
            queue.grant()
        elif what == "end":
            ranks.end(rank)
        elif what == "drop" and asked:
            queue.drop(number % 2, 1 + number % asked)
        elif what == "lose":
            ranks.running[rank] = []
            ranks.lives[rank] += 10
            queue.lost(rank)
            ranks.report(rank)
        elif what == "confirm" and queue.granted:
            entry = list(queue.granted.values())[number % len(queue.granted)]
            key = (entry.frontend, entry.request)
            assert key not in sent, "granted again after it was sent"
            sent.add(key)
            assert entry.capacity is not None
            ranks.running[entry.capacity.rank].append(entry)
            queue.drop(*key)
            ranks.report(entry.capacity.rank)
        check(ranks)
    finish(ranks)


def check(ranks: Ranks) -> None:
    queue = ranks.queue
    assert not queue.queued.keys() & queue.granted.keys()
    assert sum(queue.counts.values()) == len(queue)
    for capacity in queue.capacities:
        promised = [entry for entry in queue.granted.values() if entry.capacity is capacity]
        assert capacity.promised == Amount(len(promised), sum(e.tokens for e in promised), sum(e.kv for e in promised))
        there = len(ranks.running[capacity.rank]) + len(promised)
        assert there <= ranks.slots
        kv = capacity.load.kv_reserved + capacity.promised.kv
        # Where whole answers are reserved, nothing is spared.
        assert kv <= (1.0 if capacity.load.kv_reserved else KV_SHARE) * ranks.total or there == 1


def finish(ranks: Ranks) -> None:
    """Everything that waits is granted once ranks end what they run."""
    for turn in range(10 * (len(ranks.queue) + 10)):
        for entry in list(ranks.queue.granted.values()):
            ranks.queue.drop(entry.frontend, entry.request)
        ranks.grant()
        ranks.end(turn % 3)
    assert len(ranks.queue) == 0
    assert not any(capacity.reserved for capacity in ranks.queue.capacities) or ranks.queue.grant() == []


# A line in order: joined anywhere, left from anywhere -----------------------------------------------
class One:
    def __init__(self, order: tuple[int, int]) -> None:
        self.order = order
        self.waiting = True


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 20))))
def test_it_is_a_sorted_list_of_those_that_wait(steps: list[tuple[bool, int]]) -> None:
    line: Any = SortedQueue(lambda one: one.order)
    there: list[One] = []
    for number, (joins, key) in enumerate(steps):
        if joins or not there:
            there.append(One((key, number)))
            line.join(there[-1])
        else:
            there.pop(key % len(there)).waiting = False
        there.sort(key=lambda one: one.order)
        assert line.first() is (there[0] if there else None)
        assert list(line) == there


def test_those_that_have_left_do_not_gather() -> None:
    line: Any = SortedQueue(lambda one: one.order)
    for number in range(100 * COMPACT):
        one = One((0, number))
        line.join(one)
        assert line.first() is one
        one.waiting = False
    line.first()
    assert len(line._line) <= 2 * COMPACT
