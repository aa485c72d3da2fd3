"""Requests that have lost their ranks, and where they go on.

A request whose rank has died goes on at another one at once, by this front-end's own choice: it has waited for a rank
once. One that named its rank does so too: the answer matters more than the place. Where no rank is there, it waits for
the first that comes, for `PATIENCE_S`. Where a part of the answer is with the client and the engine cannot go on with
that, the client is told so; and likewise where a request has lost one rank after the other and no token was made in
between, since it may be what kills them.
"""

from __future__ import annotations

from collections.abc import Iterable

from paceline.protocol.frontend_events import Effect, Refuse
from paceline.protocol.frontends.calls import FrontEndCalls
from paceline.protocol.frontends.flights import Flight, Flights
from paceline.protocol.frontends.router import Router
from paceline.protocol.routing.policy import Query

PATIENCE_S = 60.0
"""A rank that has died needs this long at most to be back, as a rule."""
MOST_LOSSES = 3
"""Ranks that a request may lose without a token in between."""


class Stranded:
    """What waits for any rank. `resumes`: whether the engine goes on with an answer that another rank has begun.
    `calls`: know whether the deployment is suspended.
    """

    def __init__(self, flights: Flights, router: Router, calls: FrontEndCalls, *, resumes: bool) -> None:
        self._flights = flights
        self._router = router
        self._resumes = resumes
        self._calls = calls
        self._waiting: dict[int, tuple[Flight, float]] = {}

    def __len__(self) -> int:
        """Requests that wait for a rank."""
        return len(self._waiting)

    @property
    def deadline(self) -> float:
        """When somebody has waited too long; infinite while nobody waits."""
        return min((since for _, since in self._waiting.values()), default=float("inf")) + PATIENCE_S

    def move(self, flights: Iterable[Flight], now: float) -> list[Effect]:
        """Let requests that have lost their rank go on at others, as soon as there are any."""
        effects: list[Effect] = []
        for flight in flights:
            # While the deployment is suspended no rank computes a request: it is not what kills them.
            if not self._calls.suspended:
                flight.losses = flight.losses + 1 if len(flight.made) == flight.made_before else 1
                flight.made_before = len(flight.made)
            if flight.losses >= MOST_LOSSES:
                text = f"rank {flight.link.rank} ended while it served this request, the {MOST_LOSSES}rd in a row"
                effects.append(Refuse(flight.submit.request, "rank-lost", text))
            elif flight.made and not self._resumes:
                text = f"rank {flight.link.rank} ended after {len(flight.made)} tokens of the answer"
                effects.append(Refuse(flight.submit.request, "rank-lost", f"{text}; this engine cannot go on with it"))
            else:
                self._waiting[flight.submit.request] = (flight, now)
        return [*effects, *self.settle(now)]

    def settle(self, now: float) -> list[Effect]:
        """Ranks have come, or time has passed."""
        effects: list[Effect] = []
        if self._flights.links:
            waiting, self._waiting = self._waiting, {}
            for flight, _ in waiting.values():
                effects += self._send(flight)
        elif now >= self.deadline:
            over = [request for request, (_, since) in self._waiting.items() if now >= since + PATIENCE_S]
            for request in over:
                rank = self._waiting.pop(request)[0].link.rank
                text = f"rank {rank} ended while it served this request, and none was ready within {PATIENCE_S:g} s"
                effects.append(Refuse(request, "rank-lost", text))
        return effects

    def drop(self, requests: Iterable[int]) -> None:
        """The clients of these have gone."""
        for request in requests:
            self._waiting.pop(request, None)

    def _send(self, flight: Flight) -> list[Effect]:
        submit = flight.submit
        rank = self._router.choose(Query(flight.tokens, submit.prompt_token_ids, submit.session, submit.priority))
        if rank not in self._flights.links:
            return [Refuse(submit.request, "misrouted", f"the policy chose rank {rank!r}, which is not there")]
        return self._flights.send_again(flight, rank)
