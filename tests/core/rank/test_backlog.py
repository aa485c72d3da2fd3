"""What waits for a front-end that does not read."""

from __future__ import annotations

import random

from paceline.core.rank.requests import PART_TOKENS, Backlog
from paceline.core.requests import Output, Outputs, PositionLogprobs, TokenLogprob

RANK, LIFE = 3, 77


def taken_out(backlog: Backlog) -> list[Output]:
    found: list[Output] = []
    while len(backlog):
        message = backlog.first()
        assert (message.rank, message.incarnation) == (RANK, LIFE)
        found += message.outputs
        backlog.sent()
    return found


def test_a_request_gets_all_of_its_answer_in_order() -> None:
    chance, backlog = random.Random(4), Backlog(RANK, LIFE)
    made: dict[int, list[int]] = {}
    got: dict[int, list[int]] = {}
    texts: dict[int, str] = {}
    for step in range(5000):
        whose = chance.sample(range(9), 3)
        for request in whose:
            made.setdefault(request, []).append(step)
        backlog.add(Outputs(RANK, LIFE, [Output(request, [step], f" {step}") for request in whose]))
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
    backlog = Backlog(RANK, LIFE)
    for step in range(10 * PART_TOKENS):
        backlog.add(Outputs(RANK, LIFE, [Output(request, [step], "x") for request in range(4)]))
    assert len(backlog) == 40
    assert all(len(output.token_ids) <= PART_TOKENS for output in taken_out(backlog))


def test_how_it_ended_and_what_it_might_have_been_is_kept() -> None:
    def position(token: int) -> PositionLogprobs:
        return PositionLogprobs(TokenLogprob(token, b"x", -1.0), [])

    backlog = Backlog(RANK, LIFE)
    backlog.add(Outputs(RANK, LIFE, [Output(1, [5], "a", logprobs=[position(5)])]))
    backlog.add(Outputs(RANK, LIFE, [Output(1, [6], "b")]))
    backlog.add(Outputs(RANK, LIFE, [Output(1, [7], "c", "stop", "c", [position(7)])]))
    backlog.add(Outputs(RANK, LIFE, [Output(2, [], "", "error", error="why")]))
    one, two = taken_out(backlog)
    assert one == Output(1, [5, 6, 7], "abc", "stop", "c", [position(5), position(7)])
    assert two == Output(2, [], "", "error", error="why")
    assert len(backlog) == 0


def test_an_empty_message_leaves_nothing() -> None:
    backlog = Backlog(RANK, LIFE)
    backlog.add(Outputs(RANK, LIFE, []))
    assert len(backlog) == 0
