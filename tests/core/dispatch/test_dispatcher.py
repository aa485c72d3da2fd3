"""The coordinator's side of late binding, told anything that can be decoded."""

from __future__ import annotations

from hypothesis import given, settings, strategies as st

from paceline.core import binding, codec, messages
from paceline.core.coordinator import events as coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.dispatch.line import PATIENCE
from paceline.core.load import Load
from tests.pace import examples

GOOD, OTHER = 100, 101
LARGEST = 2**53 - 1

frontends = st.sampled_from([GOOD, OTHER])
requests = st.integers(1, 4) | st.sampled_from([0, 2**63 - 1])
counts = st.integers(0, 20) | st.sampled_from([2**31, LARGEST])
priorities = st.integers(-1, 1) | st.sampled_from([-(2**63), 2**63 - 1])
said: st.SearchStrategy[messages.FromFrontend] = st.one_of(
    st.builds(
        binding.Ask, frontends, counts, counts,
        st.lists(st.builds(binding.Descriptor, requests, counts, counts, priorities, counts)),
    ),
    st.builds(binding.Withdraw, frontends, counts, st.lists(requests)),
    st.builds(binding.ReturnShares, frontends, counts),
    st.builds(
        binding.SendNotice,
        frontends,
        st.lists(st.builds(binding.Send, st.integers(0, 2), st.integers(10, 12), counts, counts, counts, requests)),
        counts,
    ),
    st.builds(messages.FrontendLeaving, st.just(OTHER)),
    st.builds(
        lambda ranks: messages.FrontendHello(messages.PROTOCOL_VERSION, OTHER, 0, "keep", True, ranks),
        st.none() | st.just([0]),
    ),
)  # fmt: skip
steps = st.lists(st.tuples(said, st.floats(0.0, 0.3)), max_size=20)


class Told:
    """A coordinator over two ranks. What it says is decoded as front-ends decode it."""

    def __init__(self) -> None:
        self.machine = Coordinator(2, 1, 0.1, lockstep=False)
        self.view: messages.LoadView | None = None
        self.grants: list[tuple[int, int]] = []
        self.now = 0.0
        for rank in range(2):
            self.tell(
                coordinator.RankSaid(messages.RankHello(messages.PROTOCOL_VERSION, rank, 10 + rank, "ipc://x", True))
            )
            report = messages.RankReport(
                rank, 10 + rank, 1, 0, False, Load(slots=4, step_tokens=LARGEST, kv_total=LARGEST), {}
            )
            self.tell(coordinator.RankSaid(report))
        for frontend in (GOOD, OTHER):
            self.hear(messages.FrontendHello(messages.PROTOCOL_VERSION, frontend, brokered=True))

    def hear(self, message: messages.FromFrontend) -> None:
        self.tell(coordinator.FrontendSaid(codec.from_frontend().decode(codec.encode(message))))

    def tell(self, event: coordinator.Event) -> None:
        for effect in self.machine.handle(event, self.now):
            if isinstance(effect, coordinator.ToFrontends):
                message = codec.to_frontend().decode(codec.encode(effect.message))
                if isinstance(message, messages.LoadView):
                    self.view = message
                elif isinstance(message, binding.Grants):
                    self.grants += [(grant.request, grant.rank) for grant in message.grants]

    def report(self, rank: int, step: int, running: int, kv: int = 0, **taken: int) -> None:
        load = Load(0, running, 4, step_tokens=LARGEST, kv_total=100, kv_reserved=kv)
        by_identity = {int(name[1:]): number for name, number in taken.items()}
        self.tell(coordinator.RankSaid(messages.RankReport(rank, 10 + rank, step, 0, False, load, by_identity)))

    def ask(self, told: int, request: int, tokens: int = 1) -> None:
        self.hear(binding.Ask(GOOD, told, 10**6, [binding.Descriptor(request, tokens, 1)]))

    def wait(self, seconds: float) -> None:
        until = self.now + seconds
        while self.machine.deadline <= until:
            self.now = max(self.now, self.machine.deadline)
            self.tell(coordinator.Tick())
        self.now = until


@given(steps)
@settings(max_examples=examples(150))
def test_whatever_frontends_say_what_it_says_can_be_decoded_and_it_forgets_who_has_gone(
    story: list[tuple[messages.FromFrontend, float]],
) -> None:
    told = Told()
    for message, seconds in story:
        told.hear(message)
        told.wait(seconds)
    for frontend in (GOOD, OTHER):
        told.tell(coordinator.FrontendGone(frontend))
    assert not list(told.machine.dispatcher.descriptors())
    told.hear(messages.FrontendHello(messages.PROTOCOL_VERSION, 102, brokered=True))
    told.wait(5.0)
    assert told.view is not None
    assert told.view.shares is not None
    assert [shares.frontend for shares in told.view.shares] == [102]
    assert all(credit.requests == 4 for credit in told.view.shares[0].shares)


def test_what_a_frontend_had_unacked_gives_capacity_back_when_it_goes_also_where_it_asks_for_nothing() -> None:
    told = Told()
    told.hear(messages.FrontendHello(messages.PROTOCOL_VERSION, OTHER, brokered=False))
    for rank in range(2):
        told.hear(binding.SendNotice(OTHER, [binding.Send(rank, 10 + rank, number, 1, 1) for number in range(1, 5)], 4))
    told.ask(1, 1)
    assert told.grants == []
    told.tell(coordinator.FrontendGone(OTHER))
    assert [request for request, _ in told.grants] == [1]


def test_a_grant_that_its_rank_reports_before_its_frontend_tells_of_it_is_counted_twice_no_longer_than_that() -> None:
    told = Told()
    told.report(1, 2, 4)
    told.report(0, 2, 4)
    told.ask(1, 1)
    told.report(0, 3, 3)
    assert told.grants == [(1, 0)]
    told.ask(2, 2)
    told.report(0, 4, 3, f100=1)
    assert told.grants == [(1, 0)]
    told.hear(binding.SendNotice(GOOD, [binding.Send(0, 10, 1, 1, 1, 1)], 1))
    assert told.grants == [(1, 0), (2, 0)]


def test_a_rank_that_is_kept_for_somebody_is_looked_at_when_it_reports() -> None:
    told = Told()
    told.report(1, 2, 4, kv=100)
    told.report(0, 2, 1, kv=60)
    told.ask(1, 1, tokens=90)
    passing = range(1, PATIENCE + 1)
    for turn in passing:
        told.ask(1 + turn, 1 + turn)
        assert told.grants[-1] == (1 + turn, 0)
        told.hear(binding.SendNotice(GOOD, [binding.Send(0, 10, turn, 1, 1, 1 + turn)], turn))
        told.report(0, 2 + turn, 1, kv=60, f100=turn)
    last = passing[-1]
    told.ask(2 + last, 2 + last)
    assert len(told.grants) == len(passing)
    told.report(0, 3 + last, 0, f100=last)
    assert told.grants[len(passing)] == (1, 0)
