"""New weights at the coordinator: made ready at all ranks, put in force once, or left as they were."""

from __future__ import annotations

from hypothesis import given, strategies as st

from paceline.core.coordinator.pause import Pause
from paceline.core.messages import ControlAnswer, ControlRequest, RankHello
from paceline.core.requests import UpdateWeights, WeightAction, Weights, WeightsOfRank

RANKS = (0, 1)
FRONTEND = 7


class Group:
    """A pause, and ranks that say what they are asked to."""

    def __init__(self) -> None:
        self.pause = Pause(lockstep=False)
        self.calls = 0
        self.has = dict.fromkeys(RANKS, 0)
        for rank in RANKS:
            self.say(rank)
        self.pause.ask("keep", 0.0)
        self.all_say()

    @property
    def weights(self) -> Weights:
        return self.pause.weights.state

    def ask(self, action: WeightAction, version: str = "", *, commit: bool = True, now: float = 0.0) -> ControlAnswer:
        self.calls += 1
        request = UpdateWeights(FRONTEND, self.calls, action, version, "{}", commit=commit, timeout_ms=1000)
        self.pause.request(request)
        answers = self.pause.answers(now)
        self.settle(now)
        return answers[0] if answers else ControlAnswer(0, FRONTEND, self.calls, 0, "waits")

    def say(self, rank: int, ready: int = 0, failed: int = 0, now: float = 0.0) -> None:
        """What a rank says that has done what it was told, but for making weights ready."""
        told = self.pause.told()
        known = told.weights or Weights()
        self.has[rank] = known.current
        said = WeightsOfRank(known, known.current, ready, failed, "bad" if failed else "")
        hello = RankHello(1, rank, rank + 100, "", True, suspension=told.number, held=not told.released, weights=said)
        self.pause.hello(hello, now)
        self.settle(now)

    def all_say(self, ready: int = 0) -> None:
        for rank in RANKS:
            self.say(rank, ready)

    def settle(self, now: float = 0.0) -> None:
        self.pause.advance(RANKS, now)
        self.pause.header = self.pause.state(RANKS)


def test_they_come_into_force_when_all_have_them_ready() -> None:
    group = Group()
    assert group.ask("stage", "one") == ControlAnswer(0, FRONTEND, 1, 1)
    assert (group.weights.number, group.weights.next, group.weights.current) == (1, 1, 0)
    group.say(0, ready=1)
    assert group.weights.number == 1
    assert group.pause.state(RANKS).waiting_for == [1]
    group.say(1, ready=1)
    assert (group.weights.number, group.weights.current, group.weights.version) == (2, 1, "one")
    assert not group.pause.header.settled, "they are to say that they have them"
    group.all_say()
    assert group.pause.header.settled
    assert group.pause.header.weights == group.weights


def test_one_that_cannot_have_them_leaves_all_with_what_they_have() -> None:
    group = Group()
    group.ask("stage", "one")
    group.say(0, ready=1)
    group.say(1, failed=1)
    assert (group.weights.number, group.weights.current, group.weights.outcome) == (2, 0, "failed")
    assert group.weights.why == "rank 1: bad"


def test_time_is_up() -> None:
    group = Group()
    group.ask("stage", "one")
    group.say(0, ready=1)
    assert group.pause.due is not None
    assert not group.pause.late(0.9)
    assert group.pause.late(1.0)
    group.settle(1.0)
    assert (group.weights.outcome, group.weights.why) == ("late", "not ready in time at rank 1")


def test_nobody_goes_on_while_an_update_is_under_way() -> None:
    group = Group()
    group.ask("stage", "one", commit=False)
    group.all_say(ready=1)
    assert group.pause.header.settled
    assert group.weights.under_way
    group.pause.ask("resume", 0.0)
    group.all_say(ready=1)
    assert not group.pause.told().released
    group.ask("commit", "two")
    group.all_say(ready=1)
    assert (group.weights.current, group.weights.version) == (1, "two")
    assert group.pause.told().released


