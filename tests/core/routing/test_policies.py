"""Routing: a burst stays level however many front-ends share it, and whatever they have heard of it meanwhile."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter

import pytest
from hypothesis import given, settings, strategies as st

from paceline.core.coordinator import events as coordinator
from paceline.core.coordinator.events import FrontendSaid, RankSaid, Tick
from paceline.core.coordinator.machine import Coordinator
from paceline.core.frontend import events as frontend_events
from paceline.core.frontend.events import CoordinatorSaid, Placed, Submit, ToCoordinator, ToRank
from paceline.core.frontend.machine import Frontend
from paceline.core.load import REQUEST_TOKENS, Load
from paceline.core.messages import PROTOCOL_VERSION, RankHello, RankReport
from paceline.core.requests import Output, Outputs, SamplingParams
from paceline.core.routing import (
    POLICIES,
    Candidate,
    Candidates,
    LeastLoad,
    LeastRequests,
    Lockstep,
    PowerOfTwo,
    Query,
    RoundRobin,
)
from paceline.sim.outcome import Outcome
from tests.core.harness import find, one
from tests.pace import examples
from tests.sim.traces import LOCKSTEP, finished, mixed


class Burst:
    """Idle ranks, front-ends and a coordinator whose views the test hands out. Prompts are of `tokens`."""

    def __init__(self, frontends: int, ranks: int = 4, policy: str = "least-load", tokens: int = 64) -> None:
        self.now, self.steps, self.tokens = 1.0, 0, tokens
        self.machine = Coordinator(ranks, 1, 0.0, lockstep=False)
        self.frontends = [
            Frontend(100 + index, POLICIES[policy](index, frontends), relay_sends=frontends > 1)
            for index in range(frontends)
        ]
        self.quiesced: list[list[object]] = [[] for _ in self.frontends]
        self.notices: list[object] = []
        self.loads: Counter[int] = Counter()
        self.finished: Counter[int] = Counter()
        self.taken: list[Counter[int]] = [Counter() for _ in range(ranks)]
        self.sent: list[list[tuple[int, int]]] = [[] for _ in range(ranks)]
        self.requests = 0
        for rank in range(ranks):
            self._coordinator(RankSaid(RankHello(PROTOCOL_VERSION, rank, 10 + rank, "tcp://a", True)))
        self.everyone_reports()
        for index in range(frontends):
            self.hear(index)

    def submit(self, index: int) -> int:
        """One request by a front-end; returns the rank that it chose."""
        self.requests += 1
        submit = Submit(self.requests, [0] * self.tokens, SamplingParams(8))
        effects = self.frontends[index].handle(submit, self.now)
        rank = one(find(effects, Placed)).rank
        self.sent[rank].append((100 + index, one(find(effects, ToRank)).message.number))
        self.notices += [effect.message for effect in find(effects, ToCoordinator)]
        self.loads[rank] += 1
        return rank

    def finish(self, index: int, request: int, rank: int) -> None:
        done = Outputs(rank, 10 + rank, [Output(request, [1], finish_reason="stop")])
        self.frontends[index].handle(frontend_events.RankSaid(done), self.now)
        self.loads[rank] -= 1
        self.finished[rank] += 1

    def report(self, rank: int) -> None:
        """The rank takes in what was sent to it, and says so."""
        self.steps += 1
        for frontend, number in self.sent[rank]:
            self.taken[rank][frontend] = number
        load = Load(self.loads[rank], 0, 64, self.tokens * self.loads[rank], finished=self.finished[rank])
        message = RankReport(rank, 10 + rank, self.steps, 0, False, load, dict(self.taken[rank]))
        self._coordinator(RankSaid(message))

    def everyone_reports(self) -> None:
        for rank in range(len(self.sent)):
            self.report(rank)

    def relay(self, notices: int) -> None:
        """The coordinator hears of the oldest sends that it has not heard of."""
        for notice in self.notices[:notices]:
            self._coordinator(FrontendSaid(notice))
        del self.notices[:notices]

    def hear(self, index: int) -> None:
        """A front-end reads all views that are on their way to it."""
        for message in self.quiesced[index]:
            self.frontends[index].handle(CoordinatorSaid(message), self.now)
        self.quiesced[index].clear()

    def _coordinator(self, event: coordinator.Event) -> None:
        self.now += 0.0001
        for effect in [*self.machine.handle(event, self.now), *self.machine.handle(Tick(), self.now)]:
            if isinstance(effect, coordinator.ToFrontends):
                for queue in self.quiesced:
                    queue.append(effect.message)


def shares_of(total: int, frontends: int, modulo: int) -> list[tuple[int, ...]]:
    """One split of `total` over the front-ends for every combination of remainders."""
    shares = []
    for remainders in itertools.product(range(modulo), repeat=frontends):
        left = total - sum(remainders)
        if left % modulo == 0:
            rounds = left // modulo
            each = [rounds // frontends + (index < rounds % frontends) for index in range(frontends)]
            shares.append(tuple(r + modulo * n for r, n in zip(remainders, each, strict=True)))
    return shares


def level(burst: Burst, within: int = 1) -> bool:
    mean = burst.requests / len(burst.sent)
    return all(abs(burst.loads[rank] - mean) <= within for rank in range(len(burst.sent)))


# Bursts ---------------------------------------------------------------------------------------
@pytest.mark.parametrize("frontends", [1, 2, 4])
def test_a_burst_without_a_view_is_level_for_every_split(frontends: int) -> None:
    shares = shares_of(64, frontends, 4)
    assert len(shares) == {1: 1, 2: 4, 4: 64}[frontends]
    for share in shares:
        for order in ("one after another", "in turn"):
            burst = Burst(frontends)
            turns = [index for index, count in enumerate(share) for _ in range(count)]
            if order == "in turn":
                random.Random(1).shuffle(turns)
            for index in turns:
                burst.submit(index)
            assert sum(burst.loads.values()) == 64
            assert level(burst), f"{share} {order}: {sorted(burst.loads.items())}"


def burst_with_views(seed: int, frontends: int, front: str = "random") -> Burst:
    """64 requests, and between any two of them reports, relayed sends and views, as chance has it."""
    chance, burst = random.Random(seed), Burst(frontends)
    for place in range(64):
        for _ in range(chance.randrange(4)):
            match chance.randrange(4):
                case 0:
                    burst.report(chance.randrange(4))
                case 1:
                    burst.relay(chance.randrange(8))
                case _:
                    burst.hear(chance.randrange(frontends))
        burst.submit(place % frontends if front == "turns" else chance.randrange(frontends))
    return burst


@pytest.mark.parametrize("front", ["random", "turns"])
@pytest.mark.parametrize("frontends", [1, 2, 4])
def test_a_burst_with_views_in_its_midst_is_level(frontends: int, front: str) -> None:
    for seed in range(examples(100)):
        burst = burst_with_views(seed, frontends, front)
        assert level(burst), f"seed {seed}: {sorted(burst.loads.items())}"


@pytest.mark.parametrize(("seed", "frontends", "front"), [(100, 2, "random"), (880, 4, "turns")])
def test_a_burst_with_views_that_say_nothing_new_is_level(seed: int, frontends: int, front: str) -> None:
    burst = burst_with_views(seed, frontends, front)
    assert level(burst), sorted(burst.loads.items())


# One at a time --------------------------------------------------------------------------------
@pytest.mark.parametrize("heard", [True, False], ids=["with-views", "without-views"])
@pytest.mark.parametrize("policy", ["least-load", "least-requests", "round-robin"])
def test_successive_single_requests_go_round_the_ranks(policy: str, heard: bool) -> None:
    burst = Burst(1, policy=policy)
    chosen = []
    for request in range(1, 13):
        rank = burst.submit(0)
        burst.finish(0, request, rank)
        if heard:
            burst.everyone_reports()
            burst.hear(0)
        chosen.append(rank)
    assert [sorted(chosen[begin : begin + 4]) for begin in (0, 4, 8)] == [[0, 1, 2, 3]] * 3


def test_frontends_begin_at_ranks_of_their_own() -> None:
    burst = Burst(4)
    assert sorted(burst.submit(index) for index in range(4)) == [0, 1, 2, 3]


# Policies -------------------------------------------------------------------------------------
def ranks(*loads: tuple[int, int], in_flight: int = 0) -> Candidates:
    """Candidates with so many requests and prompt tokens each, numbered from 5."""
    return Candidates(
        Candidate(5 + i, requests, tokens, in_flight, 0, 0, 0) for i, (requests, tokens) in enumerate(loads)
    )


def test_a_difference_larger_than_the_slack_is_followed() -> None:
    for busy in range(4):
        loads = [(20, 2_000) if place == busy else (2, 200) for place in range(4)]
        for index in range(4):
            chosen = {LeastLoad(index, 4).choose(ranks(*loads), Query(64)) for _ in range(8)}
            assert 5 + busy not in chosen
    alone = [(20, 2_000), (20, 2_000), (1, 100), (20, 2_000)]
    assert {LeastLoad(index, 4).choose(ranks(*alone), Query(64)) for index in range(4)} == {7}


def test_a_difference_that_others_may_have_made_meanwhile_is_left_to_the_order() -> None:
    # With four front-ends one request more is nothing where all send: the others have sent as much.
    policy = LeastLoad(0, 4)
    assert policy.choose(nearly(since_view=1), Query(64)) == 5
    assert policy.choose(nearly(since_view=0), Query(64)) == 5, "a view may lack a round of before it"
    assert LeastLoad(0, 1).choose(nearly(since_view=1), Query(64)) == 6, "there are no others"


def test_where_requests_come_slowly_any_difference_is_followed() -> None:
    # To keep own requests level, as in a burst, would be blind to long prompts and long answers.
    assert LeastLoad(0, 16).choose(nearly(since_view=0), Query(64)) == 6


def nearly(since_view: int) -> Candidates:
    """One rank has a request more than the other three; this front-end has sent so many to each since the view."""
    return Candidates(Candidate(5 + place, place == 0, 64 * (place == 0), 0, since_view, 0, 0) for place in range(4))


def test_a_long_prompt_counts_for_more_than_a_short_one() -> None:
    loads = ranks((1, 30_000), (4, 400))
    assert LeastLoad().choose(loads, Query(64)) == 6
    assert LeastRequests().choose(loads, Query(64)) == 5


def test_long_prompts_are_spread_by_their_tokens() -> None:
    burst = Burst(1, ranks=2)
    burst.tokens = 8_000
    long = burst.submit(0)
    burst.tokens = 10
    # 10 + 256 each: thirty short requests weigh about as much as the long one.
    assert {burst.submit(0) for _ in range(20)} == {1 - long}
    assert long in {burst.submit(0) for _ in range(20)}


def test_what_a_frontend_has_in_flight_decides_among_equals() -> None:
    candidates = ranks((3, 100), (3, 100), (3, 100))
    candidates[0].in_flight = candidates[1].in_flight = 2
    assert LeastLoad().choose(candidates, Query(64)) == 7


def test_least_requests_counts_requests() -> None:
    assert LeastRequests(1, 2).choose(ranks((3, 0), (2, 9_000), (3, 0)), Query(1)) == 6
    candidates = ranks((2, 0), (3, 0))
    candidates[0].since_view_requests = 2
    # With another front-end about, two sends since the view are taken to be four.
    assert LeastRequests(0, 1).choose(candidates, Query(1)) == 5
    assert LeastRequests(0, 2).choose(candidates, Query(1)) == 6


def test_round_robin_goes_round_whatever_the_load() -> None:
    policy = RoundRobin(2, 4)
    assert [policy.choose(ranks((9, 9), (0, 0), (5, 5)), Query(1)) for _ in range(6)] == [7, 5, 6, 7, 5, 6]


@pytest.mark.parametrize("index", range(3))
@pytest.mark.parametrize("name", POLICIES)
@settings(max_examples=examples(50))
@given(st.lists(st.tuples(*[st.integers(0, 2**40)] * 6), min_size=1, max_size=9), st.integers(0, 2**20))
def test_every_policy_always_chooses_one_of_the_candidates(
    name: str, index: int, loads: list[tuple[int, ...]], tokens: int
) -> None:
    policy = POLICIES[name](index, 3)
    candidates = Candidates(Candidate(3 * place, *load) for place, load in enumerate(loads))
    query = Query(tokens, [7] * min(tokens, 1000), f"session {tokens}")
    # Twice: the second time some know the session or the prefix.
    for _ in range(2):
        assert policy.choose(candidates, query) in candidates.ranks


def test_what_a_choice_among_64_ranks_costs() -> None:
    # Measured and shown (`-rP`), not judged: a busy machine would fail it.
    burst = Burst(4, ranks=64)
    begin = time.perf_counter()
    for request in range(512):
        burst.submit(request % 4)
    print(f"{(time.perf_counter() - begin) / 512 * 1e6:.0f} microseconds a submission over 64 ranks")
    assert level(burst)


def idle(size: int) -> Candidates:
    return Candidates(Candidate(rank, 0, 0, 0, 0, 0, 0) for rank in range(size))


def test_draws_are_repeated_by_the_same_frontend_and_not_by_another() -> None:
    first, again, other = ([policy.choose(idle(16), Query(1)) for _ in range(50)]
                           for policy in (PowerOfTwo(1, 4), PowerOfTwo(1, 4), PowerOfTwo(2, 4)))  # fmt: skip
    assert first == again
    assert first != other
    assert len(set(first)) > 10


@pytest.mark.parametrize("size", [1, 2, 3])
def test_two_different_ranks_are_drawn(size: int) -> None:
    # The most loaded one is never the better of two, and with two ranks the other one always is.
    candidates = idle(size)
    candidates[0].requests = 5
    policy = PowerOfTwo()
    chosen = {policy.choose(candidates, Query(1)) for _ in range(200)}
    assert chosen == ({0} if size == 1 else set(range(1, size)))


def test_it_is_more_level_than_one_draw_would_be() -> None:
    candidates, policy, loads = idle(32), PowerOfTwo(), Counter[int]()
    for _ in range(3200):
        rank = policy.choose(candidates, Query(1))
        candidates[rank].requests += 1
        loads[rank] += 1
    # One draw a request leaves a rank 20 to 30 above the mean of 100.
    assert max(loads.values()) <= 105


def test_what_the_other_frontends_have_most_likely_sent_counts() -> None:
    candidates = idle(2)
    candidates[0].requests, candidates[1].requests, candidates[1].since_view_requests = 3, 2, 2
    assert {PowerOfTwo(0, 1).choose(candidates, Query(1)) for _ in range(20)} == {1}
    assert {PowerOfTwo(0, 4).choose(candidates, Query(1)) for _ in range(20)} == {0}


def test_round_robin_goes_on_as_ranks_come_and_go() -> None:
    candidates, policy = idle(3), RoundRobin()
    assert [policy.choose(candidates, Query(1)) for _ in range(4)] == [0, 1, 2, 0]
    candidates.remove(1)
    assert {policy.choose(candidates, Query(1)) for _ in range(2)} == {0, 2}


def loaded(*loads: tuple[int, int]) -> Candidates:
    return Candidates(Candidate(rank, requests, tokens, 0, 0, 0, 0) for rank, (requests, tokens) in enumerate(loads))


def work(candidate: Candidate) -> int:
    return candidate.prefill_tokens + REQUEST_TOKENS * candidate.requests


def test_the_slowest_ranks_work_grows_least() -> None:
    chance = random.Random(1)
    for _ in range(300):
        candidates = loaded(*((chance.randrange(8), chance.randrange(6_000)) for _ in range(chance.randrange(1, 12))))
        prompt = chance.choice([10, 500, 5_000])
        works = [work(candidate) for candidate in candidates]

        def grown(place: int, works: list[int] = works, prompt: int = prompt) -> int:
            return max(max(works), works[place] + REQUEST_TOKENS + prompt)

        chosen = Lockstep().choose(candidates, Query(prompt))
        assert grown(chosen) == min(map(grown, range(len(candidates))))


def test_where_the_slowest_does_not_grow_the_fewest_requests_decide() -> None:
    # All but the first stay under its 6,256; the last has the least work, but more requests.
    candidates = loaded((1, 6_000), (2, 400), (1, 400), (2, 0))
    assert Lockstep().choose(candidates, Query(100)) == 2
    assert LeastRequests().choose(candidates, Query(100)) == 0


def test_prompt_ahead_counts_by_the_step() -> None:
    assert Lockstep().choose(loaded((1, 9_000), (1, 2_000), (2, 100)), Query(100)) == 2


def test_among_equals_a_rank_that_prefills_already_is_taken() -> None:
    assert Lockstep().choose(loaded((3, 4_000), (2, 0), (2, 300), (2, 0)), Query(100)) == 2
    assert Lockstep(1, 2).choose(loaded((3, 4_000), (2, 0), (2, 300), (2, 0)), Query(100)) == 2
    # With no prefill anywhere there is nothing to align with, and front-ends begin at ranks of their own.
    assert {Lockstep(index, 4).choose(loaded(*[(2, 0)] * 4), Query(100)) for index in range(4)} == {0, 1, 2, 3}


def test_a_prompt_that_fits_under_no_rank_goes_to_the_least_loaded() -> None:
    # 1,012, 1,156, 868 and 1,300 of work: the fewest requests and the fewest tokens are elsewhere.
    assert Lockstep().choose(loaded((2, 500), (1, 900), (3, 100), (0, 1_300)), Query(9_000)) == 2
    assert Lockstep().choose(loaded((2, 500), (1, 600), (3, 100), (4, 0)), Query(9_000)) == 1


@pytest.mark.slow
@pytest.mark.parametrize(
    ("a_second", "long_share", "sooner"),
    [(1e6, 0.5, 0.99), (1e6, 0.0, 1.01), (110.0, 0.1, 1.01)],
    ids=["backlog-long", "backlog-short", "busy"],
)
def test_it_serves_lockstep_ranks_no_worse_than_least_load(a_second: float, long_share: float, sooner: float) -> None:
    """The whole is done within `sooner` of least-load's time, and first tokens come within 3% of its median."""

    def outcomes(routing: str) -> list[Outcome]:
        traces = [mixed(seed, 1_000, a_second, long_share) for seed in range(3)]
        shared = {"ranks": 8, "lockstep": True, "quota": False, "bind": "arrival", "engine": LOCKSTEP}
        return [finished(trace, routing=routing, **shared).outcome for trace in traces]

    ours, plain = outcomes("lockstep"), outcomes("least-load")
    seconds = [sum(one.duration_s for one in each) / 3 for each in (ours, plain)]
    firsts = [sum(one.ttft_p50_ms for one in each) / 3 for each in (ours, plain)]
    print(
        f"all done {seconds[0]:.2f} s against {seconds[1]:.2f}; first token {firsts[0]:.0f} ms against {firsts[1]:.0f}"
    )
    assert seconds[0] <= sooner * seconds[1]
    assert firsts[0] <= 1.03 * firsts[1]
