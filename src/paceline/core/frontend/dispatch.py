"""The front-end's side of late binding (`queue.py` has the whole): what waits here, what may go without a word.

A request goes by a credit where one fits and nobody waits; else it is held here, with its body, and the coordinator is
asked. Each Ask and Withdraw is numbered, and what the coordinator says of the queue names the number up to which it
has heard everything. Where that stays behind, or the coordinator is a new one, it is asked again for all that is held.

Where the coordinator does not say for `SILENCE_S` that it has this front-end's requests, it is taken to be away: what
is held is bound by the front-end's own accounting, and so is what comes after, until a view names this front-end again.

Where a request goes: to the rank that it names, by this front-end's own choice, by a credit, or by a grant.

named             straight there
no queue          the policy chooses, by this front-end's own accounting
a credit fits     the policy's choice if a credit allows it, else the least loaded of those that one allows
none does         it waits here until the coordinator grants it a rank, or is away (`dispatch.py`)
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Set

from msgspec import Struct

from paceline.core.frontend.control import FrontendCalls
from paceline.core.frontend.events import Deliver, Effect, Refuse, Submit, ToCoordinator
from paceline.core.frontend.failover import PATIENCE_S
from paceline.core.frontend.inflight import InFlightRequests
from paceline.core.frontend.ranks import NAMED, RankHandle, Router
from paceline.core.load import plausible
from paceline.core.messages import Ask, Descriptor, Grant, Grants, LoadView, ReturnShares, Share, Withdraw
from paceline.core.requests import Output
from paceline.core.routing.policy import Query

ASK_AGAIN_S = 0.25
SILENCE_S = 0.5


class Held(Struct, frozen=True):
    """A request that waits, since when."""

    submit: Submit
    since: float


class Binding:
    """What waits at one front-end.

    `late_binding`: False where it binds everything itself. `without`: rules left out.
    """

    def __init__(self, identity: int, late_binding: bool, without: Set[str] = frozenset()) -> None:
        self.waiting_for_grant: dict[int, Held] = {}
        """By request, in order of arrival."""
        self._identity = identity
        self._late_binding = late_binding
        self._asks_again = "unsent-asked-again" not in without
        self._queued = 0
        self._has_queue = False
        self._named = False
        self._away = False
        self._credits: dict[int, Share] = {}
        self._credit_epoch = 0
        self._returned = 0
        # Of Ask and Withdraw: sent, and heard of by this coordinator; since when it has been behind.
        self._told = 0
        self._heard = 0
        self._behind_since = 0.0
        self._answered = 0.0

    @property
    def available(self) -> bool:
        """Whether requests may wait for the coordinator."""
        return self._has_queue and not self._away

    @property
    def queued(self) -> int:
        """Requests that wait, this front-end's and those of the others over the same ranks."""
        return max(self._queued, len(self.waiting_for_grant))

    @property
    def deadline(self) -> float:
        """When the coordinator must be asked again or is taken to be away; infinite while nobody waits."""
        if not self.waiting_for_grant:
            return float("inf")
        away = self._answered + SILENCE_S
        return min(away, self._behind_since + ASK_AGAIN_S) if self._told > self._heard and self._asks_again else away

    def timers(self) -> list[str]:
        """What is waited for: that the coordinator has heard all (`ask`), and that it is not away (`silence`)."""
        behind = self._told > self._heard and self._asks_again
        return [*(["ask"] if behind else []), "silence"] if self.waiting_for_grant else []

    def expire(self, timer: str, now: float) -> None:
        """One of these has been waited for long enough."""
        if timer == "ask":
            self._behind_since = now - ASK_AGAIN_S
        else:
            self._answered = now - SILENCE_S

    # Going without a word -----------------------------------------------------------------------

    def fits(self, handle: RankHandle, tokens: int, kv: int) -> bool:
        """Whether this front-end's share allows to send this to the rank now."""
        credit = self._credits.get(handle.rank)
        if credit is None or credit.incarnation != handle.incarnation:
            return False
        sent = handle.unheard
        return (
            credit.requests > sent.requests
            and credit.tokens >= sent.tokens + tokens
            and credit.kv_tokens >= sent.kv + kv
        )  # fmt: skip

    def fitting(self, handles: Mapping[int, RankHandle], tokens: int, kv: int) -> list[int]:
        """The ranks that this may be sent to now."""
        return [rank for rank in self._credits if rank in handles and self.fits(handles[rank], tokens, kv)]

    # Waiting ------------------------------------------------------------------------------------

    def hold(self, submit: Submit, now: float) -> list[Effect]:
        """Let a request wait, and ask."""
        if not self.waiting_for_grant:
            self._answered = now
        self.waiting_for_grant[submit.request] = waiting_for_grant = Held(submit, now)
        return [self._ask([waiting_for_grant], False, now)]

    def drop(self, requests: Iterable[int], now: float) -> list[Effect]:
        """These do not wait any more. Those that did not are left out."""
        gone = [request for request in requests if self.waiting_for_grant.pop(request, None) is not None]
        return self.withdraw(gone, now)

    def withdraw(self, requests: list[int], now: float) -> list[Effect]:
        """Let the coordinator know that these do not wait."""
        if not requests:
            return []
        return [ToCoordinator(Withdraw(self._identity, self._count(now), requests))]

    def give_up(self) -> list[Held]:
        """Everything that is held, to be bound here, in the order in which the coordinator would have."""
        waiting_for_grant = sorted(self.waiting_for_grant.values(), key=lambda one: one.submit.priority)
        self.waiting_for_grant = {}
        return waiting_for_grant

    def stop(self) -> None:
        """The coordinator is asked no more."""
        self._late_binding = self._has_queue = False

    def away(self, now: float) -> bool:
        """Whether the coordinator has been silent too long for what waits; from then on it is taken to be away."""
        if not self.waiting_for_grant or now < self._answered + SILENCE_S:
            return False
        self._away = True
        self._return()
        return True

    # The coordinator ----------------------------------------------------------------------------

    def coordinator_is_new(self, now: float) -> bool:
        """Nothing that another one has said counts. Returns whether to ask it for all that is held."""
        self._credits = {}
        self._credit_epoch = self._returned = self._heard = self._queued = 0
        self._answered = self._behind_since = now
        self._named = False
        return bool(self.waiting_for_grant) and self._asks_again

    def ask_again(self, now: float) -> Effect:
        """Ask for all that is held."""
        self._behind_since = now
        return self._ask(list(self.waiting_for_grant.values()), True, now)

    def take_view(self, view: LoadView) -> bool:
        """Shares, and whether there is a queue at all. Returns whether this front-end has been forgotten there, as one
        that hangs is, and must say hello.
        """
        self._has_queue = self._late_binding and view.shares is not None
        self._queued = view.queues.get(self._identity, view.queued)
        self._credits = {}
        before, self._named = self._named, False
        for shares in view.shares or ():
            if shares.frontend == self._identity and plausible(shares.edition, self._credit_epoch):
                self._named = True
                self._away = False
                self._credit_epoch = max(self._credit_epoch, shares.edition)
                if shares.edition > self._returned and not self.waiting_for_grant:
                    self._credits = {credit.rank: credit for credit in shares.shares}
        return self._has_queue and before and not self._named

    def take_grants(self, message: Grants, now: float) -> tuple[list[Grant], list[Effect]]:
        """Returns the grants of requests that are held here, and what to answer."""
        self._queued = message.queues.get(self._identity, message.queued)
        told = message.asked.get(self._identity)
        if told is not None:
            self._answered = now
            if told > self._heard:
                self._heard, self._behind_since = told, now
        effects: list[Effect] = []
        if message.recall:
            self._return()
            effects.append(ToCoordinator(ReturnShares(self._identity, self._credit_epoch)))
        mine = [grant for grant in message.grants if grant.frontend == self._identity]
        # Aborted or sent meanwhile, and the coordinator has not heard of it.
        effects += self.withdraw([grant.request for grant in mine if grant.request not in self.waiting_for_grant], now)
        return [grant for grant in mine if grant.request in self.waiting_for_grant], effects

    def _ask(self, waiting_for_grant: list[Held], whole: bool, now: float) -> Effect:
        self._return()
        descriptors = [
            Descriptor(
                one.submit.request, len(one.submit.prompt_token_ids), one.submit.params.max_tokens,
                one.submit.priority, max(0, round((now - one.since) * 1000)),
            )
            for one in waiting_for_grant
        ]  # fmt: skip
        return ToCoordinator(Ask(self._identity, self._count(now), self._credit_epoch, descriptors, whole))

    def _count(self, now: float) -> int:
        if self._told == self._heard:
            self._behind_since = now
        self._told += 1
        return self._told

    def _return(self) -> None:
        """No share is used any more that was handed out so far."""
        self._credits = {}
        self._returned = self._credit_epoch


