"""A model of ranks in lockstep, for comparing policies: each step lasts as long as its slowest rank takes.

With the prefill quota the ranks agree after every step, from costs that they know exactly.
"""

from __future__ import annotations

import random
from collections import deque

from msgspec import Struct

from paceline.core.rank.prefill_quota import Outcome as Quota, Part, decide, reduced
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.policy import Policy, Query

STEP_S = 0.004
TOKEN_S = 0.00004
SEQUENCE_S = 0.0001
BUDGET = 512
SLOTS = 48


class Arrival(Struct):
    """A request of the model: when (seconds), prompt and answer (tokens)."""

    at: float
    prompt: int
    answer: int


class Running(Struct):
    arrival: Arrival
    prefill: int
    left: int


class Outcome(Struct):
    """`seconds` until all was done, mean and 99th percentile of the time to a first token, mean of the steps.

    `step_s`: weighted by the answers that wait for their next token meanwhile.
    """

    seconds: float
    mean_first_s: float
    p99_first_s: float
    step_s: float


class ModelRank:
    """One rank: what waits, and what runs."""

    def __init__(self, rank: int) -> None:
        self.waiting: deque[Arrival] = deque()
        self.running: list[Running] = []
        self.candidate = Candidate(rank, 0, 0, 0, 0, 0, 0)

    def admit(self) -> None:
        while self.waiting and len(self.running) < SLOTS:
            arrival = self.waiting.popleft()
            self.running.append(Running(arrival, arrival.prompt, arrival.answer))

    @property
    def decoding(self) -> int:
        """Requests that are past their prompts."""
        return sum(not one.prefill for one in self.running)

    def part(self, waited: int) -> Part:
        """What this rank puts into an agreement."""
        free = SLOTS - len(self.running)
        pending = sum(one.prefill for one in self.running) + sum(one.prompt for one in list(self.waiting)[:free])
        decode_s = STEP_S + self.decoding * SEQUENCE_S
        return Part(BUDGET, pending, self.decoding, SLOTS, round(decode_s * 1e9), round(TOKEN_S * 1e9), waited)

    def step(self, quota: int | None = None) -> tuple[float, list[Arrival]]:
        """Seconds that this rank needs, and the requests that have their first token after it."""
        decoding = [one for one in self.running if not one.prefill]
        budget, firsts = BUDGET - len(decoding), []
        budget = budget if quota is None else min(budget, quota)
        used = 0
        for one in self.running:
            if one.prefill and budget > used:
                part = min(one.prefill, budget - used)
                one.prefill -= part
                used += part
                if not one.prefill:
                    one.left -= 1
                    firsts.append(one.arrival)
        for one in decoding:
            one.left -= 1
        done = [one for one in self.running if not one.prefill and one.left <= 0]
        self.candidate.finished += len(done)
        self.running = [one for one in self.running if one.prefill or one.left > 0]
        return used * TOKEN_S + len(decoding) * SEQUENCE_S, firsts

    def report(self) -> None:
        """Bring the candidate up to date."""
        self.candidate.requests = self.candidate.in_flight = len(self.waiting) + len(self.running)
        self.candidate.prefill_tokens = sum(one.prompt for one in self.waiting) + sum(
            one.prefill for one in self.running
        )


def arrivals(seed: int, count: int, a_second: float, long_share: float) -> list[Arrival]:
    """Poisson arrivals; `long_share` of the prompts are long (about 4,000 tokens), the others short (about 200)."""
    chance, now, made = random.Random(seed), 0.0, []
    for _ in range(count):
        now += chance.expovariate(a_second)
        mean = 4000 if chance.random() < long_share else 200
        made.append(Arrival(now, 1 + int(chance.expovariate(1 / mean)), 1 + int(chance.expovariate(1 / 150))))
    return made


def run(policy: Policy, coming: list[Arrival], ranks: int, with_quota: bool = False) -> Outcome:
    """Serve all arrivals over `ranks` ranks that step together; the policy sees every step's loads at once."""
    group = [ModelRank(rank) for rank in range(ranks)]
    candidates = Candidates(rank.candidate for rank in group)
    queue, now, firsts = deque(coming), 0.0, []
    quota, waits_s, waiting = Quota(), 0.0, 0
    while queue or any(rank.running or rank.waiting for rank in group):
        if not any(rank.running or rank.waiting for rank in group):
            now = max(now, queue[0].at)
        while queue and queue[0].at <= now:
            arrival = queue.popleft()
            chosen = group[policy.choose(candidates, Query(arrival.prompt))]
            chosen.waiting.append(arrival)
            chosen.report()
            candidates.changed(chosen.candidate.rank)
        for rank in group:
            rank.admit()
        writing = sum(rank.decoding for rank in group)
        steps = [rank.step(quota.quota) for rank in group]
        length_s = STEP_S + max(seconds for seconds, _ in steps)
        now, waits_s, waiting = now + length_s, waits_s + writing * length_s, waiting + writing
        if with_quota:
            quota = decide(reduced(rank.part(quota.waited).packed() for rank in group))
        firsts += [now - arrival.at for _, having in steps for arrival in having]
        for rank in group:
            rank.report()
            candidates.changed(rank.candidate.rank)
    firsts.sort()
    return Outcome(now, sum(firsts) / len(firsts), firsts[len(firsts) * 99 // 100], waits_s / waiting)