def test_what_cannot_be_is_refused() -> None:
    group = Group()
    assert group.ask("commit").why == "no update of the weights is under way"
    assert group.ask("drop").why == "no update of the weights is under way"
    group.ask("stage", "one")
    assert group.ask("stage", "two").why == "an update of the weights is under way"
    assert group.ask("rename", "two").why == "an update of the weights is under way"
    assert group.ask("drop").number == 2
    group.pause.ask("resume", 0.0)
    group.all_say()
    assert group.ask("stage", "two").why == "the ranks are not paused"
    assert group.ask("rename", "three").number == 4
    assert group.weights.version == "three"


def test_a_repeated_call_is_served_once() -> None:
    group = Group()
    group.ask("stage", "one")
    group.all_say(ready=1)
    again = UpdateWeights(FRONTEND, 1, "stage", "one", "{}", timeout_ms=1000, answered=1)
    group.pause.request(again)
    assert group.pause.answers(0.0) == [ControlAnswer(0, FRONTEND, 1, 1)]
    assert group.weights.number == 2


def test_a_new_coordinator_goes_on_by_a_number_of_its_own() -> None:
    before, after = Group(), Pause(lockstep=False)
    before.ask("stage", "one")
    before.all_say(ready=1)
    # Rank 0 had heard of the decision; rank 1 speaks first and had not.
    under_way = Weights(1, next=1, next_version="one", next_source="{}", timeout_ms=1000)
    after.hello(RankHello(1, 1, 101, "", True, suspension=1, held=True, weights=WeightsOfRank(under_way, 0, 1)), 0.0)
    assert after.weights.state.number == 3
    decided = before.weights
    after.hello(RankHello(1, 0, 100, "", True, suspension=1, held=True, weights=WeightsOfRank(decided, 1, 1)), 0.0)
    after.advance(RANKS, 0.0)
    assert after.weights.state.number == 3, "rank 0 has to know this number first"
    for rank in RANKS:
        said = WeightsOfRank(after.weights.state, 0, 1)
        after.hello(RankHello(1, rank, rank + 100, "", True, suspension=1, held=True, weights=said), 0.0)
        after.advance(RANKS, 0.0)
    assert (after.weights.state.number, after.weights.state.current, after.weights.state.version) == (4, 1, "one")


def test_a_request_waits_until_it_is_known_whether_all_are_paused() -> None:
    pause = Pause(lockstep=False)
    pause.known(3, "keep", 0.0)
    pause.request(UpdateWeights(FRONTEND, 1, "stage"))
    pause.request(ControlRequest(FRONTEND, 2, "keep"))
    assert [answer.call for answer in pause.answers(0.0)] == [2]
    assert pause.asked


@given(
    steps=st.lists(
        st.one_of(
            st.tuples(st.just("ask"), st.sampled_from(["stage", "commit", "drop", "rename"])),
            st.tuples(st.just("pause"), st.sampled_from(["keep", "resume"])),
            st.tuples(st.just("say"), st.tuples(st.sampled_from(RANKS), st.sampled_from(["ready", "failed", ""]))),
            st.tuples(st.just("time"), st.none()),
        ),
        max_size=25,
    )
)
def test_whatever_happens_no_rank_may_step_with_other_weights_than_another(steps: list[tuple[str, object]]) -> None:
    group, number, now = Group(), 0, 0.0
    for what, value in steps:
        if what == "ask":
            group.ask(value, "x", now=now)  # type: ignore[arg-type]
        elif what == "pause":
            group.pause.ask(value, now)  # type: ignore[arg-type]
        elif what == "time":
            now += 0.6
        else:
            rank, how = value  # type: ignore[misc]
            name = {how: group.weights.next} if how else {}
            group.say(rank, now=now, **name)
        group.settle(now)
        assert group.weights.number >= number
        number = group.weights.number
        told = group.pause.told()
        assert not (told.released and told.weights is not None and told.weights.under_way)
