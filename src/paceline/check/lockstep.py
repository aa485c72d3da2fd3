"""Waves: every interleaving of the machines of lockstep ranks and of the coordinator, and the moves between states.

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

- A step, and the agreement after it, are a barrier. That a rank has entered it is no state of its own: being in it, the
  rank does not read its inbox until all have come, which is the same as reading nothing and coming last. So a running
  rank may read or not, and what a rank in the barrier would not do is not fair: liveness is shown without it.
- A request and its notice travel on two links, so either comes first, and until the first of them has come nothing can
  tell that it was sent. So a send and the first arrival of it are one move.
- A message that the coordinator only notes comes first (`_noted`): it leads to the same state before or after anything
  else. So does, where nothing else will come that could be read before it, what a paused rank reads.
- What changes nothing, now or later, is taken off the links unread (`_tidy`).
- A life of the coordinator asks a rank once: the rank has told all that changed since its first answer. A question is
  answered when it is sent, if nothing is before it in the link, and what is heard in mid-step may overtake the rest.
- Ranks are alike: states that differ only in which rank is which are one.

A timer is due once all that ranks have said is read: what is repeated is not repeated for them. The wake of a paused
deployment counts the pause up, and with a timer that is faster than everybody it would do so for ever: it comes
when nobody is about to do anything else, and one that comes earlier counts as a loss.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from itertools import permutations, product
from typing import Any, NamedTuple

from paceline.check import parties
from paceline.check.parties import (
    BESIDES,
    Answer,
    Bound,
    Node,
    Process,
    Settings,
    State,
    Word,
    frontend_sends,
    neutral,
)
from paceline.check.search import Move, Same
from paceline.check.state import Freezer, Part, Register, demand
from paceline.check.story import situation, told
from paceline.core.coordinator.machine import Coordinator
from paceline.core.invariants import (
    agree_at_rest,
    joiner_is_told,
    left_out_has_it,
    nothing_steps_while_suspended,
    same_collective,
)
from paceline.core.messages import Admit, Form, Identify, RankHello, StartDPWave, WaveComplete
from paceline.core.rank.events import IN_MID_STEP, Phase, Step
from paceline.core.requests import ControlAction

REPEATED = ("wake", "question", "suspension", "generation")
"""Timers by which the coordinator says something again; the others let it wait no longer (`epochs.py`)."""


class Known(NamedTuple):
    """What the coordinator shows of itself. `lives`: of the ranks that are ready; `timers`: set, each with whom it
    waits for."""

    wave: int
    running: bool
    suspension: int
    lives: dict[int, int]
    timers: dict[str, list[int]]


class Lockstep:
    """The moves within a bound."""

    def __init__(self, bound: Bound) -> None:
        self.bound = bound
        self.places = bound.ranks + bool(bound.scales)
        self.calls: tuple[ControlAction, ...] = (bound.mode, "resume") * bound.suspensions
        # What is claimed of the order of moves was shown for all rules together.
        self.commutes = bound.merge and not bound.without
        self.settings = Settings(bound.steps, bound.sync_interval, bound.grouped, bound.without)
        freeze = Freezer(*BESIDES)
        self.processes: Register[Process] = Register(lambda process: process.key(freeze))
        self.coordinators: Register[Coordinator] = Register(freeze)
        self._known: dict[Part[Coordinator], Known] = {}
        self._numbers: dict[Node, int] = {}

    def start(self) -> State:
        """All ranks have joined, all front-ends know them, nothing is under way: what is nearest to the beginning."""
        first = self.first_state()
        first.calls = len(self.calls)
        ahead, met = deque([first]), {self.key(first)}
        while ahead:
            state = ahead.popleft()
            if self.over(state):
                return self.begun(state)
            for move in self.moves(state):
                after = state.copy()
                if move.fair:
                    move.do(after, *move.given)
                    key = self.key(after)
                    if key not in met:
                        met.add(key)
                        ahead.append(after)
        # They never come to rest: then this is where they are stuck.
        return self.begun(first)

    def begun(self, state: State) -> State:
        """The state at rest with all before it."""
        bound, state.calls = self.bound, 0
        state.names = tuple(range(len(state.nodes)))
        state.unsent, state.losses, state.crashes = bound.requests, bound.losses, bound.crashes
        return state

    def first_state(self) -> State:
        """Ranks that have loaded their engines, and a coordinator that knows nothing."""
        return State(self.fresh(1), [self.born(1) for _ in range(self.bound.ranks)])

    def fresh(self, identity: int, size: int = 0) -> Part[Coordinator]:
        """A life of the coordinator. `size`: ranks that it is told of."""
        return self.coordinators.part(
            Coordinator(
                size or self.bound.ranks, identity, 0.0, lockstep=True, publish_loads=False, fresh=identity == 1,
                without=self.bound.without,
            )
        )  # fmt: skip

    def born(self, incarnation: int) -> Node:
        """A life of a rank that has just loaded its engine."""
        return Node(self.processes.part(Process(incarnation, self.settings))).after(Process.loads)

    def known(self, state: State) -> Known:
        found = self._known.get(state.coordinator)
        if found is None:
            machine = state.coordinator.thing
            now = machine.statistics()
            of = (now["wave"], now["running"], now["suspension"], machine.lives(), machine.timers())
            found = self._known[state.coordinator] = Known(*of)  # type: ignore[arg-type]
        return found

    # When all is over -----------------------------------------------------------------------------

    def deployed(self, state: State) -> Sequence[Node]:
        """The ranks that the deployment has."""
        return state.nodes

    def over(self, state: State) -> bool:
        """Whether all that was sent is finished and nothing is under way."""
        if state.settled:
            processes = [node.process.machine for node in state.nodes]
            known = {f"rank {i}": (one.running, one.pause.number) for i, one in enumerate(processes)}
            demand(nothing_steps_while_suspended(state.settled, known))
        if state.asking or state.stranded or self.known(state).timers or not all(map(_quiet, self.deployed(state))):
            return False
        machines = [node.process.machine for node in self.deployed(state)]
        # Who joined after the last wave was told what the coordinator knew then; it catches up with the next one.
        waves = {f"rank {i}": one.wave for i, one in enumerate(machines) if one.incarnation == 1}
        demand(agree_at_rest(self.known(state).wave, waves))
        return True

    def stuck(self, state: State) -> str:
        return f"Stuck: {situation(state)}. Nothing that happens by itself brings this to an end."

    def tell(self, before: State, what: tuple[Any, ...], after: State) -> str:
        return told(before, what, after)

    # Which states are one --------------------------------------------------------------------------

    def key(self, state: State) -> tuple[Any, ...]:
        """The state brought into the one form of those that differ in the ranks' numbers, without its losses."""
        if self.bound.merge:
            self._tidy(state)
        numbers = [self._numbers.setdefault(node, len(self._numbers)) for node in state.nodes]
        if self.bound.merge:
            numbers = self._sort(state, numbers)
        rest = (state.published, state.calls, state.asking, state.heard, state.answered, state.settled, state.stranded)
        return (state.coordinator.number, *numbers, state.unsent, state.crashes, *rest)

    def _sort(self, state: State, numbers: list[int]) -> list[int]:
        alike = self.alike(state)
        first, rest = numbers[:alike], tuple(range(alike, len(numbers)))
        best = sorted(first)
        if best == first and len(set(best)) == alike:
            return numbers
        # Where some are equal, the coordinator's state decides.
        orders = [(*order, *rest) for order in permutations(range(alike)) if [first[place] for place in order] == best]
        order = min(orders, key=lambda order: state.coordinator.mirrored(order).number) if orders[1:] else orders[0]
        self.reorder(state, order)
        return [numbers[place] for place in order]

    def reorder(self, state: State, order: tuple[int, ...]) -> None:
        """Let rank `order[i]` be rank `i`."""
        state.coordinator = state.coordinator.mirrored(order)
        state.nodes = [state.nodes[place] for place in order]
        state.names = tuple(state.names[place] for place in order)

    def alike(self, state: State) -> int:
        """Ranks below this are alike."""
        return len(state.nodes)

    def _tidy(self, state: State) -> None:
        """Take messages off the links that change nothing, now or later, when they are read.

        Wakes of a wave that the rank has finished. Where the coordinator knows the rank, so that it hears of every
        change, wakes of the wave that the rank runs in, and questions too: the answer would repeat the last word. And
        of what ranks say all that leaves the coordinator as it is, but for hellos that it may have to know them by.
        """
        if not self.commutes:
            return
        lives = self.known(state).lives
        for rank, node in enumerate(state.nodes):
            if not node.up and not node.down:
                continue
            machine = node.process.machine
            known = lives.get(rank) == machine.incarnation
            down = tuple(
                word for word in node.down if not _outdated(word, machine.wave + (known and machine.running), known)
            )
            up = node.up
            while up and isinstance(up[0].thing, RankHello) == known and not (known and state.crashes):
                after, answer = state.coordinator.after(parties.said, rank, up[0])
                if after is not state.coordinator or not all(isinstance(w.thing, Identify) for w in answer.broadcasts):
                    break
                up = up[1:]
            if len(up) + len(down) < len(node.up) + len(node.down):
                state.nodes[rank] = node._replace(up=up, down=down)

    # Moves ------------------------------------------------------------------------------------------

    def moves(self, state: State) -> Iterator[Move]:
        first = self._first(state) if self.commutes else None
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
            yield Move(("ask", -1, self.calls[state.calls]), self.calls[state.calls] == "resume", _ask)
        if state.crashes:
            yield from self._crashes(state)
            yield from self.deaths(state)

    def _first(self, state: State) -> Move | None:
        """A move that is to come before all others, since their order makes no difference."""
        known = self.known(state)
        current = [known.lives.get(rank) == node.process.machine.incarnation for rank, node in enumerate(state.nodes)]
        for rank, node in enumerate(state.nodes):
            if node.up and current[rank] and self._noted(state, known, rank, node.up[0].thing):
                answer = state.coordinator.after(parties.said, rank, node.up[0])[1]
                if not answer.broadcasts and answer.published <= state.published:
                    return next(self._says(state, rank, node))
        if state.unsent or state.crashes or state.calls < len(self.calls) or "suspension" in known.timers:
            return None
        for rank, node in enumerate(state.nodes):
            if node.down and not node.process.machine.running:
                moves = list(self.rank_moves(rank, node))
                if len(moves) == 1:
                    return moves[0]
        if all(current) and all(node.connected and not node.down and not node.arriving for node in state.nodes):
            return next(self.rounds(state), None)
        return None

    def _noted(self, state: State, known: Known, rank: int, message: object) -> bool:
        """Whether the coordinator notes the message of a rank that it knows, and acts on it no otherwise if it is late.

        A rank that pauses after others have: the wave is over already. A rank that runs in the wave that others are
        known to run in: it owes no answer any more. A hello is read by the next coordinator if this one dies.
        """
        if isinstance(message, WaveComplete):
            return known.wave > message.wave
        if not isinstance(message, RankHello) or state.crashes:
            return False
        if state.coordinator.thing.acknowledged(rank) != (message.suspension, message.held):
            return False
        return known.wave == message.wave and known.running if message.running else known.wave >= message.wave

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
            yield becomes(("hello", rank), node, Process.says_hello_again)
        for stamp in sorted(set(node.arriving)) if not busy else ():
            rest = node._replace(arriving=_less(node.arriving, stamp))
            yield becomes(("arrive", rank, stamp), rest, Process.arrives, stamp, fair=not running)

    def _says(self, state: State, rank: int, node: Node) -> Iterator[Move]:
        rest = node._replace(up=node.up[1:])
        return self.heard(state, ("say", rank, node.up[0]), self.reads, rest, parties.said, rank, node.up[0])

    def _coordinator_moves(self, state: State) -> Iterator[Move]:
        for rank, node in enumerate(state.nodes):
            if node.up:
                yield from self._says(state, rank, node)
            for stamp in sorted(set(node.notices)):
                rest = node._replace(notices=_less(node.notices, stamp))
                yield from self.heard(state, ("notice", rank, stamp), self.reads, rest, parties.noticed, rank, stamp)
            if not node.connected and not node.process.loading:
                up = node._replace(connected=True)
                yield from self.heard(state, ("connect", rank), self.reads, up, parties.subscribed, rank)
        if state.asking and not state.heard:
            yield from self.heard(state, ("call", -1, self.calls[state.calls]), self._called)

    def _called(self, state: State) -> Answer:
        state.heard = True
        call = (state.calls, self.calls[state.calls], state.answered)
        return self.happens(state, parties.called, -1, *call)

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
        what, act = ("tick", -1, timer), (self.happens, parties.ticked, -1, timer)
        if not early:
            yield from self.heard(state, what, *act)
        elif state.losses:
            yield Move(what, False, self._early, act)

    def _early(self, state: State, *act: Any) -> None:
        state.losses -= 1
        self._heard(state, -1, *act)

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
        if agreeing or not self.calls:
            nodes = agreed(nodes)
        put(state, members, nodes)

    def _requests(self, state: State) -> Iterator[Move]:
        newest, runs = state.published
        beliefs = {(0, False), (newest, False)} | ({(newest, True)} if runs else {(newest - 1, True)} - {(-1, True)})
        for rank in self.open_ranks(state):
            node = state.nodes[rank]
            if node.process.takes_requests and not self.bound.notices:
                yield from self.sends(state, rank, stranded=False)
            elif node.process.takes_requests:
                for wave, running in sorted(beliefs):
                    stamp, notice = frontend_sends(wave, running)
                    if not node.process.busy:
                        what = "send" if notice is None else "send-first"
                        notices = () if notice is None else (notice,)
                        yield Move((what, rank, stamp), False, self._sent, (rank, stamp, notices))
                    if notice is not None:
                        what = "notice-first"
                        given = (rank, stamp, notice)
                        yield from self.heard(state, (what, rank, stamp), self._notified, *given, fair=False)

    def _sent(self, state: State, rank: int, stamp: int, notices: tuple[int, ...]) -> None:
        state.unsent -= 1
        node = state.nodes[rank].after(Process.arrives, stamp)
        state.nodes[rank] = node._replace(notices=tuple(sorted((*node.notices, *notices))))

    def _notified(self, state: State, rank: int, stamp: int, notice: int) -> Answer:
        state.unsent -= 1
        node = state.nodes[rank]
        state.nodes[rank] = node._replace(arriving=tuple(sorted((*node.arriving, stamp))))
        return self.happens(state, parties.noticed, rank, notice)

    def sends(self, state: State, rank: int, *, stranded: bool) -> Iterator[Move]:
        """A request whose notice is lost, or was not sent. `stranded`: one whose rank has died."""
        newest, runs = state.published
        what = "send-late" if state.nodes[rank].process.busy else "send-alone"
        for stamp in sorted({0, newest, max(0, newest - (not runs))}):
            yield Move((what, rank, stamp), stranded, self._sent_alone, (rank, stamp, stranded))

    def _sent_alone(self, state: State, rank: int, stamp: int, stranded: bool) -> None:
        state.unsent, state.stranded = state.unsent - (not stranded), state.stranded - stranded
        node = state.nodes[rank]
        late = node._replace(arriving=tuple(sorted((*node.arriving, stamp))))
        state.nodes[rank] = late if node.process.busy else node.after(Process.arrives, stamp)

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
        state.nodes = list(nodes)
        state.coordinator = self.fresh(state.coordinator.thing.identity + 1)
        state.crashes, state.heard = state.crashes - 1, False

    def deaths(self, state: State) -> Iterator[Move]:
        """A rank dies while none runs, and is started again. Its requests are over: its front-ends see it end."""
        if not any(node.process.steps_on for node in state.nodes):
            for rank in range(len(state.nodes)):
                yield Move(("die", rank), False, self._die, (rank,))

    def _die(self, state: State, rank: int) -> None:
        state.crashes -= 1
        node = state.nodes[rank]
        state.nodes[rank] = self.born(node.process.machine.incarnation + 1)._replace(notices=node.notices)

    # What the coordinator hears, and says -----------------------------------------------------------

    def happens(self, state: State, do: Callable[..., Answer], *given: Any) -> Answer:
        state.coordinator, answer = state.coordinator.after(do, *given)
        return answer

    def reads(self, state: State, node: Node, do: Callable[..., Answer], rank: int, *given: Any) -> Answer:
        """Something of a rank's links reaches the coordinator. `node`: the rank without it."""
        state.nodes[rank] = node
        return self.happens(state, do, rank, *given)

    def heard(
        self, state: State, what: tuple[Any, ...], act: Callable[..., Answer], *given: Any, fair: bool = True
    ) -> Iterator[Move]:
        """The coordinator hears something; what it says may be lost to one receiver, where there are losses left."""
        yield Move(what, fair, self._heard, (-1, act, *given))
        for lost in range(self.places + bool(self.bound.scales)) if state.losses else ():
            yield Move((*what, "lost", lost), False, self._heard, (lost, act, *given))

    def _heard(self, state: State, lost: int, act: Callable[..., Answer], *given: Any) -> None:
        self.answered(state, act(state, *given), lost)

    def answered(self, state: State, answer: Answer, lost: int) -> None:
        """What follows of what the coordinator has made of something. `lost`: the receiver that misses it."""
        state.published = max(state.published, answer.published)
        if self.calls:
            state.settled = answer.settled if answer.settled % 2 else 0
            state.answered = answer.answered or state.answered
            if state.asking and state.answered and answer.settled >= state.answered:
                state.calls, state.asking, state.heard, state.answered = state.calls + 1, False, False, 0
        if not answer.broadcasts:
            if lost >= 0:
                raise Same
            return
        for word in answer.broadcasts:
            if isinstance(word.thing, Admit | Form):
                demand(joiner_is_told(word.thing, self.known(state).wave))
            if isinstance(word.thing, StartDPWave) and word.thing.exclude is not None and lost < 0:
                self.check_left_out(word.thing, state.nodes[word.thing.exclude])
        if lost < 0:
            self.broadcast(state, answer, -1)
            return
        # A question follows a connection that is up: what was lost before is why it is asked.
        if all(isinstance(word.thing, Identify) for word in answer.broadcasts):
            raise Same
        whole = state.copy()
        self.broadcast(whole, answer, -1)
        self.broadcast(state, answer, lost)
        if self.same_links(state, whole):
            raise Same
        state.losses -= 1

    def same_links(self, state: State, other: State) -> bool:
        return state.nodes == other.nodes

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
    outcome = (any(one.has_work for one in parts), max(one.wave for one in parts), max(one.suspension for one in parts))
    return [node.after(Process.agrees, *outcome) for node in nodes]


