"""The search: shortest stories, liveness, what is not looked at, and where memory ends it. On a model of its own."""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from typing import Any

import pytest

from paceline.check.search import Move, Same, search
from paceline.check.state import Broken


class Counter:
    """A number that goes up by one or two, and the losses that are left."""

    def __init__(self, number: int = 0, spare: int = 0) -> None:
        self.number, self.spare = number, spare

    def copy(self) -> Counter:
        return Counter(self.number, self.spare)

    def add(self, number: int) -> None:
        self.number += number
        if self.number == 7:
            raise Broken("it is seven")


class Counting:
    """Up to `end`, where all is over unless that is a trap."""

    def __init__(self, end: int, *steps: int, traps: tuple[int, ...] = (), losses: int = 0) -> None:
        self.end, self.steps, self.traps, self.losses = end, steps, traps, losses
        self.looked: list[tuple[int, int]] = []

    def start(self) -> Counter:
        return Counter(0, self.losses)

    def moves(self, state: Counter) -> Iterator[Move]:
        self.looked.append((state.number, state.spare))
        if state.number in self.traps:
            return
        for step in self.steps:
            if state.number + step <= self.end:
                yield Move((step,), True, lambda s, step=step: s.add(step))
        if state.spare:
            yield Move(("lose",), False, self.lose)
        yield Move(("nothing",), True, self.nothing)

    def lose(self, state: Counter) -> None:
        state.spare -= 1

    def nothing(self, state: Counter) -> None:
        raise Same

    def over(self, state: Counter) -> bool:
        return state.number == self.end

    def key(self, state: Counter) -> Hashable:
        return state.number

    def tell(self, before: Counter, what: tuple[Any, ...], after: Counter) -> str:
        return f"{before.number} and {what[0]}"

    def stuck(self, state: Counter) -> str:
        return f"stuck at {state.number}"


def test_every_state_is_met_once() -> None:
    model = Counting(6, 1, 2)
    found = search(model)
    assert (found.states, found.moves, found.depth) == (7, 11, 3)
    assert (found.violation, found.story, found.decided) == ("", [], True)
    assert model.looked == [(number, 0) for number in range(7)]


def test_the_story_of_what_is_broken_is_a_shortest_one() -> None:
    found = search(Counting(9, 1, 2))
    assert found.violation == "Then: it is seven."
    assert found.story == ["1. 0 and 1.", "2. 1 and 2.", "3. 3 and 2.", "4. 5 and 2."]


def test_a_state_from_which_nothing_is_over_is_the_nearest_and_goes_on_as_it_would() -> None:
    found = search(Counting(6, 2, 3, traps=(5,)))
    assert found.violation == "stuck at 5"
    assert found.story == ["1. 0 and 2.", "2. 2 and 3."]
    found = search(Counting(6, 1, traps=(3,)))
    assert found.violation == "stuck at 3"
    assert found.story[0] == "1. 0 and 1."
    assert len(found.story) == 3


def test_a_state_with_fewer_losses_left_is_not_looked_at() -> None:
    model = Counting(2, 1, losses=1)
    assert search(model).violation == ""
    assert model.looked == [(0, 1), (1, 1), (2, 1)]


def test_a_walk_that_would_need_too_much_memory_is_not_decided() -> None:
    found = search(Counting(6, 1), most_mb=1)
    assert not found.decided
    assert found.violation == ""


def test_progress_is_reported() -> None:
    seen: list[tuple[int, int, int]] = []
    search(Counting(6, 1), lambda *now: seen.append(now))
    assert seen == [(2, 1, 1)]


def test_what_a_machine_raises_otherwise_is_no_violation() -> None:
    class Failing(Counting):
        def nothing(self, state: Counter) -> None:
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        search(Failing(3, 1))
