"""Everything that can happen in many states at once: `World.successors`, for arrays.

    batch = Level(world).successors(states)

`World` says what can happen, state by state. Here the same moves are made by looking up what each party does, for all
states together, which is some ten times faster; `explore_lookups` holds what was looked up. The tests hold the two
against each other, state by state (`test_many_states_at_once`). Arrays of states have a row for each component
(`explore_state.State`) and a column for each state.
"""

from __future__ import annotations

from itertools import permutations
from typing import NamedTuple

import numpy as np

from paceline.simulate.explore_block import Broken
from paceline.simulate.explore_lookups import BlockLookups, CommonLookups, CoordinatorLookups
from paceline.simulate.explore_state import COMMON, COORDINATOR, FIRST_BLOCK
from paceline.simulate.explore_tables import Bools, Ints, Table
from paceline.simulate.explore_world import World


class Batch(NamedTuple):
    """Moves. `sources`: the column that each begins in. `states`: what each leads to. `fair`: see `Action`."""

    sources: Ints
    states: Ints
    fair: Bools


class Level:
    """The moves of a world whose equal states are merged."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._ranks = range(world.ranks)
        self.coordinator = CoordinatorLookups(world)
        self.common = CommonLookups(world, self.coordinator.event)
        self.block = BlockLookups(world, self.coordinator)
        self._orders = list(permutations(self._ranks))
        self._renumbered = Table(lambda state, order: world.coordinators.renumbered(state, self._orders[order]))
        self._made: list[Batch] = []

    def successors(self, states: Ints) -> Batch:
        """Of all states, the moves and the canonical states after them. Raises Broken if one of them is."""
        nothing = np.zeros(0, np.int64)
        self._made = [Batch(nothing, states[:, nothing], nothing > 0)]
        sources = np.arange(states.shape[1])
        sources = self._only_noted(sources, states)
        sources = self._only_heard(sources, states[:, sources])
        self._everything(sources, states[:, sources])
        made = Batch(*(np.concatenate(parts, axis=-1) for parts in zip(*self._made, strict=True)))
        return made._replace(states=self._canonical(made.states))

    def at_rest(self, states: Ints) -> Bools:
        """Whether each is at rest. Raises Broken if one is wrong (`World.at_rest`)."""
        common, blocks = states[COMMON], states[FIRST_BLOCK:]
        settled = self.common.settled(common)
        runs = self._of_blocks(self.block.running, blocks).any(axis=0)
        if (
            settled.astype(bool) & runs & (self._of_blocks(self.block.suspension, blocks) <= settled).any(axis=0)
        ).any():
            raise Broken("a rank runs while all is suspended")
        still = (self.common.asking(common) == 0) & self._of_blocks(self.block.quiet, blocks).all(axis=0)
        still &= self.coordinator.resting(states[COORDINATOR]) > 0
        for place in np.flatnonzero(still).tolist():
            self._world.at_rest(tuple(states[:, place].tolist()))
        return np.asarray(still)

    def _of_blocks(self, table: Table, blocks: Ints) -> Ints:
        return table(blocks.reshape(-1)).reshape(blocks.shape)

    def _make(self, sources: Ints, states: Ints, fair: Bools | bool) -> None:
        if sources.size:
            self._made.append(Batch(sources, states, np.broadcast_to(np.asarray(fair, dtype=bool), sources.shape)))

    # What comes first -----------------------------------------------------------------------------

    def _known(self, states: Ints, rank: int) -> Bools:
        """Whether the coordinator knows this life of a rank as ready."""
        life = self.block.life(states[FIRST_BLOCK + rank])
        return np.asarray(self.coordinator.life(states[COORDINATOR], rank) == life)

    def _only_noted(self, sources: Ints, states: Ints) -> Ints:
        """Moves of messages that come first, as they are only noted; returns the states without."""
        crashes = self.common.crashes(states[COMMON])
        for rank in self._ranks:
            name = self.block.oldest(states[FIRST_BLOCK + rank, sources])
            here = states[:, sources]
            some = np.flatnonzero((name >= 0) & self._known(here, rank))
            column = (name[some] * 2 + crashes[sources[some]]) * self._world.ranks + rank
            answer = self.coordinator.noted(here[COORDINATOR, some], column)
            some, answer = some[answer >= 0], answer[answer >= 0]
            old = self.coordinator.news(here[COMMON, some], self.coordinator.echo(answer)) == 0
            some, answer = some[old], answer[old]
            after = here[:, some]
            after[COORDINATOR] = self.coordinator.state(answer)
            after[FIRST_BLOCK + rank] = self.block.said_read(after[FIRST_BLOCK + rank])
            self._make(sources[some], after, True)
            sources = np.delete(sources, some)
        return sources

    def _only_heard(self, sources: Ints, states: Ints) -> Ints:
        """Likewise of what ranks hear, and steps, where nobody else can do anything in between."""
        coordinator, common = states[COORDINATOR], states[COMMON]
        may = (self.common.unsent(common) == 0) & (self.common.crashes(common) == 0) & (self.common.over(common) > 0)
        may &= self.coordinator.tells(coordinator) == 0
        done = np.zeros(sources.size, bool)
        for rank in self._ranks:
            some = np.flatnonzero(may)
            block = self.block.hears(states[FIRST_BLOCK + rank, some])
            some, block = some[block >= 0], block[block >= 0]
            after = states[:, some]
            after[FIRST_BLOCK + rank] = block
            self._make(sources[some], after, True)
            may[some], done[some] = False, True
        for rank in self._ranks:
            some = np.flatnonzero(may)
            may[some] = self._known(states[:, some], rank) & (self.block.still(states[FIRST_BLOCK + rank, some]) > 0)
        some = np.flatnonzero(may)
        done[some[self._round(sources[some], states[:, some])]] = True
        return sources[~done]

    # Moves ----------------------------------------------------------------------------------------

    def _everything(self, sources: Ints, states: Ints) -> None:
        common = states[COMMON]
        for rank in self._ranks:
            places, rows = self.block.moves(states[FIRST_BLOCK + rank])
            after = states[:, places]
            after[FIRST_BLOCK + rank] = rows[:, 0]
            self._seen(sources[places], after, rows[:, 1], rank, rows[:, 2] > 0)
        if self._world.calls:
            self._call(sources, states)
        self._ticks(sources, states)
        self._round(sources, states)
        some = np.flatnonzero(self.common.unsent(common))
        self._send(sources[some], states[:, some])
        some = np.flatnonzero(self.common.crashes(common))
        self._crash(sources[some], states[:, some])

    def _seen(self, sources: Ints, before: Ints, event: Ints, rank: int, fair: Bools | bool) -> None:
        """Moves with an event at the coordinator, or none (-1)."""
        fair = np.broadcast_to(fair, sources.shape)
        alone = event < 0
        self._make(sources[alone], before[:, alone], fair[alone])
        sources, before, event, fair = sources[~alone], before[:, ~alone], event[~alone], fair[~alone]
        answer = self.coordinator.answers(before[COORDINATOR], event * self._world.ranks + rank)
        before[COORDINATOR] = self.coordinator.state(answer)
        before[COMMON] = self.coordinator.after(before[COMMON], self.coordinator.echo(answer))
        self.coordinator.sound(answer)
        left_out = self.coordinator.left_out(answer)
        told = before.copy()
        for place in self._ranks:
            some = np.flatnonzero(left_out == place)
            self.block.may_be_left_out(before[FIRST_BLOCK + place, some], self.coordinator.wake(answer[some]))
            heard = self.coordinator.heard(answer, place)
            some = np.flatnonzero(heard)
            told[FIRST_BLOCK + place, some] = self.block.told(before[FIRST_BLOCK + place, some], heard[some])
        self._make(sources, told, fair)
        may = (self.common.losses(before[COMMON]) > 0) & (self.coordinator.can_be_lost(answer) > 0)
        for place in range(FIRST_BLOCK, len(before)):
            some = np.flatnonzero(may & (told[place] != before[place]))
            less = told[:, some]
            less[place] = before[place, some]
            less[COMMON] = self.common.lost(less[COMMON])
            self._make(sources[some], less, False)

    def _call(self, sources: Ints, states: Ints) -> None:
        event = self.common.call(states[COMMON])
        some = np.flatnonzero(event >= 0)
        after = states[:, some]
        after[COMMON] = self.common.told(after[COMMON])
        self._seen(sources[some], after, event[some], 0, True)
        common = states[COMMON]
        some = np.flatnonzero((self.common.over(common) == 0) & (self.common.asking(common) == 0))
        after = states[:, some]
        after[COMMON] = self.common.asked(common[some])
        self._make(sources[some], after, self.common.resumes(common[some]) > 0)

    def _ticks(self, sources: Ints, states: Ints) -> None:
        """A timer is due once all that ranks have said is read, where a rank is silent that it waits for."""
        blocks = states[FIRST_BLOCK:]
        some = np.flatnonzero((self._of_blocks(self.block.oldest, blocks) < 0).all(axis=0))
        sources, states, blocks = sources[some], states[:, some], blocks[:, some]
        bits = (1 << np.arange(len(blocks)))[:, np.newaxis]
        silent = (self._of_blocks(self.block.reached, blocks) * bits).sum(axis=0)
        places, rows = self.coordinator.ticks(states[COORDINATOR])
        due = (rows[:, 1] & silent[places]) > 0
        stirs = self._of_blocks(self.block.stirs, blocks).any(axis=0)
        stirs |= self._of_blocks(self.block.running, blocks).all(axis=0)
        early = (rows[:, 2] > 0) & np.asarray(stirs)[places]
        some = np.flatnonzero(due & ~early)
        self._seen(sources[places[some]], states[:, places[some]], rows[some, 0], 0, True)
        some = np.flatnonzero(due & early & (self.common.losses(states[COMMON])[places] > 0))
        before = states[:, places[some]]
        before[COMMON] = self.common.lost(before[COMMON])
        self._seen(sources[places[some]], before, rows[some, 0], 0, False)

    def _round(self, sources: Ints, states: Ints) -> Ints:
        """All ranks run and take part in a step, and in the agreement if one is due. Returns the columns of those."""
        chosen = np.flatnonzero(self._of_blocks(self.block.may_step, states[FIRST_BLOCK:]).all(axis=0))
        states = states[:, chosen]
        blocks = states[FIRST_BLOCK:]
        agreeing = self._of_blocks(self.block.agreeing, blocks).all(axis=0)
        some = np.flatnonzero(~agreeing)
        blocks[:, some] = self._of_blocks(self.block.stepped, blocks[:, some])
        agrees = self._of_blocks(self.block.agreeing, blocks) > 0
        if (agrees.any(axis=0) != agrees.all(axis=0)).any():
            raise Broken("ranks are in different collectives")
        # In an agreement a rank can hear of a suspension that it has not spoken of.
        some = np.flatnonzero(agrees.all(axis=0) & (agreeing | (not self._world.calls)))
        blocks[:, some] = self._agreed(blocks[:, some])
        self._make(sources[chosen], states, True)
        return chosen

    def _agreed(self, blocks: Ints) -> Ints:
        if not blocks.size:
            return blocks
        any_work = self._of_blocks(self.block.has_work, blocks).any(axis=0)
        wave = self._of_blocks(self.block.wave, blocks).max(axis=0)
        suspension = self._of_blocks(self.block.agreed_suspension, blocks).max(axis=0)
        found, places = np.unique(np.stack((any_work, wave, suspension)), axis=1, return_inverse=True)
        outcomes = [self.block.outcome((bool(one[0]), one[1], one[2])) for one in found.T.tolist()]
        outcome = np.asarray(outcomes)[places.reshape(-1)]
        return np.stack([self.block.agreed(numbers, outcome) for numbers in blocks])

    def _send(self, sources: Ints, states: Ints) -> None:
        published = self.common.published(states[COMMON])
        for publication in np.unique(published).tolist():
            some = np.flatnonzero(published == publication)
            sends = self.block.sends(publication, self.common.publications[publication])
            for rank in self._ranks:
                places, rows = sends(states[FIRST_BLOCK + rank, some])
                after = states[:, some[places]]
                after[COMMON] = self.common.sent(after[COMMON])
                after[FIRST_BLOCK + rank] = rows[:, 0]
                self._seen(sources[some[places]], after, rows[:, 1], rank, False)

    def _crash(self, sources: Ints, states: Ints) -> None:
        left = [self._of_blocks(table, states[FIRST_BLOCK:]) for table in self.block.crashed]
        after = states.copy()
        after[COORDINATOR] = self.coordinator.next_life(states[COORDINATOR])
        after[COMMON] = self.common.crashed(states[COMMON])
        for bits in range(1 << len(self._ranks)):
            chosen = np.stack([left[bits >> rank & 1][rank] for rank in self._ranks])
            some = np.flatnonzero((chosen >= 0).all(axis=0))
            self._make(sources[some], np.concatenate((after[:FIRST_BLOCK, some], chosen[:, some])), False)
        paused = np.flatnonzero(~self._of_blocks(self.block.running, states[FIRST_BLOCK:]).any(axis=0))
        for rank in self._ranks:
            died = states[:, paused]
            died[COMMON] = self.common.rank_crashed(died[COMMON])
            died[FIRST_BLOCK + rank] = self.block.reborn(died[FIRST_BLOCK + rank])
            self._make(sources[paused], died, False)

    # Equal states ---------------------------------------------------------------------------------

    def _canonical(self, states: Ints) -> Ints:
        """As `World.canonical`."""
        crashes = self.common.crashes(states[COMMON]) > 0
        for rank in self._ranks:
            known = self._known(states, rank)
            block = self.block.tidied(states[FIRST_BLOCK + rank], known.astype(np.int64))
            ahead = np.arange(block.size)
            while ahead.size:
                name = self.block.oldest(block[ahead])
                ahead, name = ahead[name >= 0], name[name >= 0]
                hello = self.block.hello(name) > 0
                may = (known[ahead] == hello) & ~(hello & crashes[ahead])
                ahead, name = ahead[may], name[may]
                void = self.coordinator.void(states[COORDINATOR, ahead], name * self._world.ranks + rank) > 0
                ahead = ahead[void]
                block[ahead] = self.block.said_read(block[ahead])
            states[FIRST_BLOCK + rank] = block
        return self._sorted(states)

    def _sorted(self, states: Ints) -> Ints:
        blocks = states[FIRST_BLOCK:]
        best = np.sort(blocks, axis=0)
        coordinator = np.full(states.shape[1], np.iinfo(np.int64).max)
        for number, order in enumerate(self._orders):
            some = np.flatnonzero((blocks[list(order)] == best).all(axis=0))
            coordinator[some] = np.minimum(coordinator[some], self._renumbered(states[COORDINATOR, some], number))
        return np.concatenate((coordinator[np.newaxis], states[COMMON : COMMON + 1], best))
