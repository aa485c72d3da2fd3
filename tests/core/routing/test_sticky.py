"""A prompt goes where its beginning went before, unless that rank has too much to do; memory stays bounded."""

from __future__ import annotations

import random

from hypothesis import given, settings, strategies as st

from paceline.core.blocks import (
    BLOCK_TOKENS,
    MAX_ENTRIES,
    MAX_PROMPT_BLOCKS,
    BlockIndex,
    block_hashes,
    packed,
    unpacked,
)  # fmt: skip
from paceline.core.routing import LeastLoad, Sticky
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.policy import Query
from paceline.core.routing.session import session_name
from paceline.core.routing.sticky import COMPARED, RUNNING_TOKENS
from tests.pace import examples


def idle(size: int) -> Candidates:
    return Candidates(Candidate(rank, 0, 0, 0, 0, 0, 0, 100 + rank) for rank in range(size))


def tokens(seed: int, blocks: float) -> list[int]:
    chance = random.Random(seed)
    return [chance.randrange(50_000) for _ in range(int(blocks * BLOCK_TOKENS))]


def ask(policy: Sticky, candidates: Candidates, prompt: list[int]) -> int:
    query = Query(len(prompt), prompt, blocks=block_hashes(prompt))
    rank = policy.choose(candidates, query)
    policy.sent(rank, query)
    return rank


def load(candidates: Candidates, rank: int, prefill: int) -> None:
    place = candidates.place(rank)
    assert place is not None
    candidates[place].prefill_tokens = prefill
    candidates.changed(rank)


def busy_but(candidates: Candidates, rank: int, work: int = 200) -> None:
    """Make all others look worse, though not by as much as a block or two are worth."""
    for one in candidates.ranks:
        load(candidates, one, 0 if one == rank else work)


def test_a_conversation_stays_at_its_rank() -> None:
    policy, candidates = Sticky(), idle(8)
    busy_but(candidates, 3)
    prompt = tokens(1, 2.5)
    assert ask(policy, candidates, prompt) == 3
    assert policy.reason() == "no prefix known"
    busy_but(candidates, 5)
    prompt += tokens(2, 3)
    assert ask(policy, candidates, prompt) == 3
    assert policy.reason() == "256 tokens of prefix"
    busy_but(candidates, 6)
    assert ask(policy, candidates, prompt + tokens(3, 1)) == 3
    assert policy.reason() == "640 tokens of prefix"
    assert ask(policy, candidates, tokens(9, 4)) == 6


def test_the_longest_prefix_wins() -> None:
    policy, candidates = Sticky(), idle(4)
    shared, one, two = tokens(1, 2), tokens(2, 2), tokens(3, 2)
    busy_but(candidates, 0)
    ask(policy, candidates, shared + one)
    policy.index.sent(2, block_hashes(shared + two))
    busy_but(candidates, 1)
    assert ask(policy, candidates, shared + one + two) == 0
    assert ask(policy, candidates, shared + two + one) == 2


def test_a_block_is_its_tokens_and_all_before_them() -> None:
    same = tokens(1, 1)
    first, second = block_hashes(same + same)
    assert first != second
    assert block_hashes(tokens(2, 1) + same)[1] not in {first, second}
    assert block_hashes(same + same + same[:-1]) == (first, second)
    assert block_hashes(same[:-1]) == ()
    assert len(block_hashes(tokens(1, MAX_PROMPT_BLOCKS + 3))) == MAX_PROMPT_BLOCKS


def test_an_overloaded_rank_is_passed_over_and_another_learns_the_prefix() -> None:
    policy, candidates = Sticky(), idle(4)
    busy_but(candidates, 2)
    prompt = tokens(1, 4)
    assert ask(policy, candidates, prompt) == 2
    for rank in range(4):
        load(candidates, rank, 0)
    saved = 4 * BLOCK_TOKENS
    load(candidates, 2, saved)
    assert ask(policy, candidates, prompt) == 2
    load(candidates, 2, saved + 1)
    other = ask(policy, candidates, prompt)
    assert other != 2
    assert policy.reason() == "ranks with 512 tokens of prefix are overloaded"
    assert ask(policy, candidates, prompt) == other


def test_a_key_counts_where_no_prefix_is_known() -> None:
    policy, candidates = Sticky(), idle(4)
    busy_but(candidates, 2)
    first = Query(100, session="a")
    assert policy.choose(candidates, first) == 2
    policy.sent(2, first)
    busy_but(candidates, 1, 50)
    assert policy.choose(candidates, Query(100, session="a")) == 2
    assert policy.choose(candidates, Query(100, session="b")) == 1
    # A prefix says more than a key does.
    prompt = tokens(1, 3)
    policy.sent(3, Query(len(prompt), prompt, blocks=block_hashes(prompt)))
    assert policy.choose(candidates, Query(len(prompt), prompt, "a", blocks=block_hashes(prompt))) == 3


def test_what_each_rank_holds_is_told_from_the_longest_on() -> None:
    index, names = BlockIndex(), block_hashes(tokens(1, 5))
    index.sent(0, names[:2])
    index.sent(1, names)
    index.sent(2, names[:2])
    index.sent(3, block_hashes(tokens(2, 2)))
    assert list(index.held(names)) == [(5, 1 << 1), (2, 1 << 0 | 1 << 2)]
    index.limit(1, 3)
    assert list(index.held(names)) == [(3, 1 << 1), (2, 1 << 0 | 1 << 2)]
    assert (index.spare(1), index.spare(7)) == (0, MAX_ENTRIES)


