"""What a deployment did lately, in letters and in words, as a real front-end's machine saw it."""

from __future__ import annotations

from typing import Any

from paceline.core import messages
from paceline.core.frontend import events
from paceline.core.frontend.history import KEPT, SAMPLE_S, History
from paceline.core.frontend.machine import Frontend
from paceline.core.frontend.timeline import Timelines
from paceline.core.load import Load
from paceline.core.requests import Output
from paceline.core.routing.least import LeastLoad

LIFE = 100


def members(*ranks: int, size: int = 3, coordinator: int = 9, **fields: Any) -> events.CoordinatorSaid:
    there = [messages.Member(rank, LIFE + rank, f"rank {rank}") for rank in ranks]
    missing = [rank for rank in range(size) if rank not in ranks]
    scaling = messages.Scaling(2, size, size)
    told = {"missing": missing, "scaling": scaling} | fields
    return events.CoordinatorSaid(
        messages.Members(messages.PROTOCOL_VERSION, coordinator, 0, False, there, **told)
    )  # fmt: skip


def view(number: int, *loads: Load, coordinator: int = 9, **fields: Any) -> events.CoordinatorSaid:
    ranks = [messages.RankView(rank, LIFE + rank, number, load) for rank, load in enumerate(loads)]
    running = fields.pop("running", False)
    return events.CoordinatorSaid(messages.LoadView(coordinator, number, 0, running, ranks, **fields))


def watched(*happen: events.Event, lockstep: bool = False) -> tuple[Frontend, History]:
    machine = Frontend(1, LeastLoad(), lockstep=lockstep)
    for event in happen:
        machine.handle(event, 0.0)
    return machine, History(machine, Timelines(), lockstep=lockstep)


def doing(history: History) -> str:
    return "".join(one.doing for one in history.ranks())


def words(history: History) -> list[str]:
    return [said.text for said in history.words]


def test_what_each_rank_does_is_one_thing() -> None:
    loads = Load(running=2, slots=4), Load(running=1, waiting=1, prefill_tokens=30, slots=4), Load(slots=4)
    machine, history = watched(members(0, 1, 2), view(1, *loads))
    history.look(0.0)
    assert doing(history) == "dpi"
    assert [one.full for one in history.ranks()] == ["i", "i", "0"]
    machine.handle(view(2, *loads, suspension=messages.SuspensionState(1, "keep", False, [1])), 0.0)
    assert doing(history) == "xpx"
    machine.handle(events.LinkDown(2), 0.0)
    assert doing(history) == "xpm"
    assert [one.full for one in history.ranks()][2] == "0"


def test_a_rank_without_work_runs_dummy_steps_in_a_wave_and_one_that_never_came_loads() -> None:
    machine, history = watched(members(0, 1), view(1, Load(), Load(running=1), running=True), lockstep=True)
    assert doing(history) == "ydl"
    stall = messages.Stall(0, 5, 0, "step", 31.0, [])
    machine.handle(members(0, 1, stalls=[stall]), 1.0)
    assert doing(history) == "hdl"
    assert history.ranks()[0].hangs_s == 31.0


def test_what_changes_is_said_in_words_once() -> None:
    machine, history = watched(members(0, 1, 2))
    history.look(0.0)
    assert words(history) == ["rank 0 is ready", "rank 1 is ready", "rank 2 is ready"]
    machine.handle(events.LinkDown(1), 1.0)
    history.look(1.0)
    history.look(1.1)
    machine.handle(events.LinkUp(1), 2.0)
    history.look(2.0)
    assert words(history)[3:] == ["rank 1 is gone", "rank 1 is back"]
    assert [said.urgent for said in history.words][3:] == [True, False]
    machine.handle(members(0, 1, 2, stalls=[messages.Stall(2, 5, 0, "step", 31.0, [])]), 3.0)
    history.look(3.0)
    machine.handle(members(0, 1, 2), 4.0)
    history.look(4.0)
    assert words(history)[5:] == ["rank 2 hangs in a step: its requests go on elsewhere", "rank 2 goes on"]


def test_a_rank_that_was_gone_between_two_looks_is_said_to_have_been() -> None:
    machine, history = watched(members(0, 1, 2))
    history.look(0.0)
    there = [messages.Member(rank, LIFE + rank + 10 * (rank == 1), f"rank {rank}") for rank in range(3)]
    said = messages.Members(messages.PROTOCOL_VERSION, 9, 0, False, there, scaling=messages.Scaling(2, 3, 3))
    machine.handle(events.CoordinatorSaid(said), 1.0)
    history.look(1.0)
    assert words(history)[-2:] == ["rank 1 is gone", "rank 1 is back"]


def test_pausing_scaling_and_another_coordinator_are_said() -> None:
    machine, history = watched(members(0, 1, 2), view(1, Load(), Load(), Load()))
    history.look(0.0)
    assert len(history.lives) == 1
    machine.handle(view(2, Load(), suspension=messages.SuspensionState(1, "keep", False)), 1.0)
    history.look(1.0)
    machine.handle(view(3, Load(), suspension=messages.SuspensionState(2, "keep")), 2.0)
    history.look(2.0)
    machine.handle(members(0, 1, 2, scaling=messages.Scaling(3, 3, 2)), 3.0)
    history.look(3.0)
    machine.handle(members(0, 1, size=2, scaling=messages.Scaling(4, 2, 2)), 4.0)
    history.look(4.0)
    machine.handle(members(0, 1, size=2, coordinator=10, scaling=messages.Scaling(4, 2, 2)), 5.0)
    history.look(5.0)
    assert words(history)[3:] == [
        "the deployment is asked to pause", "the deployment goes on", "it is scaled from 3 to 2 ranks",
        "rank 2 leaves", "there are 2 ranks",
    ]  # fmt: skip
    assert history.lives == [0.0, 5.0]


def test_fifteen_minutes_are_kept_and_no_more_than_a_sample_each_few_seconds() -> None:
    _, history = watched(members(0, 1, 2))
    for tick in range(int((KEPT + 50) * SAMPLE_S / 0.5)):
        history.look(tick * 0.5)
    assert len(history.samples) == KEPT
    assert {len(one.doing) for one in history.samples} == {3}
    assert history.samples[-1].at - history.samples[0].at == (KEPT - 1) * SAMPLE_S


def test_tokens_a_second_are_by_rank() -> None:
    timelines = Timelines()
    machine = Frontend(1, LeastLoad())
    history = History(machine, timelines)
    history.look(0.0)
    timelines.submitted(1, 5, None, 0.0)
    timelines.placed(events.Placed(1, 2), 0.0)
    timelines.outputs([Output(1, [1] * 8, "a")], 0.5)
    history.look(2.0)
    assert history.rates == {2: 4.0}
    history.look(4.0)
    assert history.rates == {2: 0.0}