QUEUE = "broker"
"""In place of the policy's name, where the coordinator chose the rank."""


class Placement:
    """How one front-end's requests get their ranks. `max_waiting`: how many may wait for a slot, None for no limit."""

    def __init__(
        self,
        router: Router,
        all_inflight: InFlightRequests,
        binding: Binding,
        calls: FrontendCalls,
        max_waiting: int | None,
    ) -> None:
        self._router = router
        self._inflight = all_inflight
        self._binding = binding
        self._calls = calls
        self._max_waiting = max_waiting
        self._rankless_since: float | None = None

    @property
    def deadline(self) -> float:
        """When something must be done about what waits, at the latest."""
        if self._rankless_since is None or not self._binding.waiting_for_grant:
            return self._binding.deadline
        return self._rankless_since + PATIENCE_S

    # Requests -----------------------------------------------------------------------------------

    def submit(self, submit: Submit, now: float) -> list[Effect]:
        """A client's request."""
        refusal = self._refusal(submit, now)
        if refusal is not None:
            return [refusal]
        query = _query(submit)
        reason = ""
        if submit.rank is not None:
            rank = submit.rank
        elif self._binding.available:
            by_credit = self._by_credit(submit, query)
            if by_credit is None:
                return self._binding.hold(submit, now)
            rank, reason = by_credit, "room that this front-end was given in advance"
        else:
            rank = self._router.choose(query)
        if rank not in self._inflight.handles:
            return [_misrouted(submit, rank)]
        name = NAMED if submit.rank is not None else ""
        decision = self._router.explain(rank, query, name, reason) if submit.explain else None
        return self._inflight.send(submit, rank, decision, now, waited=False)

    def _by_credit(self, submit: Submit, query: Query) -> int | None:
        """The rank that a request may go to without a word, if nobody waits and there is one."""
        if self._binding.waiting_for_grant or self._calls.suspended:
            return None
        tokens, kv = query.prompt_tokens, query.prompt_tokens + submit.params.max_tokens
        handles = self._inflight.handles
        rank = self._router.choose(query)
        if rank in handles and self._binding.fits(handles[rank], tokens, kv):
            return rank
        fitting = self._binding.fitting(handles, tokens, kv)
        return self._router.choose_among(query, fitting) if fitting else None

    def waiting(self) -> int:
        """Requests believed to wait for a slot: at this front-end's ranks, and before them."""
        return self._router.waiting() + self._binding.queued

    def _refusal(self, submit: Submit, now: float) -> Refuse | None:
        if submit.rank is not None and submit.rank not in self._inflight.handles:
            known = ", ".join(map(str, sorted(self._inflight.handles))) or "none"
            text = f"rank {submit.rank} is not served here; ready ranks: {known}"
            return Refuse(submit.request, "unknown-rank", text)
        if not self._inflight.handles:
            return Refuse(submit.request, "no-rank", "no rank is ready")
        if self._calls.suspended and self._calls.suspension.mode == "abort":
            return Refuse(
                submit.request, "suspended", "the deployment is suspended; requests are refused until it resumes"
            )
        if self._max_waiting is None:
            return None
        waiting = self.waiting()
        if not waiting:
            self._inflight.retry_after.no_queue()
        if waiting >= self._max_waiting:
            back_s = self._inflight.retry_after.come_back_s(len(self._inflight), now)
            return Refuse(submit.request, "overloaded", f"{self._max_waiting} requests are waiting already", back_s)
        return None

    # Requests that wait -------------------------------------------------------------------------

    def grants(self, message: Grants, now: float) -> list[Effect]:
        """What the coordinator says of its queue."""
        grants, effects = self._binding.take_grants(message, now)
        for grant in grants:
            handle = self._inflight.handles.get(grant.rank)
            # A life that is not known here yet: the grant comes again.
            if handle is None or handle.incarnation != grant.incarnation:
                continue
            waiting_for_grant = self._binding.waiting_for_grant.pop(grant.request, None)
            if waiting_for_grant is not None:
                effects += self._bind(waiting_for_grant, grant.rank, now, QUEUE, "granted by the central queue")
        return effects

    def stop(self, now: float) -> list[Effect]:
        """The coordinator is asked no more: it grants ranks that cannot be reached from here."""
        self._binding.stop()
        return self._bind_waiting(now) if self._inflight.handles else []

    def settle(self, now: float) -> list[Effect]:
        """What is known of the coordinator, the ranks or the pause has changed: see to what waits."""
        effects = self.end_waiting(now)
        if self._binding.available or not self._inflight.handles:
            return effects
        return [*effects, *self._bind_waiting(now)]

    def _bind_waiting(self, now: float) -> list[Effect]:
        """There is no queue: bind what is held by this front-end's own accounting."""
        effects: list[Effect] = []
        for waiting_for_grant in self._binding.give_up():
            rank = self._router.choose(_query(waiting_for_grant.submit))
            if rank in self._inflight.handles:
                effects += self._bind(waiting_for_grant, rank, now, "", "bound without the central queue")
            else:
                effects.append(_misrouted(waiting_for_grant.submit, rank))
        return effects

    def _bind(self, waiting_for_grant: Held, rank: int, now: float, name: str, reason: str) -> list[Effect]:
        submit = waiting_for_grant.submit
        decision = None
        if submit.explain:
            waited_ms = max(0, round((now - waiting_for_grant.since) * 1000))
            decision = self._router.explain(rank, _query(submit), name, f"{reason}, waited {waited_ms} ms")
        return self._inflight.send(submit, rank, decision, now, waited=True)

    def end_waiting(self, now: float) -> list[Effect]:
        """What waits is ended where there is nothing to wait for: no rank, for long, or a pause that aborts."""
        if self._inflight.handles:
            self._rankless_since = None
        elif self._rankless_since is None:
            self._rankless_since = now
        if not self._binding.waiting_for_grant:
            return []
        waiting = list(self._binding.waiting_for_grant)
        if self._rankless_since is not None and now >= self._rankless_since + PATIENCE_S:
            refusals: list[Effect] = [Refuse(request, "no-rank", "no rank is ready") for request in waiting]
            return [*self._binding.drop(waiting, now), *refusals]
        if self._calls.suspended and self._calls.suspension.mode == "abort":
            aborted = [Output(request, [], finish_reason="abort") for request in waiting]
            return [*self._binding.drop(waiting, now), Deliver(aborted)]
        return []


def _query(submit: Submit) -> Query:
    return Query(len(submit.prompt_token_ids), submit.prompt_token_ids, submit.session, submit.priority)


def _misrouted(submit: Submit, rank: object) -> Refuse:
    return Refuse(submit.request, "misrouted", f"the policy chose rank {rank!r}, which is not there")