def becomes(what: tuple[Any, ...], node: Node, do: Callable[..., Any], *given: Any, fair: bool = True) -> Move:
    """Something happens to the rank that `what` names, which is like `node`."""
    return Move(what, fair, _become, (what[1], node, do, *given))


def _become(state: State, rank: int, node: Node, do: Callable[..., Any], *given: Any) -> None:
    state.nodes[rank] = node.after(do, *given)


def put(state: State, ranks: Sequence[int], nodes: Sequence[Node]) -> None:
    """Let these ranks be like that."""
    for rank, node in zip(ranks, nodes, strict=True):
        state.nodes[rank] = node


def _ask(state: State) -> None:
    state.asking = True


def _quiet(node: Node) -> bool:
    """Whether nothing is under way at this rank: paused, without requests, its links empty."""
    process = node.process
    moving = node.up or node.down or node.arriving or node.notices or process.unfinished or process.machine.running
    return node.connected and not moving and process.machine.phase is Phase.READY


def _outdated(word: Word, least: int, known: bool) -> bool:
    if isinstance(word.thing, StartDPWave):
        return word.thing.wave < least
    return known and isinstance(word.thing, Identify)


def _less(stamps: tuple[int, ...], stamp: int) -> tuple[int, ...]:
    place = stamps.index(stamp)
    return stamps[:place] + stamps[place + 1 :]
