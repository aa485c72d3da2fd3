"""New weights at a rank: taken before the next step, and told which weights made each token."""

from __future__ import annotations

from paceline.core.load import Load
from paceline.core.messages import Admit, RankHello, Suspension
from paceline.core.rank import events
from paceline.core.rank.machine import Rank
from paceline.core.requests import AddRequest, SamplingParams, Weights

FRONTEND = 9
UNDER_WAY = Weights(1, next=1, next_version="one", next_source="{}")
IN_FORCE = Weights(2, current=1, version="one", source="{}")


def joining() -> Rank:
    rank = Rank(0, 5, "address")
    rank.handle(events.Loaded(), 0.0)
    return rank


def ready() -> Rank:
    rank = joining()
    rank.handle(events.CoordinatorSaid(Admit(0, 5, 0)), 0.0)
    return rank


def turn(rank: Rank, *, work: bool = False) -> events.Effect:
    return rank.handle(events.Turn(Load(), work), 0.0)[-1]


def told(rank: Rank, number: int, weights: Weights | None, *, released: bool = False) -> None:
    rank.handle(events.CoordinatorSaid(Suspension(number, "keep", released, weights)), 0.0)


def said(effects: list[events.Effect]) -> RankHello:
    hellos = [
        one.message for one in effects if isinstance(one, events.ToCoordinator) and isinstance(one.message, RankHello)
    ]
    return hellos[-1]


def test_it_makes_them_ready_and_says_so_and_takes_them_before_a_step() -> None:
    rank = ready()
    told(rank, 1, UNDER_WAY)
    assert turn(rank) == events.StageWeights(1, "{}")
    hello = said(rank.handle(events.WeightsDone(1, False), 0.0))
    assert hello.weights is not None
    assert (hello.weights.ready, hello.weights.has) == (1, 0)
    assert turn(rank) == events.Wait(None)
    told(rank, 2, IN_FORCE, released=True)
    assert turn(rank, work=True) == events.UseWeights(1, "{}", False)
    rank.handle(events.WeightsDone(1, True), 0.0)
    assert turn(rank, work=True) == events.Step(None)


def test_it_says_why_it_cannot_have_them() -> None:
    rank = ready()
    told(rank, 1, UNDER_WAY)
    turn(rank)
    hello = said(rank.handle(events.WeightsDone(1, False, "they are too large"), 0.0))
    assert hello.weights is not None
    assert (hello.weights.failed, hello.weights.why) == (1, "they are too large")
    assert turn(rank) == events.Wait(None), "once is enough"


def test_one_that_cannot_take_them_or_has_lost_its_own_starts_again() -> None:
    rank = ready()
    told(rank, 1, IN_FORCE)
    turn(rank)
    (effect, *_) = [
        one for one in rank.handle(events.WeightsDone(1, True, "gone"), 0.0) if isinstance(one, events.StartAgain)
    ]
    assert effect == events.StartAgain("weights 1: gone")
    rank = ready()
    told(rank, 1, UNDER_WAY)
    turn(rank)
    rank.handle(events.WeightsDone(1, False, spoils=True), 0.0)
    told(rank, 1, Weights(2, outcome="failed"))
    assert isinstance(turn(rank), events.StartAgain)


def test_one_that_joins_has_them_before_it_is_ready() -> None:
    rank = joining()
    admit = events.CoordinatorSaid(Admit(0, 5, 0, Suspension(2, "keep", True, IN_FORCE)))
    assert rank.handle(admit, 0.0) == []
    assert turn(rank) == events.UseWeights(1, "{}", False)
    assert not said(rank.handle(events.WeightsDone(1, True), 0.0)).ready
    assert said(rank.handle(admit, 0.0)).ready


def test_each_token_says_which_weights_chose_it() -> None:
    rank = ready()
    rank.handle(events.FrontendSaid(FRONTEND, AddRequest(3, 1, 5, 0, [1], SamplingParams(9))), 0.0)
    stepped = events.Stepped([events.StepOutput(1, [4])], Load(), True)

    def version() -> str:
        (out,) = [one.message for one in rank.handle(stepped, 0.0) if isinstance(one, events.ToFrontend)]
        return out.outputs[0].weight_version

    assert version() == ""
    told(rank, 1, UNDER_WAY)
    turn(rank)
    # What its engine had under way was made by the weights before.
    done = rank.handle(events.WeightsDone(1, False, outputs=[events.StepOutput(1, [5])]), 0.0)
    (late,) = [one.message for one in done if isinstance(one, events.ToFrontend)]
    assert late.outputs[0].weight_version == ""
    told(rank, 2, IN_FORCE, released=True)
    turn(rank, work=True)
    rank.handle(events.WeightsDone(1, True), 0.0)
    assert version() == "one"


def test_an_older_word_changes_nothing() -> None:
    rank = ready()
    told(rank, 1, IN_FORCE)
    told(rank, 1, UNDER_WAY)
    assert rank.weights.known == IN_FORCE
