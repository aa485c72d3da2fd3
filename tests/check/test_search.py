"""The search, on a model of its own; and machines as values: what is one state, copies, a story with other numbers."""

from __future__ import annotations

import ast
from collections.abc import Hashable, Iterator
from pathlib import Path
from typing import Any

import pytest

from paceline.check import parties
from paceline.check.parties import BESIDES, MESSAGES
from paceline.check.search import Broken, Freezer, Move, Register, Same, Whole, search
from paceline.core.coordinator.load_table import Publisher
from paceline.core.coordinator.machine import Coordinator
from paceline.core.messages import RankHello, StartDPWave, StartWave

PACKAGE = Path(parties.__file__).parent
freeze = Freezer(*BESIDES)


class Counter(Whole):
    """A number that goes up by one or two, and the losses that are left."""

    def __init__(self, number: int = 0, spare: int = 0) -> None:
        self.number, self.spare = number, spare

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


# Machines as values -----------------------------------------------------------------------------


class Machine:
    INCIDENTAL = frozenset({"counted"})

    def __init__(self) -> None:
        self.wave, self.counted, self.due = 0, 0, float("inf")

    def wakes(self, wave: int, due: float = 1000.0) -> str:
        self.wave, self.due = wave, due
        self.counted += 1
        return f"woke {wave}"


class Heir(Machine):
    """A machine to which an attribute was added."""

    def __init__(self) -> None:
        super().__init__()
        self.more = 0


def test_two_states_are_one_but_for_what_counts() -> None:
    one, other = Machine(), Machine()
    other.counted = 5
    assert freeze(one) == freeze(other)
    other.wave = 1
    assert freeze(one) != freeze(other)


def test_an_attribute_that_nobody_has_thought_of_is_kept() -> None:
    one, other = Heir(), Heir()
    other.more = 1
    assert freeze(one) != freeze(other)
    other.more, other.counted = 0, 7
    assert freeze(one) == freeze(other)


def test_of_a_time_it_counts_whether_it_is_set_and_of_a_class_which_it_is() -> None:
    assert freeze(1000.0) == freeze(1000.5) != freeze(float("inf"))
    assert freeze(-1.0) != freeze(0.5)
    assert freeze({2: 0.1, 1: None}) == freeze({1: None, 2: 7.0}) != freeze({1: 7.0, 2: None})
    assert freeze(Machine()) != freeze(type("Machine", (Machine,), {})())
    assert freeze(Publisher(1, 0.0, with_loads=True)) is None


def test_a_part_is_never_changed_and_what_it_does_is_done_once() -> None:
    register: Register[Machine] = Register(freeze)
    first = register.part(Machine())
    woken, said = first.after(Machine.wakes, 3)
    assert (first.thing.wave, woken.thing.wave, said) == (0, 3, "woke 3")
    assert first.after(Machine.wakes, 3)[0] is woken
    assert first.after(Machine.wakes, 3, 2000.0)[0] is woken is register.part(woken.thing)
    assert first.after(Machine.wakes, 4)[0] is not woken


def test_a_machine_that_fails_is_a_violation() -> None:
    with pytest.raises(Broken, match="the machine of a Machine failed: TypeError"):
        Register[Machine](freeze).part(Machine()).after(Machine.wakes)  # type: ignore[call-arg]


def test_equal_messages_are_one() -> None:
    assert MESSAGES.part(StartDPWave(1, 0)) is MESSAGES.part(StartDPWave(1, 0)) is not MESSAGES.part(StartDPWave(1, 1))


def test_the_same_story_with_other_numbers_leads_to_the_mirrored_state() -> None:
    register: Register[Coordinator] = Register(freeze)
    hello, started = MESSAGES.part(RankHello(1, 0, 1, "rank", True)), MESSAGES.part(StartWave(0, 1, 0))
    both = register.part(Coordinator(2, 1, 0.0, publish_loads=False))
    for rank in range(2):
        both = both.after(parties.happens, rank, hello)[0]
    one, other = (both.after(parties.happens, rank, started)[0] for rank in range(2))
    assert one is not other
    assert one.mirrored((1, 0)) is other
    assert one.mirrored((0, 1)) is one
    assert both.mirrored((1, 0)) is both


def test_no_private_attribute_of_a_machine_is_named() -> None:
    """Names that begin with an underscore are the package's own: of the object itself, of its methods and helpers."""
    for path in sorted(PACKAGE.glob("*.py")):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        own = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
                of_itself = isinstance(node.value, ast.Name) and node.value.id == "self"
                assert of_itself or node.attr in own | {"_replace", "_spare"}, f"{path.name}:{node.lineno}: {node.attr}"
