"""Why a request was slow: its timeline, kept for a while after it has ended.

A `Timeline` is one request of a client: when it was received and tokenized, and its choices, each of which is a request
of its own to the ranks. Of a choice there are the stamps of this front-end's clock (submitted, placed, each token),
what others measured by clocks of their own (how long it waited at the coordinator; at each rank, how long until the
engine had it and until its first token), where it moved and why, and what the choice of its rank was based on. Clocks
of two machines are never compared: what others say are spans.

Kept are the last `LAST` of this front-end, and the slowest `SLOWEST` of the last hour, encoded: ten thousand objects of
many parts each would be work for the garbage collector. Of an answer at most `STAMPS` tokens' times are kept, each k-th
of a longer one, with the longest gap and where it was.

A streamed token must cost next to nothing, so one loop serves both: the times of tokens are noted here, and the counts
that metrics are made of come out as one `Step`.
"""

from __future__ import annotations

import heapq
from array import array
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from operator import sub
from typing import Any

import msgspec
from msgspec import Struct

from paceline.core.coordinator.events import Note
from paceline.core.frontend.events import Moved, Placed, Refuse
from paceline.core.requests import Output
from paceline.core.routing.policy import Decision

LAST = 10_000
SLOWEST = 1_000
SLOW_FOR_S = 3600.0
LOOK_S = 60.0
"""How often those that are older are forgotten."""
STAMPS = 256
MOVES_KEPT = 64
UNKNOWN = -1


class Stay(Struct):
    """At a rank: since when, behind how many tokens of the answer, and why it came there where it has moved.

    `door_us`, `computed_us`: as in messages.Timing, by the rank's clock.
    """

    rank: int
    since: float
    tokens: int = 0
    why: str = ""
    door_us: int | None = None
    computed_us: int | None = None


class Ended(Struct, omit_defaults=True):
    """A choice as it is kept. Times by the front-end's monotonic clock.

    `stamps`: when its tokens came, as doubles: of each `every`-th. `longest_s`: the longest time between two of them,
    `longest_after`: behind how many. `queued`: it has waited before all ranks, of that `coordinator_ms` by the
    coordinator's word. `reason`: the finish reason, or why it was refused; empty while it is under way.
    """

    submitted: float
    placed: float | None = None
    queued: bool = False
    coordinator_ms: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    tokens: int = 0
    stays: list[Stay] = []
    decision: Decision | None = None
    stamps: bytes = b""
    every: int = 1
    longest_s: float = 0.0
    longest_after: int = 0
    ended: float | None = None
    reason: str = ""


class Kept(Struct, omit_defaults=True):
    """A timeline as it is kept. `status`: of the HTTP answer, 0 where there was none: the client had gone."""

    name: str
    path: str
    client: str
    received: float
    read: float
    tokenized: float
    choices: list[Ended]
    ended: float | None = None
    status: int = 0
    also: str = ""


