"""The requests of one rank: whose they are, how many of each front-end's were taken in, which are held.

The engine knows a request by the rank's own `key`; front-ends know it by theirs. While the deployment is
paused, new requests are held here and the engine does not hear of them; they count as waiting.

What waits for a front-end that does not read: of each request, its outputs put together.

So it takes as much memory as the answers of the requests that the front-end has here, and no more, however long it
is away; and when it reads again, it gets all of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from paceline.core.load import Load
from paceline.core.rank.events import Drop, Effect, StepOutput, Take, ToFrontend
from paceline.core.requests import AddRequest, FinishReason, Output, Outputs

Pair = tuple[int, int]
"""(front-end, its own id of the request)."""

FRONTENDS_KEPT = 256
"""Front-ends whose sends are counted, beyond those that are connected: lives that are over are never heard again."""


class RankRequests:
    """All requests of one life of a rank."""

    INCIDENTAL = frozenset({"finished", "void"})

    def __init__(self, rank: int, incarnation: int) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.taken: dict[int, int] = {}
        self.finished = 0
        self.void = 0
        self._keys: dict[Pair, int] = {}
        self._owners: dict[int, Pair] = {}
        self._kept_back: dict[Pair, AddRequest] = {}
        self._next_key = 1

    def __len__(self) -> int:
        """Requests that the engine has."""
        return len(self._keys)

    @property
    def kept_back(self) -> int:
        """Requests held back from the engine."""
        return len(self._kept_back)

    def arrive(self, frontend: int, request: AddRequest) -> list[Effect]:
        """A request came in: it counts as taken. Returns its refusal where it is not for this life, or comes twice."""
        pair = (frontend, request.request)
        if request.incarnation != self.incarnation:
            self.void += 1
            return [self._end(pair, "error", f"rank {self.rank}: meant for another life of this rank")]
        self.taken[frontend] = max(request.number, self.taken.get(frontend, 0))
        if pair in self._keys or pair in self._kept_back:
            self.void += 1
            return [self._end(pair, "error", f"rank {self.rank}: sent twice")]
        return []

    def take(self, frontend: int, request: AddRequest) -> Effect:
        """Give it to the engine."""
        key = self._next_key
        self._next_key += 1
        pair = (frontend, request.request)
        self._keys[pair] = key
        self._owners[key] = pair
        return Take(key, request)

    def hold(self, frontend: int, request: AddRequest) -> None:
        """Keep it from the engine until `take_kept_back`."""
        self._kept_back[(frontend, request.request)] = request

    def take_kept_back(self) -> list[Effect]:
        """Give all that is held to the engine, in the order in which it came."""
        kept, self._kept_back = self._kept_back, {}
        return [self.take(frontend, request) for (frontend, _), request in kept.items()]

    def refuse(self, frontend: int, request: AddRequest) -> Effect:
        """End a request that came while all are aborted."""
        return self._end((frontend, request.request), "abort", None)

    def drop(self, frontend: int, requests: Sequence[int]) -> list[Effect]:
        """Nobody waits for these any more."""
        return self._drop([(frontend, request) for request in requests])

    def drop_frontend(self, frontend: int) -> list[Effect]:
        """Nobody waits for this front-end's requests any more.

        How many of its sends were taken is kept: it may be there all the same, and only its connection new.
        """
        if len(self.taken) > FRONTENDS_KEPT:
            busy = {owner for owner, _ in (*self._keys, *self._kept_back)}
            idle = next((one for one in self.taken if one not in busy and one != frontend), None)
            if idle is not None:
                del self.taken[idle]
        return self._drop([pair for pair in (*self._keys, *self._kept_back) if pair[0] == frontend])

    def abort_all(self) -> list[Effect]:
        """End every request, and tell whose it was."""
        pairs = [*self._keys, *self._kept_back]
        return self._drop(pairs) + [self._end(pair, "abort", None) for pair in pairs]

    def hand_out(self, outputs: Sequence[StepOutput]) -> list[Effect]:
        """What a step made, one message a front-end."""
        by_frontend: dict[int, list[Output]] = {}
        owners = self._owners
        for out in outputs:
            owner = owners.get(out.key)
            if owner is None:
                continue
            frontend, request = owner
            if out.finish_reason is not None:
                del owners[out.key]
                del self._keys[owner]
                self.finished += 1
            by_frontend.setdefault(frontend, []).append(
                Output(request, out.token_ids, out.text, out.finish_reason, out.stop_reason, out.logprobs, out.error)
            )
        return [ToFrontend(to, Outputs(self.rank, self.incarnation, made)) for to, made in by_frontend.items()]

    def load(self, engine: Load) -> Load:
        """The engine's load, with what is held, and what has been finished."""
        if not self._kept_back:
            return msgspec.structs.replace(engine, finished=self.finished)
        tokens = sum(request.tokens for request in self._kept_back.values())
        return msgspec.structs.replace(
            engine,
            waiting=engine.waiting + len(self._kept_back),
            prefill_tokens=engine.prefill_tokens + tokens,
            finished=self.finished,
        )

    def _drop(self, pairs: Sequence[Pair]) -> list[Effect]:
        effects: list[Effect] = []
        for pair in pairs:
            if self._kept_back.pop(pair, None) is not None:
                self.finished += 1
            key = self._keys.pop(pair, None)
            if key is not None:
                del self._owners[key]
                self.finished += 1
                effects.append(Drop(key))
        return effects

    def _end(self, pair: Pair, reason: FinishReason, error: str | None) -> Effect:
        frontend, request = pair
        return ToFrontend(
            frontend, Outputs(self.rank, self.incarnation, [Output(request, [], finish_reason=reason, error=error)])
        )


PART_TOKENS = 512
"""Tokens that are put together in one message, which must not become too large: a token's log-probabilities are."""


class Backlog:
    """What waits for one front-end, from one life of a rank."""

    def __init__(self, rank: int, incarnation: int) -> None:
        self._rank = rank
        self._incarnation = incarnation
        # Nothing more is added to those; they go first.
        self._full: deque[Output] = deque()
        self._open: dict[int, Output] = {}

    def __len__(self) -> int:
        """Messages that wait."""
        return len(self._full) + len(self._open)

    def add(self, outputs: Outputs) -> None:
        """One more message that could not be sent."""
        for output in outputs.outputs:
            before = self._open.pop(output.request, None)
            whole = output if before is None else _together(before, output)
            if len(whole.token_ids) >= PART_TOKENS:
                self._full.append(whole)
            else:
                self._open[output.request] = whole

    def first(self) -> Outputs:
        """What is to be sent next. There must be something."""
        output = self._full[0] if self._full else next(iter(self._open.values()))
        return Outputs(self._rank, self._incarnation, [output])

    def sent(self) -> None:
        """The first has been sent, if there still is one."""
        if self._full:
            self._full.popleft()
        elif self._open:
            del self._open[next(iter(self._open))]

    def clear(self) -> None:
        """Nobody waits for any of it."""
        self._full.clear()
        self._open.clear()


def _together(first: Output, then: Output) -> Output:
    """Two outputs of one request as one."""
    logprobs = first.logprobs
    if then.logprobs is not None:
        logprobs = [*(first.logprobs or ()), *then.logprobs]
    tokens = [*first.token_ids, *then.token_ids]
    return replace(then, token_ids=tokens, text=first.text + then.text, logprobs=logprobs)
