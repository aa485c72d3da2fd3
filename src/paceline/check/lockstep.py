"""Waves: every interleaving of the machines of lockstep ranks and of the coordinator.

Front-ends hold nothing that matters to waves but what they believe of the wave, and views reach them however late. So
they have no state here: a request may be stamped with the newest wave that was published or with the oldest, wave 0
(the coordinator compares a stamp with its wave once, when it reads the notice: what a stamp between the two would bring
is brought by one of these), and its notice is sent where the production machine with such a belief sends one. A
request may wait on its link for ever, so requests of one front-end are in no order, and any number of front-ends is
walked.

A lost broadcast is lost to one receiver, whole: all that one event made the coordinator say. When the coordinator dies,
what was on its way to and from it is lost; that some of it had come through is the walk in which it was read before.
Front-ends' notices may also reach the next one. A rank dies between waves only; its next life is started at once, and
connects and joins as late as one likes. (Its death in a wave: `epochs.py`.)

What is not told apart, and why it may not matter:

- A step, and the agreement after it, are a barrier. A rank in the barrier does not read its inbox until all have come,
  which is the same as reading nothing and coming last. So a running rank may read or not, and what a rank in the
  barrier would not do is not fair: liveness is shown without it.
- A request and its notice travel on two links, so either comes first, and until the first of them has come nothing can
  tell that it was sent. So a send and the first arrival of it are one move.
- A message that the coordinator only notes comes first (`_noted`): it leads to the same state before or after anything
  else. What changes nothing, now or later, is taken off the links unread (`tidy`).
- A life of the coordinator asks a rank once: the rank has told all that changed since its first answer. A question is
  answered when it is sent, if nothing is before it in the link, and what is heard in mid-step may overtake the rest.
- Ranks are alike. None holds its number: inside, each is rank 0, and what it says is given its number when the
  coordinator reads it. So states that differ only in which rank is which are one.

A timer is due once all that ranks have said is read: what is repeated is not repeated for them. The wake of a paused
deployment counts the pause up, and with a timer that is faster than everybody it would do so for ever: it comes
when nobody is about to do anything else, and one that comes earlier counts as a loss.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import permutations, product
from typing import Any

from paceline.check import story
from paceline.check.parties import (
    BESIDES,
    FRONTEND,
    Answer,
    Bound,
    Known,
    Node,
    Process,
    State,
    Word,
    frontend_sends,
    happens,
    neutral,
    notice_of,
)
from paceline.check.search import Freezer, Move, Part, Register, Same, demand, goes_on
from paceline.core.coordinator import events as on_coordinator
from paceline.core.coordinator.machine import Coordinator
from paceline.core.invariants import (
    agree_at_rest,
    joiner_is_told,
    left_out_has_it,
    nothing_steps_while_suspended,
    same_collective,
)
from paceline.core.messages import Admit, ControlRequest, Form, Identify, RankHello, StartDPWave, WaveComplete
from paceline.core.rank import events as on_rank
from paceline.core.rank.events import IN_MID_STEP, Phase, Step
from paceline.core.requests import ControlAction

REPEATED = ("wake", "question", "suspension", "generation")
"""Timers by which the coordinator says something again; the others let it wait no longer (`epochs.py`)."""


class Lockstep:
    """The moves within a bound."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.receivers = bound.ranks
        self.calls: tuple[ControlAction, ...] = (bound.mode, "resume") * bound.suspensions
        # What is claimed of the order of moves was shown for all rules together.
        self.commutes = bound.merge and not bound.without
        freeze = Freezer(*BESIDES)
        self.processes: Register[Process] = Register(lambda process: process.key(freeze))
        self.coordinators: Register[Coordinator] = Register(freeze)
        self._known: dict[Part[Coordinator], Known] = {}
        self._numbers: dict[Node, int] = {}

    def start(self) -> State:
        """All ranks have joined, all front-ends know them, nothing is under way."""
        state = self.first_state()
        state.calls = len(self.calls)
        met = {self.key(state)}
        # Where they never come to rest, that is where they are stuck.
        while not self.over(state) and (further := goes_on(self, state, met)) is not None:
            state = further[1]
        return self.begun(state)

    def begun(self, state: State) -> State:
        """The state at rest with all before it."""
        bound, state.calls, state.names = self.bound, 0, tuple(range(len(state.nodes)))
        state.unsent, state.spare, state.crashes = bound.requests, bound.losses, bound.crashes
        return state

    def first_state(self) -> State:
        """Ranks that have loaded their engines, and a coordinator that knows nothing."""
        return State(self.fresh(1, self.bound.ranks), [self.born(1) for _ in range(self.bound.ranks)])

    def fresh(self, identity: int, size: int) -> Part[Coordinator]:
        """A life of the coordinator, which is told of so many ranks."""
        machine = Coordinator(
            size, identity, 0.0, lockstep=True, publish_loads=False, fresh=identity == 1, without=self.bound.without
        )
        return self.coordinators.part(machine)

    def born(self, incarnation: int) -> Node:
        """A life of a rank that has just loaded its engine."""
        return Node(self.processes.part(Process(incarnation, self.bound))).after(Process.hears, on_rank.Loaded())

    def known(self, state: State) -> Known:
        found = self._known.get(state.coordinator)
        if found is None:
            machine = state.coordinator.thing
            now: Any = machine.statistics()
            of = (now["wave"], now["running"], now["suspension"], machine.lives(), machine.timers())
            found = self._known[state.coordinator] = Known(*of)
        return found

    # When all is over, and which states are one -----------------------------------------------------

    def deployed(self, state: State) -> Sequence[Node]:
        """The ranks that the deployment has."""
        return state.nodes

    def over(self, state: State) -> bool:
        """Whether all that was sent is finished and nothing is under way."""
        if state.settled:
            processes = [node.process.machine for node in state.nodes]
            known = {f"rank {i}": (one.running, one.pause.number) for i, one in enumerate(processes)}
            demand(nothing_steps_while_suspended(state.settled, known))
        nodes = self.deployed(state)
        if state.asking or state.stranded or self.known(state).timers or not all(node.quiet() for node in nodes):
            return False
        # Who joined after the last wave was told what the coordinator knew then; it catches up with the next one.
        machines = [node.process.machine for node in nodes]
        waves = {f"rank {i}": one.wave for i, one in enumerate(machines) if one.incarnation == 1}
        demand(agree_at_rest(self.known(state).wave, waves))
        return True

    def stuck(self, state: State) -> str:
        return f"Stuck: {story.situation(state)}. Nothing that happens by itself brings this to an end."

    def tell(self, before: State, what: tuple[Any, ...], after: State) -> str:
        return story.told(before, what, after)

    def key(self, state: State) -> tuple[Any, ...]:
        """The state brought into the one form of those that differ in the ranks' numbers, without its losses."""
        if self.bound.merge:
            self.tidy(state)
        numbers = [self._numbers.setdefault(node, len(self._numbers)) for node in state.nodes]
        if self.bound.merge and not self.bound.scales:
            numbers = self._sort(state, numbers)
        return (*numbers, *state.values("nodes", "names", "spare"))

    def _sort(self, state: State, numbers: list[int]) -> list[int]:
        best = sorted(numbers)
        if best == numbers and len(set(best)) == len(best):
            return numbers
        # Where some are equal, the coordinator's state decides.
        orders = [order for order in permutations(range(len(best))) if [numbers[place] for place in order] == best]
        order = min(orders, key=lambda order: state.coordinator.mirrored(order).number) if orders[1:] else orders[0]
        state.coordinator = state.coordinator.mirrored(order)
        state.nodes, state.names = [state.nodes[i] for i in order], tuple(state.names[i] for i in order)
        return best

    def tidy(self, state: State) -> None:
        """Take messages off the links that change nothing, now or later, when they are read: wakes of a wave that the
        rank has finished; where the coordinator knows the rank, so that it hears of every change, wakes of the wave
        that the rank runs in, and questions too: the answer would repeat the last word."""
        if not self.commutes:
            return
        lives = self.known(state).lives
        for rank, node in enumerate(state.nodes):
            machine = node.process.machine
            known = lives.get(rank) == machine.incarnation
            self.drop(state, rank, machine.wave + (known and machine.running), known)

    def drop(self, state: State, rank: int, least: int, questions: bool) -> None:
        """Take wakes below a wave off a rank's link, and questions where that is asked for."""
        node = state.nodes[rank]
        if node.down:
            down = tuple(
                word for word in node.down
                if not (isinstance(word.thing, StartDPWave) and word.thing.wave < least)
                and not (questions and isinstance(word.thing, Identify))
            )  # fmt: skip
            state.nodes[rank] = node._replace(down=down)

    # Moves ------------------------------------------------------------------------------------------

    def moves(self, state: State) -> Iterator[Move]:
        first = self._noted(state) if self.commutes else None
        if first is not None:
            yield first
            return
        for rank, node in enumerate(state.nodes):
            yield from self.rank_moves(rank, node)
        yield from self._coordinator_moves(state)
        yield from self._timer_moves(state)
        yield from self.rounds(state)
        if state.unsent:
            yield from self._requests(state)
        if state.calls < len(self.calls) and not state.asking:
            action = self.calls[state.calls]
            yield Move(("ask", -1, action), action == "resume", become, (-1, None, (), {"asking": True}))
        if state.crashes:
            yield from self._crashes(state)
            yield from self.deaths(state)

    def _noted(self, state: State) -> Move | None:
        """A message of a rank that the coordinator knows, which it notes, and acts on no otherwise if it is late.

        A rank that pauses after others have: the wave is over already. A rank that runs in the wave that others are
        known to run in: it owes no answer any more. A hello is read by the next coordinator if this one dies.
        """
        known = self.known(state)
        for rank, node in enumerate(state.nodes):
            if not node.up or known.lives.get(rank) != node.process.machine.incarnation:
                continue
            message, noted = node.up[0].thing, False
            if isinstance(message, WaveComplete):
                noted = known.wave > message.wave
            elif isinstance(message, RankHello) and not state.crashes:
                same = known.wave == message.wave and known.running if message.running else known.wave >= message.wave
                noted = same and state.coordinator.thing.acknowledged(rank) == (message.suspension, message.held)
            if noted:
                answer = state.coordinator.after(happens, rank, node.up[0])[1]
                if not answer.broadcasts and answer.published <= state.published:
                    return next(self._says(state, rank, node))
        return None

    def rank_moves(self, rank: int, node: Node) -> Iterator[Move]:
        """What can happen at one rank alone."""
        process = node.process
        running, busy, at_once = process.steps_on, process.busy, False
        for place, word in enumerate(node.down):
            in_mid_step = isinstance(word.thing, IN_MID_STEP)
            if (in_mid_step and not at_once) or (place == 0 and not busy):
                rest = node._replace(down=node.down[:place] + node.down[place + 1 :])
                yield becomes(("hear", rank, word), rest, Process.hears, word, fair=not running or in_mid_step)
            at_once = at_once or in_mid_step
        joining = process.machine.phase is Phase.JOINING and process.idle
        if joining and not node.up and not node.down and node.connected:
            yield becomes(("hello", rank), node, Process.turns, 10.0)
        for stamp in sorted(set(node.arriving)) if not busy else ():
            rest = node._replace(arriving=less(node.arriving, stamp))
            yield becomes(("arrive", rank, stamp), rest, Process.arrives, stamp, fair=not running)

    def _says(self, state: State, rank: int, node: Node) -> Iterator[Move]:
        return self.heard(state, ("say", rank, node.up[0]), node.up[0], node=node._replace(up=node.up[1:]))

    def _coordinator_moves(self, state: State) -> Iterator[Move]:
        for rank, node in enumerate(state.nodes):
            if node.up:
                yield from self._says(state, rank, node)
            for stamp in sorted(set(node.notices)):
                rest = node._replace(notices=less(node.notices, stamp))
                yield from self.heard(state, ("notice", rank, stamp), notice_of(stamp), node=rest)
            if not node.connected and not node.process.loading:
                up = node._replace(connected=True)
                yield from self.heard(state, ("connect", rank), on_coordinator.RankSubscribed(), node=up)
        if state.asking and not state.heard:
            action = self.calls[state.calls]
            request = on_coordinator.FrontendSaid(ControlRequest(FRONTEND, state.calls, action, state.answered))
            yield from self.heard(state, ("call", -1, action), request, heard=True)

    def _timer_moves(self, state: State) -> Iterator[Move]:
        nodes, known = state.nodes, self.known(state)
        if any(node.up for node in nodes):
            return
        for timer in REPEATED:
            waits_for = known.timers.get(timer, ())
            if any(nodes[rank].connected and not nodes[rank].down for rank in waits_for if rank < len(nodes)):
                early = timer == "wake" and known.suspension % 2 == 1 and self._stirs(state)
                yield from self.timer(state, timer, early=early)

    def timer(self, state: State, timer: str, *, early: bool = False) -> Iterator[Move]:
        """A timer is due. `early`: that it may be so again and again counts as a loss."""
        what, event = ("tick", -1, timer), on_coordinator.Tick()
        if not early:
            yield from self.heard(state, what, event, timer)
        elif state.spare:
            yield Move(what, False, self._heard, (-1, -1, event, timer, None, {"spare": state.spare - 1}))

    def _stirs(self, state: State) -> bool:
        """Whether ranks are about to do something by themselves, a step included."""
        for rank, node in enumerate(state.nodes):
            if not node.connected or node.notices or any(move.fair for move in self.rank_moves(rank, node)):
                return True
        return all(node.process.steps_on for node in state.nodes)

    def rounds(self, state: State) -> Iterator[Move]:
        """Ranks that all run take part in a step, and in the agreement if one is due."""
        yield from self.round(state, range(len(state.nodes)))

    def round(self, state: State, members: Sequence[int]) -> Iterator[Move]:
        """These ranks do so."""
        nodes = [state.nodes[rank] for rank in members]
        if all(node.process.steps_on and len(node.up) < self.bound.backlog for node in nodes):
            agreeing = all(node.process.agree is not None for node in nodes)
            yield Move(("agree" if agreeing else "round", -1), True, self._together, (members, agreeing))

    def _together(self, state: State, members: Sequence[int], agreeing: bool) -> None:
        nodes = [state.nodes[rank] for rank in members]
        if not agreeing:
            nodes = [node.after(Process.steps) for node in nodes]
        demand(same_collective({f"rank {r}": n.process.agree or Step() for r, n in zip(members, nodes, strict=True)}))
        # In an agreement a rank can hear of a pause that it has not spoken of.
        put(state, members, agreed(nodes) if agreeing or not self.calls else nodes)

    def _requests(self, state: State) -> Iterator[Move]:
        newest, runs = state.published
        beliefs = {(0, False), (newest, False)} | ({(newest, True)} if runs else {(newest - 1, True)} - {(-1, True)})
        for rank in self.open_ranks(state):
            node = state.nodes[rank]
            if node.process.machine.phase is not Phase.READY:
                continue
            if not self.bound.notices:
                yield from self.sends(state, rank, stranded=False)
                continue
            left = state.unsent - 1
            for stamp, notice in (frontend_sends(*belief) for belief in sorted(beliefs)):
                if not node.process.busy:
                    what = "send" if notice is None else "send-first"
                    rest = node if notice is None else node._replace(notices=more(node.notices, notice))
                    yield becomes((what, rank, stamp), rest, Process.arrives, stamp, fair=False, unsent=left)
                if notice is not None:
                    what, late = "notice-first", node._replace(arriving=more(node.arriving, stamp))
                    event = notice_of(notice)
                    yield from self.heard(state, (what, rank, stamp), event, fair=False, node=late, unsent=left)

    def sends(self, state: State, rank: int, *, stranded: bool) -> Iterator[Move]:
        """A request whose notice is lost, or was not sent. `stranded`: one whose rank has died."""
        node, (newest, runs) = state.nodes[rank], state.published
        left: dict[str, Any] = {"stranded": state.stranded - 1} if stranded else {"unsent": state.unsent - 1}
        for stamp in sorted({0, newest, max(0, newest - (not runs))}):
            if node.process.busy:
                late = node._replace(arriving=more(node.arriving, stamp))
                yield becomes(("send-late", rank, stamp), late, fair=stranded, **left)
            else:
                yield becomes(("send-alone", rank, stamp), node, Process.arrives, stamp, fair=stranded, **left)

    def open_ranks(self, state: State) -> Sequence[int]:
        """The ranks that front-ends send requests to, once they are ready."""
        return range(len(state.nodes))

    def _crashes(self, state: State) -> Iterator[Move]:
        """The coordinator dies; another is up at once, and as late as one likes in reading."""
        cut = [node._replace(up=(), down=(), connected=False, asked=False, late=(), gone=0) for node in state.nodes]
        choices = [[node, node._replace(notices=())] if node.notices else [node] for node in cut]
        for nodes in product(*choices):
            yield Move(("crash", -1), False, self.crashed, (nodes,))

    def crashed(self, state: State, nodes: Sequence[Node]) -> None:
        """The coordinator has died, and that is what ranks are like."""
        state.nodes, state.crashes, state.heard = list(nodes), state.crashes - 1, False
        state.coordinator = self.fresh(state.coordinator.thing.identity + 1, len(nodes))

    def deaths(self, state: State) -> Iterator[Move]:
        """A rank dies while none runs, and is started again. Its requests are over: its front-ends see it end."""
        if not any(node.process.steps_on for node in state.nodes):
            for rank, node in enumerate(state.nodes):
                born = self.born(node.process.machine.incarnation + 1)._replace(notices=node.notices)
                yield becomes(("die", rank), born, fair=False, crashes=state.crashes - 1)

    # What the coordinator hears, and says -----------------------------------------------------------

    def heard(
        self, state: State, what: tuple[Any, ...], event: Any, timer: str = "", *, fair: bool = True,
        node: Node | None = None, **changed: Any,
    ) -> Iterator[Move]:  # fmt: skip
        """The coordinator hears something; what it says may be lost to one receiver, where there are losses left.

        `node`: what the rank that `what` names is like then. `changed`: of the state, besides.
        """
        given = (what[1], event, timer, node, changed)
        yield Move(what, fair, self._heard, (-1, *given))
        for lost in range(self.receivers) if state.spare else ():
            yield Move((*what, "lost", lost), False, self._heard, (lost, *given))

    def _heard(
        self, state: State, lost: int, rank: int, event: Any, timer: str, node: Node | None, changed: dict[str, Any]
    ) -> None:
        become(state, rank, node, (), changed)
        state.coordinator, answer = state.coordinator.after(happens, rank, event, timer)
        self.answered(state, answer, lost)

    def answered(self, state: State, answer: Answer, lost: int) -> None:
        """What follows of what the coordinator has made of something. `lost`: the receiver that misses it."""
        state.published = max(state.published, answer.published)
        if self.calls:
            state.settled = answer.settled if answer.settled % 2 else 0
            state.answered = answer.answered or state.answered
            if state.asking and state.answered and answer.settled >= state.answered:
                state.calls, state.asking, state.heard, state.answered = state.calls + 1, False, False, 0
        # A question follows a connection that is up: what was lost before is why it is asked.
        if lost >= 0 and all(isinstance(word.thing, Identify) for word in answer.broadcasts):
            raise Same
        for word in answer.broadcasts:
            if isinstance(word.thing, Admit | Form):
                demand(joiner_is_told(word.thing, self.known(state).wave))
            if isinstance(word.thing, StartDPWave) and word.thing.exclude is not None and lost < 0:
                self.check_left_out(word.thing, state.nodes[word.thing.exclude])
        whole = state.copy() if lost >= 0 else state
        self.broadcast(whole, answer, -1)
        if lost >= 0:
            self.broadcast(state, answer, lost)
            if (state.nodes, state.scale) == (whole.nodes, whole.scale):
                raise Same
            state.spare -= 1

    def broadcast(self, state: State, answer: Answer, lost: int) -> None:
        """Put what the coordinator says into the links."""
        by = state.coordinator.thing.identity
        for word in answer.broadcasts:
            for rank, node in enumerate(state.nodes):
                mine = neutral(word, rank, by) if rank != lost else None
                if mine is not None and node.connected:
                    state.nodes[rank] = self.reaches(node, mine)

    def reaches(self, node: Node, word: Word) -> Node:
        """A broadcast is on its way to this rank."""
        question = isinstance(word.thing, Identify)
        if word not in node.down and not (question and node.asked):
            node = node._replace(down=(*node.down, word), asked=node.asked or question)
        if question and node.down == (word,):
            node = node._replace(down=()).after(Process.hears, word)
        return node

    def check_left_out(self, wake: StartDPWave, node: Node) -> None:
        """The rank must not be left out of the wake."""
        machine = node.process.machine
        # The request that the notice was about may have been lost with the life before.
        if machine.incarnation == 1 and "abort" not in self.calls:
            # What it holds back, or has while it runs, it starts by itself, in whatever wave is current then.
            own = node.process.unfinished if machine.running else machine.requests.kept_back
            coming = (*node.arriving, *[wake.wave] * own)
            demand(left_out_has_it(wake, machine.wave, machine.running, coming))


