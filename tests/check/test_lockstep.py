"""The search of waves and pauses: nothing is wrong, and what is broken on purpose is found by a shortest story."""

from __future__ import annotations

from collections.abc import Hashable

import pytest

from paceline.check.cli import without_rule
from paceline.check.lockstep import Lockstep
from paceline.check.parties import Bound, State
from paceline.check.search import Finding, search
from paceline.core.coordinator.wave import GroupWave
from paceline.core.requests import SuspendMode
from paceline.core.rules import OF_GENERATIONS, OF_SCALING, RULES

MOVES = {
    "acknowledged-wakes": 3,
    "own-report": 10,
    "stale-notice-leaves-nobody-out": 6,
    "finished-waves-ignored": 6,
    "suspension-number": 14,
    "new-coordinator-asks": 7,
    "joiner-told-the-wave": 7,
}
"""How long each story is, with the move that breaks and, where all is stuck, with what still happens by itself."""


def walked(**bound: int) -> Finding:
    return search(Lockstep(Bound(**bound)))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "bound",
    [
        {"requests": 2, "losses": 1, "crashes": 0},
        {"requests": 1, "losses": 1, "crashes": 1},
        {"ranks": 3, "requests": 1, "losses": 1, "crashes": 0},
        {"requests": 2, "losses": 0, "crashes": 0, "steps": 2, "sync_interval": 2},
        {"requests": 0, "losses": 1, "crashes": 1, "suspensions": 1},
    ],
)
def test_nothing_is_wrong(bound: dict[str, int]) -> None:
    found = walked(**bound)
    assert (found.violation, found.story, found.decided) == ("", [], True)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["keep", "wait", "abort"])
def test_nothing_is_wrong_in_a_pause(mode: SuspendMode) -> None:
    found = search(Lockstep(Bound(requests=1, losses=0, crashes=0, suspensions=1, mode=mode)))
    assert (found.violation, found.story) == ("", [])


@pytest.mark.slow
@pytest.mark.parametrize("bound", [{}, {"ranks": 3}, {"requests": 1, "crashes": 0, "suspensions": 1}])
def test_nothing_is_wrong_in_larger_bounds(bound: dict[str, int]) -> None:
    found = walked(**bound)
    assert (found.violation, found.story, found.decided) == ("", [], True)
    assert found.states > 30_000


def test_every_rule_of_waves_has_a_story() -> None:
    assert MOVES.keys() | OF_GENERATIONS | OF_SCALING == RULES.keys()


@pytest.mark.slow
@pytest.mark.parametrize("rule", MOVES)
def test_a_rule_that_is_left_out_is_found(rule: str) -> None:
    found = without_rule(rule)
    assert found.violation.startswith(("Then: ", "Stuck: "))
    assert found.story[0].startswith("1. ")
    assert len(found.story) == MOVES[rule]


def test_a_bug_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupWave, "started", lambda *_: None)
    found = walked(requests=2, losses=0, crashes=0)
    assert found.violation.startswith("Stuck: rank ")


def test_a_broken_invariant_is_found_among_many_states(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GroupWave, "joiners_wave", 0)
    found = walked(requests=2, losses=1, crashes=1)
    assert "a rank that joins is told wave 0" in found.violation
    assert any("dies" in line for line in found.story)


class Noting(Lockstep):
    """Takes note of what ranks can be like, and what the deployment can be like when all is over."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self.lives: set[Hashable] = set()
        self.ends: set[Hashable] = set()

    def over(self, state: State) -> bool:
        processes = [node.process for node in state.nodes]
        now = sorted((one.machine.wave, one.machine.running, one.unfinished) for one in processes)
        self.lives.update(now)
        over = super().over(state)
        if over:
            self.ends.add((state.unsent, self.known(state).wave, tuple(now)))
        return over


@pytest.mark.parametrize(
    ("requests", "losses", "crashes"),
    [
        (1, 0, 0),
        (1, 1, 0),
        pytest.param(2, 0, 0, marks=pytest.mark.slow),
        pytest.param(1, 0, 1, marks=pytest.mark.slow),
    ],
)
def test_what_is_merged_and_put_in_order_hides_nothing(requests: int, losses: int, crashes: int) -> None:
    merged, plain = (
        Noting(Bound(requests=requests, losses=losses, crashes=crashes, merge=merge)) for merge in (True, False)
    )
    few, many = search(merged), search(plain)
    assert few.violation == many.violation == ""
    assert few.states < many.states
    assert (merged.lives, merged.ends) == (plain.lives, plain.ends)
