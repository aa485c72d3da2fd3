"""Each rule holds where it should, and says in a sentence how it is broken; a misspelt one is refused."""

from __future__ import annotations

import pytest

from paceline.core import invariants
from paceline.core.coordinator.machine import Coordinator
from paceline.core.messages import Admit, StartDPWave
from paceline.core.rank.events import Agree, DummyStep, Effect, Phase, Step, ToFrontend
from paceline.core.rank.machine import Rank
from paceline.core.requests import Output, Outputs
from paceline.core.rules import RULES, checked


@pytest.mark.parametrize(("before", "after", "broken"), [(0, 0, False), (3, 4, False), (4, 3, True)])
def test_wave_never_falls(before: int, after: int, broken: bool) -> None:
    why = invariants.wave_never_falls("rank 1", before, after)
    assert why == ("the wave of rank 1 went down from 4 to 3" if broken else None)


def test_a_step_and_a_dummy_step_are_one_collective() -> None:
    assert invariants.same_collective({"rank 0": Step(), "rank 1": DummyStep()}) is None
    assert invariants.same_collective({"rank 0": Agree(True, 0), "rank 1": Agree(False, 0)}) is None
    why = invariants.same_collective({"rank 0": Step(), "rank 1": Agree(False, 0), "rank 2": DummyStep()})
    assert why == "ranks are in different collectives: rank 0 and rank 2 in a step, rank 1 in an agreement"


def outputs(*requests: int, finish: bool = True) -> Effect:
    return ToFrontend(1, Outputs(0, 1, [Output(r, [1], finish_reason="length" if finish else None) for r in requests]))


@pytest.mark.parametrize(
    ("finished", "effects", "broken"),
    [
        ([], [], False),
        ([1, 2], [outputs(2), outputs(1)], False),
        ([], [outputs(1, finish=False)], False),
        ([1], [], True),
        ([1], [outputs(1), outputs(1)], True),
        ([], [outputs(1)], True),
    ],
)
def test_answered_once(finished: list[int], effects: list[Effect], broken: bool) -> None:
    assert (invariants.answered_once(finished, effects) is not None) == broken


@pytest.mark.parametrize(("known", "broken"), [({"a": 2, "b": 2}, False), ({"a": 2, "b": 3}, True), ({"a": 0}, True)])
def test_same_epoch(known: dict[str, int], broken: bool) -> None:
    assert (invariants.same_generation(2, known) is not None) == broken


def test_only_a_ready_rank_runs() -> None:
    rank = Rank(0, 1, "rank", lockstep=True)
    assert invariants.runs_only_when_ready(rank) is None
    rank.waves.running = True
    assert invariants.runs_only_when_ready(rank) == "rank 0 runs while it is loading"
    rank.phase = Phase.READY
    assert invariants.runs_only_when_ready(rank) is None


@pytest.mark.parametrize(
    ("wave", "running", "on_its_way", "broken"),
    [
        (2, True, [], False),
        (3, False, [], False),
        (2, False, [2], False),
        (2, False, [1], True),
        (2, False, [], True),
        (1, True, [], True),
    ],
)
def test_left_out_has_it(wave: int, running: bool, on_its_way: list[int], broken: bool) -> None:
    assert (invariants.left_out_has_it(StartDPWave(2, 0), wave, running, on_its_way) is not None) == broken


@pytest.mark.parametrize(("told", "broken"), [(2, True), (3, False), (4, False)])
def test_joiner_is_told(told: int, broken: bool) -> None:
    assert (invariants.joiner_is_told(Admit(0, 1, told), 3) is not None) == broken


@pytest.mark.parametrize(
    ("ranks", "broken"),
    [
        ({"rank 0": (False, 1), "rank 1": (False, 1)}, False),
        ({"rank 0": (True, 2), "rank 1": (False, 2)}, False),
        ({"rank 0": (True, 2), "rank 1": (False, 1)}, True),
        ({"rank 0": (True, 1), "rank 1": (False, 2)}, True),
    ],
)
def test_nothing_steps_while_paused(ranks: dict[str, tuple[bool, int]], broken: bool) -> None:
    assert (invariants.nothing_steps_while_suspended(1, ranks) is not None) == broken


def test_all_agree_at_rest() -> None:
    assert invariants.agree_at_rest(2, {"rank 0": 2, "rank 1": 2}) is None
    why = invariants.agree_at_rest(2, {"rank 0": 2, "rank 1": 1})
    assert why == "all is at rest, and the waves differ: the coordinator: 2, rank 0: 2 and rank 1: 1"


@pytest.mark.parametrize(
    ("parts", "words"), [([], ""), (["a"], "a"), (["a", "b"], "a and b"), ([1, 2, 3], "1, 2 and 3")]
)
def test_join(parts: list[object], words: str) -> None:
    assert invariants.join(parts) == words


# The rules by name: one that is misspelt is refused by every machine that can leave rules out -------


@pytest.mark.parametrize("name", RULES)
def test_every_rule_can_be_left_out_and_says_what_it_is(name: str) -> None:
    assert checked({name}) == {name}
    assert RULES[name].endswith(".")
    Coordinator(2, 1, 0.1, without={name})
    Rank(0, 1, "address", without={name})


def test_none_is_left_out_by_default() -> None:
    assert checked(frozenset()) == frozenset()


def test_a_name_that_is_no_rule_is_refused_and_the_rules_are_named() -> None:
    makers = [
        checked,
        lambda names: Coordinator(2, 1, 0.1, without=names),
        lambda names: Rank(0, 1, "address", without=names),
    ]
    for make in makers:
        with pytest.raises(ValueError, match="acknowledged-wake is not a rule; rules: acknowledged-wakes"):
            make(frozenset({"acknowledged-wake"}))
