"""A deployment whose size changes while it serves, beside all that `explore_group` has.

There is a place for one rank more than the deployment has at first. An operator asks for a rank more or fewer, by any
front-end, again until all front-ends know what has become of it, and one change after the other. The node starts and
ends ranks as its machine says (`explore_node`); who dies and is not on trial it starts again.

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

from typing import Any

from paceline.core.invariants import leaver_has_nothing, one_size_a_number
from paceline.core.messages import Identify, Scaling, ToRank
from paceline.core.node import Effect, KeepRank, StartRank, StopRank
from paceline.simulate.explore_block import demand
from paceline.simulate.explore_coordinator import Answer
from paceline.simulate.explore_group import GroupedWorld
from paceline.simulate.explore_node import Nodes
from paceline.simulate.explore_scaling_parts import ScaledBlocks, ScaledCoordinators
from paceline.simulate.explore_state import COORDINATOR, FIRST_BLOCK, Action, Common, Moves, Scale, State


class ScaledWorld(GroupedWorld):
    """As `GroupedWorld`, of `ranks` ranks at first, with so many changes of that (`scales`)."""

    kind_of_blocks = ScaledBlocks
    kind_of_coordinators = ScaledCoordinators
    blocks: ScaledBlocks
    coordinators: ScaledCoordinators

    def __init__(self, ranks: int, *args: Any, scales: int, **options: Any) -> None:
        super().__init__(ranks + 1, *args, **options)
        self.nodes = Nodes()
        self._first_size = ranks
        self._scales = scales
        self.coordinators.scalings.number(Scaling(0, ranks, ranks))
        self._bound = self._bound._replace(scale=Scale(0, ranks, self.nodes.fresh(ranks)))
        self.receivers.append(self.ranks)

    def scale(self, common: Common) -> Scale:
        """What belongs to scaling."""
        assert common.scale is not None
        return common.scale

    def known(self, common: Common) -> Scaling:
        """The newest that front-ends know."""
        return self.coordinators.scalings[self.scale(common).known]

    # As there, of fewer ranks -------------------------------------------------------------------

    def first_blocks(self) -> list[int]:
        """The ranks that there are, and the place of one more."""
        return [*(self.blocks.fresh() for _ in range(self._first_size)), self.blocks.absent()]

    def begun(self, common: Common) -> Common:
        """Likewise, with all changes before it."""
        return super().begun(common)._replace(scale=self.scale(common)._replace(left=self._scales))

    def fresh(self, common: Common, identity: int) -> int:
        """A coordinator that knows nothing but how many ranks the node believes there are."""
        return self.coordinators.fresh(identity, self.nodes.machine(self.scale(common).node).scaling.size)

    def deployed(self, state: State) -> tuple[int, ...]:
        """The blocks of the ranks that the coordinator believes to be of the deployment."""
        return state[FIRST_BLOCK : FIRST_BLOCK + self.coordinators.scaling(state[COORDINATOR]).size]

    def open_ranks(self, common: Common) -> range:
        """Those that front-ends do not know to be leaving, or to have left."""
        return range(self.known(common).serving)

    def alike(self, common: Common) -> int:
        """Likewise."""
        return self.scale(common).alike

    def crashed(self, common: Common) -> Common:
        """Likewise; front-ends say to each coordinator what they know, and hear no more what it did not tell."""
        scale = self.scale(common)
        cut_off = scale._replace(node=self.nodes.cut_off(scale.node), untold=True, published=scale.known)
        return super().crashed(common)._replace(scale=cut_off)

    def canonical(self, state: State) -> tuple[State, tuple[int, ...]]:
        """Likewise, with the rank that must go, if one was chosen, behind those that are still alike."""
        scale = self.scale(self.common(state))
        if scale.leaver < 0:
            return super().canonical(state)
        order = [rank for rank in range(scale.alike) if rank != scale.leaver]
        order += [scale.leaver, *range(scale.alike, self.ranks)]
        chosen = scale._replace(leaver=-1, alike=scale.alike - 1)
        coordinator = self.coordinators.renumbered(state[COORDINATOR], order)
        common = self.number(self.common(state)._replace(scale=chosen))
        moved = (coordinator, common, *(state[FIRST_BLOCK + rank] for rank in order))
        after, then = super().canonical(moved)
        return after, tuple(order[rank] for rank in then)

    def requests_may_come(self, state: State) -> bool:
        """Likewise; what a rank has that is to leave, too."""
        if super().requests_may_come(state):
            return True
        over = not self.scale(self.common(state)).left and self._agreed(state)
        return not over and any(map(self.blocks.requests, state[FIRST_BLOCK:]))

    def _agreed(self, state: State) -> bool:
        """Whether no change is under way, and of the last one all know the same."""
        scale, held = self.scale(self.common(state)), self.coordinators.scaling(state[COORDINATOR])
        known, node = self.known(self.common(state)), self.nodes.machine(scale.node)
        if scale.target or scale.untold or held.under_way:
            return False
        return held.number == known.number == node.scaling.number

    def at_rest(self, state: State) -> bool:
        """Likewise; nobody waits for a change, all know the same of the last one, and who has left is not there."""
        if not self._agreed(state) or not self.nodes.quiet(self.scale(self.common(state)).node):
            return False
        size = self.coordinators.scaling(state[COORDINATOR]).size
        there = [not self.blocks[number].ended for number in state[FIRST_BLOCK:]]
        return there == [rank < size for rank in range(self.ranks)] and super().at_rest(state)

    # Moves ----------------------------------------------------------------------------------------

    def _moves(self, state: State) -> Moves:
        for action, after in self._all_moves(state):
            yield from self._heard(action, after)

    def _all_moves(self, state: State) -> Moves:
        coordinator, common = state[COORDINATOR], self.common(state)
        held, node = self.coordinators.scaling(coordinator), self.nodes.machine(self.scale(common).node).scaling
        demand(one_size_a_number({"the coordinator": held, "the node": node, "the front-ends": self.known(common)}))
        for action, after in super()._moves(state):
            # Who is to join and has been heard waits for the others.
            if action.kind != "hello" or not self.coordinators.has_loaded(coordinator, action.rank):
                yield action, after
        yield from self._node_moves(state, common)
        yield from self._front_end_moves(state, common)
        yield from self._operator_moves(state, common)
        yield from self._scaling_moves(state, common)

    def _heard(self, action: Action, state: State) -> Moves:
        """The coordinator reads at once what the node says: in between, nothing that it says would matter."""
        node = self.scale(self.common(state)).node
        if not self.nodes[node].up:
            yield action, state
            return
        after, message = self.nodes.said(node)
        answer = self.coordinators.node_said(state[COORDINATOR], message, self.nodes[node].up[0])
        for further, then in self._answered(self._scaled(state, node=after), answer, action):
            yield from self._heard(further, then)

    def _node_moves(self, state: State, common: Common) -> Moves:
        scale = self.scale(common)
        node = self.nodes[scale.node]
        if not node.connected:
            before = self._scaled(state, node=self.nodes.number(node._replace(connected=True)))
            answer = self.coordinators.subscribed(state[COORDINATOR])
            yield from self._answered(before, answer, Action("node-connects"))
        if node.down:
            after, effects = self.nodes.heard(scale.node)
            for done in self._done(self._scaled(state, node=after), effects, self.nodes.machine(scale.node).on_trial):
                yield Action("node-hears", detail=node.down[0]), done

    def _done(self, state: State, effects: list[Effect], on_trial: Any) -> list[State]:
        """The states after the node's supervisor has done this."""
        states = [state]
        for effect in effects:
            rank = effect.rank  # type: ignore[union-attr]
            block = state[FIRST_BLOCK + rank]
            match effect:
                case StartRank():
                    choices = [self.blocks.started(block)]
                case KeepRank():
                    # Who died on trial is started again from here on.
                    choices = [self.blocks.started(block) if self.blocks[block].ended else block]
                case StopRank():
                    states = [self._stranded(one, rank, trial=on_trial(rank)) for one in states]
                    choices = self.blocks.stopped(block) if not self.blocks[block].ended else [block]
            states = [self._with(one, rank, choice) for one in states for choice in choices]
        return states

    def _stranded(self, state: State, rank: int, *, trial: bool) -> State:
        """The node ends the rank: what it has goes on elsewhere, unless it does so already."""
        common, requests = self.common(state), self.blocks.requests(state[FIRST_BLOCK + rank])
        if self.known(common).limit <= rank:
            return state
        whole = (common.losses, common.crashes) == (self._bound.losses, self._bound.crashes)
        demand(leaver_has_nothing(requests, trial, whole and not self.scale(common).late))
        return self._changed(state, common._replace(stranded=common.stranded + requests))

    def _front_end_moves(self, state: State, common: Common) -> Moves:
        scale, scalings = self.scale(common), self.coordinators.scalings
        if scale.untold:
            answer = self.coordinators.front_end_said(state[COORDINATOR], scale.known)
            yield from self._answered(self._scaled(state, untold=False), answer, Action("tell", detail=scale.known))
        if scale.published != scale.known:
            before, now = self.known(common), scalings[scale.published]
            over = now.call == scale.call and not now.under_way
            after = self._scaled(state, known=scale.published, untold=True, target=0 if over else scale.target)
            for rank in range(now.limit, before.limit):
                block = state[FIRST_BLOCK + rank]
                requests = 0 if self.blocks[block].ended else self.blocks.requests(block)
                stranded = self.common(after).stranded + requests
                after = self._changed(after, self.common(after)._replace(stranded=stranded))
                after = self._with(after, rank, self.blocks.closed(block))
            told = Action("told", detail=scale.published)
            if scale.untold:
                yield told, after
                return
            # What it says is read at once: in between it would say nothing else that matters.
            answer = self.coordinators.front_end_said(after[COORDINATOR], scale.published)
            yield from self._answered(self._scaled(after, untold=False), answer, told)

    def _operator_moves(self, state: State, common: Common) -> Moves:
        scale = self.scale(common)
        if scale.target:
            answer = self.coordinators.asked_to_scale(state[COORDINATOR], scale.call, scale.target)
            yield from self._answered(state, answer, Action("scale-request", detail=scale.target))
        elif scale.left:
            size = self.known(common).size
            asked = {"left": scale.left - 1, "call": scale.call + 1, "late": False}
            if size < self.ranks:
                yield Action("scale", detail=size + 1, fair=False), self._scaled(state, target=size + 1, **asked)
            if size > 1:
                alike = scale.alike == size
                for leaver in range(scale.alike) if alike else (-1,):
                    after = self._scaled(state, target=size - 1, leaver=leaver, **asked)
                    yield Action("scale", leaver, size - 1, fair=False), after

    def _scaling_moves(self, state: State, common: Common) -> Moves:
        """The coordinator hears that a leaving rank has nothing left, says again what there is to be, or is late."""
        coordinator, node = state[COORDINATOR], self.nodes[self.scale(common).node]
        first = self.coordinators.identity(coordinator) == 1
        for rank in self.coordinators.scaling(coordinator).leaving:
            number = state[FIRST_BLOCK + rank]
            current = self.coordinators.is_current(coordinator, rank, self.blocks.incarnation[number])
            empty = self.blocks.idle(number) and not (first and self.blocks[number].arriving)
            if current and empty and self.coordinators.hears_of_idle(coordinator):
                answer = self.coordinators.reported(coordinator, self.blocks.report(number, rank))
                yield from self._answered(state, answer, Action("idle", rank))
        timers = {name for name, _ in self.coordinators.timers(coordinator)}
        if "scaling" in timers and node.connected and not node.up and not node.down:
            yield from self._answered(state, self.coordinators.tick(coordinator, "scaling"), Action("tick"))
        if self.coordinators.late(coordinator):
            # That it was is of interest for what is to be finished.
            late = self._scaled(state, late=bool(self._bound.unsent))
            answer = self.coordinators.tick(coordinator, "scaling-late")
            yield from self._answered(late, answer, Action("scaling-late", fair=False))

    # What follows ---------------------------------------------------------------------------------

    def _told(self, state: State, messages: tuple[ToRank, ...], lost: int) -> State:
        for message in messages:
            if isinstance(message, Scaling | Identify) and lost != self.ranks:
                node = self.scale(self.common(state)).node
                state = self._scaled(state, node=self.nodes.broadcast(node, message))
        return super()._told(state, tuple(one for one in messages if not isinstance(one, Scaling)), lost)

    def after_answer(self, common: Common, answer: Answer) -> Common:
        """Likewise; front-ends can hear of a newer Scaling than before."""
        common, scale = super().after_answer(common, answer), self.scale(common)
        scalings = self.coordinators.scalings
        if answer.scaling >= 0 and scalings[answer.scaling].number > scalings[scale.published].number:
            common = common._replace(scale=scale._replace(published=answer.scaling))
        return common

    def _dies(self, state: State, common: Common, rank: int, last: set[int]) -> Moves:
        """Likewise, of a rank on trial too: it is not started again, and the node says so."""
        scale = self.scale(common)
        if not self.nodes.machine(scale.node).on_trial(rank):
            for action, after in super()._dies(state, common, rank, last):
                yield action, self._never_stranded_twice(after, common, rank)
            return
        ended = common._replace(scale=scale._replace(node=self.nodes.ended(scale.node, rank)))
        for block in sorted(last):
            for stopped in self.blocks.stopped(block):
                yield Action("die", rank, fair=False), self._with(self._changed(state, ended), rank, stopped)

    def _never_stranded_twice(self, after: State, before: Common, rank: int) -> State:
        if rank < self.known(before).limit:
            return after
        return self._changed(after, self.common(after)._replace(stranded=before.stranded))

    def _scaled(self, state: State, **fields: Any) -> State:
        common = self.common(state)
        return self._changed(state, common._replace(scale=self.scale(common)._replace(**fields)))
