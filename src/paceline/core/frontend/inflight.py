"""The requests of one front-end that have a rank, and its ranks as it knows them.

A rank may die with requests half answered. So of each request there is kept what its client has been given; where the
rank's connection ends, the request is sent to another one with the tokens made so far, and goes on behind them. To the
ranks each send is another request, with an id of its own: what still comes of the one before is nobody's.

Of a rank there are its last report, this front-end's own sends beyond it, and what the others have on the wire;
`Router` keeps the candidates as these change, asks the policy, and tells what a choice was based on.

Whoever is refused is told when to come back. A front-end's requests end as fast as there are some under way, divided by
how long one takes (Little's law), and each end leaves a place. Each is promised the next place that nobody has been
promised: told all the same time, they would come back together, and all but one be refused again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from heapq import nsmallest
from math import ceil

from msgspec import Struct
from msgspec.structs import replace

from paceline.core.binding import Send, SendNotice
from paceline.core.blocks import packed
from paceline.core.frontend.events import Deliver, Effect, Placed, Refuse, Submit, ToCoordinator, ToRank
from paceline.core.load import Accounting, Load, believed
from paceline.core.messages import LoadView, RankView, WakeNotice
from paceline.core.ordering import RESORT_SHARE
from paceline.core.requests import LARGEST_STAMP, AbortRequests, AddRequest, Output, Outputs
from paceline.core.routing.candidates import Candidate, Candidates
from paceline.core.routing.least import LeastLoad, work
from paceline.core.routing.policy import Decision, Policy, Query, belief
from paceline.core.routing.session import session_name


class RankHandle:
    """One life of one rank, as this front-end knows it.

    `candidate`, and `waiting`, how many requests wait for a slot there, are as of the last `refresh`.
    """

    __slots__ = (
        "accounting", "candidate", "in_flight", "incarnation", "left", "load", "rank", "step", "unacked_requests",
        "unacked_tokens", "unheard", "waiting",
    )  # fmt: skip

    def __init__(self, rank: int, incarnation: int) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.load = Load()
        self.step = -1
        self.accounting = Accounting()
        # By the ids that the rank knows: those that are under way, and those that went elsewhere while it was away.
        self.in_flight: set[int] = set()
        self.left: list[int] = []
        # What the other front-ends have on the wire, by the latest view.
        self.unacked_requests = 0
        self.unacked_tokens = 0
        # This front-end's sends that the coordinator had not been told of when it made the latest view.
        self.unheard = Accounting()
        self.candidate = Candidate(rank, 0, 0, 0, 0, 0, 0, incarnation)
        self.waiting = 0

    def believed(self) -> Load:
        """What the rank has, plus what is on the wire from this front-end."""
        return believed(self.load, self.accounting.requests, self.accounting.tokens)

    def refresh(self) -> int:
        """Bring `candidate` and `waiting` up to date; returns by how much `waiting` grew."""
        load, accounting, candidate = self.load, self.accounting, self.candidate
        candidate.requests = load.waiting + load.running + accounting.requests + self.unacked_requests
        candidate.prefill_tokens = load.prefill_tokens + accounting.tokens + self.unacked_tokens
        candidate.in_flight = len(self.in_flight)
        candidate.since_view_requests = self.unheard.requests
        candidate.since_view_tokens = self.unheard.tokens
        candidate.finished = load.finished
        # Those that cannot start at once, as far as slots go.
        free = load.slots - load.running
        waiting = load.waiting + accounting.requests - (free if free > 0 else 0)
        before, self.waiting = self.waiting, waiting if waiting > 0 else 0
        return self.waiting - before

    def take_view(self, entry: RankView, frontend: int) -> None:
        """Take in what a view says of this rank; `frontend`: whose link this is. An older step changes nothing."""
        if entry.step < self.step:
            return
        self.step = entry.step
        self.load = entry.load
        self.accounting.reported(entry.taken.get(frontend, 0))
        self.unacked_requests = sum(wire_id.requests for wire_id in entry.on_the_wire if wire_id.frontend != frontend)
        self.unacked_tokens = sum(wire_id.tokens for wire_id in entry.on_the_wire if wire_id.frontend != frontend)


MAX_ALTERNATIVES = 3
NAMED = "named"
"""In place of the policy's name, where the client named the rank."""


