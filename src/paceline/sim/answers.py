"""What the clients of one front-end got: each request's tokens, and how it ended. Nothing is lost, nothing comes twice.

Counted from what the front-end sends and hands on: its own books are asked for one figure alone, how many requests it
has, which must be those that have not ended.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from msgspec import Struct

from paceline.core.frontend.events import Refuse
from paceline.core.frontend.failover import HOLD_S, MOST_LOSSES
from paceline.core.frontend.inflight import FIRST_RESEND
from paceline.core.frontend.machine import Frontend
from paceline.core.requests import AddRequest, Output
from paceline.sim.world import Violation, World


class Answer(Struct):
    """What one client got: tokens, how it ended, and when (virtual seconds; -1 for not yet).

    `rank`: that has it, -1 for none. `losses`: ranks that it has lost since its last token, the last one at `lost_at`.
    """

    asked: float
    max_tokens: int
    rank: int = -1
    tokens: int = 0
    first: float = -1.0
    ended: float = -1.0
    finish_reason: str | None = None
    refused: str | None = None
    error: str | None = None
    abandoned: bool = False
    losses: int = 0
    lost_at: float = -1.0

    @property
    def over(self) -> bool:
        """Whether the client waits for nothing more."""
        return self.ended >= 0


class Answers(dict[int, Answer]):
    """By the client's number of the request, which stands at the head of its prompt too, where it may be sent again.

    `name`: of the front-end.
    """

    def __init__(self, clock: World, name: str) -> None:
        super().__init__()
        self.open = 0
        """Requests that have not ended."""
        self.moved = 0
        """Requests that went on at another rank."""
        self.on_end: Callable[[int], None] | None = None
        """Told of each request that has ended."""
        self._clock = clock
        self._name = name
        self._next = 1

    def asked(self, max_tokens: int, number: int | None = None) -> int:
        request = self.number() if number is None else number
        self[request] = Answer(self._clock.now, max_tokens)
        self.open += 1
        return request

    def number(self) -> int:
        """A number that nothing of this front-end has."""
        number, self._next = self._next, self._next + 1
        return number

    def hung_up(self, request: int) -> bool:
        """The client waits no longer. Returns whether it did."""
        answer = self[request]
        if answer.over:
            return False
        answer.abandoned = True
        self._end(request, answer)
        return True

    def sent(self, rank: int, message: AddRequest) -> None:
        """The request goes to a rank, which is to go on behind what the client has. It has no other one."""
        request = message.request if message.request < FIRST_RESEND else message.prompt_token_ids[0]
        answer = self._still(request, "sent")
        if len(message.made_token_ids) != answer.tokens:
            self._broken(f"request {request} goes on behind {len(message.made_token_ids)} of {answer.tokens} tokens")
        if answer.rank >= 0:
            self._broken(f"request {request} goes to rank {rank} too; rank {answer.rank} has it")
        self.moved += answer.lost_at >= 0
        answer.rank = rank

    def rank_lost(self, rank: int) -> None:
        for answer in self.values():
            if answer.rank == rank and not answer.over:
                answer.rank, answer.lost_at = -1, self._clock.now
                answer.losses += 1

    def delivered(self, output: Output) -> None:
        """The client is given tokens, perhaps the last ones. They follow on what it has."""
        answer = self._still(output.request, "given tokens")
        expected = list(range(answer.tokens, answer.tokens + len(output.token_ids)))
        if output.token_ids != expected:
            self._broken(f"request {output.request} got tokens {output.token_ids} in place of {expected}")
        if expected:
            answer.tokens += len(expected)
            answer.losses = 0
        if answer.first < 0:
            answer.first = self._clock.now
        if output.finish_reason is None:
            return
        answer.finish_reason, answer.error = output.finish_reason, output.error
        self._end(output.request, answer)
        if output.finish_reason == "error":
            self._broken(f"request {output.request} is lost: {output.error}")
        if output.finish_reason == "length" and answer.tokens != answer.max_tokens:
            self._broken(f"request {output.request} ended after {answer.tokens} of {answer.max_tokens} tokens")

    def refused(self, refusal: Refuse) -> None:
        """The client is told that it is not served. Where ranks have died, only after so many or so long."""
        answer = self._still(refusal.request, f"refused ({refusal.reason})")
        answer.refused = refusal.reason
        self._end(refusal.request, answer)
        patient = answer.lost_at >= 0 and self._clock.now >= answer.lost_at + HOLD_S
        if answer.lost_at >= 0 and answer.losses < MOST_LOSSES and not patient:
            self._broken(f"request {refusal.request} is lost, after {answer.losses} of its ranks: {refusal.text}")

    def none_lost(self, machine: Frontend) -> None:
        """All that have not ended are with a rank, or wait for one, as the machine's books say."""
        known = machine.in_flight() + len(machine.waiting_for_grant())
        if known != self.open:
            self._broken(f"{self.open} requests have not ended, and the front-end knows {known}")

    def _still(self, request: int, what: str) -> Answer:
        answer = self[request]
        if answer.over:
            self._broken(f"request {request} is {what} after it had ended")
        return answer

    def _end(self, request: int, answer: Answer) -> None:
        answer.ended = self._clock.now
        self.open -= 1
        if self.on_end is not None:
            self.on_end(request)

    def _broken(self, what: str) -> NoReturn:
        raise Violation(f"{self._name}: {what}", self._name)
