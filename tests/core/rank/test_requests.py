"""The requests of a rank: taken in, held, ended, whose they are; what waits for a front-end that does not read."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given, strategies as st

from paceline.core.load import Load
from paceline.core.rank.events import Drop, Effect, StepOutput, Take, ToFrontend
from paceline.core.rank.requests import FRONTENDS_KEPT, PART_TOKENS, Backlog, RankRequests
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


def test_keys_are_the_ranks_own_and_never_used_twice() -> None:
    found = fresh()
    first, second = found.take(FIRST, request(1)), found.take(SECOND, request(1))
    found.hand_out([StepOutput(first.key, [7], finish_reason="stop")])
    third = found.take(FIRST, request(2))
    assert len({effect.key for effect in (first, second, third)}) == 3
    assert len(found) == 2


def test_a_request_for_another_life_is_refused_and_does_not_count_as_taken() -> None:
    found = fresh()
    effects = found.arrive(FIRST, request(5, life=LIFE + 1))
    assert ended(effects) == [(FIRST, 5, "error")]
    assert (found.taken, found.void) == ({}, 1)


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


def test_what_is_held_is_given_in_its_order_and_once() -> None:
    found = fresh()
    arrivals = [(FIRST, 2), (SECOND, 1), (FIRST, 1)]
    for frontend, number in arrivals:
        found.hold(frontend, request(number))
    assert (len(found), found.kept_back) == (0, 3)
    taken = find(found.take_kept_back(), Take)
    assert [effect.request.request for effect in taken] == [number for _, number in arrivals]
    assert [effect.key for effect in taken] == sorted(effect.key for effect in taken)
    assert (len(found), found.kept_back, found.take_kept_back()) == (3, 0, [])


def test_what_is_held_counts_as_waiting() -> None:
    found = fresh()
    found.hold(FIRST, request(1, tokens=5))
    found.hold(FIRST, request(2, tokens=2))
    assert found.load(Load(1, 2, 8, 10)) == Load(3, 2, 8, 17)
    found.take_kept_back()
    assert found.load(Load(1, 2, 8, 10)) == Load(1, 2, 8, 10)


def test_a_refused_request_is_told_so() -> None:
    found = fresh()
    assert ended([found.refuse(FIRST, request(4))]) == [(FIRST, 4, "abort")]


def test_what_nobody_waits_for_is_dropped_held_or_taken_and_counts_as_finished() -> None:
    found = fresh()
    key = found.take(FIRST, request(1)).key
    found.hold(FIRST, request(2))
    effects = found.drop(FIRST, [1, 2, 99])
    assert effects == [Drop(key)]
    assert (len(found), found.kept_back, found.finished) == (0, 0, 2)
    assert found.drop(FIRST, [1, 2]) == []
    assert found.finished == 2


def test_a_frontend_that_is_gone_takes_its_own_with_it() -> None:
    found = fresh()
    for frontend in (FIRST, SECOND):
        found.arrive(frontend, request(1))
        found.take(frontend, request(1))
        found.hold(frontend, request(2))
    assert len(find(found.drop_frontend(FIRST), Drop)) == 1
    assert (len(found), found.kept_back, found.taken) == (1, 1, {FIRST: 1, SECOND: 1})


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


def test_outputs_go_to_their_owners_one_message_each() -> None:
    found = fresh()
    mine = [found.take(FIRST, request(number)).key for number in (1, 2)]
    other = found.take(SECOND, request(1)).key
    effects = found.hand_out(
        [StepOutput(mine[0], [5]), StepOutput(other, [6], finish_reason="stop"), StepOutput(mine[1], [7], "x")]
    )
    assert [(e.frontend, [o.request for o in e.message.outputs]) for e in find(effects, ToFrontend)] == [
        (FIRST, [1, 2]),
        (SECOND, [1]),
    ]
    assert (len(found), found.finished) == (2, 1)


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
