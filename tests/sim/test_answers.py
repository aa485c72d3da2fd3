"""What clients got: what is lost, comes twice or does not follow on what they have is found."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from paceline.core.frontend.events import Refuse
from paceline.core.frontend.failover import HOLD_S, MOST_LOSSES
from paceline.core.frontend.inflight import FIRST_RESEND
from paceline.core.frontend.machine import Frontend
from paceline.core.requests import AddRequest, Output, SamplingParams
from paceline.core.routing.least import LeastLoad
from paceline.sim.answers import Answers
from paceline.sim.world import Violation, World


@pytest.fixture
def answers() -> Answers:
    return Answers(World(), "front-end 0")


def send(answers: Answers, rank: int, made: int = 0) -> None:
    answers.sent(rank, AddRequest(FIRST_RESEND, 1, 1, 0, [1], SamplingParams(4), 0, list(range(made))))


def give(answers: Answers, first: int, count: int, ended: bool = False) -> None:
    answers.delivered(Output(1, list(range(first, first + count)), finish_reason="length" if ended else None))


def test_a_request_goes_on_at_another_rank_and_ends_once(answers: Answers) -> None:
    assert answers.asked(4) == 1
    send(answers, 0)
    give(answers, 0, 2)
    answers.rank_lost(0)
    send(answers, 1, made=2)
    give(answers, 2, 2, ended=True)
    assert (answers[1].tokens, answers[1].over, answers.open, answers.moved) == (4, True, 0, 1)


def test_a_client_that_hung_up_is_owed_nothing(answers: Answers) -> None:
    answers.asked(4)
    assert answers.hung_up(1)
    assert not answers.hung_up(1)
    assert (answers.open, answers[1].abandoned) == (0, True)


def a_token_again(answers: Answers) -> None:
    give(answers, 0, 2)
    give(answers, 1, 1)


def a_gap(answers: Answers) -> None:
    give(answers, 1, 1)


def an_end_too_soon(answers: Answers) -> None:
    give(answers, 0, 3, ended=True)


def an_end_again(answers: Answers) -> None:
    give(answers, 0, 4, ended=True)
    give(answers, 4, 0, ended=True)


def two_ranks_at_once(answers: Answers) -> None:
    send(answers, 1)


def another_place(answers: Answers) -> None:
    give(answers, 0, 2)
    answers.rank_lost(0)
    send(answers, 1, made=1)


def an_error(answers: Answers) -> None:
    answers.delivered(Output(1, [], finish_reason="error", error="meant for another life"))


def given_up_at_once(answers: Answers) -> None:
    answers.rank_lost(0)
    answers.refused(Refuse(1, "rank-lost", "rank 0 ended"))


def forgotten(answers: Answers) -> None:
    answers.none_lost(Frontend(1, LeastLoad(0, 1)))


@pytest.mark.parametrize(
    ("what", "found"),
    [
        (a_token_again, "got tokens [1] in place of [2]"),
        (a_gap, "got tokens [1] in place of [0]"),
        (an_end_too_soon, "ended after 3 of 4 tokens"),
        (an_end_again, "request 1 is given tokens after it had ended"),
        (two_ranks_at_once, "goes to rank 1 too; rank 0 has it"),
        (another_place, "goes on behind 1 of 2 tokens"),
        (an_error, "request 1 is lost: meant for another life"),
        (given_up_at_once, "request 1 is lost, after 1 of its ranks"),
        (forgotten, "1 requests have not ended, and the front-end knows 0"),
    ],
)
def test_what_must_not_be_is_found(what: Callable[[Answers], None], found: str, answers: Answers) -> None:
    answers.asked(4)
    send(answers, 0)
    with pytest.raises(Violation, match="front-end 0: ") as broken:
        what(answers)
    assert found in broken.value.what


def test_a_request_may_be_given_up_after_so_many_ranks_or_so_long() -> None:
    world = World()
    answers = Answers(world, "front-end 0")
    for request in (1, 2):
        assert answers.asked(4) == request
    send(answers, 0)
    for rank in range(MOST_LOSSES):
        answers.rank_lost(rank)
        if rank < MOST_LOSSES - 1:
            send(answers, rank + 1)
    answers.refused(Refuse(1, "rank-lost", "the third in a row"))
    answers.sent(0, AddRequest(FIRST_RESEND, 1, 1, 0, [2], SamplingParams(4)))
    answers.rank_lost(0)
    world.run_for(HOLD_S)
    answers.refused(Refuse(2, "rank-lost", "none was ready"))
    assert answers.open == 0
