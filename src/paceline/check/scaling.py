"""Scaling: a deployment whose size changes while it serves, beside all that `epochs.py` has.

There is a place for one rank more than the deployment has at first. An operator asks for a rank more or fewer, by any
front-end, again until all front-ends know what has become of it, and one change after the other. The node starts and
ends ranks as its machine says, and does so at once; a rank that dies and is not provisional it starts again. A
question is answered when it is sent, if nothing is before it in the node's link; a life of the coordinator asks once,
and what the node knows already is not put into the link. What the node says is read before anything else happens: in
between,
nothing that it says would matter.

Front-ends hear of a change at any time after it was published, and tell the coordinator then, and each new one, what
they know. Here they hear of it together. From then on they send nothing to a rank that is to leave, and where it is
over they have closed their connections to it: what it had goes on elsewhere, whether or not it is still there.

A rank that is to leave says that it has nothing left once that is so, and is heard when all else that it has said has
been: of sends that no report holds the coordinator knows, since front-ends tell it of each before they say what they
know of the change. A coordinator that has taken another's place does not: to it such a report may come too early. That
the time of a change is up happens at any moment.

Ranks that have not been asked to leave are alike: which of them has the highest number is chosen when one must go.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from paceline.check import parties
from paceline.check.epochs import Epochs, Members
from paceline.check.parties import FRONTEND, MESSAGES, Answer, Bound, Node, Process, State, Word
from paceline.check.search import Move, Same
from paceline.check.state import NOW, Freezer, Part, Register, demand
from paceline.core import node as on_node
from paceline.core.coordinator import events as on_coordinator
from paceline.core.coordinator.load_table import LoadTable
from paceline.core.coordinator.machine import Coordinator
from paceline.core.invariants import leaver_has_nothing, one_size_a_number
from paceline.core.load import Load
from paceline.core.messages import (
    PROTOCOL_VERSION,
    FrontendHello,
    Identify,
    RankReport,
    ScaleRequest,
    Scaling,
)

NODE = 50
PATIENCE_MS = 1000
"""Of each change, to drain and to load: whether that is over is the search's choice."""


class Supervisor(NamedTuple):
    """The node's machine with its links, oldest messages first. `connected`, `asked`: as of a rank."""

    machine: Part[on_node.Node]
    up: tuple[Word, ...] = ()
    down: tuple[Word, ...] = ()
    connected: bool = False
    asked: bool = False

    @property
    def scaling(self) -> Scaling:
        """The newest that it knows."""
        return self.machine.thing.scaling

    def after(self, event: Word | int) -> tuple[Supervisor, tuple[on_node.Effect, ...]]:
        """What becomes of it by a message, or by the death of a rank; and what it is to do."""
        machine, effects = self.machine.after(_node_handles, event)
        up = self.up
        for effect in effects:
            if isinstance(effect, on_node.ToCoordinator) and up[-1:] != (word := MESSAGES.part(effect.message),):
                up = (*up, word)
        return self._replace(machine=machine, up=up), effects


class Scale(NamedTuple):
    """Scaling, as far as it belongs to no rank and not to the coordinator.

    `left`: changes that may still be asked for. `alike`: ranks below this have always been alike. `published`, `known`:
    the newest Scaling that front-ends can hear of, and have heard of. `untold`: whether they have still to tell the
    coordinator. `call`: of the last that asked; `target`: what for, 0 where that is over. `late`: whether its time was
    up. `leaver`: the rank that is to have the number `alike`, -1 for none.
    """

    left: int
    alike: int
    node: Supervisor
    published: Word
    known: Word
    untold: bool = True
    call: int = 0
    target: int = 0
    late: bool = False
    leaver: int = -1


