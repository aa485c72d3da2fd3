"""Reports handled together say what they say one by one."""

from __future__ import annotations

from hypothesis import given, strategies as st

from paceline.core.coordinator.events import Effect, RankSaid, RanksReported, Tick, ToFrontends
from paceline.core.coordinator.machine import Coordinator
from paceline.core.load import Load
from paceline.core.messages import PROTOCOL_VERSION, LoadView, RankHello, RankReport

RANKS = 3
LIFE = 7

reports = st.lists(
    st.builds(
        RankReport,
        rank=st.integers(0, RANKS),
        incarnation=st.sampled_from([LIFE, LIFE, LIFE, LIFE + 1]),
        step=st.integers(0, 4),
        wave=st.integers(0, 2),
        running=st.booleans(),
        load=st.builds(Load, waiting=st.integers(0, 3)),
    ),
    max_size=20,
)


def ready_coordinator(lockstep: bool) -> Coordinator:
    coordinator = Coordinator(RANKS, 1, 0.1, lockstep=lockstep)
    for rank in range(RANKS):
        hello = RankHello(PROTOCOL_VERSION, rank, LIFE, f"ipc:///rank-{rank}", ready=True)
        coordinator.handle(RankSaid(hello), 0.0)
    coordinator.handle(Tick(), 10.0)
    return coordinator


def last_view(effects: list[Effect]) -> LoadView | None:
    views = [
        effect.message for effect in effects if isinstance(effect, ToFrontends) and isinstance(effect.message, LoadView)
    ]
    return views[-1] if views else None


def heartbeat(coordinator: Coordinator) -> LoadView | None:
    # The first Tick may begin to wait for half a step.
    return last_view([*coordinator.handle(Tick(), 30.0), *coordinator.handle(Tick(), 31.0)])


@given(reports, st.booleans())
def test_the_state_is_the_same(said: list[RankReport], lockstep: bool) -> None:
    together, apart = ready_coordinator(lockstep), ready_coordinator(lockstep)
    together.handle(RanksReported(said), 10.01)
    for report in said:
        apart.handle(RankSaid(report), 10.01)
    together_view, apart_view = heartbeat(together), heartbeat(apart)
    assert together_view is not None
    assert apart_view is not None
    assert (together_view.ranks, together_view.wave, together_view.running) == (
        apart_view.ranks, apart_view.wave, apart_view.running,
    )  # fmt: skip
    assert together.statistics()["void_messages"] == apart.statistics()["void_messages"]


def report(rank: int, step: int) -> RankReport:
    return RankReport(rank, LIFE, step, 0, True, Load(waiting=step))


def test_a_view_that_waits_for_one_step_goes_out_before_the_next_one_begins() -> None:
    coordinator = ready_coordinator(lockstep=True)
    # All have said step 1, and one already step 2: the view that was due shows step 1.
    said = [*(report(rank, 1) for rank in range(RANKS)), report(0, 2)]
    view = last_view(coordinator.handle(RanksReported(said), 10.2))
    assert view is not None
    assert view.ranks is not None
    assert {entry.step for entry in view.ranks} == {1}


def test_no_report_at_all_changes_nothing() -> None:
    coordinator = ready_coordinator(lockstep=False)
    assert coordinator.handle(RanksReported([]), 10.01) == []
