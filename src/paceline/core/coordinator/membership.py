"""Which ranks there are, in the coordinator's eyes: joining, ready, gone; and when it asks them who they are.

The coordinator starts none of them and may itself have just come back empty, so all it knows is what ranks say:

- Only a RankHello introduces a new life of a rank; any other message from a life that is not the current one is void.
- A life that was replaced or has left is retired, and a late hello of it is void too. Incarnations are compared for
  equality only: clocks jump. So a new coordinator, which has retired nobody, tells a late hello of the dead from a new
  life by the connection: where ranks show their presence, nobody has a place before it is connected. An invented life
  would be a member for ever: no connection of it ends.
- A rank becomes ready by saying so, after it was told the wave.
- A rank whose connection has ended is lost: no member, and what still arrives of it is void, until it has connected
  anew and says hello. It is not retired, since it need not be dead.

The roll call. A question is a broadcast that every rank answers; subscriptions within a moment share one. It can be
lost to a rank whose connection was not up yet, and a paused rank says nothing by itself, so while ranks are missing it
is asked again. A message from a life that is not known is a reason to ask too: only an answer introduces it.

Until a coordinator that has taken another's place has heard the ranks, it does not know whether they are paused. So it
admits nobody, wakes nobody for a front-end and answers no call, before it is acquainted: with all ranks where they run
in lockstep, and otherwise with those that answer within a second, since one of them may be dead.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence, Set
from enum import Enum

from msgspec import Struct

from paceline.core.messages import Member, RankHello
from paceline.core.requests import Refused
from paceline.core.retry import Retry

RETIRED_KEPT = 16
LOST_S = 2.0
"""After this a rank whose connection has ended is taken for dead, in questions that wait for an answer of all."""
REFUSED_S = 60.0
"""A life that has no place says hello ten times a second. It is told and named so often."""


class RankState(Enum):
    """A rank's place in the deployment."""

    ABSENT = "absent"
    JOINING = "joining"
    READY = "ready"
    LOST = "lost"
    GONE = "gone"


class Said(Enum):
    """What a rank, or the end of its connection, says about its place."""

    HELLO = "hello"
    HELLO_READY = "hello, ready"
    LOST = "connection ended"
    LEAVING = "leaving"


TRANSITIONS: dict[tuple[RankState, Said], RankState] = {
    (RankState.ABSENT, Said.HELLO): RankState.JOINING,
    (RankState.ABSENT, Said.HELLO_READY): RankState.READY,
    (RankState.JOINING, Said.HELLO): RankState.JOINING,
    (RankState.JOINING, Said.HELLO_READY): RankState.READY,
    (RankState.JOINING, Said.LEAVING): RankState.GONE,
    # A hello from before the rank was ready, that was overtaken by nothing but arrives after a
    # coordinator asked twice: the rank stays what it has become.
    (RankState.READY, Said.HELLO): RankState.READY,
    (RankState.READY, Said.HELLO_READY): RankState.READY,
    (RankState.READY, Said.LEAVING): RankState.GONE,
    (RankState.JOINING, Said.LOST): RankState.LOST,
    (RankState.READY, Said.LOST): RankState.LOST,
    (RankState.LOST, Said.HELLO): RankState.JOINING,
    (RankState.LOST, Said.HELLO_READY): RankState.READY,
    (RankState.LOST, Said.LEAVING): RankState.GONE,
    (RankState.GONE, Said.HELLO): RankState.JOINING,
    (RankState.GONE, Said.HELLO_READY): RankState.READY,
}
"""(state, what is said) to state, for the current life; a new life starts from ABSENT."""


READY, LOST, GONE = RankState.READY, RankState.LOST, RankState.GONE
"""As they are here: asked of with every message, and an enumeration is slow to name its members."""


class RankEntry(Struct):
    """One rank: the life that is current, where it is reached, and its place. `lost_at`: since when it is lost."""

    rank: int
    incarnation: int
    address: str
    state: RankState
    lost_at: float | None = None


