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

from collections.abc import Iterable, Mapping, Sequence, Set

from msgspec import Struct
from msgspec.structs import replace

from paceline.core.binding import Ask, Descriptor, Grant, Grants, ReturnShares, Share, Shares, Withdraw
from paceline.core.blocks import block_hashes, packed
from paceline.core.frontend.control import FrontendCalls
from paceline.core.frontend.deadlines import Deadlines, too_late
from paceline.core.frontend.events import Deliver, Effect, Refuse, Submit, ToCoordinator
from paceline.core.frontend.failover import HOLD_S
from paceline.core.frontend.inflight import NAMED, InFlightRequests, RankHandle, Router, query_of, session_of
from paceline.core.load import plausible
from paceline.core.messages import LoadView
from paceline.core.requests import Output
from paceline.core.routing.policy import Query

ASK_AGAIN_S = 0.25
SILENCE_S = 0.5
WORTH_ASKING = 4
"""A prompt of so many blocks takes longer to compute than the coordinator to be asked who holds its prefix,"""
KNOWN_SHARE = 8
"""unless of so many parts all but one are known to be at a rank that may have it."""


class Held(Struct, frozen=True):
    """A request that waits, since when."""

    submit: Submit
    since: float


class Waiting(Struct):
    """How many of a tenant wait, and its part of the queue."""

    weight: float
    count: int = 0


