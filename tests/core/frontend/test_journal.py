"""What a front-end tells an operator: of moved requests, overload, another coordinator."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from paceline.core.frontend.events import Refuse
from paceline.core.frontend.journal import QUIET_S, Journal
from paceline.core.frontend.machine import NOBODY, Frontend

OVERLOADED = Refuse(1, "overloaded", "4 requests are waiting already")


def journal() -> tuple[Any, Journal]:
    machine = SimpleNamespace(moved=0, coordinator=NOBODY)
    return machine, Journal(cast(Frontend, machine))


def test_requests_that_moved_are_told_of_once_with_their_rank() -> None:
    machine, written = journal()
    assert written.look(0.0) == []
    machine.moved = 3
    (said,) = written.look(1.0, 2)
    assert (said.text, said.urgent, said.rank) == ("requests that had lost rank 2 go on at others: 3", True, 2)
    assert written.look(2.0) == []


def test_the_first_coordinator_is_no_news() -> None:
    machine, written = journal()
    machine.coordinator = 7
    assert written.look(0.0) == []
    machine.coordinator = 9
    assert [note.text for note in written.look(1.0)] == ["another coordinator is there"]


def test_overload_begins_with_a_refusal_and_ends_when_there_was_none_for_a_while() -> None:
    _, written = journal()
    assert [note.text for note in written.refused(OVERLOADED, 10.0)] == [
        "overload: requests are refused (4 requests are waiting already)"
    ]
    assert written.refused(OVERLOADED, 12.0) == []
    assert written.deadline == 12.0 + QUIET_S
    assert written.look(12.0 + QUIET_S / 2) == []
    (over,) = written.look(12.0 + QUIET_S)
    assert over.text == "overload: over after 2.0 s, requests refused: 2"
    assert written.deadline == float("inf")


def test_a_clients_own_mistake_is_nothing_for_the_log() -> None:
    _, written = journal()
    assert written.refused(Refuse(1, "unknown-rank", "rank 9 is not served here"), 0.0) == []
    assert written.refused(Refuse(1, "rank-lost", "rank 1 ended"), 0.0)[0].urgent
