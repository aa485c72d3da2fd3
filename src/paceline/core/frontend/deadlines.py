"""Requests that must be answered by a time (`X-Request-Deadline-Ms`): what cannot be is refused, not served late.

When it comes: where the wait, the prompt and an answer of the usual length would take longer. While it waits: from the
moment on at which it could not be answered in time even if it began at once. What has begun goes on. All three are
predicted from what the ranks measure and from how fast this front-end's requests end; where nothing is known yet,
nothing is refused before its time is over.
"""

from __future__ import annotations

from collections.abc import Container
from heapq import heapify, heappop, heappush
from math import ceil

from paceline.core.frontend.events import Refuse, Submit
from paceline.core.frontend.inflight import LONGEST_S, InFlightRequests

TIDY_FROM = 1024
"""So many are kept at least before those are looked for that do not wait any more."""


class Deadlines:
    """Of the requests of one front-end. Times in seconds."""

    def __init__(self, inflight: InFlightRequests) -> None:
        self._inflight = inflight
        # By the time from which on it is too late to begin.
        self._waiting: list[tuple[float, int]] = []
        self._tidy_from = TIDY_FROM

    @property
    def due(self) -> float:
        """When the next of those that wait cannot be answered in time any more; infinite for never."""
        return self._waiting[0][0] if self._waiting else float("inf")

    def refusal(self, submit: Submit, ahead: float, frontends: int, now: float) -> Refuse | None:
        """Why a request with a deadline is refused as it comes, None where it may be in time.

        `ahead`: those that begin before it; `frontends`: how many share the ranks.
        """
        under_way, alone_s = len(self._inflight) * frontends, self.answer_s(submit)
        needed_s = self._inflight.retry_after.wait_s(ahead, under_way, alone_s) + alone_s
        return None if now + needed_s <= submit.deadline else _late(submit.request, needed_s, submit.deadline - now)

    def waits(self, submit: Submit, others: Container[int]) -> None:
        """The request waits for a rank, as these do."""
        if submit.deadline == float("inf"):
            return
        heappush(self._waiting, (submit.deadline - self.answer_s(submit), submit.request))
        if len(self._waiting) > self._tidy_from:
            self._waiting = [one for one in self._waiting if one[1] in others or one[1] == submit.request]
            heapify(self._waiting)
            self._tidy_from = TIDY_FROM + 2 * len(self._waiting)

    def late(self, now: float) -> list[int]:
        """Those that it is too late for, if they still wait; each is named once."""
        found = []
        while self._waiting and self._waiting[0][0] <= now:
            found.append(heappop(self._waiting)[1])
        return found

    def answer_s(self, submit: Submit) -> float:
        """How long its prompt, and an answer of the usual length, take a rank that has nothing ahead of it."""
        loads = (handle.load for handle in self._inflight.handles.values())
        load = next((load for load in loads if load.prompt_token_s or load.step_s or load.answer_token_s), None)
        if load is None:
            return 0.0
        params = submit.params
        usual = params.max_tokens if params.ignore_eos else max(1, params.min_tokens, load.answer_tokens)
        tokens = min(params.max_tokens, usual)
        step_s = load.step_s + load.answer_token_s * load.decoding
        return len(submit.prompt_token_ids) * load.prompt_token_s + tokens * step_s


def too_late(request: int) -> Refuse:
    """One that has waited for as long as it could."""
    return Refuse(request, "late", "X-Request-Deadline-Ms: it cannot be answered in time any more")


def _late(request: int, needed_s: float, allowed_s: float) -> Refuse:
    text = (f"X-Request-Deadline-Ms: it would take about {1000 * needed_s:.0f} ms now, and "
            f"{max(0, 1000 * allowed_s):.0f} are left")  # fmt: skip
    return Refuse(request, "late", text, max(1, min(LONGEST_S, ceil(needed_s - allowed_s))))
