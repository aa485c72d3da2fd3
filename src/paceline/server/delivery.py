"""How outputs become an HTTP answer: as events, each sent as its output comes, or gathered into one body.

Both are sinks: the client of the ranks calls `placed` when a request has got its rank, `put` for each output and `fail`
where no more will come. None of them waits for anybody. The headers name the ranks, so a stream's go out when all
requests have theirs, or with the first output where some still wait; until then a failure has a status of its own.
"""

from __future__ import annotations

from typing import Protocol

from paceline.core.requests import Output
from paceline.core.routing.policy import Decision
from paceline.server.answers import DONE_EVENT, Dialect, StreamedChoice, WholeChoice, event, usage
from paceline.server.errors import ApiError, Refused, error_response, of_output, of_refusal
from paceline.server.head import Head
from paceline.server.outlet import Outlet

JSON_TYPE = (b"content-type", b"application/json")
STREAM_HEADERS = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]


class Sink(Protocol):
    """Takes the outputs of one HTTP request as they come. No method waits."""

    def placed(self, rank: int, decision: Decision | None) -> None:
        """One more of its requests has a rank. `decision`: why, where that was asked for."""

    def put(self, output: Output) -> None:
        """One more output."""

    def fail(self, failure: Refused) -> None:
        """No more will come, and why."""


class Answer:
    """What both kinds share. `places`: a request's number to its choice; `openings`: each choice's first text."""

    __slots__ = ("_dialect", "_head", "_left", "_outlet", "_over", "_places", "_prompt_tokens", "_submitted")

    def __init__(
        self, outlet: Outlet, dialect: Dialect, places: dict[int, int], choices: int, prompt_tokens: int, head: Head
    ) -> None:
        self._outlet = outlet
        self._dialect = dialect
        self._places = places
        self._left = choices
        self._prompt_tokens = prompt_tokens
        self._head = head
        self._submitted = False
        self._over = False

    def placed(self, rank: int, decision: Decision | None) -> None:
        self._head.placed(rank, decision)
        if self._submitted and self._head.complete:
            self._begin()

    def submitted(self) -> None:
        """All requests were taken: from here on the answer is this one's to give."""
        self._submitted = True
        if self._head.complete:
            self._begin()

    def _begin(self) -> None:
        """Send what comes before the first token."""

    def _end_with(self, error: ApiError) -> None:
        """The whole answer is this error."""
        if self._over:
            return
        self._over = True
        response = error_response(error, self._head.request_id)
        self._outlet.start(response.status_code, response.raw_headers)
        self._outlet.write(bytes(response.body), last=True)


class WholeAnswer(Answer):
    """Gathers all outputs and sends one body."""

    __slots__ = ("_choices",)

    def __init__(
        self, outlet: Outlet, dialect: Dialect, places: dict[int, int], openings: list[str], prompt_tokens: int,
        head: Head,
    ) -> None:  # fmt: skip
        super().__init__(outlet, dialect, places, len(openings), prompt_tokens, head)
        self._choices = [WholeChoice(dialect, index, text) for index, text in enumerate(openings)]

    def put(self, output: Output) -> None:
        if output.finish_reason == "error":
            self._end_with(of_output(output))
            return
        self._choices[self._places[output.request]].add(output)
        if output.finish_reason is None:
            return
        self._left -= 1
        if not self._left:
            total = usage(self._prompt_tokens, sum(choice.tokens for choice in self._choices))
            body = self._dialect.body([choice.entry() for choice in self._choices], total)
            self._over = True
            self._outlet.start(200, [*self._head.headers(), JSON_TYPE, (b"content-length", b"%d" % len(body))])
            self._outlet.write(body, last=True)

    def fail(self, failure: Refused) -> None:
        self._end_with(of_refusal(failure))


class EventStream(Answer):
    """Sends each output as an event."""

    __slots__ = ("_begun", "_choices", "_openings", "_with_usage")

    def __init__(
        self, outlet: Outlet, dialect: Dialect, places: dict[int, int], openings: list[str], prompt_tokens: int,
        head: Head, with_usage: bool,
    ) -> None:  # fmt: skip
        super().__init__(outlet, dialect, places, len(openings), prompt_tokens, head)
        self._begun = False
        self._openings = openings
        self._with_usage = with_usage
        self._choices = [StreamedChoice(dialect, index) for index in range(len(openings))]

    def _begin(self) -> None:
        if self._begun or self._over:
            return
        self._begun = True
        self._outlet.start(200, [*self._head.headers(), *STREAM_HEADERS])
        parts: list[bytes] = []
        for index, text in enumerate(self._openings):
            parts.append(self._dialect.opening(index))
            if text:
                parts.append(self._dialect.chunk(index, text, None, None, None))
        opening = b"".join(parts)
        if opening:
            self._outlet.write(opening)

    def put(self, output: Output) -> None:
        reason = output.finish_reason
        if reason == "error":
            self._stop_with(of_output(output))
            return
        if not self._begun:
            self._begin()
        data = self._choices[self._places[output.request]].events(output)
        if reason is not None:
            self._left -= 1
        if self._left:
            if data:
                self._outlet.write(data)
        else:
            total = usage(self._prompt_tokens, sum(choice.tokens for choice in self._choices))
            data += self._dialect.usage_event(total) if self._with_usage else b""
            self._outlet.write(data + DONE_EVENT, last=True)

    def fail(self, failure: Refused) -> None:
        self._stop_with(of_refusal(failure))

    def _stop_with(self, error: ApiError) -> None:
        if self._begun:
            self._outlet.write(event(error.body), last=True)
        else:
            self._end_with(error)
