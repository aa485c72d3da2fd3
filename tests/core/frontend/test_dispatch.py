"""The policy always sees what the front-end knows, and a client that asks is told what that was."""

from __future__ import annotations

import random
from typing import Any

import pytest

from paceline.core.binding import Grant, Grants, Shares
from paceline.core.frontend import events as frontend_events
from paceline.core.frontend.events import Abandon, CoordinatorSaid, Placed, Refuse, Submit
from paceline.core.frontend.machine import Frontend
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, LoadView, Member, Members, RankView
from paceline.core.requests import Output, Outputs, Receipt, SamplingParams
from paceline.core.routing import LeastLoad
from paceline.core.routing.candidates import Candidates
from paceline.core.routing.policy import Decision, Policy, Query
from tests.core.harness import find, one

PARAMS = SamplingParams(8)


class Watching(Policy):
    """Chooses as drawn, and holds what it sees against what the front-end says it knows."""

    frontend: Frontend

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.chance = random.Random(seed)
        self.queries: list[Query] = []

    def choose(self, candidates: Candidates, query: Query) -> int:
        self.queries.append(query)
        seen = [(one.rank, one.requests, one.prefill_tokens, one.in_flight, one.finished) for one in candidates]
        assert seen == [
            tuple(load[name] for name in ("rank", "requests", "prefill_tokens", "in_flight", "finished"))
            for load in map(with_requests, self.frontend.loads())
        ]
        ordering = candidates.ordering(in_flight)
        assert ordering.keys == [one.in_flight for one in candidates]
        return self.chance.choice(candidates.ranks)

    def reason(self) -> str:
        return "drawn"


def with_requests(load: dict[str, Any]) -> dict[str, Any]:
    return load | {"requests": load["waiting"] + load["running"]}


def in_flight(candidate: object) -> int:
    return candidate.in_flight  # type: ignore[attr-defined,no-any-return]


class World:
    """One front-end, and what the coordinator and the ranks tell it as chance has it."""

    def __init__(self, seed: int) -> None:
        self.chance = random.Random(seed)
        self.policy = Watching(seed)
        self.frontend = self.policy.frontend = Frontend(1, self.policy)
        self.lives = dict.fromkeys(range(40 if seed % 2 else 6), 0)
        self.requests: dict[int, int] = {}
        self.views = self.steps = 0
        self.members()

    def members(self) -> None:
        ended = []
        for rank in self.lives:
            if self.chance.random() < 0.3:
                ended.append((rank, 10 + self.lives[rank]))
                self.lives[rank] += 100
        members = [
            Member(rank, 10 + life, "tcp://a") for rank, life in self.lives.items() if self.chance.random() < 0.8
        ]
        self._said(Members(PROTOCOL_VERSION, 1, 0, False, members, ended=ended))

    def view(self) -> None:
        self.views, self.steps = self.views + 1, self.steps + 1
        entries = []
        for rank in self.chance.sample(sorted(self.lives), self.chance.randrange(7)):
            draw = self.chance.randrange
            load = Load(draw(5), draw(5), 4, draw(999), finished=draw(9))
            entries.append(RankView(rank, 10 + self.lives[rank], self.steps, load, {1: draw(4)}, []))
        self._said(LoadView(1, self.views, 0, False, entries, heard={1: draw(20) if entries else 0}))

    def submit(self) -> None:
        number = len(self.requests) + 1
        placed = find(self._handle(Submit(number, [1] * self.chance.randrange(50), PARAMS)), Placed)
        self.requests[number] = placed[0].rank if placed else -1

    def finish(self) -> None:
        if self.requests:
            request, rank = self.chance.choice(sorted(self.requests.items()))
            if rank >= 0:
                done = Outputs(rank, 10 + self.lives[rank], [Output(request, [1], finish_reason="stop")])
                self._handle(frontend_events.RankSaid(done))

    def abandon(self) -> None:
        if self.requests:
            self._handle(Abandon([self.chance.choice(sorted(self.requests))]))

    def _said(self, message: object) -> None:
        self._handle(CoordinatorSaid(message))  # type: ignore[arg-type]

    def _handle(self, event: frontend_events.Event) -> list[frontend_events.Effect]:
        effects = self.frontend.handle(event, 1.0)
        if self.chance.random() < 0.5:
            # Asking brings what is kept up to date, so not every time.
            return effects
        loads = [self.frontend.believed(rank) for rank in self.frontend.ready_ranks()]
        assert self.frontend.waiting() == sum(
            max(0, load.waiting - max(0, load.slots - load.running)) for load in loads
        )
        return effects


@pytest.mark.parametrize("seed", range(40))
def test_the_policy_sees_what_the_frontend_knows(seed: int) -> None:
    world = World(seed)
    for _ in range(120):
        act = world.chance.choice([world.submit] * 4 + [world.view, world.finish, world.finish, world.abandon])
        (world.members if world.chance.random() < 0.03 else act)()
    assert len(world.policy.queries) > 20


class Since(LeastLoad):
    """Keeps what it saw of the sends that no view knows."""

    def choose(self, candidates: Candidates, query: Query) -> int:
        self.seen = [(one.since_view_requests, one.since_view_tokens) for one in candidates]
        return candidates.ranks[0]