class Choice:
    """One request to the ranks, under way or ended."""

    __slots__ = (
        "begun", "cached", "coordinator_ms", "decision", "ended", "extra", "placed", "prompt", "queued", "rank",
        "reason", "request", "stamps", "stays", "submitted",
    )  # fmt: skip

    def __init__(self, request: int, prompt: int, now: float) -> None:
        self.request, self.prompt, self.submitted = request, prompt, now
        self.rank, self.begun = UNKNOWN, False
        self.placed: float | None = None
        self.queued, self.coordinator_ms = False, 0
        self.decision: Decision | None = None
        self.stays: list[Stay] = []
        self.stamps: list[float] = []
        """When outputs came; `extra`: tokens of them beyond one each."""
        self.extra = self.cached = 0
        self.ended: float | None = None
        self.reason = ""

    def kept(self) -> Ended:
        stamps = self.stamps
        every, longest, after = 1, 0.0, 0
        if len(stamps) > 1:
            gaps = list(map(sub, stamps[1:], stamps))
            longest = max(gaps)
            after = gaps.index(longest) + 1
            every = -(-(len(stamps) - 1) // STAMPS)
        shown = stamps[::every] if every > 1 else stamps
        return Ended(
            self.submitted, self.placed, self.queued, self.coordinator_ms, self.prompt, self.cached,
            len(stamps) + self.extra, self.stays, self.decision, array("d", shown).tobytes(), every, longest, after,
            self.ended, self.reason,
        )  # fmt: skip


class Timeline:
    """One request of a client. `name`: what it is called everywhere; `also`: the id that its answer has. `received`:
    its head, `read`: all of it. `trace`: what its front-end keeps about its trace, where it makes one.
    """

    __slots__ = ("also", "choices", "client", "name", "path", "read", "received", "tokenized", "trace")

    def __init__(
        self, name: str, path: str = "", client: str = "", received: float = 0.0, read: float = 0.0,
        tokenized: float = 0.0, also: str = "",
    ) -> None:  # fmt: skip
        self.name, self.path, self.client, self.also = name, path, client, also
        self.received, self.read, self.tokenized = received, read, tokenized
        self.choices: list[Choice] = []
        self.trace: Any = None

    def kept(self, ended: float | None = None, status: int = 0) -> Kept:
        choices = [choice.kept() for choice in self.choices]
        return Kept(
            self.name, self.path, self.client, self.received, self.read, self.tokenized, choices, ended, status,
            self.also,
        )  # fmt: skip


class Step(Struct):
    """What one step of a rank brought: tokens, and requests of it that already had some.

    `began`, `ended`: choices that got their first token, or their last one.
    """

    rank: int
    tokens: int
    going_on: int
    began: Sequence[Choice] = ()
    ended: Sequence[Choice] = ()


class Timelines:
    """Of one front-end. `slow_s`: requests that took so long are told of, None for none."""

    def __init__(
        self, slow_s: float | None = None, *, last: int = LAST, slowest: int = SLOWEST, slow_for_s: float = SLOW_FOR_S
    ) -> None:
        self._slow_s = slow_s
        self._most_slow, self._slow_for_s = slowest, slow_for_s
        self._under_way: dict[int, Timeline] = {}
        """By the identity of the object."""
        self._choices: dict[int, Choice] = {}
        """By request, those that have not ended."""
        self._names: dict[int, str] = {}
        self._last: deque[tuple[str, str, bytes]] = deque(maxlen=last)
        # The fastest of them first: seconds, a number that no two have, when it ended, and as in `_last`.
        self._slowest: list[tuple[float, int, float, tuple[str, str, bytes]]] = []
        self._count = 0
        self._look_at = 0.0
        self.made: Counter[int] = Counter()
        """By rank, all tokens so far; `prompts`: of requests that have begun, of which `cached`."""
        self.prompts: Counter[int] = Counter()
        self.cached: Counter[int] = Counter()

    # What happens -------------------------------------------------------------------------------

    def began(self, timeline: Timeline) -> None:
        self._under_way[id(timeline)] = timeline

    def name(self, request: int) -> str:
        """What the client's request is called that this is one of; empty where nobody has said."""
        return self._names.get(request, "")

    def submitted(self, request: int, prompt_tokens: int, timeline: Timeline | None, now: float) -> None:
        self._choices[request] = choice = Choice(request, prompt_tokens, now)
        if timeline is not None:
            timeline.choices.append(choice)
            self._names[request] = timeline.name

    def placed(self, placed: Placed, now: float) -> float | None:
        """Returns how long it has waited for the rank, where it is known."""
        choice = self._choices.get(placed.request)
        if choice is None:
            return None
        choice.rank, choice.placed = placed.rank, now
        choice.queued, choice.coordinator_ms, choice.decision = placed.queued, placed.waited_ms, placed.decision
        choice.stays.append(Stay(placed.rank, now))
        return now - choice.submitted

    def moved(self, moved: Moved, now: float) -> None:
        choice = self._choices.get(moved.request)
        if choice is None:
            return
        choice.rank = moved.rank
        if len(choice.stays) < MOVES_KEPT:
            choice.stays.append(Stay(moved.rank, now, moved.tokens, f"rank {moved.before}: {moved.why}"))

    def refused(self, refusal: Refuse, now: float) -> None:
        choice = self._choices.pop(refusal.request, None)
        if choice is not None:
            choice.ended, choice.reason = now, refusal.reason

    def gone(self, requests: Iterable[int], now: float) -> list[Choice]:
        """Nobody waits for these any more; returns those that had not ended."""
        left = []
        for request in requests:
            self._names.pop(request, None)
            choice = self._choices.pop(request, None)
            if choice is not None:
                choice.ended, choice.reason = now, "abort"
                left.append(choice)
        return left

    def outputs(self, outputs: Sequence[Output], now: float) -> Step:
        """One step's outputs of one rank."""
        choices, tokens, going_on, rank = self._choices, 0, 0, UNKNOWN
        step = None
        for output in outputs:
            made = len(output.token_ids)
            tokens += made
            choice = choices.get(output.request)
            if choice is None:
                continue
            rank = choice.rank
            if made:
                choice.stamps.append(now)
                if made > 1:
                    choice.extra += made - 1
            if choice.begun and output.finish_reason is None and output.timing is None:
                going_on += 1
                continue
            going_on += choice.begun
            step = step or Step(rank, 0, 0, [], [])
            self._begins_or_ends(choice, output, step, now)
        if rank >= 0:
            self.made[rank] += tokens
        if step is None:
            return Step(rank, tokens, going_on)
        step.rank, step.tokens, step.going_on = rank, tokens, going_on
        return step

    def _begins_or_ends(self, choice: Choice, output: Output, step: Step, now: float) -> None:
        if output.timing is not None and choice.stays:
            choice.stays[-1].door_us, choice.stays[-1].computed_us = output.timing.waited_us, output.timing.computed_us
        if output.token_ids and not choice.begun:
            choice.begun, choice.cached = True, output.cached_tokens
            self.prompts[choice.rank] += choice.prompt
            self.cached[choice.rank] += choice.cached
            step.began = [*step.began, choice]
        if output.finish_reason is not None:
            del self._choices[output.request]
            choice.ended, choice.reason = now, output.finish_reason
            step.ended = [*step.ended, choice]

    def ended(self, timeline: Timeline, status: int, now: float) -> tuple[Kept, list[Note]]:
        """The client has its answer, or has gone: keep it. Returns it, and what is to be logged."""
        self._under_way.pop(id(timeline), None)
        kept = timeline.kept(now, status)
        seconds = now - timeline.received
        entry = (timeline.name, timeline.also, _encode(kept))
        self._last.append(entry)
        self._keep_slow(seconds, entry, now)
        if self._slow_s is None or seconds < self._slow_s:
            return kept, []
        return kept, [Note(f"slow: {in_words(kept)}", True, request=timeline.name)]

    def _keep_slow(self, seconds: float, entry: tuple[str, str, bytes], now: float) -> None:
        if now >= self._look_at:
            self._look_at = now + min(LOOK_S, self._slow_for_s)
            self._slowest = [one for one in self._slowest if one[2] > now - self._slow_for_s]
            heapq.heapify(self._slowest)
        self._count += 1
        one = (seconds, self._count, now, entry)
        if len(self._slowest) < self._most_slow:
            heapq.heappush(self._slowest, one)
        elif seconds > self._slowest[0][0]:
            heapq.heapreplace(self._slowest, one)

    # What is known ------------------------------------------------------------------------------

    def find(self, name: str) -> list[Kept]:
        """All requests of this name, or whose answer had this id, the newest first: a client may use one again."""
        if not name:
            return []
        under_way = [one.kept() for one in self._under_way.values() if name in (one.name, one.also)]
        found = {id(entry): entry for entry in self._entries() if name in entry[:2]}
        kept = [_decode(data) for _, _, data in found.values()]
        return sorted([*under_way, *kept], key=lambda one: one.received, reverse=True)

    def newest(self, most: int) -> list[Kept]:
        under_way = [one.kept() for one in list(self._under_way.values())[-most:]]
        ended = [_decode(self._last[-back][2]) for back in range(1, min(most, len(self._last)) + 1)]
        return [*reversed(under_way), *ended][:most]

    def slowest(self, most: int) -> list[Kept]:
        return [_decode(entry[2]) for _, _, _, entry in heapq.nlargest(most, self._slowest)]

    def _entries(self) -> Iterator[tuple[str, str, bytes]]:
        yield from self._last
        for _, _, _, entry in self._slowest:
            yield entry


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Kept).decode


