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
from paceline.server.formats import DONE_EVENT, ChatFormat, CompletionFormat, Wording
from paceline.server.responses import (
    MAX_DECISIONS_BYTES,
    MAX_KEPT_BYTES,
    MOST_AT_ONCE,
    Blocked,
    CutOff,
    Failed,
    GiveUp,
    Phase,
    Quiet,
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
    explain = how.pop("explain", False)
    form = kind("1", "m", 5, Wording(prompt_tokens=3, prompt_token_ids=[[1, 2, 3]] * len(texts), **how))
    return Response(form, "id", list(texts), stream=stream, explain=explain)


def submit(made: Response, *requests: int) -> Any:
    """The next choices were submitted as these requests; returns the last thing to do."""
    return [made.handle(Submitted(request)) for request in requests][-1]


def begun(made: Response) -> Write:
    """Submitted, and placed at rank 4."""
    first = len(made._choices)
    written = [made.handle(Placed(number, 4)) for number in range(first)]
    assert written == [None] * first, "not before all are submitted: one may be refused"
    write = submit(made, *range(first))
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


def test_a_stream_that_waits_says_a_comment_which_opens_it() -> None:
    made = response(texts=("a", "b"))
    assert made.handle(Quiet()) is None, "not before all are submitted: one may be refused"
    submit(made, 0, 1)
    opened = sent(made, Quiet())
    assert opened.status == 200
    assert opened.data.endswith(b": waiting\n\n")
    assert sent(made, Quiet()).data == b": waiting\n\n"
    assert made.handle(Placed(0, 4)) is None
    events = events_of(sent(made, Output(1, [5], "c")).data)
    assert [event["choices"][0]["text"] for event in events] == ["b", "c"]
    made.handle(Blocked())
    assert made.handle(Quiet()) is None, "who does not read is not waited for by a comment"


def test_a_whole_answer_says_no_comment() -> None:
    made = response(stream=False)
    begun(made)
    assert made.handle(Quiet()) is None


# Streams ------------------------------------------------------------------------------------------


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1))
def test_a_token_s_event_is_the_encoded_one(text: str) -> None:
    for kind in FORMATS:
        for with_usage in (False, True):
            made = response(kind, ("", ""), with_usage=with_usage)
            begun(made)
            made.handle(Output(1, [7], ""))
            form = kind("1", "m", 5, Wording(with_usage=with_usage))
            assert made.handle(Output(1, [7], text)) == Write(form.event(form.chunk_entry(1, text, None, None)))


