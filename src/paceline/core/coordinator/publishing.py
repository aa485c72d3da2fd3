"""What the coordinator tells all front-ends, and when: who is there, every rank's load, the wave, the pause."""

from __future__ import annotations

from collections.abc import Sequence

from msgspec import Struct

from paceline.core.coordinator.events import Effect, ToFrontends
from paceline.core.coordinator.load_table import HEARTBEAT_S, STEP_WAIT_S, LoadTable, PublishClock
from paceline.core.coordinator.membership import Membership
from paceline.core.dispatch.dispatcher import Dispatcher
from paceline.core.messages import PROTOCOL_VERSION, LoadView, Members, Scaling, Stall, SuspensionState


class SnapshotHeader(Struct, frozen=True):
    """What a view says besides the loads; `free`: whether work may be started."""

    wave: int
    running: bool
    suspension: SuspensionState
    free: bool
    scaling: Scaling


class Publisher:
    """The views of one coordinator. `with_loads`: False in external mode. `step_wait_s`: in lockstep, how long a view
    waits for ranks that have not reported the same step; None where no view waits.
    """

    INCIDENTAL = frozenset({"views"})

    def __init__(
        self, identity: int, interval_s: float, *, with_loads: bool, step_wait_s: float | None = STEP_WAIT_S
    ) -> None:
        self.views = 0
        """Published so far."""
        self._identity = identity
        self._with_loads = with_loads
        self._one_step = step_wait_s is not None
        self._clock = PublishClock(interval_s, step_wait_s or 0.0)
        self._members_due = True
        self._members_sent = float("-inf")
        self._said = (0, False, 0, True)

    @property
    def deadline(self) -> float:
        """When to ask again, at the latest."""
        return self._clock.deadline()

    def changed(self, now: float) -> None:
        """Something that a view shows has changed."""
        self._clock.changed(now)

    def loads_changed(self, now: float) -> None:
        """A load has changed."""
        if self._with_loads:
            self._clock.changed(now)

    def members_changed(self, now: float) -> None:
        """Somebody has come or gone, or wants to know who is there."""
        self._members_due = True
        self._clock.changed(now)

    def ripe(self, load_table: LoadTable, membership: Membership, now: float) -> bool:
        """Whether a view that waits for one step is due, and all ranks have reported it."""
        return self._one_step and self._clock.due(now) and load_table.one_step(membership.members())

    def publish(
        self,
        header: SnapshotHeader,
        load_table: LoadTable,
        membership: Membership,
        stalls: Sequence[Stall],
        dispatcher: Dispatcher,
        now: float,
    ) -> list[Effect]:
        """What is due now."""
        state = (header.wave, header.running, header.suspension.number, header.suspension.settled)
        # A change of the wave or of running is what front-ends act on: it does not wait.
        if not self._members_due and state == self._said:
            if not self._clock.due(now):
                return []
            if self._one_step and not load_table.one_step(membership.members()) and self._clock.hold(now):
                return []
        effects: list[Effect] = []
        members = membership.members()
        if self._members_due or now >= self._members_sent + HEARTBEAT_S:
            self._members_sent = now
            missing, ended = membership.missing(), membership.ended()
            known = Members(
                PROTOCOL_VERSION, self._identity, header.wave, header.running, members, missing, ended, list(stalls),
                header.scaling,
            )  # fmt: skip
            effects.append(ToFrontends(known))
        self._members_due = False
        self._said = state
        self.views += 1
        ranks = load_table.views(members) if self._with_loads else None
        load_table.pass_over()
        heard = dict(load_table.heard) if self._with_loads else {}
        # Without loads nobody knows where there is room.
        shares = dispatcher.shares(load_table, membership, header.free) if self._with_loads else None
        view = LoadView(
            self._identity, self.views, header.wave, header.running, ranks, heard, header.suspension, shares,
            dispatcher.queued, dispatcher.queues(),
        )  # fmt: skip
        effects.append(ToFrontends(view))
        self._clock.published(now)
        return effects
