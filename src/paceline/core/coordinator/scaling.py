"""The coordinator's part in scaling: a numbered change of how many ranks the deployment has.

Front-ends and nodes keep the newest number that they have heard (`transaction.py`), so a new coordinator learns from
them where the last one was. It goes on with a change under a number of its own: the last one may have ended it, and
said so to somebody that has not spoken yet. When that is heard, it ends as it did there.

Up: the new ranks are given numbers behind the others and nodes to run on, the one with the fewest first. They load
beside the traffic, and nobody counts on them: while the number is odd, `size` is what it was. When the last of them
has said that it has loaded, they become part of the deployment all at once, in lockstep in one new epoch. Where
one of them ends, or they take longer than they may, all of them go, and `size` never was another.

Down: the highest ranks leave. Front-ends send them nothing more, and say that they know; when they have, and the
ranks have nothing left, the ranks go. After the drain time they go in any case, and front-ends let what they still
had go on at others, as when a rank dies. In lockstep the others form an epoch without them.

A rank that a scale-down takes away, and a later scale-up brings back, is another life like any other.

A rank that scaling has put on a node goes on elsewhere when that node is gone for AWAY_S: nobody else knows that it is
to run there, and a node that comes back has the ranks of its flags alone. Who has it already by its flags keeps it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

from msgspec import Struct
from msgspec.structs import replace

from paceline.core.coordinator.epoch import Epochs
from paceline.core.coordinator.membership import Membership, RollCall
from paceline.core.dispatch.dispatcher import Dispatcher
from paceline.core.limits import most_ranks
from paceline.core.messages import NodeHello, RankFailed, RankHello, ScaleRequest, Scaling
from paceline.core.requests import Outcome
from paceline.core.transaction import Transaction

NODES_S = 1.0
"""How long a new coordinator waits for the nodes before it says that there are none."""
LOOK_AGAIN_S = 0.1
AWAY_S = 10.0
"""How long a node that scaling has put ranks on may be away before they are started elsewhere."""


class KnownNode(Struct):
    """What a node last said. `number`: of the newest Scaling that it knows."""

    ranks: frozenset[int]
    number: int
    own_frontends: bool
    fixed: bool


class DeploymentScaling(Transaction):
    """How many ranks there are, and what is under way. `size`: at the start. `most`: what there may ever be, None for
    `most_ranks`. `without`: rules left out.
    """

    def __init__(self, size: int, most: int | None = None, without: Set[str] = frozenset()) -> None:
        super().__init__()
        self.state = Scaling(0, size, size)
        self._most = max(size, most or most_ranks(size))
        self._without = without
        self.changed = False
        """Whether all else must be brought in line."""
        self._taken_over: int | None = None
        """The number that the change had at the coordinator before."""
        self._loaded: dict[int, RankHello] = {}
        self._nodes: dict[int, KnownNode] = {}
        self._known_by: dict[int, int] = {}
        self._nodeless_since: float | None = None
        self._deadline: float | None = None
        self._away_since: float | None = None
        """Since when a rank that scaling has put somewhere is at no node that is there."""
        self._moved: list[int] = []

    @property
    def number(self) -> int:
        return self.state.number

    @property
    def due(self) -> float | None:
        """When nodes must be told (again), or time is up; None for neither."""
        return min((at for at in (self._retry.due, self._deadline, self._away_due) if at is not None), default=None)

    @property
    def _away_due(self) -> float | None:
        return None if self._away_since is None else self._away_since + AWAY_S

    def timers(self) -> dict[str, list[int]]:
        found = {"scaling": self._retry.due, "scaling-late": self._deadline, "scaling-away": self._away_due}
        return {name: [] for name, at in found.items() if at is not None}

    def expire(self, timer: str, now: float) -> None:
        if timer == "scaling":
            self._retry.due = now
        elif timer == "scaling-away":
            self._away_since = now - AWAY_S
        else:
            self._deadline = now

    # What is heard ------------------------------------------------------------------------------

    def ask(self, request: ScaleRequest, now: float) -> None:
        """A front-end asks, or repeats what it asked.

        While a change is under way nothing else is begun: whoever asks sees by the state that it is another's.
        """
        state, size = self.state, request.size
        if state.under_way or request.call <= self.served.newest(request.frontend) or self._waits_for_nodes(now):
            return
        self.served.serve(request.frontend, request.call, state.number)
        asked = replace(
            state, target=size, frontend=request.frontend, call=request.call, drain_ms=request.drain_ms,
            startup_ms=request.startup_ms, outcome="done", why="",
        )  # fmt: skip
        refusal = self._refusal(size)
        if refusal or size == state.size:
            outcome: Outcome = "refused" if refusal else "done"
            self._change(replace(asked, number=state.number + 2, outcome=outcome, why=refusal), now)
            return
        hosts = [(rank, node) for rank, node in state.hosts if rank < state.size]
        joining = range(state.size, size)
        hosts += zip(joining, self._places(len(joining)), strict=True)
        waiting_for = list(joining or range(size, state.size))
        self._change(replace(asked, number=state.number + 1, hosts=hosts, waiting_for=waiting_for), now)

    def learn(self, state: Scaling, now: float) -> None:
        """Somebody knows this; it counts where it is news, and can be: each rank that there may be costs something."""
        if not state.fits(self._most):
            return
        before, number = self._taken_over, self.number
        if before is not None and (state.number, number) == (before + 1, before + 2):
            self._change(replace(state, number=number + 1), now)
        elif self.is_news(state.number):
            self._taken_over = state.number if state.under_way else None
            self._change(replace(state, number=state.number + 2) if state.under_way else state, now)

    def _change(self, state: Scaling, now: float) -> None:
        self.state, self._moved = state, []
        self.changed = True
        self.served.serve(state.frontend, state.call, state.number)
        allowed_ms = state.startup_ms if state.joining else state.drain_ms
        self._deadline = now + allowed_ms / 1000 if state.under_way else None
        self._retry.start(now)

    def said(self, message: NodeHello | RankFailed, now: float) -> None:
        if isinstance(message, RankFailed):
            if message.number == self.state.number and message.rank in self.state.joining:
                self._end("failed", f"rank {message.rank} ended before it was ready: {message.why}", now)
            return
        self.learn(message.scaling, now)
        number = message.scaling.number
        ranks = frozenset(message.ranks)
        self._nodes[message.node] = KnownNode(ranks, number, message.own_frontends, message.fixed)
        if number < self.state.number and self._retry.due is None:
            self._retry.start(now)

    def forget_node(self, node: int) -> None:
        """It is gone, or will be back and say hello."""
        self._nodes.pop(node, None)

    def frontend(self, frontend: int, state: Scaling | None, now: float) -> None:
        if state is not None:
            self._known_by[frontend] = state.number
            self.learn(state, now)

    def forget_frontend(self, frontend: int) -> None:
        """It is gone: nobody waits for its word."""
        self._known_by.pop(frontend, None)
        self.served.forget_frontend(frontend)

    def hello(self, hello: RankHello) -> None:
        """A rank that is to join has loaded."""
        self._loaded[hello.rank] = hello

    def lost(self, rank: int) -> None:
        self._loaded.pop(rank, None)

    def bring_in_line(
        self, membership: Membership, epochs: Epochs, roll_call: RollCall, dispatcher: Dispatcher,
        now: float,
    ) -> list[int]:  # fmt: skip
        """Let all others know the size. Returns the ranks that are gone with that."""
        state, self.changed = self.state, False
        epochs.resize(state.size, now)
        roll_call.resize(state.size, now)
        dispatcher.limit(state.serving)
        return membership.resize(state.size, state.limit)

    def arrivals(self) -> list[RankHello]:
        """The last hello of each rank that has loaded and is now part of the deployment; they are handed over once."""
        loaded = {rank: hello for rank, hello in self._loaded.items() if rank in self.state.joining}
        arrived = [hello for rank, hello in self._loaded.items() if rank < self.state.size]
        self._loaded = loaded
        return arrived

    # What follows from it -----------------------------------------------------------------------

    def advance(self, frontends: Iterable[int], idle: Callable[[int], bool], now: float) -> None:
        """While a change is under way, after anything: go on where nothing is waited for any more.

        `frontends`: those that are there. `idle`: whether a rank has nothing left to do.
        """
        state = self.state
        late = self._deadline is not None and now >= self._deadline
        if state.joining:
            lacking = [rank for rank in state.joining if rank not in self._loaded]
            if lacking and late:
                self._end("late", f"rank {_names(lacking)} had not loaded after {state.startup_ms / 1000:g} s", now)
                return
        else:
            known = all(self._known_by.get(frontend, -1) >= state.number for frontend in frontends)
            drained = "leaver-drained" in self._without
            lacking = [rank for rank in state.leaving if not (drained or (known and idle(rank)))]
        if not lacking or late:
            self._end("done", "", now)
        elif lacking != state.waiting_for:
            self.state = replace(state, waiting_for=lacking)
            self.changed = True

    def message(self, now: float) -> Scaling | None:
        """What to tell the nodes now, if that is due; the next repeat is set."""
        if self._deadline is not None and now >= self._deadline:
            # Time is up, and the ranks have not been heard yet: a coordinator that is new waits for them.
            self._deadline = now + LOOK_AGAIN_S
        if not self._retry.is_due(now):
            return None
        lagging = any(node.number < self.state.number for node in self._nodes.values())
        self._retry.said(now)
        if not (self.state.under_way or lagging) or "scaling-repeated" in self._without:
            self._retry.stop()
        return self.state

    def line(self) -> str:
        """What is to be said of the state in the log."""
        state = self.state
        if state.under_way:
            what = "load" if state.joining else "end what they have"
            return f"scaling from {state.size} to {state.target} ranks: rank {_names(state.waiting_for)} to {what}"
        if state.outcome == "done":
            moved = f": rank {_names(self._moved)} now at another node, its own is gone" if self._moved else ""
            return f"there are {state.size} ranks{moved}"
        # A new coordinator has it from whoever knows it: it may be anything, but a log has a line for each entry.
        return f"there are still {state.size} ranks, not {state.target}: {' '.join(state.why.split())}"

    def _end(self, outcome: Outcome, why: str, now: float) -> None:
        state = self.state
        size = state.target if outcome == "done" else state.size
        hosts = [(rank, node) for rank, node in state.hosts if rank < size]
        ended = replace(
            state, number=state.number + 1, size=size, hosts=hosts, waiting_for=[], outcome=outcome, why=why[:1024]
        )  # fmt: skip
        self._change(ended, now)

    def _homeless(self) -> list[int]:
        """Ranks that scaling has put on a node that is not there."""
        return [rank for rank, node in self.state.hosts if rank < self.state.limit and node not in self._nodes]

    def find_homes(self, now: float) -> None:
        """After anything: see to ranks whose node is gone."""
        homeless = self._homeless() if self._nodes else []
        if not homeless:
            self._away_since = None
            return
        if self._away_since is None:
            self._away_since = now
        state, late = self.state, now >= self._away_since + AWAY_S
        if state.under_way:
            lacking = [rank for rank in homeless if rank in state.joining and rank not in self._loaded]
            if late and lacking:
                self._end("failed", f"the node that was to start rank {_names(lacking)} is gone", now)
            return
        mine = {rank: node for node, known in self._nodes.items() for rank in known.ranks}
        found = {rank: mine[rank] for rank in homeless if rank in mine}
        if late:
            left = [rank for rank in homeless if rank not in found]
            found.update(zip(left, self._places(len(left)), strict=True))
        if found:
            hosts = [(rank, found.get(rank, node)) for rank, node in state.hosts]
            self._change(replace(state, number=state.number + 2, hosts=hosts), now)
            self._moved, self._away_since = sorted(found), None

    def _waits_for_nodes(self, now: float) -> bool:
        """Whether it is too soon to begin anything: whoever asks, asks again.

        A coordinator that has just begun may not have heard any node yet. And a node that has not heard how the last
        change ended may still run a rank that has left, and would keep that life where the next one asks for a new one.
        """
        if self._nodes:
            return any(node.number < self.state.number for node in self._nodes.values())
        if self._nodeless_since is None:
            self._nodeless_since = now
        return now < self._nodeless_since + NODES_S

    def _refusal(self, size: int) -> str:
        """Why this cannot be asked for; empty where it can."""
        if size > self._most:
            return f"the coordinator allows {self._most} ranks (--max-data-parallel-size)"
        if not self._nodes:
            return "no node is there that starts and ends ranks"
        if any(node.fixed for node in self._nodes.values()):
            return "in external mode each rank has a front-end of its own, and cannot come or go without it"
        for node in self._nodes.values():
            if node.own_frontends and node.ranks and min(node.ranks) >= size:
                ranks = _names(sorted(node.ranks))
                return f"in hybrid mode each node keeps a rank: with {size} the one with rank {ranks} would have none"
        return ""

    def _places(self, count: int) -> list[int]:
        """Nodes for so many new ranks: always the one that has the fewest."""
        ranks = {node: [rank for rank in known.ranks if rank < self.state.size] for node, known in self._nodes.items()}
        filled = {node: (len(mine), min(mine, default=self.state.size), node) for node, mine in ranks.items()}
        places: list[int] = []
        for _ in range(count):
            node = min(filled, key=lambda one: filled[one])
            places.append(node)
            filled[node] = (filled[node][0] + 1, *filled[node][1:])
        return places


def _names(ranks: Iterable[int]) -> str:
    return ", ".join(map(str, ranks))