class Membership:
    """The register of ranks, part of the coordinator's machine. `size`: ranks in the deployment."""

    INCIDENTAL = frozenset({"_members"})

    def __init__(self, size: int, *, presence: bool = False) -> None:
        self.size = size
        self.limit = size
        """Ranks below this may say hello: those of the deployment, and those that are to become part of it."""
        self.hung: frozenset[int] = frozenset()
        """Ranks whose step does not return: members still, that get nothing new."""
        self._entries: dict[int, RankEntry] = {}
        self._retired: dict[int, deque[int]] = {}
        self._connected: set[tuple[int, int]] = set()
        # Whether ranks show their presence: known from the start, or once one has.
        self._presence = presence
        self._members: list[Member] | None = None
        self._refused: dict[tuple[int, int], float] = {}

    def refusal(self, hello: RankHello, now: float) -> tuple[Refused, str] | None:
        """What a life is told that has no place, and what is to be said of it; None where that was said already."""
        rank, life = hello.rank, (hello.rank, hello.incarnation)
        self._refused = {known: at for known, at in self._refused.items() if now < at + REFUSED_S}
        if life in self._refused:
            return None
        self._refused[life] = now
        holder = self._entries[rank].address if rank < self.limit else ""
        line = f"rank {rank} is not of this deployment of {self.size}: {hello.address} is refused"
        if holder:
            line = f"rank {rank} is held by {holder}: {hello.address}, which claims it too, is refused"
        return Refused(*life, holder[:256], self.size), line

    def held(self, hello: RankHello) -> bool:
        """Whether another life has the rank, and lives, as its connection shows. It does not where the address is the
        same; and one that joins gives way to one that has served, which a new coordinator hears in any order.
        """
        entry = self._entries.get(hello.rank)
        return (
            entry is not None
            and entry.incarnation != hello.incarnation
            and (entry.rank, entry.incarnation) in self._connected
            and entry.address != hello.address
            and (entry.state is READY or (entry.state is RankState.JOINING and not hello.ready))
        )

    def hello(self, rank: int, incarnation: int, address: str, ready: bool) -> bool:
        """A rank said hello. Returns whether it counts; a retired life's does not."""
        if incarnation in self._retired.get(rank, ()):
            return False
        if self._presence and (rank, incarnation) not in self._connected:
            return False
        entry = self._entries.get(rank)
        if entry is not None and entry.incarnation == incarnation and entry.lost_at is not None:
            return False
        if entry is not None and entry.incarnation != incarnation:
            self._retire(entry)
            entry = None
        state = entry.state if entry else RankState.ABSENT
        said = Said.HELLO_READY if ready else Said.HELLO
        self._entries[rank] = RankEntry(rank, incarnation, address, TRANSITIONS[state, said])
        self._members = None
        return True

    def leave(self, rank: int, incarnation: int) -> bool:
        """A life of a rank has ended. Returns whether it was the current one."""
        entry = self._entries.get(rank)
        if entry is None or entry.incarnation != incarnation or entry.state is RankState.GONE:
            return False
        entry.state = TRANSITIONS[entry.state, Said.LEAVING]
        self._retire(entry)
        self._members = None
        return True

    def lose(self, rank: int, incarnation: int, now: float) -> bool:
        """The connection of a life has ended. Returns whether that is news of the current one."""
        self._connected.discard((rank, incarnation))
        if not self.is_current(rank, incarnation):
            return False
        entry = self._entries[rank]
        entry.state, entry.lost_at = TRANSITIONS[entry.state, Said.LOST], now
        self._members = None
        return True

    def connected(self, rank: int, incarnation: int) -> None:
        """A life has connected, perhaps anew: from here on its hello counts. Below 0 it is not known which.

        It may be of a rank that this coordinator does not know to be of the deployment, yet.
        """
        if rank >= 0:
            self._presence = True
            self._connected.add((rank, incarnation))
        entry = self._entries.get(rank)
        if entry is not None and entry.incarnation == incarnation:
            entry.lost_at = None

    def resize(self, size: int, limit: int) -> list[int]:
        """So many ranks are of the deployment, and so many may say hello. Returns those that are gone with that."""
        self.size, self.limit = size, limit
        gone = [rank for rank in self._entries if rank >= limit]
        for rank in gone:
            self._retire(self._entries.pop(rank))
            self._members = None
        return gone

    def is_current(self, rank: int, incarnation: int) -> bool:
        """Whether a message from this life of the rank counts."""
        entry = self._entries.get(rank)
        if entry is None or entry.incarnation != incarnation:
            return False
        return entry.state is not GONE and entry.state is not LOST

    def is_retired(self, rank: int, incarnation: int) -> bool:
        """Whether this life of the rank is known to be over, or is of no rank of the deployment."""
        return rank >= self.limit or incarnation in self._retired.get(rank, ())

    def lives(self) -> dict[int, int]:
        """By rank, the lives that take requests."""
        return {member.rank: member.incarnation for member in self.members()}

    def is_ready(self, rank: int) -> bool:
        entry = self._entries.get(rank)
        return entry is not None and entry.state is RankState.READY

    def ready_life(self, rank: int) -> int | None:
        """The life of a rank that takes requests, None where it does not."""
        entry = self._entries.get(rank)
        return entry.incarnation if entry is not None and entry.state is READY else None

    def members(self) -> list[Member]:
        """The ready ranks in order of their numbers."""
        if self._members is None:
            self._members = [
                Member(entry.rank, entry.incarnation, entry.address)
                for _, entry in sorted(self._entries.items())
                if entry.state is RankState.READY
            ]
        return self._members

    def missing(self) -> list[int]:
        return [rank for rank in range(self.size) if not self.is_ready(rank)]

    def gone(self, now: float) -> set[int]:
        """Ranks that have left in good order, or are lost for longer than it takes to connect anew, and not back."""
        return {
            rank
            for rank, entry in self._entries.items()
            if entry.state is RankState.GONE
            or (entry.state is RankState.LOST and entry.lost_at is not None and now >= entry.lost_at + LOST_S)
        }

    def ended(self) -> list[tuple[int, int]]:
        """Of each rank that is not ready, or not there any more, the life that ended last, if any did."""
        return [(rank, lives[-1]) for rank, lives in sorted(self._retired.items()) if not self.is_ready(rank)]

    def served_before(self, rank: int) -> bool:
        """Whether a life of it has been here that was more than joining, or is retired."""
        entry = self._entries.get(rank)
        return rank in self._retired or (entry is not None and entry.state is not RankState.JOINING)

    def _retire(self, entry: RankEntry) -> None:
        self._retired.setdefault(entry.rank, deque(maxlen=RETIRED_KEPT)).append(entry.incarnation)


