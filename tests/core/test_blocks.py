"""Who holds which beginnings: what ranks say, beside what they were sent; as small and quick as it must be."""

from __future__ import annotations

import tracemalloc

import pytest
from hypothesis import given, settings, strategies as st

from paceline.core.blocks import BLOCK_TOKENS, EXPECTED, BlockIndex, block_hashes, extend_hashes
from tests.pace import examples

NAMES = st.lists(st.integers(1, 12), max_size=5, unique=True)
MOVES = st.lists(
    st.one_of(
        st.tuples(st.just("told"), st.integers(0, 2), NAMES, NAMES, st.booleans()),
        st.tuples(st.just("sent"), st.integers(0, 2), NAMES, st.just([]), st.just(False)),
        st.tuples(st.just("forget"), st.integers(0, 2), st.just([]), st.just([]), st.just(False)),
    ),
    max_size=30,
)


@given(MOVES)
@settings(max_examples=examples(300))
def test_what_ranks_say_is_what_they_are_known_to_hold(
    moves: list[tuple[str, int, list[int], list[int], bool]],
) -> None:
    index, held, sent = BlockIndex(), {rank: set[int]() for rank in range(3)}, {rank: set[int]() for rank in range(3)}
    for kind, rank, stored, removed, whole in moves:
        if kind == "told":
            index.told(rank, stored, [name for name in removed if name not in stored], whole=whole)
            gone = {name for name in removed if name not in stored}
            held[rank] = ((set() if whole else held[rank]) - gone) | set(stored)
            sent[rank] -= gone | set(stored)
        elif kind == "sent":
            index.sent(rank, stored)
            sent[rank] |= set(stored) - held[rank]
        else:
            index.forget(rank)
            held[rank], sent[rank] = set(), set()
        for one in range(3):
            known = held[one] | sent[one]
            assert {name for name in range(1, 13) if index.holds(one, name)} == known
            assert index.count(one) == len(known)


def test_what_a_rank_was_sent_and_never_said_makes_room() -> None:
    index = BlockIndex()
    index.told(0, [1, 2], [], whole=True)
    index.sent(0, range(100, 100 + EXPECTED + 10))
    assert index.count(0) == EXPECTED + 2
    assert index.holds(0, 1), "what it said stays"


@given(st.lists(st.integers(0, 9), max_size=60), st.lists(st.integers(0, 60)))
def test_names_grow_as_a_prompt_is_computed(tokens: list[int], counts: list[int]) -> None:
    names: list[int] = []
    for count in sorted(one for one in counts if one <= len(tokens)):
        extend_hashes(names, tokens, count, 4)
        assert names == list(block_hashes(tokens[:count], 4))


@pytest.mark.slow
def test_a_million_blocks_fit_into_a_hundred_megabytes() -> None:
    tracemalloc.start()
    index = BlockIndex()
    for rank in range(64):
        for part in range(16):
            begin = (rank * 16 + part) << 40
            index.told(rank, [begin + (number << 20) for number in range(1000)], [], whole=False)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(index) > 1_000_000
    assert most < 100e6


def test_one_look_at_each_block_finds_the_longest_beginning_of_a_long_prompt() -> None:
    index, prompt = BlockIndex(), block_hashes(range(100_000))
    for rank in range(64):
        index.told(rank, prompt[: 12 * rank], [], whole=True)
    assert len(prompt) == 100_000 // BLOCK_TOKENS
    assert next(index.held(prompt)) == (756, 1 << 63)
