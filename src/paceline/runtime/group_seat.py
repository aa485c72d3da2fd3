"""A lockstep rank's seat among its peers: forms each generation's group, and agrees with the others in it."""

from __future__ import annotations

from collections.abc import Sequence

from paceline.engines.group import GenerationEnded, RankGroup, Waiting
from paceline.protocol.agreement import REDUCTIONS, integers, outcome
from paceline.protocol.messages import GroupMember
from paceline.protocol.rank_events import Agree, Agreed
from paceline.runtime.collective import SocketGroup
from paceline.runtime.group_link import GroupListener, form_group

FORM_TIMEOUT_S = 1.0
"""How long a rank waits for its peers. Shorter than the coordinator's patience, which then calls the next one."""


class GroupSeat:
    """The listener that peers connect to, and the group of the current generation, if there is one.

    `address`: where to listen, as for `GroupListener`. All but `leave` is called by the engine's thread.
    """

    def __init__(self, rank: int, address: str) -> None:
        self._rank = rank
        self._listener = GroupListener(address)
        self._group: SocketGroup | None = None
        self._left = False
        self.address = self._listener.address

    def form(self, generation: int, members: Sequence[GroupMember]) -> RankGroup:
        """Leave the group there was, and form this one. Raises StartupError naming the ranks that did not come."""
        self._close_group()
        addresses = {member.rank: member.address for member in members}
        self._group = form_group(self._listener, generation, self._rank, addresses, FORM_TIMEOUT_S, lambda: self._left)
        return self._group

    def agree(self, agree: Agree) -> Agreed:
        """What all ranks' parts come to. Raises GenerationEnded."""
        if self._group is None:
            raise GenerationEnded("this rank is in no generation")
        reduced = self._group.all_reduce(integers(agree), REDUCTIONS)
        try:
            return outcome(reduced)
        except ValueError as error:
            self._group.leave()
            raise GenerationEnded(f"generation {self._group.generation} has ended: {error}") from None

    def urge(self) -> None:
        """Have all ranks agree soon; any thread may call it."""
        if self._group is not None:
            self._group.urge()

    def urged(self) -> bool:
        """Whether some rank has asked for that since this was last called, at the end of each step."""
        return self._group is not None and self._group.urged()

    def waiting(self) -> Waiting | None:
        """For whom this rank waits, and how long; any thread may ask."""
        group = self._group
        return None if group is None else group.waiting()

    def break_off(self, generation: int) -> None:
        """End the group that there is for all its members, if it is of an earlier generation; any thread may call it.

        A step that is in it is made anew in the next one.
        """
        group = self._group
        if group is not None and group.generation < generation:
            group.leave()

    def leave(self) -> None:
        """End the generation for this rank and so for all, for good; any thread may call it."""
        self._left = True
        if self._group is not None:
            self._group.leave()

    def close(self) -> None:
        """Leave, and stop listening."""
        self._close_group()
        self._listener.close()

    def _close_group(self) -> None:
        if self._group is not None:
            self._group.close()
            self._group = None
