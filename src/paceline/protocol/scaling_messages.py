"""How many ranks a deployment has, and what is said while that changes (`scaling.py` has the rules)."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from paceline.protocol.sampling import Count, Identity, Message, RankNumber

Size = Annotated[int, Meta(ge=1, le=65536)]
"""How many ranks a deployment can have."""

Outcome = Literal["done", "refused", "failed", "late"]


def most_ranks(size: int) -> int:
    """What a deployment that began with `size` ranks may have where nothing is set: enough for most who ask for more,
    and no more than a slip of the hand can start."""
    return max(16, 4 * size)


class Scaling(Message, frozen=True, tag="scaling"):
    """How many ranks there are: even `number`: `size`; odd: `size` becomes `target`. The highest number counts.

    `hosts`: (rank, node), where those ranks run that scaling has brought. `front_end`, `call`: who asked last, 0 for
    nobody. `drain_ms`: how long ranks that leave may take to end their requests. `startup_ms`: how long new ranks may
    take to load. `waiting_for`: ranks that have not done so. `outcome`: of the last change, once the number is even:
    "refused" is one that was not begun, "failed" and "late" are ones that were undone. `why`: what it says of that.
    """

    number: Count
    size: Size
    target: Size
    hosts: list[tuple[RankNumber, Identity]] = []
    front_end: Identity = 0
    call: Identity = 0
    drain_ms: Count = 0
    startup_ms: Count = 0
    waiting_for: list[RankNumber] = []
    outcome: Outcome = "done"
    why: Annotated[str, Meta(max_length=1024)] = ""

    @property
    def under_way(self) -> bool:
        """Whether the size is about to change."""
        return self.number % 2 == 1

    @property
    def limit(self) -> int:
        """Ranks below this may be there."""
        return max(self.size, self.target) if self.under_way else self.size

    @property
    def serving(self) -> int:
        """Ranks below this get new requests, once they are ready."""
        return min(self.size, self.target) if self.under_way else self.size

    def fits(self, most: int) -> bool:
        """Whether all that it says can be so where there are never more ranks than `most`."""
        lists = max(len(self.hosts), len(self.waiting_for))
        return max(self.size, self.target, lists) <= most

    @property
    def joining(self) -> range:
        """The ranks that are to come."""
        return range(self.size, self.limit)

    @property
    def leaving(self) -> range:
        """The ranks that are to go."""
        return range(self.serving, self.size)

    def in_words(self) -> dict[str, object]:
        """For `/health` and clients."""
        going = "loading" if self.joining else "draining"
        return {
            "status": going if self.under_way else "settled",
            "number": self.number,
            "size": self.size,
            "target": self.target,
            "waiting_for": self.waiting_for,
            "outcome": self.outcome,
            "why": self.why,
        }


class ScaleRequest(Message, frozen=True, tag="scale"):
    """Let the deployment have `size` ranks. Repeated until a Scaling names it; `call` is the front-end's number for it.

    `drain_ms`, `startup_ms`: as in Scaling.
    """

    front_end: Identity
    call: Identity
    size: Size
    drain_ms: Count
    startup_ms: Count


class NodeHello(Message, frozen=True, tag="node-hello"):
    """A node says that it is there, when it is asked, and that it has heard a Scaling.

    `node`: one life of one node's supervisor. `ranks`: those that run there, or are about to. `scaling`: the newest
    that it knows. `own_front_ends`: its front-ends balance over its ranks alone (hybrid mode), so it must keep one.
    `fixed`: something outside balances (external mode), and nothing can be scaled.
    """

    version: Count
    node: Identity
    ranks: list[RankNumber]
    scaling: Scaling
    own_front_ends: bool = False
    fixed: bool = False


class RankFailed(Message, frozen=True, tag="rank-failed"):
    """A rank that was to join has ended before it did; `number`: of the Scaling that brought it. `why`: one line."""

    node: Identity
    number: Count
    rank: RankNumber
    why: Annotated[str, Meta(max_length=512)] = ""