class Binding:
    """What waits at one front-end.

    `late_binding`: False where it binds everything itself. `without`: rules left out.
    """

    INCIDENTAL = frozenset({"given"})

    def __init__(self, identity: int, late_binding: bool, without: Set[str] = frozenset()) -> None:
        self.waiting_for_grant: dict[int, Held] = {}
        """By request, in order of arrival."""
        self.tenants: dict[int, Waiting] = {}
        """Those of whom any waits here."""
        self.given: Sequence[Shares] = ()
        """All front-ends' credits."""
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
        return [rank for rank in self._credits if rank in handles and self.fits(handles[rank], tokens, kv)]

    # Waiting ------------------------------------------------------------------------------------

    def hold(self, submit: Submit, now: float) -> list[Effect]:
        if not self.waiting_for_grant:
            self._answered = now
        self.waiting_for_grant[submit.request] = waiting_for_grant = Held(submit, now)
        tenant = self.tenants.get(submit.tenant)
        if tenant is None:
            tenant = self.tenants[submit.tenant] = Waiting(submit.weight)
        tenant.count += 1
        return [self._ask([waiting_for_grant], False, now)]

    def drop(self, requests: Iterable[int], now: float) -> list[Effect]:
        """These do not wait any more. Those that did not are left out."""
        gone = [request for request in requests if self.take(request) is not None]
        return self.withdraw(gone, now)

    def take(self, request: int) -> Held | None:
        """One that waits no more; None where it did not."""
        held = self.waiting_for_grant.pop(request, None)
        if held is not None:
            tenant = self.tenants[held.submit.tenant]
            tenant.count -= 1
            if not tenant.count:
                del self.tenants[held.submit.tenant]
        return held

    def withdraw(self, requests: list[int], now: float) -> list[Effect]:
        if not requests:
            return []
        return [ToCoordinator(Withdraw(self._identity, self._count(now), requests))]

    def give_up(self) -> list[Held]:
        """Everything that is held, to be bound here, in the order in which the coordinator would have."""
        waiting_for_grant = sorted(self.waiting_for_grant.values(), key=lambda one: one.submit.priority)
        self.waiting_for_grant, self.tenants = {}, {}
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
        self._behind_since = now
        return self._ask(list(self.waiting_for_grant.values()), True, now)

    def take_view(self, view: LoadView) -> bool:
        """Returns whether this front-end has been forgotten there, as one that hangs is, and must say hello."""
        self.given = view.shares or ()
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
                one.submit.priority, max(0, round((now - one.since) * 1000)), packed(one.submit.blocks or ()),
                session_of(one.submit), one.submit.tenant, one.submit.weight,
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
    """How one front-end's requests get their ranks. `max_waiting`: how many may wait for a slot, None for no limit.
    `hold_s`: how long they wait while there is no rank.
    """

    def __init__(
        self, router: Router, all_inflight: InFlightRequests, binding: Binding, calls: FrontendCalls,
        max_waiting: int | None,
        hold_s: float = HOLD_S,
    ) -> None:  # fmt: skip
        self._router = router
        self._inflight = all_inflight
        self._binding = binding
        self._calls = calls
        self._max_waiting = max_waiting
        self._hold_s = hold_s
        self._rankless_since: float | None = None
        self._deadlines = Deadlines(all_inflight)

    @property
    def deadline(self) -> float:
        """When something must be done about what waits, at the latest."""
        due = self._deadlines.due
        if self._rankless_since is None or not self._binding.waiting_for_grant:
            return min(due, self._binding.deadline)
        return min(due, self._rankless_since + self._hold_s)

    # Requests -----------------------------------------------------------------------------------

    def submit(self, submit: Submit, now: float) -> list[Effect]:
        refusal = self._refusal(submit, now)
        if refusal is not None:
            return [refusal]
        if self._router.names and submit.blocks is None:
            submit = replace(submit, blocks=block_hashes(submit.prompt_token_ids))
        if not self._inflight.handles:
            return self._hold(submit, now)
        query = query_of(submit)
        reason = ""
        if submit.rank is not None:
            rank = submit.rank
        elif self._binding.available:
            by_credit = self._by_credit(submit, query)
            if by_credit is None:
                return self._hold(submit, now)
            rank, reason = by_credit, "room that this front-end was given in advance"
        else:
            rank = self._router.choose(query)
        if rank not in self._inflight.handles:
            return [_misrouted(submit, rank)]
        name = NAMED if submit.rank is not None else ""
        decision = self._router.explain(rank, query, name, reason, alternatives=submit.explain)
        return self._inflight.send(submit, rank, decision, now, waited=False)

    def _hold(self, submit: Submit, now: float) -> list[Effect]:
        self._deadlines.waits(submit, self._binding.waiting_for_grant)
        return self._binding.hold(submit, now)

    def _awaits_ranks(self, now: float) -> bool:
        """Whether there were ranks, not too long ago, and there is a queue where requests can wait for the next."""
        since = self._rankless_since
        return since is not None and self._binding.available and now < since + self._hold_s

    def _by_credit(self, submit: Submit, query: Query) -> int | None:
        """The rank that a request may go to without a word, if nobody waits and there is one."""
        if self._binding.waiting_for_grant or self._calls.suspended:
            return None
        tokens, kv = query.prompt_tokens, query.prompt_tokens + submit.params.max_tokens
        handles = self._inflight.handles
        rank = self._router.choose(query)
        if query.session is not None or len(query.blocks) >= WORTH_ASKING:
            # The coordinator knows of all front-ends' prompts who holds what.
            tokens -= self._router.held(rank, query)
            known = tokens * KNOWN_SHARE <= query.prompt_tokens
            return rank if known and rank in handles and self._binding.fits(handles[rank], tokens, kv) else None
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
        if not self._inflight.handles and not self._awaits_ranks(now):
            return Refuse(submit.request, "no-rank", "no rank is ready")
        if self._calls.suspended and self._calls.suspension.mode == "abort":
            return Refuse(
                submit.request, "suspended", "the deployment is suspended; requests are refused until it resumes"
            )
        timed = submit.deadline != float("inf")
        if self._max_waiting is None and not timed:
            return None
        waiting = self.waiting()
        if not waiting:
            self._inflight.retry_after.no_queue()
        if self._max_waiting is not None and waiting >= self._max_waiting and not self._has_less_than_its_part(submit):
            back_s = self._inflight.retry_after.come_back_s(len(self._inflight), now)
            return Refuse(submit.request, "overloaded", f"{self._max_waiting} requests are waiting already", back_s)
        if not timed:
            return None
        frontends = self._router.frontend_count
        mine, weights = self._of_tenant(submit)
        ahead = min(waiting, frontends * mine * weights / submit.weight) if weights > submit.weight else waiting
        return self._deadlines.refusal(submit, ahead, frontends, now)

    def _of_tenant(self, submit: Submit) -> tuple[int, float]:
        """How many of the request's tenant wait here, and the weights of all tenants of which any does, its own too."""
        tenants = self._binding.tenants
        mine = tenants.get(submit.tenant)
        weights = sum(one.weight for one in tenants.values())
        return (0, weights + submit.weight) if mine is None else (mine.count, weights)

    def _has_less_than_its_part(self, submit: Submit) -> bool:
        """Whether others have filled the queue: who floods it fills it for itself alone."""
        mine, weights = self._of_tenant(submit)
        return weights > submit.weight and mine * weights < len(self._binding.waiting_for_grant) * submit.weight

    # Requests that wait -------------------------------------------------------------------------

    def grants(self, message: Grants, now: float) -> list[Effect]:
        grants, effects = self._binding.take_grants(message, now)
        for grant in grants:
            handle = self._inflight.handles.get(grant.rank)
            # A life that is not known here yet: the grant comes again.
            if handle is None or handle.incarnation != grant.incarnation:
                continue
            waiting_for_grant = self._binding.take(grant.request)
            if waiting_for_grant is not None:
                reason = f"granted by the central queue; {grant.held} tokens of prefix there"
                effects += self._bind(waiting_for_grant, grant.rank, now, QUEUE, reason, grant)
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
            rank = self._router.choose(query_of(waiting_for_grant.submit))
            if rank in self._inflight.handles:
                effects += self._bind(waiting_for_grant, rank, now, "", "bound without the central queue")
            else:
                effects.append(_misrouted(waiting_for_grant.submit, rank))
        return effects

    def _bind(
        self, waiting_for_grant: Held, rank: int, now: float, name: str, reason: str, grant: Grant | None = None
    ) -> list[Effect]:
        submit = waiting_for_grant.submit
        waited_ms = max(0, round((now - waiting_for_grant.since) * 1000))
        why = f"{reason}, waited {waited_ms} ms"
        decision = self._router.explain(rank, query_of(submit), name, why, alternatives=submit.explain)
        held, by_its_word = (None, 0) if grant is None else (grant.held, grant.waited_ms)
        if grant is not None and (receipt := grant.receipt) is not None:
            why = "at its home" if rank == receipt.home else "sooner than at its home"
            decision = replace(
                decision, reason=f"{why}: {decision.reason}", home=receipt.home, prefix_tokens=receipt.held,
                known_by="key" if receipt.by_key else "blocks", home_ms=_known(receipt.home_ms),
                elsewhere_ms=_known(receipt.elsewhere_ms),
            )  # fmt: skip
        return self._inflight.send(submit, rank, decision, now, waited=True, held=held, waited_ms=by_its_word)

    def end_waiting(self, now: float) -> list[Effect]:
        """What waits is ended where there is nothing to wait for: no rank, for long, a pause that aborts, or its time
        is over."""
        if self._inflight.handles:
            self._rankless_since = None
        elif self._rankless_since is None:
            self._rankless_since = now
        late = [one for one in self._deadlines.late(now) if one in self._binding.waiting_for_grant]
        if not self._binding.waiting_for_grant:
            return []
        if late:
            return [*self._binding.drop(late, now), *map(too_late, late)]
        waiting = list(self._binding.waiting_for_grant)
        if self._rankless_since is not None and now >= self._rankless_since + self._hold_s:
            refusals: list[Effect] = [Refuse(request, "no-rank", "no rank is ready") for request in waiting]
            return [*self._binding.drop(waiting, now), *refusals]
        if self._calls.suspended and self._calls.suspension.mode == "abort":
            aborted = [Output(request, [], finish_reason="abort") for request in waiting]
            return [*self._binding.drop(waiting, now), Deliver(aborted)]
        return []


def _known(milliseconds: int) -> int | None:
    return None if milliseconds < 0 else milliseconds


def _misrouted(submit: Submit, rank: object) -> Refuse:
    return Refuse(submit.request, "misrouted", f"the policy chose rank {rank!r}, which is not there")