# For people -----------------------------------------------------------------------------------------


def shown(kept: Kept, now: float, wall: float) -> dict[str, Any]:
    """A timeline as JSON: seconds since the request was received. `now`, `wall`: the two clocks at this moment."""
    begin = kept.received
    said: dict[str, Any] = {
        "id": kept.name, "response_id": kept.also, "path": kept.path, "client": kept.client,
        "received_at": round(wall - (now - begin), 3), "status": kept.status,
        "under_way": kept.ended is None,
        "seconds": _since(now if kept.ended is None else kept.ended, begin),
        "read_s": _since(kept.read, begin), "tokenized_s": _since(kept.tokenized, begin),
        "choices": [_choice(one, begin) for one in kept.choices],
    }  # fmt: skip
    return said


def _since(when: float | None, begin: float) -> float | None:
    return None if when is None else round(when - begin, 6)


def _choice(one: Ended, begin: float) -> dict[str, Any]:
    stamps = array("d", one.stamps)
    return {
        "prompt_tokens": one.prompt_tokens, "cached_tokens": one.cached_tokens, "tokens": one.tokens,
        "submitted_s": _since(one.submitted, begin),
        "queued": one.queued, "queued_at_coordinator_s": None if one.placed is None else one.coordinator_ms / 1000,
        "placed_s": _since(one.placed, begin),
        "first_token_s": _since(stamps[0], begin) if stamps else None,
        "ended_s": _since(one.ended, begin), "finish_reason": one.reason or None,
        "ranks": [
            {"rank": stay.rank, "since_s": _since(stay.since, begin), "behind_tokens": stay.tokens, "why": stay.why,
             "until_engine_s": None if stay.door_us is None else stay.door_us / 1e6,
             "until_token_s": None if stay.computed_us is None else stay.computed_us / 1e6}
            for stay in one.stays
        ],
        "routing": None if one.decision is None else msgspec.to_builtins(one.decision),
        "gaps": {
            "tokens_each": one.every,
            "seconds": [round(gap, 6) for gap in map(sub, stamps[1:], stamps)],
            "longest_s": round(one.longest_s, 6), "longest_after_token": one.longest_after,
        },
    }  # fmt: skip


