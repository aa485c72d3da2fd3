"""The coordinator's part in a suspension: a numbered transaction over all ranks.

Suspending: all ranks are told the number until each has said (this number, held). A held rank starts nothing by
itself; it still follows a wake, because some rank that had not heard yet may have started a wave and wait for
the others in it. Such a wake gives the suspension the number n + 2: what ranks said before the wake, also if it is
still on its way, does not count any more. Once every rank holds the same number no rank runs, and nothing but a
higher number can start one: wakes from before belong to waves that all have finished.

Resuming: all ranks are told the even number; when each has said that it knows it, it is released, and work starts.
So no rank steps before all have taken note, and the first who starts wakes the others into one wave. Independent
ranks have no waves: each goes on as soon as it hears that it may, whoever else is stopped or on its way back.

The counter is soft state like all else here: a new coordinator takes up the highest number that it hears.

What front-ends ask of the coordinator (suspend, resume), each call served once however often it is repeated.

A front-end repeats a call until it is answered, since the coordinator may have been away. A repeat is no new call:
it gets the answer that the first one got, also where somebody has asked for the contrary meanwhile. And a new
coordinator answers nobody before it has heard the ranks: what it would say of a suspension that it does not know
would be wrong.

The suspension as the coordinator conducts it: the transaction, the calls for it, and what front-ends are shown.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Set

from msgspec import Struct

from paceline.core.coordinator.epoch import Epochs
from paceline.core.coordinator.membership import Membership
from paceline.core.load import plausible
from paceline.core.messages import ControlAnswer, ControlRequest, RankHello, Suspension, SuspensionState
from paceline.core.requests import ControlAction, SuspendMode
from paceline.core.retry import Retry
from paceline.core.standing import PauseState

ANSWERS_KEPT = 4096


class Calls:
    """The calls that wait, and the answers given."""

    def __init__(self) -> None:
        self._waiting: dict[tuple[int, int], ControlRequest] = {}
        self._answered: dict[tuple[int, int], int] = {}

    def request(self, request: ControlRequest) -> None:
        """A front-end asks, or repeats what it asked."""
        self._waiting[(request.frontend, request.call)] = request

    def forget_frontend(self, frontend: int) -> None:
        """The front-end is gone; what it asked for stays asked for."""
        self._answered = {key: number for key, number in self._answered.items() if key[0] != frontend}

    def __len__(self) -> int:
        """Calls that wait."""
        return len(self._waiting)

    def serve(self, ask: Callable[[ControlAction], int], current: int) -> list[tuple[int, int, int]]:
        """The answers, as (front-end, call, number); to be called once the ranks were heard.

        `ask` does what is asked and returns the number for it; `current`: the suspension's number before.
        """
        waiting, self._waiting = self._waiting, {}
        answers = []
        for key, request in waiting.items():
            number = self._answered.get(key, request.answered or None)
            if number is None or number > current:
                # Never answered, or by a coordinator of whose suspension nobody knows any more.
                current = number = ask(request.action)
            self._answered[key] = number
            answers.append((*key, number))
        while len(self._answered) > ANSWERS_KEPT:
            del self._answered[next(iter(self._answered))]
        return answers


class Acknowledged(Struct, frozen=True):
    """What a rank last said: the number that it knows, and whether it starts nothing by itself."""

    number: int
    held: bool


class PauseTransaction:
    """The suspension of all ranks, and what is still to be acknowledged.

    `together`: whether all go on at once, as ranks in lockstep must. `without`: rules (`rules.py`) left out.
    """

    def __init__(self, without: Set[str] = frozenset(), *, together: bool = True) -> None:
        self.standing = PauseState()
        self._together = together
        self._said: dict[int, Acknowledged] = {}
        self._retry = Retry()
        self._numbered = "suspension-number" not in without
        # Until somebody speaks of one there is nothing to agree on, whoever comes and goes.
        self._unheard_of = True

    @property
    def due(self) -> float | None:
        """When the ranks must be told (again), or None."""
        return self._retry.due

    def expire(self, now: float) -> None:
        """The ranks are to be told again, whatever the time was."""
        self._retry.due = now

    def acknowledged(self, rank: int) -> tuple[int, bool] | None:
        """The number that a rank last said it knows, and whether it holds; None where it has said nothing."""
        said = self._said.get(rank)
        return None if said is None else (said.number, said.held)

    def ask(self, action: ControlAction, now: float) -> int:
        """Somebody wants this. Returns the number at which it is so; asking twice is asking once."""
        standing = self.standing
        if action == "resume":
            if standing.suspended:
                self._begin(standing.number + 1, standing.mode, now)
        elif not standing.suspended:
            self._begin(standing.number + 1, action, now)
        elif action not in (standing.mode, "wait"):
            # Paused is paused: to wait until requests are finished would mean to go on.
            self._begin(standing.number + 2, action, now)
        return standing.number

    def heard(self, rank: int, number: int, mode: SuspendMode, held: bool, now: float) -> None:
        """A rank said what it knows."""
        self._said[rank] = Acknowledged(number, held)
        self._unheard_of = self._unheard_of and not number and not held
        self.known(number, mode, now)

    def known(self, number: int, mode: SuspendMode, now: float) -> None:
        """Somebody knows this number: one from before this coordinator, if it is higher."""
        if number > self.standing.number and plausible(number, self.standing.number):
            self._begin(number, mode, now)

    def forget(self, rank: int) -> None:
        """The rank is gone."""
        self._said.pop(rank, None)

    def woke(self, now: float) -> None:
        """A wake goes out: acknowledgements from before it are void."""
        if self.standing.suspended:
            self._begin(self.standing.number + 2, self.standing.mode, now)

    def advance(self, expected: Iterable[int], now: float) -> None:
        """After anything was heard: release, and see what is still to be repeated. `expected`: ranks that count."""
        if self._unheard_of:
            return
        standing = self.standing
        ranks = list(expected)
        known = not self._together or all(self._knows(rank) for rank in ranks)
        if known and not standing.suspended and not standing.released:
            standing.released = True
            self._retry.start(now)
        if not any(self._lacks(rank) for rank in self._said):
            self._retry.stop()
        elif self._retry.due is None:
            self._retry.start(now)

    def state(self, expected: Iterable[int]) -> SuspensionState:
        """For front-ends."""
        if self._unheard_of:
            return SuspensionState()
        lacking = [rank for rank in expected if self._lacks(rank)]
        settled = not lacking and (self.standing.suspended or self.standing.released)
        return SuspensionState(self.standing.number, self.standing.mode, settled, lacking)

    def message(self, now: float) -> Suspension | None:
        """What to broadcast now, if that is due; the next repeat is set."""
        if not self._retry.is_due(now):
            return None
        self._retry.said(now)
        return self.told()

    def told(self) -> Suspension:
        """What a rank is told, whether due or not."""
        return Suspension(self.standing.number, self.standing.mode, self.standing.released)

    def _begin(self, number: int, mode: SuspendMode, now: float) -> None:
        self._unheard_of = False
        self.standing.learn(number, mode, False)
        self._retry.start(now)

    def _knows(self, rank: int) -> bool:
        said = self._said.get(rank)
        return said is not None and (said.number == self.standing.number or not self._numbered)

    def _lacks(self, rank: int) -> bool:
        """Whether the rank has not done what the number asks."""
        if not self._knows(rank):
            return self.standing.number > 0 or rank in self._said
        held = self._said[rank].held
        # Until all know the even number, who knows it has done its part.
        return not held if self.standing.suspended else held and self.standing.released


class CoordinatorPause(PauseTransaction):
    """A GroupSuspension with its calls. `lockstep`: whether the ranks run in waves. `without`: rules left out."""

    def __init__(self, identity: int, lockstep: bool, without: Set[str]) -> None:
        super().__init__(without, together=lockstep)
        self.calls = Calls()
        self.header = SuspensionState()
        """What front-ends are shown."""
        self._identity = identity
        self._lockstep = lockstep

    def hello(self, hello: RankHello, now: float) -> None:
        """A ready rank said what it knows."""
        self.heard(hello.rank, hello.suspension, hello.mode, hello.held, now)

    def settle(self, membership: Membership, epochs: Epochs, now: float) -> bool:
        """After anything was heard. Returns whether front-ends are to be shown something else."""
        expected = self.expected(membership, epochs, now)
        self.advance(expected, now)
        before, self.header = self.header, self.state(expected)
        return self.header != before

    def answers(self, now: float) -> list[ControlAnswer]:
        """The calls that wait, answered; to be called once the ranks were heard."""
        answers = self.calls.serve(lambda action: self.ask(action, now), self.standing.number)
        return [ControlAnswer(self._identity, *answer) for answer in answers]

    def expected(self, membership: Membership, epochs: Epochs, now: float) -> list[int]:
        """The ranks that must agree: all that there should be, heard or not, but for those that the others go on
        without, who are told when they come.

        A rank that was told of no suspension when it joined must not step either.
        """
        gone = epochs.absent if self._lockstep else membership.gone(now)
        return [rank for rank in range(membership.size) if rank not in gone]
