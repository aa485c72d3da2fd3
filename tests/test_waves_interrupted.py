"""Waves in real processes while the coordinator is killed again and again, and operators suspend crosswise."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest

from paceline.core.requests import ControlAction
from paceline.net.frontend import FrontendShell
from tests.fleet import Answer, Fleet, ask, fleet, frontends
from tests.pace import stretched
from tests.test_waves import DEADLINE_S, RANKS, SMALL

pytestmark = pytest.mark.slow

KILLS = 12
CALLS = 40


async def answered(answers: list[Answer]) -> None:
    async with asyncio.timeout(stretched(DEADLINE_S)):
        for answer in answers:
            await answer.done.wait()


async def kill_coordinators(made: Fleet) -> list[Answer]:
    """Each time it is killed requests are on their way, in the midst of waves and between them."""
    chance = random.Random(11)
    answers: list[Answer] = []
    async with frontends(made, 2) as clients:
        for _ in range(KILLS):
            answers += [ask(chance.choice(clients), chance.choice([1, 20, 60])) for _ in range(chance.choice([1, 4]))]
            await asyncio.sleep(chance.choice([0.0, 0.002, 0.05]))
            process = made.coordinator.proc
            assert process.pid is not None
            process.kill()
            await asyncio.to_thread(process.join)
            answers.append(ask(chance.choice(clients), 2))
            await asyncio.to_thread(made.coordinator.restart)
            await answered(answers)
        # The last coordinator learns all that the ranks know, and both front-ends hear it.
        async with asyncio.timeout(stretched(DEADLINE_S)):
            while any(client.machine.running for client in clients) or len({c.machine.wave for c in clients}) > 1:
                await asyncio.sleep(0)
    return answers


def test_a_coordinator_killed_a_dozen_times_loses_no_request_and_no_wave(tmp_path: Path) -> None:
    with fleet(tmp_path, RANKS, "paceline.engines.moe:MoeEngine", SMALL) as made:
        answers = asyncio.run(kill_coordinators(made))
        assert [answer.error for answer in answers if answer.error is not None] == []
        assert {answer.finish for answer in answers} == {"length"}
        hellos = made.hellos()
        assert {(hello.running, hello.generation) for hello in hellos} == {(False, 1)}
        assert len({hello.wave for hello in hellos}) == 1


async def call(client: FrontendShell, action: ControlAction) -> None:
    """A call ends, so or superseded; that it blocks is what must not be."""
    await client.control(action, DEADLINE_S)


async def suspend_crosswise(made: Fleet) -> list[Answer]:
    chance = random.Random(5)
    answers: list[Answer] = []
    async with frontends(made, 2) as clients:
        calls = []
        for _ in range(CALLS):
            answers += [ask(client, chance.choice([1, 30])) for client in clients]
            actions: list[ControlAction] = ["keep", "wait", "resume", "resume"]
            calls += [asyncio.create_task(call(chance.choice(clients), chance.choice(actions))) for _ in range(2)]
            await asyncio.sleep(chance.choice([0.0, 0.001, 0.02]))
        await asyncio.gather(*calls)
        await asyncio.gather(*(call(client, "resume") for client in clients))
        await answered(answers)
        assert not any(client.machine.suspension.number % 2 for client in clients)
    return answers


def test_doubled_and_crossing_calls_never_block_and_lose_nothing(tmp_path: Path) -> None:
    with fleet(tmp_path, RANKS, "paceline.engines.moe:MoeEngine", SMALL) as made:
        answers = asyncio.run(suspend_crosswise(made))
        assert [answer.error for answer in answers if answer.error is not None] == []
        assert {answer.finish for answer in answers} == {"length"}
        assert {(hello.running, hello.held) for hello in made.hellos()} == {(False, False)}
