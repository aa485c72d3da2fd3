"""A whole deployment of the real machines on one virtual clock: lives that begin and end, and their links."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Set
from functools import partial
from typing import Any

from msgspec import Struct

from paceline.core import codec
from paceline.core.coordinator import events as coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.frontend import events as frontend_events
from paceline.core.frontend.machine import Frontend
from paceline.core.messages import Member, ToFrontend, ToRank
from paceline.core.node import Node, RankEnded
from paceline.core.rank import events as rank_events
from paceline.core.rank.hang import Limits
from paceline.core.rank.machine import Rank
from paceline.core.rank.prefill_quota import OFF
from paceline.core.routing.least import LeastLoad
from paceline.core.routing.policy import Policy
from paceline.engines.timed import CostModel
from paceline.sim.checks import Checks
from paceline.sim.collectives import Groups
from paceline.sim.engine import VirtualEngine
from paceline.sim.processes import NODE, CoordinatorProcess, Engine, FrontendProcess, NodeProcess, RankProcess, Watch
from paceline.sim.world import STEADY, Delays, Link, Seeds, World

NODE_IDENTITY = 900_000
FIRST_FRONTEND = 1_000_000
AGAIN_S = 0.3
LONGEST_LOADING_S = 2.0
HANG_NAMED_S, HANG_ENDED_S = 0.3, 1.5
Connected = RankProcess | FrontendProcess | NodeProcess
"""Those that have a connection to the coordinator."""


class Shape(Struct, frozen=True):
    """What a deployment is made of.

    `grouped`: whether lockstep ranks form epochs; else their engines have collectives of their own, and a
    rank's death is theirs to deal with. `external`, `hybrid`: each front-end has the rank of its number alone.
    `scaled`: whether a node starts and ends ranks, so that the size may change. `connecting`: how long a connection
    takes to come up. `encode`: whether messages travel as bytes. `loss`: the share of the coordinator's broadcasts, and
    of front-ends' notices, that get lost. `same_address`: whether a rank's next life is reached where the last one was.
    `once`: whether a rank's life can be a member of one epoch only, and loads in it, up to `LONGEST_LOADING_S`.
    `scatter`: whether ranks leave a collective a little apart. `late_binding`: whether front-ends' requests wait in the
    coordinator's queue. `watched`: whether a journal is kept, and front-ends look at each view as it comes.
    """

    ranks: int = 2
    frontends: int = 1
    lockstep: bool = True
    grouped: bool = True
    external: bool = False
    hybrid: bool = False
    scaled: bool = False
    sync_interval: int = 16
    prefill_quota: int = OFF
    interval_s: float = 0.1
    costs: CostModel = CostModel()
    slots: int = 16
    budget: int = 512
    links: Delays = STEADY
    connecting: Delays = STEADY
    encode: bool = True
    loss: float = 0.0
    same_address: bool = False
    once: bool = False
    scatter: bool = False
    late_binding: bool = False
    watched: bool = True


class Deployment:
    """All processes, by number; `start` begins them. One that has died is replaced by its next life, or by none.

    Where it is scaled, a rank that has left stays in `ranks`, dead.
    """

    def __init__(
        self, shape: Shape, seeds: Seeds | None = None, checks: Watch | None = None, without: Set[str] = frozenset()
    ) -> None:
        self.shape = shape
        self.seeds = seeds or Seeds(0)
        self.checks = checks or Checks()
        self.world = World(shape.watched)
        self.loss = shape.loss
        self.without = without
        scatter = self.seeds.stream("scatter") if shape.scatter else None
        self.groups = Groups(self.world, scatter)
        self._fixed = self.groups.fixed(shape.ranks) if shape.lockstep and not shape.grouped else None
        self.coordinator: CoordinatorProcess | None = None
        self.coordinators: list[CoordinatorProcess] = []
        self.ranks: dict[int, RankProcess] = {}
        self.frontends: dict[int, FrontendProcess] = {}
        self.retired: list[FrontendProcess] = []
        """Front-ends that have died, with what their clients got."""
        self.node: NodeProcess | None = None
        self._links: list[Link] = []
        self._backs: dict[tuple[int, int], tuple[FrontendProcess, Link]] = {}
        self._severed: set[tuple[int, int]] = set()
        self._lives = itertools.count(1)
        self._connecting = self.seeds.stream("connecting")
        self._loads = self.seeds.stream("loading")
        self._loading: set[int] = set()
        if isinstance(self.checks, Checks):
            self.checks.deployed(self.ranks, self.frontends, not shape.external)
        if shape.scaled:
            machine = Node(NODE_IDENTITY, range(shape.ranks), shape.ranks)
            self.node = NodeProcess(self.world, machine, self.start_loading, self.stop_rank)
            self._join(self.node, NODE, codec.from_rank(), coordinator.RankSaid, codec.to_rank())

    def start(self) -> Deployment:
        self.start_coordinator()
        for index in range(self.shape.frontends):
            self.start_frontend(index)
        for number in range(self.shape.ranks):
            self.start_rank(number)
        return self

    # What is there ------------------------------------------------------------------------------

    def size(self) -> int:
        return self.shape.ranks if self.node is None else self.node.machine.scaling.size

    def present(self) -> dict[int, RankProcess]:
        if self.node is None:
            return self.ranks
        return {number: rank for number, rank in self.ranks.items() if number in self.node.machine.ranks}

    def living_frontend(self, index: int) -> FrontendProcess | None:
        """This front-end, or the next one that lives; None where none does."""
        count = len(self.frontends)
        found = [self.frontends[(index + further) % count] for further in range(count)]
        return next((frontend for frontend in found if frontend.alive), None)

    def settled(self) -> bool:
        """Whether nobody waits for a change of the size, and all know the same."""
        if self.node is None:
            return True
        known = [frontend.machine.scaling for frontend in self.frontends.values()]
        changes = [scaling for scaling in known if scaling is not None]
        under_way = any(scaling.under_way for scaling in (*changes, self.node.machine.scaling))
        asked = any(frontend.waiting(frontend_events.Scale) for frontend in self.frontends.values())
        return not under_way and not asked and {scaling.size for scaling in changes} <= {self.size()}

    def controlled(self) -> bool:
        """Whether no operator waits for a pause or its end, or for weights."""
        kinds = (frontend_events.Control, frontend_events.Update)
        return not any(frontend.waiting(kind) for frontend in self.frontends.values() for kind in kinds)

    def finished(self) -> bool:
        return all(frontend.finished() for frontend in self.frontends.values())

    def ready(self, limit_s: float = 30.0) -> Deployment:
        """Run until every front-end knows every rank that it serves."""
        each = 1 if self.shape.external or self.shape.hybrid else self.size()
        known = lambda: all(len(f.machine.ready_ranks()) == each for f in self.frontends.values())  # noqa: E731
        self.world.run_until(known, limit_s, "that every front-end knows every rank")
        return self

    def finish(self, limit_s: float = 30.0) -> float:
        return self.world.run_until(self.finished, limit_s, "that every request is answered")

    # The coordinator's lives ----------------------------------------------------------------------

    def start_coordinator(self) -> CoordinatorProcess:
        """A new life of the coordinator, empty; all others' connections come up in their time."""
        shape = self.shape
        machine = Coordinator(
            self.size(), next(self._lives), 0.0 if shape.external else shape.interval_s, lockstep=shape.lockstep,
            publish_loads=not shape.external, fresh=not self.coordinators, without=self.without,
        )  # fmt: skip
        life = CoordinatorProcess(self.world, machine, self.checks, self._to_ranks, self._to_frontends)
        self.coordinator = life
        self.coordinators.append(life)
        life.feed(coordinator.Tick())
        for frontend in self.frontends.values():
            self._connect(frontend, coordinator.FrontendSubscribed())
        for rank in self.ranks.values():
            self._connect_rank(rank)
        if self.node is not None:
            self._connect(self.node, coordinator.RankSubscribed())
        return life

    def crash_coordinator(self) -> None:
        """It is gone. What others send it waits at their side for the next one, but for what was on the wire."""
        if self.coordinator is not None:
            self.coordinator.kill()
        self.coordinator = None
        others: list[Connected] = [*self.ranks.values(), *self.frontends.values()]
        for process in others if self.node is None else [*others, self.node]:
            process.connected = False
            process.to_coordinator.cut()
            process.to_coordinator.hold()

    # Ranks' lives -------------------------------------------------------------------------------

    def start_rank(self, number: int) -> RankProcess:
        shape, life = self.shape, next(self._lives)
        address = f"tcp://rank-{number}" if shape.same_address else f"tcp://rank-{number}-{life}"
        machine = Rank(
            number, life, address, lockstep=shape.lockstep, report_loads=not shape.external,
            sync_interval=shape.sync_interval, prefill_quota=shape.prefill_quota, without=self.without,
            group_address=f"tcp://group-{number}-{life}" if shape.lockstep and shape.grouped else "", once=shape.once,
            limits=Limits(HANG_NAMED_S, 0.0 if shape.lockstep and not shape.grouped else HANG_ENDED_S),
        )  # fmt: skip
        rank = RankProcess(
            self.world, machine, self.engine(), shape.lockstep, self.groups, self.checks, self.back, self._fixed
        )
        if shape.once:
            rank.load_s = self._loads.random() * LONGEST_LOADING_S
        self._join(rank, rank.name, codec.from_rank(), coordinator.RankSaid, codec.to_rank())
        rank.again = self._start_again
        self.ranks[number] = rank
        self._connect_rank(rank)
        rank.start()
        return rank

    def engine(self) -> Engine:
        return VirtualEngine(self.shape.costs, self.shape.slots, self.shape.budget)

    def crash_rank(self, number: int) -> None:
        """The rank's process is gone without a word; the coordinator sees its connection end.

        One that is to join is not started again, and the node says so.
        """
        self._end_rank(number)
        if self.node is not None and self.node.machine.provisional(number):
            self.node.feed(RankEnded(number, "it died"))

    def _end_rank(self, number: int) -> None:
        rank = self.ranks[number]
        self.world.journal.record(self.world.now, rank.name, "crashes")
        rank.kill()
        rank.broadcasts.close()
        if rank.connected:
            gone, life = coordinator.RankGone(number, rank.machine.incarnation), self.coordinator
            self.world.after(self.shape.links.draw(self._connecting), lambda: self._tell(life, gone))
        for frontend in self.frontends.values():
            down = partial(frontend.link_down, number, rank.machine.incarnation)
            self.world.after(self.shape.links.draw(self._connecting), down)

    def _start_again(self, number: int) -> None:
        """It has ended by itself, and its supervisor starts it again at once."""
        self._end_rank(number)
        self.world.after(AGAIN_S, lambda: self.revive_rank(number))

    def revive_rank(self, number: int) -> None:
        """A rank that has died is started again, if it is still of the deployment, and was not provisional."""
        if self.node is None:
            self.start_rank(number)
        elif number in self.node.machine.ranks and not self.node.machine.provisional(number):
            self._begin_rank(number)

    def start_loading(self, number: int) -> None:
        """A new rank's process begins: its engine is there some time later."""
        rank = self.ranks.get(number)
        if number not in self._loading and (rank is None or not rank.alive):
            self._loading.add(number)
            self.world.after(self._loads.random() * LONGEST_LOADING_S, lambda: self._loaded(number))

    def stop_rank(self, number: int) -> None:
        self._loading.discard(number)
        if number in self.ranks and self.ranks[number].alive:
            self._end_rank(number)

    def _loaded(self, number: int) -> None:
        if number in self._loading:
            self._loading.discard(number)
            self._begin_rank(number)

    def _begin_rank(self, number: int) -> None:
        if number not in self.ranks or not self.ranks[number].alive:
            self.start_rank(number)

    # Front-ends' lives --------------------------------------------------------------------------

    def start_frontend(self, index: int) -> FrontendProcess:
        shape, policy = self.shape, self.policy(index)
        machine = Frontend(
            FIRST_FRONTEND + next(self._lives), policy,
            ranks=frozenset({index}) if shape.external or shape.hybrid else None,
            relay_sends=(shape.frontends > 1 or policy.names) and not shape.external, lockstep=shape.lockstep,
            late_binding=shape.late_binding, resumes=True, together=shape.once, without=self.without,
        )  # fmt: skip
        frontend = FrontendProcess(
            self.world, f"front-end {index}", machine, self.checks, self._dial, not shape.watched
        )
        said = coordinator.FrontendSaid
        self._join(frontend, frontend.name, codec.from_frontend(), said, codec.to_frontend())
        frontend.to_coordinator.loss = self.loss
        self.frontends[index] = frontend
        self._connect(frontend, coordinator.FrontendSubscribed())
        frontend.feed(frontend_events.Connected())
        return frontend

    def policy(self, index: int) -> Policy:
        return LeastLoad(index, self.shape.frontends)

    def crash_frontend(self, index: int) -> None:
        """The front-end's process is gone; the coordinator sees its connection end, ranks when they next send to it."""
        frontend = self.frontends[index]
        self.world.journal.record(self.world.now, frontend.name, "crashes")
        frontend.kill()
        frontend.broadcasts.close()
        self.retired.append(frontend)
        gone = coordinator.FrontendGone(frontend.machine.identity)
        self.world.after(self.shape.links.draw(self._connecting), lambda: self._tell(self.coordinator, gone))

    # Connections --------------------------------------------------------------------------------

    def cut_link(self, number: int, index: int, *, severed: bool) -> Callable[[], None] | None:
        """A front-end's connection to a rank that lives ends. Returns what brings it up again; None where it has none.

        `severed`: what was on its way is lost, and the rank finds the front-end gone when it sends; else it comes
        late, as when the rank's process was stopped and goes on.
        """
        rank, frontend = self.ranks[number], self.frontends[index]
        life, identity = rank.machine.incarnation, frontend.machine.identity
        if not rank.alive or not frontend.alive or frontend.lives.get(number) != life:
            return None
        links = [link for link in (frontend.to_ranks.get(number), self.back(rank, identity)) if link is not None]
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

    def lose_no_more(self) -> None:
        self.loss = 0.0
        for link in self._links:
            link.lose_no_more()

    def _connect_rank(self, rank: RankProcess) -> None:
        """A rank has two connections, and either may come up first."""
        life = self.coordinator
        if life is None:
            return
        self._connect(rank, coordinator.RankSubscribed(rank.machine.rank, rank.machine.incarnation), release=False)
        release = lambda: rank.to_coordinator.release() if life is self.coordinator else None  # noqa: E731
        self.world.after(self.shape.connecting.draw(self._connecting), release)

    def _connect(self, process: Connected, event: coordinator.Event, release: bool = True) -> None:
        """The coordinator hears of a process that subscribes; `release`: and from then on what it has said."""
        life = self.coordinator
        if life is None:
            return

        def subscribe() -> None:
            if getattr(process, "alive", True) and life is self.coordinator and not process.connected:
                process.connected = True
                life.feed(event)
                if release:
                    process.to_coordinator.release()

        self.world.after(self.shape.connecting.draw(self._connecting), subscribe)

    def _dial(self, frontend: FrontendProcess, member: Member) -> Link:
        self.checks.connected(frontend, member)
        identity, number = frontend.machine.identity, member.rank
        life = self.ranks[number].machine.incarnation
        if (identity, life) not in self._backs:
            self._backs[identity, life] = (frontend, self._outputs(f"rank {number}", frontend))

        def deliver(message: Any) -> None:
            target = self.ranks[number]
            if target.alive and target.machine.address == member.address:
                target.arrive(rank_events.FrontendSaid(identity, message))

        return self._link(f"{frontend.name} to rank {number}", codec.request(), deliver)

    def back(self, rank: RankProcess, identity: int) -> Link | None:
        """The way back to a front-end; a life that answers at its predecessor's address has the same one."""
        frontend, link = self._backs.get((identity, rank.machine.incarnation), (None, None))
        if frontend is None:
            frontend = next((f for f in self.frontends.values() if f.machine.identity == identity), None)
            if frontend is None:
                return None
            link = self._outputs(rank.name, frontend)
            self._backs[identity, rank.machine.incarnation] = (frontend, link)
        severed = (identity, rank.machine.incarnation) in self._severed
        return link if frontend.alive and not severed else None

    def _outputs(self, rank: str, frontend: FrontendProcess) -> Link:
        deliver = lambda message: frontend.feed(frontend_events.RankSaid(message))  # noqa: E731
        return self._link(f"{rank} to {frontend.name}", codec.outputs(), deliver)

    def _join(
        self, process: Connected, name: str, above: codec.Decoder[Any], said: Callable[[Any], coordinator.Event],
        below: codec.Decoder[Any],
    ) -> None:  # fmt: skip
        """A process's links with whichever life of the coordinator there is."""
        tell = lambda message: self._tell(self.coordinator, said(message))  # noqa: E731
        process.to_coordinator = self._link(f"{name} to coordinator", above, tell)
        process.broadcasts = self._link(f"coordinator to {name}", below, process.hear)
        process.to_coordinator.hold()

    def _link(self, name: str, decoder: codec.Decoder[Any], deliver: Callable[[Any], None]) -> Link:
        stream = self.seeds.stream(f"link {name} {len(self._links)}")
        decoder_used = decoder if self.shape.encode else None
        link = Link(self.world, name, decoder_used, deliver, self.shape.links, stream)
        self._links.append(link)
        return link

    # The coordinator's links --------------------------------------------------------------------

    def _tell(self, life: CoordinatorProcess | None, event: coordinator.Event) -> None:
        if life is not None:
            life.feed(event)

    def _to_ranks(self, message: ToRank) -> None:
        for rank in self.ranks.values():
            if rank.connected and rank.alive:
                self._broadcast(rank.broadcasts, message)
        if self.node is not None and self.node.connected:
            self._broadcast(self.node.broadcasts, message)

    def _to_frontends(self, message: ToFrontend) -> None:
        for frontend in self.frontends.values():
            if frontend.connected and frontend.alive:
                self._broadcast(frontend.broadcasts, message)

    def _broadcast(self, link: Link, message: Any) -> None:
        link.loss = self.loss
        link.send(message)
