"""Where ranks run in a cluster: which node each gets, what it keeps over its lives, and when it gets another."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from paceline.core.places import (
    Begin,
    ClusterNode,
    Effect,
    End,
    EndLife,
    FindPlace,
    Found,
    GiveUp,
    Kill,
    LifeEnded,
    LifeReady,
    Lost,
    Places,
    SayEnded,
    StartLife,
)
from tests.core.harness import find, one

NEEDS = {"CPU": 1.0, "GPU": 2.0}


def nodes(**gpus: float) -> list[ClusterNode]:
    return [ClusterNode(name, {"CPU": 64.0, "GPU": count}) for name, count in gpus.items()]


def begin(places: Places, life: int, rank: int, there: Sequence[ClusterNode]) -> list[Effect]:
    return places.handle(Begin(life, rank, NEEDS, there), 0.0)


def placed(places: Places, life: int, rank: int, there: Sequence[ClusterNode]) -> FindPlace:
    """A rank whose life runs where it was aimed at, and is ready."""
    wanted = one(find(begin(places, life, rank, there), FindPlace))
    assert wanted.hint is not None
    assert places.handle(Found(wanted.place, wanted.hint), 0.0) == [StartLife(wanted.place, life)]
    places.handle(LifeReady(life), 0.0)
    return wanted


def test_ranks_are_spread_over_the_nodes_with_room() -> None:
    places, there = Places(), nodes(a=8, b=8, c=1)
    asked = [one(find(begin(places, rank, rank, there), FindPlace)) for rank in range(4)]
    assert [place.hint for place in asked] == ["a", "b", "a", "b"]
    assert [place.place for place in asked] == [0, 1, 2, 3]
    assert asked[0].needs == NEEDS


def test_what_was_asked_for_and_is_not_found_yet_is_not_free() -> None:
    places, there = Places(), nodes(a=2, b=4)
    hints = [one(find(begin(places, rank, rank, there), FindPlace)).hint for rank in range(4)]
    assert hints == ["a", "b", "b", None]


def test_so_many_ranks_a_node_are_aimed_at_and_more_where_there_is_no_other() -> None:
    places, there = Places(ranks_a_node=2), nodes(a=16, b=16)
    hints = [one(find(begin(places, rank, rank, there), FindPlace)).hint for rank in range(6)]
    assert hints == ["a", "a", "b", "b", "a", "b"]


def test_a_life_that_ends_by_itself_leaves_its_place_to_the_next() -> None:
    places, there = Places(), nodes(a=8, b=8)
    place = placed(places, 0, 3, there).place
    assert places.handle(LifeEnded(0, -9, "killed"), 0.0) == [SayEnded(0, -9, "killed")]
    assert begin(places, 1, 3, there) == [StartLife(place, 1)]


def test_a_place_whose_node_died_is_found_anew_elsewhere() -> None:
    places = Places()
    place = placed(places, 0, 0, nodes(a=8, b=8)).place
    assert places.handle(Lost(place, "its node died"), 0.0) == [GiveUp(place), SayEnded(0, None, "its node died")]
    assert one(find(begin(places, 1, 0, nodes(b=8)), FindPlace)).hint == "b"
    assert places.handle(Lost(place, "again"), 0.0) == []


@pytest.mark.parametrize(("again", "moves"), [(False, True), (True, False)])
def test_a_life_that_was_never_ready_leaves_its_node_for_another(again: bool, moves: bool) -> None:
    places, there = Places(), nodes(a=8, b=8)
    wanted = one(find(begin(places, 0, 0, there), FindPlace))
    places.handle(Found(wanted.place, "a"), 0.0)
    effects = places.handle(LifeEnded(0, 1, "no memory", again=again), 0.0)
    assert find(effects, SayEnded) == [SayEnded(0, 1, "no memory")]
    assert bool(find(effects, GiveUp)) is moves
    effects = begin(places, 1, 0, there)
    if moves:
        assert one(find(effects, FindPlace)).hint == "b"
        # The only one is better than none.
        places.handle(Found(wanted.place + 1, "b"), 0.0)
        places.handle(LifeEnded(1, 1, "no memory"), 0.0)
        assert one(find(begin(places, 2, 0, nodes(b=8)), FindPlace)).hint == "b"
    else:
        assert effects == [StartLife(wanted.place, 1)]


def test_a_rank_that_is_not_wanted_ends_and_its_place_is_given_up() -> None:
    places, there = Places(), nodes(a=8)
    place = placed(places, 0, 0, there).place
    assert places.handle(End(0), 0.0) == [EndLife(place, 0, kill=False)]
    assert places.handle(Kill(0), 0.0) == [EndLife(place, 0, kill=True)]
    assert places.handle(LifeEnded(0, 0, "exit status 0"), 0.0) == [GiveUp(place), SayEnded(0, 0, "exit status 0")]
    assert places.handle(End(0), 0.0) == []


def test_the_place_of_one_that_has_ended_is_given_up_too() -> None:
    places, there = Places(), nodes(a=8)
    place = placed(places, 0, 0, there).place
    places.handle(LifeEnded(0, 1, "x"), 0.0)
    assert places.handle(End(0), 0.0) == [GiveUp(place)]


@pytest.mark.parametrize("event", [End(0), Kill(0)])
def test_one_that_has_no_room_yet_ends_at_once(event: End | Kill) -> None:
    places = Places()
    place = one(find(begin(places, 0, 0, nodes()), FindPlace))
    assert place.hint is None
    assert places.handle(event, 0.0) == [GiveUp(place.place), SayEnded(0, None, "it was ended")]
    assert places.handle(Found(place.place, "a"), 0.0) == []


def test_one_that_begins_anew_before_the_end_was_heard_has_one_life() -> None:
    places, there = Places(), nodes(a=8)
    place = placed(places, 0, 0, there).place
    effects = begin(places, 1, 0, there)
    assert effects[:2] == [GiveUp(place), SayEnded(0, None, "another life has begun")]
    assert isinstance(effects[2], FindPlace)
    assert places.handle(LifeEnded(0, 0, "late"), 0.0) == []
