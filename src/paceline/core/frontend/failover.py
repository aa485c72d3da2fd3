"""Requests that have lost their ranks, and where they go on.

A request whose rank has died goes on at another one at once, by this front-end's own choice: it has waited for a rank
once. One that named its rank does so too: the answer matters more than the place. Where no rank is there, it waits for
the first that comes, for `hold_s`. Where a part of the answer is with the client and the engine cannot go on with
that, the client is told so; and likewise where a request has lost one rank after the other and no token was made in
between, since it may be what kills them. Where the death of one rank ends all (`together`), the first to go is the one
that was killed, and what the others had is innocent. A rank that was only silent is back in a moment and is not
counted, so a request that has lost that many waits until it is known of each whether it is dead, and kills no further
one meanwhile.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

from msgspec.structs import replace

from paceline.core.frontend.control import FrontendCalls
from paceline.core.frontend.events import Effect, Moved, Refuse
from paceline.core.frontend.inflight import InFlight, InFlightRequests, Router, query_of

HOLD_S = 600.0
"""By default. A rank that has died is back in seconds, one that loads a large model in minutes."""
MOST_LOSSES = 3
"""By default."""
LostBy = Literal["it could not be reached", "its connection ended", "it has ended", "it hangs in a step"]
"""What a rank did."""
TOGETHER_S = 10.0
"""Within this the other ranks have ended, whose collectives cannot go on without the first."""


class Failover:
    """What waits for any rank. `resumes`: whether the engine goes on with an answer that another rank has begun.
    `calls`: know whether the deployment is paused. `most_losses`: ranks that a request may lose without a token in
    between; with that many it is refused. `hold_s`: how long one waits for any rank. `together`: whether all ranks end
    with one.
    """

    INCIDENTAL = frozenset({"_why"})

    def __init__(
        self, all_inflight: InFlightRequests, router: Router, calls: FrontendCalls, *, resumes: bool,
        most_losses: int = MOST_LOSSES,
        hold_s: float = HOLD_S, together: bool = False,
    ) -> None:  # fmt: skip
        self._inflight = all_inflight
        self._router = router
        self._resumes = resumes
        self._calls = calls
        self._most_losses = most_losses
        self._hold_s = hold_s
        self._together = together
        self._first_at = float("-inf")
        self._waiting: dict[int, tuple[InFlight, float]] = {}
        self._why: dict[int, str] = {}
        """What became of the ranks of those that wait."""

    def __len__(self) -> int:
        """Requests that wait for a rank."""
        return len(self._waiting)

    @property
    def deadline(self) -> float:
        """When somebody has waited too long; infinite while nobody waits."""
        return min((since for _, since in self._waiting.values()), default=float("inf")) + self._hold_s

    def move(self, all_inflight: Iterable[InFlight], now: float, why: LostBy) -> list[Effect]:
        """Let requests that have lost their rank go on at others, as soon as there are any. `why`: what that did."""
        effects: list[Effect] = []
        innocent = self._together and now < self._first_at + TOGETHER_S
        self._first_at = self._first_at if innocent else now
        for inflight in all_inflight:
            handle, made = inflight.handle, len(inflight.made)
            # While the deployment is paused no rank computes a request: it is not what kills them.
            if not self._calls.suspended and not innocent:
                inflight.lost = [
                    *(inflight.lost if made == inflight.made_before else []),
                    (handle.rank, handle.incarnation),
                ]
                inflight.made_before = made
            if made and not self._resumes:
                text = f"rank {handle.rank} ended after {made} tokens of the answer"
                effects.append(
                    Refuse(inflight.submit.request, "rank-lost", f"{text}; this engine cannot go on with it")
                )
            else:
                self._waiting[inflight.submit.request] = (inflight, now)
                self._why[inflight.submit.request] = why
        return [*effects, *self.settle(now)]

    def stays(self, inflight: InFlight) -> bool:
        """Whether a request is better off with a rank that hangs than with any other: only that one can go on."""
        return bool(inflight.made) and not self._resumes

    def acquit(self, rank: int, incarnation: int) -> None:
        """This life of a rank is back: it was silent, or cut off, and no request has killed it."""
        waiting = [inflight for inflight, _ in self._waiting.values()]
        for inflight in [*self._inflight.of_all(), *waiting]:
            if inflight.lost:
                inflight.lost = [life for life in inflight.lost if life != (rank, incarnation)]

    def settle(self, now: float) -> list[Effect]:
        """Ranks have come, or are known to be dead, or time has passed."""
        effects: list[Effect] = []
        for request, (inflight, since) in list(self._waiting.items()):
            suspected = len(inflight.lost) >= self._most_losses
            rank = inflight.handle.rank
            if suspected and not self._may_be_back(inflight):
                text = f"rank {rank} ended while it served this request, the last of {self._most_losses} in a row"
                effects.append(Refuse(request, "rank-lost", text))
            elif self._inflight.handles and not suspected:
                effects += self._send(inflight)
            elif now >= since + self._hold_s:
                text = f"rank {rank} ended while it served this request, and none was ready within {self._hold_s:g} s"
                effects.append(Refuse(request, "rank-lost", text))
            else:
                continue
            del self._waiting[request]
            self._why.pop(request, None)
        return effects

    def _may_be_back(self, inflight: InFlight) -> bool:
        """Whether a rank that it has lost is not known to be dead: its connection has ended, and may come up again."""
        down = self._inflight.down
        return any(rank in down and down[rank].incarnation == life for rank, life in inflight.lost)

    def drop(self, requests: Iterable[int]) -> None:
        for request in requests:
            self._waiting.pop(request, None)
            self._why.pop(request, None)

    def _send(self, inflight: InFlight) -> list[Effect]:
        submit = inflight.submit
        rank = self._router.choose(replace(query_of(submit), prompt_tokens=inflight.tokens))
        if rank not in self._inflight.handles:
            return [Refuse(submit.request, "misrouted", f"the policy chose rank {rank!r}, which is not there")]
        before, tokens, why = inflight.handle.rank, len(inflight.made), self._why.get(submit.request, "")
        moved = Moved(submit.request, before, rank, tokens, why, submit.name)
        return [*self._inflight.send_again(inflight, rank), moved]
