"""What a state of the whole deployment is made of, and which states are one.

Ranks are alike. States that differ only in which rank is which are one: `canonical` puts the blocks in order and
renumbers the coordinator's state to match.
"""

from __future__ import annotations

from itertools import permutations

from paceline.core.requests import ControlAction
from paceline.simulate.explore_commuting import Commuting
from paceline.simulate.explore_coordinator import Coordinators
from paceline.simulate.explore_rank import Blocks
from paceline.simulate.explore_rounds import Rounds
from paceline.simulate.explore_sends import ways_to_send, ways_without_notice
from paceline.simulate.explore_state import COMMON, COORDINATOR, FIRST_BLOCK, Common, State


class Parties:
    """All parts of all states met, by number. `ranks`: how many there can be; the other arguments: `World`'s."""

    kind_of_blocks: type[Blocks] = Blocks
    kind_of_coordinators: type[Coordinators] = Coordinators

    def __init__(
        self, ranks: int, requests: int, losses: int, crashes: int, *, calls: tuple[ControlAction, ...] = (),
        steps: int = 1, sync_interval: int = 1, without: frozenset[str] = frozenset(), merge: bool = True,
        backlog: int = 3, notices: bool = True,
    ) -> None:  # fmt: skip
        self.ranks = ranks
        self.receivers = list(range(ranks))
        self.backlog = backlog
        self.calls = calls
        self.blocks = self.kind_of_blocks(steps, sync_interval, without)
        self.coordinators = self.kind_of_coordinators(ranks, without)
        self.rounds = Rounds(self.blocks, backlog, called=bool(calls))
        self.ways_to_send = ways_to_send if notices else ways_without_notice
        self._merge = merge
        self._without = without
        self._numbers: dict[Common, int] = {}
        self.commons: list[Common] = []
        """What belongs to no one party, by number."""
        self._bound = Common(requests, (0, False), losses, crashes)
        # What commutes was shown for all rules together.
        self.commute = merge and not without
        self.commuting = Commuting(self.blocks, self.coordinators)

    def common(self, state: State) -> Common:
        """What belongs to no one party."""
        return self.commons[state[COMMON]]

    def first_blocks(self) -> list[int]:
        """The ranks, which have loaded their engines."""
        return [self.blocks.fresh() for _ in range(self.ranks)]

    def begun(self, common: Common) -> Common:
        """What it is when the walk begins, from what it is when all know one another."""
        return self._bound._replace(published=common.published)

    def fresh(self, common: Common, identity: int) -> int:
        """A coordinator that knows nothing."""
        return self.coordinators.fresh(identity)

    def deployed(self, state: State) -> tuple[int, ...]:
        """The blocks of the ranks that the deployment has."""
        return state[FIRST_BLOCK:]

    def open_ranks(self, common: Common) -> range:
        """The ranks that front-ends send requests to, once they are ready."""
        return range(self.ranks)

    def alike(self, common: Common) -> int:
        """Ranks below this are alike."""
        return self.ranks

    def canonical(self, state: State) -> tuple[State, tuple[int, ...]]:
        """The one state of those that differ in the ranks' numbers, and the order that leads to it."""
        identity = tuple(range(self.ranks))
        if not self._merge:
            return state, identity
        if self.commute:
            state = self.commuting.tidied(state, self.common(state))
        alike = self.alike(self.common(state))
        blocks, rest = state[FIRST_BLOCK : FIRST_BLOCK + alike], state[FIRST_BLOCK + alike :]
        best = tuple(sorted(blocks))
        if len(set(best)) == alike:
            if best == blocks:
                return state, identity
            order = (*map(blocks.index, best), *identity[alike:])
            return (self.coordinators.renumbered(state[COORDINATOR], order), state[COMMON], *best, *rest), order
        # Where some are equal, the coordinator's state decides.
        sorted_ = [order for order in permutations(identity[:alike]) if tuple(blocks[i] for i in order) == best]
        orders = [(*order, *identity[alike:]) for order in sorted_]
        coordinator, order = min((self.coordinators.renumbered(state[COORDINATOR], o), o) for o in orders)
        return (coordinator, state[COMMON], *best, *rest), order

    def _with(self, state: State, rank: int, block: int) -> State:
        place = FIRST_BLOCK + rank
        return (*state[:place], block, *state[place + 1 :])

    def _changed(self, state: State, common: Common) -> State:
        return (state[COORDINATOR], self.number(common), *state[FIRST_BLOCK:])

    def number(self, common: Common) -> int:
        """The number of what belongs to no one party."""
        number = self._numbers.get(common)
        if number is None:
            number = self._numbers[common] = len(self.commons)
            self.commons.append(common)
        return number
