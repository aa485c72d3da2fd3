"""Progress where there is no terminal: a line each ten seconds, with an estimate."""

from __future__ import annotations

import pytest

from paceline.console import EVERY_S, Estimate, status_line


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_how_long_it_will_go_on() -> None:
    clock = Clock()
    estimate = Estimate(clock)
    clock.now += 30.0
    assert estimate.told("10 of 40", 0.25) == "10 of 40, 25%; about 1 min 30 s left"
    assert estimate.told("a", 0.001) == "a, 0%; about 8 h 19 min left"
    assert estimate.told("10 states", 0.5, growing=True) == "10 states; more than 30 s left"
    assert estimate.told("5 states", None) == "5 states; for 30 s so far"
    assert estimate.told("nothing yet", 0.0) == "nothing yet; for 30 s so far"


def test_without_a_terminal_there_is_a_line_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    clock = Clock()
    with status_line(clock) as say:
        for second in range(25):
            clock.now = 100.0 + second
            say(f"{second} done", second / 100)
    assert EVERY_S == 10.0
    assert capsys.readouterr().err.splitlines() == [
        "10 done, 10%; about 1 min 30 s left",
        "20 done, 20%; about 1 min 20 s left",
    ]
