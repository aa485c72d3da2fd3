"""Machines as values: what is one state and what is another, copies, and the same story with other numbers."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from paceline.check import parties
from paceline.check.parties import BESIDES, MESSAGES
from paceline.check.state import Broken, Freezer, Register
from paceline.core.coordinator.machine import Coordinator
from paceline.core.coordinator.publishing import Publisher
from paceline.core.messages import RankHello, StartDPWave, StartWave

PACKAGE = Path(parties.__file__).parent
freeze = Freezer(*BESIDES)


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
        both = both.after(parties.said, rank, hello)[0]
    one, other = (both.after(parties.said, rank, started)[0] for rank in range(2))
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
