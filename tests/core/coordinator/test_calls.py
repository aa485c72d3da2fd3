"""Calls at the coordinator: each is served once, however often it is repeated, and not before the ranks were heard."""

from __future__ import annotations

from paceline.core.coordinator.pause import Pause
from paceline.core.messages import ControlRequest
from paceline.core.requests import ControlAction
from paceline.core.transaction import ANSWERS_KEPT

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


def test_a_repeated_resume_that_was_answered_with_nothing_ends_no_later_suspension() -> None:
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


def test_a_frontend_that_is_gone_is_forgotten_and_what_it_asked_for_stays() -> None:
    desk = Desk()
    desk.ask(FIRST, 1, "keep")
    desk.ask(SECOND, 1, "keep")
    desk.pause.served.forget_frontend(FIRST)
    assert desk.number == 1
    desk.ask(SECOND, 2, "resume")
    assert desk.ask(SECOND, 1, "keep") == [(SECOND, 1, 1)]


def test_answers_that_are_kept_are_bounded() -> None:
    desk = Desk()
    for call in range(ANSWERS_KEPT + 10):
        desk.ask(FIRST, call, "keep")
    assert len(desk.pause.served._served) == ANSWERS_KEPT
    desk.ask(SECOND, 1, "resume")
    assert desk.ask(FIRST, ANSWERS_KEPT, "keep") == [(FIRST, ANSWERS_KEPT, 1)]
    assert desk.number == 2
