"""The common prefill quota: how many prompt tokens each lockstep rank may compute in a step.

A lockstep step lasts as long as its slowest rank, so one rank's prompt of 2,048 tokens holds all the others up: those
that write answers get one token each in the time of many. If all ranks prefill the same amount, or none, nobody waits
for anybody. A quota of x tokens is worth what all ranks together get done in the time of such a step:

    (fullness x decode time  +  token cost x mean of min(x, pending))  /  (decode time  +  token cost x x)

where fullness is the share of `places` in which an answer is written, the decode time is a step's without any prompt,
and pending are the prompt tokens that a rank could compute now. The candidates are 0, powers of two from a 64th of the
budget on, and the whole budget. Of those that are worth nearly as much as the best, the smallest is taken, since longer
steps lengthen the time between two tokens. In a model (16 ranks, saturated) this has the throughput of the best and a
third of its longest steps. So that nobody waits for ever, a step with an eighth of the budget comes after `PATIENCE`
steps without any. While no rank has a prompt, the quota is what a single newcomer would be worth: it may begin at once.

The numbers travel with the step agreement, as integers that are summed or of which the greatest counts
(`PART_REDUCTIONS`), and each rank decides by what came of them: the same integers, the same quota. What a step costs is
measured anew here, and not taken from the rank's reports: a lockstep step is as long as that of the rank with the most
tokens, which the agreement tells.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from itertools import pairwise
from typing import NamedTuple

from msgspec import Struct

from paceline.core.load import Load
from paceline.core.rank.events import Agree, Agreed, Stepped
from paceline.core.rank.reporting import StepMeter

LARGEST = 1 << 16
"""The largest budget that is told apart; what is more, or unlimited, counts as this."""

CANDIDATES = (0, *(1 << power for power in range(17)))
PATIENCE = 8
"""Steps without any prompt token, while some rank has one pending, before a step has some in any case."""
PATIENCE_SHARE = 8
"""One part in so many of the budget is what it has then."""

SMALLEST_SHARE = 64
"""A quota is 0, or at least one part in so many of the budget."""

NEARLY = (19, 20)
"""The share of the best one's worth that is nearly as much."""

AUTO = 0
OFF = LARGEST + 1
"""How a rank is set: chosen from the costs, no quota at all, or `fixed`. The greatest of the ranks' counts."""

Reduction = str
_GREATEST = ("setting", "shortfall", "waited", "prefilled", "decoded", "most pending")
_SUMS = ("ranks", "decoding", "slots", "decode_ns", "token_ns", *(f"at {x}" for x in CANDIDATES[1:]))
PART_REDUCTIONS: tuple[Reduction, ...] = ("max",) * len(_GREATEST) + ("sum",) * len(_SUMS)
"""How each integer of a contribution is reduced over the ranks."""


class Outcome(Struct, frozen=True):
    """What the ranks have agreed on. `quota`: None for no limit. `pending`: whether any rank could prefill, so that
    they should agree again after the next step. `waited`: steps, up to this, without any prompt token.
    """

    quota: int | None = None
    pending: bool = False
    waited: int = 0


class Part(NamedTuple):
    """What one rank puts in. Tokens and nanoseconds.

    `budget`: tokens that its step computes at most, 0 for any number. `pending`: prompt tokens that it could compute
    in the next step were there no limit: of requests that run, or for which there is a slot and memory. `decoding`:
    requests past their prompts. `slots`: `places`. `decode_ns`: its step without any prompt; `token_ns`: what one
    token of a prompt adds; both 0 until measured. `waited`: from the outcome before. `prefilled`, `decoded`: what its
    last step computed.
    """

    budget: int
    pending: int
    decoding: int
    slots: int
    decode_ns: int
    token_ns: int
    waited: int = 0
    prefilled: int = 0
    decoded: int = 0

    def packed(self, setting: int = AUTO) -> tuple[int, ...]:
        """The integers that are reduced, as `PART_REDUCTIONS` says."""
        pending = self.pending
        budget = min(self.budget or LARGEST, LARGEST)
        return (
            setting, LARGEST - budget, self.waited, self.prefilled, self.decoded, min(pending, budget),
            1, self.decoding, self.slots, self.decode_ns, self.token_ns,
            *[candidate if candidate < pending else pending for candidate in CANDIDATES[1:]],
        )  # fmt: skip