class Scaled(Epochs):
    """As Epochs, of `ranks` ranks at first, with so many changes of that (`scales`)."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        freeze = Freezer(*(kind for kind in parties.BESIDES if kind is not LoadTable))
        self.coordinators = Register(freeze)
        self.supervisors: Register[on_node.Node] = Register(freeze)

    def first_state(self) -> State:
        """Besides, there is the place of one more."""
        size = self.bound.ranks
        state = super().first_state()
        state.nodes.append(Node(self.processes.part(Process(0, self.settings)), ended=True))
        state.names = tuple(range(self.places))
        node = Supervisor(self.supervisors.part(on_node.Node(NODE, range(size), size)))
        scaling = MESSAGES.part(Scaling(0, size, size))
        state.scale = Scale(0, size, node, scaling, scaling)
        return state

    def begun(self, state: State) -> State:
        """All changes are still to come."""
        state.scale = state.scale._replace(left=self.bound.scales)
        return super().begun(state)

    def crashed(self, state: State, nodes: Sequence[Node]) -> None:
        """Front-ends say to each coordinator what they know, and hear no more what it did not tell. It knows
        nothing but how many ranks the node believes there are."""
        super().crashed(state, nodes)
        node = state.scale.node
        state.coordinator = self.fresh(state.coordinator.thing.identity, node.scaling.size)
        _scale(state, node=Supervisor(node.machine), untold=True, published=state.scale.known)

    def deployed(self, state: State) -> Sequence[Node]:
        """The ranks that the coordinator believes to be of the deployment."""
        return state.nodes[: state.coordinator.thing.scaling.size]

    def open_ranks(self, state: State) -> Sequence[int]:
        """Those that front-ends do not know to be leaving, or to have left."""
        return range(_scaling(state.scale.known).serving)

    def alike(self, state: State) -> int:
        alike: int = state.scale.alike
        return alike

    def key(self, state: State) -> tuple[Any, ...]:
        """The rank that must go comes, if one was chosen, behind those that are still alike."""
        scale = state.scale
        if scale.leaver >= 0:
            order = [rank for rank in range(scale.alike) if rank != scale.leaver]
            self.reorder(state, (*order, scale.leaver, *range(scale.alike, self.places)))
            state.scale = scale._replace(leaver=-1, alike=scale.alike - 1)
        return (*super().key(state), state.scale)

    def over(self, state: State) -> bool:
        """Besides, all know the same of the last change, and ranks that have left are not there."""
        node = state.scale.node
        if not _agreed(state) or not node.connected or node.up or node.down:
            return False
        size = state.coordinator.thing.scaling.size
        there = [not node.ended for node in state.nodes]
        return there == [rank < size for rank in range(self.places)] and super().over(state)

    def requests_may_come(self, state: State) -> bool:
        """What a rank has that is to leave may go elsewhere, too."""
        if super().requests_may_come(state):
            return True
        over = not state.scale.left and _agreed(state)
        return not over and any(node.requests for node in state.nodes)

    # Moves ------------------------------------------------------------------------------------------

    def moves(self, state: State) -> Iterator[Move]:
        scale, held = state.scale, state.coordinator.thing.scaling
        known = {"the coordinator": held, "the node": scale.node.scaling, "the front-ends": _scaling(scale.known)}
        demand(one_size_a_number(known))
        if scale.node.up:
            yield from self.heard(state, ("node-says", -1, scale.node.up[0]), self._node_says)
            return
        for move in super().moves(state):
            # A rank that is to join and has been heard waits for the others.
            if move.what[0] != "hello" or move.what[1] not in held.joining or move.what[1] in held.waiting_for:
                yield move
        yield from self._node_moves(state)
        yield from self._frontend_moves(state)
        yield from self._operator_moves(state)
        yield from self._scaling_moves(state)

    def _node_says(self, state: State) -> Answer:
        node = state.scale.node
        _scale(state, node=node._replace(up=node.up[1:]))
        return self.happens(state, _said_by_node, -1, node.up[0])

    def _node_moves(self, state: State) -> Iterator[Move]:
        node = state.scale.node
        if not node.connected:
            yield from self.heard(state, ("node-connects", -1), self._node_connects)
        for late in (False, True) if node.down else ():
            yield Move(("node-hears", -1, node.down[0]), True, self._obeys, (late,))

    def _node_connects(self, state: State) -> Answer:
        _scale(state, node=state.scale.node._replace(connected=True))
        return self.happens(state, parties.subscribed, -1)

    def _obeys(self, state: State, late: bool) -> None:
        """The node reads, and does what its machine says. `late`: what ranks had said that it ends may be read still
        (that a rank says that it leaves is left out: it is ended when the coordinator knows it no more)."""
        before = state.scale.node
        after, effects = before._replace(down=before.down[1:]).after(before.down[0])
        _scale(state, node=after)
        for effect in effects:
            if isinstance(effect, on_node.StartRank | on_node.KeepRank):
                node = state.nodes[effect.rank]
                # A provisional rank that died is started again from where it is kept.
                if node.ended or isinstance(effect, on_node.StartRank):
                    life = self.processes.part(Process(node.process.machine.incarnation + 1, self.settings))
                    state.nodes[effect.rank] = node._replace(life=life, ended=False)
            elif isinstance(effect, on_node.StopRank):
                self._stops(state, effect.rank, before.machine.thing.provisional(effect.rank))
                state.nodes[effect.rank], late = self.stopped(state.nodes[effect.rank], late=late)
        if late:
            raise Same

    def _stops(self, state: State, rank: int, trial: bool) -> None:
        """What the rank has goes on elsewhere, unless it does so already."""
        requests = state.nodes[rank].requests
        if rank < _scaling(state.scale.known).limit:
            whole = (state.losses, state.crashes) == (self.bound.losses, self.bound.crashes)
            demand(leaver_has_nothing(requests, trial, whole and not state.scale.late))
            state.stranded += requests

    def stopped(self, node: Node, *, late: bool) -> tuple[Node, bool]:
        """The place of a rank whose process has ended for good; and whether `late` has still to be heeded."""
        if node.ended:
            return node, late
        incarnation = node.process.machine.incarnation
        gone = node.gone if node.process.loading else incarnation
        read = node.up if late and node.up else node.late
        life = self.processes.part(Process(incarnation, self.settings))
        return Node(life, notices=node.notices, late=read, gone=gone, ended=True), late and not node.up

    def _frontend_moves(self, state: State) -> Iterator[Move]:
        scale = state.scale
        if scale.untold:
            yield from self.heard(state, ("tell", -1, scale.known), self._tell)
        if scale.published is not scale.known:
            if scale.untold:
                yield Move(("told", -1, scale.published), True, self._learn)
            else:
                # What they say is read at once: in between they would say nothing else that matters.
                yield from self.heard(state, ("told", -1, scale.published), self._learn_and_tell)

    def _tell(self, state: State) -> Answer:
        _scale(state, untold=False)
        return self.happens(state, _told_by_frontends, -1, state.scale.known)

    def _learn_and_tell(self, state: State) -> Answer:
        self._learn(state)
        return self._tell(state)

    def _learn(self, state: State) -> None:
        scale = state.scale
        before, now = _scaling(scale.known), _scaling(scale.published)
        over = now.call == scale.call and not now.under_way
        _scale(state, known=scale.published, untold=True, target=0 if over else scale.target)
        for rank in range(now.limit, before.limit):
            node = state.nodes[rank]
            state.stranded += 0 if node.ended else node.requests
            # They close their connections to it: what was on its way is lost.
            state.nodes[rank] = node._replace(arriving=())

    def _operator_moves(self, state: State) -> Iterator[Move]:
        scale = state.scale
        if scale.target:
            given = (_asked_to_scale, -1, scale.call, scale.target)
            yield from self.heard(state, ("scale-request", -1, scale.target), self.happens, *given)
        elif scale.left:
            size = _scaling(scale.known).size
            if size < self.places:
                yield Move(("scale", -1, size + 1), False, _ask_for, (size + 1, -1))
            for leaver in (range(size) if scale.alike == size else (-1,)) if size > 1 else ():
                yield Move(("scale", leaver, size - 1), False, _ask_for, (size - 1, leaver))

    def _scaling_moves(self, state: State) -> Iterator[Move]:
        """The coordinator hears that a leaving rank has nothing left, says again what there is to be, or is late."""
        machine, scale, known = state.coordinator.thing, state.scale, self.known(state)
        first = machine.identity == 1
        informed = not scale.untold and _scaling(scale.known).number >= machine.scaling.number
        for rank in machine.scaling.leaving if informed else ():
            node, one = state.nodes[rank], state.nodes[rank].process.machine
            empty = not (node.ended or node.up or node.process.unfinished) and not (first and node.arriving)
            if empty and known.lives.get(rank) == one.incarnation:
                given = (_reported, rank, one.incarnation, one.wave, one.running)
                yield from self.heard(state, ("idle", rank), self.happens, *given)
        quiet = not any(node.up for node in state.nodes)
        if "scaling" in known.timers and quiet and scale.node.connected and not scale.node.down:
            yield from self.timer(state, "scaling")
        if "scaling-late" in known.timers:
            yield from self.heard(state, ("scaling-late", -1), self._is_late, fair=False)

    def _is_late(self, state: State) -> Answer:
        # That it was is of interest for what is to be finished.
        _scale(state, late=bool(self.bound.requests))
        return self.happens(state, parties.ticked, -1, "scaling-late")

    # What follows -----------------------------------------------------------------------------------

    def answered(self, state: State, answer: Answer, lost: int) -> None:
        """Besides, front-ends can hear of a newer Scaling than before."""
        newest = answer.scaling
        if newest is not None and _scaling(newest).number > _scaling(state.scale.published).number:
            _scale(state, published=newest)
        super().answered(state, answer, lost)

    def same_links(self, state: State, other: State) -> bool:
        return state.scale.node == other.scale.node and super().same_links(state, other)

    def broadcast(self, state: State, answer: Answer, lost: int) -> None:
        """Besides, the node hears: its place is behind the ranks'."""
        for word in answer.broadcasts if lost != self.places else ():
            node = state.scale.node
            question = isinstance(word.thing, Identify)
            news = isinstance(word.thing, Scaling) and word.thing.number > node.scaling.number
            if node.connected and word not in node.down and (news or (question and not node.asked)):
                answers_at_once = question and not node.down
                node = node._replace(down=(*node.down, word), asked=node.asked or question)
                if answers_at_once:
                    node = node._replace(down=()).after(word)[0]
                _scale(state, node=node)
        super().broadcast(state, answer, lost)

    def dies(self, state: State, rank: int, members: Members, others: tuple[Node, ...], last: Node) -> Iterator[Move]:
        """A provisional rank dies too: it is not started again, and the node says so."""
        if not state.scale.node.machine.thing.provisional(rank):
            yield from super().dies(state, rank, members, others, last)
            return
        for late in (False, True) if last.up else (False,):
            yield Move(("die", rank), False, self._fails, (rank, last, late))

    def _fails(self, state: State, rank: int, last: Node, late: bool) -> None:
        state.nodes[rank] = self.stopped(last, late=late)[0]
        state.crashes -= 1
        _scale(state, node=state.scale.node.after(rank)[0])

    def strand(self, state: State, rank: int, node: Node) -> None:
        """What does not go on elsewhere already, must."""
        if rank < _scaling(state.scale.known).limit:
            super().strand(state, rank, node)


