"""`paceline top` on a real deployment, by Textual's own pilot: what it shows, pausing, a server that comes again."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from paceline.control import Control
from paceline.top.cli import top_app
from tests.pace import Deadline
from tests.serving import Deployment, deployment

pytest.importorskip("textual", reason="Textual is not there (pip install 'textual>=8,<9')")

from paceline.top.terminal import Top

SIZE = (80, 24)


@pytest.fixture(scope="module")
def server() -> Iterator[Deployment]:
    with deployment("--engine", "timed", "-dp", "2", "-asc", "1", "--engine-option", "step_ms=5") as running:
        yield running


def screen(app: Top) -> str:
    """What is on it, line by line."""
    text = "\n".join(strip.text for strip in app.screen._compositor.render_strips())
    return text.replace("\N{NO-BREAK SPACE}", " ")


async def shown(app: Top, pilot: Any, *texts: str, without: str | None = None) -> str:
    deadline = Deadline(20.0)
    while not all(text in screen(app) for text in texts) or (without is not None and without in screen(app)):
        assert not deadline.over(), f"{texts} are not shown:\n{screen(app)}"
        await pilot.pause(0.05)
    return screen(app)


def run(control: Control, test: Callable[[Top, Any], Awaitable[None]]) -> None:
    async def started() -> None:
        app = Top(control)
        async with app.run_test(size=SIZE) as pilot:
            await test(app, pilot)

    asyncio.run(started())


@pytest.mark.slow
def test_it_shows_the_deployment_and_pauses_it_once_it_has_said_what_will_happen(server: Deployment) -> None:
    async def pauses(app: Top, pilot: Any) -> None:
        found = await shown(app, pilot, "all ranks serve", "rank 1 is ready", "2 of 2 ranks", "front-end 0:")
        assert "idle" in found
        await pilot.press("p")
        await shown(app, pilot, "Pause the deployment (keep)", "All ranks stop after the step they are in", "y: do it")
        await pilot.press("m")
        await shown(app, pilot, "Pause the deployment (wait)", "are finished first")
        await pilot.press("escape")
        await pilot.press("p", "y")
        await shown(app, pilot, "paused", "the deployment is asked to pause")
        assert server.http.get("/is_paused").json()["is_paused"]
        await pilot.press("r")
        await shown(app, pilot, "Resume the deployment", "All ranks go on at once")
        await pilot.press("n")
        await pilot.press("r", "y")
        await shown(app, pilot, "all ranks serve", "the deployment goes on")
        await pilot.press("q")

    run(Control(server.url), pauses)


@pytest.mark.slow
def test_it_goes_on_with_the_server_that_has_come_again_and_shows_a_lost_rank(server: Deployment) -> None:
    async def watches(app: Top, pilot: Any) -> None:
        await shown(app, pilot, "all ranks serve")
        os.kill(server.pid_of("front-end 0"), signal.SIGKILL)
        await shown(app, pilot, "trying again")
        # What was last stands there until then.
        await shown(app, pilot, "all ranks serve", without="trying again")
        os.kill(server.pid_of("rank 1"), signal.SIGKILL)
        await shown(app, pilot, "rank 1 is gone")
        await shown(app, pilot, "rank 1 is back", "all ranks serve")

    run(Control(server.url), watches)


def many(ranks: int) -> dict[str, Any]:
    """What a server of so many ranks says, in lockstep, one of them gone."""
    return {
        "at": 1e9, "model": "a-model", "lockstep": True, "queued": 7, "waiting": 9, "wave": 3, "running": True,
        "ranks": [
            [rank, "m" if rank == 40 else "d", 16, 2, 16, 0, 0.5, 0.25, 1234.5, 40.0, 0.0] for rank in range(ranks)
        ],
        "pause": {"number": 0, "waiting_for": []}, "scaling": None, "stalls": [], "moved": 1,
        "coordinator": {"id": "0", "lives": 2, "since": 1e9},
        "front_ends": [{"index": index, "in_flight": 5, "lag_ms": 0.1, "rate": 10.0} for index in range(4)],
        "words": [{"at": 1e9, "text": "rank 40 is gone", "urgent": True}],
    }  # fmt: skip


def test_64_ranks_are_scrolled_through_in_80_columns_and_24_lines() -> None:
    async def scrolls(app: Top, pilot: Any) -> None:
        app.post_message(Top.Pushed(many(64)))
        first = await shown(app, pilot, "rank 40 is gone", "63 of 64 ranks", "wave 3 runs", "2 lives", "trying again")
        lanes = [line for line in first.splitlines() if "decode" in line]
        assert len(lanes) >= 8
        assert all(line.rstrip().rstrip("▁▂▃▄▅▆▇█").rstrip().endswith("40.0") for line in lanes), "nothing is cut off"
        await pilot.press("end")
        last = await shown(app, pilot, "  63 decode")
        assert "   0 decode" not in last
        await pilot.press("home")
        await shown(app, pilot, "   0 decode")

    # Nobody is there: what is shown is what the test says.
    run(Control("http://127.0.0.1:9"), scrolls)


def test_without_textual_it_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "textual", None)
    answer = CliRunner().invoke(top_app, [])
    assert answer.exit_code == 1
    assert answer.stderr == "paceline: error: `paceline top` needs Textual: pip install 'textual>=8,<9'\n"


def test_without_a_terminal_it_says_what_to_use() -> None:
    answer = CliRunner().invoke(top_app, [])
    assert answer.exit_code == 1
    assert "loads --watch" in answer.stderr
