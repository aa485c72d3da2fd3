"""Epochs: ranks that form groups for their collectives, and die at any moment; and a deployment whose size changes.

A group has a name (`Group`) that stands in the process of each of its members, and it stands as long as there
are as many of them as it has: a rank that dies, leaves it for the next, or was told of its end has it no more. So
nobody has to be told that it is over; a rank that enters one of its collectives finds out, at once or later. To form is
two moves: the rank turns, leaves the group it was in, and waits; when the last one has come, all hold the new group and
are told so. A collective completes for all of a group at once, unless one of them leaves just then: it dies, or goes to
form the next. Then any of the others may have got the outcome, and the rest find that the group is over (`_torn`).

A rank that has died is its next life, which has not loaded its engine yet: until then it hears nothing and nobody hears
of it. Until it is back the others may go on without it: that the coordinator waits no longer for a rank whose
connection has ended (`lost`), or for one that says nothing (`silent`), happens at any moment from when it begins to
wait. Where it is a living rank that says nothing, that counts as a loss, since it may be repeated for ever. So it is
with a forming that takes too long, for a rank or for the coordinator; where it cannot succeed any more that happens by
itself. Requests that a dead rank had, or that were on their way to it, are sent to others, whatever their front-ends
believe of the wave: each sees the connection end. An answer that died on its way is one that was not given: its rank
dies before the step was made, and the others after it. Left out: a question that is read late, when the rank has been
told to form a group, of which it does not tell (two thirds more states, and nothing else was found).

Scaling: there is a place for one rank more than the deployment has at first. An operator asks for a rank more or fewer,
by any front-end, again until all front-ends know what has become of it, and one change after the other. The node starts
and ends ranks as its machine says, and does so at once; a rank that dies and is not provisional it starts again. A life
of the coordinator asks the node once, and what the node knows already is not put into the link. What the node says is
read before anything else happens: in between, nothing that it says would matter.

Front-ends hear of a change at any time after it was published, and tell the coordinator then, and each new one, what
they know. Here they hear of it together. From then on they send nothing to a rank that is to leave, and where it is
over they have closed their connections to it: what it had goes on elsewhere, whether or not it is still there. A rank
that is to leave says that it has nothing left once that is so, and is heard when all else that it has said has been: of
sends that no report holds the coordinator knows, since front-ends tell it of each before they say what they know of the
change. A coordinator that has taken another's place does not: to it such a report may come too early. That the time of
a change is up happens at any moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any, NamedTuple

from paceline.check.lockstep import Lockstep, agreed, become, becomes, put
from paceline.check.parties import (
    BESIDES,
    FRONTEND,
    MESSAGES,
    Answer,
    Bound,
    Group,
    Node,
    Process,
    State,
    Word,
    named,
)
from paceline.check.search import NOW, Freezer, Move, Part, Register, Same, demand
from paceline.core import node as on_node
from paceline.core.coordinator import events as on_coordinator
from paceline.core.coordinator.load_table import LoadTable
from paceline.core.invariants import agree_at_rest, leaver_has_nothing, one_size_a_number, same_generation
from paceline.core.load import Load
from paceline.core.messages import (
    PROTOCOL_VERSION,
    Form,
    FrontendHello,
    Identify,
    RankReport,
    ScaleRequest,
    Scaling,
)
from paceline.core.rank import events as on_rank
from paceline.core.rules import OF_GENERATIONS

Members = list[int]
ENDED = (Process.hears, on_rank.EpochEnded())
"""A rank finds that its group is over, or waits no longer for it to be formed."""
NODE = 50
PATIENCE_MS = 1000
"""Of each change, to drain and to load: whether that is over is the search's choice."""


