"""A front-end's machine: what it has sent, what is in flight, and whom to wake.

    effects = front_end.handle(event, now)

The shell owns sockets and HTTP; this machine decides to whom a request goes, numbers it, tells the
coordinator where the ranks are paused, and drops what comes from a life of a rank that is over. Tokens
of a whole step pass through in one event; only endings change state here.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from paceline.protocol.frontend_calls import FrontEndCalls
from paceline.protocol.frontend_events import (
    Abandon,
    Connect,
    Connected,
    Control,
    ControlGivenUp,
    CoordinatorSaid,
    Deliver,
    Disconnect,
    Effect,
    Event,
    LinkFailed,
    Placed,
    RankSaid,
    Refuse,
    Submit,
    ToCoordinator,
    ToRank,
)
from paceline.protocol.frontend_link import RankLink
from paceline.protocol.messages import (
    PROTOCOL_VERSION,
    AbortRequests,
    AddRequest,
    ControlAnswer,
    FrontEndHello,
    Load,
    LoadView,
    Members,
    Outputs,
    Send,
    SendNotice,
    Stall,
    SuspensionState,
    WakeNotice,
)
from paceline.protocol.policy import Policy, Query
from paceline.protocol.router import Router
from paceline.protocol.stalls import describe

NOBODY = -1
"""No coordinator has been heard yet."""


class FrontEnd:
    """One life of one front-end.

    `identity`: this life's number. `policy`: routing, called `routing`. `ranks`: the ranks it balances over, None
    for all (hybrid mode: its node's; external mode: its own). `max_waiting`: requests that may wait for a slot, over
    all its ranks, None for no limit. `share_sends`: whether other front-ends balance over the same ranks
    and are told of this one's sends.
    """

    def __init__(
        self, identity: int, policy: Policy, *, ranks: frozenset[int] | None = None, max_waiting: int | None = None,
        share_sends: bool = False, lockstep: bool = False, routing: str = "",
    ) -> None:  # fmt: skip
        self.identity = identity
        self.wave = 0
        self.running = False
        self.missing: list[int] = []
        self.stalls: list[Stall] = []
        self._router = Router(policy, routing or type(policy).__name__)
        self._ranks = ranks
        self._max_waiting = max_waiting
        self._share_sends = share_sends
        self._lockstep = lockstep
        self._links: dict[int, RankLink] = {}
        self._placed: dict[int, RankLink] = {}
        # Lives whose address was none: they are not tried again with every Members.
        self._unreachable: set[tuple[int, int]] = set()
        self._coordinator = NOBODY
        self._view_number = 0
        self._void = 0
        self._told = 0
        self._calls = FrontEndCalls(identity)

    def handle(self, event: Event, now: float) -> list[Effect]:
        """Take in one event; returns what to do, in order."""
        match event:
            case RankSaid(message):
                return self._on_outputs(message)
            case Submit():
                return self._on_submit(event)
            case Abandon(requests):
                return self._on_abandon(requests)
            case CoordinatorSaid(LoadView() as view):
                return self._on_view(view)
            case CoordinatorSaid(ControlAnswer() as answer):
                return self._calls.answered(answer)
            case Control(call, action):
                return self._calls.ask(call, action)
            case ControlGivenUp(call):
                self._calls.give_up(call)
                return []
            case CoordinatorSaid(Members() as members):
                return self._on_members(members)
            case LinkFailed(rank):
                link = self._links[rank]
                self._unreachable.add((rank, link.incarnation))
                return [effect for effect in self._lose(link) if not isinstance(effect, Disconnect)]
            case Connected():
                return [self._hello()]
        raise TypeError(f"front-end: {type(event).__name__} is not an event of this machine")

    # What the machine knows ---------------------------------------------------------------------

    @property
    def suspension(self) -> SuspensionState:
        """The suspension in force, or the last one."""
        return self._calls.suspension

    def ready_ranks(self) -> list[int]:
        """The ranks that requests can go to."""
        return sorted(self._links)

    def in_flight(self) -> int:
        """Requests sent and not finished."""
        return len(self._placed)

    def believed(self, rank: int) -> Load:
        """What the front-end believes the rank has: its report plus this front-end's unreported sends."""
        return self._links[rank].believed()

    def waiting(self) -> int:
        """Requests believed to wait for a slot, over this front-end's ranks."""
        return self._router.waiting()

    def loads(self) -> list[dict[str, object]]:
        """Every rank's believed load, by the names of `Load`, and what is this front-end's own of it."""
        return [
            {"rank": rank, **msgspec.structs.asdict(link.believed()), "in_flight": len(link.in_flight)}
            for rank, link in sorted(self._links.items())
        ]

    def statistics(self) -> dict[str, object]:
        """For `/health`, metrics and tests."""
        return {
            "wave": self.wave,
            "running": self.running,
            "ready": self.ready_ranks(),
            "missing": self.missing,
            "stalls": [describe(stall) for stall in self.stalls],
            "suspension": msgspec.structs.asdict(self.suspension),
            "in_flight": self.in_flight(),
            "waiting": self.waiting(),
            "void_messages": self._void,
        }

    # Requests -----------------------------------------------------------------------------------

    def _on_submit(self, submit: Submit) -> list[Effect]:
        refusal = self._refusal(submit)
        if refusal is not None:
            return [refusal]
        tokens = len(submit.prompt_token_ids)
        query = Query(tokens, submit.prompt_token_ids, submit.session, submit.priority)
        rank = submit.rank if submit.rank is not None else self._router.choose(query)
        link = self._links.get(rank)
        if link is None:
            return [Refuse(submit.request, "misrouted", f"the policy chose rank {rank!r}, which is not there")]
        decision = self._router.explain(rank, query, submit.rank is not None) if submit.explain else None
        number = link.ledger.last + 1
        link.ledger.sent(number, tokens)
        link.in_flight.add(submit.request)
        self._placed[submit.request] = link
        add = AddRequest(
            submit.request, number, link.incarnation, self.wave, submit.prompt_token_ids, submit.params, submit.priority
        )
        effects: list[Effect] = [ToRank(rank, add), Placed(submit.request, rank, decision)]
        if self._lockstep and not self.running:
            effects.append(ToCoordinator(WakeNotice(self.identity, rank, self.wave)))
        if self._share_sends:
            self._told += 1
            link.unheard.sent(self._told, tokens)
            send = Send(rank, link.incarnation, number, tokens)
            effects.append(ToCoordinator(SendNotice(self.identity, [send], self._told)))
        self._router.touched(link)
        return effects

    def _refusal(self, submit: Submit) -> Refuse | None:
        if submit.rank is not None and submit.rank not in self._links:
            known = ", ".join(map(str, self.ready_ranks())) or "none"
            text = f"rank {submit.rank} is not served here; ready ranks: {known}"
            return Refuse(submit.request, "unknown-rank", text)
        if not self._links:
            return Refuse(submit.request, "no-rank", "no rank is ready")
        if self._calls.suspended and self.suspension.mode == "abort":
            return Refuse(
                submit.request, "suspended", "the deployment is suspended; requests are refused until it resumes"
            )
        if self._max_waiting is not None and self.waiting() >= self._max_waiting:
            return Refuse(submit.request, "overloaded", f"{self._max_waiting} requests are waiting already")
        return None

    def _on_abandon(self, requests: Sequence[int]) -> list[Effect]:
        by_rank: dict[int, list[int]] = {}
        for request in requests:
            link = self._placed.pop(request, None)
            if link is not None:
                link.in_flight.discard(request)
                self._router.touched(link)
                by_rank.setdefault(link.rank, []).append(request)
        return [ToRank(rank, AbortRequests(aborted)) for rank, aborted in by_rank.items()]

    def _on_outputs(self, message: Outputs) -> list[Effect]:
        link = self._links.get(message.rank)
        if link is None or link.incarnation != message.incarnation:
            self._void += 1
            return []
        placed = self._placed
        outputs = message.outputs
        # Outputs of an abandoned request may still be on their way; nobody waits for them.
        if not all(output.request in placed for output in outputs):
            outputs = [output for output in outputs if output.request in placed]
        for output in outputs:
            if output.finish_reason is not None:
                placed.pop(output.request, None)
                link.in_flight.discard(output.request)
                self._router.touched(link)
        return [Deliver(outputs)] if outputs else []

    # The coordinator ----------------------------------------------------------------------------

    def _on_members(self, message: Members) -> list[Effect]:
        effects: list[Effect] = []
        if message.coordinator != self._coordinator and self._coordinator != NOBODY:
            # A new coordinator does not know yet which front-ends there are.
            effects.append(self._hello())
        self._coordinator_is(message.coordinator)
        self._wave_is(message.wave, message.running)
        self.stalls = message.stalls
        self.missing = [rank for rank in message.missing if self._serves(rank)]
        members = {member.rank: member for member in message.members if self._serves(member.rank)}
        for rank, link in list(self._links.items()):
            member = members.get(rank)
            # A coordinator that has just come back does not know all ranks yet, so a rank that it does
            # not name is not lost: only a new life, or its word that this one has ended, ends a link.
            ended = (rank, link.incarnation) in message.ended
            if ended or (member is not None and member.incarnation != link.incarnation):
                effects += self._lose(link)
        for rank, member in members.items():
            if rank not in self._links and (rank, member.incarnation) not in self._unreachable:
                self._links[rank] = link = RankLink(rank, member.incarnation)
                self._router.joined(link)
                effects.append(Connect(member))
        return effects

    def _lose(self, link: RankLink) -> list[Effect]:
        del self._links[link.rank]
        self._router.lost(link)
        effects: list[Effect] = [Disconnect(link.rank)]
        for request in sorted(link.in_flight):
            del self._placed[request]
            effects.append(Refuse(request, "rank-lost", f"rank {link.rank} ended while it served this request"))
        return effects

    def _on_view(self, view: LoadView) -> list[Effect]:
        self._coordinator_is(view.coordinator)
        if view.number <= self._view_number:
            self._void += 1
            return []
        self._view_number = view.number
        self._wave_is(view.wave, view.running)
        for entry in view.ranks or ():
            link = self._links.get(entry.rank)
            if link is not None and link.incarnation == entry.incarnation:
                link.take_view(entry, self.identity)
                self._router.touched(link)
        # One cut for all ranks: were it made rank by rank, a view that knows one send would show its rank as
        # less loaded than those for which the others' sends are still guessed.
        heard = view.heard.get(self.identity, 0)
        for link in self._links.values():
            if link.unheard.requests:
                self._router.touched(link)
            link.unheard.reported(heard)
        self._router.settle()
        current, effects = self._calls.learn(view.suspension)
        return effects if current else [self._hello(), *effects]

    def _hello(self) -> Effect:
        known = self.suspension
        return ToCoordinator(FrontEndHello(PROTOCOL_VERSION, self.identity, known.number, known.mode))

    def _coordinator_is(self, coordinator: int) -> None:
        if coordinator != self._coordinator:
            self._coordinator = coordinator
            self._view_number = 0

    def _wave_is(self, wave: int, running: bool) -> None:
        if wave >= self.wave:
            self.wave = wave
            self.running = running

    def _serves(self, rank: int) -> bool:
        return self._ranks is None or rank in self._ranks
