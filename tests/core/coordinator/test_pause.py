"""The coordinator's part in a pause: numbers, acknowledgements, release, repeats; each call is served once."""

from __future__ import annotations

from hypothesis import given, strategies as st

from paceline.core.coordinator.pause import Pause
from paceline.core.messages import ControlRequest, Suspension, SuspensionState
from paceline.core.requests import ControlAction
from paceline.core.retry import LONGEST_S

RANKS = (0, 1)


def ready() -> Pause:
    group = Pause()
    for rank in RANKS:
        say(group, rank, 0, False)
    return group


def say(group: Pause, rank: int, number: int, held: bool, now: float = 0.0) -> SuspensionState:
    group.heard(rank, number, "keep", held, now)
    group.advance(RANKS, now)
    return group.state(RANKS)


def suspended() -> Pause:
    group = ready()
    group.ask("keep", 0.0)
    for rank in RANKS:
        say(group, rank, 1, True)
    assert group.state(RANKS).settled
    return group


def test_a_pause_is_settled_when_each_rank_has_said_that_it_holds_it() -> None:
    group = ready()
    assert group.ask("wait", 0.0) == 1
    assert group.message(0.0) == Suspension(1, "wait", False)
    assert group.state(RANKS) == SuspensionState(1, "wait", False, [0, 1])
    assert say(group, 0, 1, False).waiting_for == [0, 1]
    assert say(group, 0, 1, True).waiting_for == [1]
    assert say(group, 1, 1, True) == SuspensionState(1, "wait", True, [])
    assert group.due is None


def test_a_rank_that_knows_the_resumption_is_not_waited_for() -> None:
    group = suspended()
    group.ask("resume", 0.0)
    assert say(group, 0, 2, True).waiting_for == [1], "it is held because rank 1 has not answered"


def test_another_mode_is_another_pause() -> None:
    group = suspended()
    assert group.ask("abort", 0.0) == 3
    assert group.state(RANKS) == SuspensionState(3, "abort", False, [0, 1])


def test_the_next_pause_may_come_before_the_release() -> None:
    group = suspended()
    group.ask("resume", 0.0)
    say(group, 0, 2, True)
    assert group.ask("keep", 0.0) == 3
    say(group, 1, 2, True)
    assert group.told() == Suspension(3, "keep", False)
    for rank in RANKS:
        say(group, rank, 3, True)
    assert group.state(RANKS).settled


def test_what_was_said_of_an_older_number_does_not_count() -> None:
    group = suspended()
    group.ask("resume", 0.0)
    group.ask("keep", 0.0)
    assert say(group, 0, 1, True).waiting_for == [0, 1]


def test_a_wake_while_nothing_is_paused_changes_nothing() -> None:
    group = ready()
    group.woke(0.0)
    assert group.told().number == 0


def test_a_rank_that_should_be_there_and_has_said_nothing_is_waited_for() -> None:
    group = ready()
    group.ask("keep", 0.0)
    say(group, 0, 1, True)
    group.forget(1)
    group.advance(RANKS, 0.0)
    assert group.state(RANKS).waiting_for == [1]
    assert group.state([0]).settled
    assert group.due is None, "nobody is there who lacks it; who joins is told as it joins"


def test_a_rank_that_says_it_is_not_held_any_more_is_told_again() -> None:
    group = suspended()
    say(group, 1, 1, False, now=7.0)
    assert group.due == 7.0
    assert group.state(RANKS).waiting_for == [1]


def test_without_its_rule_any_acknowledgement_counts() -> None:
    group = Pause(without={"suspension-number"})
    for rank in RANKS:
        say(group, rank, 1, True)
    group.ask("resume", 0.0)
    group.ask("keep", 0.0)
    assert group.state(RANKS).settled


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.sampled_from(["keep", "wait", "abort", "resume"])),
            st.tuples(st.just("say"), st.tuples(st.sampled_from(RANKS), st.integers(-2, 0), st.booleans())),
            st.tuples(st.just("woke"), st.none()),
        ),
        max_size=20,
    )
)
def test_whatever_happens_it_settles_once_the_ranks_obey(steps: list[tuple[str, object]]) -> None:
    group, number = ready(), 0
    for what, value in steps:
        if what == "ask":
            group.ask(value, 0.0)  # type: ignore[arg-type]
        elif what == "woke":
            group.woke(0.0)
        else:
            rank, behind, held = value  # type: ignore[misc]
            say(group, rank, max(0, group.told().number + behind), held)
        group.advance(RANKS, 0.0)
        assert group.told().number >= number
        number = group.told().number
    now = 100.0
    while group.due is not None:
        now += LONGEST_S
        told = group.message(now)
        assert told is not None
        for rank in RANKS:
            say(group, rank, told.number, not told.released, now)
        assert now < 110.0
    assert group.state(RANKS).settled


# Calls at the coordinator: each is served once, however often it is repeated, and not before --------


FIRST, SECOND = 100, 200


class Desk:
    """A pause, and the calls for it."""

    def __init__(self, number: int = 0) -> None:
        self.pause = Pause()
        self.pause.known(number, "keep", 0.0)

    @property
    def number(self) -> int:
        return self.pause.number

    def ask(self, frontend: int, call: int, action: ControlAction, answered: int = 0) -> list[tuple[int, int, int]]:
        """One request, and the answers that are given at once."""
        self.pause.request(ControlRequest(frontend, call, action, answered))
        return self.serve()

    def serve(self) -> list[tuple[int, int, int]]:
        return [(one.frontend, one.call, one.number) for one in self.pause.answers(0.0)]


def test_a_call_is_answered_with_the_number_at_which_it_is_so() -> None:
    desk = Desk()
    assert desk.ask(FIRST, 1, "keep") == [(FIRST, 1, 1)]
    assert desk.ask(SECOND, 1, "resume") == [(SECOND, 1, 2)]
    assert desk.serve() == []
    assert not desk.pause.asked


def test_calls_that_wait_are_served_in_their_order() -> None:
    desk = Desk(number=4)
    for call, action in ((1, "keep"), (2, "resume"), (3, "abort")):
        desk.pause.request(ControlRequest(FIRST, call, action))  # type: ignore[arg-type]
    assert desk.serve() == [(FIRST, 1, 5), (FIRST, 2, 6), (FIRST, 3, 7)]


def test_a_repeat_gets_the_same_answer_also_after_the_contrary() -> None:
    desk = Desk()
    desk.ask(FIRST, 1, "keep")
    desk.ask(SECOND, 1, "resume")
    assert desk.ask(FIRST, 1, "keep") == [(FIRST, 1, 1)]
    assert desk.number == 2


def test_a_repeated_resume_that_was_answered_with_nothing_ends_no_later_pause() -> None:
    desk = Desk()
    assert desk.ask(FIRST, 1, "resume") == [(FIRST, 1, 0)]
    desk.ask(SECOND, 1, "keep")
    assert desk.ask(FIRST, 1, "resume") == [(FIRST, 1, 0)]
    assert desk.number == 1


def test_a_call_that_the_coordinator_before_answered_keeps_its_number() -> None:
    desk = Desk(number=2)
    assert desk.ask(FIRST, 1, "keep", answered=1) == [(FIRST, 1, 1)]
    assert desk.number == 2


def test_a_call_whose_number_nobody_knows_any_more_is_asked_anew() -> None:
    desk = Desk(number=2)
    assert desk.ask(FIRST, 1, "keep", answered=5) == [(FIRST, 1, 3)]
