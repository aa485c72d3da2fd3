"""The tables of `transitions.py` say what happens, all of it and nothing else, in whole deployments from many seeds."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest

from paceline.protocol.coordinator import Coordinator
from paceline.protocol.messages import Admit, Form, GroupMember, Suspension
from paceline.protocol.rank import Rank
from paceline.protocol.rank_events import CoordinatorSaid, Formed, Leave, Loaded
from paceline.protocol.transitions import (
    GENERATION,
    RANK,
    SUSPENSION,
    Table,
    diagram,
    event_name,
    generation_state,
    rank_state,
    suspension_state,
)
from paceline.simulate.run import Options, simulate

SEEDS = range(60)


@pytest.fixture(scope="module")
def seen() -> dict[str, dict[Any, set[str]]]:
    """What happened in the runs: ranks as in `RANK`, the coordinator's parts as state to states."""
    found: dict[str, dict[Any, set[str]]] = {name: defaultdict(set) for name in ("rank", "suspension", "generation")}
    rank_handle, coordinator_handle = Rank._handle, Coordinator.handle

    def watch_rank(machine: Rank, event: Any, now: float) -> Any:
        before = rank_state(machine)
        effects = rank_handle(machine, event, now)
        if rank_state(machine) != before:
            found["rank"][before, event_name(event)].add(rank_state(machine))
        return effects

    def watch_coordinator(machine: Coordinator, event: Any, now: float) -> Any:
        def states() -> tuple[str, str]:
            return suspension_state(
                machine._suspension, machine._suspension.expected(machine._membership, machine._generations, now)
            ), generation_state(machine._generations)

        before = states()
        effects = coordinator_handle(machine, event, now)
        for name, was, after in zip(("suspension", "generation"), before, states(), strict=True):
            if was != after:
                found[name][was].add(after)
        return effects

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Rank, "_handle", watch_rank)
        patch.setattr(Coordinator, "handle", watch_coordinator)
        for seed in SEEDS:
            outcome = simulate(Options(seed, ranks=3, lockstep=True, crashes=4, suspensions=4, requests=40))
            assert outcome.ok, outcome
    return found


RARE = {("joining", "Admit", "held"), ("paused", "Form", "held"), ("held", "Form", "paused")}
"""Where the message that says so first is lost or late; shown one by one below."""


def test_ranks_do_what_the_table_says_and_nothing_else(seen: dict[str, dict[Any, set[str]]]) -> None:
    table = {(*key, after) for key, states in RANK.items() for after in states if key[1] != "Leave"}
    happened = {(*key, after) for key, states in seen["rank"].items() for after in states}
    assert happened | RARE == table


@pytest.mark.parametrize(("number", "state"), [(0, "paused"), (1, "held"), (2, "paused")])
def test_what_a_rank_is_told_when_it_joins_says_whether_it_is_held(number: int, state: str) -> None:
    told = Suspension(number, "keep", released=number != 1)
    machine = Rank(0, 1, "a", lockstep=True)
    machine.handle(Loaded(), 0.0)
    machine.handle(CoordinatorSaid(Admit(0, 1, 5, told)), 0.0)
    assert (rank_state(machine), machine.wave) == (state, 5)


def test_what_a_rank_is_told_with_a_generation_says_whether_it_is_held() -> None:
    machine = Rank(0, 1, "a", lockstep=True, group_address="b")
    machine.handle(Loaded(), 0.0)
    states = []
    for generation, number in ((1, 0), (2, 1), (3, 2)):
        told = Suspension(number, "keep", released=number != 1)
        machine.handle(CoordinatorSaid(Form(generation, 0, [GroupMember(0, 1, "b")], told)), 0.0)
        machine.handle(Formed(generation), 0.0)
        states.append(rank_state(machine))
    assert states == ["paused", "held", "paused"]


@pytest.mark.parametrize(("name", "table"), [("suspension", SUSPENSION), ("generation", GENERATION)])
def test_the_coordinator_does_what_the_tables_say_and_nothing_else(
    seen: dict[str, dict[Any, set[str]]], name: str, table: Table
) -> None:
    happened = {(state, after) for state, states in seen[name].items() for after in states}
    # That forming takes too long is rare; `test_generation.py` shows it.
    rare = {("forming", "ended")} if name == "generation" else set()
    assert happened | rare == {(state, after) for (state, _), states in table.items() for after in states}


def test_a_rank_can_leave_whenever_it_has_loaded() -> None:
    machine = Rank(0, 1, "a", lockstep=True)
    machine.handle(Leave(), 0.0)
    assert rank_state(machine) == "left"
    assert {state for state, event in RANK if event == "Leave"} == {"joining", "paused", "running", "held"}


def test_a_table_is_drawn_as_a_diagram() -> None:
    assert diagram({("a", "x"): {"c", "b"}}) == "stateDiagram-v2\n    a --> b: x\n    a --> c: x"