def test_the_policy_sees_which_sends_no_view_knows() -> None:
    policy = Since(0, 2)
    frontend = Frontend(1, policy, relay_sends=True)
    members = [Member(rank, 10 + rank, "tcp://a") for rank in range(2)]
    frontend.handle(CoordinatorSaid(Members(PROTOCOL_VERSION, 1, 0, False, members)), 1.0)
    for request, seen in enumerate([(0, 0), (1, 4), (2, 8)]):
        frontend.handle(Submit(request, [1] * 4, PARAMS), 1.0)
        assert policy.seen == [seen, (0, 0)]
    # The views say nothing of the ranks, only that the coordinator knows none, then two of the three sends.
    for number, heard in enumerate((0, 2), start=1):
        frontend.handle(CoordinatorSaid(LoadView(1, number, 0, False, [], heard={1: heard})), 1.0)
    frontend.handle(Submit(9, [1] * 4, PARAMS), 1.0)
    assert policy.seen == [(1, 4), (0, 0)]


def five_ranks(policy: Policy, routing: str = "") -> Frontend:
    made = Frontend(1, policy, routing=routing)
    members = [Member(rank, 10 + rank, "tcp://a") for rank in range(5)]
    made.handle(CoordinatorSaid(Members(PROTOCOL_VERSION, 1, 0, False, members)), 1.0)
    loads = [Load(3, 2, 16, 700), Load(1, 0, 16, 90), Load(0, 0, 16, 0), Load(9, 9, 16, 4000), Load(2, 0, 16, 5)]
    views = [RankView(rank, 10 + rank, 1, load, {}, []) for rank, load in enumerate(loads)]
    made.handle(CoordinatorSaid(LoadView(1, 1, 0, False, views)), 1.0)
    return made


def decision_of(frontend: Frontend, submit: Submit) -> Decision | None:
    return one(find(frontend.handle(submit, 1.0), Placed)).decision


def test_a_decision_says_what_it_was_based_on() -> None:
    frontend = five_ranks(LeastLoad(), "least-load")
    decision = decision_of(frontend, Submit(1, [1] * 30, PARAMS, explain=True))
    assert decision is not None
    assert (decision.policy, decision.rank, decision.prompt_tokens, decision.ranks) == ("least-load", 2, 30, 5)
    # What was believed before this request went there.
    assert (decision.believed.requests, decision.believed.prefill_tokens, decision.believed.in_flight) == (0, 0, 0)
    assert [(one.rank, one.requests, one.prefill_tokens) for one in decision.alternatives] == [
        (1, 1, 90), (4, 2, 5), (0, 5, 700)
    ]  # fmt: skip
    again = decision_of(frontend, Submit(2, [1] * 30, PARAMS, rank=2, explain=True))
    assert again is not None
    assert (again.policy, again.rank, again.reason) == ("named", 2, "")
    assert (again.believed.requests, again.believed.prefill_tokens, again.believed.in_flight) == (1, 30, 1)


def test_unasked_a_choice_is_told_of_without_a_look_at_the_other_ranks() -> None:
    decision = decision_of(five_ranks(LeastLoad()), Submit(1, [1], PARAMS))
    assert (decision.policy, decision.rank, decision.ranks, decision.alternatives) == ("LeastLoad", 2, 5, [])


def test_a_policy_has_its_say_and_knows_the_request() -> None:
    policy = Watching(1)
    policy.frontend = frontend = five_ranks(policy)
    submit = Submit(1, [5, 6], PARAMS, priority=3, session="a", explain=True)
    decision = decision_of(frontend, submit)
    assert decision is not None
    assert (decision.policy, decision.reason) == ("Watching", "drawn")
    assert policy.queries == [Query(2, [5, 6], "a", 3)]


class Astray(Policy):
    """Chooses a rank that is not there."""

    def choose(self, candidates: Candidates, query: Query) -> int:
        return 99


def test_a_choice_that_is_no_candidate_is_refused_and_changes_nothing() -> None:
    frontend = five_ranks(Astray())
    refusal = one(find(frontend.handle(Submit(1, [5, 6], PARAMS), 1.0), Refuse))
    assert refusal.reason == "misrouted"
    assert "99" in refusal.text
    assert frontend.in_flight() == 0


def test_what_the_queue_found_of_a_prompt_is_in_the_receipt() -> None:
    policy = LeastLoad()
    machine = Frontend(1, policy, late_binding=True)
    members = Members(PROTOCOL_VERSION, 1, 0, False, [Member(0, 10, "tcp://a"), Member(1, 11, "tcp://b")])
    machine.handle(CoordinatorSaid(members), 0.0)
    machine.handle(CoordinatorSaid(LoadView(1, 1, 0, False, [], shares=[Shares(1, 1, [])])), 0.0)
    for request, rank, life in ((1, 1, 11), (2, 0, 10)):
        machine.handle(Submit(request, [7] * 300, PARAMS), 1.0)
        grant = Grant(1, request, rank, life, receipt=Receipt(1, 256, True, 12, -1))
        (placed,) = find(machine.handle(CoordinatorSaid(Grants(1, [grant], {1: 1}, 0, False)), 1.5), Placed)
        assert placed.decision is not None
        found = placed.decision
        assert (found.home, found.prefix_tokens, found.known_by) == (1, 256, "key")
        assert (found.home_ms, found.elsewhere_ms) == (12, None)
        assert found.reason.startswith("at its home" if rank == 1 else "sooner than at its home")
