"""The requests of one rank: whose they are, how many of each front-end's were taken in, which are held.

The engine knows a request by the rank's own `key`; front-ends know it by theirs. While the deployment is
paused, new requests are held here and the engine does not hear of them; they count as waiting.

Of what waits for a front-end that does not read, each request's outputs are put together. So it takes as much memory as
the answers of the requests that the front-end has here, and no more, however long it is away; and when it reads again,
it gets all of it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec
from msgspec.structs import replace

from paceline.core.load import Load
from paceline.core.rank.events import Drop, Effect, StepOutput, Take, ToFrontend
from paceline.core.requests import AddRequest, FinishReason, Output, Outputs, Timing

Pair = tuple[int, int]
"""(front-end, its own id of the request)."""

FRONTENDS_KEPT = 256
"""Front-ends whose sends are counted, beyond those that are connected: lives that are over are never heard again."""


class RankRequests:
    """All requests of one life of a rank."""

    INCIDENTAL = frozenset({"finished", "void", "prompt_tokens", "cached_tokens", "held_tokens", "_taken_at"})

    def __init__(self, rank: int, incarnation: int) -> None:
        self.rank = rank
        self.incarnation = incarnation
        self.taken: dict[int, int] = {}
        self.finished = 0
        self.void = 0
        self.prompt_tokens = self.cached_tokens = self.held_tokens = 0
        self._keys: dict[Pair, int] = {}
        self._owners: dict[int, Pair] = {}
        self._kept_back: dict[Pair, tuple[AddRequest, float]] = {}
        """With when each came."""
        self._taken_at: dict[int, tuple[float, float, int]] = {}
        """By key, of those that have no token yet: when they came, when the engine got them, tokens of the prompt."""
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

    def take(self, frontend: int, request: AddRequest, arrived: float = 0.0, now: float = 0.0) -> Effect:
        """Give a request to the engine now, that came when it `arrived`."""
        key = self._next_key
        self._taken_at[key] = (arrived, now, len(request.prompt_token_ids))
        self._next_key += 1
        pair = (frontend, request.request)
        self._keys[pair] = key
        self._owners[key] = pair
        return Take(key, request)

    def hold(self, frontend: int, request: AddRequest, arrived: float = 0.0) -> None:
        """Keep it from the engine until `take_kept_back`."""
        self._kept_back[(frontend, request.request)] = (request, arrived)

    def take_kept_back(self, now: float = 0.0) -> list[Effect]:
        """Give all that is held to the engine, in the order in which it came."""
        kept, self._kept_back = self._kept_back, {}
        return [self.take(frontend, request, arrived, now) for (frontend, _), (request, arrived) in kept.items()]

    def refuse(self, frontend: int, request: AddRequest) -> Effect:
        """End a request that came while all are aborted."""
        return self._end((frontend, request.request), "abort", None)

    def drop(self, frontend: int, requests: Sequence[int]) -> list[Effect]:
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
        pairs = [*self._keys, *self._kept_back]
        return self._drop(pairs) + [self._end(pair, "abort", None) for pair in pairs]

    def hand_out(self, outputs: Sequence[StepOutput], weight_version: str = "", now: float = 0.0) -> list[Effect]:
        """What a step made, with weights of this name; one message a front-end."""
        by_frontend: dict[int, list[Output]] = {}
        owners, taken_at = self._owners, self._taken_at
        for out in outputs:
            owner = owners.get(out.key)
            if owner is None:
                continue
            timing = None
            if taken_at and (stamps := taken_at.pop(out.key, None)) is not None:
                timing = Timing(_us(stamps[1] - stamps[0]), _us(now - stamps[1]))
                self.prompt_tokens += stamps[2]
                self.cached_tokens += min(out.cached_tokens, stamps[2])
            frontend, request = owner
            if out.finish_reason is not None:
                del owners[out.key]
                del self._keys[owner]
                self.finished += 1
            by_frontend.setdefault(frontend, []).append(
                Output(
                    request,
                    out.token_ids,
                    out.text,
                    out.finish_reason,
                    out.stop_reason,
                    out.logprobs,
                    out.error,
                    out.prompt_logprobs,
                    out.cached_tokens,
                    weight_version,
                    out.embedding,
                    timing,
                )
            )
        return [ToFrontend(to, Outputs(self.rank, self.incarnation, made)) for to, made in by_frontend.items()]

    def load(self, engine: Load) -> Load:
        """The engine's load, with what is held, and what has been finished and found in its cache."""
        held = self._kept_back.values()
        return msgspec.structs.replace(
            engine, waiting=engine.waiting + len(held), finished=self.finished, held_tokens=self.held_tokens,
            prefill_tokens=engine.prefill_tokens + sum(request.tokens for request, _ in held),
            prompt_tokens=self.prompt_tokens, cached_tokens=self.cached_tokens,
        )  # fmt: skip

    def _drop(self, pairs: Sequence[Pair]) -> list[Effect]:
        effects: list[Effect] = []
        for pair in pairs:
            if self._kept_back.pop(pair, None) is not None:
                self.finished += 1
            key = self._keys.pop(pair, None)
            if key is not None:
                del self._owners[key]
                self._taken_at.pop(key, None)
                self.finished += 1
                effects.append(Drop(key))
        return effects

    def _end(self, pair: Pair, reason: FinishReason, error: str | None) -> Effect:
        frontend, request = pair
        return ToFrontend(
            frontend, Outputs(self.rank, self.incarnation, [Output(request, [], finish_reason=reason, error=error)])
        )


def _us(seconds: float) -> int:
    return max(0, round(seconds * 1e6))


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
        for output in outputs.outputs:
            before = self._open.pop(output.request, None)
            if before is not None and before.weight_version != output.weight_version:
                self._full.append(before)
                before = None
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
        self._full.clear()
        self._open.clear()


def _together(first: Output, then: Output) -> Output:
    logprobs = first.logprobs
    if then.logprobs is not None:
        logprobs = [*(first.logprobs or ()), *then.logprobs]
    return replace(
        then, token_ids=[*first.token_ids, *then.token_ids], text=first.text + then.text, logprobs=logprobs,
        prompt_logprobs=first.prompt_logprobs or then.prompt_logprobs,
        cached_tokens=first.cached_tokens or then.cached_tokens, timing=first.timing or then.timing,
    )  # fmt: skip


def put_together(messages: Sequence[Outputs]) -> list[Outputs]:
    """The same in fewer messages, for a front-end that has fallen behind its ranks: what each request has got since.

    So the further it is behind, the less each token costs it, and a request's first one waits less for others' tokens.
    """
    found: list[Outputs] = []
    for rank, incarnation in dict.fromkeys((message.rank, message.incarnation) for message in messages):
        whole: dict[int, Output] = {}
        earlier: list[Output] = []
        for message in messages:
            if (message.rank, message.incarnation) == (rank, incarnation):
                for output in message.outputs:
                    before = whole.get(output.request)
                    # What has ended is ended: whatever else is said of it is another matter.
                    if before is None or before.finish_reason is not None:
                        whole[output.request] = output if before is None else before
                    elif before.weight_version != output.weight_version:
                        earlier.append(before)
                        whole[output.request] = output
                    else:
                        whole[output.request] = _together(before, output)
        found.append(Outputs(rank, incarnation, [*earlier, *whole.values()]))
    return found
