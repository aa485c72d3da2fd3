"""Shared blocks: who uses them, and which go first."""

from __future__ import annotations

from paceline.simulate.traffic.prefix_cache import PrefixCache


def filled(*blocks: int) -> PrefixCache:
    cache = PrefixCache()
    for block in blocks:
        assert cache.add(block)
    return cache


def test_only_leading_blocks_match() -> None:
    cache = filled(1, 2, 4)
    assert cache.match([1, 2, 3, 4]) == 2
    assert cache.match([3, 1]) == 0
    assert cache.match([]) == 0


def test_a_block_is_idle_when_its_last_user_has_gone() -> None:
    cache = filled(1, 2)
    assert cache.take([1]) == 0
    assert cache.release([1, 2]) == 1
    assert (cache.held, list(cache.idle)) == ({1: 1}, [2])
    assert cache.idle_among([1, 2, 3]) == 1
    assert cache.take([1, 2]) == 1
    assert cache.held == {1: 2, 2: 1}


def test_what_is_there_is_not_added_again() -> None:
    cache = filled(1)
    assert not cache.add(1)
    cache.release([1])
    assert not cache.add(1)


def test_least_lately_used_goes_first_and_the_end_of_a_prompt_before_its_beginning() -> None:
    cache = filled(1, 2, 3)
    cache.release([1, 2, 3])
    cache.take([3])
    cache.release([3])
    assert list(cache.idle) == [2, 1, 3]
    cache.evict(2)
    assert list(cache.idle) == [3]
    cache.evict(9)
    assert not cache.idle
