"""How a rank, a suspension and a generation change, as tables: what docs/WAVES.md draws, and a test holds.

The machines do not read these tables: what moves them depends on more than one word can say. The test runs whole
deployments and compares every change that happens with the tables, both ways (`tests/protocol/test_transitions.py`).
"""

from __future__ import annotations

from paceline.protocol.coordination.generation import Generations
from paceline.protocol.coordination.suspension import GroupSuspension
from paceline.protocol.rank import Rank
from paceline.protocol.rank_events import CoordinatorSaid, Event, FrontEndSaid
from paceline.protocol.ranks.phase import Phase

Table = dict[tuple[str, str], set[str]]
"""(state, what happens) to the states that may follow. What changes nothing is left out."""

RANK: Table = {
    ("loading", "Loaded"): {"joining"},
    ("joining", "Admit"): {"paused", "held"},
    ("joining", "Formed"): {"paused", "held"},
    ("paused", "AddRequest"): {"running"},
    ("paused", "StartDPWave"): {"running"},
    ("paused", "Turn"): {"running"},
    ("paused", "Suspension"): {"held"},
    ("paused", "Form"): {"held"},
    ("running", "Agreed"): {"paused", "held"},
    ("held", "StartDPWave"): {"running"},
    ("held", "Suspension"): {"paused"},
    ("held", "Form"): {"paused"},
    ("paused", "Leave"): {"left"},
    ("running", "Leave"): {"left"},
    ("held", "Leave"): {"left"},
    ("joining", "Leave"): {"left"},
}
"""A lockstep rank. `held`: paused, and the suspension keeps it from starting anything by itself."""

SUSPENSION: Table = {
    ("free", "asked to pause"): {"suspending"},
    ("free", "a higher number is heard"): {"suspending", "resuming"},
    ("free", "a rank pauses that has not heard the release"): {"releasing"},
    ("suspending", "all hold"): {"suspended"},
    ("suspending", "asked to resume"): {"resuming"},
    ("suspended", "asked to resume"): {"resuming"},
    ("suspended", "a rank is not heard any more"): {"suspending"},
    ("resuming", "all know"): {"releasing", "free"},
    ("resuming", "asked to pause"): {"suspending"},
    ("releasing", "all are released"): {"free"},
    ("releasing", "asked to pause"): {"suspending"},
}
"""The coordinator's transaction."""

GENERATION: Table = {
    ("ended", "all have spoken"): {"forming"},
    ("ended", "all name one generation"): {"formed"},
    ("forming", "all name one generation"): {"formed"},
    ("forming", "a life is new, or it takes too long"): {"ended"},
    ("formed", "a life is new, or a member fell out"): {"ended"},
}
"""The group that runs its collectives together."""


def rank_state(rank: Rank) -> str:
    """A rank's state, as `RANK` names it."""
    if rank.phase is not Phase.READY:
        return str(rank.phase.value)
    if rank.running:
        return "running"
    return "held" if rank.held else "paused"


def event_name(event: Event) -> str:
    """What happens to a rank: the message, where it is one."""
    inner = event.message if isinstance(event, CoordinatorSaid | FrontEndSaid) else event
    return type(inner).__name__


def suspension_state(suspension: GroupSuspension, expected: list[int]) -> str:
    """A suspension's state, as `SUSPENSION` names it."""
    settled = suspension.state(expected).settled
    if suspension.standing.suspended:
        return "suspended" if settled else "suspending"
    if not suspension.standing.released:
        return "resuming"
    return "free" if settled else "releasing"


def generation_state(generations: Generations) -> str:
    """A generation's state, as `GENERATION` names it."""
    if generations.ended:
        return "ended"
    return "forming" if generations.forming else "formed"


def diagram(table: Table) -> str:
    """The table as a Mermaid state diagram."""
    lines = ["stateDiagram-v2"]
    for (state, event), following in table.items():
        lines += [f"    {state} --> {after}: {event}" for after in sorted(following)]
    return "\n".join(lines)
