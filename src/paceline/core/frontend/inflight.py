"""The requests of one front-end that have a rank: numbered, told of, in flight, and over; and the ranks themselves.

A rank may die with requests half answered. So of each there is kept what its client has been given; where the rank's
connection ends, the request is sent to another one with the tokens made so far, and goes on behind them. To the ranks
each send is another request, with an id of its own: what still comes of the one before is nobody's.

When somebody who was refused may come back: reckoned from how long requests take and how many were told to come.

A front-end's requests end as fast as there are some under way, divided by how long one takes (Little's law), and each
end leaves a place. Whoever is refused is promised the next place that nobody has been promised: told all the same time,
they would come back together, and all but one be refused again.
"""

from __future__ import annotations

from collections.abc import Iterable
from math import ceil

from msgspec import Struct
from msgspec.structs import replace

from paceline.core.frontend.events import Deliver, Effect, Placed, Submit, ToCoordinator, ToRank
from paceline.core.frontend.ranks import RankHandle, Router
from paceline.core.messages import LoadView, Send, SendNotice, WakeNotice
from paceline.core.requests import LARGEST_STAMP, AbortRequests, AddRequest, Output, Outputs
from paceline.core.routing.policy import Decision

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
        """The first request is under way."""
        self._last = now

    def ended(self, took_s: float, now: float) -> None:
        """A request has ended, or was aborted: there is a place."""
        self._ended += 1
        self._takes_s += (took_s - self._takes_s) / min(self._ended, RECENT)
        self._last = now

    def no_queue(self) -> None:
        """Nobody waits: who was promised a place has had it, or has not come."""
        self._promised = float("-inf")

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
        """By rank: those whose connection has ended and may come up again."""
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
        """A rank is there."""
        self.handles[rank] = handle = RankHandle(rank, incarnation)
        self._router.joined(handle)

    def known(self) -> list[RankHandle]:
        """All lives of ranks that are connected to, whether that is up or not."""
        return [*self.handles.values(), *self.down.values(), *self.leaving.values()]

    def of_all(self) -> Iterable[InFlight]:
        """What is in flight, to any rank."""
        return self._inflight.values()

    def let_leave(self, rank: int) -> None:
        """The rank is to leave: it gets nothing new."""
        handle = self.handles.pop(rank, None)
        if handle is not None:
            self.leaving[rank] = handle
            self._router.lost(handle)

    def lose(self, handle: RankHandle) -> list[InFlight]:
        """That life of a rank has ended; returns its requests, which have no rank now."""
        if self.down.pop(handle.rank, None) is not None:
            return []
        self._remove(handle.rank)
        return self._take_off(handle)

    def put_down(self, rank: int) -> list[InFlight]:
        """A rank's connection has ended, for now or for good; returns its requests, which have no rank now."""
        handle = self._remove(rank)
        if handle is None:
            return []
        self.down[rank] = handle
        handle.left += sorted(handle.in_flight)
        return self._take_off(handle)

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

    def _take_off(self, handle: RankHandle) -> list[InFlight]:
        all_inflight = [self._forget(wire_id) for wire_id in sorted(handle.in_flight)]
        return [inflight for inflight in all_inflight if inflight is not None]

    # Requests -----------------------------------------------------------------------------------

    def send(self, submit: Submit, rank: int, decision: Decision | None, now: float, *, waited: bool) -> list[Effect]:
        """Send a request to a rank that is there. `waited`: whether the coordinator was asked."""
        if not self._inflight:
            self.retry_after.busy(now)
        effects = self._send(submit.request, InFlight(submit, self.handles[rank], [], now), waited)
        # The client hears of its rank before anything that the coordinator is told.
        return [effects[0], Placed(submit.request, rank, decision), *effects[1:]]

    def send_again(self, inflight: InFlight, rank: int) -> list[Effect]:
        """Send a request that has lost its rank to another one, to be gone on with."""
        wire_id, self._next_resend = self._next_resend, self._next_resend + 1
        self._resent[inflight.submit.request] = wire_id
        self.moved += 1
        inflight.handle = self.handles[rank]
        return self._send(wire_id, inflight, waited=False)

    def _send(self, wire_id: int, inflight: InFlight, waited: bool) -> list[Effect]:
        handle, submit, tokens = inflight.handle, inflight.submit, inflight.tokens
        stamp = min(self.wave, LARGEST_STAMP)
        answer_tokens = submit.params.max_tokens - len(inflight.made)
        number = handle.accounting.last + 1
        handle.accounting.sent(number, tokens)
        handle.in_flight.add(wire_id)
        self._inflight[wire_id] = inflight
        add = AddRequest(
            wire_id, number, handle.incarnation, stamp, submit.prompt_token_ids, submit.params, submit.priority,
            list(inflight.made),
        )  # fmt: skip
        effects: list[Effect] = [ToRank(handle.rank, add)]
        if self._lockstep and not self.running:
            effects.append(ToCoordinator(WakeNotice(self._identity, handle.rank, stamp)))
        if self._relay_sends:
            self._told += 1
            handle.unheard.sent(self._told, tokens, tokens + answer_tokens)
            send = Send(handle.rank, handle.incarnation, number, tokens, answer_tokens, submit.request if waited else 0)
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

    def outputs(self, message: Outputs, now: float) -> list[Effect]:
        """What a step of a rank has made."""
        handle = self.handles.get(message.rank) or self.leaving.get(message.rank)
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
