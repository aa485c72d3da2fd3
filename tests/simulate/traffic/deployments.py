"""Small runs for the tests of the traffic simulator."""

from __future__ import annotations

from random import Random
from typing import Any

from paceline.simulate.traffic.engine import EngineShape
from paceline.simulate.traffic.run import Deployment, Run
from paceline.simulate.traffic.trace import BLOCK_TOKENS, Arrival


def drawn(count: int, a_second: float, seed: int = 1, shared: bool = False) -> list[Arrival]:
    """Random requests, like a conversation trace's; `shared`: with blocks, whose beginnings are often equal."""
    chance, now, arrivals = Random(seed), 0.0, []
    for number in range(count):
        now += chance.expovariate(a_second)
        prompt, answer = 1 + int(chance.expovariate(1 / 800)), 1 + int(chance.expovariate(1 / 80))
        blocks: tuple[int, ...] = ()
        if shared:
            # One of eight conversations up to some block, then its own.
            talk, parting = chance.randrange(8), chance.randrange(1, 6)
            blocks = tuple(
                1000 * talk + place if place < parting else 100_000 * (number + 1) + place
                for place in range(-(-prompt // BLOCK_TOKENS))
            )
        arrivals.append(Arrival(now, prompt, answer, blocks))
    return arrivals


def finished(arrivals: list[Arrival], **settings: Any) -> Run:
    """A run that is over; `settings`: of the Deployment, and `slots`, `budget`, `kv_tokens` of its engines."""
    shape = {name: settings.pop(name) for name in ("slots", "budget", "kv_tokens") if name in settings}
    made = Run(Deployment(engine=EngineShape(**shape), **settings), arrivals)
    made.outcome = made.run()  # type: ignore[attr-defined]
    return made