def test_names_travel_as_bytes() -> None:
    names = block_hashes(tokens(1, 3))
    assert tuple(unpacked(packed(names))) == names
    assert len(unpacked(packed(names) + b"abc")) == 3
    assert session_name("a") != session_name("b")
    assert 0 < session_name("\ud800") < 2**63


def test_among_many_with_the_prefix_it_is_as_least_load() -> None:
    prompt = tokens(1, 2)
    for holders in ([1, 4], list(range(COMPARED + 20))):
        policy, candidates = Sticky(1, 2), idle(64)
        for rank in holders:
            policy.index.sent(rank, block_hashes(prompt))
            load(candidates, rank, 500)
        best = holders[-2]
        load(candidates, best, 10)
        # With another front-end about, what is in flight decides among equals.
        for rank in holders:
            candidates[rank].in_flight = 0 if rank == best else 3
            candidates.changed(rank)
        assert ask(policy, candidates, prompt) == best


def test_with_every_rank_holding_it_the_choice_is_spread() -> None:
    policy, candidates = Sticky(), idle(40)
    prompt = tokens(1, 1)
    for rank in range(40):
        policy.index.sent(rank, block_hashes(prompt))
    chosen = []
    for _ in range(40):
        rank = ask(policy, candidates, prompt)
        candidates[rank].requests += 1
        candidates[rank].in_flight += 1
        candidates.changed(rank)
        chosen.append(rank)
    assert sorted(chosen) == list(range(40))


def test_short_prompts_and_unknown_ones_are_least_loads() -> None:
    policy, plain = Sticky(), LeastLoad()
    chance = random.Random(1)
    for seed in range(200):
        candidates = Candidates(
            Candidate(rank, chance.randrange(9), chance.randrange(3_000), chance.randrange(4), 0, 0, 0)
            for rank in range(chance.randrange(1, 30))
        )
        prompt = tokens(seed, chance.choice([0.1, 0.9, 3]))
        expected = plain.choose(candidates, Query(len(prompt)))
        assert ask(policy, candidates, prompt) == expected
    assert policy.choose(idle(1), Query(5_000)) == 0


def test_a_rank_that_has_gone_is_forgotten_and_so_is_an_earlier_life() -> None:
    prompt = tokens(1, 3)
    for again in (None, 55):
        policy, candidates = Sticky(), idle(4)
        busy_but(candidates, 1)
        assert ask(policy, candidates, prompt) == 1
        candidates.remove(1)
        if again is not None:
            candidates.add(Candidate(1, 0, 0, 0, 0, 0, 0, again))
        busy_but(candidates, 3)
        assert ask(policy, candidates, prompt) == 3
        assert policy.reason() == "no prefix known"
        assert len(policy.index) == 3


def test_memory_is_bounded_whatever_is_sent() -> None:
    policy, candidates = Sticky(), idle(2048)
    policy.choose(candidates, Query(1))
    assert policy.index.capacity * 2048 <= MAX_ENTRIES
    for seed in range(5):
        policy.index.sent(7, block_hashes(tokens(seed, 100)))
    assert len(policy.index) == policy.index.capacity
    # Half the ranks go: the others may have twice as much, and the rest is forgotten as they come back.
    for rank in range(1024):
        candidates.remove(rank)
    policy.choose(candidates, Query(1))
    assert policy.index.capacity * 1024 <= MAX_ENTRIES


def test_what_is_used_stays_and_what_is_left_is_a_prefix() -> None:
    index = BlockIndex()
    index.resize(6)
    kept, other = block_hashes(tokens(1, 4)), block_hashes(tokens(2, 4))
    index.sent(0, kept)
    index.sent(0, other)
    assert index.longest(other) == (4, 1)
    assert index.longest(kept) == (2, 1)
    index.sent(0, kept[:1])
    index.sent(0, block_hashes(tokens(3, 1)))
    assert index.longest(kept[:1]) == (1, 1)


@settings(max_examples=examples(60))
@given(st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 2), max_size=6)), max_size=60))
def test_the_index_is_what_a_set_for_each_rank_would_be(sends: list[tuple[int, list[int]]]) -> None:
    index, sets = BlockIndex(), [set[int]() for _ in range(5)]
    for rank, path in sends:
        blocks = [hash(tuple(path[: end + 1])) for end in range(len(path))]
        lengths = [next((n for n, block in enumerate(blocks) if block not in one), len(blocks)) for one in sets]
        best = max(lengths)
        holders = sum(1 << number for number, length in enumerate(lengths) if length == best) if best else 0
        assert index.longest(blocks) == (best, holders)
        if rank == 5:
            index.forget(0)
            sets[0].clear()
        else:
            index.sent(rank, blocks)
            sets[rank] |= set(blocks)
        assert len(index) == sum(map(len, sets))


def test_a_request_weighs_a_little() -> None:
    # Nobody waits for answers to end, they only make steps longer.
    policy, candidates = Sticky(), idle(2)
    prompt = tokens(1, 1)
    rank = ask(policy, candidates, prompt)
    candidates[rank].requests = BLOCK_TOKENS // RUNNING_TOKENS
    candidates.changed(rank)
    assert ask(policy, candidates, prompt) == rank
    candidates[rank].requests += 1
    candidates.changed(rank)
    assert ask(policy, candidates, prompt) == 1 - rank