def agreed(nodes: Sequence[Node]) -> list[Node]:
    """The ranks after the agreement that they are in, if they are in any."""
    parts = [node.process.agree for node in nodes if node.process.agree is not None]
    if not parts:
        return list(nodes)
    work, wave, suspension = (max(getattr(one, name) for one in parts) for name in ("has_work", "wave", "suspension"))
    return [node.after(Process.hears, on_rank.Agreed(work, wave, suspension)) for node in nodes]


def becomes(what: tuple[Any, ...], node: Node, *do: Any, fair: bool = True, **changed: Any) -> Move:
    """The rank that `what` names is like `node`, and does this; `changed`: of the state, besides."""
    return Move(what, fair, become, (what[1], node, do, changed))


def become(state: State, rank: int, node: Node | None, do: tuple[Any, ...], changed: dict[str, Any]) -> None:
    # Lists are changed in place.
    state.__dict__.update({name: [*one] if type(one) is list else one for name, one in changed.items()})
    if node is not None:
        state.nodes[rank] = node.after(*do) if do else node


def put(state: State, ranks: Sequence[int], nodes: Sequence[Node]) -> None:
    """Let these ranks be like that."""
    for rank, node in zip(ranks, nodes, strict=True):
        state.nodes[rank] = node


def less(stamps: tuple[int, ...], stamp: int) -> tuple[int, ...]:
    place = stamps.index(stamp)
    return stamps[:place] + stamps[place + 1 :]


def more(stamps: tuple[int, ...], stamp: int) -> tuple[int, ...]:
    return tuple(sorted((*stamps, stamp)))