class Router:
    """The ranks of one front-end as its policy sees them. `name`: what the policy is called."""

    def __init__(self, policy: Policy, name: str) -> None:
        self._policy = policy
        self._name = name
        self._candidates = Candidates()
        # Those that say something else than their candidates do. A link tells of itself many times between two choices.
        self._stale: set[RankHandle] = set()
        self._waiting = 0
        self._asked = False

    def joined(self, handle: RankHandle) -> None:
        self._waiting += handle.refresh()
        self._candidates.add(handle.candidate)

    def lost(self, handle: RankHandle) -> None:
        self._stale.discard(handle)
        self._waiting -= handle.waiting
        self._candidates.remove(handle.rank)

    def touched(self, handle: RankHandle) -> None:
        """What is known of a rank has changed."""
        self._stale.add(handle)

    def settle(self) -> None:
        """An event has changed many ranks. Take it in now, so that the next choice need not pay for it; but not where
        nobody has asked for one since the last time: an idle front-end shall not sort each view that it is sent.
        """
        if self._asked:
            self._asked = False
            self._refresh()
            self._candidates.settle()

    def waiting(self) -> int:
        """Requests believed to wait for a slot, over all ranks."""
        self._refresh()
        return self._waiting

    def choose(self, query: Query) -> int:
        """The rank for a request. There must be one."""
        self._asked = True
        self._refresh()
        return self._policy.choose(self._candidates, query)

    def choose_among(self, query: Query, ranks: Iterable[int]) -> int:
        """The least loaded of these ranks, of which there must be one. For policies that are LeastLoad alone."""
        assert isinstance(self._policy, LeastLoad)
        self._refresh()
        found = [place for rank in ranks if (place := self._candidates.place(rank)) is not None]
        return self._policy.choose_among(self._candidates, query, found)

    @property
    def names(self) -> bool:
        """Whether the policy looks at names of prompts' beginnings."""
        return self._policy.names

    def held(self, rank: int, query: Query) -> int:
        return self._policy.held(rank, query)

    @property
    def frontend_count(self) -> int:
        """How many share the ranks."""
        return self._policy.frontend_count

    def sent(self, rank: int, query: Query) -> None:
        self._policy.sent(rank, query)

    def explain(
        self, rank: int, query: Query, name: str = "", reason: str = "", *, alternatives: bool = True
    ) -> Decision:
        """What the choice of `rank` was based on; to be asked before anything else changes.

        `name`: who chose it, where that was not the policy; `reason`: why, where there is more to say. `alternatives`:
        whether to look at all ranks for the least loaded others.
        """
        self._refresh()
        place = self._candidates.place(rank)
        assert place is not None
        others = self._policy.frontend_count - 1
        rest = (one for one in self._candidates if one.rank != rank) if alternatives else ()
        least = nsmallest(MAX_ALTERNATIVES, rest, lambda one: work(one, others))
        return Decision(
            name or self._name, rank, query.prompt_tokens, len(self._candidates), belief(self._candidates[place]),
            [belief(one) for one in least], reason or ("" if name else self._policy.reason()),
        )  # fmt: skip

    def _refresh(self) -> None:
        stale = self._stale
        if not stale:
            return
        for handle in stale:
            self._waiting += handle.refresh()
        if len(stale) * RESORT_SHARE > len(self._candidates):
            self._candidates.all_changed()
        else:
            for handle in stale:
                self._candidates.changed(handle.rank)
        stale.clear()


LONGEST_S = 60
"""OpenAI's clients take no longer time than this for a time to wait."""

RECENT = 64
"""Requests over which the time that one takes is averaged."""


