"""The headers of an answer for text: which ranks serve it, known once each of its requests has one."""

from __future__ import annotations

from paceline.core.routing.policy import Decision
from paceline.server.routing_header import ROUTING_HEADER, routing_value

RANK_HEADER = b"x-data-parallel-rank"


class Head:
    """What is told before the text. `choices`: requests that get a rank each; `explain`: whether to say why."""

    __slots__ = ("_decisions", "_ranks", "_unplaced", "request_id")

    def __init__(self, request_id: str, choices: int, explain: bool) -> None:
        self.request_id = request_id
        self._unplaced = choices
        self._ranks: list[int] = []
        self._decisions: list[Decision] | None = [] if explain else None

    @property
    def explains(self) -> bool:
        """Whether the client wants to know why."""
        return self._decisions is not None

    @property
    def complete(self) -> bool:
        """Whether every request has a rank."""
        return not self._unplaced

    def placed(self, rank: int, decision: Decision | None) -> None:
        """One more request has a rank."""
        self._unplaced -= 1
        if rank not in self._ranks:
            self._ranks.append(rank)
        if self._decisions is not None and decision is not None:
            self._decisions.append(decision)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """What is known so far: the ranks in order of first use."""
        found = [(b"x-request-id", self.request_id.encode("latin-1", "replace"))]
        if self._ranks:
            found.append((RANK_HEADER, ",".join(map(str, self._ranks)).encode()))
        if self._decisions is not None:
            found.append((ROUTING_HEADER, routing_value(self._decisions)))
        return found
