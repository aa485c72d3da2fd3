"""The common prefill quota as one rank knows it: what the ranks agreed on last, and what it puts in next.

What a step costs is measured anew here, and not taken from the rank's reports: a lockstep step lasts as long as the
slowest rank's, so its length is that of the tokens of whoever had the most, which the agreement tells.
"""

from __future__ import annotations

from collections.abc import Sequence

from paceline.protocol.messages import Load
from paceline.protocol.quota import AUTO, OFF, UNLIMITED, Outcome, Part, decide, made, places
from paceline.protocol.rank_events import Stepped
from paceline.protocol.ranks.step_meter import StepMeter

NS = 1e9


class RankQuota:
    """The quota of one life of a rank. `setting`: `AUTO`, `OFF` or `fixed` (`quota.py`).

    With the first step of a wave or generation nothing has been agreed yet: it is without a limit, or has the fixed
    one. Whoever runs then has just begun, but for what a suspension or a lost rank has interrupted.
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
        """The wave or the generation is over: what was agreed in it is void."""
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
        self._outcome = decide(reduced)

    def urgent(self, load: Load) -> bool:
        """Whether this rank has a prompt for which the quota was not made."""
        if self._setting != AUTO or self._outcome.pending or self._outcome.quota is None:
            return False
        return pending(load) > self._outcome.quota


def pending(load: Load) -> int:
    """Prompt tokens that a rank with this load could compute in its next step, were there no limit."""
    return load.prefill_tokens if load.startable_tokens is None else load.startable_tokens