class RetryAfter:
    """How fast the requests of one front-end end, and the places that were promised. Times in seconds."""

    def __init__(self) -> None:
        self._ended = 0
        self._takes_s = 0.0
        self._last = 0.0
        self._promised = float("-inf")

    def busy(self, now: float) -> None:
        self._last = now

    def ended(self, took_s: float, now: float) -> None:
        """A request has ended, or was aborted: there is a place."""
        self._ended += 1
        self._takes_s += (took_s - self._takes_s) / min(self._ended, RECENT)
        self._last = now

    def no_queue(self) -> None:
        """Nobody waits: who was promised a place has had it, or has not come."""
        self._promised = float("-inf")

    def wait_s(self, ahead: float, under_way: int, takes_s: float) -> float:
        """How long until so many have begun where so many are under way; each `takes_s` where none has ended yet."""
        return ahead * (self._takes_s if self._ended else takes_s) / under_way if under_way else 0.0

    def come_back_s(self, under_way: int, now: float) -> int:
        """When there will be a place for one more that is refused now, where so many are `under_way`."""
        if not under_way:
            return 1
        if self._ended:
            self._promised = max(self._promised, now) + self._takes_s / under_way
            self._promised = min(self._promised, now + LONGEST_S)
        # Where nothing has ended for long, the next end is likely to be as far.
        wait_s = max(self._promised - now, now - self._last)
        return max(1, min(LONGEST_S, ceil(wait_s)))


def query_of(submit: Submit) -> Query:
    prompt = submit.prompt_token_ids
    return Query(len(prompt), prompt, submit.session, submit.priority, submit.blocks or ())


def session_of(submit: Submit) -> int:
    """The name of its key, 0 where it has none or nothing is made of it."""
    return 0 if submit.blocks is None or submit.session is None else session_name(submit.session)


FIRST_RESEND = 2**62
"""Ids of requests that are sent again; those of clients' requests are far below."""


class InFlight(Struct, gc=False):
    """A request that has been sent: what its client asked for, the tokens that it has, and when it was first sent.

    `lost`: the ranks that it has lost without a token in between, each with its life, but those that were back
    afterwards; `made_before`: its tokens at the last loss.
    """

    submit: Submit
    handle: RankHandle
    made: list[int]
    since: float
    lost: list[tuple[int, int]] = []
    made_before: int = -1

    @property
    def tokens(self) -> int:
        """Tokens to compute before the next one of the answer."""
        return len(self.submit.prompt_token_ids) + len(self.made)


