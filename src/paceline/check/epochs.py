"""Epochs: ranks that form groups for their collectives, and die at any moment. What is added to `lockstep.py`.

A group has a name (`parties.Group`) that stands in the process of each of its members, and it stands as long as there
are as many of them as it has: a rank that dies, leaves it for the next, or was told of its end has it no more. So
nobody has to be told that it is over; a rank that enters one of its collectives finds out, at once or later. To form is
two moves: the rank turns, leaves the group it was in, and waits; when the last one has come, all hold the new group and
are told so.

A collective completes for all of a group at once, unless one of them leaves just then: it dies, or goes to form the
next. Then any of the others may have got the outcome, and the rest find that the group is over (`_torn`).

A rank that has died is its next life, which has not loaded its engine yet: until then it hears nothing and nobody hears
of it. Until it is back the others may go on without it: that the coordinator waits no longer for a rank whose
connection has ended (`lost`), or for one that says nothing (`silent`), happens at any moment from when it begins to
wait. Where it is a living rank that says nothing, that counts as a loss, since it may be repeated for ever. So it is
with a forming that takes too long, for a rank or for the coordinator; where it cannot succeed any more that happens by
itself.

Requests that a dead rank had, or that were on their way to it, are sent to others, whatever their front-ends believe
of the wave: each front-end sees the connection end. An answer that died on its way is one that was not given: its rank
dies before the step was made, and the others after it.

Left out: a question that is read late, when the rank has been told to form a group, of which it does not tell (with
questions of any age there were two thirds more states, and nothing else was found).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product

from paceline.check import parties
from paceline.check.lockstep import Lockstep, agreed, becomes, put
from paceline.check.parties import Bound, Group, Node, Process, State, Word, named
from paceline.check.search import Move
from paceline.check.state import demand
from paceline.core.invariants import agree_at_rest, same_generation
from paceline.core.messages import Form, StartDPWave
from paceline.core.rules import OF_GENERATIONS

Members = list[int]


class Epochs(Lockstep):
    """As Lockstep, of ranks with a group address."""

    def __init__(self, bound: Bound) -> None:
        super().__init__(bound)
        # What else commutes was shown for ranks without groups, and for all rules together but those that are about
        # what the coordinator says and not about how it is read.
        self.commutes, self.tidies = False, bound.merge and bound.without <= OF_GENERATIONS

    def over(self, state: State) -> bool:
        """As there; all ranks are members of one group then, and know the same wave."""
        if not super().over(state):
            return False
        nodes = self.deployed(state)
        if not all(node.process.idle for node in nodes):
            return False
        if not any(len(members) == len(nodes) and _know(nodes, group) for group, members in groups(state).items()):
            return False
        waves = {f"rank {rank}": node.process.machine.wave for rank, node in enumerate(nodes)}
        demand(agree_at_rest(self.known(state).wave, waves))
        return True

    def _tidy(self, state: State) -> None:
        """Whatever still comes of a life that the coordinator knows to be over is void; and so are wakes of a wave
        that the rank has finished."""
        for rank, node in enumerate(state.nodes):
            if node.late or node.gone:
                last = node.gone or node.process.machine.incarnation - (not node.ended)
                if state.coordinator.thing.is_retired(rank, last):
                    state.nodes[rank] = node = node._replace(late=(), gone=0)
            if self.tidies and node.down:
                wave = node.process.machine.wave
                down = tuple(w for w in node.down if not (isinstance(w.thing, StartDPWave) and w.thing.wave < wave))
                state.nodes[rank] = node._replace(down=down) if len(down) < len(node.down) else node

    def check_left_out(self, wake: StartDPWave, node: Node) -> None:
        """Asked of a rank whose first wave has not been broken off: a request that came in one that the coordinator
        knew to be over may have been answered in that."""
        if node.process.machine.told <= 1:
            super().check_left_out(wake, node)

    # Moves ------------------------------------------------------------------------------------------

    def moves(self, state: State) -> Iterator[Move]:
        if self.tidies and not (state.crashes or self.calls or self.requests_may_come(state)):
            for rank, node in enumerate(state.nodes):
                if node.down and not node.process.steps_on and not node.process.busy:
                    # Nothing else will come that could be read before it, and its reading concerns nobody.
                    moves = list(self.rank_moves(rank, node))
                    if len(moves) == 1:
                        yield moves[0]
                        return
        yield from super().moves(state)
        if state.stranded:
            for rank in self.open_ranks(state):
                if state.nodes[rank].process.takes_requests:
                    yield from self.sends(state, rank, stranded=True)
        standing = groups(state)
        yield from self._ends(state, standing)
        yield from self._patience(state)
        yield from self._late(state)
        for members in standing.values():
            yield from self._left(state, members)

    def requests_may_come(self, state: State) -> bool:
        """Whether a rank may yet be sent a request."""
        return bool(state.unsent or state.stranded)

    def rank_moves(self, rank: int, node: Node) -> Iterator[Move]:
        """Besides, its next life loads, and it forms a group."""
        yield from super().rank_moves(rank, node)
        process = node.process
        if process.loading and not node.ended:
            yield becomes(("load", rank), node, Process.loads)
        if process.to_form is not None and not process.busy:
            yield Move(("form", rank), True, _meet, (rank, node))
        if process.forming is not None and process.forming == process.group:
            yield becomes(("formed", rank, process.group.number), node, Process.formed)

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
                    yield becomes(("ended", rank), node, Process.ended)
            elif group is None:
                hopeless = self._hopeless(state, forming)
                if hopeless or state.losses:
                    yield Move(("gives-up", rank), hopeless, _gives_up, (rank, not hopeless))
            elif group not in standing:
                yield becomes(("gives-up", rank), node, Process.ended, fair=False)

    def _hopeless(self, state: State, group: Group) -> bool:
        """Whether this group cannot be formed any more: a member is dead, or has left it, or was told of a later."""
        number, members = state.coordinator.thing.epoch()
        told = members if Group(number, state.coordinator.thing.identity, len(members)) == group else {}
        can = 0
        for rank, node in enumerate(state.nodes):
            process = node.process
            still = told.get(rank) == process.machine.incarnation and process.machine.told < group.number
            forms = [
                w.thing for w in node.down if isinstance(w.thing, Form) and w.thing.generation > process.machine.told
            ]
            can += still or group in (process.forming, process.group, process.to_form, *map(named, forms))
        return can < group.size

    def _patience(self, state: State) -> Iterator[Move]:
        """The coordinator gives an epoch up that is not formed, or waits no longer for ranks."""
        timers = self.known(state).timers
        number, members = state.coordinator.thing.epoch()
        group = Group(number, state.coordinator.thing.identity, len(members))
        if "patience" in timers:
            yield from self.timer(state, "patience", early=not self._hopeless(state, group))
        if "silent" in timers:
            loading = all(state.nodes[rank].process.loading for rank in timers["silent"])
            yield from self.timer(state, "silent", early=not loading)
        if "lost" in timers:
            yield from self.timer(state, "lost")

    def _late(self, state: State) -> Iterator[Move]:
        """The coordinator hears of a life that is over. It may just as well not."""
        for rank, node in enumerate(state.nodes):
            if node.late:
                what, rest = ("late", rank, node.late[0]), node._replace(late=node.late[1:])
                yield from self.heard(state, what, self.reads, rest, parties.said, rank, node.late[0], fair=False)
            if node.gone:
                rest = node._replace(gone=0)
                yield from self.heard(
                    state, ("gone", rank), self.reads, rest, parties.gone, rank, node.gone, fair=False
                )

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
            found.update(dict.fromkeys(product(*zip([n.after(Process.ended) for n in before], stepped, strict=True))))
        if any(node.process.agree is not None for node in stepped):
            ended = [node.after(Process.ended) for node in stepped]
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
        for late in dict.fromkeys([last.late, last.up]):
            yield Move(("die", rank), False, self._die_late, (rank, members, others, last, late))

    def _die_late(
        self, state: State, rank: int, members: Members, others: tuple[Node, ...], last: Node, late: tuple[Word, ...]
    ) -> None:
        incarnation = last.process.machine.incarnation
        life = self.processes.part(Process(incarnation + 1, self.settings))
        put(state, members, others)
        state.nodes[rank] = Node(life, notices=last.notices, late=late, gone=incarnation)
        state.crashes -= 1
        self.strand(state, rank, last)

    def strand(self, state: State, rank: int, node: Node) -> None:
        """What the rank had, or what was on its way to it, must go on elsewhere."""
        state.stranded += node.requests


def groups(state: State) -> dict[Group, Members]:
    """The groups that stand, and their members."""
    holders: dict[Group, Members] = {}
    for rank, node in enumerate(state.nodes):
        if node.process.group is not None:
            holders.setdefault(node.process.group, []).append(rank)
    return {group: members for group, members in holders.items() if len(members) == group.size}


def _know(nodes: Sequence[Node], group: Group) -> bool:
    return all(node.process.machine.epoch == group.number for node in nodes)


def _endings(node: Node) -> set[Node]:
    """What the rank can be like that found in place of a collective's outcome that its group is over."""
    ways = (node, node.after(Process.steps)) if node.process.agree is None else (node,)
    return {way.after(Process.ended) for way in ways}


def _gives_up(state: State, rank: int, lost: bool) -> None:
    state.losses -= lost
    state.nodes[rank] = state.nodes[rank].after(Process.ended)


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