class Epochs(Lockstep):
    """As Lockstep, of ranks with a group address."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        # What else commutes was shown for ranks without groups, and for all rules together but those that are about
        # what the coordinator says and not about how it is read.
        self.commutes, self.tidies = False, bound.merge and bound.without <= OF_GENERATIONS

    def over(self, state: State) -> bool:
        """As there; all ranks are members of one group then, and know the same wave."""
        nodes = self.deployed(state)
        if not super().over(state) or not all(node.process.idle for node in nodes):
            return False
        machines = [node.process.machine for node in nodes]
        whole = [group for group, members in groups(state).items() if len(members) == len(nodes)]
        if not any(all(machine.epoch == group.number for machine in machines) for group in whole):
            return False
        demand(agree_at_rest(self.known(state).wave, {f"rank {i}": one.wave for i, one in enumerate(machines)}))
        return True

    def tidy(self, state: State) -> None:
        """Whatever still comes of a life that the coordinator knows to be over is void; and so are wakes of a wave
        that the rank has finished."""
        for rank, node in enumerate(state.nodes):
            if node.late or node.gone:
                last = node.gone or node.process.machine.incarnation - (not node.ended)
                if state.coordinator.thing.is_retired(rank, last):
                    state.nodes[rank] = node._replace(late=(), gone=0)
            if self.tidies:
                self.drop(state, rank, node.process.machine.wave, False)

    def check_left_out(self, wake: Any, node: Node) -> None:
        """Asked of a rank whose first wave has not been broken off: a request that came in one that the coordinator
        knew to be over may have been answered in that."""
        if node.process.machine.told <= 1:
            super().check_left_out(wake, node)

    # Moves ------------------------------------------------------------------------------------------

    def requests_may_come(self, state: State) -> bool:
        """Whether a rank may yet be sent a request."""
        return bool(state.unsent or state.stranded)

    def moves(self, state: State) -> Iterator[Move]:
        if self.tidies and not (state.crashes or self.calls or self.requests_may_come(state)):
            for rank, node in enumerate(state.nodes):
                if node.down and node.process.idle:
                    # Nothing else will come that could be read before it, and its reading concerns nobody.
                    moves = list(self.rank_moves(rank, node))
                    if len(moves) == 1:
                        yield moves[0]
                        return
        yield from super().moves(state)
        for rank in self.open_ranks(state) if state.stranded else ():
            if state.nodes[rank].process.machine.phase is on_rank.Phase.READY:
                yield from self.sends(state, rank, stranded=True)
        standing = groups(state)
        yield from self._ends(state, standing)
        yield from self._patience(state)
        yield from self._late(state)
        for members in standing.values():
            yield from self._left(state, members)

    def rank_moves(self, rank: int, node: Node) -> Iterator[Move]:
        """Besides, its next life loads, and it forms a group."""
        yield from super().rank_moves(rank, node)
        process = node.process
        if process.loading and not node.ended:
            yield becomes(("load", rank), node, Process.hears, on_rank.Loaded())
        if process.to_form is not None and not process.busy:
            yield Move(("form", rank), True, _meet, (rank, node))
        if process.forming is not None and process.forming == process.group:
            number = process.group.number
            yield becomes(("formed", rank, number), node, Process.hears, on_rank.Formed(number))

    def reaches(self, node: Node, word: Word) -> Node:
        """A rank is told an epoch once: that it is told again changes nothing but that it repeats itself."""
        if isinstance(word.thing, Form):
            machine, own = node.process.machine, word.thing.members[0]
            if word.thing.generation <= machine.told or own.incarnation != machine.incarnation:
                return node
        # A question may come again: these are repeated while a rank is missing or silent.
        return super().reaches(node._replace(asked=False), word)._replace(asked=False)

    def _ends(self, state: State, standing: dict[Group, Members]) -> Iterator[Move]:
        """Ranks find that a group is over, or wait no longer for one."""
        for rank, node in enumerate(state.nodes):
            group, forming = node.process.group, node.process.forming
            if forming is None:
                if node.process.steps_on and group not in standing:
                    yield becomes(("ended", rank), node, *ENDED)
            elif group is None:
                hopeless = self._hopeless(state, forming)
                if hopeless or state.spare:
                    spare = state.spare - (not hopeless)
                    yield becomes(("gives-up", rank), node, *ENDED, fair=hopeless, spare=spare)
            elif group not in standing:
                yield becomes(("gives-up", rank), node, *ENDED, fair=False)

    def _hopeless(self, state: State, group: Group) -> bool:
        """Whether this group cannot be formed any more: a member is dead, or has left it, or was told of a later."""
        current, members = self._current(state)
        told, can = members if current == group else {}, 0
        for rank, node in enumerate(state.nodes):
            process, machine = node.process, node.process.machine
            still = told.get(rank) == machine.incarnation and machine.told < group.number
            forms = [w.thing for w in node.down if isinstance(w.thing, Form) and w.thing.generation > machine.told]
            can += still or group in (process.forming, process.group, process.to_form, *map(named, forms))
        return can < group.size

    def _current(self, state: State) -> tuple[Group, dict[int, int]]:
        """The coordinator's epoch, and the lives of its members."""
        number, members = state.coordinator.thing.epoch()
        return Group(number, state.coordinator.thing.identity, len(members)), members

    def _patience(self, state: State) -> Iterator[Move]:
        """The coordinator gives an epoch up that is not formed, or waits no longer for ranks."""
        timers = self.known(state).timers
        if "patience" in timers:
            yield from self.timer(state, "patience", early=not self._hopeless(state, self._current(state)[0]))
        if "silent" in timers:
            loading = all(state.nodes[rank].process.loading for rank in timers["silent"])
            yield from self.timer(state, "silent", early=not loading)
        if "lost" in timers:
            yield from self.timer(state, "lost")

    def _late(self, state: State) -> Iterator[Move]:
        """The coordinator hears of a life that is over. It may just as well not."""
        for rank, node in enumerate(state.nodes):
            if node.late:
                word, rest = node.late[0], node._replace(late=node.late[1:])
                yield from self.heard(state, ("late", rank, word), word, node=rest, fair=False)
            if node.gone:
                event, rest = on_coordinator.RankGone(0, node.gone), node._replace(gone=0)
                yield from self.heard(state, ("gone", rank), event, node=rest, fair=False)

    # Collectives ------------------------------------------------------------------------------------

    def rounds(self, state: State) -> Iterator[Move]:
        """Each group steps by itself."""
        for group, members in groups(state).items():
            nodes = [state.nodes[rank] for rank in members]
            if all(node.process.steps_on for node in nodes):
                known = {f"rank {r}": n.process.machine.epoch for r, n in zip(members, nodes, strict=True)}
                demand(same_generation(group.number, known))
                yield from self.round(state, members)

    def _left(self, state: State, members: Members) -> Iterator[Move]:
        """A member leaves as a collective, or two, completes: it has got the outcome, and reads then that it is to."""
        before = [state.nodes[rank] for rank in members]
        leaves = [any(isinstance(word.thing, Form) for word in node.down) for node in before]
        for after in self._torn(state, members) if any(leaves) else ():
            if any(leaves[i] and node not in _endings(before[i]) for i, node in enumerate(after)):
                yield Move(("torn", -1), False, put, (members, after))

    def _torn(self, state: State, members: Members) -> list[tuple[Node, ...]]:
        """The members after a collective, or two, that completed for some and for the others did not."""
        if next(self.round(state, members), None) is None:
            return []
        before = stepped = [state.nodes[rank] for rank in members]
        found: dict[tuple[Node, ...], None] = {}
        if before[0].process.agree is None:
            stepped = [node.after(Process.steps) for node in before]
            found.update(dict.fromkeys(product(*zip([n.after(*ENDED) for n in before], stepped, strict=True))))
        if any(node.process.agree is not None for node in stepped):
            ended = [node.after(*ENDED) for node in stepped]
            found.update(dict.fromkeys(product(*zip(ended, agreed(stepped), strict=True))))
        return list(found)

    def deaths(self, state: State) -> Iterator[Move]:
        """A rank dies at any moment, also as a collective completes."""
        with_others = {rank: members for members in groups(state).values() for rank in members}
        for rank, node in enumerate(state.nodes):
            if node.process.loading:
                continue
            members = with_others.get(rank, [rank])
            torn = self._torn(state, members) if rank in with_others else []
            endings = _endings(node) if torn else set()
            last = dict.fromkeys([node, *(nodes[members.index(rank)] for nodes in torn)])
            for others in dict.fromkeys([tuple(state.nodes[member] for member in members), *torn]):
                for own in last:
                    if own is node or own not in endings:
                        yield from self.dies(state, rank, members, others, own)

    def dies(self, state: State, rank: int, members: Members, others: tuple[Node, ...], last: Node) -> Iterator[Move]:
        """`others`: what the members of its group are like then; `last`: what the rank is like. What it had said is
        lost, or may still be read."""
        incarnation = last.process.machine.incarnation
        life = self.processes.part(Process(incarnation + 1, self.bound))
        for late in dict.fromkeys([last.late, last.up]):
            after = list(state.nodes)
            for member, node in zip(members, others, strict=True):
                after[member] = node
            after[rank] = Node(life, notices=last.notices, late=late, gone=incarnation)
            stranded = state.stranded + self.lost(state, rank, last)
            changed = {"nodes": after, "crashes": state.crashes - 1, "stranded": stranded}
            yield Move(("die", rank), False, become, (rank, None, (), changed))

    def lost(self, state: State, rank: int, node: Node) -> int:
        """How many requests the rank had, or were on their way to it, that must go on elsewhere."""
        return node.requests


