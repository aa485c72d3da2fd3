"""Waves in real processes: a mixture of experts over four ranks, and requests aimed at the moment of the pause."""

from __future__ import annotations

import asyncio
import contextlib
import random
from pathlib import Path

import pytest

from paceline.net.frontend import FrontendShell
from tests.fleet import Answer, Fleet, Watching, ask, cpu_used_s, fleet, frontends
from tests.pace import stretched
from tests.serving import wait_until

pytestmark = pytest.mark.slow

RANKS = 4
WAVES = 300
SMALL = {"layers": "1", "d_model": "16", "heads": "2", "experts": "4", "expert_hidden": "16"}
DEADLINE_S = 20.0


class Waves:
    """Sends until `WAVES` waves have ended: each time the ranks pause, in one of several ways and after a gap."""

    def __init__(self, clients: list[FrontendShell], seed: int) -> None:
        self.clients = clients
        self.random = random.Random(seed)
        self.answers: list[Answer] = []
        self.pauses: asyncio.Queue[int] = asyncio.Queue()
        machine = clients[0].machine
        assert isinstance(machine, Watching)
        self.machine = machine
        self.machine.on_change = self._changed
        self.last_excluded = 0

    def _changed(self, wave: int, running: bool) -> None:
        if not running:
            if wave % 4 == 0:
                # In the very moment in which the pause is announced, by the front-end that hears of it.
                self._send(self.clients[0], self.random.randrange(RANKS))
            self.pauses.put_nowait(wave)

    def _send(self, client: FrontendShell, rank: int | None) -> None:
        self.answers.append(ask(client, self.random.choice([1, 2, 5, 16, 17]), rank))

    async def run(self) -> None:
        """Until the last wave has ended and every request is answered."""
        self._send(self.clients[1], 0)
        while self.machine.wave < WAVES:
            async with asyncio.timeout(stretched(DEADLINE_S)):
                await self.pauses.get()
            await asyncio.sleep(self.random.choice([0.0, 0.0, 0.001, 0.003, 0.02]))
            self._aim(self.random.choice(["all at once", "left out", "anywhere", "both front-ends"]))
        async with asyncio.timeout(stretched(DEADLINE_S)):
            for answer in self.answers:
                await answer.done.wait()

    def _aim(self, how: str) -> None:
        rank = self.random.randrange(RANKS)
        match how:
            case "all at once":
                for each in range(RANKS):
                    self._send(self.random.choice(self.clients), each)
            case "left out":
                # The first's notice leaves this rank out of the wake; the second request goes to it too.
                self._send(self.clients[0], rank)
                self._send(self.clients[1], rank)
            case "both front-ends":
                for client in self.clients:
                    self._send(client, None)
            case _:
                self._send(self.random.choice(self.clients), rank)


async def run_waves(made: Fleet) -> tuple[int, list[Answer]]:
    async with frontends(made, 2) as clients:
        waves = Waves(clients, seed=7)
        await waves.run()
        # All rest when the last wave has been announced to both.
        async with asyncio.timeout(stretched(DEADLINE_S)):
            while any(client.machine.running for client in clients) or len({c.machine.wave for c in clients}) > 1:
                # The queue tells of what the first hears; the other one may hear it a moment later.
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(waves.pauses.get(), 0.05)
        return clients[0].machine.wave, waves.answers


def test_300_waves_with_requests_aimed_at_the_pause(tmp_path: Path) -> None:
    """Every request finishes, all parties agree on the wave, and nobody uses the CPU at rest."""
    with fleet(tmp_path, RANKS, "paceline.engines.moe:MoeEngine", SMALL) as made:
        wave, answers = asyncio.run(run_waves(made))
        assert wave >= WAVES
        assert [answer.error for answer in answers if answer.error is not None] == []
        assert {answer.finish for answer in answers} == {"length"}
        assert all(process.is_alive() for process in made.ranks)
        pids = [process.pid for process in made.ranks]
        wait_until(lambda: cpu_used_s(pids, 1.0) <= 0.05, "nobody uses the CPU at rest")
        hellos = made.hellos()
        assert [(hello.wave, hello.running, hello.generation) for hello in hellos] == [(wave, False, 1)] * RANKS


async def kill_and_start_again(made: Fleet) -> tuple[Answer, Answer, Answer]:
    async with frontends(made, 1) as (client,):
        kept, lost = ask(client, 300, rank=0), ask(client, 300, rank=2)
        async with asyncio.timeout(stretched(DEADLINE_S)):
            while not (kept.tokens and lost.tokens):
                await asyncio.sleep(0)
        made.ranks[2].kill()
        made.start_rank(2)
        async with asyncio.timeout(stretched(DEADLINE_S)):
            await kept.done.wait()
            await lost.done.wait()
            while len(client.machine.ready_ranks()) < RANKS:
                await client.wait_changed()
        again = ask(client, 20, rank=2)
        async with asyncio.timeout(stretched(DEADLINE_S)):
            await again.done.wait()
        return kept, lost, again


def test_the_group_is_formed_anew_with_a_killed_rank_s_next_life(tmp_path: Path) -> None:
    """The survivors go on with their requests, token for token, and the new life serves."""
    with fleet(tmp_path, RANKS, "paceline.engines.moe:MoeEngine", SMALL) as made:
        kept, lost, again = asyncio.run(kill_and_start_again(made))
        assert (kept.finish, len(kept.tokens)) == ("length", 300)
        assert "rank 2 ended" in str(lost.error)
        assert (again.finish, again.tokens) == ("length", kept.tokens[:20])
        (generation,) = {hello.generation for hello in made.hellos()}
        assert generation > 1
