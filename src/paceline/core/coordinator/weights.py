"""The coordinator's part in new weights: a numbered transaction of all ranks within a pause (`transaction.py`).

While all ranks are paused, an odd number names weights that each makes ready beside those it has, a file of safetensors
read or a second model loaded. When all have, the even number behind it puts them in force, and each rank takes them
before its next step; where one cannot, or time is up, the even number leaves all with what they have. Which it is, is
decided once and here. The word travels with the pause (`Suspension.weights`), so that whoever hears that it may step
again hears with what; nobody is told so while the number is odd.

A rank that dies comes back with the weights that it starts with, and is told when it is admitted, before it serves. A
new coordinator takes up the newest word that ranks and front-ends know. One that is odd it goes on with, under a number
of its own and for the same weights: the last one may have decided, and have told somebody that has not spoken yet.
"""

from __future__ import annotations

from collections.abc import Sequence

from msgspec.structs import replace

from paceline.core.requests import Outcome, UpdateWeights, Weights, WeightsOfRank
from paceline.core.transaction import Transaction


class WeightUpdate(Transaction):
    """Which weights are in force, and what is under way."""

    def __init__(self) -> None:
        super().__init__()
        self.state = Weights()
        self._deadline: float | None = None
        self._said: dict[int, WeightsOfRank] = {}

    @property
    def number(self) -> int:
        return self.state.number

    @property
    def due(self) -> float | None:
        """When time is up; None while nothing is under way. What is to be said the pause says."""
        return self._deadline

    @property
    def told(self) -> Weights | None:
        return self.state if self.state.number else None

    def ask(self, request: UpdateWeights, paused: bool, now: float) -> tuple[int, str]:
        """Somebody asks for this. Returns the number at which it is so, or 0 and why it cannot be. `paused`: all ranks
        are.
        """
        state = self.state
        match request.action:
            case "rename" if not state.under_way:
                self._change(replace(state, number=state.number + 2, version=request.version, outcome="done"), now)
            case "stage" if not state.under_way and paused:
                number = state.number + 1
                self._change(
                    replace(
                        state, number=number, next=number, next_version=request.version, next_source=request.source,
                        keep_kv=request.keep_kv, commit=request.commit, timeout_ms=request.timeout_ms,
                        outcome="done", why="",
                    ),
                    now,
                )  # fmt: skip
            case "commit" if state.under_way:
                version = request.version or state.next_version
                self._change(replace(state, number=state.number + 2, next_version=version, commit=True), now)
            case "drop" if state.under_way:
                self._end("failed", "it was given up", now)
            case "commit" | "drop":
                return 0, "no update of the weights is under way"
            case _:
                return 0, "an update of the weights is under way" if state.under_way else "the ranks are not paused"
        return self.number, ""

    # What ranks say -----------------------------------------------------------------------------

    def learn(self, weights: Weights | None, now: float) -> bool:
        """Somebody knows this. Returns whether it is news."""
        if weights is None or not self.is_news(weights.number):
            return False
        self._change(replace(weights, number=weights.number + 2) if weights.under_way else weights, now)
        return True

    def heard(self, rank: int, said: WeightsOfRank | None) -> None:
        self._said[rank] = said or WeightsOfRank(Weights())

    def forget(self, rank: int) -> None:
        self._said.pop(rank, None)

    def lacks(self, rank: int) -> bool:
        """Whether a rank has not done what the number asks."""
        state, said = self.state, self._said.get(rank)
        if not state.number:
            return False
        if said is None or said.known.number != state.number or said.has != state.current:
            return True
        return state.under_way and said.ready != state.next

    def advance(self, expected: Sequence[int], now: float) -> bool:
        """Decide, if that can be; returns whether there is a new word. `expected`: ranks that count."""
        state = self.state
        if not state.under_way:
            return False
        failed = [
            f"rank {rank}: {said.why}" for rank in expected
            if (said := self._said.get(rank)) is not None and said.failed == state.next
        ]  # fmt: skip
        lacking = [rank for rank in expected if self.lacks(rank)]
        if failed:
            return self._end("failed", "; ".join(failed), now)
        if self._deadline is not None and now >= self._deadline:
            return self._end("late", f"not ready in time at rank {', '.join(map(str, lacking)) or 'none'}", now)
        if lacking or not state.commit:
            return False
        done = replace(
            state, number=state.number + 1, current=state.next, version=state.next_version, source=state.next_source,
            next=0, next_version="", next_source="",
        )  # fmt: skip
        return self._change(done, now)

    def _end(self, outcome: Outcome, why: str, now: float) -> bool:
        rest = {"next": 0, "next_version": "", "next_source": ""}
        return self._change(replace(self.state, number=self.number + 1, outcome=outcome, why=why[:1024], **rest), now)

    def _change(self, state: Weights, now: float) -> bool:
        self.state = state
        self._deadline = now + state.timeout_ms / 1000 if state.under_way else None
        return True
