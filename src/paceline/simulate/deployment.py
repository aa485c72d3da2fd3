"""A whole deployment of the real machines on one virtual clock: lives that begin and end, and their links."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Set
from functools import partial
from typing import Any

from paceline.core import codec
from paceline.core.coordinator import events as coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.frontend import events as frontend_events
from paceline.core.frontend.machine import Frontend
from paceline.core.messages import Member, ToFrontend, ToRank
from paceline.core.rank import events as rank_events
from paceline.core.rank.machine import Rank
from paceline.core.routing.least import LeastLoad
from paceline.simulate.checks import Checks
from paceline.simulate.collectives import Groups
from paceline.simulate.coordinator_party import CoordinatorParty
from paceline.simulate.engine import VirtualEngine
from paceline.simulate.frontend_party import FrontendParty
from paceline.simulate.network import Link
from paceline.simulate.rank_party import RankParty
from paceline.simulate.shape import Shape as Shape
from paceline.simulate.world import Seeds, World


class Deployment:
    """All parties, by number; `start` begins them. A party that has died is replaced by its next life, or by none."""

    def __init__(
        self, shape: Shape, seeds: Seeds | None = None, checks: Checks | None = None, without: Set[str] = frozenset()
    ) -> None:
        self.shape = shape
        self.seeds = seeds or Seeds(0)
        self.checks = checks or Checks()
        self.world = World()
        self.loss = shape.loss
        self.without = without
        scatter = self.seeds.stream("scatter") if shape.scatter else None
        self.groups = Groups(self.world, scatter)
        self._fixed = self.groups.fixed(shape.ranks) if shape.lockstep and not shape.grouped else None
        self.coordinator: CoordinatorParty | None = None
        self.coordinators: list[CoordinatorParty] = []
        self.ranks: dict[int, RankParty] = {}
        self.frontends: dict[int, FrontendParty] = {}
        self.checks.watch(self.ranks, self.frontends)
        self.retired: list[FrontendParty] = []
        """Front-ends that have died, with what their clients got."""
        self._links: list[Link] = []
        self._backs: dict[tuple[int, int], tuple[FrontendParty, Link]] = {}
        self._severed: set[tuple[int, int]] = set()
        self._lives = itertools.count(1)
        self._connecting = self.seeds.stream("connecting")

    def start(self) -> Deployment:
        """Begin a coordinator, all front-ends and all ranks."""
        self.start_coordinator()
        for index in range(self.shape.frontends):
            self.start_frontend(index)
        for number in range(self.shape.ranks):
            self.start_rank(number)
        return self

    # Lives --------------------------------------------------------------------------------------

    def start_coordinator(self) -> CoordinatorParty:
        """A new life of the coordinator, empty; all others' connections come up in their time."""
        shape = self.shape
        machine = Coordinator(
            self.size(), next(self._lives), 0.0 if shape.external else shape.interval_s, lockstep=shape.lockstep,
            publish_loads=not shape.external, fresh=not self.coordinators, without=self.without,
        )  # fmt: skip
        party = CoordinatorParty(self.world, machine, self.checks, self._to_ranks, self._to_frontends)
        self.coordinator = party
        self.coordinators.append(party)
        party.feed(coordinator.Tick())
        for frontend in self.frontends.values():
            self._connect_frontend(frontend)
        for rank in self.ranks.values():
            self._connect_rank(rank)
        return party

    def crash_coordinator(self) -> None:
        """It is gone. What others send it waits at their side for the next one, but for what was on the wire."""
        if self.coordinator is not None:
            self.coordinator.kill()
        self.coordinator = None
        parties: list[RankParty | FrontendParty] = [*self.ranks.values(), *self.frontends.values()]
        for party in parties:
            party.connected = False
            party.to_coordinator.cut()
            party.to_coordinator.hold()

    def start_rank(self, number: int) -> RankParty:
        """A new life of a rank, its engine loaded."""
        shape, life = self.shape, next(self._lives)
        address = f"tcp://rank-{number}" if shape.same_address else f"tcp://rank-{number}-{life}"
        machine = Rank(
            number, life, address, lockstep=shape.lockstep, report_loads=not shape.external,
            sync_interval=shape.sync_interval, prefill_quota=shape.prefill_quota, without=self.without,
            group_address=f"tcp://group-{number}-{life}" if shape.lockstep and shape.grouped else "",
        )  # fmt: skip
        engine = VirtualEngine(shape.costs, shape.slots, shape.budget)
        party = RankParty(
            self.world, machine, engine, shape.lockstep, self.groups, self.checks, self._back, self._fixed
        )
        party.to_coordinator = self._link(f"{party.name} to coordinator", codec.from_rank(), self._from_rank)
        party.broadcasts = self._link(f"coordinator to {party.name}", codec.to_rank(), party.hear)
        party.to_coordinator.hold()
        self.ranks[number] = party
        self._connect_rank(party)
        party.start()
        return party

    def crash_rank(self, number: int) -> None:
        """The rank's process is gone without a word; the coordinator sees its connection end."""
        party = self.ranks[number]
        self.world.journal.record(self.world.now, party.name, "crashes")
        party.kill()
        party.broadcasts.close()
        if party.connected:
            gone, life = coordinator.RankGone(number, party.machine.incarnation), self.coordinator
            self.world.after(self.shape.links.draw(self._connecting), lambda: self._tell(life, gone))
        for frontend in self.frontends.values():
            down = partial(frontend.link_down, number, party.machine.incarnation)
            self.world.after(self.shape.links.draw(self._connecting), down)

    def cut_link(self, number: int, index: int, *, severed: bool) -> Callable[[], None] | None:
        """A front-end's connection to a rank that lives ends. Returns what brings it up again; None where it has none.

        `severed`: what was on its way is lost, and the rank finds the front-end gone when it sends; else it comes
        late, as when the rank's process was stopped and goes on.
        """
        rank, frontend = self.ranks[number], self.frontends[index]
        life, identity = rank.machine.incarnation, frontend.machine.identity
        if not rank.alive or not frontend.alive or frontend.lives.get(number) != life:
            return None
        links = [link for link in (frontend.to_ranks.get(number), self._back(rank, identity)) if link is not None]
        for link in links:
            if severed:
                link.cut()
            link.hold()
        if severed:
            rank.gone.add(identity)
            self._severed.add((identity, life))
        frontend.link_down(number, life)

        def up() -> None:
            self._severed.discard((identity, life))
            if rank.alive:
                frontend.link_up(number, life)
            for link in links:
                link.release()

        return up

    def start_frontend(self, index: int) -> FrontendParty:
        """A new life of a front-end."""
        shape = self.shape
        machine = Frontend(
            1_000_000 + next(self._lives), LeastLoad(index, shape.frontends),
            ranks=frozenset({index}) if shape.external else None,
            relay_sends=shape.frontends > 1 and not shape.external, lockstep=shape.lockstep,
            late_binding=shape.late_binding, resumes=True, without=self.without,
        )  # fmt: skip
        party = FrontendParty(self.world, f"front-end {index}", machine, self.checks, self._dial)
        party.to_coordinator = self._link(f"{party.name} to coordinator", codec.from_frontend(), self._from_frontend)
        party.to_coordinator.loss = self.loss
        party.broadcasts = self._link(f"coordinator to {party.name}", codec.to_frontend(), party.hear)
        party.to_coordinator.hold()
        self.frontends[index] = party
        self._connect_frontend(party)
        party.feed(frontend_events.Connected())
        return party

    def crash_frontend(self, index: int) -> None:
        """The front-end's process is gone; the coordinator sees its connection end, ranks when they next send to it."""
        party = self.frontends[index]
        self.world.journal.record(self.world.now, party.name, "crashes")
        party.kill()
        party.broadcasts.close()
        self.retired.append(party)
        gone = coordinator.FrontendGone(party.machine.identity)
        self.world.after(self.shape.links.draw(self._connecting), lambda: self._tell(self.coordinator, gone))

    def lose_no_more(self) -> None:
        """From now on everything sent arrives."""
        self.loss = 0.0
        for link in self._links:
            link.lose_no_more()

    # Waiting ------------------------------------------------------------------------------------

    def ready(self, limit_s: float = 30.0) -> Deployment:
        """Run until every front-end knows every rank that it serves."""
        each = 1 if self.shape.external else self.size()
        known = lambda: all(len(f.machine.ready_ranks()) == each for f in self.frontends.values())  # noqa: E731
        self.world.run_until(known, limit_s, "that every front-end knows every rank")
        return self

    def size(self) -> int:
        """Ranks that there are to be."""
        return self.shape.ranks

    def present(self) -> dict[int, RankParty]:
        """The ranks that there are."""
        return self.ranks

    def revive_rank(self, number: int) -> None:
        """A rank that has died is started again."""
        self.start_rank(number)

    def living_frontend(self, index: int) -> FrontendParty | None:
        """This front-end, or the next one that lives; None where none does."""
        count = len(self.frontends)
        parties = [self.frontends[(index + further) % count] for further in range(count)]
        return next((party for party in parties if party.alive), None)

    def controlled(self) -> bool:
        """Whether no operator waits."""
        return all(call.over for frontend in self.frontends.values() for call in frontend.calls.values())

    def finish(self, limit_s: float = 30.0) -> float:
        """Run until every request is answered; returns how many seconds that took."""
        return self.world.run_until(self.finished, limit_s, "that every request is answered")

    def finished(self) -> bool:
        """Whether no client waits."""
        return all(frontend.finished() for frontend in self.frontends.values())

    # Connections --------------------------------------------------------------------------------

    def _connect_rank(self, party: RankParty) -> None:
        """A rank has two connections, and either may come up first."""
        life = self.coordinator
        if life is None:
            return

        def subscribe() -> None:
            if party.alive and life is self.coordinator and not party.connected:
                party.connected = True
                life.feed(coordinator.RankSubscribed(party.machine.rank, party.machine.incarnation))

        self.world.after(self._draw_connecting(), subscribe)
        self.world.after(self._draw_connecting(), partial(self._release, party.to_coordinator, life))

    def _connect_frontend(self, party: FrontendParty) -> None:
        life = self.coordinator
        if life is None:
            return

        def subscribe() -> None:
            if party.alive and life is self.coordinator and not party.connected:
                party.connected = True
                life.feed(coordinator.FrontendSubscribed())
                party.to_coordinator.release()

        self.world.after(self._draw_connecting(), subscribe)

    def _release(self, link: Link, life: CoordinatorParty) -> None:
        if life is self.coordinator:
            link.release()

    def _dial(self, frontend: FrontendParty, member: Member) -> Link:
        self.checks.connected(frontend, member)
        identity, number = frontend.machine.identity, member.rank
        name = f"{frontend.name} to rank {number}"

        def deliver(message: Any) -> None:
            target = self.ranks[number]
            if target.alive and target.machine.address == member.address:
                target.arrive(rank_events.FrontendSaid(identity, message))

        life = self.ranks[number].machine.incarnation
        if (identity, life) not in self._backs:
            back = self._link(f"rank {number} to {frontend.name}", codec.outputs(), partial(_outputs, frontend))
            self._backs[identity, life] = (frontend, back)
        return self._link(name, codec.request(), deliver)

    def _back(self, rank: RankParty, identity: int) -> Link | None:
        """The way back to a front-end; a life that answers at its predecessor's address has the same one."""
        frontend, link = self._backs.get((identity, rank.machine.incarnation), (None, None))
        if frontend is None:
            frontend = next((f for f in self.frontends.values() if f.machine.identity == identity), None)
            if frontend is None:
                return None
            link = self._link(f"{rank.name} to {frontend.name}", codec.outputs(), partial(_outputs, frontend))
            self._backs[identity, rank.machine.incarnation] = (frontend, link)
        severed = (identity, rank.machine.incarnation) in self._severed
        return link if frontend.alive and not severed else None

    def _link(self, name: str, decoder: codec.Decoder[Any], deliver: Callable[[Any], None]) -> Link:
        decoder_used = decoder if self.shape.encode else None
        stream = self.seeds.stream(f"link {name} {len(self._links)}")
        link = Link(self.world, name, decoder_used, deliver, self.shape.links, stream)
        self._links.append(link)
        return link

    def _draw_connecting(self) -> float:
        return self.shape.connecting.draw(self._connecting)

    # The coordinator's links --------------------------------------------------------------------

    def _from_rank(self, message: Any) -> None:
        self._tell(self.coordinator, coordinator.RankSaid(message))

    def _from_frontend(self, message: Any) -> None:
        self._tell(self.coordinator, coordinator.FrontendSaid(message))

    def _tell(self, life: CoordinatorParty | None, event: coordinator.Event) -> None:
        if life is not None:
            life.feed(event)

    def _to_ranks(self, message: ToRank) -> None:
        for rank in self.ranks.values():
            if rank.connected and rank.alive:
                rank.broadcasts.loss = self.loss
                rank.broadcasts.send(message)

    def _to_frontends(self, message: ToFrontend) -> None:
        for frontend in self.frontends.values():
            if frontend.connected and frontend.alive:
                frontend.broadcasts.loss = self.loss
                frontend.broadcasts.send(message)


def _outputs(frontend: FrontendParty, message: Any) -> None:
    frontend.feed(frontend_events.RankSaid(message))