GATHER_S = 0.01
"""Subscriptions within this time share a question."""
FIRST_AGAIN_S = 0.1
LONGEST_AGAIN_S = 4.0
PATIENCE_S = 1.0
"""How long independent ranks are waited for that may be dead."""
ADMIT_AGAIN_S = 0.05
"""A rank asks for admission ten times a second and at each question; one answer serves them all."""


class RollCall:
    """What is to be asked, who was answered when, and whether the ranks were heard.

    `size`: ranks in the deployment. `fresh`: there was no coordinator before, so there is nothing to learn.
    `patience_s`: how long to wait for a rank that says nothing, None for ever.
    """

    def __init__(self, size: int, *, fresh: bool, patience_s: float | None, without: Set[str] = frozenset()) -> None:
        self._unheard = set() if fresh else set(range(size))
        self._patience_s = patience_s
        self._begun: float | None = None
        self._asks = "new-coordinator-asks" not in without
        self._retry = Retry(FIRST_AGAIN_S, LONGEST_AGAIN_S)
        self._asked = float("-inf")
        self._admitted: dict[int, tuple[int, float]] = {}

    @property
    def due(self) -> float | None:
        """When to ask, or when patience ends, or None."""
        if self._unheard and self._begun is not None and self._patience_s is not None:
            return min(self._retry.due or float("inf"), self._begun + self._patience_s)
        return self._retry.due

    def expire(self, now: float, *, patience: bool = False) -> None:
        """The next question is due, whatever its time was; or patience with the ranks that say nothing is over."""
        if patience:
            self._begun = float("-inf")
        else:
            self._retry.due = now

    @property
    def impatient(self) -> bool:
        """Whether ranks are waited for that may be dead, and not for ever."""
        return bool(self._unheard) and self._patience_s is not None

    def moment_passes(self, *, asks: bool) -> None:
        """The last question and the last admission are long ago: nothing is put off for their sake. `asks`: whether
        there is anybody to ask."""
        self._asked = float("-inf")
        self._admitted.clear()
        self._retry.due = self._retry.due if asks else None

    def resize(self, size: int, now: float) -> None:
        """The deployment has so many ranks: nobody waits for a word of the others, and new ones are asked."""
        self._unheard = {rank for rank in self._unheard if rank < size}
        self.wanted(now)

    def heard(self, rank: int) -> None:
        self._unheard.discard(rank)

    def acquainted(self, now: float) -> bool:
        """Whether it is known how the ranks stand."""
        if not self._unheard:
            return True
        if self._begun is None:
            self._begun = now
        if self._patience_s is not None and now >= self._begun + self._patience_s:
            self._unheard.clear()
        return not self._unheard

    def wanted(self, now: float) -> None:
        """Somebody is there who has not been heard: ask, soon and again."""
        if self._asks:
            self._retry.start(min(self._retry.due or float("inf"), max(now, self._asked + GATHER_S)))

    def ask(self, now: float, missing: Callable[[], Sequence[int]]) -> bool:
        """Whether to ask now; `missing`: the ranks of the deployment that are still unknown."""
        if not self._retry.is_due(now):
            return False
        self._asked = now
        self._retry.said(now)
        if not missing():
            self._retry.stop()
        return True

    def admits(self, rank: int, incarnation: int, now: float) -> bool:
        """Whether this hello is to be answered: by whoever is acquainted, and not twice in a moment."""
        if not self.acquainted(now):
            return False
        life, when = self._admitted.get(rank, (-1, float("-inf")))
        if life == incarnation and now < when + ADMIT_AGAIN_S:
            return False
        self._admitted[rank] = (incarnation, now)
        return True
