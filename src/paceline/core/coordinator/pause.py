"""The coordinator's part in a pause: a numbered transaction over all ranks (`transaction.py`).

Pausing: all ranks are told the number until each has acknowledged it, quiesced. A quiesced rank starts nothing by
itself; it still follows a wake, because some rank that had not heard yet may have started a wave and wait for the
others in it. Such a wake gives the pause the number n + 2: what ranks said before the wake, also if it is still on its
way, does not count any more. Once every rank is quiesced by the same number no rank runs, and nothing but a higher
number can start one: wakes from before belong to waves that all have finished.

Resuming: all ranks are told the even number; when each has said that it knows it, it is released, and work starts. So
no rank steps before all have taken note, and the first that starts wakes the others into one wave. Independent ranks
have no waves: each goes on as soon as it hears that it may, whoever else is stopped or on its way back.
"""

from __future__ import annotations

from collections.abc import Iterable, Set

from msgspec import Struct

from paceline.core.coordinator.epoch import Epochs
from paceline.core.coordinator.membership import Membership
from paceline.core.coordinator.weights import WeightUpdate
from paceline.core.messages import ControlAnswer, ControlRequest, RankHello, Suspension, SuspensionState
from paceline.core.requests import ControlAction, SuspendMode, UpdateWeights, Weights
from paceline.core.transaction import PauseState, Transaction


class Acknowledged(Struct, frozen=True):
    """What a rank last said: the number that it knows, and whether it starts nothing by itself."""

    number: int
    quiesced: bool


