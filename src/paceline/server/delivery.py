"""How outputs become an HTTP answer: as events, each sent as its output comes, or gathered into one body.

Both are sinks: the client of the ranks calls `put` for each output and `fail` where no more will come. Neither
waits for anybody.
"""

from __future__ import annotations

from typing import Protocol

from paceline.protocol.messages import Output
from paceline.server.answers import DONE_EVENT, Dialect, StreamedChoice, WholeChoice, event, usage
from paceline.server.errors import ApiError, Refused, error_response, of_output, of_refusal
from paceline.server.outlet import Outlet

JSON_TYPE = (b"content-type", b"application/json")


class Sink(Protocol):
    """Takes the outputs of one HTTP request as they come. Neither method waits."""

    def put(self, output: Output) -> None:
        """One more output."""

    def fail(self, failure: Refused) -> None:
        """No more will come, and why."""


class Answer:
    """What both kinds share. `places`: a request's number to its choice; `openings`: each choice's first text."""

    __slots__ = ("_dialect", "_left", "_outlet", "_places", "_prompt_tokens")

    def __init__(
        self, outlet: Outlet, dialect: Dialect, places: dict[int, int], choices: int, prompt_tokens: int
    ) -> None:
        self._outlet = outlet
        self._dialect = dialect
        self._places = places
        self._left = choices
        self._prompt_tokens = prompt_tokens


class WholeAnswer(Answer):
    """Gathers all outputs and sends one body."""

    __slots__ = ("_choices", "_request_id", "headers")

    def __init__(
        self, outlet: Outlet, dialect: Dialect, places: dict[int, int], openings: list[str], prompt_tokens: int,
        request_id: str,
    ) -> None:  # fmt: skip
        super().__init__(outlet, dialect, places, len(openings), prompt_tokens)
        self._request_id = request_id
        self._choices = [WholeChoice(dialect, index, text) for index, text in enumerate(openings)]
        self.headers: list[tuple[bytes, bytes]] = []

    def open(self, headers: list[tuple[bytes, bytes]]) -> None:
        """The ranks have the request; `headers` go with the answer."""
        self.headers = headers

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
            self._outlet.start(200, [*self.headers, JSON_TYPE, (b"content-length", b"%d" % len(body))])
            self._outlet.write(body, last=True)

    def fail(self, failure: Refused) -> None:
        self._end_with(of_refusal(failure))

    def _end_with(self, error: ApiError) -> None:
        response = error_response(error, self._request_id)
        self._outlet.start(response.status_code, response.raw_headers)
        self._outlet.write(bytes(response.body), last=True)


class EventStream(Answer):
    """Sends each output as an event."""

    __slots__ = ("_choices", "_openings", "_with_usage")

    def __init__(
        self, outlet: Outlet, dialect: Dialect, places: dict[int, int], openings: list[str], prompt_tokens: int,
        with_usage: bool,
    ) -> None:  # fmt: skip
        super().__init__(outlet, dialect, places, len(openings), prompt_tokens)
        self._openings = openings
        self._with_usage = with_usage
        self._choices = [StreamedChoice(dialect, index) for index in range(len(openings))]

    def open(self, headers: list[tuple[bytes, bytes]]) -> None:
        """The ranks have the request: send the headers, and what comes before the first token."""
        headers += [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
        self._outlet.start(200, headers)
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
            self._outlet.write(event(of_output(output).body), last=True)
            return
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
        self._outlet.write(event(of_refusal(failure).body), last=True)
