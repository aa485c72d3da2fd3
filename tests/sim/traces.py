"""Small traces, and runs of them."""

from __future__ import annotations

from random import Random
from typing import Any

from bench.replay import replay_of

from paceline.engines.timed import CostModel
from paceline.sim.answers import Answer
from paceline.sim.engine import BLOCK_TOKENS, EngineShape, Sequence
from paceline.sim.outcome import Outcome
from paceline.sim.replay import Replay, Setup
from paceline.sim.trace import Arrival


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


def sequence(number: int, prompt: int, answer: int, blocks: tuple[int, ...] = ()) -> Sequence:
    """A request as an engine has it, known to its rank by the same number."""
    made = Sequence(number, prompt, answer, blocks)
    made.key = number
    return made


class Done:
    """A run that is over: its figures, and what clients got by the requests' numbers."""

    def __init__(self, run: Replay) -> None:
        self.run = run
        self.outcome: Outcome = run.run()
        self.answers: dict[int, Answer] = {
            number: answer for answers in run.answers() for number, answer in sorted(answers.items())
        }

    def ranks(self) -> list[int]:
        """Where each request was served, in the order of their numbers."""
        return [self.answers[number].rank for number in sorted(self.answers)]

    def firsts(self) -> list[float]:
        """How long each waited for its first token."""
        return [self.answers[number].first - self.answers[number].asked for number in sorted(self.answers)]


def finished(arrivals: list[Arrival], **settings: Any) -> Done:
    """A run that is over; `settings`: of the Setup, and `slots`, `budget`, `kv_tokens` of its engines."""
    shape = {name: settings.pop(name) for name in ("slots", "budget", "kv_tokens") if name in settings}
    return Done(replay_of(Setup(**{"engine": EngineShape(**shape), **settings}), arrivals))


def mixed(seed: int, count: int, a_second: float, long_share: float) -> list[Arrival]:
    """Poisson arrivals; `long_share` of the prompts are long (about 4,000 tokens), the others short (about 200)."""
    chance, now, made = Random(seed), 0.0, []
    for _ in range(count):
        now += chance.expovariate(a_second)
        mean = 4000 if chance.random() < long_share else 200
        made.append(Arrival(now, 1 + int(chance.expovariate(1 / mean)), 1 + int(chance.expovariate(1 / 150))))
    return made


LOCKSTEP = EngineShape(CostModel(4.0, 0.04, 0.1), slots=48, budget=512, kv_tokens=1 << 24)
"""For comparing what serves lockstep ranks best."""