def parts(choice: Ended, kept: Kept) -> list[tuple[str, float]]:
    """Where the time of a choice went, one part after the other."""
    found = [("read", kept.read - kept.received), ("tokenized", kept.tokenized - kept.read)]
    if choice.placed is None:
        until = choice.ended if choice.ended is not None else choice.submitted
        return [*found, ("waited for a rank", until - choice.submitted)]
    found.append(("queued" if choice.queued else "placed", choice.placed - choice.submitted))
    stamps = array("d", choice.stamps)
    if not stamps:
        return found if choice.ended is None else [*found, ("no token", choice.ended - choice.placed)]
    first = stamps[0] - choice.placed
    stay = choice.stays[0] if choice.stays else None
    if stay is not None and stay.door_us is not None and stay.door_us / 1e6 <= first:
        found.append((f"at rank {stay.rank}'s door", stay.door_us / 1e6))
        first -= stay.door_us / 1e6
    found.append(("to the first token", first))
    if choice.ended is not None:
        found.append((f"{choice.tokens} tokens", choice.ended - stamps[0]))
    return found


def in_words(kept: Kept) -> str:
    """One line: what took how long. Of several choices the one that ended last."""
    seconds = (kept.ended or kept.received) - kept.received
    line = f"request {kept.name}: {seconds:.3f} s"
    if not kept.choices:
        return line
    choice = max(kept.choices, key=lambda one: one.ended or 0.0)
    line += ": " + ", ".join(f"{what} {took:.3f}" for what, took in parts(choice, kept))
    if choice.longest_s:
        line += f" (longest gap {choice.longest_s:.3f} after token {choice.longest_after})"
    line += f", {choice.prompt_tokens} prompt tokens, {choice.cached_tokens} of them cached"
    for stay in choice.stays[1:]:
        line += f", moved to rank {stay.rank} behind {stay.tokens} tokens ({stay.why})"
    return line
