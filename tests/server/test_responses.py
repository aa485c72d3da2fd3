"""What a client is sent: the machine of one response, without a socket."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest
from hypothesis import given, strategies as st

from paceline.core.frontend.events import Placed, Refuse
from paceline.core.requests import Output, PositionLogprobs, TokenLogprob
from paceline.core.routing.policy import Belief, Decision
from paceline.server.responses import (
    DONE_EVENT,
    MAX_DECISIONS_BYTES,
    MAX_KEPT_BYTES,
    Blocked,
    ChatFormat,
    CompletionFormat,
    CutOff,
    GiveUp,
    Phase,
    Response,
    Submitted,
    Unblocked,
    Write,
    decisions_value,
)

FORMATS = [CompletionFormat, ChatFormat]


def response(
    kind: type[CompletionFormat] = CompletionFormat, texts: tuple[str, ...] = ("",), stream: bool = True, **how: Any
) -> Response:
    form = kind("1", "m", 5, bool(how.get("with_usage")))
    return Response(form, "id", list(texts), 3, stream=stream, **how)


def begun(made: Response) -> Write:
    """Submitted, and placed at rank 4."""
    first = len(made._choices)
    written = [made.handle(Placed(number, 4)) for number in range(first)]
    assert written == [None] * first, "not before all are submitted: one may be refused"
    write = made.handle(Submitted(list(range(first))))
    assert isinstance(write, Write) == (made.phase is Phase.STREAMING)
    return write if isinstance(write, Write) else Write(b"")


def sent(made: Response, event: Any) -> Write:
    write = made.handle(event)
    assert isinstance(write, Write), write
    return write


def events_of(data: bytes) -> list[Any]:
    assert data.endswith(b"\n\n")
    events = data.split(b"\n\n")[:-1]
    assert all(event.startswith(b"data: ") and b"\n" not in event for event in events)
    return [event if event == b"data: [DONE]" else json.loads(event[6:]) for event in events]


def choice_of(write: Write) -> Any:
    (choice,) = events_of(write.data)[0]["choices"]
    return choice


def position(text: str, logprob: float) -> PositionLogprobs:
    chosen = TokenLogprob(1, text.encode(), logprob)
    return PositionLogprobs(chosen, [chosen, TokenLogprob(2, b"\xe2", float("-inf"))])


# Streams ------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_token_s_event_is_the_encoded_one(text: str) -> None:
    for kind in FORMATS:
        for with_usage in (False, True):
            made = response(kind, ("", ""), with_usage=with_usage)
            begun(made)
            form = kind("1", "m", 5, with_usage)
            assert made.handle(Output(1, [7], text)) == Write(form.event(form.chunk_entry(1, text, None, None)))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stream_from_its_headers_to_its_end(kind: type[CompletionFormat]) -> None:
    made = response(kind, with_usage=True)
    opening = begun(made)
    assert (opening.status, opening.last) == (200, False)
    assert dict(opening.headers)[b"x-data-parallel-rank"] == b"4"
    assert bool(opening.data) == (kind is ChatFormat), "a chat's first event names the role"
    assert made.handle(Output(0, [7], "")) is None, "its text is held back"
    assert sent(made, Output(0, [8], "ab")).status == 0
    end = sent(made, Output(0, [9], "c", "stop", stop_reason="END"))
    last, usage, done = events_of(end.data)
    assert (end.last, done + b"\n\n", made.phase) == (True, DONE_EVENT, Phase.ENDED)
    assert (last["choices"][0]["finish_reason"], last["choices"][0]["stop_reason"]) == ("stop", "END")
    assert (last["usage"], usage["choices"]) == (None, [])
    assert usage["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert made.handle(Output(0, [10], "late")) is None


def test_a_chat_s_last_event_without_text_has_an_empty_delta() -> None:
    made = response(ChatFormat)
    begun(made)
    choice = choice_of(sent(made, Output(0, [7], "", "length")))
    assert (choice["delta"], choice["finish_reason"]) == ({}, "length")


def test_headers_go_out_with_the_first_token_where_one_still_waits() -> None:
    made = response(texts=("echo ", ""))
    assert made.handle(Placed(0, 4)) is None
    assert made.handle(Submitted([0, 1])) is None
    write = sent(made, Output(0, [7], "a"))
    assert dict(write.headers)[b"x-data-parallel-rank"] == b"4"
    assert [event["choices"][0]["text"] for event in events_of(write.data)] == ["echo ", "a"]
    assert made.handle(Placed(1, 5)) is None
    assert choice_of(sent(made, Output(1, [7], "b")))["index"] == 1
    assert not sent(made, Output(0, [8], "", "stop")).last
    assert sent(made, Output(1, [8], "", "stop")).last


def test_a_first_token_with_logprobs_comes_behind_the_echo() -> None:
    made = response(texts=("echo ",))
    made.handle(Submitted([0]))
    events = events_of(sent(made, Output(0, [7], "a", logprobs=[position("a", -1.0)])).data)
    assert [event["choices"][0]["text"] for event in events] == ["echo ", "a"]


def test_logprobs_of_tokens_whose_text_is_held_back_come_with_the_text() -> None:
    made = response()
    begun(made)
    assert made.handle(Output(0, [7], "", logprobs=[position("a", -1.0)])) is None
    logprobs = choice_of(sent(made, Output(0, [8], "ab", logprobs=[position("b", -2.0)])))["logprobs"]
    assert (logprobs["tokens"], logprobs["token_logprobs"], logprobs["text_offset"]) == (["a", "b"], [-1, -2], [0, 1])
    assert logprobs["top_logprobs"][0] == {"a": -1.0, "\N{REPLACEMENT CHARACTER}": -9999.0}
    again = choice_of(sent(made, Output(0, [8], "c", logprobs=[position("c", -2.0)])))["logprobs"]
    assert (again["tokens"], again["text_offset"]) == (["c"], [2])


def test_chat_logprobs_have_bytes() -> None:
    made = response(ChatFormat)
    begun(made)
    (entry,) = choice_of(sent(made, Output(0, [7], "a", logprobs=[position("a", -1.0)])))["logprobs"]["content"]
    assert entry["token"] == "a"
    assert entry["top_logprobs"][1] == {"token": "\N{REPLACEMENT CHARACTER}", "logprob": -9999.0, "bytes": [0xE2]}


# Whole responses, and failures --------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_a_whole_response_gathers_all_outputs(kind: type[CompletionFormat]) -> None:
    made = response(kind, ("", "echo "), stream=False)
    begun(made)
    outputs = (Output(1, [1], "a"), Output(1, [2, 3], "b"), Output(0, [4], "z", "length"))
    assert [made.handle(output) for output in outputs] == [None] * 3
    write = sent(made, Output(1, [4], "", "stop", stop_reason=4))
    body = json.loads(write.data)
    first, second = body["choices"]
    assert (write.status, write.last, dict(write.headers)[b"content-length"]) == (200, True, b"%d" % len(write.data))
    assert [(one.get("text") or one["message"]["content"]) for one in (first, second)] == ["z", "echo ab"]
    assert (first["finish_reason"], second["finish_reason"], second["stop_reason"]) == ("length", "stop", 4)
    assert body["usage"] == {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}


REFUSALS = [("unknown-rank", 400), ("overloaded", 429), ("no-rank", 503)]
FAILURES = [*((Refuse(0, reason, "why", 7), status) for reason, status in REFUSALS),  # type: ignore[arg-type]
            (Output(0, [], finish_reason="error", error="why"), 500), (CutOff(), 503)]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "status"), FAILURES, ids=lambda value: str(value)[:20])
def test_a_failure_before_the_first_token_has_a_status(failure: Any, status: int, stream: bool) -> None:
    made = response(stream=stream)
    made.handle(Submitted([0]))
    write = sent(made, failure)
    assert (write.status, write.last, made.phase) == (status, True, Phase.ENDED)
    assert set(json.loads(write.data)["error"]) == {"message", "type", "param", "code"}
    headers = dict(write.headers)
    assert headers[b"x-request-id"] == b"id"
    assert (b"retry-after" in headers) == (status in (429, 503))
    assert made.handle(failure) is None, "once"


@pytest.mark.parametrize(("failure", "status"), FAILURES, ids=lambda value: str(value)[:20])
def test_a_failure_in_a_stream_is_its_last_event(failure: Any, status: int) -> None:
    made = response()
    begun(made)
    write = sent(made, failure)
    (event,) = events_of(write.data)
    assert (write.status, write.last, bool(event["error"]["message"])) == (0, True, True)


def test_a_refusal_while_others_are_being_submitted_is_the_answer() -> None:
    made = response(texts=("", ""))
    made.handle(Placed(0, 4))
    assert sent(made, Refuse(1, "overloaded", "full")).status == 429
    assert made.handle(Submitted([0])) is None


# A client that does not read ----------------------------------------------------------------------


def test_what_comes_while_a_write_waits_is_written_in_one_then() -> None:
    made = response()
    begun(made)
    assert made.handle(Blocked()) is None
    assert made.handle(Output(0, [1], "a")) is None
    assert made.handle(Output(0, [1], "b", "stop")) is None
    assert made.phase is Phase.ENDED
    write = sent(made, Unblocked())
    assert write.last
    assert [event["choices"][0]["text"] for event in events_of(write.data)[:-1]] == ["a", "b"]
    assert made.handle(Unblocked()) is None


def test_a_stream_goes_on_after_a_write_has_waited() -> None:
    made = response()
    begun(made)
    made.handle(Blocked())
    assert made.handle(Unblocked()) is None, "nothing came meanwhile"
    assert not sent(made, Output(0, [1], "a")).last


def test_a_client_that_reads_too_little_is_given_up() -> None:
    made = response()
    begun(made)
    made.handle(Blocked())
    text = "x" * (MAX_KEPT_BYTES // 4)
    assert [made.handle(Output(0, [1], text)) for _ in range(3)] == [None] * 3
    assert made.handle(Output(0, [1], text)) == GiveUp()
    assert made.given_up
    assert made.handle(Output(0, [1], text)) is None
    assert made.handle(Unblocked()) is None


# X-Paceline-Routing -------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["least-load", "x" * 100_000, "\u00fc\n\r\x00" * 1000])
@pytest.mark.parametrize("number", [1, 2**53])
def test_why_a_rank_was_chosen_is_short_and_one_line(text: str, number: int) -> None:
    belief = Belief(number, number, number, number)
    decision = Decision(text, number, number, number, belief, [belief] * 3, text)
    value = decisions_value([decision] * 200)
    assert len(value) <= MAX_DECISIONS_BYTES
    assert value.isascii()
    assert not {b"\n", b"\r"} & {value[place : place + 1] for place in range(len(value))}
    assert 1 <= len(msgspec.json.decode(value, type=list[Any])) <= 4


def test_it_is_told_where_asked_for() -> None:
    belief = Belief(4, 0, 0, 0)
    decision = Decision("p", 4, 3, 1, belief, [], "r")
    for explain in (False, True):
        made = response(explain=explain)
        made.handle(Placed(0, 4, decision if explain else None))
        write = made.handle(Submitted([0]))
        assert isinstance(write, Write)
        assert (b"x-paceline-routing" in dict(write.headers)) == explain
