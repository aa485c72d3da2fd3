"""What choosing a rank costs, by policy and number of ranks: `python -m bench.routing_cost`.

Between two choices some ranks change, as they do in a front-end: the chosen one has one request more, and two others
finish one. Taking that in is part of what is timed. `whole view` is what a front-end pays once, as a view with every
rank changed is taken in. `reference` looks at every rank for every choice, as least-load did before; its candidates
are made already. Microseconds, the least of five rounds.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from collections.abc import Callable

from tests.core import routing_reference

from paceline.core.routing import POLICIES
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.policy import Policy, Query

GOALS_US = {64: 20, 1024: 60}
ROUNDS = 5
CHOICES = 400
PROMPTS = 40
FRONTEND = (1, 4)


def candidates_of(size: int, seed: int) -> Candidates:
    chance = random.Random(seed)
    return Candidates(
        Candidate(
            rank, chance.randrange(10, 24), chance.randrange(6_000), chance.randrange(6), chance.randrange(2),
            chance.randrange(400), chance.randrange(100),
        )
        for rank in range(size)
    )  # fmt: skip


def queries(prompt_tokens: int) -> list[Query]:
    """Prompts of which several share a beginning, each with a session."""
    chance = random.Random(7)
    beginnings = [[chance.randrange(50_000) for _ in range(prompt_tokens // 2)] for _ in range(5)]
    made = []
    for number in range(PROMPTS):
        rest = [chance.randrange(50_000) for _ in range(prompt_tokens - prompt_tokens // 2)]
        made.append(Query(prompt_tokens, chance.choice(beginnings) + rest, f"session-{number}"))
    return made


def steady(policy: Policy, size: int, prompt_tokens: int) -> tuple[float, float]:
    """Mean and 99th percentile of a choice, with what changed since the last one, in microseconds."""
    chance = random.Random(3)
    candidates, asked = candidates_of(size, 1), queries(prompt_tokens)
    best = (float("inf"), float("inf"))
    for _ in range(ROUNDS):
        times = []
        for number in range(CHOICES):
            done = [candidates[chance.randrange(size)] for _ in range(2)]
            for candidate in done:
                candidate.in_flight, candidate.requests = max(0, candidate.in_flight - 1), candidate.requests - 1
                candidate.finished += 1
            begin = time.perf_counter()
            for candidate in done:
                candidates.changed(candidate.rank)
            rank = policy.choose(candidates, asked[number % PROMPTS])
            times.append(time.perf_counter() - begin)
            place = candidates.place(rank)
            assert place is not None
            chosen = candidates[place]
            chosen.requests, chosen.in_flight = chosen.requests + 2, chosen.in_flight + 2
            candidates.changed(rank)
        best = min(best, (statistics.mean(times), sorted(times)[CHOICES * 99 // 100]))
    return best[0] * 1e6, best[1] * 1e6


def whole_view(policy: Policy, size: int) -> float:
    candidates, query = candidates_of(size, 1), queries(64)[0]
    policy.choose(candidates, query)
    best = float("inf")
    for number in range(ROUNDS):
        for candidate, other in zip(candidates, candidates_of(size, 2 + number), strict=True):
            candidate.requests, candidate.prefill_tokens = other.requests, other.prefill_tokens
        begin = time.perf_counter()
        for candidate in candidates:
            candidates.changed(candidate.rank)
        candidates.settle()
        best = min(best, time.perf_counter() - begin)
    return best * 1e6


def plain(name: str, size: int) -> float | None:
    classes = {"least-load": routing_reference.LeastLoad, "least-requests": routing_reference.LeastRequests}
    if name not in classes:
        return None
    policy, candidates = classes[name](*FRONTEND), list(candidates_of(size, 1))
    return least(lambda: policy.choose(candidates, 512), 40) * 1e6


def least(call: Callable[[], object], times: int) -> float:
    best = float("inf")
    for _ in range(ROUNDS):
        begin = time.perf_counter()
        for _ in range(times):
            call()
        best = min(best, (time.perf_counter() - begin) / times)
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, nargs="*", default=list(GOALS_US))
    parser.add_argument("--prompt-tokens", type=int, default=512)
    given = parser.parse_args()
    print(f"| ranks | policy | choose, us | p99 | goal | whole view | reference | x (prompts of {given.prompt_tokens})")
    print("|--:|---|--:|--:|--:|--:|--:|--:|")
    for size in given.ranks:
        for name, policy_class in POLICIES.items():
            mean, high = steady(policy_class(*FRONTEND), size, given.prompt_tokens)
            view, other = whole_view(policy_class(*FRONTEND), size), plain(name, size)
            compared = f"{other:.1f} | {other / mean:.1f}" if other else " | "
            print(f"| {size} | {name} | {mean:.1f} | {high:.1f} | {GOALS_US.get(size, '')} | {view:.0f} | {compared} |")


if __name__ == "__main__":
    main()
