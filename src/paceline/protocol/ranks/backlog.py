"""What waits for a front-end that does not read: of each request, its outputs put together.

So it takes as much memory as the answers of the requests that the front-end has here, and no more, however long it
is away; and when it reads again, it gets all of it.
"""

from __future__ import annotations

from collections import deque

from msgspec.structs import replace

from paceline.protocol.messages import Output, Outputs

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
