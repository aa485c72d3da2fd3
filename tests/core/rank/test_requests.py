"""The requests of a rank: taken in, held, ended, whose they are; what waits for a front-end that does not read."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, strategies as st

from paceline.core.load import Load
from paceline.core.rank.events import Drop, Effect, StepOutput, Take, ToFrontend
from paceline.core.rank.requests import FRONTENDS_KEPT, PART_TOKENS, Backlog, RankRequests, put_together
from paceline.core.requests import AddRequest, Output, Outputs, PositionLogprobs, SamplingParams, TokenLogprob
from tests.core.harness import find, one

LIFE, FIRST, SECOND = 33, 100, 200


def request(number: int, life: int = LIFE, tokens: int = 3, name: int | None = None) -> AddRequest:
    return AddRequest(number if name is None else name, number, life, 0, [1] * tokens, SamplingParams(4))


def fresh() -> RankRequests:
    return RankRequests(3, LIFE)


def ended(effects: list[Effect]) -> list[tuple[int, int, Any]]:
    """(front-end, request, how it ended) of all that was ended."""
    return [
        (effect.frontend, output.request, output.finish_reason)
        for effect in find(effects, ToFrontend)
        for output in effect.message.outputs
        if output.finish_reason is not None
    ]


def test_a_request_that_comes_twice_is_refused_whether_the_first_is_held_or_taken() -> None:
    found = fresh()
    assert found.arrive(FIRST, request(1)) == []
    found.hold(FIRST, request(1))
    assert ended(found.arrive(FIRST, request(1))) == [(FIRST, 1, "error")]
    found.take_kept_back()
    assert ended(found.arrive(FIRST, request(1))) == [(FIRST, 1, "error")]
    assert found.arrive(SECOND, request(1)) == [], "another front-end's names are its own"


def test_taken_counts_the_highest_number_of_each_frontend() -> None:
    found = fresh()
    for frontend, number in ((FIRST, 1), (FIRST, 3), (FIRST, 2), (SECOND, 9)):
        found.arrive(frontend, request(number))
    assert found.taken == {FIRST: 3, SECOND: 9}


def test_frontends_that_are_gone_are_not_counted_for_ever() -> None:
    found = fresh()
    for frontend in range(1, FRONTENDS_KEPT + 100):
        found.arrive(frontend, request(1))
        found.drop_frontend(frontend)
    assert len(found.taken) <= FRONTENDS_KEPT + 1
    assert frontend in found.taken


def test_abort_all_ends_held_and_taken_and_tells_whose_they_were() -> None:
    found = fresh()
    key = found.take(FIRST, request(1)).key
    found.hold(SECOND, request(1))
    effects = found.abort_all()
    assert one(find(effects, Drop)).key == key
    assert ended(effects) == [(FIRST, 1, "abort"), (SECOND, 1, "abort")]
    assert effects.index(Drop(key)) == 0, "the engine forgets it before anybody is told"
    assert (len(found), found.kept_back, found.finished) == (0, 0, 2)
    assert found.abort_all() == []


def test_outputs_of_what_was_dropped_go_nowhere() -> None:
    found = fresh()
    key = found.take(FIRST, request(1)).key
    found.drop(FIRST, [1])
    assert found.hand_out([StepOutput(key, [5], finish_reason="stop")]) == []
    assert found.finished == 1


STEPS = st.tuples(
    st.sampled_from(["arrive", "hold", "take held", "drop", "gone", "abort", "finish"]),
    st.sampled_from([FIRST, SECOND]),
)


@given(steps=st.lists(STEPS, max_size=40))
def test_every_request_is_held_or_taken_or_finished_once(steps: list[tuple[str, int]]) -> None:
    found, engine, count = fresh(), set(), 0
    for what, frontend in steps:
        effects: list[Effect] = []
        match what:
            case "arrive" | "hold":
                count += 1
                assert found.arrive(frontend, request(count)) == []
                if what == "hold":
                    found.hold(frontend, request(count))
                else:
                    effects = [found.take(frontend, request(count))]
            case "take held":
                effects = found.take_kept_back()
            case "drop":
                effects = found.drop(frontend, list(range(1, count + 1, 2)))
            case "gone":
                effects = found.drop_frontend(frontend)
            case "abort":
                effects = found.abort_all()
            case "finish" if engine:
                found.hand_out([StepOutput(engine.pop(), [1], finish_reason="length")])
        engine |= {effect.key for effect in find(effects, Take)}
        for effect in find(effects, Drop):
            engine.remove(effect.key)
        assert len(found) == len(engine)
        assert len(found) + found.kept_back + found.finished == count
        assert found.load(Load()).waiting == found.kept_back


# What waits for a front-end that does not read ------------------------------------------------------


RANK, LIFE_UNREAD = 3, 77


def taken_out(backlog: Backlog) -> list[Output]:
    found: list[Output] = []
    while len(backlog):
        message = backlog.first()
        assert (message.rank, message.incarnation) == (RANK, LIFE_UNREAD)
        found += message.outputs
        backlog.sent()
    return found


def test_a_request_gets_all_of_its_answer_in_order() -> None:
    chance, backlog = random.Random(4), Backlog(RANK, LIFE_UNREAD)
    made: dict[int, list[int]] = {}
    got: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    for step in range(5000):
        whose = chance.sample(range(9), 3)
        for request in whose:
            made.setdefault(request, []).append(step)
        backlog.add(Outputs(RANK, LIFE_UNREAD, [Output(request, [step], f" {step}") for request in whose]))
        # It reads a little in between.
        if chance.random() < 0.01:
            for output in backlog.first().outputs:
                got.setdefault(output.request, []).extend(output.token_ids)
                texts[output.request] = texts.get(output.request, "") + output.text
            backlog.sent()
    for output in taken_out(backlog):
        got.setdefault(output.request, []).extend(output.token_ids)
        texts[output.request] = texts.get(output.request, "") + output.text
    assert got == made
    assert texts == {request: "".join(f" {step}" for step in steps) for request, steps in made.items()}


def test_there_are_few_messages_however_many_came() -> None:
    backlog = Backlog(RANK, LIFE_UNREAD)
    for step in range(10 * PART_TOKENS):
        backlog.add(Outputs(RANK, LIFE_UNREAD, [Output(request, [step], "x") for request in range(4)]))
    assert len(backlog) == 40
    assert all(len(output.token_ids) <= PART_TOKENS for output in taken_out(backlog))


def test_how_it_ended_and_what_it_might_have_been_is_kept() -> None:
    def position(token: int) -> PositionLogprobs:
        return PositionLogprobs(TokenLogprob(token, b"x", -1.0), [])

    backlog = Backlog(RANK, LIFE_UNREAD)
    backlog.add(Outputs(RANK, LIFE_UNREAD, [Output(1, [5], "a", logprobs=[position(5)])]))
    backlog.add(Outputs(RANK, LIFE_UNREAD, [Output(1, [6], "b")]))
    backlog.add(Outputs(RANK, LIFE_UNREAD, [Output(1, [7], "c", "stop", "c", [position(7)])]))
    backlog.add(Outputs(RANK, LIFE_UNREAD, [Output(2, [], "", "error", error="why")]))
    one, two = taken_out(backlog)
    assert one == Output(1, [5, 6, 7], "abc", "stop", "c", [position(5), position(7)])
    assert two == Output(2, [], "", "error", error="why")
    assert len(backlog) == 0


def test_an_empty_message_leaves_nothing() -> None:
    backlog = Backlog(RANK, LIFE_UNREAD)
    backlog.add(Outputs(RANK, LIFE_UNREAD, []))
    assert len(backlog) == 0


def test_what_the_first_output_alone_brings_is_kept() -> None:
    of_prompt = [PositionLogprobs(TokenLogprob(3, b"x", -1.0), [])]
    first = Output(1, [5], "a", prompt_logprobs=of_prompt, cached_tokens=7)
    backlog = Backlog(RANK, LIFE_UNREAD)
    backlog.add(Outputs(RANK, LIFE_UNREAD, [first]))
    backlog.add(Outputs(RANK, LIFE_UNREAD, [Output(1, [6], "b", "length")]))
    whole = Output(1, [5, 6], "ab", "length", prompt_logprobs=of_prompt, cached_tokens=7)
    assert taken_out(backlog) == [whole]


@given(st.lists(st.tuples(st.integers(0, 1), st.lists(st.integers(0, 3), unique=True), st.booleans())))
def test_put_together_each_request_gets_the_same_in_one_message_of_a_life(
    steps: list[tuple[int, list[int], bool]],
) -> None:
    expected: dict[tuple[int, int], tuple[list[int], bool]] = {}
    messages = []
    for step, (life, requests, last) in enumerate(steps):
        outputs = []
        for request in requests:
            tokens, over = expected.setdefault((life, request), ([], False))
            if not over:
                outputs.append(Output(request, [step], f" {step}", "stop" if last else None))
                expected[life, request] = ([*tokens, step], last)
        messages.append(Outputs(RANK, life, outputs))
    together = put_together(messages)
    assert len(together) == len({message.incarnation for message in messages})
    found = {(one.incarnation, output.request): output for one in together for output in one.outputs}
    said = {key: (output.token_ids, output.finish_reason is not None) for key, output in found.items()}
    assert said == {key: value for key, value in expected.items() if value[0]}
    assert all(output.text == "".join(f" {step}" for step in output.token_ids) for output in found.values())
