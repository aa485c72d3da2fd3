"""The requests of one front-end that have a rank: numbered, told of, in flight, and over; and the ranks themselves."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.protocol.frontend_events import (
    Deliver,
    Disconnect,
    Effect,
    Placed,
    Refuse,
    Submit,
    ToCoordinator,
    ToRank,
)
from paceline.protocol.frontend_link import RankLink
from paceline.protocol.messages import AbortRequests, AddRequest, LoadView, Outputs, Send, SendNotice, WakeNotice
from paceline.protocol.policy import Decision
from paceline.protocol.router import Router


class Flights:
    """What this front-end, `identity`, has sent to which rank. `share_sends`: whether the coordinator is told."""

    def __init__(self, identity: int, router: Router, *, share_sends: bool, lockstep: bool) -> None:
        self.wave = 0
        """The wave that is believed current; sends are stamped with it."""
        self.running = False
        """Whether the ranks are believed to run in it."""
        self.links: dict[int, RankLink] = {}
        """By rank: those that requests can go to."""
        self.void = 0
        """Messages that were of a life that is over."""
        self._identity = identity
        self._router = router
        self._share_sends = share_sends
        self._lockstep = lockstep
        self._placed: dict[int, RankLink] = {}
        self._told = 0

    def __len__(self) -> int:
        """Requests sent and not finished."""
        return len(self._placed)

    def __contains__(self, request: int) -> bool:
        return request in self._placed

    def join(self, rank: int, incarnation: int) -> None:
        """A rank is there."""
        self.links[rank] = link = RankLink(rank, incarnation)
        self._router.joined(link)

    def lose(self, link: RankLink) -> list[Effect]:
        """That life of a rank has ended, and its requests with it."""
        del self.links[link.rank]
        self._router.lost(link)
        effects: list[Effect] = [Disconnect(link.rank)]
        for request in sorted(link.in_flight):
            del self._placed[request]
            effects.append(Refuse(request, "rank-lost", f"rank {link.rank} ended while it served this request"))
        return effects

    def send(self, submit: Submit, rank: int, decision: Decision | None, *, waited: bool) -> list[Effect]:
        """Send a request to a rank that is there. `waited`: whether the coordinator was asked."""
        link = self.links[rank]
        tokens, answer_tokens = len(submit.prompt_token_ids), submit.params.max_tokens
        number = link.ledger.last + 1
        link.ledger.sent(number, tokens)
        link.in_flight.add(submit.request)
        self._placed[submit.request] = link
        add = AddRequest(
            submit.request, number, link.incarnation, self.wave, submit.prompt_token_ids, submit.params, submit.priority
        )
        effects: list[Effect] = [ToRank(rank, add), Placed(submit.request, rank, decision)]
        if self._lockstep and not self.running:
            effects.append(ToCoordinator(WakeNotice(self._identity, rank, self.wave)))
        if self._share_sends:
            self._told += 1
            link.unheard.sent(self._told, tokens, tokens + answer_tokens)
            send = Send(rank, link.incarnation, number, tokens, answer_tokens, submit.request if waited else 0)
            effects.append(ToCoordinator(SendNotice(self._identity, [send], self._told)))
        self._router.touched(link)
        return effects

    def abandon(self, requests: Sequence[int]) -> list[Effect]:
        """The clients of these requests have gone. Those that have no rank are left out."""
        by_rank: dict[int, list[int]] = {}
        for request in requests:
            link = self._placed.pop(request, None)
            if link is not None:
                link.in_flight.discard(request)
                self._router.touched(link)
                by_rank.setdefault(link.rank, []).append(request)
        return [ToRank(rank, AbortRequests(aborted)) for rank, aborted in by_rank.items()]

    def outputs(self, message: Outputs) -> list[Effect]:
        """What a step of a rank has made."""
        link = self.links.get(message.rank)
        if link is None or link.incarnation != message.incarnation:
            self.void += 1
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

    def take_view(self, view: LoadView) -> None:
        """Take in every rank's load, and what the coordinator has heard of."""
        for entry in view.ranks or ():
            link = self.links.get(entry.rank)
            if link is not None and link.incarnation == entry.incarnation:
                link.take_view(entry, self._identity)
                self._router.touched(link)
        # One cut for all ranks: were it made rank by rank, a view that knows one send would show its rank as
        # less loaded than those for which the others' sends are still guessed.
        heard = view.heard.get(self._identity, 0)
        for link in self.links.values():
            if link.unheard.requests:
                self._router.touched(link)
            link.unheard.reported(heard)
        self._router.settle()