def _scale(state: State, **fields: Any) -> None:
    state.scale = state.scale._replace(**fields)


def _ask_for(state: State, size: int, leaver: int) -> None:
    scale = state.scale
    _scale(state, left=scale.left - 1, call=scale.call + 1, late=False, target=size, leaver=leaver)


def _scaling(word: Word) -> Scaling:
    assert isinstance(word.thing, Scaling)
    return word.thing


def _agreed(state: State) -> bool:
    """Whether no change is under way, and of the last one all know the same."""
    scale, held = state.scale, state.coordinator.thing.scaling
    known = _scaling(scale.known)
    settled = scale.published is scale.known and not scale.untold and not scale.target and not held.under_way
    return settled and held.number == known.number == scale.node.scaling.number


def _node_handles(machine: on_node.Node, event: Word | int) -> tuple[on_node.Effect, ...]:
    if isinstance(event, int):
        return tuple(machine.handle(on_node.RankEnded(event, "it died"), NOW))
    return tuple(machine.handle(on_node.CoordinatorSaid(event.thing), NOW))


def _said_by_node(machine: Coordinator, _: int, word: Word) -> Answer:
    return parties.happens(machine, on_coordinator.RankSaid(word.thing))


def _told_by_frontends(machine: Coordinator, _: int, known: Word) -> Answer:
    scaling = _scaling(known)
    hello = FrontendHello(PROTOCOL_VERSION, FRONTEND, scaling=scaling if scaling.number else None)
    return parties.happens(machine, on_coordinator.FrontendSaid(hello))


def _asked_to_scale(machine: Coordinator, _: int, call: int, size: int) -> Answer:
    request = ScaleRequest(FRONTEND, call, size, PATIENCE_MS, PATIENCE_MS)
    return parties.happens(machine, on_coordinator.FrontendSaid(request))


def _reported(machine: Coordinator, rank: int, incarnation: int, wave: int, running: bool) -> Answer:
    report = RankReport(rank, incarnation, 0, wave, running, Load(), {})
    return parties.happens(machine, on_coordinator.RankSaid(report))
