"""Where a request goes: to the rank that it names, by this front-end's own choice, by a share, or by a grant.

named             straight there
no broker         the policy chooses, by this front-end's own accounting
a share fits      the policy's choice if a share allows it, else the least loaded of those that one allows
none does         it waits here until the coordinator grants it a rank, or is away (`binding.py`)
"""

from __future__ import annotations

from paceline.protocol.frontend_events import Deliver, Effect, Refuse, Submit
from paceline.protocol.frontends.binding import Binding, Held
from paceline.protocol.frontends.calls import FrontEndCalls
from paceline.protocol.frontends.flights import Flights
from paceline.protocol.frontends.router import NAMED, Router
from paceline.protocol.frontends.stranded import PATIENCE_S
from paceline.protocol.messages import Grants, Output
from paceline.protocol.routing.policy import Query

BROKER = "broker"
"""In place of the policy's name, where the coordinator chose the rank."""


class Placement:
    """How one front-end's requests get their ranks. `max_waiting`: how many may wait for a slot, None for no limit."""

    def __init__(
        self, router: Router, flights: Flights, binding: Binding, calls: FrontEndCalls, max_waiting: int | None
    ) -> None:
        self._router = router
        self._flights = flights
        self._binding = binding
        self._calls = calls
        self._max_waiting = max_waiting
        self._rankless_since: float | None = None

    @property
    def deadline(self) -> float:
        """When something must be done about what waits, at the latest."""
        if self._rankless_since is None or not self._binding.held:
            return self._binding.deadline
        return self._rankless_since + PATIENCE_S

    # Requests -----------------------------------------------------------------------------------

    def submit(self, submit: Submit, now: float) -> list[Effect]:
        """A client's request."""
        refusal = self._refusal(submit, now)
        if refusal is not None:
            return [refusal]
        query = _query(submit)
        reason = ""
        if submit.rank is not None:
            rank = submit.rank
        elif self._binding.available:
            by_share = self._by_share(submit, query)
            if by_share is None:
                return self._binding.hold(submit, now)
            rank, reason = by_share, "room that this front-end was given in advance"
        else:
            rank = self._router.choose(query)
        if rank not in self._flights.links:
            return [_misrouted(submit, rank)]
        name = NAMED if submit.rank is not None else ""
        decision = self._router.explain(rank, query, name, reason) if submit.explain else None
        return self._flights.send(submit, rank, decision, now, waited=False)

    def _by_share(self, submit: Submit, query: Query) -> int | None:
        """The rank that a request may go to without a word, if nobody waits and there is one."""
        if self._binding.held or self._calls.suspended:
            return None
        tokens, kv = query.prompt_tokens, query.prompt_tokens + submit.params.max_tokens
        links = self._flights.links
        rank = self._router.choose(query)
        if rank in links and self._binding.fits(links[rank], tokens, kv):
            return rank
        fitting = self._binding.fitting(links, tokens, kv)
        return self._router.choose_among(query, fitting) if fitting else None

    def waiting(self) -> int:
        """Requests believed to wait for a slot: at this front-end's ranks, and before them."""
        return self._router.waiting() + self._binding.queued

    def _refusal(self, submit: Submit, now: float) -> Refuse | None:
        if submit.rank is not None and submit.rank not in self._flights.links:
            known = ", ".join(map(str, sorted(self._flights.links))) or "none"
            text = f"rank {submit.rank} is not served here; ready ranks: {known}"
            return Refuse(submit.request, "unknown-rank", text)
        if not self._flights.links:
            return Refuse(submit.request, "no-rank", "no rank is ready")
        if self._calls.suspended and self._calls.suspension.mode == "abort":
            return Refuse(
                submit.request, "suspended", "the deployment is suspended; requests are refused until it resumes"
            )
        if self._max_waiting is None:
            return None
        waiting = self.waiting()
        if not waiting:
            self._flights.turnover.no_queue()
        if waiting >= self._max_waiting:
            back_s = self._flights.turnover.come_back_s(len(self._flights), now)
            return Refuse(submit.request, "overloaded", f"{self._max_waiting} requests are waiting already", back_s)
        return None

    # Requests that wait -------------------------------------------------------------------------

    def grants(self, message: Grants, now: float) -> list[Effect]:
        """What the coordinator says of its queue."""
        grants, effects = self._binding.take_grants(message, now)
        for grant in grants:
            link = self._flights.links.get(grant.rank)
            # A life that is not known here yet: the grant comes again.
            if link is None or link.incarnation != grant.incarnation:
                continue
            held = self._binding.held.pop(grant.request, None)
            if held is not None:
                effects += self._bind(held, grant.rank, now, BROKER, "granted by the broker")
        return effects

    def stop(self, now: float) -> list[Effect]:
        """The coordinator is asked no more: it grants ranks that cannot be reached from here."""
        self._binding.stop()
        return self._bind_held(now) if self._flights.links else []

    def settle(self, now: float) -> list[Effect]:
        """What is known of the coordinator, the ranks or the suspension has changed: see to what waits."""
        effects = self.end_waiting(now)
        if self._binding.available or not self._flights.links:
            return effects
        return [*effects, *self._bind_held(now)]

    def _bind_held(self, now: float) -> list[Effect]:
        """There is no broker: bind what is held by this front-end's own accounting."""
        effects: list[Effect] = []
        for held in self._binding.give_up():
            rank = self._router.choose(_query(held.submit))
            if rank in self._flights.links:
                effects += self._bind(held, rank, now, "", "bound without the broker")
            else:
                effects.append(_misrouted(held.submit, rank))
        return effects

    def _bind(self, held: Held, rank: int, now: float, name: str, reason: str) -> list[Effect]:
        submit = held.submit
        decision = None
        if submit.explain:
            waited_ms = max(0, round((now - held.since) * 1000))
            decision = self._router.explain(rank, _query(submit), name, f"{reason}, waited {waited_ms} ms")
        return self._flights.send(submit, rank, decision, now, waited=True)

    def end_waiting(self, now: float) -> list[Effect]:
        """What waits is ended where there is nothing to wait for: no rank, for long, or a suspension that aborts."""
        if self._flights.links:
            self._rankless_since = None
        elif self._rankless_since is None:
            self._rankless_since = now
        if not self._binding.held:
            return []
        waiting = list(self._binding.held)
        if self._rankless_since is not None and now >= self._rankless_since + PATIENCE_S:
            refusals: list[Effect] = [Refuse(request, "no-rank", "no rank is ready") for request in waiting]
            return [*self._binding.drop(waiting, now), *refusals]
        if self._calls.suspended and self._calls.suspension.mode == "abort":
            aborted = [Output(request, [], finish_reason="abort") for request in waiting]
            return [*self._binding.drop(waiting, now), Deliver(aborted)]
        return []


def _query(submit: Submit) -> Query:
    return Query(len(submit.prompt_token_ids), submit.prompt_token_ids, submit.session, submit.priority)


def _misrouted(submit: Submit, rank: object) -> Refuse:
    return Refuse(submit.request, "misrouted", f"the policy chose rank {rank!r}, which is not there")