class Pause(Transaction):
    """The pause of all ranks, what is still to be acknowledged, and the calls for it.

    `lockstep`: whether all go on at once. `without`: rules (`rules.py`) left out.
    """

    def __init__(self, identity: int = 0, lockstep: bool = True, without: Set[str] = frozenset()) -> None:
        super().__init__()
        self.pause = PauseState()
        self.header = SuspensionState()
        """What front-ends are shown."""
        self._identity = identity
        self._lockstep = lockstep
        self.weights = WeightUpdate()
        self._calls: dict[tuple[int, int], ControlRequest | UpdateWeights] = {}
        self._said: dict[int, Acknowledged] = {}
        self._numbered = "suspension-number" not in without
        # Until somebody speaks of one there is nothing to agree on, whoever comes and goes.
        self._unheard_of = True

    @property
    def number(self) -> int:
        return self.pause.number

    @property
    def due(self) -> float | None:
        """When the word must be said (again), or an update of the weights has taken too long."""
        return min((at for at in (self._retry.due, self.weights.due) if at is not None), default=None)

    def expire(self, now: float) -> None:
        """The ranks are to be told again, whatever the time was."""
        self._retry.due = now

    def acknowledged(self, rank: int) -> tuple[int, bool] | None:
        """The number that a rank last said it knows, and whether it holds; None where it has said nothing."""
        said = self._said.get(rank)
        return None if said is None else (said.number, said.quiesced)

    # Calls -------------------------------------------------------------------------------------

    def request(self, request: ControlRequest | UpdateWeights) -> None:
        self._calls[request.frontend, request.call] = request

    @property
    def asked(self) -> bool:
        return bool(self._calls)

    def answers(self, now: float) -> list[ControlAnswer]:
        """The calls that wait, answered; to be called once the ranks were heard, since what a new coordinator would say
        of a pause that it does not know would be wrong.
        """
        calls, self._calls = self._calls, {}
        answers = []
        for key, request in calls.items():
            weights = isinstance(request, UpdateWeights)
            number, why = self.served.number(*key), ""
            number = number if number is not None else (request.answered or None)
            if number is None or number > (self.weights.number if weights else self.number):
                # Never answered, or by a coordinator of whose pause nobody knows any more.
                if isinstance(request, ControlRequest):
                    number = self.ask(request.action, now)
                elif request.action == "stage" and self._pausing():
                    self._calls[key] = request  # whether all are paused is not known yet
                    continue
                else:
                    number, why = self.weights.ask(request, self.pause.paused, now)
                    self._repeat(now)
            self.served.serve(*key, number)
            answers.append(ControlAnswer(self._identity, *key, number, why))
        return answers

    def ask(self, action: ControlAction, now: float) -> int:
        """Somebody wants this. Returns the number at which it is so; asking twice is asking once."""
        pause = self.pause
        if action == "resume":
            if pause.paused:
                self._begin(pause.number + 1, pause.mode, now)
        elif not pause.paused:
            self._begin(pause.number + 1, action, now)
        elif action not in (pause.mode, "wait"):
            # Paused is paused: to wait until requests are finished would mean to go on.
            self._begin(pause.number + 2, action, now)
        return pause.number

    # What ranks say ----------------------------------------------------------------------------

    def hello(self, hello: RankHello, now: float) -> None:
        self.weights.heard(hello.rank, hello.weights)
        self.heard(hello.rank, hello.suspension, hello.mode, hello.held, now)
        self.known_weights(None if hello.weights is None else hello.weights.known, now)

    def heard(self, rank: int, number: int, mode: SuspendMode, quiesced: bool, now: float) -> None:
        self._said[rank] = Acknowledged(number, quiesced)
        self._unheard_of = self._unheard_of and not number and not quiesced
        self.known(number, mode, now)

    def known(self, number: int, mode: SuspendMode, now: float) -> None:
        """Somebody knows this number: one from before this coordinator, if it is higher."""
        if self.is_news(number):
            self._begin(number, mode, now)

    def known_weights(self, weights: Weights | None, now: float) -> None:
        """As `known`, of the weights."""
        if self.weights.learn(weights, now):
            self._repeat(now)

    def forget(self, rank: int) -> None:
        self._said.pop(rank, None)
        self.weights.forget(rank)

    def woke(self, now: float) -> None:
        """A wake goes out: acknowledgements from before it are void."""
        if self.pause.paused:
            self._begin(self.pause.number + 2, self.pause.mode, now)

    def advance(self, expected: Iterable[int], now: float) -> None:
        """After anything was heard: release, and see what is still to be repeated. `expected`: ranks that count."""
        if self._unheard_of:
            return
        pause = self.pause
        ranks = list(expected)
        while self.weights.advance(ranks, now):
            self._retry.start(now)
        known = not self._lockstep or all(self._knows(rank) for rank in ranks)
        if known and not pause.paused and not pause.released and not self.weights.state.under_way:
            pause.released = True
            self._retry.start(now)
        if not any(self._lacks(rank) for rank in self._said):
            self._retry.stop()
        elif self._retry.due is None:
            self._retry.start(now)

    def settle(self, membership: Membership, epochs: Epochs, now: float) -> bool:
        """After anything was heard. Returns whether front-ends are to be shown something else.

        All ranks that there should be must agree, heard or not: one that was told of no pause when it joined must not
        step either. Those that the others go on without are told when they come.
        """
        gone = epochs.absent if self._lockstep else membership.gone(now)
        expected = [rank for rank in range(membership.size) if rank not in gone]
        self.advance(expected, now)
        before, self.header = self.header, self.state(expected)
        return self.header != before

    def state(self, expected: Iterable[int]) -> SuspensionState:
        if self._unheard_of:
            return SuspensionState()
        lacking = [rank for rank in expected if self._lacks(rank)]
        settled = not lacking and (self.pause.paused or self.pause.released)
        return SuspensionState(self.pause.number, self.pause.mode, settled, lacking, self.weights.told)

    def _repeat(self, now: float) -> None:
        """There is a new word of the weights, if any."""
        if self.weights.number:
            self._unheard_of = False
            self._retry.start(now)

    def _pausing(self) -> bool:
        """Whether a pause is asked for, and not all are known to hold it."""
        settled = self.header.settled and self.header.number == self.pause.number
        return self.pause.paused and not settled and not self.weights.state.under_way

    def late(self, now: float) -> bool:
        """Whether an update of the weights has taken too long."""
        return self.weights.due is not None and now >= self.weights.due

    def message(self, now: float) -> Suspension | None:
        """What to broadcast now, if that is due; the next repeat is set."""
        if not self._retry.is_due(now):
            return None
        self._retry.said(now)
        return self.told()

    def told(self) -> Suspension:
        """What a rank is told, whether due or not."""
        return Suspension(self.pause.number, self.pause.mode, self.pause.released, self.weights.told)

    def _begin(self, number: int, mode: SuspendMode, now: float) -> None:
        self._unheard_of = False
        self.pause.learn(number, mode, False)
        self._retry.start(now)

    def _knows(self, rank: int) -> bool:
        said = self._said.get(rank)
        return said is not None and (said.number == self.pause.number or not self._numbered)

    def _lacks(self, rank: int) -> bool:
        """Whether the rank has not done what the number asks."""
        if self.weights.lacks(rank):
            return True
        if not self._knows(rank):
            return self.pause.number > 0 or rank in self._said
        quiesced = self._said[rank].quiesced
        # Until all know the even number, who knows it has done its part.
        return not quiesced if self.pause.paused else quiesced and self.pause.released