def groups(state: State) -> dict[Group, Members]:
    """The groups that stand, and their members."""
    holders: dict[Group, Members] = {}
    for rank, node in enumerate(state.nodes):
        if node.process.group is not None:
            holders.setdefault(node.process.group, []).append(rank)
    return {group: members for group, members in holders.items() if len(members) == group.size}


def _endings(node: Node) -> set[Node]:
    """What the rank can be like that found in place of a collective's outcome that its group is over."""
    ways = (node, node.after(Process.steps)) if node.process.agree is None else (node,)
    return {way.after(*ENDED) for way in ways}


def _meet(state: State, rank: int, node: Node) -> None:
    """The rank begins to form a group; if all its members have come, they hold it."""
    state.nodes[rank] = node.after(Process.turns)
    coming: dict[Group, Members] = {}
    for other, one in enumerate(state.nodes):
        if one.process.forming is not None and one.process.group is None:
            coming.setdefault(one.process.forming, []).append(other)
    for group, members in coming.items():
        if len(members) == group.size:
            put(state, members, [state.nodes[member].after(Process.meets) for member in members])


# Scaling ----------------------------------------------------------------------------------------


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

    def after(self, event: Word | on_node.Event) -> tuple[Supervisor, tuple[on_node.Effect, ...]]:
        """What becomes of it, and what it is to do."""
        machine, effects = self.machine.after(_node_handles, event)
        up = self.up
        for effect in effects:
            if isinstance(effect, on_node.ToCoordinator) and up[-1:] != (word := MESSAGES.part(effect.message),):
                up = (*up, word)
        return self._replace(machine=machine, up=up), effects