class InFlightRequests:
    """What this front-end, `identity`, has sent to which rank. `relay_sends`: whether the coordinator is told."""

    INCIDENTAL = frozenset({"void", "moved"})

    def __init__(self, identity: int, router: Router, *, relay_sends: bool, lockstep: bool) -> None:
        self.wave = 0
        """The wave that is believed current; sends are stamped with it."""
        self.running = False
        """Whether the ranks are believed to run in it."""
        self.handles: dict[int, RankHandle] = {}
        """By rank: those that requests can go to."""
        self.down: dict[int, RankHandle] = {}
        """By rank: those whose connection has ended and may come up again, and those that hang and may go on."""
        self.leaving: dict[int, RankHandle] = {}
        """By rank: those that end what they have, and get nothing new."""
        self.void = 0
        """Messages that were of a life that is over."""
        self.moved = 0
        """Requests sent again, since their ranks were lost."""
        self.retry_after = RetryAfter()
        self._identity = identity
        self._router = router
        self._relay_sends = relay_sends
        # Whether views come without loads, always: external mode. None until one has come.
        self._without_loads: bool | None = None
        self._lockstep = lockstep
        # By the id that the rank knows, which is the client's but for requests that were sent again.
        self._inflight: dict[int, InFlight] = {}
        self._resent: dict[int, int] = {}
        self._next_resend = FIRST_RESEND
        self._told = 0

    def __len__(self) -> int:
        """Requests sent and not finished."""
        return len(self._inflight)

    # Ranks --------------------------------------------------------------------------------------

    def join(self, rank: int, incarnation: int) -> None:
        self.handles[rank] = handle = RankHandle(rank, incarnation)
        self._router.joined(handle)

    def known(self) -> list[RankHandle]:
        """All lives of ranks that are connected to, whether that is up or not."""
        return [*self.handles.values(), *self.down.values(), *self.leaving.values()]

    def of_all(self) -> Iterable[InFlight]:
        return self._inflight.values()

    def let_leave(self, rank: int) -> None:
        """The rank is to leave: it gets nothing new."""
        handle = self.handles.pop(rank, None)
        if handle is not None:
            self.leaving[rank] = handle
            self._router.lost(handle)

    def lose(self, handle: RankHandle) -> list[InFlight]:
        """That life of a rank has ended; returns its requests, which have no rank now."""
        if self.down.pop(handle.rank, None) is None:
            self._remove(handle.rank)
        return self._take_off(handle)

    def put_down(self, rank: int, stays: Callable[[InFlight], bool] = lambda inflight: False) -> list[InFlight]:
        """A rank's connection has ended, for now or for good, or the rank hangs; returns its requests, which have no
        rank now. `stays`: which of them it keeps.
        """
        handle = self._remove(rank) or self.down.get(rank)
        if handle is None:
            return []
        self.down[rank] = handle
        off = [wire_id for wire_id in sorted(handle.in_flight) if not stays(self._inflight[wire_id])]
        handle.left += off
        return self._take_off(handle, off)

    def put_up(self, rank: int) -> list[Effect]:
        """A rank's connection is there again, and it is the same life: what went on elsewhere, it forgets."""
        handle = self.down.pop(rank, None)
        if handle is None:
            return []
        self.handles[rank] = handle
        # What was sent has arrived and is about to be forgotten, or has not and never will.
        handle.accounting.reported(handle.accounting.last)
        self._router.joined(handle)
        left, handle.left = handle.left, []
        return [ToRank(rank, AbortRequests(left))] if left else []

    def _remove(self, rank: int) -> RankHandle | None:
        handle = self.handles.pop(rank, None)
        if handle is None:
            return self.leaving.pop(rank, None)
        self._router.lost(handle)
        return handle

    def _take_off(self, handle: RankHandle, off: list[int] | None = None) -> list[InFlight]:
        all_inflight = [self._forget(wire_id) for wire_id in (sorted(handle.in_flight) if off is None else off)]
        return [inflight for inflight in all_inflight if inflight is not None]

    # Requests -----------------------------------------------------------------------------------

    def send(
        self, submit: Submit, rank: int, decision: Decision | None, now: float, *, waited: bool,
        held: int | None = None,
        waited_ms: int = 0,
    ) -> list[Effect]:  # fmt: skip
        """Send a request to a rank that is there. `waited`: whether the coordinator was asked; `held`: tokens of the
        prompt that it says the rank holds, `waited_ms`: how long it says the request has waited.
        """
        if not self._inflight:
            self.retry_after.busy(now)
        effects = self._send(submit.request, InFlight(submit, self.handles[rank], [], now), waited, held)
        # The client hears of its rank before anything that the coordinator is told.
        return [effects[0], Placed(submit.request, rank, decision, waited, waited_ms), *effects[1:]]

    def send_again(self, inflight: InFlight, rank: int) -> list[Effect]:
        """Send a request that has lost its rank to another one, to be gone on with."""
        wire_id, self._next_resend = self._next_resend, self._next_resend + 1
        self._resent[inflight.submit.request] = wire_id
        self.moved += 1
        inflight.handle = self.handles[rank]
        return self._send(wire_id, inflight, waited=False)

    def _send(self, wire_id: int, inflight: InFlight, waited: bool, held: int | None = None) -> list[Effect]:
        handle, submit, whole = inflight.handle, inflight.submit, inflight.tokens
        query = query_of(submit)
        held = min(self._router.held(handle.rank, query), whole - 1) if held is None else held
        tokens = whole - held
        self._router.sent(handle.rank, query)
        stamp = min(self.wave, LARGEST_STAMP)
        answer_tokens = submit.params.max_tokens - len(inflight.made)
        number = handle.accounting.last + 1
        handle.accounting.sent(number, tokens)
        handle.in_flight.add(wire_id)
        self._inflight[wire_id] = inflight
        add = AddRequest(
            wire_id, number, handle.incarnation, stamp, submit.prompt_token_ids, submit.params, submit.priority,
            list(inflight.made), submit.name,
        )  # fmt: skip
        effects: list[Effect] = [ToRank(handle.rank, add)]
        if self._lockstep and not self.running:
            effects.append(ToCoordinator(WakeNotice(self._identity, handle.rank, stamp)))
        if self._relay_sends:
            self._told += 1
            handle.unheard.sent(self._told, tokens, whole + answer_tokens)
            send = Send(
                handle.rank, handle.incarnation, number, tokens, answer_tokens, submit.request if waited else 0, held,
                b"" if waited else packed(query.blocks), 0 if waited else session_of(submit),
            )  # fmt: skip
            effects.append(ToCoordinator(SendNotice(self._identity, [send], self._told)))
        self._router.touched(handle)
        return effects

    def abandon(self, requests: Iterable[int], now: float) -> list[Effect]:
        """The clients of these requests have gone. Those that have no rank are left out."""
        by_rank: dict[int, list[int]] = {}
        for request in requests:
            wire_id = self._resent.get(request, request)
            inflight = self._forget(wire_id)
            if inflight is not None:
                self.retry_after.ended(now - inflight.since, now)
                self._touched(inflight.handle)
                by_rank.setdefault(inflight.handle.rank, []).append(wire_id)
        return [ToRank(rank, AbortRequests(aborted)) for rank, aborted in by_rank.items()]

    def unsent(self, wire_id: int, now: float) -> list[Effect]:
        """A request was not sent, since its rank reads no more."""
        inflight = self._inflight.get(wire_id)
        if inflight is None:
            return []
        request, text = inflight.submit.request, f"rank {inflight.handle.rank} takes no more requests now"
        return [*self.abandon([request], now), Refuse(request, "overloaded", text)]

    def outputs(self, message: Outputs, now: float) -> list[Effect]:
        rank = message.rank
        handle = self.handles.get(rank) or self.leaving.get(rank) or self.down.get(rank)
        if handle is None or handle.incarnation != message.incarnation:
            self.void += 1
            return []
        all_inflight = self._inflight
        outputs = message.outputs
        # Outputs of a request that was abandoned, or went elsewhere, may still be on their way.
        if not all(output.request in all_inflight for output in outputs):
            outputs = [output for output in outputs if output.request in all_inflight]
        resent = False
        for output in outputs:
            all_inflight[output.request].made += output.token_ids
            resent = resent or output.request >= FIRST_RESEND
        if not outputs:
            return []
        delivered = [self._as_asked(output) for output in outputs] if resent else outputs
        for output in outputs:
            # Whoever ends a request twice in one message ends it once.
            if output.finish_reason is not None and (inflight := self._forget(output.request)) is not None:
                self.retry_after.ended(now - inflight.since, now)
                self._touched(handle)
        return [Deliver(delivered)]

    def _touched(self, handle: RankHandle) -> None:
        # Of a rank that leaves routing knows nothing any more.
        if handle.rank in self.handles:
            self._router.touched(handle)

    def _as_asked(self, output: Output) -> Output:
        """An output under the number that the client's request has."""
        return replace(output, request=self._inflight[output.request].submit.request)

    def _forget(self, wire_id: int) -> InFlight | None:
        inflight = self._inflight.pop(wire_id, None)
        if inflight is not None:
            inflight.handle.in_flight.discard(wire_id)
            if self._without_loads:
                # Nothing else says that it does not wait any more.
                inflight.handle.accounting.keep(len(inflight.handle.in_flight))
            self._resent.pop(inflight.submit.request, None)
        return inflight

    # The coordinator ----------------------------------------------------------------------------

    def take_view(self, view: LoadView) -> None:
        """Take in every rank's load, and what the coordinator has heard of."""
        self._without_loads = view.ranks is None and self._without_loads is not False
        for entry in view.ranks or ():
            rank = entry.rank
            handle = self.handles.get(rank) or self.leaving.get(rank) or self.down.get(rank)
            if handle is not None and handle.incarnation == entry.incarnation:
                handle.take_view(entry, self._identity)
                self._touched(handle)
        # One cut for all ranks: were it made rank by rank, a view that knows one send would show its rank as
        # less loaded than those for which the others' sends are still guessed.
        heard = view.heard.get(self._identity, 0)
        for handle in (*self.down.values(), *self.leaving.values()):
            handle.unheard.reported(heard)
        for handle in self.handles.values():
            if handle.unheard.requests:
                self._router.touched(handle)
            handle.unheard.reported(heard)
        self._router.settle()