@pytest.mark.parametrize("kind", FORMATS)
def test_a_stream_from_its_headers_to_its_end(kind: type[CompletionFormat]) -> None:
    made = response(kind, with_usage=True)
    opening = begun(made)
    assert (opening.status, opening.last) == (200, False)
    assert dict(opening.headers)[b"x-data-parallel-rank"] == b"4"
    assert not opening.data, "load generators take the first event for the first token"
    first = made.handle(Output(0, [7], ""))
    if kind is ChatFormat:
        assert isinstance(first, Write)
        assert choice_of(first)["delta"] == {"role": "assistant", "content": ""}
    else:
        assert first is None, "its text is held back"
    assert made.handle(Output(0, [7], "")) is None
    assert sent(made, Output(0, [8], "ab")).status == 0
    end = sent(made, Output(0, [9], "c", "stop", stop_reason="END"))
    last, usage, done = events_of(end.data)
    assert (end.last, done + b"\n\n", made.phase) == (True, DONE_EVENT, Phase.ENDED)
    assert (last["choices"][0]["finish_reason"], last["choices"][0]["stop_reason"]) == ("stop", "END")
    assert (last["usage"], usage["choices"]) == (None, [])
    counted = {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert usage["usage"] == counted | {"prompt_tokens_details": {"cached_tokens": 0}}
    assert made.handle(Output(0, [10], "late")) is None


def test_a_chat_s_last_event_without_text_has_an_empty_delta() -> None:
    made = response(ChatFormat)
    begun(made)
    made.handle(Output(0, [7], ""))
    choice = choice_of(sent(made, Output(0, [7], "", "length")))
    assert (choice["delta"], choice["finish_reason"]) == ({}, "length")


def test_headers_go_out_with_the_first_token_where_one_still_waits() -> None:
    made = response(texts=("echo ", ""))
    assert made.handle(Placed(0, 4)) is None
    assert submit(made, 0, 1) is None
    write = sent(made, Output(0, [7], "a"))
    assert dict(write.headers)[b"x-data-parallel-rank"] == b"4"
    assert [event["choices"][0]["text"] for event in events_of(write.data)] == ["echo ", "a"]
    assert made.handle(Placed(1, 5)) is None
    assert choice_of(sent(made, Output(1, [7], "b")))["index"] == 1
    assert not sent(made, Output(0, [8], "", "stop")).last
    assert sent(made, Output(1, [8], "", "stop")).last


def test_a_first_token_with_logprobs_comes_behind_the_echo() -> None:
    made = response(texts=("echo ",))
    submit(made, 0)
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
    _, event = events_of(sent(made, Output(0, [7], "a", logprobs=[position("a", -1.0)])).data)
    (entry,) = event["choices"][0]["logprobs"]["content"]
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
    counted = {"prompt_tokens": 3, "completion_tokens": 5, "total_tokens": 8}
    assert body["usage"] == counted | {"prompt_tokens_details": {"cached_tokens": 0}}


REFUSALS = [("unknown-rank", 400), ("overloaded", 429), ("no-rank", 503)]
FAILURES = [*((Refuse(0, reason, "why", 7), status) for reason, status in REFUSALS),  # type: ignore[arg-type]
            (Output(0, [], finish_reason="error", error="why"), 500), (CutOff(), 503), (Failed(), 500)]  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(("failure", "status"), FAILURES, ids=lambda value: str(value)[:20])
def test_a_failure_before_the_first_token_has_a_status(failure: Any, status: int, stream: bool) -> None:
    made = response(stream=stream)
    submit(made, 0)
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


# Many choices -------------------------------------------------------------------------------------


def test_the_first_choice_that_is_refused_is_the_answer() -> None:
    made = response(texts=("", ""))
    assert made.wants
    assert sent(made, Refuse(0, "overloaded", "full")).status == 429
    assert submit(made, 0) is None
    assert not made.wants


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("told_first", [False, True])
def test_a_later_choice_that_is_refused_waits_for_one_of_its_own(stream: bool, told_first: bool) -> None:
    made = response(texts=("", "", ""), stream=stream)
    submit(made, 0)
    refusal = Refuse(1, "overloaded", "full")
    if told_first:
        assert made.handle(refusal) is None
        submit(made, 1)
    else:
        submit(made, 1)
        assert made.handle(refusal) is None
    assert not made.wants, "there is no room before one has ended"
    made.handle(Output(0, [1], "a", "stop"))
    assert made.wants
    assert made.next_choice() == 1
    submit(made, 2)
    assert made.next_choice() == 2
    submit(made, 3)
    assert not made.wants
    made.handle(Output(3, [1], "c", "stop"))
    write = sent(made, Output(2, [1], "b", "stop"))
    assert write.last
    if not stream:
        assert [one["text"] for one in json.loads(write.data)["choices"]] == ["a", "b", "c"]


def test_a_choice_that_is_refused_with_none_of_its_own_left_is_the_answer() -> None:
    made = response(texts=("", ""), stream=False)
    submit(made, 0)
    made.handle(Refuse(1, "overloaded", "full"))
    submit(made, 1)
    made.handle(Output(0, [1], "a", "stop"))
    assert sent(made, Refuse(2, "overloaded", "full")).status == 429


def test_not_all_choices_are_submitted_at_once() -> None:
    made = response(texts=("",) * (MOST_AT_ONCE + 10), stream=False)
    submit(made, *range(MOST_AT_ONCE))
    assert not made.wants
    made.handle(Output(7, [1], "a", "stop"))
    assert made.wants
    assert made.next_choice() == MOST_AT_ONCE


# What a request asks of the form ------------------------------------------------------------------


@pytest.mark.parametrize("kind", FORMATS)
def test_usage_throughout_counts_up(kind: type[CompletionFormat]) -> None:
    made = response(kind, with_usage=True, usage_throughout=True)
    begun(made)
    counted = []
    for _ in range(3):
        counted.append(
            events_of(sent(made, Output(0, [7], "a", cached_tokens=0)).data)[-1]["usage"]["completion_tokens"]
        )
    assert counted == [1, 2, 3]


def test_token_ids_are_shown_where_asked_for() -> None:
    whole = response(stream=False, with_token_ids=True)
    submit(whole, 0)
    (choice,) = json.loads(sent(whole, Output(0, [7, 8], "a", "stop")).data)["choices"]
    assert (choice["token_ids"], choice["prompt_token_ids"]) == ([7, 8], [1, 2, 3])
    made = response(ChatFormat, with_token_ids=True)
    begun(made)
    made.handle(Output(0, [7], ""))
    assert choice_of(sent(made, Output(0, [8], "b")))["token_ids"] == [8]
    chat = response(ChatFormat, stream=False, with_token_ids=True)
    submit(chat, 0)
    assert json.loads(sent(chat, Output(0, [7], "a", "stop")).data)["prompt_token_ids"] == [1, 2, 3]


def test_tokens_may_be_named_by_their_ids() -> None:
    made = response(stream=False, tokens_as_ids=True)
    submit(made, 0)
    body = json.loads(sent(made, Output(0, [1], "a", "stop", logprobs=[position("a", -1.0)])).data)
    assert body["choices"][0]["logprobs"]["tokens"] == ["token_id:1"]


def test_the_prompt_s_logprobs_come_before_the_answers() -> None:
    prompt = [position("ab", 0.0), position("c", -3.0)]
    made = response(texts=("abc",), stream=False, echo_logprobs=True, none_made=True)
    submit(made, 0)
    output = Output(0, [9], "x", "length", logprobs=[position("x", -1.0)], prompt_logprobs=prompt)
    body = json.loads(sent(made, output).data)
    (choice,) = body["choices"]
    logprobs = choice["logprobs"]
    assert (choice["text"], logprobs["tokens"]) == ("abc", ["ab", "c"]), "the one made token is not shown"
    assert (logprobs["token_logprobs"], logprobs["text_offset"]) == ([None, -3.0], [0, 2])
    assert body["usage"]["completion_tokens"] == 0


def test_prompt_logprobs_are_named_by_token_ids() -> None:
    made = response(stream=False, prompt_logprobs=True)
    submit(made, 0)
    output = Output(0, [9], "x", "length", prompt_logprobs=[position("ab", 0.0), position("c", -3.0)])
    (choice,) = json.loads(sent(made, output).data)["choices"]
    first, second = choice["prompt_logprobs"]
    assert first is None
    assert second["1"] == {"logprob": -3.0, "rank": 1, "decoded_token": "c"}


def test_a_character_of_several_tokens_begins_where_its_first_does() -> None:
    """And the offsets of a stream are those of the whole."""
    pieces = [b"a", *(bytes([byte]) for byte in "é".encode()), b"b"]
    shown = ["a", "", "é", "b"]
    outputs = [
        Output(0, [1], text, "stop" if piece == b"b" else None,
               logprobs=[PositionLogprobs(TokenLogprob(1, piece, -1.0))])
        for piece, text in zip(pieces, shown, strict=True)
    ]  # fmt: skip
    whole, streamed = response(stream=False), response()
    submit(whole, 0)
    begun(streamed)
    writes = [streamed.handle(output) for output in outputs]
    events = [event for write in writes if isinstance(write, Write) for event in events_of(write.data)]
    offsets = [
        offset
        for event in events
        if isinstance(event, dict)
        for offset in event["choices"][0]["logprobs"]["text_offset"]
    ]
    made = [whole.handle(output) for output in outputs][-1]
    assert isinstance(made, Write)
    assert offsets == json.loads(made.data)["choices"][0]["logprobs"]["text_offset"] == [0, 1, 1, 2]


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
        write = submit(made, 0)
        assert isinstance(write, Write)
        assert (b"x-paceline-routing" in dict(write.headers)) == explain