class Scale(NamedTuple):
    """Scaling, as far as it belongs to no rank and not to the coordinator.

    `left`: changes that may still be asked for. `published`, `known`: the newest Scaling that front-ends can hear of,
    and have heard of. `untold`: whether they have still to tell the coordinator. `call`: of the last that asked;
    `target`: what for, 0 where that is over. `late`: whether its time was up.
    """

    left: int
    node: Supervisor
    published: Word
    known: Word
    untold: bool = True
    call: int = 0
    target: int = 0
    late: bool = False

    @property
    def heard(self) -> Scaling:
        """What front-ends know."""
        scaling: Scaling = self.known.thing
        return scaling


class Scaled(Epochs):
    """As Epochs, of `ranks` ranks at first, with so many changes of that (`scales`)."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        self.places, self.receivers = bound.ranks + 1, bound.ranks + 2
        self.coordinators = Register(Freezer(*(kind for kind in BESIDES if kind is not LoadTable)))
        self.supervisors: Register[on_node.Node] = Register(Freezer())

    def first_state(self) -> State:
        """Besides, there is the place of one more."""
        size, state = self.bound.ranks, super().first_state()
        state.nodes.append(Node(self.processes.part(Process(0, self.bound)), ended=True))
        state.names = tuple(range(self.places))
        node = Supervisor(self.supervisors.part(on_node.Node(NODE, range(size), size)))
        scaling = MESSAGES.part(Scaling(0, size, size))
        state.scale = Scale(0, node, scaling, scaling)
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
        return range(state.scale.heard.serving)

    def over(self, state: State) -> bool:
        """Besides, no change is under way, all know the same of the last, and ranks that have left are not there."""
        node, size = state.scale.node, state.coordinator.thing.scaling.size
        if not _settled(state) or not node.connected or node.up or node.down:
            return False
        there = [not node.ended for node in state.nodes]
        return there == [rank < size for rank in range(self.places)] and super().over(state)

    def requests_may_come(self, state: State) -> bool:
        """What a rank has that is to leave may go elsewhere, too."""
        changes = state.scale.left or not _settled(state)
        return super().requests_may_come(state) or bool(changes and any(node.requests for node in state.nodes))

    def moves(self, state: State) -> Iterator[Move]:
        scale, held = state.scale, state.coordinator.thing.scaling
        node = scale.node
        demand(one_size_a_number({"the coordinator": held, "the node": node.scaling, "the front-ends": scale.heard}))
        if node.up:
            rest = scale._replace(node=node._replace(up=node.up[1:]))
            yield from self.heard(state, ("node-says", -1, node.up[0]), node.up[0], scale=rest)
            return
        for move in super().moves(state):
            # A rank that is to join and has been heard waits for the others.
            if move.what[0] != "hello" or move.what[1] not in held.joining or move.what[1] in held.waiting_for:
                yield move
        if not node.connected:
            rest = scale._replace(node=node._replace(connected=True))
            yield from self.heard(state, ("node-connects", -1), on_coordinator.RankSubscribed(), scale=rest)
        for late in (False, True) if node.down else ():
            yield Move(("node-hears", -1, node.down[0]), True, self._obeys, (late,))
        yield from self._frontend_moves(state)
        yield from self._scaling_moves(state)

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
                    life = self.processes.part(Process(node.process.machine.incarnation + 1, self.bound))
                    state.nodes[effect.rank] = node._replace(life=life, ended=False)
            elif isinstance(effect, on_node.StopRank):
                node, provisional = state.nodes[effect.rank], before.machine.thing.provisional(effect.rank)
                if effect.rank < state.scale.heard.limit:
                    # What it has goes on elsewhere, unless it does so already.
                    whole = (state.spare, state.crashes) == (self.bound.losses, self.bound.crashes)
                    demand(leaver_has_nothing(node.requests, provisional, whole and not state.scale.late))
                    state.stranded += node.requests
                state.nodes[effect.rank] = self._stopped(node, late)
                late = late and (node.ended or not node.up)
        if late:
            raise Same

    def _stopped(self, node: Node, late: bool) -> Node:
        """The place of a rank whose process has ended for good."""
        if node.ended:
            return node
        incarnation = node.process.machine.incarnation
        gone = node.gone if node.process.loading else incarnation
        life = self.processes.part(Process(incarnation, self.bound))
        return Node(life, notices=node.notices, late=node.up if late and node.up else node.late, gone=gone, ended=True)

    def _frontend_moves(self, state: State) -> Iterator[Move]:
        """Front-ends hear of a change and say what they know; an operator asks for one."""
        scale = state.scale
        if scale.untold:
            rest = scale._replace(untold=False)
            yield from self.heard(state, ("tell", -1, scale.known), _hello(scale.heard), scale=rest)
        if scale.published is not scale.known:
            what, changed = ("told", -1, scale.published), self._learnt(state)
            if scale.untold:
                yield Move(what, True, become, (-1, None, (), changed))
            else:
                # What they say is read at once: in between they would say nothing else that matters.
                rest = changed["scale"]._replace(untold=False)
                yield from self.heard(state, what, _hello(rest.heard), **{**changed, "scale": rest})
        if scale.target:
            request = ScaleRequest(FRONTEND, scale.call, scale.target, PATIENCE_MS, PATIENCE_MS)
            event = on_coordinator.FrontendSaid(request)
            yield from self.heard(state, ("scale-request", -1, scale.target), event)
        elif scale.left:
            size = scale.heard.size
            for target in (size + 1, size - 1):
                if 0 < target <= self.places:
                    rest = scale._replace(left=scale.left - 1, call=scale.call + 1, late=False, target=target)
                    yield Move(("scale", -1, target), False, become, (-1, None, (), {"scale": rest}))

    def _learnt(self, state: State) -> dict[str, Any]:
        """What changes as front-ends hear of the newest that was published: they close connections to those that have
        left, and what was on its way there is lost."""
        scale, before = state.scale, state.scale.heard
        now: Scaling = scale.published.thing
        over = now.call == scale.call and not now.under_way
        rest = scale._replace(known=scale.published, untold=True, target=0 if over else scale.target)
        nodes, stranded = list(state.nodes), state.stranded
        for rank in range(now.limit, before.limit):
            stranded += 0 if nodes[rank].ended else nodes[rank].requests
            nodes[rank] = nodes[rank]._replace(arriving=())
        return {"scale": rest, "nodes": nodes, "stranded": stranded}

    def _scaling_moves(self, state: State) -> Iterator[Move]:
        """The coordinator hears that a leaving rank has nothing left, says again what there is to be, or is late."""
        machine, scale, known = state.coordinator.thing, state.scale, self.known(state)
        informed = not scale.untold and scale.heard.number >= machine.scaling.number
        for rank in machine.scaling.leaving if informed else ():
            node, one = state.nodes[rank], state.nodes[rank].process.machine
            arriving = machine.identity == 1 and node.arriving
            empty = not (node.ended or node.up or node.process.unfinished or arriving)
            if empty and known.lives.get(rank) == one.incarnation:
                report = MESSAGES.part(RankReport(0, one.incarnation, 0, one.wave, one.running, Load(), {}))
                yield from self.heard(state, ("idle", rank), report)
        quiet = not any(node.up for node in state.nodes)
        if "scaling" in known.timers and quiet and scale.node.connected and not scale.node.down:
            yield from self.timer(state, "scaling")
        if "scaling-late" in known.timers:
            # That it was is of interest for what is to be finished.
            what, rest = ("scaling-late", -1), scale._replace(late=bool(self.bound.requests))
            yield from self.heard(state, what, on_coordinator.Tick(), "scaling-late", fair=False, scale=rest)

    # What follows -----------------------------------------------------------------------------------

    def answered(self, state: State, answer: Answer, lost: int) -> None:
        """Besides, front-ends can hear of a newer Scaling than before."""
        newest = answer.scaling
        if newest is not None and newest.thing.number > state.scale.published.thing.number:
            _scale(state, published=newest)
        super().answered(state, answer, lost)

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
        node = state.scale.node.after(on_node.RankEnded(rank, "it died"))[0]
        changed = {"crashes": state.crashes - 1, "scale": state.scale._replace(node=node)}
        for late in (False, True) if last.up else (False,):
            yield Move(("die", rank), False, become, (rank, self._stopped(last, late), (), changed))

    def lost(self, state: State, rank: int, node: Node) -> int:
        """What does not go on elsewhere already, must."""
        return super().lost(state, rank, node) if rank < state.scale.heard.limit else 0


def _settled(state: State) -> bool:
    """Whether no change is under way, and of the last one all know the same."""
    scale, held = state.scale, state.coordinator.thing.scaling
    settled = scale.published is scale.known and not scale.untold and not scale.target and not held.under_way
    return settled and held.number == scale.heard.number == scale.node.scaling.number


def _scale(state: State, **fields: Any) -> None:
    state.scale = state.scale._replace(**fields)


def _node_handles(machine: on_node.Node, event: Word | on_node.Event) -> tuple[on_node.Effect, ...]:
    return tuple(machine.handle(on_node.CoordinatorSaid(event.thing) if isinstance(event, Part) else event, NOW))


def _hello(known: Scaling) -> Word:
    hello = FrontendHello(PROTOCOL_VERSION, FRONTEND, scaling=known if known.number else None)
    return MESSAGES.part(on_coordinator.FrontendSaid(hello))
