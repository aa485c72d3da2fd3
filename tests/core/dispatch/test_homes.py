"""A request waits for the rank that holds its prefix while that is sooner than computing it anew elsewhere."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st
from msgspec.structs import replace

from paceline.core.binding import Descriptor, Send
from paceline.core.blocks import BLOCK_TOKENS, packed
from paceline.core.dispatch.capacity import Amount
from paceline.core.dispatch.line import PATIENCE, PRIORITY_PATIENCE, Entry
from paceline.core.dispatch.queue import CentralQueue
from paceline.core.load import Load
from paceline.core.messages import KvDelta
from tests.pace import examples

TOKEN_S, STEP_S = 0.0001, 0.01
ANSWER = 10


class Ranks:
    """Ranks that say what their steps cost, and run what they are granted until told to end it."""

    def __init__(self, count: int = 3, slots: int = 1, kv: int = 100_000) -> None:
        self.queue = CentralQueue()
        self.slots, self.kv = slots, kv
        self.running: dict[int, list[Entry]] = {rank: [] for rank in range(count)}
        self.prefill = dict.fromkeys(range(count), 0)
        self.answers = ANSWER
        self.prefills = False
        self.token_s = TOKEN_S
        for rank in self.running:
            self.report(rank)

    def report(self, rank: int) -> None:
        running = self.running[rank]
        used = sum(entry.kv for entry in running)
        load = Load(
            0, len(running), self.slots, self.prefill[rank], used, self.kv, step_s=STEP_S, prompt_token_s=self.token_s,
            answer_token_s=0.0, step_tokens=2048, decoding=len(running), kv_reserved=used,
            answer_tokens=self.answers,
        )  # fmt: skip
        self.queue.capacities.heard(rank, 10 + rank, load, Amount())

    def ask(self, request: int, blocks: list[int], *, more: int = 0, priority: int = 0, session: int = 0) -> None:
        tokens = len(blocks) * BLOCK_TOKENS + more + 1
        asked = Descriptor(request, tokens, ANSWER, priority, 0, packed(blocks), session)
        self.queue.ask(1, asked, float(request))

    def grant(self) -> list[tuple[int, int]]:
        """Requests and ranks."""
        made = self.queue.grant()
        found = []
        for entry in made:
            assert entry.capacity is not None
            rank = entry.capacity.rank
            send = Send(rank, 10 + rank, 1, entry.tokens, ANSWER, entry.request, entry.whole - entry.tokens)
            assert self.queue.confirm(1, send), "what is sent is what was granted"
            self.running[rank].append(entry)
            self.prefill[rank] += entry.tokens if self.prefills else 0
            self.report(rank)
            found.append((entry.request, rank))
        return found

    def serve(self, request: int, blocks: list[int]) -> int:
        """Let one begin and end; returns its rank."""
        self.ask(request, blocks)
        ((_, rank),) = self.grant()
        self.end(rank)
        return rank

    def end(self, rank: int) -> None:
        self.running[rank].pop(0)
        self.report(rank)


def names(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def test_what_has_been_there_before_goes_there_again_and_what_is_new_where_memory_is() -> None:
    ranks = Ranks()
    homes = [ranks.serve(number, names(100 * number, 20)) for number in range(1, 4)]
    assert sorted(homes) == [0, 1, 2], "each where nothing has to be forgotten"
    for number, home in enumerate(homes, 1):
        assert ranks.serve(10 + number, names(100 * number, 24)) == home
    # The last one has as little as the others, and its own again.
    assert ranks.serve(20, names(900, 3)) == ranks.serve(21, names(900, 3))


def test_it_waits_for_home_while_that_is_sooner() -> None:
    ranks = Ranks()
    long = names(1, 50)
    home = ranks.serve(1, long)
    ranks.ask(2, long)
    assert ranks.grant() == [(2, home)]
    ranks.ask(3, long)
    # An answer of 10 tokens takes 0.1 s, 6,400 tokens take 0.64.
    assert ranks.grant() == []
    ranks.ask(4, names(500, 2))
    ((request, other),) = ranks.grant()
    assert (request, other != home) == (4, True), "whom it does not concern, it does not hold up"
    ranks.end(home)
    assert ranks.grant() == [(3, home)]


def test_its_client_can_be_told_where_it_belongs_and_why_it_went_elsewhere() -> None:
    ranks = Ranks(2)
    long = names(1, 50)
    home = ranks.serve(1, long)
    ranks.ask(2, long)
    ranks.grant()
    (entry,) = ranks.running[home]
    assert entry.receipt is not None
    # 6,400 of its 6,401 tokens are there; to compute them elsewhere takes 0.64 s and three steps.
    assert (entry.receipt.home, entry.receipt.held, entry.receipt.by_key) == (home, 50 * BLOCK_TOKENS, False)
    assert entry.receipt.home_ms < 50
    assert entry.receipt.elsewhere_ms >= 640
    ranks.answers = 1_000
    ranks.report(home)
    ranks.ask(3, long)
    ((_, other),) = ranks.grant()
    found = ranks.running[other][0].receipt
    assert found is not None
    assert found.home == home != other
    assert found.home_ms > found.elsewhere_ms


def test_of_what_is_new_there_is_nothing_to_tell() -> None:
    ranks = Ranks()
    rank = ranks.serve(1, names(1, 50))
    ranks.ask(2, names(900, 50))
    ((_, other),) = ranks.grant()
    assert ranks.running[other][0].receipt is None, rank


def test_it_goes_elsewhere_where_home_takes_longer_than_its_prefix() -> None:
    ranks = Ranks()
    ranks.answers = 1_000
    long = names(1, 50)
    home = ranks.serve(1, long)
    ranks.ask(2, long)
    assert ranks.grant() == [(2, home)]
    ranks.ask(3, long)
    ((request, other),) = ranks.grant()
    assert (request, other != home) == (3, True)
    ranks.end(home)
    ranks.end(other)
    # Both have it from now on.
    ranks.ask(4, long)
    ranks.ask(5, long)
    assert {rank for _, rank in ranks.grant()} == {home, other}


def test_who_waits_at_home_goes_elsewhere_once_that_has_become_better() -> None:
    ranks = Ranks(2)
    long = names(1, 50)
    home = ranks.serve(1, long)
    other = 1 - home
    ranks.ask(2, long)
    ranks.ask(3, names(700, 1))
    assert len(ranks.grant()) == 2
    ranks.ask(4, long)
    assert ranks.grant() == []
    ranks.answers = 2_000
    ranks.report(home)
    assert ranks.grant() == [], "nobody is free"
    ranks.end(other)
    assert ranks.grant() == [(4, other)]


def test_only_what_is_to_be_computed_counts() -> None:
    ranks = Ranks(1, slots=8)
    long = names(1, 50)
    ranks.serve(1, long)
    for number in range(2, 8):
        ranks.ask(number, long, more=20)
    # Six times 6,400 tokens were three ranks' worth of prompts ahead.
    assert len(ranks.grant()) == 6


def test_a_rank_that_is_lost_holds_nothing_and_who_waited_for_it_goes_on() -> None:
    ranks = Ranks(2)
    long = names(1, 50)
    home = ranks.serve(1, long)
    ranks.ask(2, long)
    ranks.ask(3, long)
    assert ranks.grant() == [(2, home)]
    ranks.queue.lost(home)
    assert ranks.grant() == [(3, 1 - home)]
    assert not ranks.queue.homes.index.longest(long)[1] >> home & 1


def test_what_waits_at_home_can_go() -> None:
    ranks = Ranks()
    long = names(1, 50)
    home = ranks.serve(1, long)
    for number in (2, 3, 4):
        ranks.ask(number, long)
    assert ranks.grant() == [(2, home)]
    ranks.queue.drop(1, 3)
    ranks.end(home)
    assert ranks.grant() == [(4, home)]
    assert not ranks.queue.homes.lines
    ranks.queue.drop_frontend(1)
    assert not len(ranks.queue)


def test_a_key_has_a_home_where_no_prefix_is_known_and_a_prefix_goes_before_it() -> None:
    ranks = Ranks()
    ranks.ask(1, [], more=500, session=77)
    ((_, home),) = ranks.grant()
    ranks.end(home)
    ranks.serve(2, names(1, 30))
    ranks.ask(3, [], more=900, session=77)
    assert ranks.grant() == [(3, home)]
    ranks.end(home)
    prefix_home = ranks.serve(4, names(1, 30))
    ranks.ask(5, names(1, 30), session=77)
    assert ranks.grant() == [(5, prefix_home)]


def test_a_prompt_that_all_share_spreads() -> None:
    ranks = Ranks(4, slots=2)
    shared = names(1, 4)
    placed = []
    ranks.prefills = True
    for number in range(8):
        ranks.ask(number, [*shared, *names(100 * (number + 1), 30)])
        placed += [rank for _, rank in ranks.grant()]
    assert sorted(placed) == [0, 1, 2, 3]


def test_a_rank_that_has_computed_nothing_yet_is_no_faster_than_the_others() -> None:
    ranks = Ranks(2, slots=4)
    long = names(1, 50)
    home = ranks.serve(1, long)
    other = ranks.queue.capacities.of(1 - home)
    assert other is not None
    # The defaults say a tenth of what this model takes.
    ranks.token_s = 10 * TOKEN_S
    ranks.report(home)
    other.load = replace(other.load, step_s=0.0, prompt_token_s=0.0)
    ranks.ask(2, long, more=600)
    assert ranks.grant() == [(2, home)]


def test_a_worse_priority_at_home_is_not_passed_for_ever() -> None:
    ranks = Ranks(2)
    long = names(1, 200)
    home = ranks.serve(1, long)
    ranks.ask(2, long)
    assert ranks.grant() == [(2, home)]
    ranks.ask(3, long, priority=5)
    others = 0
    for number in range(10, 60):
        ranks.ask(number, long)
        ranks.end(home)
        made = ranks.grant()
        if (3, home) in made:
            break
        others += len(made)
    assert others <= PRIORITY_PATIENCE + PATIENCE


asks = st.tuples(st.just("ask"), st.integers(0, 5), st.integers(0, 12), st.integers(0, 2))
ends = st.tuples(st.just("end"), st.integers(0, 2), st.just(0), st.just(0))
losses = st.tuples(st.just("lose"), st.integers(0, 2), st.just(0), st.just(0))


@settings(max_examples=examples(80))
@given(st.lists(st.one_of(asks, asks, ends, ends, losses), max_size=60))
def test_all_are_granted_once_whatever_happens(happens: list[tuple[str, int, int, int]]) -> None:
    ranks, asked, granted = Ranks(slots=2, kv=4_000), list[int](), list[int]()
    for number, (what, one, blocks, priority) in enumerate(happens):
        if what == "ask":
            ranks.ask(number, names(1000 * one + 1, blocks), priority=priority, session=one % 3)
            asked.append(number)
        elif what == "end" and ranks.running[one]:
            ranks.end(one)
        elif what == "lose":
            ranks.queue.lost(one)
            ranks.running[one] = []
            ranks.report(one)
        granted += [request for request, _ in ranks.grant()]
    for _ in range(len(asked) * 3):
        for rank in ranks.running:
            if ranks.running[rank]:
                ranks.end(rank)
        granted += [request for request, _ in ranks.grant()]
    assert sorted(granted) == sorted(asked)
    assert not ranks.queue.homes.lines
    assert not len(ranks.queue)


def test_what_moving_costs_others_keeps_it_home_where_memory_is_short() -> None:
    """It would have its first token sooner elsewhere; but somebody's KV would have to go for that."""

    def moves(memory: int) -> bool:
        ranks = Ranks(2, kv=memory)
        long = names(1, 50)
        home = ranks.serve(1, long)
        ranks.serve(2, names(1000, 50))
        ranks.ask(3, long)
        ranks.grant()
        # An answer that takes a second: longer than to compute 6,400 tokens anew, and not twice as long.
        ranks.answers = 100
        ranks.report(home)
        ranks.ask(4, long)
        return ranks.grant() == [(4, 1 - home)]

    assert moves(1_000_000)
    assert not moves(7_000)


def test_what_a_rank_says_it_holds_makes_a_home_and_what_it_has_removed_none() -> None:
    ranks = Ranks(3)
    ranks.queue.homes.told(KvDelta(2, 12, 1, packed(names(1, 20))))
    assert ranks.serve(1, names(1, 24)) == 2
    ranks.queue.homes.told(KvDelta(2, 12, 2, b"", packed(names(1, 24)), whole=True))
    ranks.queue.homes.told(KvDelta(0, 10, 1, packed(names(1, 20))))
    assert ranks.serve(2, names(1, 24)) == 0