def places(slots: int, decoding: int, kv_used: int, kv_total: int) -> int:
    """How many requests a rank can write answers of at once: its slots, or fewer where memory is short.

    A rank whose memory is full is as full as it can be, whatever slots it has left. `kv_total` is 0 where there is no
    limit.
    """
    if not decoding or not kv_total or kv_used <= 0:
        return slots
    return min(slots, max(decoding, decoding * kv_total // kv_used))


UNLIMITED = (OFF, *(0,) * (len(PART_REDUCTIONS) - 1))
"""What a rank puts in that has no quota, and lets nobody have one."""


def fixed(tokens: int) -> int:
    """The setting for always the same quota, 1 to `LARGEST`. Of several the smallest counts."""
    if not 1 <= tokens <= LARGEST:
        raise ValueError(f"must be 1 to {LARGEST} tokens, not {tokens}")
    return OFF - tokens


def setting_of(text: str) -> int:
    """What `auto`, `off` or a number of tokens stands for. Raises ValueError for anything else."""
    if text in ("auto", "off"):
        return AUTO if text == "auto" else OFF
    if not text.isdecimal():
        raise ValueError(f"must be auto, off or a number of tokens, not {text!r}")
    return fixed(int(text))


def reduced(contributions: Iterable[Sequence[int]]) -> tuple[int, ...]:
    columns = zip(*contributions, strict=True)
    return tuple(
        max(column) if how == "max" else sum(column) for column, how in zip(columns, PART_REDUCTIONS, strict=True)
    )


def possible(agreed: Sequence[int]) -> bool:
    """Whether ranks can have come to these reduced integers, none of which is negative."""
    return len(agreed) == len(PART_REDUCTIONS) and agreed[0] <= OFF and agreed[1] < LARGEST


def made(agreed: Sequence[int]) -> tuple[int, int]:
    """The prompt and answer tokens of the rank that had the most, in the step that has just ended."""
    return agreed[3], agreed[4]


def decide(agreed: Sequence[int]) -> Outcome:
    """The outcome of the ranks' reduced integers. It depends on nothing else."""
    setting, shortfall, waited = agreed[:3]
    budget = LARGEST - shortfall
    if setting == OFF:
        return Outcome()
    if setting != AUTO:
        return Outcome(min(OFF - setting, budget))
    ranks, decoding, slots, decode_ns, token_ns = agreed[len(_GREATEST) : len(_GREATEST) + 5]
    together = (0, *agreed[len(_GREATEST) + 5 :])
    pending = together[1] > 0
    if not decoding or not token_ns:
        # Nobody is held up, or the costs are not known yet.
        return Outcome(budget, pending)
    most = agreed[5]
    if not pending:
        together, most = CANDIDATES, budget
    # Work is multiplied by slots x ranks: no division, so nothing is rounded.
    idle = _Worth(0, decoding * decode_ns * ranks, decode_ns)
    worths = [
        _Worth(quota, idle.work + token_ns * tokens * slots, decode_ns + token_ns * min(quota, most))
        for quota, tokens in _up_to(budget, together)
        if quota * SMALLEST_SHARE >= budget
    ]
    best = _smallest_of_the_best(idle, worths)
    if best or not pending:
        return Outcome(best, pending)
    if waited < PATIENCE:
        return Outcome(0, True, waited + 1)
    return Outcome(max(1, budget // PATIENCE_SHARE), True)


class _Worth(NamedTuple):
    """What all get done in a step with this quota, and how long that takes."""

    quota: int
    work: int
    lasts_ns: int


def _smallest_of_the_best(idle: _Worth, worths: Sequence[_Worth]) -> int:
    best = worths[0]
    for one in worths:
        if one.work * best.lasts_ns > best.work * one.lasts_ns:
            best = one
    if idle.work * best.lasts_ns > best.work * idle.lasts_ns:
        return 0
    enough, of = NEARLY
    return next(one.quota for one in worths if of * one.work * best.lasts_ns >= enough * best.work * one.lasts_ns)


def _up_to(budget: int, together: Sequence[int]) -> Iterable[tuple[int, int]]:
    """Quotas above 0 and up to the budget, each with the prompt tokens that all ranks together would compute."""
    rungs = list(zip(CANDIDATES, together, strict=True))
    for (below, tokens_below), (quota, tokens) in pairwise(rungs):
        if quota > budget:
            # Between two candidates, what is computed lies on or above the line between theirs.
            if budget > below:
                yield budget, tokens_below + (tokens - tokens_below) * (budget - below) // (quota - below)
            return
        yield quota, tokens


NS = 1e9
decided = lru_cache(maxsize=1)(decide)
"""Where all ranks are in one process, all ask for the same."""


class RankQuota:
    """The quota of one life of a rank. `setting`: `AUTO`, `OFF` or `fixed` (`prefill_quota.py`).

    With the first step of a wave or epoch nothing has been agreed yet: it is without a limit, or has the fixed
    one. Whoever runs then has just begun, but for what a pause or a lost rank has interrupted.
    """

    def __init__(self, setting: int) -> None:
        self._setting = setting
        self._begin = Outcome(None if setting in (AUTO, OFF) else OFF - setting)
        self._outcome = self._begin
        self._steps = StepMeter() if setting != OFF else None
        self._last: tuple[int, int, float] = (0, 0, 0.0)

    @property
    def tokens(self) -> int | None:
        """Prompt tokens that the next step may compute, None for no limit."""
        return self._outcome.quota

    @property
    def follows(self) -> bool:
        """Whether all ranks agree again after the next step, since one of them has a prompt."""
        return self._outcome.pending

    def forget(self) -> None:
        """The wave or the epoch is over: what was agreed in it is void."""
        self._outcome = self._begin

    def contribution(self, done: Stepped) -> Sequence[int]:
        """What this rank puts into the agreement after that step."""
        if self._steps is None:
            return UNLIMITED
        self._last = (done.prefilled_tokens, done.decoded_tokens, done.seconds)
        load, cost = done.load, self._steps.cost
        decode_s = cost.step_s + cost.answer_token_s * load.decoding
        part = Part(
            load.step_tokens, pending(load), load.decoding,
            places(load.slots, load.decoding, load.kv_reserved or load.kv_used, load.kv_total), round(decode_s * NS),
            round(cost.prompt_token_s * NS), self._outcome.waited, done.prefilled_tokens, done.decoded_tokens,
        )  # fmt: skip
        return part.packed(self._setting)

    def agreed(self, reduced: Sequence[int], now: float) -> None:
        """What came of all ranks' contributions; nothing where the agreement does not carry them."""
        if not reduced:
            return
        seconds = self._last[2]
        if self._steps is not None and seconds:
            self._steps.add(*made(reduced), seconds, now)
        self._outcome = decided(tuple(reduced))

    def urgent(self, load: Load) -> bool:
        """Whether this rank has a prompt for which the quota was not made."""
        if self._setting != AUTO or self._outcome.pending or self._outcome.quota is None:
            return False
        return pending(load) > self._outcome.quota


def pending(load: Load) -> int:
    """Prompt tokens that a rank with this load could compute in its next step, were there no limit."""
    return load.prefill_tokens if load.startable_tokens is None else load.startable_tokens


REDUCTIONS: tuple[str, ...] = ("max", "max", "max", *PART_REDUCTIONS)
"""How each integer is reduced over the ranks."""


def integers(agree: Agree) -> list[int]:
    """What a rank puts in."""
    return [int(agree.has_work), agree.wave, agree.suspension, *(agree.quota or UNLIMITED)]


LARGEST_INTEGER = 2**60
"""No integer of ours comes near, also summed over all ranks."""


def outcome(reduced: Sequence[int]) -> Agreed:
    """What all ranks learn of it. Raises ValueError where they cannot have agreed on that."""
    any_work, wave, suspension, *rest = reduced
    if not all(0 <= integer < LARGEST_INTEGER for integer in reduced) or not possible(rest):
        raise ValueError("a rank has put in what no rank of ours does")
    return Agreed(bool(any_work), wave, suspension, rest)


def agreed(entered: Iterable[Agree]) -> Agreed:
    """The outcome where all ranks' parts are in one place: in virtual time."""
    columns = list(zip(*map(integers, entered), strict=True))
    return outcome([max(c) if how == "max" else sum(c) for c, how in zip(columns, REDUCTIONS, strict=True)])
